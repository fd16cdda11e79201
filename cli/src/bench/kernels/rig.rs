//! A whole store, made without a cache: rows of one length, filled and changed by the kernels that a cache would launch.

use super::{Heads, ragged::random};
use anyhow::Result;
use cudarc::driver::{CudaSlice, CudaStream, DevicePtr};
use half::bf16;
use kvpolicy_kernels::{
    Address, AppendParams, Counters, Dtype, GatherParams, Kernels, LayerPlan, ListedRows, Marks, MassParams,
    ObserveParams, OrderParams, PlanParams, PrefillParams, PrefillShape, Protect, Ring, Sharing, Span, Store,
    TrimParams,
};
use rand::{Rng, SeedableRng, rngs::StdRng, seq::SliceRandom};
use std::sync::Arc;

/// Entries a row has room for beside those it is filled with.
pub(super) const SLACK: usize = 256;
/// Queries remembered for each sequence.
const REMEMBERED: usize = 32;

/// The new tokens of a step.
pub(super) struct Tokens {
    list: Vec<Span>,
    spans: CudaSlice<Span>,
    span_of: CudaSlice<u32>,
    pub(super) count: usize,
}

/// How large a rig is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Size {
    pub(super) heads: Heads,
    pub(super) batch: usize,
    pub(super) layers: usize,
    /// Entries of each row.
    pub(super) held: usize,
    /// Tokens that have queries.
    pub(super) queries: usize,
    pub(super) page_size: usize,
}

/// A store of `layers` layers and one sequence a seat.
pub(super) struct Rig {
    stream: Arc<CudaStream>,
    kernels: Arc<Kernels>,
    store: Store,
    pub(super) heads: Heads,
    pub(super) batch: usize,
    pub(super) layers: usize,
    /// Entries that each row is filled with.
    pub(super) held: usize,
    q: CudaSlice<bf16>,
    k: CudaSlice<bf16>,
    v: CudaSlice<bf16>,
    /// First scores of the tokens.
    scores: CudaSlice<f32>,
    lse: CudaSlice<f32>,
    /// Output of attention, or gathered keys.
    out: CudaSlice<f32>,
    order: CudaSlice<u32>,
    lens: CudaSlice<u32>,
    queries: CudaSlice<f32>,
    list: CudaSlice<u32>,
    layer_plans: CudaSlice<LayerPlan>,
    /// What fills the rows.
    pub(super) fill: Tokens,
    _memory: Vec<CudaSlice<u8>>,
}

impl Rig {
    /// A store whose rows hold `held` entries each, pages in random places.
    pub(super) fn new(stream: &Arc<CudaStream>, size: Size) -> Result<Self> {
        let Size { heads, batch, layers, held, queries, page_size } = size;
        let rows = layers * batch * heads.kv;
        let max_pages = (held + SLACK).div_ceil(page_size);
        let (pages, tokens) = (rows * max_pages, batch * held);
        let entries = pages * page_size;
        let mut memory = vec![];
        let mut room = |bytes: usize| -> Result<Address> {
            let slice = stream.alloc_zeros::<u8>(bytes)?;
            let address = slice.device_ptr(stream).0;
            memory.push(slice);
            Ok(address)
        };
        let store = Store {
            k: room(entries * heads.dim * 2)?,
            v: room(entries * heads.dim * 2)?,
            tag: room(entries * 4)?,
            score: room(entries * 4)?,
            factor: 0,
            len: room(rows * 4)?,
            owned: room(rows * 4)?,
            newest: room(rows * 4)?,
            target: room(rows * 4)?,
            table: room(pages * 4)?,
            free_pages: room(pages * 4)?,
            failed: room(batch * 8)?,
            counters: room(size_of::<Counters>())?,
            layers: layers as u32,
            seats: batch as u32,
            heads: heads.kv as u32,
            head_dim: heads.dim as u32,
            page_shift: page_size.ilog2(),
            max_pages: max_pages as u32,
            pages: pages as u32,
        };
        let mut rng = StdRng::seed_from_u64(1);
        let scores: Vec<f32> = (0..tokens * heads.kv).map(|_| rng.random()).collect();
        let list: Vec<u32> = (0..batch as u32).collect();
        let rig = Self {
            kernels: Kernels::of(stream.context())?,
            store,
            heads,
            batch,
            layers,
            held,
            q: random(stream, queries * heads.q * heads.dim)?,
            k: random(stream, tokens * heads.kv * heads.dim)?,
            v: random(stream, tokens * heads.kv * heads.dim)?,
            scores: stream.clone_htod(&scores)?,
            lse: stream.clone_htod(&vec![8.0; queries * heads.q])?,
            out: stream.alloc_zeros((batch * heads.kv * (held + 1)).max(queries * heads.q) * heads.dim)?,
            order: stream.alloc_zeros(batch * heads.kv * (held + SLACK))?,
            lens: stream.alloc_zeros(batch * heads.kv)?,
            queries: stream.alloc_zeros(batch * REMEMBERED * heads.q * heads.dim)?,
            list: stream.clone_htod(&list)?,
            layer_plans: stream.alloc_zeros(layers)?,
            fill: Tokens::new(stream, batch, 0, held)?,
            _memory: memory,
            stream: stream.clone(),
        };
        rig.shuffle_pages(&mut rng)?;
        rig.plan(&rig.fill)?;
        (0..layers).try_for_each(|layer| rig.append(layer, &rig.fill))?;
        Ok(rig)
    }

