//! Where entries live and how attention over them is computed.
//!
//! A [`Backend`] owns the pages of every sequence. It never knows which policy runs: it offers fixed verbs, and
//! [`KvCache`](crate::KvCache) calls them in a fixed order. The CPU backend is the specification of every other.

pub mod cpu;

use crate::{
    error::{Error, Result},
    policy::{Budget, Held, Needs, NewTokens, Protect, Score, Verdict},
    spec::ModelSpec,
    stats::Usage,
    step::{SeqId, Span},
};
use candle_core::{Device, Tensor};

/// Where entries live. A row is an unordered bag of (key, value, position, mark, score).
///
/// A sequence that cannot get a page is dropped whole: its pages go back at once, its rows stay empty, its outputs are
/// zero, and [`Storage::take_failures`] names it. Nothing else in the batch notices.
pub trait Storage {
    /// The device tensors come from and go to.
    fn device(&self) -> &Device;
    /// Sets up what each layer's policy asks for, one [`Needs`] a layer; returns every reason why it cannot. A store made
    /// for a model of another shape than `spec` is a reason.
    fn prepare(&mut self, spec: &ModelSpec, needs: &[Needs]) -> Vec<String>;
    /// Writes the spans' new tokens. The place of an entry that is dead to every query of the span may be reused.
    fn append(
        &mut self,
        layer: usize,
        spans: &[Span],
        new: &NewTokens,
        verdict: &Verdict,
        protect: Protect,
    ) -> Result<()>;
    /// Remembers what [`Needs`] asks of the queries, `[tokens, q_heads, head_dim]`, RoPE applied.
    fn observe(&mut self, layer: usize, spans: &[Span], q: &Tensor) -> Result<()>;
    /// Drops entries that are marked and no longer protected.
    fn expire(&mut self, layer: usize, spans: &[Span], protect: Protect) -> Result<()>;
    /// Expires, then drops the lowest-scored unprotected entries until each span's budget holds.
    fn trim(&mut self, layer: usize, spans: &[Span], score: &Score, budgets: &[Budget], protect: Protect)
    -> Result<()>;
    /// The spans' entries as a policy sees them.
    fn held<'a>(&'a self, layer: usize, spans: &'a [Span]) -> Result<Box<dyn Held + 'a>>;
    /// Gives back everything of a sequence; does nothing for one that holds nothing.
    fn release(&mut self, seq: SeqId);
    /// Those of the spans' sequences that were dropped, each with its reason, once. They stay empty until released.
    fn take_failures(&mut self, spans: &[Span]) -> Vec<(SeqId, Error)>;
    /// What the store holds.
    fn usage(&self) -> Usage;
    /// Entries each KV head of a layer holds for a sequence. For inspection: may wait for the device.
    fn live(&self, layer: usize, seq: SeqId) -> Vec<usize>;
    /// Positions one row holds, sorted. For inspection: may wait for the device.
    fn held_positions(&self, layer: usize, seq: SeqId, kv_head: usize) -> Vec<u32>;
}

/// What the attention pass leaves behind in the carried scores.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Tap {
    /// Nothing.
    None,
    /// With each query of a span, in order: `score = decay * score + softmax mass, summed over the GQA group`.
    Mass {
        /// 1 for a running sum, 0 for the newest query alone.
        decay: f32,
    },
}

/// Attention over held entries. Prefill and decode are one method; the backend picks kernels.
pub trait Attention {
    /// Causal attention of the spans' queries over their sequences' visible entries, scaled by `head_dim^-0.5`.
    /// `q`: `[tokens, q_heads, head_dim]`; the result has its shape and dtype.
    fn attend(&mut self, layer: usize, spans: &[Span], q: &Tensor, protect: Protect, tap: Tap) -> Result<Tensor>;
}

/// A store with its attention.
pub trait Backend: Storage + Attention + std::fmt::Debug + Send {}
impl<T: Storage + Attention + std::fmt::Debug + Send> Backend for T {}
