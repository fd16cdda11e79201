//! Where entries live and how attention over them is computed.
//!
//! A [`Backend`] owns the pages of every sequence. It never knows which policy runs: it offers fixed verbs, and
//! [`KvCache`](crate::KvCache) calls them in a fixed order. The CPU backend is the specification of every other.

pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;

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
    /// Starts a step. Returns the position of every new token, u32 `[tokens]`, on the device: in the same place for every
    /// step of as many sequences that decode, so that a captured step finds it.
    fn begin(&mut self, spans: &[Span]) -> Result<Tensor> {
        let positions: Vec<u32> = spans.iter().flat_map(|span| span.start..span.start + span.len as u32).collect();
        let tokens = positions.len();
        Ok(Tensor::from_vec(positions, tokens, self.device())?)
    }
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
    /// Gives `to`, which holds nothing, what `from` holds. In a layer of which `share` says so both keep the same pages,
    /// and whichever writes to one first copies it; in the others all is copied now. `share`: `[layers]`.
    ///
    /// # Errors
    /// [`Error::PoolExhausted`] if the pool has no room for the copies: nothing has changed then.
    fn fork(&mut self, from: SeqId, to: SeqId, share: &[bool]) -> Result<()>;
    /// Copies what the spans' sequences share in a layer, so that entries may be moved and dropped. Whoever drops some
    /// calls it before [`append`](Self::append).
    fn unshare(&mut self, layer: usize, spans: &[Span]) -> Result<()>;
    /// Gives back everything of a sequence; does nothing for one that holds nothing.
    fn release(&mut self, seq: SeqId);
    /// Those of the spans' sequences that were dropped, each with its reason, once. They stay empty until released. A
    /// device that the host does not wait for may name one some steps late, but names it where a prompt ends.
    fn take_failures(&mut self, spans: &[Span]) -> Vec<(SeqId, Error)>;
    /// Waits until everything asked of the device so far is done, so that failures and usage are of this moment.
    fn wait(&mut self) -> Result<()> {
        Ok(())
    }
    /// What the store holds; on a device that the host does not wait for, as of some steps ago.
    fn usage(&self) -> Usage;
    /// Rows of these sequences whose pages are full, dead entries included: the next token takes a page for each of them at
    /// most. May wait for the device, once.
    fn full_rows(&self, sequences: &[SeqId]) -> u64;
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
        /// The mean over the layer's query heads in place of the sum over each group.
        layer: bool,
    },
}

/// Attention over held entries. Prefill and decode are one method; the backend picks kernels.
pub trait Attention {
    /// Causal attention of the spans' queries over their sequences' visible entries, scaled by `head_dim^-0.5`.
    /// `q`: `[tokens, q_heads, head_dim]`; the result has its shape and dtype.
    fn attend(&mut self, layer: usize, spans: &[Span], q: &Tensor, protect: Protect, tap: Tap) -> Result<Tensor>;
}

/// Recording a step's work once and doing it again.
pub trait Capture {
    /// From here on work is recorded, not done.
    ///
    /// # Errors
    /// [`Error::Config`] if this backend cannot record.
    fn begin_capture(&mut self) -> Result<()> {
        Err(Error::Config("this backend cannot record steps: graphs need the CUDA backend".into()))
    }
    /// Ends a recording, whatever became of it.
    ///
    /// # Errors
    /// Why what was recorded cannot be done again.
    fn end_capture(&mut self) -> Result<Box<dyn Recording>> {
        Err(Error::Config("nothing is being recorded".into()))
    }
    /// Does what was recorded for the step that was begun last.
    ///
    /// # Errors
    /// Those of the device.
    fn replay(&mut self, recording: &dyn Recording) -> Result<()> {
        Err(Error::Config(format!("{recording:?} was not recorded here")))
    }
}

/// Recorded work, which the backend that recorded it knows how to do again.
pub trait Recording: std::fmt::Debug + Send {
    /// The recording itself.
    fn as_any(&self) -> &dyn std::any::Any;
}

/// A store with its attention.
pub trait Backend: Storage + Attention + Capture + std::fmt::Debug + Send {}
impl<T: Storage + Attention + Capture + std::fmt::Debug + Send> Backend for T {}

/// Why a store made for one model cannot serve another and its policy.
fn misfits(made_for: &ModelSpec, spec: &ModelSpec, needs: &[Needs]) -> Vec<String> {
    let mut why = vec![];
    let shape = |s: &ModelSpec| (s.layers, s.q_heads, s.kv_heads, s.head_dim, s.rope.clone());
    if shape(spec) != shape(made_for) {
        why.push("the store was made for a model of another shape".into());
    }
    if needs.iter().any(|n| n.query_moments.is_some()) && spec.rope.is_none() {
        why.push("query moments need the model's RoPE to undo it".into());
    }
    why
}
