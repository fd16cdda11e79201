//! Training on tiny models: gradients against differences of the loss, and training that was interrupted.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

#[path = "common/repeats.rs"]
mod repeats;

use candle_core::{DType, Device, Tensor};
use kvpolicy::{
    GateSpec, Lag, PerGate,
    retrofit::{AdamWConfig, Named, Rate, Schedule},
};
use kvpolicy_candle::{
    Config, Lm, LoadOptions, Message, Model,
    retrofit::{
        Batch, Corpus, Divergence, Judged, Mixture, Objective, Observer, RunConfig, Source, StepRecord, Trainee,
        Trains, next_token_gradients, run, save_weights,
    },
};
use rand::{Rng, SeedableRng, rngs::StdRng};
use repeats::Repeats;
use serde_json::json;
use std::path::Path;

const REPEATS: Repeats = Repeats { vocab: 40 };

fn config(family: &str) -> Config {
    Config::from_json(
        &json!({
            "model_type": family, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 40, "rms_norm_eps": 1e-6,
            "rope_theta": 1000.0, "max_position_embeddings": 512, "tie_word_embeddings": family == "llama",
            "no_rope_layer_interval": 2,
        })
        .to_string(),
    )
    .unwrap()
}

/// Random weights large enough for attention to tell tokens apart.
fn model(family: &str) -> Model {
    let mut model = Model::random(config(family), DType::F32, &Device::Cpu, 3).unwrap();
    let mut rng = StdRng::seed_from_u64(5);
    let larger = |(name, tensor): (String, Tensor)| {
        let noise = random(&mut rng, tensor.dims(), 0.15);
        (name, (tensor * 8.0).unwrap().add(&noise).unwrap())
    };
    let parameters = model.parameters().unwrap();
    let (norms, others): (Named, Named) = parameters.into_iter().partition(|(name, _)| name.contains("norm"));
    let others = others.into_iter().map(larger).collect();
    model.set_parameters(&others).unwrap();
    let mut rng = StdRng::seed_from_u64(6);
    let norms = norms.into_iter().map(|(name, t)| (name, t.add(&random(&mut rng, t.dims(), 0.3)).unwrap())).collect();
    model.set_parameters(&norms).unwrap();
    model
}

fn random(rng: &mut StdRng, dims: &[usize], scale: f32) -> Tensor {
    let numbers: Vec<f32> = (0..dims.iter().product()).map(|_| (rng.random::<f32>() - 0.5) * 2.0 * scale).collect();
    Tensor::from_vec(numbers, dims, &Device::Cpu).unwrap()
}

fn batch(sequences: usize, length: usize) -> Batch {
    let mut rng = StdRng::seed_from_u64(11);
    let tokens: Vec<u32> = (0..sequences * length).map(|_| rng.random_range(0..40)).collect();
    let weights: Vec<f32> = (0..sequences * length).map(|i| if i % 7 == 3 { 0.0 } else { 0.02 }).collect();
    let tensor = |dims: &[f32]| Tensor::new(dims, &Device::Cpu).unwrap();
    Batch {
        tokens: Tensor::new(tokens.as_slice(), &Device::Cpu).unwrap(),
        weights: tensor(&weights),
        sequences,
        length,
    }
}

fn moved(params: &Named, direction: &Named, by: f64) -> Named {
    params.iter().map(|(name, p)| (name.clone(), (p + (&direction[name] * by).unwrap()).unwrap())).collect()
}

/// Along random directions, one for each tensor: the slope of the loss is the gradient's.
fn check(params: &Named, gradients: &Named, loss: impl Fn(&Named) -> f64, step: f64) {
    let mut rng = StdRng::seed_from_u64(17);
    for (name, param) in params {
        let mut direction: Named = params.iter().map(|(n, p)| (n.clone(), p.zeros_like().unwrap())).collect();
        direction.insert(name.clone(), random(&mut rng, param.dims(), 1.0));
        let slope = (loss(&moved(params, &direction, step)) - loss(&moved(params, &direction, -step))) / (2.0 * step);
        let product =
            (&gradients[name] * &direction[name]).unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap() as f64;
        // A loss of about 4 has 4e-7 of rounding in f32.
        let noise = 1e-6 / step;
        let (size, error) = (slope.abs().max(product.abs()), (slope - product).abs());
        assert!(error < 0.03 * size + noise, "{name}: the loss rises by {slope}, the gradient says {product}");
    }
}

