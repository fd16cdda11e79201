//! One model of the host: its passes as steps of a cache.

use crate::{
    error::{Error, Result},
    room,
};
use candle_core::Tensor;
use kvpolicy::{CpuConfig, KvCache, ModelSpec, Phase, Policy, SeqId, Step, backend::Backend, cpu, policies::Full};
use kvpolicy_candle::{Config, Gates};
use mistralrs_core::kv_policy::{Attend, KvPolicy, State};
use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

/// Tokens of several prompts in one pass: they occupy a GPU, and those that decode do not wait for more.
const PROMPT_TOKENS: usize = 8192;

/// The cache of one model, shared with its sequences.
#[derive(Debug)]
pub(crate) struct Pool(Mutex<Passes>);

/// A cache between and within passes.
#[derive(Debug)]
pub(crate) struct Passes {
    pub(crate) cache: KvCache,
    /// Those of the cache's policy, or of the model.
    pub(crate) gates: Option<Arc<Gates>>,
    pub(crate) served: Served,
    /// The pass that is under way.
    step: Option<Step>,
    began: Instant,
    /// What the gates say of a layer's new tokens, f32 `[tokens, kv_heads]`, until the layer attends.
    decided: Option<Tensor>,
    /// A sequence was lost and none has ended since: what evicts less than expected is taken to evict nothing.
    cautious: bool,
}

/// What a model has served so far.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Served {
    /// Sequences that hold a place in the cache now.
    pub running: u64,
    /// Tokens of prompts, those of sequences that started over included.
    pub prompt_tokens: u64,
    /// Tokens read one at a time: all that were generated but the first of each sequence.
    pub decoded_tokens: u64,
    /// Passes that decoded.
    pub decode_steps: u64,
    /// Seconds of those passes, from the first layer's attention to the last's.
    pub decode_seconds: f64,
    /// Steps in which the oldest waiting prompt did not begin for want of memory.
    pub waits: u64,
    /// Times that a sequence lost its memory to others, to start over later.
    pub set_aside: u64,
}

