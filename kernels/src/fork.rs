//! Launchers of `cuda/fork.cu`: sequences that begin alike.

use crate::{
    Kernels, Sharing, Store,
    module::Launch,
    store::{Address, device_repr},
};
use cudarc::driver::{CudaStream, DriverError};

const THREADS: u32 = 1024;

/// See [`Kernels::fork`].
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct ForkParams {
    /// The store.
    pub store: Store,
    /// None of its addresses is 0.
    pub sharing: Sharing,
    /// u32 `[layers]`: 1 where the fork holds the same pages, 0 where it gets copies.
    pub share: Address,
    /// Out: u32, pages that were not there; nothing has changed then.
    pub missing: Address,
    /// The parent's seat.
    pub from: u32,
    /// The fork's, whose rows are empty.
    pub to: u32,
}

/// See [`Kernels::unshare`].
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct UnshareParams {
    /// The store.
    pub store: Store,
    /// None of its addresses is 0.
    pub sharing: Sharing,
    /// Spans of the step.
    pub spans: Address,
    /// u32 `[listed]`: indices of the spans to work on.
    pub list: Address,
    /// Listed spans.
    pub listed: u32,
    /// The layer.
    pub layer: u32,
}

/// See [`Kernels::copy_pages`].
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct CopyPagesParams {
    /// The store.
    pub store: Store,
    /// None of its addresses is 0.
    pub sharing: Sharing,
    /// Bytes of a key.
    pub vector_bytes: u32,
}

device_repr!(ForkParams, UnshareParams, CopyPagesParams);

impl Kernels {
    /// Gives a sequence what another holds. [`Kernels::copy_pages`] is to follow.
    ///
    /// # Safety
    /// Every address is good and of the size its field says.
    pub unsafe fn fork(&self, stream: &CudaStream, params: &ForkParams) -> Result<(), DriverError> {
        let launch = Launch { grid: (1, 1, 1), threads: THREADS, shared: 0 };
        // SAFETY: the caller's.
        unsafe { self.launch(stream, ("fork", "fork"), launch, params) }
    }

    /// Replaces what the listed spans' sequences share in a layer, and drops the sequences that find no pages.
    /// [`Kernels::copy_pages`] is to follow.
    ///
    /// # Safety
    /// Every address is good and of the size its field says.
    pub unsafe fn unshare(&self, stream: &CudaStream, params: &UnshareParams) -> Result<(), DriverError> {
        let launch = Launch { grid: (1, 1, 1), threads: THREADS, shared: 0 };
        // SAFETY: the caller's.
        unsafe { self.launch(stream, ("fork", "unshare"), launch, params) }
    }

    /// Fills the pages that the kernel before it put in the place of shared ones.
    ///
    /// # Safety
    /// Every address is good and of the size its field says.
    pub unsafe fn copy_pages(&self, stream: &CudaStream, params: &CopyPagesParams) -> Result<(), DriverError> {
        let launch = Launch { grid: (512, 1, 1), threads: 256, shared: 0 };
        // SAFETY: the caller's.
        unsafe { self.launch(stream, ("fork", "copy_pages"), launch, params) }
    }
}