#[test]
fn gate_gradients_are_the_slopes_of_the_loss() {
    let (adapter, borrowed, lora) = (false, true, |rank| Trains::Lora { rank });
    for (family, lag, per, divergence, trains, borrows) in [
        ("llama", Lag::Previous, PerGate::Head, Divergence::Student, Trains::Gates, adapter),
        ("qwen2", Lag::Own, PerGate::Head, Divergence::Teacher, Trains::Full, adapter),
        ("qwen3", Lag::Previous, PerGate::Layer, Divergence::Student, Trains::Full, adapter),
        ("llama", Lag::Previous, PerGate::Head, Divergence::Teacher, lora(3), adapter),
        ("qwen2", Lag::Previous, PerGate::Head, Divergence::Student, lora(2), adapter),
        ("llama", Lag::Previous, PerGate::Head, Divergence::Teacher, Trains::Gates, borrowed),
        ("qwen2", Lag::Previous, PerGate::Head, Divergence::Student, Trains::Gates, borrowed),
        ("qwen3", Lag::Previous, PerGate::Head, Divergence::Teacher, Trains::Gates, borrowed),
        ("qwen2", Lag::Previous, PerGate::Layer, Divergence::Teacher, Trains::Full, borrowed),
        ("qwen3", Lag::Previous, PerGate::Head, Divergence::Student, Trains::Full, borrowed),
        ("llama", Lag::Previous, PerGate::Head, Divergence::Student, lora(3), borrowed),
    ] {
        let model = model(family);
        let gates = GateSpec { window: 3, lag, per, disable: false };
        let trainee = Trainee::new(&model, gates, 1.0, 0.5).training(trains);
        let trainee = if borrows { trainee.borrowing().unwrap() } else { trainee };
        let batch = batch(2, 24);
        // Without the compression loss, whose gradient is straight-through and no slope of anything.
        let objective = Objective { tau: 1.0, evicted: 0.0, compression: 0.0, divergence, activations: 0 };
        let noise = |layer: usize| trainee.noise(&batch, 100 + layer as u64);
        let mut rng = StdRng::seed_from_u64(23);
        let fresh = trainee.fresh(31).unwrap();
        let params: Named = fresh
            .into_iter()
            .map(|(name, p)| {
                // Weights stay near what they are.
                let noise = random(
                    &mut rng,
                    p.dims(),
                    if name.starts_with("layers.") && !name.ends_with("neurons") { 0.05 } else { 0.4 },
                );
                (name, (p + noise).unwrap())
            })
            .collect();
        let (gradients, losses) = trainee.gradients(&params, &batch, &objective, noise).unwrap();
        assert!(losses.divergence.to_scalar::<f32>().unwrap() > 1e-3);
        // What is kept for the way back is what would be computed again; all of it, and some of it.
        for activations in [usize::MAX, 100_000] {
            let kept = Objective { activations, ..objective };
            let (kept, _) = trainee.gradients(&params, &batch, &kept, noise).unwrap();
            assert_eq!(numbers(&kept), numbers(&gradients));
        }
        let loss = |params: &Named| {
            let (_, losses) = trainee.gradients(params, &batch, &objective, noise).unwrap();
            losses.divergence.to_scalar::<f32>().unwrap() as f64
        };
        check(&params, &gradients, loss, 3e-3);
    }
}

