//! The CUDA backend: pages, lengths and the free list live on the device, and the host never waits in a decode step.
//!
//! The host knows bounds only. Once per step a *plan* on the device chooses the slot of every new token, takes pages for
//! all layers at once, and drops the sequences that find none; a prefill plans layer by layer, since what a layer
//! evicts serves the next. Counters and failures are copied back behind each step and looked at when they have arrived.
//!
//! Decode attention reads no marks: an entry dies when the window passes it, which is when the next token takes its
//! slot, so after the append no row holds a dead entry.

mod attend;
mod fork;
mod graph;
mod held;
mod memory;
mod observe;
mod trim;

use crate::{
    backend::{Backend, Storage},
    error::{Error, Result},
    policy::{Budget, Evict, Held, Needs, NewTokens, Protect, Score, Verdict},
    spec::{Lag, ModelSpec},
    stats::Usage,
    step::{Phase, SeqId, Span},
};
use attend::DecodeScratch;
use candle_core::{DType, Device, Tensor};
use cudarc::driver::{CudaSlice, CudaStream, DriverError};
use kvpolicy_kernels::{
    self as kernels, AppendParams, Dtype, Kernels, LayerPlan, Marks, MultiplyParams, PlanParams, Ring,
};
use memory::{Control, Layout, Memory, Readback, Staging, address, scratch, zeros};
pub(crate) use memory::{output, tensor_address};
use std::{collections::HashMap, sync::Arc};

/// How the CUDA store is laid out.
#[derive(Debug, Clone)]
pub struct CudaConfig {
    /// Entries of one KV head per page: 16, 32, 64 or 128. Never changes a result beyond rounding.
    pub page_size: usize,
    /// Bytes of the pool, reserved at once, but no more than full rows take; `None` for half of what is free.
    pub limit_bytes: Option<u64>,
    /// Type of stored keys and values: f32, f16, bf16, or with a factor for each entry's key and value `F8E4M3` (fp8) and
    /// `U8` (whole numbers from -127 to 127). Beside those two, kernels compute in bf16.
    pub dtype: DType,
    /// Sequences that may hold entries at a time.
    pub max_sequences: usize,
    /// Entries a row may hold. Each row of the tables takes 4 bytes for every page of them.
    pub max_entries: usize,
}

impl Default for CudaConfig {
    fn default() -> Self {
        Self { page_size: 32, limit_bytes: None, dtype: DType::BF16, max_sequences: 64, max_entries: 1 << 17 }
    }
}

/// A GPU whose steps can be recorded as graphs: work goes to a stream of its own, and tensors do not track their uses by
/// events, since everything here uses that one stream.
///
/// # Errors
/// [`Error::Candle`] if there is no such GPU.
pub fn cuda_device(ordinal: usize) -> Result<Device> {
    let device = Device::new_cuda_with_stream(ordinal)?;
    // SAFETY: every tensor of this device is made, used and freed on its one stream.
    unsafe { device.as_cuda_device()?.disable_event_tracking() };
    Ok(device)
}

/// A CUDA backend for a model.
///
/// # Errors
/// [`Error::Config`] for a configuration that makes no sense or a device that is no GPU; [`Error::Cuda`] if the pool
/// cannot be had.
pub fn cuda(spec: &ModelSpec, config: &CudaConfig, device: &Device) -> Result<Box<dyn Backend>> {
    Ok(Box::new(Cuda::new(spec, config, device)?))
}

/// What an error of the driver happened in.
pub(crate) fn driver(what: &'static str) -> impl Fn(DriverError) -> Error {
    move |source| Error::Cuda { what, source }
}

/// What the backend keeps of a layer.
#[derive(Debug, Default)]
struct Layer {
    needs: Needs,
    ring: Option<CudaSlice<u32>>,
    plan: LayerPlan,
    /// Marked entries may be dead and still in their row when decode attends.
    check_marks: bool,
    queries: Option<observe::QueryRing>,
    asked: trim::Asked,
    /// The most entries a row holds after a trim, as of the last one.
    trimmed: Option<u32>,
}

