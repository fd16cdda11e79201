//! Keys of a model with large biases, as Qwen's are, in 8 bits.
#![allow(clippy::unwrap_used)]

#[path = "common/tiny.rs"]
mod tiny;

use candle_core::{DType, Tensor};
use kvpolicy::{Policy, policies::Full};
use kvpolicy_candle::{LoadOptions, Model, Session, SessionOptions};
use serde_json::json;
use std::sync::Arc;
use tiny::{LAYERS, Tiny};

const HEAD_DIM: usize = 16;
/// Of the first KV head in every layer: with its partner, the pair that RoPE turns first.
const LARGE: usize = 3;

/// One component of the keys is some 60 in every key, and the query has next to nothing there.
fn model() -> Tiny {
    let mut model = Tiny::new("qwen2", 2, HEAD_DIM, true, json!({}));
    for layer in 0..LAYERS {
        let name = |part: &str| format!("model.layers.{layer}.self_attn.{part}");
        let bias = model.tensors.get_mut(&name("k_proj.bias")).unwrap();
        let mut numbers: Vec<f32> = bias.to_vec1().unwrap();
        numbers[LARGE] += 60.0;
        *bias = Tensor::new(numbers, bias.device()).unwrap();
        for part in ["q_proj.weight", "q_proj.bias"] {
            let tensor = model.tensors.get_mut(&name(part)).unwrap();
            let rows = tensor.dim(0).unwrap();
            let small = |row: usize| if row % HEAD_DIM % 8 == LARGE { 0.01f32 } else { 1.0 };
            let factors = Tensor::new((0..rows).map(small).collect::<Vec<_>>(), tensor.device()).unwrap();
            let factors = if tensor.rank() == 2 { factors.unsqueeze(1).unwrap() } else { factors };
            *tensor = tensor.broadcast_mul(&factors).unwrap();
        }
    }
    model
}

#[test]
fn the_range_of_keys_is_that_of_the_weights() {
    let dir = tempfile::tempdir().unwrap();
    model().write_dir(dir.path());
    let (model, _) = Model::from_dir(dir.path(), &LoadOptions::default()).unwrap();
    let factors = model.key_range().unwrap().factors();
    assert_eq!(factors.len(), LAYERS * 2 * HEAD_DIM);
    for layer in factors.chunks(2 * HEAD_DIM) {
        // Both components of a pair, since RoPE turns one into the other.
        assert!(layer[LARGE] >= 32.0 && layer[LARGE + HEAD_DIM / 2] == layer[LARGE], "{layer:?}");
        let others = (0..2 * HEAD_DIM).filter(|i| *i != LARGE && *i != LARGE + HEAD_DIM / 2);
        assert!(others.map(|i| layer[i]).all(|factor| (0.25..16.0).contains(&factor)), "{layer:?}");
    }
}

/// Layers with a window, or with a RoPE of their own, are ranged as well.
#[test]
fn layers_that_differ_have_their_range() {
    for (arch, extra) in [
        ("mistral", json!({"sliding_window": 8})),
        ("smollm3", json!({"no_rope_layer_interval": 2})),
        ("gemma3_text", json!({"sliding_window": 8, "sliding_window_pattern": 2})),
    ] {
        let dir = tempfile::tempdir().unwrap();
        Tiny::new(arch, 2, HEAD_DIM, false, extra).write_dir(dir.path());
        let (model, _) = Model::from_dir(dir.path(), &LoadOptions::default()).unwrap();
        let factors = model.key_range().unwrap().factors();
        assert_eq!(factors.len(), LAYERS * 2 * HEAD_DIM, "{arch}");
        for head in factors.chunks(HEAD_DIM) {
            assert_eq!(head[..HEAD_DIM / 2], head[HEAD_DIM / 2..], "{arch}");
        }
        let options = SessionOptions { kv_dtype: Some(DType::U8), ..SessionOptions::default() };
        let mut session = Session::new(&model, None, Arc::new(Full {}), &options).unwrap();
        session.prefill(&(0..40).collect::<Vec<_>>(), true).unwrap();
    }
}

#[test]
fn large_biases_cost_the_other_components_no_bits() {
    let dir = tempfile::tempdir().unwrap();
    model().write_dir(dir.path());
    let (model, _) = Model::from_dir(dir.path(), &LoadOptions::default()).unwrap();
    let text: Vec<u32> = (0..90).map(|i| (i * 37 % 250) as u32).collect();
    let logits = |kv_dtype| -> Vec<f32> {
        let policy: Arc<dyn Policy> = Arc::new(Full {});
        let options = SessionOptions { kv_dtype: Some(kv_dtype), ..SessionOptions::default() };
        Session::new(&model, None, policy, &options).unwrap().prefill(&text, true).unwrap().to_vec1().unwrap()
    };
    let (exact, coded) = (logits(DType::F32), logits(DType::U8));
    let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|x| x * x).sum::<f32>().sqrt();
    let error = norm(&mut exact.iter().zip(&coded).map(|(a, b)| a - b)) / norm(&mut exact.iter().copied());
    assert!(error < 0.02, "off by {error}");
}
