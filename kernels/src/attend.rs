//! Launchers of `cuda/decode.cu` and `cuda/plain.cu`.

use crate::{
    Dtype, Kernels, Protect, Store,
    module::Launch,
    store::{Address, device_repr},
};
use cudarc::driver::{CudaStream, DriverError};

/// Entries of a tile that one warp takes.
const KEYS: u32 = 16;
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
    /// Scratch, [`DecodeShape::scratch`] floats.
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
}

device_repr!(DecodeParams, PlainParams);

/// How decode attention is cut for a model on a GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DecodeShape {
    group: u32,
    head_dim: u32,
    /// Bytes of a stored component.
    bytes: u32,
    warps: u32,
    /// Blocks that a multiprocessor holds at a time.
    resident: u32,
}

impl DecodeShape {
    /// For a store of `dtype`. `shared`: bytes of shared memory that a block may take; `shared_of_multiprocessor`: that all
    /// its blocks may take.
    pub fn new(dtype: Dtype, group: u32, head_dim: u32, shared: u32, shared_of_multiprocessor: u32) -> Self {
        // Eight warps have fewer pieces to merge; small heads leave room for several blocks of four instead.
        let wide = Self { group, head_dim, bytes: dtype.bytes(), warps: 8, resident: 1 };
        let fits = (65..=128).contains(&head_dim) && wide.shared() <= shared;
        let shape = if fits { wide } else { Self { warps: 4, ..wide } };
        shape.resident(shared_of_multiprocessor)
    }

    /// The same with another number of warps, 4 or 8 (up to head size 128).
    pub fn with_warps(self, warps: u32, shared_of_multiprocessor: u32) -> Self {
        Self { warps, ..self }.resident(shared_of_multiprocessor)
    }

    fn resident(self, shared_of_multiprocessor: u32) -> Self {
        let by_registers = if self.head_dim <= 64 { 16 } else { 12 } / self.warps;
        Self { resident: (shared_of_multiprocessor / (self.shared() + 1024)).clamp(1, by_registers), ..self }
    }

    /// Blocks that a multiprocessor holds at a time.
    pub fn blocks_per_multiprocessor(self) -> u32 {
        self.resident
    }

    /// log2 of the entries of a tile.
    pub fn tile_shift(self) -> u32 {
        (self.warps * KEYS).ilog2()
    }

    /// Tiles of a block that has any.
    pub fn least_tiles(self) -> u32 {
        256 / (self.warps * KEYS)
    }

    /// Query rows of a block: the group is cut into tiles of this many.
    fn rows(self) -> u32 {
        if self.group <= 8 { 8 } else { 16 }
    }

    /// Floats of the softmax part of a row: outputs, padded by 8 a row, maxima and sums.
    fn part_floats(self) -> u32 {
        self.rows() * (self.head_dim + 10)
    }

    /// Floats of scratch for this many blocks.
    pub fn scratch(self, blocks: u32) -> usize {
        (self.group.div_ceil(16) * blocks * 2 * self.part_floats()) as usize
    }

    /// Shared memory of a block in bytes.
    fn shared(self) -> u32 {
        let stages = match self.head_dim {
            0..=64 => 4,
            65..=96 => 3,
            _ => 2,
        };
        // Codes are half as large, so twice as many stages are under way, each with the entries' factors.
        let stages = if self.bytes == 1 {
            2 * stages * KEYS * (2 * self.head_dim + 2)
        } else {
            stages * 2 * KEYS * self.head_dim * 2
        };
        self.warps * (stages + self.part_floats() * 4)
    }
}

impl Kernels {
    /// Attention of the spans of one token. `blocks` as in the schedule. For all types but f32, of [`FAST_HEAD_DIMS`].
    ///
    /// # Safety
    /// Every address is good and of the size its field says; queries and store are of `dtype`; `shape` is the model's.
    pub unsafe fn decode(
        &self,
        stream: &CudaStream,
        dtype: Dtype,
        shape: DecodeShape,
        blocks: u32,
        params: &DecodeParams,
    ) -> Result<(), DriverError> {
        let DecodeShape { head_dim, warps, .. } = shape;
        let name = format!("decode_{}_{head_dim}_{}_{warps}", dtype.suffix(), shape.rows());
        let launch =
            Launch { grid: (blocks, params.group.div_ceil(16), 1), threads: warps * 32, shared: shape.shared() };
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
