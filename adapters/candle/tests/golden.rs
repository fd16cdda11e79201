//! Vectors made with NVIDIA's reference implementation of DMS, see `golden/README.md`.
//!
//! `KVPOLICY_GOLDEN=DIR` runs every case of another folder in that format. A case is a tiny model with what the
//! reference computes for it: logits, decisions, and which tokens each KV head still holds after every step.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use candle_core::{DType, Tensor};
use kvpolicy::retrofit::Named;
use kvpolicy::*;
use kvpolicy_candle::{
    Gates, LoadOptions, Model,
    retrofit::{Batch, Divergence, Objective, Trainee, Trains},
};
use libtest_mimic::{Arguments, Failed, Trial};
use std::{
    collections::HashMap,
    fmt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

type Check = std::result::Result<String, Failed>;

fn main() {
    // Relative to the workspace, where the command is given, not to this crate, where tests run.
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let own = || PathBuf::from("adapters/candle/tests/golden");
    let dir = workspace.join(std::env::var_os("KVPOLICY_GOLDEN").map_or_else(own, PathBuf::from));
    let mut cases: Vec<PathBuf> = std::fs::read_dir(&dir)
        .unwrap_or_else(|e| panic!("{}: {e}", dir.display()))
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.join("config.json").is_file())
        .collect();
    cases.sort();
    assert!(!cases.is_empty(), "{} has no case", dir.display());
    let trials = cases.into_iter().map(|path| {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        Trial::test(name.clone(), move || {
            let line = Case::read(&path).check()?;
            println!("{name}: {line}");
            println!("{name}: {}", Training::read(&path).check()?);
            Ok(())
        })
    });
    libtest_mimic::run(&Arguments::from_args(), trials.collect()).exit();
}

struct Case {
    model: Model,
    gates: Gates,
    expected: HashMap<String, Tensor>,
    ids: Vec<Vec<u32>>, // [batch][columns], padding included
    pads: Vec<usize>,   // left padding of each row
    prompt: usize,      // columns
    policy: Arc<dyn Policy>,
}

/// One run of a case: a cache with a sequence per row, and what the policy decided.
struct Run<'a> {
    case: &'a Case,
    cache: KvCache,
    seqs: Vec<SeqId>,
    column: usize,
    seen: Arc<Mutex<Decisions>>,
}

/// Logits and bits of each layer, in order of the calls: [layer][tokens][head].
#[derive(Debug, Default)]
struct Decisions {
    logits: Vec<Vec<Vec<f32>>>,
    bits: Vec<Vec<Vec<u8>>>,
}

/// Forwards to the policy and writes down what it saw and said.
#[derive(Debug)]
struct Spy {
    inner: Arc<dyn Policy>,
    seen: Arc<Mutex<Decisions>>,
}

impl fmt::Display for Spy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.fmt(f)
    }
}

impl Policy for Spy {
    fn needs(&self, cx: &LayerCx) -> Needs {
        self.inner.needs(cx)
    }
    fn protect(&self, cx: &LayerCx) -> Protect {
        self.inner.protect(cx)
    }
    fn on_write(&self, cx: &LayerCx, new: &NewTokens) -> kvpolicy::Result<Verdict> {
        let verdict = self.inner.on_write(cx, new)?;
        let logits = new.evict_logits.as_ref().expect("gates").to_vec2()?;
        let bits = match &verdict.evict {
            Evict::Bits { bits, .. } => bits.to_vec2()?,
            _ => logits.iter().map(|row: &Vec<f32>| vec![0; row.len()]).collect(),
        };
        let mut seen = self.seen.lock().unwrap();
        seen.logits[cx.layer].extend(logits);
        seen.bits[cx.layer].extend(bits);
        Ok(verdict)
    }
}

