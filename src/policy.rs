//! The policy: what stays.

use crate::{
    error::Result,
    spec::{Lag, ModelSpec},
};
use candle_core::Tensor;
use std::{fmt, num::NonZeroU32, path::PathBuf};

/// Where in the model a question is asked. Everything here is known to the host.
#[derive(Debug, Clone, Copy)]
pub struct LayerCx<'a> {
    /// Layer index, from 0.
    pub layer: usize,
    /// The model's shape.
    pub spec: &'a ModelSpec,
}

/// The tokens being written to one layer, all sequences of the step laid end to end.
#[derive(Debug, Clone)]
pub struct NewTokens {
    /// `[tokens, q_heads, head_dim]`, RoPE applied.
    pub q: Tensor,
    /// `[tokens, kv_heads, head_dim]`, RoPE applied.
    pub k: Tensor,
    /// `[tokens, kv_heads, head_dim]`.
    pub v: Tensor,
    /// Decision logits, f32 `[tokens, kv_heads]`; present where the policy needs gates.
    pub evict_logits: Option<Tensor>,
    /// u32 `[tokens]`.
    pub positions: Tensor,
}

/// Where decision logits come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GateSource {
    /// The gates that belong to the checkpoint: its adapter tensors or its borrowed neuron.
    Checkpoint,
    /// A file of gates beside the checkpoint.
    File(PathBuf),
}

/// Running moments of the queries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueryMoments {
    /// Positions below this are left out.
    pub skip: u32,
    /// Whether the covariance is wanted beside the mean.
    pub covariance: bool,
}

/// What a policy needs from the model and the kernels. Checked once, when the cache is built.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Needs {
    /// Accumulate softmax mass per held entry, summed over the GQA group: with each query,
    /// `score = decay * score + mass`. 1 is a running sum, 0 the newest query alone.
    pub attn_mass: Option<f32>,
    /// Take the mean of that mass over all query heads of the layer instead, the same for each KV head: for a policy whose
    /// heads hold the same positions, with a decay of 0.
    pub layer_mass: bool,
    /// Learned eviction logits from the model (DMS).
    pub gates: Option<GateSource>,
    /// Remember the newest n queries of each sequence.
    pub last_queries: usize,
    /// Keep moments of every query, as it was before RoPE.
    pub query_moments: Option<QueryMoments>,
}

/// Entries no rule may evict: the first `sinks` positions and the newest `recent` ones.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Protect {
    /// Positions below this.
    pub sinks: u32,
    /// This many positions up to and including the newest.
    pub recent: u32,
}

impl Protect {
    /// Whether an entry at `pos` is shielded as seen from a query at `now`; one that comes later always is.
    pub fn covers(self, pos: u32, now: u32) -> bool {
        pos < self.sinks || pos > now || now - pos < self.recent
    }
}

/// Marks made at write time. A marked entry dies when protection stops covering it.
#[derive(Debug, Clone)]
pub enum Evict {
    /// Mark nothing.
    Never,
    /// Mark every new token.
    Always,
    /// Mark by a bit.
    Bits {
        /// u8 `[tokens, kv_heads]`, nonzero marks.
        bits: Tensor,
        /// Which token a bit judges.
        lag: Lag,
    },
}

/// What a policy says of new tokens.
#[derive(Debug, Clone)]
pub struct Verdict {
    /// Which of them are marked.
    pub evict: Evict,
    /// The entries' first score, f32 `[tokens, kv_heads]`; 0 if absent.
    pub score: Option<Tensor>,
}

impl Verdict {
    /// No mark, no score.
    pub const KEEP: Verdict = Verdict { evict: Evict::Never, score: None };
}

/// How many entries the rows of one sequence in one layer may hold after a trim.
#[derive(Debug, Clone, PartialEq)]
pub enum Budget {
    /// As many as there are.
    Unlimited,
    /// The same for every KV head. May be fractional (a share of the tokens seen): the whole part holds.
    PerHead(f64),
    /// One number per KV head.
    Heads(Vec<usize>),
    /// Shared by the heads of the layer.
    Pooled {
        /// Entries over all heads.
        total: usize,
        /// Entries each head is sure of.
        floor: usize,
    },
}

