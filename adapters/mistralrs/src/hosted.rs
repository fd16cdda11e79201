//! One model of the host: its passes as steps of a cache.

use crate::error::{Error, Result};
use candle_core::Tensor;
use kvpolicy::{KvCache, Phase, SeqId, Step};
use kvpolicy_candle::{Config, Gates};
use mistralrs_core::kv_policy::{Attend, KvPolicy, State};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The cache of one model, shared with its sequences.
#[derive(Debug)]
pub(crate) struct Pool(Mutex<Passes>);

/// A cache between and within passes.
#[derive(Debug)]
pub(crate) struct Passes {
    pub(crate) cache: KvCache,
    /// The pass that is under way.
    step: Option<Step>,
    /// What the gates say of a layer's new tokens, f32 `[tokens, kv_heads]`, until the layer attends.
    decided: Option<Tensor>,
}

impl Pool {
    pub(crate) fn lock(&self) -> MutexGuard<'_, Passes> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The state of a sequence of the host: one of the cache, released with it.
#[derive(Debug)]
struct Row {
    seq: SeqId,
    pool: Arc<Pool>,
}

impl Drop for Row {
    fn drop(&mut self) {
        self.pool.lock().cache.release(self.seq);
    }
}

/// What the host calls for one model.
#[derive(Debug)]
pub(crate) struct Hosted {
    pool: Arc<Pool>,
    gates: Option<Gates>,
    config: Config,
}

impl Hosted {
    pub(crate) fn new(cache: KvCache, gates: Option<Gates>, config: Config) -> Self {
        let pool = Arc::new(Pool(Mutex::new(Passes { cache, step: None, decided: None })));
        Self { pool, gates, config }
    }

    pub(crate) fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }
}

impl KvPolicy for Hosted {
    fn open(&self, _prompt_tokens: usize) -> candle_core::Result<State> {
        let seq = self.pool.lock().cache.open();
        Ok(Arc::new(Row { seq, pool: self.pool.clone() }))
    }

    fn observe_hidden(&self, layer: usize, hidden: &Tensor) -> candle_core::Result<()> {
        let Some(gates) = &self.gates else { return Ok(()) };
        let decided = hidden.flatten_to(1).map_err(Error::from).and_then(|x| Ok(gates.adapt(layer, &x)?));
        self.pool.lock().decided = decided.map_err(candle_core::Error::wrap)?;
        Ok(())
    }

    fn prepare_queries(&self, _layer: usize, q: Tensor) -> candle_core::Result<Tensor> {
        let Some(gates) = self.gates.as_ref().filter(|gates| gates.borrows_neurons()) else { return Ok(q) };
        let borrowed = end_to_end(&q).and_then(|rows| Ok(gates.borrow(&self.config, rows)?));
        let (decided, rest) = borrowed.map_err(candle_core::Error::wrap)?;
        self.pool.lock().decided = Some(decided);
        side_by_side(&rest, q.dims4()?)
    }

    fn attend(&self, call: Attend<'_>) -> candle_core::Result<Tensor> {
        let mut passes = self.pool.lock();
        let y = passes.attend(&call, self.gates.as_ref());
        if y.is_err() {
            passes.give_up();
        }
        y.map_err(candle_core::Error::wrap)
    }
}

impl Passes {
    /// One layer. The first begins a step, the last ends it.
    fn attend(&mut self, call: &Attend<'_>, gates: Option<&Gates>) -> Result<Tensor> {
        if call.layer == 0 {
            self.begin(call)?;
        }
        let step = self.step.as_ref().ok_or_else(|| Error::Host("started a pass in the middle".into()))?;
        check_attention(call, self.cache.spec().head_dim, step)?;
        let q = end_to_end(call.q)?;
        let q = if let Some(gates) = gates { gates.after_rope(q)? } else { q };
        let new = step.tokens(q, end_to_end(call.k)?, end_to_end(call.v)?, self.decided.take());
        let y = self.cache.attend(call.layer, step, &new)?;
        if call.layer + 1 == self.cache.spec().layers {
            self.end()?;
        }
        Ok(side_by_side(&y, call.q.dims4()?)?)
    }

    fn begin(&mut self, call: &Attend<'_>) -> Result<()> {
        self.give_up(); // the host failed between two layers of the pass before
        let tokens = call.q.dim(2)?;
        let mut work = Vec::with_capacity(call.rows.len());
        for (state, &offset) in call.rows.iter().zip(call.offsets) {
            let row = state.downcast_ref::<Row>().ok_or_else(|| Error::Host("passed another policy's state".into()))?;
            let seen = self.cache.seen(row.seq)?;
            if seen != offset {
                return Err(Error::Host(format!("goes on at token {offset} of a sequence of {seen}")));
            }
            // The host runs a prompt whole, and decodes by one token.
            let phase = if tokens == 1 && seen > 0 { Phase::Decode } else { Phase::Prefill { last: true } };
            work.push((row.seq, tokens, phase));
        }
        self.step = Some(self.cache.begin(&work)?);
        Ok(())
    }

    fn end(&mut self) -> Result<()> {
        let lost = self.step.take().map(|step| self.cache.end(step)).unwrap_or_default();
        lost.into_iter().next().map_or(Ok(()), |(_, error)| Err(error.into()))
    }

    /// Drops what is under way, if anything is.
    fn give_up(&mut self) {
        if let Some(step) = self.step.take() {
            self.cache.abort(step);
        }
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
    let seen = step.spans().iter().map(|span| span.seen()).max().unwrap_or(0);
    match call.sliding_window {
        Some(window) if seen > window => {
            Err(Error::Model(format!("it attends to {window} tokens only, which policies do not: {seen} are too many")))
        }
        _ => Ok(()),
    }
}