/// What the backend keeps of a sequence.
#[derive(Debug)]
struct Seat {
    index: u32,
    /// The most entries a row of each layer may hold now.
    bounds: Vec<u32>,
    observed: Vec<observe::Observed>,
    /// Another sequence may hold some of its pages.
    shares: bool,
    /// The host knows that it was dropped.
    dropped: bool,
}

/// The step that was begun last.
#[derive(Debug, Default)]
struct Current {
    spans: Vec<Span>,
    tokens: usize,
    singles: usize,
    /// Tiles of the spans of more than one token.
    tiles: usize,
    /// Whether each layer plans for itself.
    by_layer: bool,
    large: bool,
}

#[derive(Debug)]
struct Cuda {
    spec: ModelSpec,
    device: Device,
    stream: Arc<CudaStream>,
    kernels: Arc<Kernels>,
    dtype: DType,
    memory: Memory,
    layers: Vec<Layer>,
    layer_plans: CudaSlice<LayerPlan>,
    /// As [`KeyRange::factors`](crate::KeyRange::factors), for a store of 8 bits.
    key_factors: Option<CudaSlice<f32>>,
    shared: Option<fork::Shared>,
    seats: HashMap<SeqId, Seat>,
    free_seats: Vec<u32>,
    max_entries: usize,
    staging: Staging,
    readback: Readback,
    /// For steps of up to as many tokens as there may be sequences, and for longer ones.
    control: [Control; 2],
    current: Current,
    decode: DecodeScratch,
    capturing: bool,
    /// Counts the rings made: a recorded step knows those of its time.
    generation: u64,
    /// Why the step being recorded cannot be replayed.
    unrepeatable: std::cell::RefCell<Option<&'static str>>,
}

/// Heads of `[tokens, heads, head_dim]` as a kernel reads them: tokens may lie apart, all else is dense.
struct Strided {
    /// Keeps a converted copy alive until the kernel is enqueued.
    _tensor: Tensor,
    address: kernels::Address,
    stride: u32,
}

/// Where a budget's kinds of limit leave the longest row.
fn longest_after(budget: &Budget, protect: Protect) -> u32 {
    let most = match budget {
        Budget::Unlimited => return u32::MAX,
        Budget::PerHead(keep) => *keep as u32,
        Budget::Heads(heads) => heads.iter().copied().max().unwrap_or(0) as u32,
        Budget::Pooled { total, .. } => *total as u32,
    };
    most.max(protect.sinks.saturating_add(protect.recent))
}

impl Cuda {
    fn new(spec: &ModelSpec, config: &CudaConfig, device: &Device) -> Result<Self> {
        check(spec, config)?;
        let candle = device.as_cuda_device()?;
        let stream = candle.cuda_stream();
        let kernels = Kernels::of(stream.context()).map_err(driver("loading kernels"))?;
        let limit = match config.limit_bytes {
            Some(limit) => limit,
            None => {
                stream.synchronize().map_err(driver("waiting for the device"))?; // what was given back is free from here on
                stream.context().mem_get_info().map_err(driver("asking for free memory"))?.0 as u64 / 2
            }
        };
        let seats = config.max_sequences;
        let CudaConfig { page_size, max_entries, dtype, .. } = *config;
        let memory = Memory::new(&stream, spec, Layout { page_size, limit, seats, max_entries, dtype })?;
        // SAFETY: the store was allocated with these sizes.
        unsafe { kernels.clear(&stream, memory.store) }.map_err(driver("clearing the store"))?;
        let control = |tokens| Control::new(device, seats, tokens, spec.q_heads);
        Ok(Self {
            spec: spec.clone(),
            device: device.clone(),
            layers: (0..spec.layers).map(|_| Layer::default()).collect(),
            layer_plans: zeros(&stream, spec.layers)?,
            key_factors: key_factors(spec, dtype, &stream)?,
            shared: None,
            seats: HashMap::new(),
            free_seats: (0..seats as u32).rev().collect(),
            staging: Staging::new(&stream),
            readback: Readback::new(&stream, &memory)?,
            control: [control(seats)?, control(2048.max(seats))?],
            current: Current::default(),
            decode: DecodeScratch::new(&stream, spec, element(dtype), seats)?,
            dtype,
            max_entries,
            memory,
            kernels,
            stream,
            capturing: false,
            generation: 0,
            unrepeatable: None.into(),
        })
    }

