//! Attention of spans of several tokens.

use crate::{
    Dtype, Kernels, Protect, Span, Store,
    module::Launch,
    store::{Address, device_repr},
};
use cudarc::driver::{CudaStream, DriverError, sys::CUresult};

/// What [`Kernels::prefill`] takes. It serves all types but f32 and the head dims of [`PrefillShape`].
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct PrefillParams {
    /// Where the spans' new entries have been appended.
    pub store: Store,
    /// Queries: element (token, head, i) at `token * q_stride + head * head_dim + i`. Every head starts at a multiple of
    /// 16 bytes.
    pub q: Address,
    /// Output `[tokens, q_heads, head_dim]`, in the dtype of the queries. Spans of one token are left alone.
    pub y: Address,
    /// Natural logarithm of each query's softmax sum, f32 `[tokens, q_heads]`; infinity for a query that sees nothing. Or
    /// null.
    pub lse: Address,
    /// [`Span`]s, `[span_count]`, of different seats.
    pub spans: Address,
    /// [`PrefillShape::tiles`], `[tile_count]`.
    pub tiles: Address,
    /// Scratch of [`PrefillShape::scratch`] bytes, aligned to 16.
    pub sights: Address,
    /// Of the store.
    pub layer: u32,
    /// Query heads.
    pub q_heads: u32,
    /// Elements from one token's queries to the next's.
    pub q_stride: u32,
    /// Number of tiles of queries.
    pub tile_count: u32,
    /// Number of spans.
    pub span_count: u32,
    /// [`PrefillShape::max_tiles`].
    pub max_tiles: u32,
    /// Of the scores.
    pub scale: f32,
    /// The layer's.
    pub protect: Protect,
}

device_repr!(PrefillParams);

/// How attention of several tokens is cut into tiles for a head dim.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PrefillShape {
    rows: u32,            // queries of a tile
    keys: u32,            // entries of a tile
    threads: u32,         // of a block
    shared: u32,          // bytes of shared memory of a block
    shared_of_codes: u32, // over a store of codes
}

impl PrefillShape {
    /// The shape for a head dim; none if no kernel was compiled for it.
    pub fn of(head_dim: u32) -> Option<Self> {
        let (rows, keys, threads, shared, shared_of_codes) = match head_dim {
            64 => (128, 64, 128, 49824, 41760),
            80 => (128, 64, 128, 68256, 56096),
            96 => (128, 64, 128, 80544, 66336),
            128 => (128, 64, 128, 98976, 82720),
            256 => (64, 32, 128, 98640, 82320),
            _ => return None,
        };
        Some(Self { rows, keys, threads, shared, shared_of_codes })
    }

    /// Tokens of a tile of queries, for up to 64 query heads to a KV head.
    pub fn tokens(self, group: u32) -> u32 {
        self.rows / group
    }

    /// The tiles of queries: span, and first token within it. They are started in this order, so the costly ones come
    /// first: those that see most.
    pub fn tiles(self, spans: &[Span], group: u32) -> Vec<[u32; 2]> {
        let tokens = self.tokens(group);
        let several = spans.iter().zip(0..).filter(|(span, _)| span.len > 1);
        let tiles = several.flat_map(|(span, i)| (0..span.len).step_by(tokens as usize).map(move |token| [i, token]));
        let mut tiles: Vec<[u32; 2]> = tiles.collect();
        tiles.sort_by_key(|&[i, token]| std::cmp::Reverse(spans[i as usize].start + token));
        tiles
    }

    /// Tiles of entries in a row of `longest` entries.
    pub fn max_tiles(self, longest: u32) -> u32 {
        longest.div_ceil(self.keys).max(1)
    }

    /// Bytes of scratch, if no row of the spans has more than `longest` entries.
    pub fn scratch(self, spans: u32, kv_heads: u32, longest: u32) -> usize {
        16 * spans as usize * kv_heads as usize * self.max_tiles(longest) as usize
    }
}

impl Kernels {
    /// Attention of every span of more than one token over its sequence's rows, its own new entries among them.
    ///
    /// # Safety
    /// The addresses hold what [`PrefillParams`] says until the stream has passed the kernels.
    ///
    /// # Errors
    /// The driver's; invalid value for a head dim without a [`PrefillShape`].
    pub unsafe fn prefill(&self, stream: &CudaStream, dtype: Dtype, params: &PrefillParams) -> Result<(), DriverError> {
        let Store { heads, head_dim, .. } = params.store;
        let Some(shape) = PrefillShape::of(head_dim) else {
            return Err(DriverError(CUresult::CUDA_ERROR_INVALID_VALUE));
        };
        if params.tile_count == 0 {
            return Ok(());
        }
        let sights = format!("prefill_sights_{}", shape.keys);
        let grid = (params.max_tiles.div_ceil(4), heads, params.span_count);
        // SAFETY: the caller's.
        unsafe { self.launch(stream, ("prefill", &sights), Launch { grid, threads: 128, shared: 0 }, params)? };
        let name = format!("prefill_{}_{head_dim}", dtype.suffix());
        let shared = if dtype.bytes() == 1 { shape.shared_of_codes } else { shape.shared };
        let launch = Launch { grid: (params.tile_count * heads, 1, 1), threads: shape.threads, shared };
        // SAFETY: the caller's.
        unsafe { self.launch(stream, ("prefill", &name), launch, params) }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn tiles_cover_spans_and_late_ones_come_first() {
        let shape = PrefillShape::of(64).unwrap();
        let span = |start, len, first| Span { seat: 0, start, len, first };
        let tiles = shape.tiles(&[span(0, 65, 0), span(9, 1, 65), span(40, 22, 66)], 6);
        assert_eq!(shape.tokens(6), 21);
        assert_eq!(tiles, [[0, 63], [2, 21], [0, 42], [2, 0], [0, 21], [0, 0]]);
    }
}
