//! A store of ragged rows, made by hand: lengths as an evicting policy leaves them, pages in random places.

use super::Heads;
use anyhow::Result;
use cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DeviceRepr, ValidAsZeroBits};
use half::bf16;
use kvpolicy_kernels::{
    BlockWork, Counters, DecodeParams, DecodeShape, Dtype, Kernels, Protect, RowWork, ScheduleParams, Span, Store,
};
use rand::{Rng, SeedableRng, rngs::StdRng, seq::SliceRandom};
use std::sync::Arc;

/// What the kernel chooses by itself, to be tried otherwise.
#[derive(Debug, Clone, Copy, clap::Args)]
pub(super) struct Tuning {
    /// Blocks of the kernel per multiprocessor.
    #[arg(long)]
    pub(super) blocks: Option<u32>,
    /// Warps of a block, 4 or 8.
    #[arg(long)]
    pub(super) warps: Option<u32>,
    /// Layers of keys and values that are read in turn; by default as many as leave nothing in the cache.
    #[arg(long)]
    pub(super) layers: Option<usize>,
    /// Tiles that a block has at the least.
    #[arg(long)]
    pub(super) least_tiles: Option<u32>,
}

/// How entries are stored.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pages {
    /// Entries.
    pub(super) size: usize,
    /// Bf16, fp8 or int8.
    pub(super) dtype: Dtype,
}

/// One decode step's attention over `layers` layers of ragged rows.
pub(super) struct Ragged {
    stream: Arc<CudaStream>,
    kernels: Arc<Kernels>,
    store: Store,
    heads: Heads,
    dtype: Dtype,
    batch: usize,
    pub(super) layers: usize,
    /// Entries of all rows of each layer.
    entries: Vec<f64>,
    blocks: u32,
    shape: DecodeShape,
    least_tiles: u32,
    u32s: Vec<CudaSlice<u32>>,
    _planes: [CudaSlice<u8>; 2],
    _factors: CudaSlice<u16>,
    q: CudaSlice<bf16>,
    y: CudaSlice<bf16>,
    parts: CudaSlice<f32>,
    rows: CudaSlice<RowWork>,
    work: CudaSlice<BlockWork>,
    spans: CudaSlice<Span>,
    _counters: CudaSlice<Counters>,
}

/// As many layers as leave nothing of one round in the cache for the next.
pub(super) fn cold_layers(heads: Heads, dtype: Dtype, batch: usize, entries: f64) -> usize {
    let layer_bytes = batch as f64 * heads.kv as f64 * entries * dtype.entry_bytes(heads.dim) as f64;
    ((400e6 / layer_bytes).ceil() as usize).clamp(2, 64)
}

/// Standard deviation of the logarithm of the lengths.
const SIGMA: f64 = 0.5;