    fn element(&self) -> Dtype {
        element(self.dtype)
    }

    /// The type of queries, new keys and values, and outputs.
    fn beside(&self) -> DType {
        if self.dtype.size_in_bytes() == 1 { DType::BF16 } else { self.dtype }
    }

    fn control(&self) -> &Control {
        &self.control[self.current.large as usize]
    }

    fn ring(&self, layer: usize) -> Ring {
        self.layers[layer].plan.ring
    }

    /// The sequence's seat, a new one if it has none.
    fn sit(&mut self, seq: SeqId) -> Result<u32> {
        if let Some(seat) = self.seats.get(&seq) {
            return Ok(seat.index);
        }
        let all = self.memory.store.seats;
        let index = self.free_seats.pop().ok_or_else(|| Error::Sequence {
            seq,
            what: format!("finds no place: max_sequences={all} sequences hold entries; release one or raise it"),
        })?;
        let observed = (0..self.spec.layers).map(|_| observe::Observed::default()).collect();
        self.seats
            .insert(seq, Seat { index, bounds: vec![0; self.spec.layers], observed, shares: false, dropped: false });
        Ok(index)
    }

    /// The most entries any row of these spans may hold in a layer. A recorded step must hold for those that follow.
    fn bound(&self, layer: usize, spans: &[Span]) -> usize {
        let bounds = spans.iter().filter_map(|span| Some(self.seats.get(&span.seq)?.bounds[layer]));
        let now = bounds.max().unwrap_or(0) as usize;
        if !self.capturing {
            return now;
        }
        let later = self.layers[layer].trimmed.map_or(self.max_entries, |trimmed| trimmed as usize + 1);
        now.max(later)
    }

    fn seat_of(&self, seq: SeqId) -> Option<u32> {
        self.seats.get(&seq).map(|seat| seat.index)
    }

    /// Refuses a step that is not the one begun last: its spans are no longer on the device.
    fn check_current(&self, spans: &[Span]) -> Result<()> {
        if self.current.spans == spans {
            return Ok(());
        }
        let seq = spans.first().map_or(SeqId(0), |span| span.seq);
        Err(Error::Sequence { seq, what: "is in a step that another overtook: finish one before the next".into() })
    }

    fn plan(&self, first_layer: usize, layers: usize) -> Result<()> {
        if self.current.spans.is_empty() {
            return Ok(());
        }
        let params = PlanParams {
            store: self.memory.store,
            sharing: self.sharing(),
            spans: self.control().spans(),
            layers: address(&self.layer_plans),
            span_count: self.current.spans.len() as u32,
            first_layer: first_layer as u32,
            layer_count: layers as u32,
        };
        // SAFETY: addresses of memory that this owns, the spans just uploaded.
        unsafe { self.kernels.plan(&self.stream, &params) }.map_err(driver("planning a step"))?;
        self.copy_pages()
    }

