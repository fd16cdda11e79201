//! The softmax mass that queries put on entries, added to the scores.

use crate::{
    Dtype, FAST_HEAD_DIMS, Kernels, Protect, Store,
    module::Launch,
    store::{Address, device_repr},
};
use cudarc::driver::{CudaStream, DriverError};

/// What [`Kernels::mass`] takes.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct MassParams {
    /// Whose scores are updated.
    pub store: Store,
    /// Queries: element (token, head, i) at `token * q_stride + head * head_dim + i`. In a 16-bit dtype every head starts
    /// at a multiple of 16 bytes, if [`FAST_HEAD_DIMS`] has the head dim.
    pub q: Address,
    /// f32 `[tokens, q_heads]`, as attention leaves it.
    pub lse: Address,
    /// `Span`s, `[span_count]`, of different seats and at least one token.
    pub spans: Address,
    /// Of the store.
    pub layer: u32,
    /// Query heads.
    pub q_heads: u32,
    /// Elements from one token's queries to the next's.
    pub q_stride: u32,
    /// Number of spans.
    pub span_count: u32,
    /// The most tiles of [`MASS_TILE`] entries that a row of the spans may have.
    pub max_tiles: u32,
    /// Of attention's scores.
    pub scale: f32,
    /// Of the entries' scores, with each token.
    pub decay: f32,
    /// The layer's.
    pub protect: Protect,
}

device_repr!(MassParams);

/// Entries of a row that a thread block takes.
pub const MASS_TILE: u32 = 128;

#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct LayerMassParams {
    store: Store,
    spans: Address,
    layer: u32,
    q_heads: u32,
}

device_repr!(LayerMassParams);

impl Kernels {
    /// Makes the scores of each span's rows in a layer their sum over the number of query heads. `params`: as for
    /// [`Kernels::mass`], which comes before.
    ///
    /// # Safety
    /// As for [`Kernels::mass`]; the rows of a span are equally long.
    ///
    /// # Errors
    /// The driver's.
    pub unsafe fn layer_mass(&self, stream: &CudaStream, params: &MassParams) -> Result<(), DriverError> {
        let &MassParams { store, spans, layer, q_heads, span_count, max_tiles, .. } = params;
        let launch = Launch { grid: (max_tiles, span_count, 1), threads: MASS_TILE, shared: 0 };
        // SAFETY: the caller's.
        unsafe {
            self.launch(stream, ("mass", "layer_mass"), launch, &LayerMassParams { store, spans, layer, q_heads })
        }
    }

    /// With each query of each span in order: `score = decay * score + softmax mass, summed over the GQA group`.
    ///
    /// # Safety
    /// The addresses hold what [`MassParams`] says until the stream has passed the kernel.
    ///
    /// # Errors
    /// The driver's.
    pub unsafe fn mass(&self, stream: &CudaStream, dtype: Dtype, params: &MassParams) -> Result<(), DriverError> {
        let Store { heads, head_dim, .. } = params.store;
        let name = match dtype {
            Dtype::F16 | Dtype::Bf16 | Dtype::Fp8 | Dtype::Int8 if FAST_HEAD_DIMS.contains(&head_dim) => {
                format!("mass_{}_{head_dim}", dtype.suffix())
            }
            _ => format!("mass_{}", dtype.suffix()),
        };
        let launch = Launch { grid: (heads * params.max_tiles, params.span_count, 1), threads: 128, shared: 0 };
        // SAFETY: the caller's.
        unsafe { self.launch(stream, ("mass", &name), launch, params) }
    }
}