impl Case {
    fn read(dir: &Path) -> Self {
        let (model, gates) = Model::from_dir(dir, &LoadOptions::default()).expect("a model");
        let expected = candle_core::safetensors::load(dir.join("expected.safetensors"), &candle_core::Device::Cpu);
        let expected = expected.expect("expected.safetensors");
        let case: serde_json::Value =
            serde_json::from_str(&std::fs::read_to_string(dir.join("case.json")).unwrap()).unwrap();
        let ids: Vec<Vec<u32>> = expected["input_ids"].to_dtype(DType::U32).unwrap().to_vec2().unwrap();
        let pads = match expected.get("attention_mask") {
            None => vec![0; ids.len()],
            Some(mask) => {
                let mask: Vec<Vec<i64>> = mask.to_dtype(DType::I64).unwrap().to_vec2().unwrap();
                mask.iter().map(|row| row.iter().take_while(|&&m| m == 0).count()).collect()
            }
        };
        let prompt = case["prompt_len"].as_u64().unwrap() as usize;
        let policy = Registry::standard().parse("dms").unwrap();
        Self { model, gates: gates.expect("gates"), expected, ids, pads, prompt, policy }
    }

    fn columns(&self) -> usize {
        self.ids[0].len()
    }

    fn run(&self, policy: &Arc<dyn Policy>) -> Run<'_> {
        let mut spec = self.model.config().spec();
        spec.gates = Some(self.gates.spec());
        let decisions = Decisions { logits: vec![vec![]; spec.layers], bits: vec![vec![]; spec.layers] };
        let seen = Arc::new(Mutex::new(decisions));
        let spy = Arc::new(Spy { inner: policy.clone(), seen: seen.clone() });
        // Small odd pages, so that rows cross many of them.
        let store = cpu(&spec, &CpuConfig { page_size: 3, ..CpuConfig::default() }).unwrap();
        let mut cache = KvCache::new(spec, spy, store).unwrap();
        let seqs = self.ids.iter().map(|_| cache.open()).collect();
        Run { case: self, cache, seqs, column: 0, seen }
    }

    fn check(&self) -> Check {
        let mut worst = self.check_full_prefill()?;
        worst = worst.max(self.check_prefill_and_decode()?);
        let chunkings = self.expected.keys().filter_map(|key| key.strip_prefix("chunked_")?.strip_suffix(".logits"));
        let chunkings: Vec<usize> = chunkings.map(|c| c.parse().unwrap()).collect();
        for &chunk in &chunkings {
            worst = worst.max(self.check_chunks(chunk)?);
        }
        if let Some(vanilla) = self.expected.get("vanilla_qwen3.logits") {
            worst = worst.max(self.check_vanilla(vanilla)?);
        }
        Ok(format!("worst logit error {worst:.1e}, {} chunkings", chunkings.len()))
    }

    fn check_full_prefill(&self) -> std::result::Result<f32, Failed> {
        let mut run = self.run(&self.policy);
        let logits = run.advance(self.columns(), Phase::Prefill { last: true });
        run.check_live_counts(&self.expected["prefill_full.live_counts"])?;
        run.check_decisions()?;
        let expected: Vec<Vec<Vec<f32>>> = self.expected["prefill_full.logits"].to_vec3().unwrap();
        compare(&logits, |row, column| &expected[row][column])
    }

    fn check_prefill_and_decode(&self) -> std::result::Result<f32, Failed> {
        let mut run = self.run(&self.policy);
        let logits = run.advance(self.prompt, Phase::Prefill { last: true });
        run.check_live_counts(&self.expected["prefill.live_counts"])?;
        let expected: Vec<Vec<Vec<f32>>> = self.expected["prefill.logits"].to_vec3().unwrap();
        let mut worst = compare(&logits, |row, column| &expected[row][column])?;
        let steps: Vec<Vec<Vec<f32>>> = self.expected["decode.logits"].to_vec3().unwrap();
        let ratios: Vec<f64> = self.expected["decode.cr"].to_dtype(DType::F64).unwrap().to_vec1().unwrap();
        for (step, expected) in steps.iter().enumerate() {
            let logits = run.advance(1, Phase::Decode);
            worst = worst.max(compare(&logits, |row, _| &expected[row])?);
            run.check_live_counts(&self.expected["decode.live_counts"].get(step).unwrap())?;
            run.check_live_mask(&self.expected["decode.live_mask"].get(step).unwrap())?;
            let ratio = run.compression();
            if (ratio - ratios[step]).abs() > 1e-6 * ratio {
                return Err(format!("step {step}: compression {ratio}, expected {}", ratios[step]).into());
            }
        }
        Ok(worst)
    }

    fn check_chunks(&self, chunk: usize) -> std::result::Result<f32, Failed> {
        let mut run = self.run(&self.policy);
        let mut logits = vec![];
        while run.column < self.columns() {
            let columns = chunk.min(self.columns() - run.column);
            let last = run.column + columns == self.columns();
            logits.extend(run.advance(columns, Phase::Prefill { last }));
        }
        run.check_live_counts(&self.expected[&format!("chunked_{chunk}.live_counts")])?;
        let expected: Vec<Vec<Vec<f32>>> = self.expected[&format!("chunked_{chunk}.logits")].to_vec3().unwrap();
        compare(&logits, |row, column| &expected[row][column])
    }

    /// Where the reference without DMS was recorded: with an adapter it is what nothing evicted must give; with a
    /// borrowed neuron it is not, because the neuron stays zero.
    fn check_vanilla(&self, vanilla: &Tensor) -> std::result::Result<f32, Failed> {
        let mut run = self.run(&self.policy);
        let logits = run.advance(self.columns(), Phase::Prefill { last: true });
        let expected: Vec<Vec<Vec<f32>>> = vanilla.to_vec3().unwrap();
        let result = compare(&logits, |row, column| &expected[row][column]);
        let adapter = self.expected["prefill_full.logits"].to_vec3::<f32>().unwrap() == expected;
        match (result, adapter) {
            (result, true) => result,
            (Ok(_), false) => Err("a borrowed neuron was not set to zero".into()),
            (Err(_), false) => Ok(0.0),
        }
    }
}

