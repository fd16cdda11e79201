//! Launcher of `cuda/observe.cu`.

use crate::{
    Dtype, Kernels,
    module::Launch,
    store::{Address, device_repr},
};
use cudarc::driver::{CudaStream, DriverError};

/// See [`Kernels::observe`].
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct ObserveParams {
    /// Queries: element (token, i) at `token * q_stride + i`.
    pub q: Address,
    /// Out: f32 `[seats, size, width]`; the query of position p is at `p % size`.
    pub ring: Address,
    /// Spans of the step.
    pub spans: Address,
    /// u32 `[tokens]`: each token's span.
    pub span_of: Address,
    /// Elements from token to token.
    pub q_stride: u32,
    /// Elements of a token: query heads times head size.
    pub width: u32,
    /// Queries remembered for each sequence.
    pub size: u32,
}

device_repr!(ObserveParams);

impl Kernels {
    /// Remembers the newest queries of each span.
    ///
    /// # Safety
    /// Every address is good and of the size its field says; queries are of `dtype`.
    pub unsafe fn observe(
        &self,
        stream: &CudaStream,
        dtype: Dtype,
        tokens: u32,
        params: &ObserveParams,
    ) -> Result<(), DriverError> {
        let launch = Launch { grid: (tokens, 1, 1), threads: 256, shared: 0 };
        // SAFETY: the caller's.
        unsafe { self.launch(stream, ("observe", &format!("observe_{}", dtype.suffix())), launch, params) }
    }
}
