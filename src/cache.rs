use crate::{
    backend::{Backend, Recording, Tap},
    error::{Error, Result},
    policy::{Budget, Evict, GateSource, LayerCx, Needs, NewTokens, Policy, Protect, Verdict},
    spec::ModelSpec,
    stats::{Stats, Usage},
    step::{Phase, SeqId, Span, Step},
};
use candle_core::Tensor;
use std::{collections::HashMap, sync::Arc};

/// The cache of a model: pairs a policy with a backend and fixes the order of calls.
///
/// A step is [`begin`](Self::begin), one [`attend`](Self::attend) per layer in order, [`end`](Self::end).
#[derive(Debug)]
pub struct KvCache {
    spec: ModelSpec,
    policy: Arc<dyn Policy>,
    backend: Box<dyn Backend>,
    taps: Vec<Tap>,
    sequences: HashMap<SeqId, Life>,
    next: u64,
    stats: Stats,
}

/// What the host knows of a sequence.
#[derive(Debug, Clone, Copy, Default)]
struct Life {
    seen: usize,
    /// Decode steps since the last prefill: the clock of [`When::every`](crate::When).
    decoded: u32,
    in_step: bool,
    /// The first layer that has not attended in this step.
    next_layer: usize,
    dropped: bool,
}

impl KvCache {
    /// Pairs a policy with a backend.
    ///
    /// # Errors
    /// [`Error::Refused`] with every reason why this model and backend cannot run the policy.
    pub fn new(spec: ModelSpec, policy: Arc<dyn Policy>, mut backend: Box<dyn Backend>) -> Result<Self> {
        let refuse = |reasons| Err(Error::Refused { policy: policy.to_string(), reasons });
        let faults = spec.faults();
        if !faults.is_empty() {
            return refuse(faults); // no other question makes sense
        }
        let needs = needs_of(&*policy, &spec);
        let mut reasons = policy.faults();
        reasons.extend(policy.misfits(&spec));
        if needs.iter().any(|n| n.gates.is_some()) && spec.gates.is_none() {
            reasons.push("the model has no decision gates: name a file with `weights=`, or take a DMS model".into());
        }
        if sources(&needs).len() > 1 {
            reasons.push(TWO_SOURCES.into());
        }
        if needs.iter().any(|n| n.layer_mass && n.attn_mass != Some(0.0)) {
            reasons.push("the mass of a whole layer is that of the newest query: it needs attn_mass of 0".into());
        }
        reasons.extend(backend.prepare(&spec, &needs));
        if !reasons.is_empty() {
            return refuse(reasons);
        }
        let tap = |n: &Needs| n.attn_mass.map_or(Tap::None, |decay| Tap::Mass { decay, layer: n.layer_mass });
        let taps = needs.iter().map(tap).collect();
        Ok(Self { spec, policy, backend, taps, sequences: HashMap::new(), next: 0, stats: Stats::default() })
    }

    /// Where a policy wants a model's decision logits from; `None` if it needs none.
    ///
    /// # Errors
    /// [`Error::Refused`] if its layers name different sources.
    pub fn gate_source(policy: &dyn Policy, spec: &ModelSpec) -> Result<Option<GateSource>> {
        let mut sources = sources(&needs_of(policy, spec));
        if sources.len() > 1 {
            return Err(Error::Refused { policy: policy.to_string(), reasons: vec![TWO_SOURCES.into()] });
        }
        Ok(sources.pop())
    }

    /// The model's shape.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// The policy.
    pub fn policy(&self) -> &Arc<dyn Policy> {
        &self.policy
    }

    /// A new, empty sequence.
    pub fn open(&mut self) -> SeqId {
        let seq = SeqId(self.next);
        self.next += 1;
        self.sequences.insert(seq, Life::default());
        seq
    }

    /// Tokens a sequence has seen, held or not; the position of its next token.
    ///
    /// # Errors
    /// [`Error::Sequence`] if it is unknown.
    pub fn seen(&self, seq: SeqId) -> Result<usize> {
        Ok(self.life(seq)?.seen)
    }

