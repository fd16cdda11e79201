//! The recorded files, and their tokens going through a cache again.

use candle_core::{DType, Device, IndexOp, Tensor, safetensors};
use kvpolicy::{
    Budget, CpuConfig, Held, KvCache, LayerCx, ModelSpec, Needs, NewTokens, Phase, Policy, Protect, Registry, Rope,
    RopeLayout, Score, SeqId, Verdict, When, cpu,
};
use serde_json::Value;
use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    path::Path,
    sync::{Arc, Mutex},
};

/// A json file and the tensors beside it.
pub(crate) struct Case {
    pub(crate) json: Value,
    pub(crate) tensors: HashMap<String, Tensor>,
}

impl Case {
    pub(crate) fn load(folder: &Path, name: &str) -> Self {
        let path = folder.join(name);
        let tensors = path.with_file_name(format!("{name}.safetensors"));
        let tensors =
            safetensors::load(&tensors, &Device::Cpu).unwrap_or_else(|e| panic!("{}: {e}", tensors.display()));
        Self { json: read_json(&path.with_file_name(format!("{name}.json"))), tensors }
    }

    pub(crate) fn params(&self) -> &Value {
        &self.json["params"]
    }

    /// A tensor `[batch, kv_heads, entries]` with its rows laid end to end.
    pub(crate) fn rows(&self, name: &str) -> Vec<Vec<f32>> {
        self.tensors[name].to_dtype(DType::F32).unwrap().flatten(0, 1).unwrap().to_vec2().unwrap()
    }
}

pub(crate) fn read_json(path: &Path) -> Value {
    let text = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap()
}

pub(crate) fn index(value: &Value) -> usize {
    value.as_u64().unwrap() as usize
}

pub(crate) fn text(value: &Value) -> &str {
    value.as_str().unwrap()
}

/// What a model computed, uncompressed.
pub(crate) struct Model {
    pub(crate) spec: ModelSpec,
    pub(crate) batch: usize,
    pub(crate) tokens: usize,
    /// q, k, v of each layer: `[batch, heads, tokens, head_dim]`.
    layers: Vec<[Tensor; 3]>,
}

impl Model {
    pub(crate) fn new(case: &Case) -> Self {
        let config = |name: &str| index(&case.json["config"][name]);
        let layers = config("num_hidden_layers");
        let (q_heads, kv_heads) = (config("num_attention_heads"), config("num_key_value_heads"));
        let inv_freq = case.tensors["inv_freq"].to_vec1().unwrap();
        let rope = Some(Rope { inv_freq, layout: RopeLayout::HalfSplit });
        let layers: Vec<[Tensor; 3]> =
            (0..layers).map(|l| ["q", "k", "v"].map(|x| case.tensors[&format!("L{l}.{x}")].clone())).collect();
        let (batch, _, tokens, head_dim) = layers[0][0].dims4().unwrap();
        Self {
            spec: ModelSpec { rope, ..ModelSpec::new(layers.len(), q_heads, kv_heads, head_dim) },
            batch,
            tokens,
            layers,
        }
    }
}

/// A model's recorded tokens going through a cache, each batch row a sequence of its own.
pub(crate) struct Replay<'a> {
    model: &'a Model,
    cache: KvCache,
    sequences: Vec<SeqId>,
    log: Log,
    pub(crate) protect: Protect,
    /// Error allowed relative to a score.
    pub(crate) relative: f32,
}

impl<'a> Replay<'a> {
    pub(crate) fn new(model: &'a Model, policy: &str) -> Self {
        let log = Log::default();
        let inner = Registry::standard().parse(policy).unwrap();
        let protect = inner.protect(&LayerCx { layer: 0, spec: &model.spec });
        let backend = cpu(&model.spec, &CpuConfig::default()).unwrap();
        let recorder = Arc::new(Recorder { inner, log: log.clone() });
        let mut cache = KvCache::new(model.spec.clone(), recorder, backend).unwrap();
        let sequences = (0..model.batch).map(|_| cache.open()).collect();
        // The cosines of KeyDiff cross zero.
        let relative = if policy.contains("keydiff") { 0.0 } else { 1e-5 };
        Self { model, cache, sequences, log, protect, relative }
    }

