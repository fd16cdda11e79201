//! One sequence of a model under a policy.

use crate::{
    error::{Error, Result},
    gates::Gates,
    model::Model,
};
use candle_core::Tensor;
use kvpolicy::{CpuConfig, KvCache, Phase, Policy, SeqId, Stats, cpu};
use std::sync::Arc;

/// Tokens of a prompt that go through the model at a time.
const CHUNK: usize = 512;

/// One sequence: prefill, decode, and prefill again for a further turn.
#[derive(Debug)]
pub struct Session<'a> {
    model: &'a Model,
    gates: Option<Arc<Gates>>,
    cache: KvCache,
    seq: SeqId,
    allow_long: bool,
}

impl<'a> Session<'a> {
    pub(crate) fn new(
        model: &'a Model,
        gates: Option<Arc<Gates>>,
        policy: Arc<dyn Policy>,
        store: &CpuConfig,
    ) -> Result<Self> {
        let mut spec = model.config().spec();
        spec.gates = gates.as_ref().map(|gates| gates.spec());
        let mut cache = KvCache::new(spec.clone(), policy, cpu(&spec, store)?)?;
        let seq = cache.open();
        Ok(Self { model, gates, cache, seq, allow_long: false })
    }

    /// Lets the sequence grow beyond the context the model was made for.
    pub fn allow_long(mut self, allow: bool) -> Self {
        self.allow_long = allow;
        self
    }

    /// Reads the tokens of a prompt or of a further turn. `last`: the prompt ends here, so that policies that rank may
    /// trim. Returns the last token's logits, f32 `[vocab]`.
    ///
    /// # Errors
    /// [`Error::Model`] for an empty prompt or a context longer than the model's, and whatever ends the sequence.
    pub fn prefill(&mut self, tokens: &[u32], last: bool) -> Result<Tensor> {
        self.check(tokens)?;
        let mut logits = None;
        let chunks = tokens.len().div_ceil(CHUNK);
        for (i, chunk) in tokens.chunks(CHUNK).enumerate() {
            logits = Some(self.step(chunk, Phase::Prefill { last: last && i + 1 == chunks })?);
        }
        logits.ok_or_else(|| Error::Model("the prompt is empty: it needs at least one token".into()))
    }

    /// Generates on from `token`. Returns its logits, f32 `[vocab]`.
    ///
    /// # Errors
    /// As [`Session::prefill`].
    pub fn decode(&mut self, token: u32) -> Result<Tensor> {
        self.check(&[token])?;
        self.step(&[token], Phase::Decode)
    }

    /// What can be known before the first chunk: an error here leaves the sequence as it was.
    fn check(&self, tokens: &[u32]) -> Result<()> {
        self.model.check_tokens(tokens)?;
        let (asked, most) = (self.cache.seen(self.seq)? + tokens.len(), self.model.config().max_context);
        if asked > most && !self.allow_long {
            return Err(Error::Model(format!(
                "a context of {asked} tokens exceeds the {most} the model was made for; allow it with --allow-long"
            )));
        }
        Ok(())
    }

    fn step(&mut self, tokens: &[u32], phase: Phase) -> Result<Tensor> {
        let step = self.cache.begin(&[(self.seq, tokens.len(), phase)])?;
        let logits = match self.model.forward(tokens, &step, &mut self.cache, self.gates.as_deref()) {
            Ok(logits) => logits,
            Err(error) => {
                self.cache.abort(step);
                return Err(error);
            }
        };
        match self.cache.end(step).pop() {
            Some((_, error)) => Err(error.into()),
            None => Ok(logits.squeeze(0)?),
        }
    }

    /// Whether one more token fits the context the model was made for.
    pub fn has_room(&self) -> bool {
        self.allow_long || self.seen() < self.model.config().max_context
    }

    /// Tokens read and generated so far.
    pub fn seen(&self) -> usize {
        self.cache.seen(self.seq).unwrap_or(0)
    }

    /// What the cache held over the run.
    pub fn stats(&self) -> Stats {
        self.cache.stats()
    }

    /// The cache, for inspection.
    pub fn cache(&self) -> &KvCache {
        &self.cache
    }

    /// The sequence, for inspection.
    pub fn seq(&self) -> SeqId {
        self.seq
    }
}