/// The training part of a case: a batch with its noise, and the reference's losses and gradients.
struct Training {
    model: Model,
    spec: Option<GateSpec>,
    config: serde_json::Value,
    case: serde_json::Value,
    tensors: HashMap<String, Tensor>,
    params: Named,
}

impl Training {
    fn read(dir: &Path) -> Self {
        let json = |name: &str| serde_json::from_str(&std::fs::read_to_string(dir.join(name)).unwrap()).unwrap();
        let load = |name: &str| candle_core::safetensors::load(dir.join(name), &candle_core::Device::Cpu).unwrap();
        let (model, gates) = Model::from_dir(dir, &LoadOptions::default()).unwrap();
        let params =
            load("model.safetensors").into_iter().filter(|(name, _)| name.contains("dms_proj_alpha")).collect();
        let spec = gates.map(|gates| gates.spec());
        Self {
            model,
            spec,
            config: json("config.json"),
            case: json("case.json"),
            tensors: load("expected.safetensors"),
            params,
        }
    }

    fn check(&self) -> Check {
        let Some(noise) = self.tensors.get("train.noise") else { return Ok("no training".into()) };
        let number = |name: &str| self.config[name].as_f64().unwrap();
        let trainee = Trainee::new(
            &self.model,
            self.spec.unwrap(),
            number("dms_alpha_scale"),
            number("dms_initial_alpha_offset"),
        );
        let (trainee, params) = self.learning(trainee);
        let objective = Objective {
            tau: number("dms_tau"),
            evicted: self.case["train"]["target_frac"].as_f64().unwrap(),
            compression: 1.0,
            divergence: Divergence::Student,
            activations: 0,
        };
        // [layers, sequences, heads, length] to tokens in front of heads.
        let of_layer = |layer: usize| {
            let own = noise.get(layer)?.transpose(1, 2)?.contiguous()?;
            Ok(own.flatten(0, 1)?)
        };
        let (gradients, losses) = trainee.gradients(&params, &self.batch(), &objective, of_layer).unwrap();
        let gradients = self.named(gradients);
        let mut worst = 0f32;
        for (name, got) in [("distil_loss", &losses.divergence), ("dms_loss", &losses.compression)] {
            let expected = self.tensors[&format!("train.{name}")].flatten_all().unwrap().to_vec1::<f32>().unwrap()[0];
            let got = got.to_scalar::<f32>().unwrap();
            if (got - expected).abs() > 1e-4 {
                return Err(format!("{name} is {got}, expected {expected}").into());
            }
        }
        let mut checked = 0;
        for (name, got) in &gradients {
            let Some(expected) = self.tensors.get(&format!("train.grad.{name}")) else { continue };
            checked += 1;
            let largest =
                |x: &Tensor| x.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
            let error = largest(&(got - expected).unwrap()) / largest(expected);
            if error.is_nan() || error > 1e-3 {
                return Err(format!("the gradient of {name} is off by {error} of its largest number").into());
            }
            worst = worst.max(error);
        }
        let recorded = self.tensors.keys().filter(|name| name.starts_with("train.grad.")).count();
        if checked != recorded {
            return Err(format!("{checked} of {recorded} gradients were compared").into());
        }
        Ok(format!("training within {worst:.1e} of the largest gradients"))
    }

