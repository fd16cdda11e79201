//! One sequence of a model under a policy.

use crate::{
    error::{Error, Result},
    gates::Gates,
    model::Model,
};
use candle_core::{DType, Tensor};
use kvpolicy::{
    CpuConfig, Error as CacheError, KvCache, ModelSpec, Phase, Policy, SeqId, Stats, backend::Backend, cpu,
};
#[cfg(feature = "cuda")]
use kvpolicy::{CudaConfig, cuda};
use std::sync::Arc;

/// Tokens of a prompt that go through the model at a time. Fewer at a time leave less to evict at once, more at a time
/// make better use of the machine: a GPU needs about 2,048 for the products of a small model to occupy all of it.
const CHUNK: [usize; 2] = [512, 2048]; // CPU, GPU

/// What a session keeps: in main memory, or on the GPU where the model is on one.
#[derive(Debug, Clone, Default)]
pub struct SessionOptions {
    /// Type of stored keys and values; `None` for f32 in main memory and bf16 on a GPU.
    pub kv_dtype: Option<DType>,
    /// The most bytes they may take. `None` for no limit in main memory; a GPU reserves at once what `max_tokens` may take,
    /// or half of what is free if that is less.
    pub kv_bytes: Option<u64>,
    /// The most tokens the sequence may have; `None` for as many as the model was made for.
    pub max_tokens: Option<usize>,
    /// The most answers that [`Session::chains`] may be asked for, which a GPU reserves for; `None` for one.
    pub chains: Option<usize>,
}

impl SessionOptions {
    /// Type of stored keys and values beside this model.
    pub fn kv_dtype(&self, model: &Model) -> DType {
        self.kv_dtype.unwrap_or(if model.device().is_cuda() { DType::BF16 } else { DType::F32 })
    }

    fn max_tokens(&self, model: &Model) -> usize {
        self.max_tokens.unwrap_or(model.config().max_context)
    }

    fn store(&self, model: &Model, spec: &ModelSpec) -> Result<Box<dyn Backend>> {
        let (dtype, limit_bytes) = (self.kv_dtype(model), self.kv_bytes);
        #[cfg(feature = "cuda")]
        if model.device().is_cuda() {
            let max_entries = self.max_tokens(model);
            let config = CudaConfig {
                dtype,
                limit_bytes,
                max_sequences: self.chains.unwrap_or(1),
                max_entries,
                ..CudaConfig::default()
            };
            return Ok(cuda(spec, &config, model.device())?);
        }
        Ok(cpu(spec, &CpuConfig { dtype, limit_bytes, ..CpuConfig::default() })?)
    }
}

/// What a step leaves.
struct Stepped {
    logits: Tensor, // f32 [sequences, vocab]
    /// Who was dropped.
    lost: Vec<(SeqId, CacheError)>,
}

/// One sequence: prefill, decode, and prefill again for a further turn.
#[derive(Debug)]
pub struct Session<'a> {
    model: &'a Model,
    gates: Option<Arc<Gates>>,
    cache: KvCache,
    seq: SeqId,
    max_tokens: usize,
    chunk: usize,
}

impl<'a> Session<'a> {
    /// Over a model that has no [`crate::Lm`] around it, such as one of random weights.
    ///
    /// # Errors
    /// Every reason why the policy cannot run on this model.
    pub fn new(
        model: &'a Model,
        gates: Option<Arc<Gates>>,
        policy: Arc<dyn Policy>,
        options: &SessionOptions,
    ) -> Result<Self> {
        let policy = model.config().policy(policy, options.max_tokens(model))?;
        Self::under(model, gates, policy, options)
    }

    /// Under a policy that has the windows of the model, or where none ends.
    pub(crate) fn under(
        model: &'a Model,
        gates: Option<Arc<Gates>>,
        policy: Arc<dyn Policy>,
        options: &SessionOptions,
    ) -> Result<Self> {
        let mut spec = model.spec(options.kv_dtype(model))?;
        spec.gates = gates.as_ref().map(|gates| gates.spec());
        let max_tokens = options.max_tokens(model);
        let mut cache = KvCache::new(spec.clone(), policy, options.store(model, &spec)?)?;
        let seq = cache.open();
        Ok(Self { model, gates, cache, seq, max_tokens, chunk: CHUNK[model.device().is_cuda() as usize] })
    }

    /// Reads the tokens of a prompt or of a further turn. `last`: the prompt ends here, so that policies that rank may
    /// trim. Returns the last token's logits, f32 `[vocab]`.
    ///
    /// # Errors
    /// [`Error::Model`] for an empty prompt or more tokens than the session was opened for, and whatever ends the sequence.
    pub fn prefill(&mut self, tokens: &[u32], last: bool) -> Result<Tensor> {
        self.check(self.seq, tokens)?;
        let mut logits = None;
        let chunks = tokens.len().div_ceil(self.chunk);
        for (i, chunk) in tokens.chunks(self.chunk).enumerate() {
            logits = Some(self.step(chunk, Phase::Prefill { last: last && i + 1 == chunks })?);
        }
        logits.ok_or_else(|| Error::Model("the prompt is empty: it needs at least one token".into()))
    }

    /// Generates on from `token`. Returns its logits, f32 `[vocab]`.
    ///
    /// # Errors
    /// As [`Session::prefill`].
    pub fn decode(&mut self, token: u32) -> Result<Tensor> {
        self.check(self.seq, &[token])?;
        self.step(&[token], Phase::Decode)
    }

