//! Launchers of `cuda/plan.cu`: once per step.

use crate::{
    Kernels, Ring, Sharing, Store,
    module::Launch,
    store::{Address, device_repr},
};
use cudarc::driver::{CudaStream, DriverError};

const THREADS: u32 = 1024;

/// What a plan must know of a layer beside the store.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct LayerPlan {
    /// Where the newest positions are.
    pub ring: Ring,
    /// First positions that never die.
    pub sinks: u32,
    /// A marked entry this old is dead and its slot is free for the next token; 0 if none was marked.
    pub reuse_age: u32,
}

/// See [`Kernels::plan`].
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct PlanParams {
    /// The store.
    pub store: Store,
    /// Pages that sequences share: those that the step writes to are replaced, and [`Kernels::copy_pages`] is to follow.
    pub sharing: Sharing,
    /// `[span_count]` [`Span`](crate::Span).
    pub spans: Address,
    /// `[layers]` [`LayerPlan`].
    pub layers: Address,
    /// Spans of the step.
    pub span_count: u32,
    /// First layer to plan.
    pub first_layer: u32,
    /// Layers to plan.
    pub layer_count: u32,
}

/// One row of a step's decode attention, made by [`Kernels::schedule`].
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
#[allow(missing_docs)] // see work.cuh
pub struct RowWork {
    pub first_tile: u32,
    pub len: u32,
    pub row: u32,
    pub token: u32,
}

/// What one block of decode attention walks, made by [`Kernels::schedule`].
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
#[allow(missing_docs)] // see work.cuh
pub struct BlockWork {
    pub row: u32,
    pub tile: u32,
    pub tiles: u32,
    pub all: u32,
    pub busy: u32,
    pub work: RowWork,
}

/// See [`Kernels::schedule`].
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct ScheduleParams {
    /// The store.
    pub store: Store,
    /// Spans of the step.
    pub spans: Address,
    /// u32 `[single_count]`: the spans of one token.
    pub singles: Address,
    /// Out: `[layers, max_rows]` [`RowWork`].
    pub rows: Address,
    /// Out: `[layers, block_count]` [`BlockWork`].
    pub blocks: Address,
    /// Spans of one token.
    pub single_count: u32,
    /// Rows there is room for in each layer.
    pub max_rows: u32,
    /// Blocks of the attention kernel.
    pub block_count: u32,
    /// First layer.
    pub first_layer: u32,
    /// log2 of the entries of a tile.
    pub tile_shift: u32,
    /// Tiles of a block that has any: fewer cost more to merge than they save.
    pub least_tiles: u32,
}

#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct ClearParams {
    store: Store,
}

// SAFETY: all zeros is a layer where nothing was marked.
unsafe impl cudarc::driver::ValidAsZeroBits for LayerPlan {}
// SAFETY: all zeros is no work.
unsafe impl cudarc::driver::ValidAsZeroBits for RowWork {}
// SAFETY: as above.
unsafe impl cudarc::driver::ValidAsZeroBits for BlockWork {}
device_repr!(LayerPlan, PlanParams, RowWork, BlockWork, ScheduleParams, ClearParams);

impl Kernels {
    /// Makes a store empty, every page free.
    ///
    /// # Safety
    /// The store's addresses are good.
    pub unsafe fn clear(&self, stream: &CudaStream, store: Store) -> Result<(), DriverError> {
        let launch = Launch { grid: (256, 1, 1), threads: 256, shared: 0 };
        // SAFETY: the caller's.
        unsafe { self.launch(stream, ("plan", "clear"), launch, &ClearParams { store }) }
    }

    /// Chooses where each row's new tokens go, hands out pages, and drops the sequences that find none.
    ///
    /// # Safety
    /// Every address is good and of the size its field says.
    pub unsafe fn plan(&self, stream: &CudaStream, params: &PlanParams) -> Result<(), DriverError> {
        let launch = Launch { grid: (1, 1, 1), threads: THREADS, shared: params.span_count * 16 };
        // SAFETY: the caller's.
        unsafe { self.launch(stream, ("plan", "plan"), launch, params) }
    }

    /// Cuts the decode attention of `layers` layers into equal runs.
    ///
    /// # Safety
    /// Every address is good and of the size its field says.
    pub unsafe fn schedule(
        &self,
        stream: &CudaStream,
        params: &ScheduleParams,
        layers: u32,
    ) -> Result<(), DriverError> {
        let launch = Launch { grid: (layers, 1, 1), threads: THREADS, shared: 0 };
        // SAFETY: the caller's.
        unsafe { self.launch(stream, ("plan", "schedule"), launch, params) }
    }
}