    /// Empties the store and mixes its free pages.
    fn shuffle_pages(&self, rng: &mut StdRng) -> Result<()> {
        // SAFETY: the store has the sizes that it says.
        unsafe { self.kernels.clear(&self.stream, self.store) }?;
        let mut ids: Vec<u32> = (0..self.store.pages).collect();
        ids.shuffle(rng);
        // SAFETY: as above; the copy has read `ids` before it returns, the memory is not page-locked.
        unsafe { cudarc::driver::result::memcpy_htod_async(self.store.free_pages, &ids, self.stream.cu_stream()) }?;
        Ok(self.stream.synchronize()?)
    }

    fn at<T>(&self, slice: &CudaSlice<T>) -> Address {
        slice.device_ptr(&self.stream).0
    }

    /// Makes room for tokens in each layer.
    pub(super) fn plan(&self, tokens: &Tokens) -> Result<()> {
        let params = PlanParams {
            store: self.store,
            sharing: Sharing::default(),
            spans: self.at(&tokens.spans),
            layers: self.at(&self.layer_plans),
            span_count: tokens.list.len() as u32,
            first_layer: 0,
            layer_count: self.store.layers,
        };
        // SAFETY: every buffer was made for this shape, here and below.
        Ok(unsafe { self.kernels.plan(&self.stream, &params) }?)
    }

    /// Writes tokens where [`Rig::plan`] said.
    pub(super) fn append(&self, layer: usize, tokens: &Tokens) -> Result<()> {
        let params = AppendParams {
            store: self.store,
            ring: Ring::default(),
            k: self.at(&self.k),
            v: self.at(&self.v),
            bits: 0,
            scores: self.at(&self.scores),
            key_factors: 0,
            spans: self.at(&tokens.spans),
            span_of: self.at(&tokens.span_of),
            k_stride: self.store.heads * self.store.head_dim,
            v_stride: self.store.heads * self.store.head_dim,
            tokens: tokens.count as u32,
            layer: layer as u32,
            marks: Marks::Never,
        };
        // SAFETY: as in `plan`; there are no more tokens than fill the rows.
        Ok(unsafe { self.kernels.append(&self.stream, Dtype::Bf16, &params) }?)
    }

    /// Remembers the tokens' queries.
    pub(super) fn observe(&self, tokens: &Tokens) -> Result<()> {
        let width = (self.heads.q * self.heads.dim) as u32;
        let params = ObserveParams {
            q: self.at(&self.q),
            ring: self.at(&self.queries),
            spans: self.at(&tokens.spans),
            span_of: self.at(&tokens.span_of),
            q_stride: width,
            width,
            size: REMEMBERED as u32,
        };
        // SAFETY: as in `plan`.
        Ok(unsafe { self.kernels.observe(&self.stream, Dtype::Bf16, tokens.count as u32, &params) }?)
    }

    /// Adds the mass of the tokens' queries to the scores; with `whole` sums it over the heads, as TOVA does.
    pub(super) fn mass(&self, layer: usize, tokens: &Tokens, whole: bool) -> Result<()> {
        let params = MassParams {
            store: self.store,
            q: self.at(&self.q),
            lse: self.at(&self.lse),
            spans: self.at(&tokens.spans),
            layer: layer as u32,
            q_heads: self.heads.q as u32,
            q_stride: (self.heads.q * self.heads.dim) as u32,
            span_count: tokens.list.len() as u32,
            max_tiles: (self.held as u32 + 1).div_ceil(kvpolicy_kernels::MASS_TILE),
            scale: self.scale(),
            decay: if whole { 0.0 } else { 1.0 },
            protect: Protect::default(),
        };
        // SAFETY: as in `plan`; no row is longer than `held + 1`.
        unsafe { self.kernels.mass(&self.stream, Dtype::Bf16, &params) }?;
        if whole {
            // SAFETY: as above; the rows are equally long.
            unsafe { self.kernels.layer_mass(&self.stream, &params) }?;
        }
        Ok(())
    }

    fn scale(&self) -> f32 {
        1.0 / (self.heads.dim as f32).sqrt()
    }

    /// Leaves `keep` entries, on the device for each row of the layer, of rows that hold up to `max_len`.
    pub(super) fn trim(&self, layer: usize, tokens: &Tokens, keep: &CudaSlice<u32>, max_len: usize) -> Result<()> {
        let params = TrimParams {
            store: self.store,
            ring: Ring::default(),
            protect: Protect { sinks: 0, recent: 1 },
            spans: self.at(&tokens.spans),
            list: self.at(&self.list),
            keep: self.at(keep),
            pooled: 0,
            cuts: 0,
            scores: 0,
            layer: layer as u32,
            max_len: max_len as u32,
            vector_bytes: TrimParams::vector_bytes(Dtype::Bf16, self.store.head_dim),
        };
        // SAFETY: as in `plan`; without pooled budgets neither they nor the cuts are read.
        Ok(unsafe { self.kernels.settle(&self.stream, self.batch as u32, &params) }?)
    }