    /// Prepares a layer for marks of this kind: a ring for its window, and the age at which marked entries give way.
    fn expect_marks(&mut self, layer: usize, marks: Marks, protect: Protect) -> Result<()> {
        let age = match marks {
            Marks::Never => return Ok(()),
            Marks::Always | Marks::Own => protect.recent.max(1),
            Marks::Previous => protect.recent.max(2), // the bit of this step is not known when the step is planned
        };
        let reachable = (age as usize) < self.max_entries; // else nothing dies before its row is full
        let plan = self.layers[layer].plan;
        if !reachable || (plan.reuse_age >= age && plan.sinks == protect.sinks) {
            return Ok(());
        }
        if self.capturing {
            return Err(Error::Config("marks began within a captured step: run a step before the capture".into()));
        }
        let places = self.memory.store.seats as usize * self.spec.kv_heads * age as usize;
        let ring = self.stream.clone_htod(&vec![u32::MAX; places]).map_err(driver("allocating a ring"))?;
        let plan = LayerPlan { ring: Ring { slots: address(&ring), size: age }, sinks: protect.sinks, reuse_age: age };
        self.generation += 1;
        self.layers[layer].ring = Some(ring);
        self.layers[layer].plan = plan;
        self.layers[layer].check_marks = protect.recent < age;
        let mut place = self.layer_plans.slice_mut(layer..layer + 1);
        self.stream.memcpy_htod(&[plan], &mut place).map_err(driver("telling the plan of a ring"))
    }

    /// A layer's heads in the type of kernels, tokens as far apart as they lie.
    fn heads(&self, tensor: &Tensor) -> Result<Strided> {
        let tensor = tensor.to_dtype(self.beside())?;
        let d = self.spec.head_dim;
        let dense = matches!(tensor.stride(), [_, s, 1] if *s == d);
        let tensor = if dense { tensor } else { tensor.contiguous()? };
        let stride = tensor.stride()[0] as u32;
        Ok(Strided { address: tensor_address(&tensor)?, stride, _tensor: tensor })
    }

    /// What a layer's keys are divided by, f32 `[kv_heads, head_dim]`; 0 for nothing.
    fn key_factors(&self, layer: usize) -> kernels::Address {
        let bytes = 4 * layer * self.spec.kv_heads * self.spec.head_dim;
        self.key_factors.as_ref().map_or(0, |factors| address(factors) + bytes as u64)
    }

    /// Queries for keys that were divided; the same where none are.
    fn multiplied(&self, layer: usize, q: Strided) -> Result<Strided> {
        let (key_factors, tokens) = (self.key_factors(layer), self.current.tokens);
        if key_factors == 0 {
            return Ok(q);
        }
        let ModelSpec { q_heads, head_dim, .. } = self.spec;
        let (out, width) = (output(&[tokens, q_heads, head_dim], self.beside(), &self.device)?, q_heads * head_dim);
        let params = MultiplyParams {
            q: q.address,
            out: tensor_address(&out)?,
            key_factors,
            q_stride: q.stride,
            width: width as u32,
            head_dim: head_dim as u32,
            group: self.spec.group() as u32,
        };
        // SAFETY: `out` has the shape, and there is a factor for each component of a layer's keys.
        unsafe { self.kernels.multiply_queries(&self.stream, tokens as u32, &params) }
            .map_err(driver("multiplying queries"))?;
        Ok(Strided { address: tensor_address(&out)?, stride: width as u32, _tensor: out })
    }

    /// Whether the kernels that read 4 bytes at a time can read these heads.
    fn even(heads: &Strided) -> bool {
        heads.address.is_multiple_of(16) && heads.stride.is_multiple_of(8)
    }

    /// Takes over failures that have arrived.
    fn learn_failures(&mut self, spans: &[Span]) -> Vec<(SeqId, Error)> {
        let mut told = vec![];
        for span in spans {
            let Some(seat) = self.seats.get_mut(&span.seq) else { continue };
            let word = self.readback.failed[seat.index as usize];
            if word != 0 && !seat.dropped {
                seat.dropped = true;
                let (layer, position) = ((word >> 32) as usize & 0x7fff_ffff, word as u32);
                told.push((
                    span.seq,
                    Error::PoolExhausted { seq: span.seq, layer, position, limit: self.memory.limit },
                ));
            }
        }
        told
    }
}

/// As kernels know a type.
fn element(dtype: DType) -> Dtype {
    match dtype {
        DType::F8E4M3 => Dtype::Fp8,
        DType::U8 => Dtype::Int8,
        DType::F16 => Dtype::F16,
        DType::BF16 => Dtype::Bf16,
        _ => Dtype::F32,
    }
}