    /// A new sequence that begins with all that `seq` has seen and holds, as for several answers to one prompt. Both share
    /// pages, and whichever writes to one first copies it. Layers whose policy changes or drops entries at every token are
    /// copied now: there the pages would be copied at the next step anyway. May wait for the device.
    ///
    /// # Errors
    /// [`Error::Sequence`] for a sequence that is unknown, was dropped, or is in a step; [`Error::PoolExhausted`] if there is
    /// no room for what has to be copied. Nothing has changed then.
    pub fn fork(&mut self, seq: SeqId) -> Result<SeqId> {
        let life = self.life(seq)?;
        let refuse = |what: &str| Err(Error::Sequence { seq, what: what.to_string() });
        if life.dropped {
            return refuse("was dropped, for want of memory or by an error: there is nothing to fork");
        }
        if life.in_step {
            return refuse("is in a step: fork it when the step has ended");
        }
        let stays = |layer| {
            let every = self.policy.when(&LayerCx { layer, spec: &self.spec }).every;
            self.taps[layer] == Tap::None && every.is_none()
        };
        let share: Vec<bool> = (0..self.spec.layers).map(stays).collect();
        let to = self.open();
        if let Err(error) = self.backend.fork(seq, to, &share) {
            self.sequences.remove(&to);
            return Err(error);
        }
        self.sequences.insert(to, life);
        Ok(to)
    }

    fn life(&self, seq: SeqId) -> Result<Life> {
        let unknown = || Error::Sequence { seq, what: "is unknown to this cache or already released".into() };
        self.sequences.get(&seq).copied().ok_or_else(unknown)
    }

    /// Starts a step: each sequence with its number of new tokens and what it does. Sequences may be in different
    /// phases and of different length.
    ///
    /// # Errors
    /// [`Error::Sequence`] for a sequence that is unknown, named twice, was dropped, or is still in a step that did not
    /// end; for no tokens; for a decode of more than one token; for more than 2^31 tokens. Nothing has changed then.
    pub fn begin(&mut self, work: &[(SeqId, usize, Phase)]) -> Result<Step> {
        let mut spans: Vec<Span> = Vec::with_capacity(work.len());
        for &(seq, len, phase) in work {
            let life = self.life(seq)?;
            let refuse = |what: &str| Err(Error::Sequence { seq, what: what.to_string() });
            if life.dropped {
                return refuse("was dropped, for want of memory or by an error: release it and start anew");
            }
            if life.in_step {
                return refuse("is in a step that did not end: release it");
            }
            if spans.iter().any(|s| s.seq == seq) {
                return refuse("is named twice in one step");
            }
            if len == 0 {
                return refuse("has no new token in this step");
            }
            if phase == Phase::Decode && len != 1 {
                return refuse("decodes one token a step: pass more as a prefill");
            }
            if life.seen.checked_add(len).is_none_or(|seen| seen > i32::MAX as usize) {
                return refuse("would exceed 2^31 tokens");
            }
            spans.push(Span { seq, start: life.seen as u32, len, phase });
        }
        let positions = self.backend.begin(&spans)?;
        spans.iter().for_each(|span| self.update(span.seq, |life| (life.in_step, life.next_layer) = (true, 0)));
        Ok(Step { spans, positions })
    }

    /// One layer of a step: writes the new tokens, attends, then lets go of what the policy does not keep.
    /// Returns `[tokens, q_heads, head_dim]` in the dtype of `new.q`. A sequence that was dropped in this step reads zeros.
    ///
    /// # Errors
    /// [`Error::Shape`] for tensors that do not fit the step, [`Error::Config`] for a layer that does not exist,
    /// [`Error::Sequence`] for a step that is over, a sequence that was released, or a layer that had its turn: nothing
    /// has changed then. After an error of the policy or the backend the step is lost: [`abort`](Self::abort) it.
    pub fn attend(&mut self, layer: usize, step: &Step, new: &NewTokens) -> Result<Tensor> {
        self.check(layer, step, new)?;
        let (policy, spans) = (&self.policy, step.spans());
        let cx = LayerCx { layer, spec: &self.spec };
        let protect = policy.protect(&cx);

        let verdict = policy.on_write(&cx, new)?;
        check_verdict(&verdict, step.len(), self.spec.kv_heads)?;
        for span in spans {
            if let Some(life) = self.sequences.get_mut(&span.seq) {
                life.next_layer = layer + 1;
            }
        }
        let due = self.due(&cx, spans);
        // Decode reuses the dead entry's place, a prompt drops what died.
        let prompts: Vec<Span> = spans.iter().filter(|span| span.phase != Phase::Decode).copied().collect();
        let marks = !matches!(verdict.evict, Evict::Never);
        let backend = &mut self.backend;
        backend.unshare(layer, if marks { &prompts } else { &due })?;
        backend.append(layer, spans, new, &verdict, protect)?;
        backend.observe(layer, spans, &new.q)?;
        let y = backend.attend(layer, spans, &new.q, protect, self.taps[layer])?;
        if !prompts.is_empty() {
            backend.expire(layer, &prompts, protect)?;
        }
        if !due.is_empty() {
            self.trim(layer, &due, protect)?;
        }
        Ok(y)
    }

