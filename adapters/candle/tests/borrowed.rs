//! Neurons trained to decide, exported and loaded again.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

#[path = "common/repeats.rs"]
mod repeats;
#[path = "common/tiny.rs"]
mod tiny;

use candle_core::{DType, Device, Tensor, quantized::GgmlDType};
use kvpolicy::retrofit::{AdamWConfig, Named, Rate, Schedule};
use kvpolicy::{CpuConfig, KvCache, PerGate, Phase, Registry, cpu};
use kvpolicy_candle::{
    Export, Lm, LoadOptions, Model, demo,
    retrofit::{
        Divergence, Judged, Observer, RunConfig, Source, StepRecord, Trainee, Trains, run, save_gates, save_weights,
    },
};
use repeats::Repeats;
use serde_json::{Map, json};
use std::path::Path;
use tiny::Tiny;

const LENGTH: usize = 48;

const REPEATS: Repeats = Repeats { vocab: 256 };

struct Quiet;

impl Observer for Quiet {
    fn step(&mut self, _: &StepRecord) -> kvpolicy_candle::Result<()> {
        Ok(())
    }
}

fn settings(per: PerGate) -> RunConfig {
    RunConfig {
        schedule: Schedule { context: LENGTH, window: 4, target: 2.5, anneal: 10 },
        rate: Rate { peak: 0.03, warmup: 2, steps: 30 },
        per,
        scale: 1.0,
        offset: 0.5,
        tau: 0.5,
        compression: 4.0,
        divergence: Divergence::Student,
        sequences: 4,
        at_a_time: 4,
        weights_rate: 0.5,
        activations: 0,
        save_every: 100,
        seed: 1,
        optimizer: AdamWConfig::default(),
    }
}

/// As files have them.
fn rounded(params: &Named) -> Named {
    let round = |t: &Tensor| t.to_dtype(DType::BF16).unwrap().to_dtype(DType::F32).unwrap();
    params.iter().map(|(name, t)| (name.clone(), round(t))).collect()
}