    /// `n` answers to what was read so far. They share what they hold of it, and go on together.
    ///
    /// # Errors
    /// [`Error::Model`] for none, and what [`KvCache::fork`] refuses: more than the options said, or no memory for what the
    /// policy changes at every token.
    pub fn chains(mut self, n: usize) -> Result<Chains<'a>> {
        if n == 0 {
            return Err(Error::Model("chains=0 is not accepted: 1 or more".into()));
        }
        let mut sequences = vec![Some(self.seq)];
        for _ in 1..n {
            sequences.push(Some(self.cache.fork(self.seq)?));
        }
        Ok(Chains { session: self, sequences })
    }

    /// What can be known before the first chunk: an error here leaves the sequence as it was.
    fn check(&self, seq: SeqId, tokens: &[u32]) -> Result<()> {
        self.model.check_tokens(tokens)?;
        let (asked, most) = (self.cache.seen(seq)? + tokens.len(), self.max_tokens);
        if asked <= most {
            return Ok(());
        }
        let made_for = self.model.config().max_context;
        Err(Error::Model(if most == made_for {
            format!("a context of {asked} tokens exceeds the {most} the model was made for; allow it with --allow-long")
        } else {
            format!("a context of {asked} tokens exceeds the {most} the session was opened for: raise max_tokens")
        }))
    }

    /// On the CPU a step runs inside rayon's pool: from outside, each of its many small operations would be handed over to
    /// the pool and waited for.
    fn run(&mut self, tokens: &[u32], work: &[(SeqId, usize, Phase)]) -> Result<Stepped> {
        if self.model.device().is_cpu() {
            rayon::scope(|_| self.forward(tokens, work))
        } else {
            self.forward(tokens, work)
        }
    }

    /// Waits for the device at the end of each step, as whoever reads the logits does: who did not fail has not failed, and
    /// figures are of this step.
    fn forward(&mut self, tokens: &[u32], work: &[(SeqId, usize, Phase)]) -> Result<Stepped> {
        let step = self.cache.begin(work)?;
        let logits = self.model.forward(tokens, &step, &mut self.cache, self.gates.as_deref());
        match logits.and_then(|logits| Ok((logits, self.cache.wait()?))) {
            Ok((logits, mut lost)) => {
                lost.extend(self.cache.end(step));
                Ok(Stepped { logits, lost })
            }
            Err(error) => {
                self.cache.abort(step);
                Err(error)
            }
        }
    }

    /// A step of the one sequence.
    fn step(&mut self, tokens: &[u32], phase: Phase) -> Result<Tensor> {
        let stepped = self.run(tokens, &[(self.seq, tokens.len(), phase)])?;
        match stepped.lost.into_iter().next() {
            Some((_, error)) => Err(error.into()),
            None => Ok(stepped.logits.squeeze(0)?),
        }
    }

    /// Whether one more token fits.
    pub fn has_room(&self) -> bool {
        self.seen() < self.max_tokens
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

/// Several answers to one prompt, decoded together: see [`Session::chains`].
#[derive(Debug)]
pub struct Chains<'a> {
    session: Session<'a>,
    /// `None` once a chain has ended.
    sequences: Vec<Option<SeqId>>,
}

impl Chains<'_> {
    /// Generates on: each chain named reads a token, `(chain, token)`. Returns their logits in this order, f32
    /// `[tokens, vocab]`, and the chains that were dropped for want of memory, whose logits mean nothing: they have ended.
    ///
    /// # Errors
    /// [`Error::Model`] for a chain that has ended or does not exist or for more tokens than the session was opened for, and
    /// what ends every chain.
    pub fn decode(&mut self, tokens: &[(usize, u32)]) -> Result<(Tensor, Vec<(usize, Error)>)> {
        let mut work = vec![];
        for &(chain, token) in tokens {
            let seq = self.sequences.get(chain).copied().flatten();
            let seq = seq.ok_or_else(|| Error::Model(format!("chain {chain} has ended or does not exist")))?;
            self.session.check(seq, &[token])?;
            work.push((seq, 1, Phase::Decode));
        }
        let tokens: Vec<u32> = tokens.iter().map(|&(_, token)| token).collect();
        let Stepped { logits, lost } = self.session.run(&tokens, &work)?;
        let mut dropped = vec![];
        for (seq, error) in lost {
            if let Some(chain) = self.sequences.iter().position(|&other| other == Some(seq)) {
                self.end(chain);
                dropped.push((chain, error.into()));
            }
        }
        Ok((logits, dropped))
    }

    /// Ends a chain and gives back what it alone holds. Does nothing for one that has ended.
    pub fn end(&mut self, chain: usize) {
        if let Some(seq) = self.sequences.get_mut(chain).and_then(Option::take) {
            self.session.cache.release(seq);
        }
    }

    /// Whether the chain goes on and has room for one more token.
    pub fn has_room(&self, chain: usize) -> bool {
        let seq = self.sequences.get(chain).copied().flatten();
        seq.and_then(|seq| self.session.cache.seen(seq).ok()).is_some_and(|seen| seen < self.session.max_tokens)
    }

    /// What the cache held over the run.
    pub fn stats(&self) -> Stats {
        self.session.stats()
    }

    /// The cache, for inspection.
    pub fn cache(&self) -> &KvCache {
        &self.session.cache
    }
}