    /// A budget for [`Rig::trim`].
    pub(super) fn budget(&self, keep: usize) -> Result<CudaSlice<u32>> {
        Ok(self.stream.clone_htod(&vec![keep as u32; self.batch * self.heads.kv])?)
    }

    /// Fills the rows again after a trim.
    pub(super) fn refill(&self) -> Result<()> {
        for seat in 0..self.store.seats {
            // SAFETY: the store's own addresses.
            unsafe { self.kernels.vacate(&self.stream, self.store, Sharing::default(), seat) }?;
        }
        self.plan(&self.fill)?;
        (0..self.layers).try_for_each(|layer| self.append(layer, &self.fill))
    }

    fn listed(&self, layer: usize, tokens: &Tokens) -> ListedRows {
        ListedRows {
            store: self.store,
            spans: self.at(&tokens.spans),
            list: self.at(&self.list),
            order: self.at(&self.order),
            layer: layer as u32,
            max_len: self.held as u32 + 1,
        }
    }

    /// Finds the order of entries.
    pub(super) fn order(&self, layer: usize, tokens: &Tokens) -> Result<()> {
        let rows = self.listed(layer, tokens);
        let params = OrderParams { rows, lens: self.at(&self.lens), seen: self.held as u32 + 1 };
        // SAFETY: as in `plan`; no position is beyond those of the fill and one step.
        Ok(unsafe { self.kernels.order(&self.stream, self.batch as u32, &params) }?)
    }

    /// Copies the keys in the order that was found last.
    pub(super) fn gather(&self, layer: usize, tokens: &Tokens) -> Result<()> {
        let params = GatherParams {
            rows: self.listed(layer, tokens),
            plane: self.store.k,
            out: self.at(&self.out),
            key_factors: 0,
            values: 0,
        };
        // SAFETY: as in `plan`; `order` was made, by a layer whose rows are as long.
        Ok(unsafe { self.kernels.gather(&self.stream, Dtype::Bf16, self.batch as u32, &params) }?)
    }

    /// Attention of the tokens that fill the rows; writes what [`Rig::mass`] asks of it.
    pub(super) fn prefill(&self, layer: usize, prefill: &Prefill) -> Result<()> {
        let params = PrefillParams {
            store: self.store,
            q: self.at(&self.q),
            y: self.at(&self.out),
            lse: self.at(&self.lse),
            spans: self.at(&self.fill.spans),
            tiles: self.at(&prefill.tiles),
            sights: self.at(&prefill.sights),
            layer: layer as u32,
            q_heads: self.heads.q as u32,
            q_stride: (self.heads.q * self.heads.dim) as u32,
            tile_count: prefill.tile_count,
            span_count: self.batch as u32,
            max_tiles: prefill.shape.max_tiles(self.held as u32),
            scale: self.scale(),
            protect: Protect::default(),
        };
        // SAFETY: as in `plan`.
        Ok(unsafe { self.kernels.prefill(&self.stream, Dtype::Bf16, &params) }?)
    }
}

/// What attention of the tokens that fill a rig needs beside it.
pub(super) struct Prefill {
    shape: PrefillShape,
    tiles: CudaSlice<u32>,
    tile_count: u32,
    sights: CudaSlice<u32>,
}

impl Prefill {
    /// None for a head size without such a kernel.
    pub(super) fn new(rig: &Rig) -> Result<Option<Self>> {
        let Heads { q, kv, dim } = rig.heads;
        let Some(shape) = PrefillShape::of(dim as u32) else { return Ok(None) };
        let tiles = shape.tiles(&rig.fill.list, (q / kv) as u32);
        let sights = shape.scratch(rig.batch as u32, kv as u32, rig.held as u32).div_ceil(4);
        Ok(Some(Self {
            shape,
            tile_count: tiles.len() as u32,
            tiles: rig.stream.clone_htod(&tiles.concat())?,
            sights: rig.stream.alloc_zeros(sights)?,
        }))
    }
}

impl Tokens {
    /// `len` tokens from position `start` on of each of `batch` sequences.
    pub(super) fn new(stream: &Arc<CudaStream>, batch: usize, start: usize, len: usize) -> Result<Self> {
        let span = |i| Span { seat: i, start: start as u32, len: len as u32, first: i * len as u32 };
        let list: Vec<Span> = (0..batch as u32).map(span).collect();
        let span_of: Vec<u32> = (0..batch as u32).flat_map(|i| std::iter::repeat_n(i, len)).collect();
        Ok(Self { spans: stream.clone_htod(&list)?, span_of: stream.clone_htod(&span_of)?, count: batch * len, list })
    }
}