/// Entries that each KV head holds after a prefill, and the negative log-likelihood of the text.
fn inference(dir: &Path, tokens: &[u32]) -> (Vec<Vec<usize>>, f64) {
    let (model, gates) = Model::from_dir(dir, &LoadOptions::default()).unwrap();
    let gates = gates.unwrap();
    let mut spec = model.config().spec();
    spec.gates = Some(gates.spec());
    let (layers, heads) = (spec.layers, spec.kv_heads);
    let store = cpu(&spec, &CpuConfig { page_size: 3, ..CpuConfig::default() }).unwrap();
    let mut cache = KvCache::new(spec, Registry::standard().parse("dms").unwrap(), store).unwrap();
    let seq = cache.open();
    let step = cache.begin(&[(seq, tokens.len(), Phase::Prefill { last: true })]).unwrap();
    let hidden = model.hidden(tokens, &step, &mut cache, Some(&gates)).unwrap();
    let logits: Vec<Vec<f32>> = model.logits(&hidden).unwrap().to_vec2().unwrap();
    assert!(cache.end(step).is_empty());
    let nll = |i: usize| {
        let sum: f64 = logits[i].iter().map(|&x| (x as f64).exp()).sum();
        sum.ln() - logits[i][tokens[i + 1] as usize] as f64
    };
    let last = tokens.len() - 1;
    let held = |l: usize| (0..heads).map(|h| cache.held_positions(l, seq, h).len()).collect();
    ((0..layers).map(held).collect(), (0..last).map(nll).sum::<f64>() / last as f64)
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum File {
    Folder,
    /// The rows of q and k that RoPE turns together are side by side, for llama.
    Gguf,
}

fn model(arch: &'static str, kv_heads: usize, file: File, dir: &Path) -> Lm {
    let tiny = Tiny::new(arch, kv_heads, 16, arch != "qwen2", json!({"no_rope_layer_interval": 2})).in_bf16();
    let path = dir.join(if file == File::Gguf { "m.gguf" } else { "model" });
    match file {
        File::Gguf => tiny.write_gguf(&path, GgmlDType::F32),
        File::Folder => {
            std::fs::create_dir(&path).unwrap();
            tiny.write_dir(&path);
            std::fs::write(path.join("tokenizer.json"), demo::TOKENIZER).unwrap();
        }
    }
    Lm::load(path.to_str().unwrap(), &LoadOptions { dequantize: true, ..LoadOptions::default() }).unwrap()
}

/// A training, its export, and what the exported model holds and says.
fn round_trip(arch: &'static str, kv_heads: usize, file: File, per: PerGate, trains: Trains) {
    let place = tempfile::tempdir().unwrap();
    let path = |name: &str| place.path().join(name);
    let lm = model(arch, kv_heads, file, place.path());
    let config = settings(per);
    let trainee = Trainee::new(lm.model(), config.gates(), config.scale, config.offset);
    let trainee = trainee.training(trains).borrowing().unwrap();
    let params = run(&trainee, &REPEATS, &config, &path("run"), false, &mut Quiet).unwrap();
    let lora = matches!(trains, Trains::Lora { .. });
    let params = if lora { params } else { rounded(&params) };
    save_gates(&path("gates"), &trainee, &params, Map::new()).unwrap();
    save_weights(&path("gates"), &trainee, &params).unwrap();
    Export { gates: Some(path("gates")), layout: None, out: path("out") }.run(&lm).unwrap();
    for number in 1000..1004 {
        let batch = REPEATS.batch(number..number + 1, LENGTH, &Device::Cpu).unwrap();
        let tokens: Vec<u32> = batch.tokens.to_vec1().unwrap();
        let found = trainee.evaluate(&[batch], Judged::Gates(&params)).unwrap();
        let (held, nll) = inference(&path("out"), &tokens);
        let share = |held: &usize| *held as f64 / LENGTH as f64;
        let live: Vec<Vec<f64>> = held.iter().map(|heads| heads.iter().map(share).collect()).collect();
        let off =
            live.iter().flatten().zip(found.live.iter().flatten()).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        let what = format!("{arch}, {kv_heads} KV heads, {file:?}, {per:?}, {trains:?}");
        // What a LoRA adds is rounded with the weight it is added to, so a decision near 0 may turn.
        let (entries, nats) = if lora { (2.5, 0.1) } else { (1e-6, 1e-3) };
        assert!(off * (LENGTH as f64) < entries, "{what}: {live:?} instead of {:?}", found.live);
        assert!((nll - found.nll).abs() < nats, "{what}: {nll} instead of {}", found.nll);
        assert!(found.compression > 1.2 && found.compression < 9.0, "{what}: {}", found.compression);
    }
}

#[test]
fn decisions_are_those_of_the_training() {
    for (arch, kv_heads, file, per, trains) in [
        ("llama", 2, File::Folder, PerGate::Head, Trains::Gates),
        ("llama", 2, File::Gguf, PerGate::Head, Trains::Gates),
        ("qwen2", 2, File::Folder, PerGate::Head, Trains::Gates),
        ("qwen3", 2, File::Folder, PerGate::Head, Trains::Gates),
        ("qwen3", 4, File::Folder, PerGate::Head, Trains::Gates),
        ("llama", 1, File::Folder, PerGate::Head, Trains::Gates),
        ("phi3", 2, File::Folder, PerGate::Head, Trains::Gates),
        ("smollm3", 2, File::Folder, PerGate::Head, Trains::Gates),
        ("qwen2", 2, File::Folder, PerGate::Layer, Trains::Full),
        ("qwen3", 2, File::Folder, PerGate::Head, Trains::Full),
        ("llama", 2, File::Gguf, PerGate::Head, Trains::Lora { rank: 4 }),
    ] {
        round_trip(arch, kv_heads, file, per, trains);
    }
}