#[test]
fn weight_gradients_are_the_slopes_of_the_loss() {
    for family in ["llama", "phi3", "qwen2", "qwen3", "smollm3"] {
        let mut model = model(family);
        let batch = batch(2, 13);
        let params = model.parameters().unwrap();
        let (gradients, loss) = next_token_gradients(&model, &batch).unwrap();
        assert!(loss.to_scalar::<f32>().unwrap() > 0.1);
        let cell = std::cell::RefCell::new(&mut model);
        let loss = |params: &Named| {
            let mut model = cell.borrow_mut();
            model.set_parameters(params).unwrap();
            next_token_gradients(&model, &batch).unwrap().1.to_scalar::<f32>().unwrap() as f64
        };
        check(&params, &gradients, loss, 2e-3);
    }
}

#[test]
fn a_model_with_windows_is_trained_within_them_or_refused() {
    let json = r#"{"model_type": "mistral", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
        "num_attention_heads": 4, "vocab_size": 40, "rms_norm_eps": 1e-6, "max_position_embeddings": 64,
        "sliding_window": 12}"#;
    let model = Model::random(Config::from_json(json).unwrap(), DType::F32, &Device::Cpu, 3).unwrap();
    assert!(next_token_gradients(&model, &batch(2, 12)).is_ok());
    let error = next_token_gradients(&model, &batch(2, 13)).unwrap_err().to_string();
    assert!(error.contains("Mistral") && error.contains("sliding window of 12"), "{error}");
}

#[test]
fn a_family_that_the_training_does_not_have_is_named() {
    let model = Model::random(config("gemma3_text"), DType::F32, &Device::Cpu, 3).unwrap();
    let error = next_token_gradients(&model, &batch(2, 12)).unwrap_err().to_string();
    assert!(error.contains("Gemma3 cannot be trained yet"), "{error}");
}

fn settings(steps: u64) -> RunConfig {
    RunConfig {
        schedule: Schedule { context: 32, window: 3, target: 2.5, anneal: 6 },
        rate: Rate { peak: 0.02, warmup: 2, steps },
        per: PerGate::Head,
        scale: 1.0,
        offset: 1.0,
        tau: 0.5,
        compression: 1.0,
        divergence: Divergence::Student,
        sequences: 4,
        at_a_time: 3,
        weights_rate: 0.1,
        activations: 0,
        save_every: 4,
        seed: 1,
        optimizer: AdamWConfig::default(),
    }
}

/// Writes steps down; after a number of them it fails, as a full disk would make it.
struct Log {
    records: Vec<StepRecord>,
    most: usize,
}

impl Observer for Log {
    fn step(&mut self, record: &StepRecord) -> kvpolicy_candle::Result<()> {
        if self.records.len() == self.most {
            return Err(kvpolicy_candle::Error::Model("the disk is full".into()));
        }
        self.records.push(record.clone());
        Ok(())
    }
}

fn numbers(params: &Named) -> Vec<Vec<f32>> {
    params.values().map(|p| p.flatten_all().unwrap().to_vec1().unwrap()).collect()
}

fn train(
    trains: Trains,
    model: &Model,
    config: &RunConfig,
    dir: &Path,
    resume: bool,
    most: usize,
) -> (Result<Named, String>, Vec<StepRecord>) {
    let trainee = Trainee::new(model, config.gates(), config.scale, config.offset).training(trains);
    let mut log = Log { records: vec![], most };
    let params = run(&trainee, &REPEATS, config, dir, resume, &mut log).map_err(|e| e.to_string());
    (params, log.records)
}

#[test]
fn training_goes_on_where_it_stopped() {
    let (model, config) = (model("llama"), settings(10));
    for trains in [Trains::Gates, Trains::Lora { rank: 2 }, Trains::Full] {
        let (through, broken) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (whole, records) = train(trains, &model, &config, through.path(), false, 100);
        assert_eq!(records.len(), 10);
        // It stops in step 7; the last checkpoint is of step 4.
        assert!(train(trains, &model, &config, broken.path(), false, 6).0.is_err());
        let (resumed, again) = train(trains, &model, &config, broken.path(), true, 100);
        assert_eq!(again.iter().map(|r| r.step).collect::<Vec<_>>(), [5, 6, 7, 8, 9, 10]);
        assert_eq!(numbers(&whole.unwrap()), numbers(&resumed.unwrap()));
        assert_eq!(records[9].divergence, again[5].divergence);
    }
}