    /// Adapters alone learn; borrowed neurons are part of weights that do.
    fn learning<'a>(&self, trainee: Trainee<'a>) -> (Trainee<'a>, Named) {
        if self.config["dms_separate_alpha"] == true {
            return (trainee, self.params.clone());
        }
        (trainee.training(Trains::Full).borrowing().unwrap(), self.model.clone().parameters().unwrap())
    }

    /// Gradients by the reference's names.
    fn named(&self, mut gradients: Named) -> Named {
        let rows = self.model.config().q_heads * self.model.config().head_dim;
        for layer in 0..self.model.config().layers {
            let of = |part: &str| format!("model.layers.{layer}.self_attn.{part}.weight");
            if let Some(qkv) = gradients.remove(&format!("layers.{layer}.qkv")) {
                gradients.insert(of("q_proj"), qkv.narrow(0, 0, rows).unwrap());
            }
            if let Some(norm) = gradients.remove(&format!("layers.{layer}.q_norm")) {
                gradients.insert(of("q_norm"), norm);
            }
        }
        gradients
    }

    /// What is not padding and no end of a text counts, all alike.
    fn batch(&self) -> Batch {
        let ids: Vec<Vec<u32>> = self.tensors["train.input_ids"].to_dtype(DType::U32).unwrap().to_vec2().unwrap();
        let mask = self.tensors["train.attention_mask"].to_dtype(DType::F32).unwrap();
        let mask: Vec<f32> = mask.flatten_all().unwrap().to_vec1().unwrap();
        let end = self.case["train"]["eos_token_id"].as_u64().unwrap() as u32;
        let (sequences, length) = (ids.len(), ids[0].len());
        let tokens = ids.concat();
        let counts: Vec<f32> = tokens.iter().zip(mask).map(|(&id, mask)| if id == end { 0.0 } else { mask }).collect();
        let sum: f32 = counts.iter().sum();
        let weights: Vec<f32> = counts.iter().map(|count| count / sum).collect();
        let device = &candle_core::Device::Cpu;
        let (tokens, weights) = (Tensor::new(tokens, device).unwrap(), Tensor::new(weights, device).unwrap());
        Batch { tokens, weights, sequences, length }
    }
}

/// Logits of one token: (row, column, [vocab]).
type TokenLogits = (usize, usize, Vec<f32>);

fn compare<'a>(
    got: &[TokenLogits],
    expected: impl Fn(usize, usize) -> &'a Vec<f32>,
) -> std::result::Result<f32, Failed> {
    let mut worst = 0f32;
    for (row, column, logits) in got {
        let error = logits.iter().zip(expected(*row, *column)).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
        if error.is_nan() || error > 2e-4 {
            return Err(format!("row {row}, column {column}: logits are off by {error}").into());
        }
        worst = worst.max(error);
    }
    Ok(worst)
}