    fn due(&self, cx: &LayerCx, spans: &[Span]) -> Vec<Span> {
        let when = self.policy.when(cx);
        let is_due = |span: &&Span| match span.phase {
            Phase::Prefill { last } => last && when.prefill_end,
            Phase::Decode => {
                let decoded = self.sequences.get(&span.seq).map_or(0, |life| life.decoded) + 1;
                when.every.is_some_and(|n| decoded.is_multiple_of(n.get()))
            }
        };
        spans.iter().filter(is_due).copied().collect()
    }

    fn trim(&mut self, layer: usize, due: &[Span], protect: Protect) -> Result<()> {
        let cx = LayerCx { layer, spec: &self.spec };
        let budgets: Vec<_> = due.iter().map(|span| self.policy.budget(&cx, span.seen())).collect();
        for budget in &budgets {
            if let Budget::Heads(heads) = budget
                && heads.len() != self.spec.kv_heads
            {
                let (expected, got) = (vec![self.spec.kv_heads], vec![heads.len()]);
                return Err(Error::Shape { what: "the policy's budget of heads", expected, got });
            }
        }
        // A policy ranks what is alive, whenever the dead are reclaimed.
        self.backend.expire(layer, due, protect)?;
        let score = self.policy.score(&cx, &*self.backend.held(layer, due)?)?;
        self.backend.trim(layer, due, &score, &budgets, protect)
    }

    fn check(&self, layer: usize, step: &Step, new: &NewTokens) -> Result<()> {
        let ModelSpec { layers, q_heads, kv_heads, head_dim, .. } = self.spec;
        if layer >= layers {
            return Err(Error::Config(format!("layer {layer} of a model with {layers} layers")));
        }
        for span in step.spans() {
            let life = self.life(span.seq)?;
            if !life.in_step || life.seen != span.start as usize {
                return Err(Error::Sequence { seq: span.seq, what: "is in no such step: it ended".into() });
            }
            if layer < life.next_layer {
                return Err(Error::Sequence {
                    seq: span.seq,
                    what: format!("layer {layer} has attended in this step"),
                });
            }
        }
        let tokens = step.len();
        shape("positions", &new.positions, &[tokens])?;
        shape("q", &new.q, &[tokens, q_heads, head_dim])?;
        shape("k", &new.k, &[tokens, kv_heads, head_dim])?;
        shape("v", &new.v, &[tokens, kv_heads, head_dim])?;
        new.evict_logits.iter().try_for_each(|z| shape("evict_logits", z, &[tokens, kv_heads]))
    }

    /// Ends a step. Returns the sequences that were dropped because the pool had no page left; every other sequence is as
    /// if they had not been there. Release them. On a device that the host does not wait for, a sequence may be
    /// named some steps late, but before the end of a step that ends a prompt; [`wait`](Self::wait) asks at once.
    pub fn end(&mut self, step: Step) -> Vec<(SeqId, Error)> {
        let failures = self.backend.take_failures(step.spans());
        for span in step.spans() {
            self.update(span.seq, |life| {
                if !life.in_step || life.seen != span.start as usize {
                    return; // a copy of the step ended it
                }
                life.seen += span.len;
                life.in_step = false;
                life.decoded = if span.phase == Phase::Decode { life.decoded + 1 } else { 0 };
            });
        }
        failures.iter().for_each(|(seq, _)| self.update(*seq, |life| life.dropped = true));
        let alive = self.sequences.values().filter(|life| !life.dropped);
        let seen = alive.map(|life| life.seen as u64).sum();
        let sampled = step.spans().iter().any(|span| span.phase != Phase::Prefill { last: false });
        let entries = (self.spec.layers * self.spec.kv_heads) as u64;
        self.stats.record(&self.backend.usage(), seen, entries, sampled);
        failures
    }

