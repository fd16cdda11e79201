//! Launchers of `cuda/decode.cu` and `cuda/plain.cu`.

use crate::{
    Dtype, Kernels, Protect, Store,
    module::Launch,
    store::{Address, device_repr},
};
use cudarc::driver::{CudaStream, DriverError};

const WARPS: u32 = 4;
const KEYS: u32 = 16;
/// log2 of the entries of a decode tile.
pub const DECODE_TILE_SHIFT: u32 = 6;
/// Tiles of a decode block that has any: a good number on an H100.
pub const DECODE_LEAST_TILES: u32 = 2;
/// Head sizes of the tensor core kernels.
pub const FAST_HEAD_DIMS: [u32; 5] = [64, 80, 96, 128, 256];

/// See [`Kernels::decode`].
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct DecodeParams {
    /// The store.
    pub store: Store,
    /// Queries: element (token, head, i) at `token * q_stride + head * head_dim + i`.
    pub q: Address,
    /// Out: `[tokens, q_heads, head_dim]`; only the tokens of spans of one token are written.
    pub y: Address,
    /// Out: log-sum-exp, f32 `[tokens, q_heads]`; 0 if not wanted.
    pub lse: Address,
    /// [`RowWork`](crate::RowWork) of the layer.
    pub rows: Address,
    /// [`BlockWork`](crate::BlockWork) of the layer.
    pub blocks: Address,
    /// Scratch, [`decode_scratch`] floats.
    pub parts: Address,
    /// u32 `[ceil(group / 16), row_count]`, zero before and after.
    pub arrived: Address,
    /// u32 `[tokens]`.
    pub positions: Address,
    /// Query heads.
    pub q_heads: u32,
    /// Elements from token to token.
    pub q_stride: u32,
    /// Query heads of a KV head.
    pub group: u32,
    /// Rows: spans of one token times KV heads.
    pub row_count: u32,
    /// Of the scores, log2(e) included.
    pub scale: f32,
    /// What is never evicted.
    pub protect: Protect,
    /// 1 if rows may hold dead entries.
    pub check_marks: u32,
}

/// See [`Kernels::plain`].
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct PlainParams {
    /// The store.
    pub store: Store,
    /// Queries: element (token, head, i) at `token * q_stride + head * head_dim + i`.
    pub q: Address,
    /// Out: `[tokens, q_heads, head_dim]`.
    pub y: Address,
    /// Out: log-sum-exp, f32 `[tokens, q_heads]`; 0 if not wanted.
    pub lse: Address,
    /// Spans of the step.
    pub spans: Address,
    /// u32 `[tokens]`: each token's span.
    pub span_of: Address,
    /// u32 `[tokens]`.
    pub positions: Address,
    /// The layer.
    pub layer: u32,
    /// Query heads.
    pub q_heads: u32,
    /// Elements from token to token.
    pub q_stride: u32,
    /// Query heads of a KV head.
    pub group: u32,
    /// Of the scores.
    pub scale: f32,
    /// What is never evicted.
    pub protect: Protect,
    /// Which spans: 1 those of one token, 0 the longer ones, 2 all.
    pub single: u32,
}

device_repr!(DecodeParams, PlainParams);

/// Query rows of a block: the group is cut into tiles of this many.
fn decode_rows(group: u32) -> u32 {
    if group <= 8 { 8 } else { 16 }
}

/// Floats of scratch that [`Kernels::decode`] needs.
pub fn decode_scratch(group: u32, head_dim: u32, blocks: u32) -> usize {
    (group.div_ceil(16) * blocks * 2 * part_floats(group, head_dim)) as usize
}

/// Floats of the softmax part of a row: outputs, padded by 8 a row, maxima and sums.
fn part_floats(group: u32, head_dim: u32) -> u32 {
    decode_rows(group) * (head_dim + 10)
}

/// Shared memory of a decode block in bytes.
fn decode_shared(group: u32, head_dim: u32) -> u32 {
    let stages = match head_dim {
        0..=64 => 4,
        65..=96 => 3,
        _ => 2,
    };
    WARPS * (stages * 2 * KEYS * head_dim * 2 + part_floats(group, head_dim) * 4)
}

/// Blocks of the decode kernel that one multiprocessor holds at a time, by its shared memory in bytes.
pub fn decode_blocks_per_multiprocessor(group: u32, head_dim: u32, shared: u32) -> u32 {
    let most = if head_dim <= 64 { 4 } else { 3 }; // by registers
    (shared / (decode_shared(group, head_dim) + 1024)).clamp(1, most)
}

impl Kernels {
    /// Attention of the spans of one token. `blocks` as in the schedule. For f16 and bf16 of [`FAST_HEAD_DIMS`].
    ///
    /// # Safety
    /// Every address is good and of the size its field says; queries and store are of `dtype`.
    pub unsafe fn decode(
        &self,
        stream: &CudaStream,
        dtype: Dtype,
        blocks: u32,
        params: &DecodeParams,
    ) -> Result<(), DriverError> {
        let head_dim = params.store.head_dim;
        let name = format!("decode_{}_{head_dim}_{}", dtype.suffix(), decode_rows(params.group));
        let launch = Launch {
            grid: (blocks, params.group.div_ceil(16), 1),
            threads: WARPS * 32,
            shared: decode_shared(params.group, head_dim),
        };
        // SAFETY: the caller's.
        unsafe { self.launch(stream, ("decode", &name), launch, params) }
    }

    /// Attention of `tokens` tokens without tensor cores, for any head size.
    ///
    /// # Safety
    /// Every address is good and of the size its field says; queries and store are of `dtype`.
    pub unsafe fn plain(
        &self,
        stream: &CudaStream,
        dtype: Dtype,
        tokens: u32,
        params: &PlainParams,
    ) -> Result<(), DriverError> {
        let shared = params.store.head_dim * 4;
        let launch = Launch { grid: (tokens, params.q_heads, 1), threads: 128, shared };
        // SAFETY: the caller's.
        unsafe { self.launch(stream, ("plain", &format!("plain_{}", dtype.suffix())), launch, params) }
    }
}