/// On the device what [`KeyRange::factors`](crate::KeyRange::factors) says, where the store has a use for it.
fn key_factors(spec: &ModelSpec, dtype: DType, stream: &Arc<CudaStream>) -> Result<Option<CudaSlice<f32>>> {
    let factors = spec.key_range.as_ref().filter(|_| dtype.size_in_bytes() == 1).map(|range| range.factors());
    factors.map(|factors| stream.clone_htod(&factors).map_err(driver("uploading factors"))).transpose()
}

fn device_protect(protect: Protect) -> kernels::Protect {
    kernels::Protect { sinks: protect.sinks, recent: protect.recent }
}

fn check(spec: &ModelSpec, config: &CudaConfig) -> Result<()> {
    let refuse = |what: String| Err(Error::Config(what));
    let CudaConfig { page_size, max_sequences, max_entries, dtype, .. } = *config;
    if ![16, 32, 64, 128].contains(&page_size) {
        return refuse(format!("page_size={page_size} is not accepted on CUDA: 16, 32, 64 or 128 entries"));
    }
    if !matches!(dtype, DType::F32 | DType::F16 | DType::BF16 | DType::F8E4M3 | DType::U8) {
        return refuse(format!("kv dtype {dtype:?} is not supported: f32, f16, bf16, fp8 or int8"));
    }
    if !(1..=2048).contains(&max_sequences) {
        return refuse(format!("max_sequences={max_sequences} is not accepted: 1..=2048"));
    }
    if !(1..=1 << 24).contains(&max_entries) {
        return refuse(format!("max_entries={max_entries} is not accepted: 1..=16777216"));
    }
    if let Some(fault) = spec.faults().into_iter().next() {
        return refuse(fault);
    }
    if dtype.size_in_bytes() == 1 && !spec.head_dim.is_multiple_of(4) {
        return refuse(format!(
            "8-bit keys of {} components are not supported on CUDA: a multiple of 4",
            spec.head_dim
        ));
    }
    if spec.group() > 64 || spec.head_dim > 1024 {
        return refuse(format!(
            "{} query heads a KV head of {} components are not supported on CUDA: 64 and 1024 at most",
            spec.group(),
            spec.head_dim
        ));
    }
    Ok(())
}

impl Storage for Cuda {
    fn device(&self) -> &Device {
        &self.device
    }

    fn prepare(&mut self, spec: &ModelSpec, needs: &[Needs]) -> Vec<String> {
        let why = super::misfits(&self.spec, spec, needs);
        self.layers.iter_mut().zip(needs).for_each(|(layer, needs)| layer.needs = needs.clone());
        why
    }

    fn begin(&mut self, spans: &[Span]) -> Result<Tensor> {
        let tokens = spans.iter().map(|span| span.len).sum();
        let mut on_device = Vec::with_capacity(spans.len());
        let mut first = 0;
        for span in spans {
            let seat = self.sit(span.seq)?;
            on_device.push(kernels::Span { seat, start: span.start, len: span.len as u32, first });
            first += span.len as u32;
        }
        let tiles = match self.prefill_shape() {
            Some(shape) => shape.tiles(&on_device, self.spec.group() as u32),
            None => vec![],
        };
        let large = !self.control[0].fits(spans.len(), tokens);
        if large && !self.control[1].fits(spans.len(), tokens) {
            let (seats, room) = (self.memory.store.seats as usize, tokens.next_power_of_two());
            self.control[1] = Control::new(&self.device, seats, room, self.spec.q_heads)?;
        }
        let singles = spans.iter().filter(|span| span.len == 1).count();
        let by_layer = singles < spans.len();
        self.current = Current { spans: spans.to_vec(), tokens, singles, tiles: tiles.len(), by_layer, large };
        let words = self.control().words(&on_device, &tiles);
        let to = self.control().spans();
        self.staging.upload(&words, to)?;
        for span in spans {
            let Some(seat) = self.seats.get_mut(&span.seq) else { continue };
            let most = span.seen() as u32;
            seat.bounds.iter_mut().for_each(|bound| *bound = bound.saturating_add(span.len as u32).min(most));
        }
        if !self.current.by_layer {
            self.plan(0, self.spec.layers)?;
            self.schedule(0, self.spec.layers)?;
        }
        self.control().positions_tensor(tokens)
    }