#[test]
fn weights_learn_what_gates_forget() {
    let model = model("llama");
    let config = RunConfig { weights_rate: 0.1, ..settings(150) };
    let batches = [REPEATS.batch(1000..1008, 32, &Device::Cpu).unwrap()];
    let divergence = |trains: Trains| {
        let dir = tempfile::tempdir().unwrap();
        let trainee = Trainee::new(&model, config.gates(), config.scale, config.offset).training(trains);
        let params =
            run(&trainee, &REPEATS, &config, dir.path(), false, &mut Log { records: vec![], most: 1000 }).unwrap();
        let found = trainee.evaluate(&batches, Judged::Gates(&params)).unwrap();
        save_weights(dir.path(), &trainee, &params).unwrap();
        let mut files: Vec<String> =
            std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        files.sort();
        (found.kl / (found.compression - 1.0), files)
    };
    let (gates, files) = divergence(Trains::Gates);
    assert_eq!(files, ["checkpoint.safetensors"]);
    let (lora, files) = divergence(Trains::Lora { rank: 8 });
    assert_eq!(files, ["adapter_config.json", "adapter_model.safetensors", "checkpoint.safetensors"]);
    let (full, files) = divergence(Trains::Full);
    assert_eq!(files, ["checkpoint.safetensors", "weights.safetensors"]);
    assert!(lora < 0.85 * gates && full < 0.85 * gates, "{gates} gates, {lora} lora, {full} full");
}

#[test]
fn training_evicts_what_was_asked_for() {
    let (model, dir) = (model("llama"), tempfile::tempdir().unwrap());
    let config = settings(120);
    let (params, records) = train(Trains::Gates, &model, &config, dir.path(), false, 1000);
    let last = &records[records.len() - 20..];
    let reached = last.iter().map(|r| r.compression).sum::<f64>() / 20.0;
    assert!((reached - 2.5).abs() < 0.4, "compression {reached}");
    // Hard decisions without noise evict about as much, and differ from the dense model.
    let trainee = Trainee::new(&model, config.gates(), config.scale, config.offset);
    let batches = [REPEATS.batch(1000..1008, 32, &Device::Cpu).unwrap()];
    let found = trainee.evaluate(&batches, Judged::Gates(&params.unwrap())).unwrap();
    assert!(found.compression > 1.5 && found.kl > 0.0, "{found:?}");
    let dense = trainee.evaluate(&batches, Judged::Dense).unwrap();
    assert!(dense.kl.abs() < 1e-6 && (dense.nll - dense.dense_nll).abs() < 1e-6 && dense.compression == 1.0);
}

#[test]
fn what_cannot_be_trained_is_refused() {
    let (model, dir) = (model("llama"), tempfile::tempdir().unwrap());
    let refused = |config: &RunConfig, resume: bool, word: &str| {
        let error = train(Trains::Gates, &model, config, dir.path(), resume, 100).0.unwrap_err();
        assert!(error.contains(word), "{error} does not name {word}");
    };
    let good = settings(3);
    refused(&RunConfig { schedule: Schedule { target: 0.9, ..good.schedule }, ..good.clone() }, false, "target-cr=0.9");
    refused(&RunConfig { schedule: Schedule { window: 32, ..good.schedule }, ..good.clone() }, false, "window=32");
    refused(&RunConfig { sequences: 0, ..good.clone() }, false, "sequences=0");
    refused(&RunConfig { tau: 0.0, ..good.clone() }, false, "tau=0");
    refused(&RunConfig { scale: f64::NAN, ..good.clone() }, false, "scale=NaN");
    refused(&RunConfig { compression: -1.0, ..good.clone() }, false, "compression=-1");
    refused(&good, true, "checkpoint.safetensors");
    train(Trains::Gates, &model, &good, dir.path(), false, 100).0.unwrap();
    refused(&RunConfig { tau: 0.4, ..good.clone() }, true, "tau was 0.5 and is 0.4");
    // What is trained at a time decides about the noise.
    refused(&RunConfig { at_a_time: 4, ..good.clone() }, true, "at-a-time was 3 and is 4");
    // The checkpoint that lies there is of another training.
    let wild = RunConfig { rate: Rate { peak: f64::MAX, ..good.rate }, ..good.clone() };
    refused(&wild, false, "no finite number");
    refused(&wild, false, "none was saved yet");
    let path = dir.path().join("checkpoint.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    for damaged in [&bytes[..bytes.len() / 2], &bytes[..4], b"", b"not a checkpoint at all"] {
        std::fs::write(&path, damaged).unwrap();
        refused(&good, true, "damaged");
    }
}

