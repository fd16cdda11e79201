//! Models of random weights, and the ways to ask one for its next token.
#![allow(clippy::unwrap_used)]

use candle_core::{D, DType, Device, Tensor};
use kvpolicy::{CpuConfig, KvCache, Phase, Registry, Step, cpu};
use kvpolicy_candle::{Config, Model};

fn model(arch: &str, seed: u64) -> Model {
    let json = format!(
        r#"{{"model_type":"{arch}","hidden_size":64,"intermediate_size":96,"num_hidden_layers":2,
        "num_attention_heads":4,"num_key_value_heads":2,"head_dim":16,"vocab_size":300,"rms_norm_eps":1e-5,
        "max_position_embeddings":512}}"#
    );
    Model::random(Config::from_json(&json).unwrap(), DType::F32, &Device::Cpu, seed).unwrap()
}

/// Runs `f` on a fresh cache in a step of two sequences of these many tokens.
fn step<T>(model: &Model, lens: [usize; 2], f: impl FnOnce(&Step, &mut KvCache) -> T) -> T {
    let spec = model.config().spec();
    let policy = Registry::standard().parse("full").unwrap();
    let mut cache = KvCache::new(spec.clone(), policy, cpu(&spec, &CpuConfig::default()).unwrap()).unwrap();
    let work = lens.map(|len| (cache.open(), len, Phase::Prefill { last: true }));
    let step = cache.begin(&work).unwrap();
    f(&step, &mut cache)
}

fn logits(model: &Model, lens: [usize; 2]) -> Tensor {
    let tokens: Vec<u32> = (0..lens.iter().sum::<usize>() as u32).collect();
    step(model, lens, |step, cache| model.forward(&tokens, step, cache, None)).unwrap()
}

#[test]
fn a_seed_is_a_model() {
    for arch in ["llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3", "gemma3_text"] {
        let of = |seed| logits(&model(arch, seed), [5, 2]).to_vec2::<f32>().unwrap();
        assert_eq!(of(1), of(1));
        assert_ne!(of(1), of(2));
        assert!(of(1).iter().flatten().all(|logit| logit.is_finite() && logit.abs() < 10.0));
    }
}

#[test]
fn every_way_to_the_next_token_agrees() {
    let model = model("llama", 3);
    for lens in [[6, 1], [1, 1]] {
        let tokens = Tensor::arange(0u32, lens.iter().sum::<usize>() as u32, &Device::Cpu).unwrap();
        let expected = logits(&model, lens);
        let on = step(&model, lens, |step, cache| model.forward_on(&tokens, step, cache, None)).unwrap();
        assert_eq!(on.to_vec2::<f32>().unwrap(), expected.to_vec2::<f32>().unwrap());
        let next = step(&model, lens, |step, cache| model.greedy(&tokens, step, cache, None)).unwrap();
        let largest = expected.argmax(D::Minus1).unwrap();
        assert_eq!(next.to_vec1::<u32>().unwrap(), largest.to_vec1::<u32>().unwrap());
    }
}

#[test]
fn tokens_must_fit_the_step_and_the_vocabulary() {
    let model = model("llama", 3);
    let error = |tokens: &[u32]| {
        step(&model, [2, 1], |step, cache| model.forward(tokens, step, cache, None)).unwrap_err().to_string()
    };
    assert!(error(&[1, 2]).contains("shape [2] for a step of 3"), "{}", error(&[1, 2]));
    assert!(error(&[1, 300, 2]).contains("token 300"));
}