/// When the budget is enforced.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct When {
    /// After the chunk that ends a prefill.
    pub prefill_end: bool,
    /// After every n decode steps of a sequence, counted from its last prefill.
    pub every: Option<NonZeroU32>,
}

impl When {
    /// At the end of each prefill only.
    pub const PREFILL_END: When = When { prefill_end: true, every: None };
    /// At the end of each prefill and after every decode step.
    pub const ALWAYS: When = When { prefill_end: true, every: NonZeroU32::new(1) };
}

/// Ranking of held entries: higher is kept, equal scores keep the newer entry.
#[derive(Debug, Clone)]
pub enum Score {
    /// The score each entry already carries: its first score plus the attention mass it drew.
    Carried,
    /// f32 `[rows, max_len]`, in the order of [`Held::keys`].
    Dense(Tensor),
}

/// Mean and covariance of queries before RoPE, over the positions asked for.
#[derive(Debug, Clone)]
pub struct Moments {
    /// f32 `[rows, group, head_dim]`.
    pub mean: Tensor,
    /// f32 `[rows, group, head_dim, head_dim]`, divided by the count.
    pub covariance: Option<Tensor>,
}

/// The held entries of one layer, oldest first, gathered only if asked for.
///
/// A row is (sequence, KV head), sequences outermost; rows shorter than `max_len` are padded at the end with zeros.
pub trait Held {
    /// f32 `[rows, max_len, head_dim]`.
    fn keys(&self) -> Result<Tensor>;
    /// f32 `[rows, max_len, head_dim]`.
    fn values(&self) -> Result<Tensor>;
    /// f32 `[rows, max_len]`, 1 where there is an entry.
    fn valid(&self) -> Result<Tensor>;
    /// f32 `[rows, max_len]` (exact below 2^24).
    fn positions(&self) -> Result<Tensor>;
    /// The carried scores, f32 `[rows, max_len]`.
    fn scores(&self) -> Result<Tensor>;
    /// Tokens each row's sequence has seen, one number per row. Known to the host.
    fn seen(&self) -> Vec<usize>;
    /// Softmax weights of the remembered queries over the held entries, causal:
    /// f32 `[rows, group, queries, max_len]`, the newest query last. Rows of queries that do not exist are zero.
    fn attention_of_last_queries(&self) -> Result<Tensor>;
    /// What [`Needs::query_moments`] asked for.
    fn query_moments(&self) -> Result<Moments>;
}

/// A rule for what the cache keeps.
///
/// Immutable and shared by all sequences; all per-entry state lives in storage and moves with the entry. It prints
/// as the string that makes it again ([`Registry::parse`](crate::Registry::parse)). Tensors come and go on the
/// cache's device; a policy never reads one back to the host, so that it also runs inside a captured CUDA graph.
pub trait Policy: fmt::Debug + fmt::Display + Send + Sync {
    /// Contradictions between the parameters, each as `parameter=value and what is wrong with it`.
    fn faults(&self) -> Vec<String> {
        vec![]
    }

    /// Reasons why this model cannot run the policy, beyond what [`Policy::needs`] says.
    fn misfits(&self, _spec: &ModelSpec) -> Vec<String> {
        vec![]
    }

    /// What the model and the kernels must supply in this layer.
    fn needs(&self, _cx: &LayerCx) -> Needs {
        Needs::default()
    }

    /// What no rule may evict.
    fn protect(&self, _cx: &LayerCx) -> Protect {
        Protect::default()
    }

    /// Marks and first scores of new tokens.
    fn on_write(&self, _cx: &LayerCx, _new: &NewTokens) -> Result<Verdict> {
        Ok(Verdict::KEEP)
    }

    /// `seen` counts the tokens of the sequence so far, held or not.
    fn budget(&self, _cx: &LayerCx, _seen: usize) -> Budget {
        Budget::Unlimited
    }

    /// When the budget is enforced.
    fn when(&self, _cx: &LayerCx) -> When {
        When::default()
    }

    /// Ranking at a trim.
    fn score(&self, _cx: &LayerCx, _held: &dyn Held) -> Result<Score> {
        Ok(Score::Carried)
    }

    /// Whether all KV heads of a layer must hold the same positions, so that a budget cannot be shared across them.
    fn same_for_all_heads(&self) -> bool {
        false
    }
}