impl Pool {
    pub(crate) fn new(cache: KvCache, gates: Option<Arc<Gates>>) -> Self {
        Self(Mutex::new(Passes::new(cache, gates)))
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Passes> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The state of a sequence of the host: one of the cache, released with it.
#[derive(Debug)]
struct Row {
    seq: SeqId,
    pool: Arc<Pool>,
    /// It starts over for want of memory.
    lost: AtomicBool,
}

impl Drop for Row {
    fn drop(&mut self) {
        let mut passes = self.pool.lock();
        passes.cache.release(self.seq);
        passes.served.running -= 1;
        passes.cautious &= self.lost.load(Ordering::Relaxed); // who ends leaves room
    }
}

/// What the host calls for one model.
#[derive(Debug)]
pub(crate) struct Hosted {
    pub(crate) pool: Arc<Pool>,
    pub(crate) config: Config,
    pub(crate) max_sequences: usize,
}

impl KvPolicy for Hosted {
    fn open(&self, _prompt_tokens: usize) -> candle_core::Result<State> {
        let mut passes = self.pool.lock();
        passes.served.running += 1;
        Ok(Arc::new(Row { seq: passes.cache.open(), pool: self.pool.clone(), lost: AtomicBool::new(false) }))
    }

    fn observe_hidden(&self, layer: usize, hidden: &Tensor) -> candle_core::Result<()> {
        let Some(gates) = self.pool.lock().gates.clone() else { return Ok(()) };
        let decided = hidden.flatten_to(1).map_err(Error::from).and_then(|x| Ok(gates.adapt(layer, &x)?));
        self.pool.lock().decided = decided.map_err(candle_core::Error::wrap)?;
        Ok(())
    }

    fn prepare_queries(&self, _layer: usize, q: Tensor) -> candle_core::Result<Tensor> {
        let gates = self.pool.lock().gates.clone().filter(|gates| gates.borrows_neurons());
        let Some(gates) = gates else { return Ok(q) };
        let borrowed = end_to_end(&q).and_then(|rows| Ok(gates.borrow(&self.config, rows)?));
        let (decided, rest) = borrowed.map_err(candle_core::Error::wrap)?;
        self.pool.lock().decided = Some(decided);
        side_by_side(&rest, q.dims4()?)
    }

    fn attend(&self, call: Attend<'_>) -> candle_core::Result<Tensor> {
        let mut passes = self.pool.lock();
        let y = passes.attend(&call);
        if y.is_err() {
            passes.give_up();
        }
        y.map_err(candle_core::Error::wrap)
    }

    fn lost(&self, state: &State) -> bool {
        row_of(state).is_ok_and(|row| row.lost.load(Ordering::Relaxed))
    }

    fn can_decode(&self, running: &[State]) -> bool {
        let mut passes = self.pool.lock();
        let sequences: Vec<SeqId> = running.iter().filter_map(|state| Some(row_of(state).ok()?.seq)).collect();
        let (cache, a_page_each) = (&passes.cache, sequences.len() as u64 * room::growth(&passes.cache));
        // Rows are counted only where it matters: a GPU must be asked.
        let enough = room::suffices(cache, a_page_each) || room::suffices(cache, cache.full_rows(&sequences));
        if !enough && let Some(Ok(last)) = running.last().map(row_of) {
            last.lost.store(true, Ordering::Relaxed);
            passes.cautious = true;
            passes.served.set_aside += 1;
        }
        enough
    }

    fn can_begin(&self, running: &[State], prompts: usize, tokens: usize) -> bool {
        let mut passes = self.pool.lock();
        let sequences = running.len() + prompts;
        let needed = prompts as u64 * room::prompt(&passes.cache, tokens, passes.cautious)
            + sequences as u64 * room::growth(&passes.cache);
        let enough = (prompts == 1 || prompts * tokens <= PROMPT_TOKENS)
            && sequences <= self.max_sequences
            && room::suffices(&passes.cache, needed);
        passes.served.waits += (prompts == 1 && !enough) as u64;
        enough
    }
}

fn row_of(state: &State) -> Result<&Row> {
    state.downcast_ref().ok_or_else(|| Error::Host("passed another policy's state".into()))
}

impl Passes {
    fn new(cache: KvCache, gates: Option<Arc<Gates>>) -> Self {
        let (served, began) = (Served::default(), Instant::now());
        Self { cache, gates, served, step: None, began, decided: None, cautious: false }
    }

    /// # Errors
    /// [`Error::Busy`] if a sequence holds a place.
    pub(crate) fn check_idle(&self) -> Result<()> {
        match self.served.running {
            0 => Ok(()),
            running => Err(Error::Busy { running }),
        }
    }

    /// Starts anew under a policy, or as before if it cannot. Nobody holds a place.
    pub(crate) fn start_over(
        &mut self,
        policy: Arc<dyn Policy>,
        gates: Option<Arc<Gates>>,
        store: impl Fn(&ModelSpec) -> Result<Box<dyn Backend>>,
    ) -> Result<()> {
        let (spec_before, policy_before) = (self.cache.spec().clone(), self.cache.policy().clone());
        let spec = ModelSpec { gates: gates.as_ref().map(|gates| gates.spec()), ..spec_before.clone() };
        // There may be no memory for two stores; this one takes none.
        let none = cpu(&spec_before, &CpuConfig::default())?;
        self.cache = KvCache::new(spec_before.clone(), Arc::new(Full {}), none)?;
        let cache = |spec: ModelSpec, policy| Ok(KvCache::new(spec.clone(), policy, store(&spec)?)?);
        match cache(spec, policy) {
            Ok(cache) => *self = Self::new(cache, gates),
            Err(error) => {
                self.cache = cache(spec_before, policy_before)?;
                return Err(error);
            }
        }
        Ok(())
    }

    /// Brings figures up to date between passes: a GPU tells them late.
    pub(crate) fn settle(&mut self) {
        if self.step.is_none() {
            _ = self.cache.wait(); // nobody was lost since the last pass, and the next one finds a device that is
        }
    }

    /// One layer. The first begins a step, the last ends it.
    fn attend(&mut self, call: &Attend<'_>) -> Result<Tensor> {
        if call.layer == 0 {
            self.begin(call)?;
        }
        let step = self.step.as_ref().ok_or_else(|| Error::Host("started a pass in the middle".into()))?;
        check_attention(call, self.cache.spec().head_dim, step)?;
        let q = end_to_end(call.q)?;
        let q = if let Some(gates) = &self.gates { gates.after_rope(q)? } else { q };
        let new = step.tokens(q, end_to_end(call.k)?, end_to_end(call.v)?, self.decided.take());
        let y = self.cache.attend(call.layer, step, &new)?;
        if call.layer + 1 == self.cache.spec().layers {
            self.end(call)?;
        }
        Ok(side_by_side(&y, call.q.dims4()?)?)
    }

    fn begin(&mut self, call: &Attend<'_>) -> Result<()> {
        self.give_up(); // the host failed between two layers of the pass before
        let tokens = call.q.dim(2)?;
        let mut work = Vec::with_capacity(call.rows.len());
        for (state, &offset) in call.rows.iter().zip(call.offsets) {
            let row = row_of(state)?;
            let seen = self.cache.seen(row.seq)?;
            if seen != offset {
                return Err(Error::Host(format!("goes on at token {offset} of a sequence of {seen}")));
            }
            // The host runs a prompt whole, and decodes by one token.
            let phase = if tokens == 1 && seen > 0 { Phase::Decode } else { Phase::Prefill { last: true } };
            work.push((row.seq, tokens, phase));
        }
        self.began = Instant::now();
        self.step = Some(self.cache.begin(&work)?);
        Ok(())
    }

    /// An error only where the one sequence that there is does not fit. Others are marked as lost: they fit when the
    /// rest has ended, or are then known not to. So are those that grew beyond the model's window: as prompts they are
    /// refused without their batch.
    fn end(&mut self, call: &Attend<'_>) -> Result<()> {
        // What the host reads next it waits for anyway; a sequence that found no memory must be known before.
        let mut without_room = self.cache.wait()?;
        let Some(step) = self.step.take() else { return Ok(()) };
        self.served.count(&step, self.began.elapsed());
        let beyond = step.spans().iter().filter(|span| call.sliding_window.is_some_and(|window| span.seen() > window));
        let mut lost: Vec<SeqId> = beyond.map(|span| span.seq).collect();
        without_room.extend(self.cache.end(step));
        self.cautious |= !without_room.is_empty();
        for (seq, error) in without_room {
            if self.served.running == 1 {
                return Err(Error::TooLarge(error));
            }
            lost.push(seq);
        }
        for row in call.rows.iter().filter_map(|state| row_of(state).ok()).filter(|row| lost.contains(&row.seq)) {
            row.lost.store(true, Ordering::Relaxed);
            self.served.set_aside += 1;
        }
        Ok(())
    }

    /// Drops what is under way, if anything is.
    fn give_up(&mut self) {
        if let Some(step) = self.step.take() {
            self.cache.abort(step);
        }
    }
}

impl Served {
    /// The host decodes in passes of their own.
    fn count(&mut self, step: &Step, took: Duration) {
        if step.spans().iter().any(|span| span.phase != Phase::Decode) {
            self.prompt_tokens += step.len() as u64;
            return;
        }
        self.decoded_tokens += step.len() as u64;
        self.decode_steps += 1;
        self.decode_seconds += took.as_secs_f64();
    }
}

/// `[rows, heads, tokens, head_dim]` to `[rows * tokens, heads, head_dim]`.
fn end_to_end(x: &Tensor) -> Result<Tensor> {
    let (rows, heads, tokens, head_dim) = x.dims4()?;
    Ok(x.transpose(1, 2)?.contiguous()?.reshape((rows * tokens, heads, head_dim))?)
}

/// The way back, to the given dimensions.
fn side_by_side(
    x: &Tensor,
    (rows, heads, tokens, head_dim): (usize, usize, usize, usize),
) -> candle_core::Result<Tensor> {
    x.reshape((rows, tokens, heads, head_dim))?.transpose(1, 2)?.contiguous()
}

/// Refuses what the cache's attention does not compute.
fn check_attention(call: &Attend<'_>, head_dim: usize, step: &Step) -> Result<()> {
    let usual = 1.0 / (head_dim as f32).sqrt();
    if (call.softmax_scale - usual).abs() > usual * 1e-5 {
        let scale = call.softmax_scale;
        return Err(Error::Model(format!("its attention is scaled by {scale}, policies run with {usual} only")));
    }
    if let Some(cap) = call.softcap {
        return Err(Error::Model(format!("its attention is capped at {cap}, which policies do not")));
    }
    let prompts = step.spans().iter().filter(|span| span.phase != Phase::Decode);
    let seen = prompts.map(|span| span.seen()).max().unwrap_or(0);
    match call.sliding_window {
        Some(window) if seen > window => {
            Err(Error::Model(format!("it attends to {window} tokens only, which policies do not: {seen} are too many")))
        }
        _ => Ok(()),
    }
}