fn lengths(rng: &mut StdRng, n: usize, mean: f64) -> Vec<u32> {
    let normal = |rng: &mut StdRng| {
        let (u, v): (f64, f64) = (1.0 - rng.random::<f64>(), rng.random());
        (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()
    };
    let draws: Vec<f64> = (0..n).map(|_| (SIGMA * normal(rng)).exp()).collect();
    let scale = mean * n as f64 / draws.iter().sum::<f64>();
    draws.iter().map(|draw| ((draw * scale) as u32).max(1)).collect()
}

impl Ragged {
    pub(super) fn new(
        stream: &Arc<CudaStream>,
        heads: Heads,
        batch: usize,
        mean: f64,
        pages_of_store: Pages,
        tuning: Tuning,
    ) -> Result<Self> {
        let kernels = Kernels::of(stream.context())?;
        let Pages { size: page_size, dtype } = pages_of_store;
        let layers = tuning.layers.unwrap_or(cold_layers(heads, dtype, batch, mean));
        let rows = layers * batch * heads.kv;
        let mut rng = StdRng::seed_from_u64(1);
        let lens = lengths(&mut rng, rows, mean);
        let pages_of = |len: u32| (len as usize).div_ceil(page_size);
        let max_pages = lens.iter().map(|&len| pages_of(len)).max().unwrap_or(1);
        let pages: usize = lens.iter().map(|&len| pages_of(len)).sum();
        let mut ids: Vec<u32> = (0..pages as u32).collect();
        ids.shuffle(&mut rng);
        let mut table = vec![0u32; rows * max_pages];
        let mut next = ids.into_iter();
        for (row, &len) in lens.iter().enumerate() {
            table[row * max_pages..][..pages_of(len)].iter_mut().zip(next.by_ref()).for_each(|(t, id)| *t = id);
        }
        let elements = pages * page_size * heads.dim;
        let planes = [plane(stream, elements, dtype)?, plane(stream, elements, dtype)?];
        let factors = stream.clone_htod(&vec![127 * 257u16; pages * page_size])?; // ones
        let width = heads.q * heads.dim;
        let group = (heads.q / heads.kv) as u32;
        use cudarc::driver::sys::CUdevice_attribute as Attribute;
        let attribute = |which| -> Result<u32> { Ok(stream.context().attribute(which)? as u32) };
        let all_shared = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR)?;
        let shared = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        let shape = DecodeShape::new(dtype, group, heads.dim as u32, shared, all_shared);
        let shape = tuning.warps.map_or(shape, |warps| shape.with_warps(warps, all_shared));
        let multiprocessors = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let blocks = multiprocessors * tuning.blocks.unwrap_or(shape.blocks_per_multiprocessor());
        let (table, lens_on_device) = (stream.clone_htod(&table)?, stream.clone_htod(&lens)?);
        let singles: Vec<u32> = (0..batch as u32).collect();
        let spans: Vec<Span> = singles.iter().map(|&i| Span { seat: i, start: 1 << 20, len: 1, first: i }).collect();
        let counters = stream.alloc_zeros(1)?;
        let (singles, positions) = (stream.clone_htod(&singles)?, stream.clone_htod(&vec![1u32 << 20; batch])?);
        let arrived = stream.alloc_zeros(batch * heads.kv * group.div_ceil(16) as usize)?;
        let address = |slice: &CudaSlice<u32>| slice.device_ptr(stream).0;
        let store = Store {
            k: planes[0].device_ptr(stream).0,
            v: planes[1].device_ptr(stream).0,
            factor: factors.device_ptr(stream).0,
            len: address(&lens_on_device),
            table: address(&table),
            counters: counters.device_ptr(stream).0,
            layers: layers as u32,
            seats: batch as u32,
            heads: heads.kv as u32,
            head_dim: heads.dim as u32,
            page_shift: page_size.ilog2(),
            max_pages: max_pages as u32,
            pages: pages as u32,
            ..Store::default()
        };
        Ok(Self {
            stream: stream.clone(),
            kernels,
            store,
            heads,
            dtype,
            batch,
            layers,
            entries: lens.chunks(batch * heads.kv).map(|layer| layer.iter().map(|&len| len as f64).sum()).collect(),
            blocks,
            shape,
            least_tiles: tuning.least_tiles.unwrap_or(shape.least_tiles()),
            u32s: vec![table, lens_on_device, singles, positions, arrived],
            _planes: planes,
            _factors: factors,
            q: random(stream, batch * width)?,
            y: stream.alloc_zeros(batch * width)?,
            parts: stream.alloc_zeros(shape.scratch(blocks))?,
            rows: stream.alloc_zeros(rows)?,
            work: stream.alloc_zeros(layers * blocks as usize)?,
            spans: stream.clone_htod(&spans)?,
            _counters: counters,
        })
    }

    /// Bytes of keys and values that attention reads in the first `layers`, mean over them.
    pub(super) fn bytes(&self, layers: usize) -> f64 {
        let entries: f64 = self.entries[..layers].iter().sum();
        entries / layers as f64 * self.dtype.entry_bytes(self.heads.dim) as f64
    }

    /// Bytes that [`Ragged::schedule`] reads and writes.
    pub(super) fn schedule_bytes(&self) -> f64 {
        let rows = self.batch * self.heads.kv * (size_of::<u32>() + size_of::<RowWork>());
        (self.layers * (rows + self.blocks as usize * size_of::<BlockWork>())) as f64
    }

    pub(super) fn schedule(&self) -> Result<()> {
        let params = ScheduleParams {
            store: self.store,
            spans: self.spans.device_ptr(&self.stream).0,
            singles: self.u32s[2].device_ptr(&self.stream).0,
            rows: self.rows.device_ptr(&self.stream).0,
            blocks: self.work.device_ptr(&self.stream).0,
            single_count: self.batch as u32,
            max_rows: (self.batch * self.heads.kv) as u32,
            block_count: self.blocks,
            first_layer: 0,
            tile_shift: self.shape.tile_shift(),
            least_tiles: self.least_tiles,
        };
        // SAFETY: every buffer was made for this shape.
        Ok(unsafe { self.kernels.schedule(&self.stream, &params, self.layers as u32) }?)
    }

    pub(super) fn attend(&self, layer: usize) -> Result<()> {
        let rows = self.batch * self.heads.kv;
        let params = DecodeParams {
            store: self.store,
            q: self.q.device_ptr(&self.stream).0,
            y: self.y.device_ptr(&self.stream).0,
            lse: 0,
            rows: self.rows.device_ptr(&self.stream).0 + (layer * rows * size_of::<RowWork>()) as u64,
            blocks: self.work.device_ptr(&self.stream).0
                + (layer * self.blocks as usize * size_of::<BlockWork>()) as u64,
            parts: self.parts.device_ptr(&self.stream).0,
            arrived: self.u32s[4].device_ptr(&self.stream).0,
            positions: self.u32s[3].device_ptr(&self.stream).0,
            q_heads: self.heads.q as u32,
            q_stride: (self.heads.q * self.heads.dim) as u32,
            group: (self.heads.q / self.heads.kv) as u32,
            row_count: rows as u32,
            scale: std::f32::consts::LOG2_E / (self.heads.dim as f32).sqrt(),
            protect: Protect::default(),
            check_marks: 0,
        };
        // SAFETY: as above; the schedule was made.
        Ok(unsafe { self.kernels.decode(&self.stream, self.dtype, self.shape, self.blocks, &params) }?)
    }
}

