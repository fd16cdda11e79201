//! A backend that reclaims dead entries only when it feels like it.

use super::Rng;
use candle_core::{Device, Tensor};
use kvpolicy::{
    Budget, Error, Held, ModelSpec, Needs, NewTokens, Protect, Result, Score, SeqId, Span, Usage, Verdict,
    backend::{Attention, Backend, Capture, Storage, Tap},
};
use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering::Relaxed},
};

/// Forwards everything, but skips a random half of the calls of `expire` as long as `idle` holds.
#[derive(Debug)]
pub(crate) struct Lazy {
    pub(crate) inner: Box<dyn Backend>,
    pub(crate) rng: Rng,
    pub(crate) idle: Arc<AtomicBool>,
}

impl Storage for Lazy {
    fn expire(&mut self, layer: usize, spans: &[Span], protect: Protect) -> Result<()> {
        if self.idle.load(Relaxed) && self.rng.chance(0.5) {
            return Ok(());
        }
        self.inner.expire(layer, spans, protect)
    }

    fn device(&self) -> &Device {
        self.inner.device()
    }
    fn prepare(&mut self, spec: &ModelSpec, needs: &[Needs]) -> Vec<String> {
        self.inner.prepare(spec, needs)
    }
    fn append(&mut self, layer: usize, spans: &[Span], new: &NewTokens, v: &Verdict, protect: Protect) -> Result<()> {
        self.inner.append(layer, spans, new, v, protect)
    }
    fn observe(&mut self, layer: usize, spans: &[Span], q: &Tensor) -> Result<()> {
        self.inner.observe(layer, spans, q)
    }
    fn trim(&mut self, layer: usize, spans: &[Span], s: &Score, budgets: &[Budget], protect: Protect) -> Result<()> {
        self.inner.trim(layer, spans, s, budgets, protect)
    }
    fn held<'a>(&'a self, layer: usize, spans: &'a [Span]) -> Result<Box<dyn Held + 'a>> {
        self.inner.held(layer, spans)
    }
    fn fork(&mut self, from: SeqId, to: SeqId, share: &[bool]) -> Result<()> {
        self.inner.fork(from, to, share)
    }
    fn unshare(&mut self, layer: usize, spans: &[Span]) -> Result<()> {
        self.inner.unshare(layer, spans)
    }
    fn release(&mut self, seq: SeqId) {
        self.inner.release(seq);
    }
    fn take_failures(&mut self, spans: &[Span]) -> Vec<(SeqId, Error)> {
        self.inner.take_failures(spans)
    }
    fn usage(&self) -> Usage {
        self.inner.usage()
    }
    fn full_rows(&self, sequences: &[SeqId]) -> u64 {
        self.inner.full_rows(sequences)
    }
    fn live(&self, layer: usize, seq: SeqId) -> Vec<usize> {
        self.inner.live(layer, seq)
    }
    fn held_positions(&self, layer: usize, seq: SeqId, kv_head: usize) -> Vec<u32> {
        self.inner.held_positions(layer, seq, kv_head)
    }
}

impl Capture for Lazy {}

impl Attention for Lazy {
    fn attend(&mut self, layer: usize, spans: &[Span], q: &Tensor, protect: Protect, tap: Tap) -> Result<Tensor> {
        self.inner.attend(layer, spans, q, protect, tap)
    }
}