    /// A prefill in chunks, which every other sequence takes from the last to the first. Returns each layer's ranking.
    pub(crate) fn prefill(&mut self, chunks: &[usize]) -> Vec<Ranking> {
        for i in 0..chunks.len() {
            let len = |seq: usize| if seq.is_multiple_of(2) { chunks[i] } else { chunks[chunks.len() - 1 - i] };
            let lens: Vec<usize> = (0..self.model.batch).map(len).collect();
            let last = i + 1 == chunks.len();
            let rankings = self.step(&lens, Phase::Prefill { last });
            if last {
                return rankings;
            }
            assert!(rankings.is_empty(), "ranked within a prefill");
        }
        vec![]
    }

    /// The next `lens[b]` tokens of each sequence. Returns the ranking of each layer that was trimmed.
    pub(crate) fn step(&mut self, lens: &[usize], phase: Phase) -> Vec<Ranking> {
        let starts: Vec<usize> = self.sequences.iter().map(|seq| self.cache.seen(*seq).unwrap()).collect();
        let work: Vec<_> = self.sequences.iter().zip(lens).map(|(seq, len)| (*seq, *len, phase)).collect();
        let step = self.cache.begin(&work).unwrap();
        for (layer, qkv) in self.model.layers.iter().enumerate() {
            let [q, k, v] = qkv.each_ref().map(|x| {
                let spans = starts.iter().zip(lens).enumerate();
                let parts: Vec<Tensor> = spans
                    .map(|(b, (from, len))| x.i((b, .., *from..from + len)).unwrap().transpose(0, 1).unwrap())
                    .collect();
                Tensor::cat(&parts, 0).unwrap().contiguous().unwrap()
            });
            self.cache.attend(layer, &step, &step.tokens(q, k, v, None)).unwrap();
        }
        assert!(self.cache.end(step).is_empty());
        std::mem::take(&mut *self.log.lock().unwrap())
    }

    pub(crate) fn held(&self, layer: usize, row: usize) -> Vec<u32> {
        let heads = self.model.spec.kv_heads;
        self.cache.held_positions(layer, self.sequences[row / heads], row % heads)
    }
}

/// The entries of a row: a score by position.
pub(crate) type Row = BTreeMap<u32, f32>;
/// What a policy answered in one layer.
pub(crate) type Ranking = Vec<Row>;
type Log = Arc<Mutex<Vec<Ranking>>>;

/// Forwards everything and writes down the scores.
#[derive(Debug)]
struct Recorder {
    inner: Arc<dyn Policy>,
    log: Log,
}

impl Policy for Recorder {
    fn faults(&self) -> Vec<String> {
        self.inner.faults()
    }

    fn misfits(&self, spec: &ModelSpec) -> Vec<String> {
        self.inner.misfits(spec)
    }

    fn needs(&self, cx: &LayerCx) -> Needs {
        self.inner.needs(cx)
    }

    fn protect(&self, cx: &LayerCx) -> Protect {
        self.inner.protect(cx)
    }

    fn on_write(&self, cx: &LayerCx, new: &NewTokens) -> kvpolicy::Result<Verdict> {
        self.inner.on_write(cx, new)
    }

    fn budget(&self, cx: &LayerCx, seen: usize) -> Budget {
        self.inner.budget(cx, seen)
    }

    fn when(&self, cx: &LayerCx) -> When {
        self.inner.when(cx)
    }

    fn score(&self, cx: &LayerCx, held: &dyn Held) -> kvpolicy::Result<Score> {
        let score = self.inner.score(cx, held)?;
        let scores = match &score {
            Score::Carried => held.scores()?,
            Score::Dense(scores) => scores.clone(),
        };
        let [scores, valid, positions] = [scores, held.valid()?, held.positions()?].map(|x| x.to_vec2::<f32>());
        let rows = scores?.into_iter().zip(valid?).zip(positions?).map(|((scores, valid), positions)| {
            let entries = positions.into_iter().zip(scores).zip(valid).filter(|(_, valid)| *valid == 1.0);
            entries.map(|((pos, score), _)| (pos as u32, score)).collect()
        });
        self.log.lock().unwrap().push(rows.collect());
        Ok(score)
    }

    fn same_for_all_heads(&self) -> bool {
        self.inner.same_for_all_heads()
    }
}

impl fmt::Display for Recorder {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        self.inner.fmt(f)
    }
}