    fn append(
        &mut self,
        layer: usize,
        spans: &[Span],
        new: &NewTokens,
        verdict: &Verdict,
        protect: Protect,
    ) -> Result<()> {
        self.check_current(spans)?;
        if spans.is_empty() {
            return Ok(());
        }
        let (marks, bits) = match &verdict.evict {
            Evict::Never => (Marks::Never, None),
            Evict::Always => (Marks::Always, None),
            Evict::Bits { bits, lag: Lag::Own } => (Marks::Own, Some(bits)),
            Evict::Bits { bits, lag: Lag::Previous } => (Marks::Previous, Some(bits)),
        };
        let bits = bits.map(|bits| bits.to_dtype(DType::U8)?.contiguous()).transpose()?;
        let scores = verdict.score.as_ref().map(|score| score.to_dtype(DType::F32)?.contiguous()).transpose()?;
        self.expect_marks(layer, marks, protect)?;
        if self.current.by_layer {
            self.plan(layer, 1)?;
        }
        let (k, v) = (self.heads(&new.k)?, self.heads(&new.v)?);
        let params = AppendParams {
            store: self.memory.store,
            ring: self.ring(layer),
            k: k.address,
            v: v.address,
            bits: bits.as_ref().map_or(Ok(0), tensor_address)?,
            scores: scores.as_ref().map_or(Ok(0), tensor_address)?,
            key_factors: self.key_factors(layer),
            spans: self.control().spans(),
            span_of: self.control().span_of(),
            k_stride: k.stride,
            v_stride: v.stride,
            tokens: self.current.tokens as u32,
            layer: layer as u32,
            marks,
        };
        // SAFETY: shapes were checked by the cache, the plan has made room, and the tensors outlive the enqueueing.
        unsafe { self.kernels.append(&self.stream, self.element(), &params) }.map_err(driver("append"))?;
        if self.current.by_layer {
            self.schedule(layer, 1)?;
        }
        Ok(())
    }

    fn observe(&mut self, layer: usize, spans: &[Span], q: &Tensor) -> Result<()> {
        self.observe_queries(layer, spans, q)
    }

    fn expire(&mut self, layer: usize, spans: &[Span], protect: Protect) -> Result<()> {
        self.settle(layer, spans, None, &[], protect)
    }

    fn trim(
        &mut self,
        layer: usize,
        spans: &[Span],
        score: &Score,
        budgets: &[Budget],
        protect: Protect,
    ) -> Result<()> {
        let dense = match score {
            Score::Carried => None,
            Score::Dense(scores) => Some(scores),
        };
        self.settle(layer, spans, dense, budgets, protect)?;
        let longest = budgets.iter().map(|budget| longest_after(budget, protect)).max();
        self.layers[layer].trimmed = self.layers[layer].trimmed.max(longest.filter(|&n| n < u32::MAX));
        for (span, budget) in spans.iter().zip(budgets) {
            if let Some(seat) = self.seats.get_mut(&span.seq) {
                seat.bounds[layer] = seat.bounds[layer].min(longest_after(budget, protect));
            }
        }
        Ok(())
    }

    fn held<'a>(&'a self, layer: usize, spans: &'a [Span]) -> Result<Box<dyn Held + 'a>> {
        Ok(Box::new(held::Gathered::new(self, layer, spans)))
    }

    fn fork(&mut self, from: SeqId, to: SeqId, share: &[bool]) -> Result<()> {
        self.fork_sequence(from, to, share)
    }

    fn unshare(&mut self, layer: usize, spans: &[Span]) -> Result<()> {
        self.unshare_layer(layer, spans)
    }