impl Run<'_> {
    /// Feeds the next columns. Padding is not fed: rows of different length share the step.
    fn advance(&mut self, columns: usize, phase: Phase) -> Vec<TokenLogits> {
        let end = self.column + columns;
        let rows = self.seqs.iter().zip(&self.case.pads).enumerate();
        let rows: Vec<(usize, SeqId, usize)> =
            rows.map(|(row, (&seq, &pad))| (row, seq, self.column.max(pad))).filter(|r| r.2 < end).collect();
        let work: Vec<_> = rows.iter().map(|&(_, seq, from)| (seq, end - from, phase)).collect();
        let tokens: Vec<u32> = rows.iter().flat_map(|&(row, _, from)| self.case.ids[row][from..end].to_vec()).collect();
        let step = self.cache.begin(&work).unwrap();
        let hidden = self.case.model.hidden(&tokens, &step, &mut self.cache, Some(&self.case.gates)).unwrap();
        let logits: Vec<Vec<f32>> = self.case.model.logits(&hidden).unwrap().to_vec2().unwrap();
        assert!(self.cache.end(step).is_empty());
        self.column = end;
        let places = rows.into_iter().flat_map(|(row, _, from)| (from..end).map(move |column| (row, column)));
        places.zip(logits).map(|((row, column), logits)| (row, column, logits)).collect()
    }

    fn heads(&self) -> impl Iterator<Item = (usize, usize, usize)> {
        let (layers, heads, rows) = (self.cache.spec().layers, self.cache.spec().kv_heads, self.seqs.len());
        (0..layers).flat_map(move |l| (0..rows).flat_map(move |b| (0..heads).map(move |h| (l, b, h))))
    }

    /// Columns a KV head holds.
    fn held(&self, (layer, row, head): (usize, usize, usize)) -> Vec<usize> {
        let positions = self.cache.held_positions(layer, self.seqs[row], head);
        positions.into_iter().map(|pos| pos as usize + self.case.pads[row]).collect()
    }

    fn check_live_counts(&self, expected: &Tensor) -> std::result::Result<(), Failed> {
        let expected: Vec<Vec<Vec<i64>>> = expected.to_dtype(DType::I64).unwrap().to_vec3().unwrap();
        for at @ (l, b, h) in self.heads() {
            let live = self.held(at).len() as i64;
            if live != expected[l][b][h] {
                return Err(format!("layer {l} row {b} head {h} holds {live}, expected {}", expected[l][b][h]).into());
            }
        }
        Ok(())
    }

    fn check_live_mask(&self, expected: &Tensor) -> std::result::Result<(), Failed> {
        for at @ (l, b, h) in self.heads() {
            let mask: Vec<u8> = expected.get(l).unwrap().get(b).unwrap().get(h).unwrap().to_vec1().unwrap();
            let live: Vec<usize> = (0..mask.len()).filter(|&i| mask[i] != 0).collect();
            if self.held(at) != live {
                return Err(format!("layer {l} row {b} head {h} holds {:?}, expected {live:?}", self.held(at)).into());
            }
        }
        Ok(())
    }

    /// After one prefill of everything: decision logits, bits, and what they evict.
    fn check_decisions(&self) -> std::result::Result<(), Failed> {
        let seen = self.seen.lock().unwrap();
        let tensor = |name: &str| &self.case.expected[name];
        let columns = self.case.columns();
        let per_layer = self.case.gates.spec().per == PerGate::Layer;
        for (l, b, h) in self.heads() {
            let row = |name: &str| tensor(name).get(l).unwrap().get(b).unwrap().get(h).unwrap();
            let logits: Vec<f32> = row("decision_logits").to_vec1().unwrap();
            let bits: Vec<u8> = row("decisions").to_vec1().unwrap();
            let evicted: Vec<u8> = row("evicted").to_vec1().unwrap();
            let pad = self.case.pads[b];
            let first: usize = (0..b).map(|row| columns - self.case.pads[row]).sum();
            let bit = |column: usize| seen.bits[l][first + column - pad][h];
            for column in pad..columns {
                let z = seen.logits[l][first + column - pad][if per_layer { 0 } else { h }];
                if (z - logits[column]).abs() > 1e-3 * (1.0 + z.abs()) || bit(column) != bits[column] {
                    let want = (logits[column], bits[column]);
                    return Err(format!("layer {l} row {b} head {h} column {column}: {z}, expected {want:?}").into());
                }
                let evicts = column + 1 < columns && bit(column + 1) != 0;
                if evicts != (evicted[column] != 0) {
                    return Err(format!("layer {l} row {b} head {h}: eviction of column {column} differs").into());
                }
            }
        }
        Ok(())
    }

    /// The reference's figure: the inverse of the mean share held, padding counted as seen.
    fn compression(&self) -> f64 {
        let shares: Vec<f64> = self.heads().map(|at| self.held(at).len() as f64 / self.column as f64).collect();
        shares.len() as f64 / shares.iter().sum::<f64>()
    }
}
