//! One forward pass over a batch of sequences.

use crate::policy::NewTokens;
use candle_core::Tensor;
use std::fmt;

/// A sequence of one [`KvCache`](crate::KvCache); never reused within it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SeqId(pub(crate) u64);

impl fmt::Display for SeqId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// What a sequence does in a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// A chunk of a prompt or of a later turn, of any length.
    Prefill {
        /// This chunk ends the prompt: policies that rank trim after it.
        last: bool,
    },
    /// One generated token.
    Decode,
}

/// The new tokens of one sequence in a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// Which sequence.
    pub seq: SeqId,
    /// Position of its first new token.
    pub start: u32,
    /// Number of new tokens, at least 1.
    pub len: usize,
    /// Prefill or decode.
    pub phase: Phase,
}

impl Span {
    /// Position of the newest token.
    pub fn newest(&self) -> u32 {
        self.start + self.len as u32 - 1
    }

    /// Tokens of the sequence after this step, held or not.
    pub fn seen(&self) -> usize {
        self.start as usize + self.len
    }
}

/// A step: which sequences, how many new tokens each, where they start. Made by [`KvCache::begin`](crate::KvCache::begin).
#[derive(Debug, Clone)]
pub struct Step {
    pub(crate) spans: Vec<Span>,
    pub(crate) positions: Tensor,
}

impl Step {
    /// The sequences' spans, in the order of their tokens.
    pub fn spans(&self) -> &[Span] {
        &self.spans
    }

    /// Number of new tokens over all sequences.
    pub fn len(&self) -> usize {
        self.spans.iter().map(|s| s.len).sum()
    }

    /// Whether the step has no token.
    pub fn is_empty(&self) -> bool {
        self.spans.is_empty()
    }

    /// Position of every new token: u32 `[tokens]`, on the cache's device.
    pub fn positions(&self) -> &Tensor {
        &self.positions
    }

    /// Index of each span's last token in the step: where a model takes its logits.
    pub fn last_tokens(&self) -> Vec<u32> {
        let ends = self.spans.iter().scan(0, |at, s| {
            *at += s.len as u32;
            Some(*at - 1)
        });
        ends.collect()
    }

    /// The new tokens of one layer. `q`: `[tokens, q_heads, head_dim]`, `k` and `v`: `[tokens, kv_heads, head_dim]`,
    /// RoPE applied to `q` and `k`; `evict_logits`: f32 `[tokens, kv_heads]` where the policy needs gates.
    pub fn tokens(&self, q: Tensor, k: Tensor, v: Tensor, evict_logits: Option<Tensor>) -> NewTokens {
        NewTokens { q, k, v, evict_logits, positions: self.positions.clone() }
    }
}
