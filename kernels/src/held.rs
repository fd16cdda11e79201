//! Launchers of `cuda/held.cu`: a policy's view of held entries, dense and oldest first.

use crate::{
    Dtype, Kernels, Store,
    module::Launch,
    store::{Address, device_repr},
};
use cudarc::driver::{CudaStream, DriverError};

const THREADS: u32 = 256;
/// Elements a thread of `gather` has in flight.
const BATCH: u32 = 4;

/// Rows of one layer, listed spans outermost.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct ListedRows {
    /// The store.
    pub store: Store,
    /// Spans of the step.
    pub spans: Address,
    /// u32 `[listed]`: indices of the spans to show.
    pub list: Address,
    /// u32 `[listed, heads, max_len]`: slots, oldest entry first, then [`u32::MAX`]. Made by [`Kernels::order`], read
    /// by the others.
    pub order: Address,
    /// The layer.
    pub layer: u32,
    /// No listed row is longer.
    pub max_len: u32,
}

/// See [`Kernels::order`].
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct OrderParams {
    /// The rows.
    pub rows: ListedRows,
    /// Out: u32 `[listed, heads]`, entries of each row.
    pub lens: Address,
    /// No listed sequence has seen more tokens, those of the step included.
    pub seen: u32,
}

/// See [`Kernels::gather`].
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct GatherParams {
    /// The rows.
    pub rows: ListedRows,
    /// The store's keys or values.
    pub plane: Address,
    /// Out: f32 `[listed, heads, max_len, head_dim]`.
    pub out: Address,
    /// f32 `[heads, head_dim]`: what stored components are to be multiplied by; 0 for nothing.
    pub key_factors: Address,
    /// 1 if the plane is the values'.
    pub values: u32,
}

/// See [`Kernels::lanes`]. Each is f32 `[listed, heads, max_len]`, 0 if it is not wanted.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct LanesParams {
    /// The rows.
    pub rows: ListedRows,
    /// Out: positions.
    pub positions: Address,
    /// Out: carried scores.
    pub scores: Address,
    /// Out: 1 where there is an entry.
    pub valid: Address,
}

/// See [`Kernels::scatter`].
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct ScatterParams {
    /// As in [`ListedRows`].
    pub order: Address,
    /// f32 `[listed, heads, max_len]`, oldest entry first.
    pub dense: Address,
    /// Out: the same in slot order; what lies beyond a row's length is not written.
    pub out: Address,
    /// The longest row there is room for.
    pub max_len: u32,
}

/// See [`Kernels::positions`].
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct PositionsParams {
    /// The store.
    pub store: Store,
    /// Out: u32 `[len]`, in slot order.
    pub out: Address,
    /// Index of the row.
    pub row: u32,
    /// Its entries.
    pub len: u32,
}

device_repr!(PositionsParams, ListedRows, OrderParams, GatherParams, LanesParams, ScatterParams);

/// Shared memory of `order` in bytes: a bit a position, and a count every 64.
fn order_shared(seen: u32) -> u32 {
    seen.div_ceil(64) * 12
}

impl Kernels {
    /// Finds the slots of `listed` spans' entries in the order of their positions.
    ///
    /// # Safety
    /// Every address is good and of the size its field says, and both bounds hold.
    pub unsafe fn order(&self, stream: &CudaStream, listed: u32, params: &OrderParams) -> Result<(), DriverError> {
        let threads = if params.rows.max_len <= 2048 { 256 } else { 1024 };
        let grid = (listed * params.rows.store.heads, 1, 1);
        let launch = Launch { grid, threads, shared: order_shared(params.seen) };
        // SAFETY: the caller's.
        unsafe { self.launch(stream, ("held", "order"), launch, params) }
    }

    /// Copies keys or values to a dense tensor, padded with zeros.
    ///
    /// # Safety
    /// Every address is good and of the size its field says; the plane is of `dtype`; `order` was made.
    pub unsafe fn gather(
        &self,
        stream: &CudaStream,
        dtype: Dtype,
        listed: u32,
        params: &GatherParams,
    ) -> Result<(), DriverError> {
        let Store { heads, head_dim, .. } = params.rows.store;
        let pieces = if head_dim.is_multiple_of(4) { head_dim / 4 } else { head_dim };
        let blocks = (params.rows.max_len * pieces).div_ceil(THREADS * BATCH);
        let launch = Launch { grid: (blocks, listed * heads, 1), threads: THREADS, shared: 0 };
        // SAFETY: the caller's.
        unsafe { self.launch(stream, ("held", &format!("gather_{}", dtype.suffix())), launch, params) }
    }

    /// Copies what else is known of each entry, padded with zeros.
    ///
    /// # Safety
    /// Every address is good and of the size its field says; `order` was made.
    pub unsafe fn lanes(&self, stream: &CudaStream, listed: u32, params: &LanesParams) -> Result<(), DriverError> {
        let rows = listed * params.rows.store.heads;
        let launch = Launch { grid: (params.rows.max_len.div_ceil(THREADS), rows, 1), threads: THREADS, shared: 0 };
        // SAFETY: the caller's.
        unsafe { self.launch(stream, ("held", "lanes"), launch, params) }
    }

    /// Copies the positions of one row.
    ///
    /// # Safety
    /// Every address is good and of the size its field says.
    pub unsafe fn positions(&self, stream: &CudaStream, params: &PositionsParams) -> Result<(), DriverError> {
        let launch = Launch { grid: (params.len.div_ceil(THREADS), 1, 1), threads: THREADS, shared: 0 };
        // SAFETY: the caller's.
        unsafe { self.launch(stream, ("held", "positions"), launch, params) }
    }

    /// Brings numbers given oldest entry first into slot order; `rows`: of the tensor.
    ///
    /// # Safety
    /// Every address is good and of the size its field says; `order` was made.
    pub unsafe fn scatter(&self, stream: &CudaStream, rows: u32, params: &ScatterParams) -> Result<(), DriverError> {
        let launch = Launch { grid: (params.max_len.div_ceil(THREADS), rows, 1), threads: THREADS, shared: 0 };
        // SAFETY: the caller's.
        unsafe { self.launch(stream, ("held", "scatter"), launch, params) }
    }
}
