//! Launchers of `cuda/append.cu`.

use crate::{
    Dtype, Kernels, Ring, Store,
    module::Launch,
    store::{Address, device_repr},
};
use cudarc::driver::{CudaStream, DriverError};

const WARPS: u32 = 8;

/// Which new tokens are marked.
#[repr(u32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Marks {
    /// None.
    Never = 0,
    /// All.
    Always = 1,
    /// A bit judges its own token.
    Own = 2,
    /// A bit judges the token before.
    Previous = 3,
}

/// See [`Kernels::append`].
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct AppendParams {
    /// The store.
    pub store: Store,
    /// The layer's ring; none where nothing was ever marked.
    pub ring: Ring,
    /// Keys: element (token, head, i) at `token * k_stride + head * head_dim + i`.
    pub k: Address,
    /// Values, likewise.
    pub v: Address,
    /// u8 `[tokens, heads]`; 0 without bits.
    pub bits: Address,
    /// First scores, f32 `[tokens, heads]`; 0 for zeros.
    pub scores: Address,
    /// f32 `[heads, head_dim]`: powers of two that keys are divided by before they are stored in 8 bits; 0 for none.
    pub key_factors: Address,
    /// Spans of the step.
    pub spans: Address,
    /// u32 `[tokens]`: each token's span.
    pub span_of: Address,
    /// Elements from token to token.
    pub k_stride: u32,
    /// Elements from token to token.
    pub v_stride: u32,
    /// Tokens of the step.
    pub tokens: u32,
    /// The layer.
    pub layer: u32,
    /// Which are marked.
    pub marks: Marks,
}

/// See [`Kernels::multiply_queries`].
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct MultiplyParams {
    /// bf16: element (token, head, i) at `token * q_stride + head * head_dim + i`.
    pub q: Address,
    /// Out: bf16 `[tokens, q_heads, head_dim]`.
    pub out: Address,
    /// As in [`AppendParams`].
    pub key_factors: Address,
    /// Elements from token to token.
    pub q_stride: u32,
    /// `q_heads * head_dim`.
    pub width: u32,
    /// Components of a head.
    pub head_dim: u32,
    /// Query heads of a KV head.
    pub group: u32,
}

device_repr!(AppendParams, MultiplyParams);

impl Kernels {
    /// Writes a step's tokens where [`Kernels::plan`] said.
    ///
    /// # Safety
    /// Every address is good and of the size its field says; keys and values are of `dtype`, the store's.
    pub unsafe fn append(&self, stream: &CudaStream, dtype: Dtype, params: &AppendParams) -> Result<(), DriverError> {
        let blocks = (params.tokens * params.store.heads).div_ceil(WARPS);
        let launch = Launch { grid: (blocks, 1, 1), threads: WARPS * 32, shared: 0 };
        // SAFETY: the caller's.
        unsafe { self.launch(stream, ("append", &format!("append_{}", dtype.suffix())), launch, params) }
    }
    /// Multiplies queries by what keys were divided by.
    ///
    /// # Safety
    /// Every address is good and of the size its field says.
    pub unsafe fn multiply_queries(
        &self,
        stream: &CudaStream,
        tokens: u32,
        params: &MultiplyParams,
    ) -> Result<(), DriverError> {
        let launch = Launch { grid: (params.width.div_ceil(256), tokens, 1), threads: 256, shared: 0 };
        // SAFETY: the caller's.
        unsafe { self.launch(stream, ("append", "multiply_queries"), launch, params) }
    }
}
