//! Attention of a training step whose gates are soft, forward and backward.

use crate::{
    Dtype, Kernels,
    module::Launch,
    store::{Address, device_repr},
};
use cudarc::driver::{CudaStream, DriverError};

/// What forward and backward have in common. `sequences` sequences of `length` tokens lie end to end.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Soft {
    /// Queries, keys and values `[tokens, q_heads + 2 kv_heads, head_dim]`.
    pub qkv: Address,
    /// Log-probabilities that keys are kept, f32 `[tokens, kv_heads]`; or null for zeros.
    pub keep: Address,
    /// Number of sequences.
    pub sequences: u32,
    /// Tokens of each.
    pub length: u32,
    /// Query heads.
    pub q_heads: u32,
    /// KV heads, of which the query heads are a multiple.
    pub kv_heads: u32,
    /// Elements of a head.
    pub head_dim: u32,
    /// A gate counts for queries further than this behind its key.
    pub window: i32,
    /// Of the scores; positive.
    pub scale: f32,
}

/// What [`Kernels::soft_forward`] takes.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct SoftForward {
    /// The operands.
    pub soft: Soft,
    /// Output `[tokens, q_heads, head_dim]`.
    pub y: Address,
    /// Natural logarithm of each query's softmax sum, f32 `[tokens, q_heads]`.
    pub lse: Address,
}

/// What [`Kernels::soft_backward`] takes.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct SoftBackward {
    /// The operands.
    pub soft: Soft,
    /// What forward gave.
    pub y: Address,
    /// Gradient of `y`, of its shape and dtype.
    pub dy: Address,
    /// What forward gave.
    pub lse: Address,
    /// Scratch of 8 bytes for each token and query head, aligned to 8.
    pub rows: Address,
    /// Gradient of `qkv`, of its shape and dtype; all of it is written.
    pub dqkv: Address,
    /// Gradient of `keep`, f32 `[tokens, kv_heads]`; all of it is written.
    pub dkeep: Address,
}

device_repr!(Soft, SoftForward, SoftBackward);

/// How the kernels for tensor cores are cut: rows of a thread block and its bytes of shared memory.
struct Tiles {
    forward: (u32, u32),
    keys: (u32, u32),
    queries: (u32, u32),
}

const THREADS: u32 = 128;
/// Rows of a thread block without tensor cores: a warp for each.
const PLAIN_ROWS: u32 = THREADS / 32;

impl Tiles {
    /// None if no kernel was compiled for it, or the tensors do not lie at multiples of 16 bytes.
    fn of(dtype: Dtype, head_dim: u32, tensors: &[Address]) -> Option<Self> {
        if dtype == Dtype::F32 || tensors.iter().any(|address| address % 16 != 0) {
            return None;
        }
        let (forward, keys, queries) = match head_dim {
            32 => ((128, 31744), (128, 41984), (128, 41984)),
            64 => ((128, 50176), (128, 66560), (128, 66560)),
            128 => ((128, 99328), (64, 99328), (64, 99328)),
            _ => return None,
        };
        Some(Self { forward, keys, queries })
    }
}

impl Soft {
    /// Blocks of `rows` tokens of each of `heads` heads.
    fn tiled(&self, (rows, shared): (u32, u32), heads: u32) -> Launch {
        Launch { grid: (self.length.div_ceil(rows) * heads * self.sequences, 1, 1), threads: THREADS, shared }
    }

    /// Warps for each of `heads` heads of a token, with `vectors` sums.
    fn plain(&self, heads: u32, vectors: u32) -> Launch {
        let rows = self.sequences * self.length * heads;
        let shared = PLAIN_ROWS * vectors * self.head_dim * 4;
        Launch { grid: (rows.div_ceil(PLAIN_ROWS), 1, 1), threads: THREADS, shared }
    }
}

impl Kernels {
    /// Query i of a sequence attends to its keys j <= i with the scores `scale q_i . k_j`, to which `keep_j` is added
    /// where `i - j > window`. Tensor cores take f16 and bf16 of head dims 32, 64 and 128.
    ///
    /// # Safety
    /// The addresses hold what [`SoftForward`] says until the stream has passed the kernel; `qkv` has fewer than 2^31
    /// heads of tokens.
    ///
    /// # Errors
    /// The driver's.
    pub unsafe fn soft_forward(
        &self,
        stream: &CudaStream,
        dtype: Dtype,
        params: &SoftForward,
    ) -> Result<(), DriverError> {
        let (soft, suffix) = (&params.soft, dtype.suffix());
        let (module, name, launch) = match Tiles::of(dtype, soft.head_dim, &[soft.qkv, params.y]) {
            Some(tiles) => {
                ("soft", format!("soft_{suffix}_{}", soft.head_dim), soft.tiled(tiles.forward, soft.q_heads))
            }
            None => ("soft_plain", format!("soft_plain_{suffix}"), soft.plain(soft.q_heads, 1)),
        };
        // SAFETY: the caller's.
        unsafe { self.launch(stream, (module, &name), launch, params) }
    }

    /// The gradients of [`Kernels::soft_forward`]; every run sums in the same order.
    ///
    /// # Safety
    /// As for [`Kernels::soft_forward`].
    ///
    /// # Errors
    /// The driver's.
    pub unsafe fn soft_backward(
        &self,
        stream: &CudaStream,
        dtype: Dtype,
        params: &SoftBackward,
    ) -> Result<(), DriverError> {
        let (soft, suffix) = (&params.soft, dtype.suffix());
        let rows = soft.sequences * soft.length * soft.q_heads;
        let rows = Launch { grid: (rows.div_ceil(THREADS / 8), 1, 1), threads: THREADS, shared: 0 };
        let of_head = format!("{suffix}_{}", soft.head_dim);
        let tensors = [soft.qkv, params.y, params.dy, params.dqkv];
        let (module, steps) = match Tiles::of(dtype, soft.head_dim, &tensors) {
            Some(tiles) => (
                "soft",
                [
                    (format!("soft_rows_{suffix}"), rows),
                    (format!("soft_keys_{of_head}"), soft.tiled(tiles.keys, soft.kv_heads)),
                    (format!("soft_queries_{of_head}"), soft.tiled(tiles.queries, soft.q_heads)),
                ],
            ),
            None => (
                "soft_plain",
                [
                    (format!("soft_plain_rows_{suffix}"), rows),
                    (format!("soft_plain_keys_{suffix}"), soft.plain(soft.kv_heads, 2)),
                    (format!("soft_plain_queries_{suffix}"), soft.plain(soft.q_heads, 1)),
                ],
            ),
        };
        // SAFETY: the caller's; the first leaves what the others read.
        steps.iter().try_for_each(|(name, launch)| unsafe { self.launch(stream, (module, name), *launch, params) })
    }
}