/// Numbers in (-1, 1).
pub(super) fn random(stream: &Arc<CudaStream>, n: usize) -> Result<CudaSlice<bf16>> {
    repeated(stream, n, |rng| bf16::from_f32(rng.random_range(-1.0..1.0)))
}

/// Stored components in (-1, 1).
fn plane(stream: &Arc<CudaStream>, elements: usize, dtype: Dtype) -> Result<CudaSlice<u8>> {
    if dtype.bytes() == 1 {
        // Fp8's code of 1 is 0x38.
        return repeated(stream, elements, |rng| rng.random_range(0..0x38u8) | if rng.random() { 0x80 } else { 0 });
    }
    let number = |rng: &mut StdRng| bf16::from_f32(rng.random_range(-1.0..1.0));
    let mut high = None; // bytes of numbers in turn, low ones first
    repeated(stream, 2 * elements, |rng| match high.take() {
        Some(byte) => byte,
        None => {
            let [low, next] = number(rng).to_le_bytes();
            high = Some(next);
            low
        }
    })
}

/// Made on the host once and repeated.
fn repeated<T: DeviceRepr + ValidAsZeroBits>(
    stream: &Arc<CudaStream>,
    n: usize,
    draw: impl FnMut(&mut StdRng) -> T,
) -> Result<CudaSlice<T>> {
    const PIECE: usize = 1 << 20;
    let mut rng = StdRng::seed_from_u64(n as u64);
    let mut draw = draw;
    let piece: Vec<T> = (0..PIECE.min(n)).map(|_| draw(&mut rng)).collect();
    let piece = stream.clone_htod(&piece)?;
    let mut out = stream.alloc_zeros::<T>(n)?;
    for from in (0..n).step_by(PIECE) {
        let len = PIECE.min(n - from);
        stream.memcpy_dtod(&piece.slice(..len), &mut out.slice_mut(from..from + len))?;
    }
    Ok(out)
}
