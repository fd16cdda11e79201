//! Launchers of `cuda/trim.cu`: what is dropped, and packing what stays.

use crate::{
    Dtype, Kernels, Protect, Ring, Sharing, Store,
    module::Launch,
    store::{Address, device_repr},
};
use cudarc::driver::{CudaStream, DriverError};

/// Entries a warp looks at in one go; rows are measured in these.
const CHUNK: u32 = 128;
/// Bytes of a row's record in `share`.
const ROW_BYTES: u32 = 40;
/// No limit, in [`TrimParams::keep`] and [`PooledBudget::total`].
pub const UNLIMITED: u32 = u32::MAX;

/// A budget that the heads of a sequence share.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PooledBudget {
    /// Entries over all heads; [`UNLIMITED`] for a span whose budget is not pooled.
    pub total: u32,
    /// Entries each head is sure of.
    pub floor: u32,
}

/// See [`Kernels::settle`].
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct TrimParams {
    /// The store.
    pub store: Store,
    /// The layer's ring; none where nothing was ever marked, so that nothing is dead.
    pub ring: Ring,
    /// What is never evicted.
    pub protect: Protect,
    /// Spans of the step.
    pub spans: Address,
    /// u32 `[listed]`: indices of the spans to work on.
    pub list: Address,
    /// u32 `[listed, heads]`: entries a row may hold, [`UNLIMITED`] for any number; 0 to expire only.
    pub keep: Address,
    /// `[listed]` [`PooledBudget`]; not read unless there are `cuts`.
    pub pooled: Address,
    /// Scratch, u64 `[listed, heads]`; 0 if no budget is pooled.
    pub cuts: Address,
    /// Ranking, f32 `[listed, heads, max_len]` in slot order; 0 for the carried scores.
    pub scores: Address,
    /// The layer.
    pub layer: u32,
    /// No listed row is longer.
    pub max_len: u32,
    /// Bytes of a key: a multiple of 4.
    pub vector_bytes: u32,
}

impl TrimParams {
    /// Bytes of a key of `head_dim` elements.
    pub fn vector_bytes(dtype: Dtype, head_dim: u32) -> u32 {
        head_dim * dtype.bytes()
    }
}

#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct VacateParams {
    store: Store,
    sharing: Sharing,
    seat: u32,
}

device_repr!(PooledBudget, TrimParams, VacateParams);

/// Shared memory of `settle` in bytes: a bit a slot, and a count every 64.
fn settle_shared(max_len: u32) -> u32 {
    max_len.div_ceil(CHUNK) * (CHUNK / 64) * 12
}

impl Kernels {
    /// Drops the dead entries of `listed` spans in one layer, and the lowest-scored unprotected ones until each budget
    /// holds; packs the rows and gives their empty pages back. One launch, two if there are pooled budgets.
    ///
    /// Rows of more than 262,144 entries need more than 48 KiB of shared memory; one multiprocessor of an H100 has room
    /// for 1.1 million.
    ///
    /// # Safety
    /// Every address is good and of the size its field says, and no listed row is longer than `max_len`.
    pub unsafe fn settle(&self, stream: &CudaStream, listed: u32, params: &TrimParams) -> Result<(), DriverError> {
        let heads = params.store.heads;
        if params.cuts != 0 {
            let launch = Launch { grid: (listed, 1, 1), threads: 1024, shared: heads * ROW_BYTES };
            // SAFETY: the caller's.
            unsafe { self.launch(stream, ("trim", "share"), launch, params)? };
        }
        let threads = if params.max_len <= 2048 { 256 } else { 1024 };
        let launch = Launch { grid: (heads, listed, 1), threads, shared: settle_shared(params.max_len) };
        // SAFETY: the caller's.
        unsafe { self.launch(stream, ("trim", "settle"), launch, params) }
    }

    /// Gives back every page of a sequence that no other holds; its rows are empty then and its failure is forgotten.
    ///
    /// # Safety
    /// The addresses of both are good.
    pub unsafe fn vacate(
        &self,
        stream: &CudaStream,
        store: Store,
        sharing: Sharing,
        seat: u32,
    ) -> Result<(), DriverError> {
        let launch = Launch { grid: (store.heads, store.layers, 1), threads: 64, shared: 0 };
        // SAFETY: the caller's.
        unsafe { self.launch(stream, ("trim", "vacate"), launch, &VacateParams { store, sharing, seat }) }
    }
}
