//! One model of the host: its passes as steps of a cache.

use crate::error::{Error, Result};
use candle_core::Tensor;
use kvpolicy::{KvCache, Phase, SeqId, Step};
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
}

impl Hosted {
    pub(crate) fn new(cache: KvCache) -> Self {
        Self { pool: Arc::new(Pool(Mutex::new(Passes { cache, step: None }))) }
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

    fn attend(&self, call: Attend<'_>) -> candle_core::Result<Tensor> {
        let mut passes = self.pool.lock();
        let y = passes.attend(&call);
        if y.is_err() {
            passes.give_up();
        }
        y.map_err(candle_core::Error::wrap)
    }
}

impl Passes {
    /// One layer. The first begins a step, the last ends it.
    fn attend(&mut self, call: &Attend<'_>) -> Result<Tensor> {
        if call.layer == 0 {
            self.begin(call)?;
        }
        let step = self.step.as_ref().ok_or_else(|| Error::Host("started a pass in the middle".into()))?;
        check_attention(call, self.cache.spec().head_dim, step)?;
        let new = step.tokens(end_to_end(call.q)?, end_to_end(call.k)?, end_to_end(call.v)?, None);
        let y = self.cache.attend(call.layer, step, &new)?;
        if call.layer + 1 == self.cache.spec().layers {
            self.end()?;
        }
        let (rows, heads, tokens, head_dim) = call.q.dims4()?;
        Ok(y.reshape((rows, tokens, heads, head_dim))?.transpose(1, 2)?.contiguous()?)
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