    fn release(&mut self, seq: SeqId) {
        let sharing = self.sharing();
        let Some(seat) = self.seats.remove(&seq) else { return };
        // SAFETY: the store's own addresses. A launch that fails says so at the next call that can return an error.
        let launched = unsafe { self.kernels.vacate(&self.stream, self.memory.store, sharing, seat.index) };
        self.forget_last_sharer();
        if launched.is_ok() {
            self.readback.failed[seat.index as usize] = 0;
            self.free_seats.push(seat.index);
        }
    }

    fn take_failures(&mut self, spans: &[Span]) -> Vec<(SeqId, Error)> {
        // After a prompt the host waits for the logits anyway; nothing else is waited for.
        let ends_prompt = self.current.spans.iter().any(|span| span.phase == Phase::Prefill { last: true });
        let waited = if ends_prompt {
            self.readback.wait(&self.memory)
        } else {
            let polled = self.readback.poll().map(|_| ());
            polled.and_then(|()| self.readback.request(&self.memory))
        };
        match waited {
            Ok(()) => self.learn_failures(spans),
            Err(_) => vec![], // the device is lost; the next launch returns the error
        }
    }

    fn wait(&mut self) -> Result<()> {
        self.stream.context().bind_to_thread().map_err(driver("choosing the device"))?; // whoever asks
        self.readback.wait(&self.memory)
    }

    fn usage(&self) -> Usage {
        let (counters, store) = (self.readback.counters, &self.memory.store);
        let bytes = |pages: u32| pages as u64 * self.memory.page_bytes;
        let kv = self.memory.vector_bytes;
        Usage {
            live_entries: counters.live,
            pages_in_use: (store.pages - counters.free) as u64,
            bytes_in_use: bytes(store.pages - counters.free),
            bytes_peak: bytes(store.pages - counters.least_free),
            bytes_reserved: bytes(store.pages),
            bytes_limit: Some(self.memory.limit),
            page_entries: 1 << store.page_shift,
            page_bytes: self.memory.page_bytes,
            written: counters.written,
            evicted: counters.evicted,
            dense_bytes_per_token: (self.spec.layers * self.spec.kv_heads * kv) as u64,
        }
    }

    fn full_rows(&self, sequences: &[SeqId]) -> u64 {
        let (store, seats) = (&self.memory.store, sequences.iter().filter_map(|&seq| self.seat_of(seq)));
        let rows = (store.layers * store.seats * store.heads) as usize;
        let Ok(lens) = self.memory.row_lens(&self.stream, 0, rows) else { return 0 }; // the device is lost, as the next launch says
        let page = 1 << store.page_shift;
        let full = |seat, layer| {
            let first = store.row_index(layer, seat, 0);
            lens[first..first + self.spec.kv_heads].iter().filter(|len| len.is_multiple_of(page)).count() as u64
        };
        seats.map(|seat| (0..self.spec.layers).map(|layer| full(seat, layer)).sum::<u64>()).sum()
    }

    fn live(&self, layer: usize, seq: SeqId) -> Vec<usize> {
        let Some(seat) = self.seat_of(seq) else { return vec![0; self.spec.kv_heads] };
        let (first, heads) = (self.memory.store.row_index(layer, seat, 0), self.spec.kv_heads);
        let lens = self.memory.row_lens(&self.stream, first, heads);
        lens.map_or_else(|_| vec![0; heads], |lens| lens.into_iter().map(|len| len as usize).collect())
    }

    fn held_positions(&self, layer: usize, seq: SeqId, kv_head: usize) -> Vec<u32> {
        let Some(seat) = self.seat_of(seq) else { return vec![] };
        let row = self.memory.store.row_index(layer, seat, kv_head);
        let mut positions = self.memory.row_positions(&self.kernels, &self.stream, row).unwrap_or_default();
        positions.sort_unstable();
        positions
    }
}

impl Drop for Cuda {
    /// Page-locked memory is given back at once, so nothing may still be copying to or from it.
    fn drop(&mut self) {
        _ = self.stream.synchronize();
    }
}