    /// Gives up a step that failed half-way: its sequences hold what some layers wrote and others did not, so they are
    /// dropped. Release them.
    pub fn abort(&mut self, step: Step) {
        for span in step.spans() {
            self.backend.release(span.seq);
            self.update(span.seq, |life| (life.in_step, life.dropped) = (false, true));
        }
    }

    /// Waits until everything asked of the device is done. Returns the sequences that were dropped and not yet named by
    /// [`end`](Self::end).
    ///
    /// # Errors
    /// Those of the device.
    pub fn wait(&mut self) -> Result<Vec<(SeqId, Error)>> {
        self.backend.wait()?;
        let spans: Vec<Span> =
            self.sequences.keys().map(|&seq| Span { seq, start: 0, len: 1, phase: Phase::Decode }).collect();
        let failures = self.backend.take_failures(&spans);
        failures.iter().for_each(|(seq, _)| self.update(*seq, |life| life.dropped = true));
        Ok(failures)
    }

    /// Records a decode step of these sequences, in this order, as a graph, and runs it once; `forward` is the model's
    /// forward pass. Run a step or two before, so that everything that is made once exists. What `forward` returns is
    /// written anew by each [`replay`](Self::replay); inputs that change must be at fixed addresses on the device.
    ///
    /// Every replay makes the same launches, so the policy may trim after every decode step or after none, to a budget
    /// that does not grow with the tokens seen.
    ///
    /// # Errors
    /// [`Error::Refused`] with the reasons why this policy cannot be replayed: nothing has changed then. After an error of
    /// `forward` or of the device, or for want of memory, the sequences are lost: release them.
    pub fn capture<T, E: From<Error>>(
        &mut self,
        sequences: &[SeqId],
        forward: impl FnOnce(&Step, &mut Self) -> std::result::Result<T, E>,
    ) -> std::result::Result<(DecodeGraph, T), E> {
        self.check_replayable()?;
        let work: Vec<_> = sequences.iter().map(|&seq| (seq, 1, Phase::Decode)).collect();
        let step = self.begin(&work)?;
        if let Err(error) = self.backend.begin_capture() {
            self.abort(step);
            return Err(error.into());
        }
        let output = forward(&step, self);
        let recording = self.backend.end_capture(); // whatever became of the forward pass
        let (output, recording) = match (output, recording) {
            (Ok(output), Ok(recording)) => (output, recording),
            (Err(error), _) => {
                self.abort(step);
                return Err(error);
            }
            (_, Err(error)) => {
                self.abort(step);
                return Err(error.into());
            }
        };
        let graph = DecodeGraph { work, recording };
        match self.run(&graph, step)?.into_iter().next() {
            Some((_, error)) => Err(error.into()),
            None => Ok((graph, output)),
        }
    }

    /// A further decode step of the sequences of a graph. Returns what [`end`](Self::end) returns.
    ///
    /// # Errors
    /// As [`begin`](Self::begin), and those of the device.
    pub fn replay(&mut self, graph: &DecodeGraph) -> Result<Vec<(SeqId, Error)>> {
        let step = self.begin(&graph.work)?;
        self.run(graph, step)
    }

    /// Does what was recorded as a step that has begun.
    fn run(&mut self, graph: &DecodeGraph, step: Step) -> Result<Vec<(SeqId, Error)>> {
        match self.backend.replay(&*graph.recording) {
            Ok(()) => Ok(self.end(step)),
            Err(error) => {
                self.abort(step);
                Err(error)
            }
        }
    }