#[test]
fn what_cannot_be_judged_is_refused() {
    let model = model("llama");
    let config = settings(1);
    let trainee = Trainee::new(&model, config.gates(), config.scale, config.offset);
    let error = trainee.evaluate(&[], Judged::Dense).unwrap_err().to_string();
    assert!(error.contains("nothing to judge"), "{error}");
    let batches = [REPEATS.batch(0..1, 32, &Device::Cpu).unwrap()];
    let error = trainee.evaluate(&batches, Judged::Gates(&Named::new())).unwrap_err().to_string();
    assert!(error.contains("dms_proj_alpha_norm.weight"), "{error}");
}

#[test]
fn portions_are_all_the_sequences() {
    let tokens = |batches: &[Batch]| -> Vec<u32> {
        batches.iter().flat_map(|batch| batch.tokens.to_vec1::<u32>().unwrap()).collect()
    };
    let whole = REPEATS.batch(5..12, 16, &Device::Cpu).unwrap();
    for at_a_time in [1, 3, 7, 100] {
        let portions = REPEATS.batches(5..12, at_a_time, 16, &Device::Cpu).unwrap();
        assert_eq!(portions.len(), 7usize.div_ceil(at_a_time));
        assert_eq!(tokens(&portions), tokens(std::slice::from_ref(&whole)));
    }
}

/// Text of which every sequence has its length, whatever it is made of.
#[test]
fn a_corpus_gives_sequences_of_every_kind() {
    let lm = Lm::embedded(&LoadOptions::default()).unwrap();
    let text = ["a boat waits near the mill. the owl sings.\n".repeat(200)];
    for (facts, length) in [(0.0, 300), (1.0, 300), (1.0, 1000), (1.0, 40)] {
        let mixture = Mixture { facts, conversations: 0.0, answers: 4.0 };
        let corpus = Corpus::new(&lm, &text, mixture, 3).unwrap();
        let again = Corpus::new(&lm, &text, mixture, 3).unwrap();
        for number in 0..40 {
            let sequence = corpus.sequence(number, length).unwrap();
            assert_eq!((sequence.tokens.len(), sequence.weights.len()), (length, length));
            assert_eq!(sequence, again.sequence(number, length).unwrap());
            let answers = sequence.weights.iter().filter(|&&weight| weight == 4.0).count();
            assert_eq!(answers > 0, facts > 0.0 && length > 100, "{number} of {length}");
        }
        assert_ne!(corpus.sequence(0, length).unwrap(), corpus.sequence(1, length).unwrap());
    }
    let error = Corpus::new(&lm, &text, Mixture::default(), 0).unwrap().check(1 << 20).unwrap_err().to_string();
    assert!(error.contains("too short"), "{error}");
    for mixture in [
        Mixture { facts: 1.5, ..Mixture::default() },
        Mixture { conversations: f64::NAN, ..Mixture::default() },
        Mixture { answers: 0.0, ..Mixture::default() },
    ] {
        assert!(Corpus::new(&lm, &text, mixture, 0).is_err(), "{mixture:?}");
    }
    let mut corpus = Corpus::new(&lm, &text, Mixture::default(), 0).unwrap();
    let error = corpus.add_conversations(&[vec![Message::new("user", "Hello")]]).unwrap_err().to_string();
    assert!(error.contains("template"), "{error}");
}