    fn check_replayable(&self) -> Result<()> {
        let mut reasons: Vec<String> = vec![];
        for layer in 0..self.spec.layers {
            let cx = LayerCx { layer, spec: &self.spec };
            let needs = self.policy.needs(&cx);
            let every = self.policy.when(&cx).every.map_or(0, |n| n.get());
            if every > 1 {
                reasons.push(format!("layer {layer} trims every {every} steps, a graph does the same in each"));
            }
            const SEEN: usize = 1 << 20;
            if every == 1 && self.policy.budget(&cx, SEEN) != self.policy.budget(&cx, 2 * SEEN) {
                reasons.push(format!("the budget of layer {layer} grows with the tokens seen"));
            }
            if needs.query_moments.is_some() {
                reasons.push(format!("layer {layer} keeps moments of the queries, which the host counts"));
            }
            if needs.last_queries > 0 && every == 1 {
                reasons.push(format!("layer {layer} looks up its newest queries at every step"));
            }
            if !reasons.is_empty() {
                return Err(Error::Refused { policy: self.policy.to_string(), reasons });
            }
        }
        Ok(())
    }

    fn update(&mut self, seq: SeqId, change: impl FnOnce(&mut Life)) {
        if let Some(life) = self.sequences.get_mut(&seq) {
            change(life);
        }
    }

    /// Ends a sequence and gives its pages back. Does nothing for one that is unknown.
    pub fn release(&mut self, seq: SeqId) {
        self.sequences.remove(&seq);
        self.backend.release(seq);
    }

    /// What the store holds now.
    pub fn usage(&self) -> Usage {
        self.backend.usage()
    }

    /// Figures over all steps so far.
    pub fn stats(&self) -> Stats {
        self.stats
    }

    /// The most pages that one more token of each of these sequences takes: one for every row whose pages are full. May wait
    /// for the device, once.
    pub fn full_rows(&self, sequences: &[SeqId]) -> u64 {
        self.backend.full_rows(sequences)
    }

    /// Entries each KV head of a layer holds for a sequence, those included that are dead and not yet reclaimed; empty
    /// for a layer that does not exist. For inspection: may wait for the device.
    pub fn live(&self, layer: usize, seq: SeqId) -> Vec<usize> {
        if layer < self.spec.layers { self.backend.live(layer, seq) } else { vec![] }
    }

    /// Positions one row holds, sorted. For inspection: may wait for the device.
    pub fn held_positions(&self, layer: usize, seq: SeqId, kv_head: usize) -> Vec<u32> {
        if layer >= self.spec.layers || kv_head >= self.spec.kv_heads {
            return vec![];
        }
        self.backend.held_positions(layer, seq, kv_head)
    }
}

/// A decode step that was recorded once: see [`KvCache::capture`].
#[derive(Debug)]
pub struct DecodeGraph {
    work: Vec<(SeqId, usize, Phase)>,
    recording: Box<dyn Recording>,
}

fn shape(what: &'static str, tensor: &Tensor, expected: &[usize]) -> Result<()> {
    if tensor.dims() == expected {
        return Ok(());
    }
    Err(Error::Shape { what, expected: expected.to_vec(), got: tensor.dims().to_vec() })
}

/// A policy may come from anyone.
fn check_verdict(verdict: &Verdict, tokens: usize, kv_heads: usize) -> Result<()> {
    if let Evict::Bits { bits, .. } = &verdict.evict {
        shape("the policy's bits", bits, &[tokens, kv_heads])?;
    }
    verdict.score.iter().try_for_each(|score| shape("the policy's first scores", score, &[tokens, kv_heads]))
}

const TWO_SOURCES: &str = "layers name different sources of gates";

fn sources(needs: &[Needs]) -> Vec<GateSource> {
    let mut sources: Vec<GateSource> = vec![];
    for source in needs.iter().filter_map(|n| n.gates.as_ref()) {
        if !sources.contains(source) {
            sources.push(source.clone());
        }
    }
    sources
}

fn needs_of(policy: &dyn Policy, spec: &ModelSpec) -> Vec<Needs> {
    (0..spec.layers).map(|layer| policy.needs(&LayerCx { layer, spec })).collect()
}
