//! What is said of a checkpoint is what is in it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/tiny.rs"]
mod tiny;

use candle_core::{DType, Tensor, quantized::GgmlDType};
use kvpolicy_candle::{Inspection, TensorSummary};
use serde_json::json;
use std::path::Path;
use tiny::{FFN, HEADS, HIDDEN, LAYERS, Tiny, VOCAB};

const HEAD_DIM: usize = HIDDEN / HEADS;

fn inspect(path: &Path) -> Inspection {
    Inspection::of(path.to_str().unwrap()).unwrap()
}

fn refused(path: &Path, words: &[&str]) {
    let error = Inspection::of(path.to_str().unwrap()).unwrap_err().to_string();
    words.iter().for_each(|word| assert!(error.contains(word), "`{error}` does not say `{word}`"));
}

/// Of the rows of a matrix.
fn norms(tensor: &Tensor) -> Vec<f64> {
    let rows: Vec<Vec<f64>> = tensor.to_dtype(DType::F64).unwrap().to_vec2().unwrap();
    rows.iter().map(|row| row.iter().map(|x| x * x).sum::<f64>().sqrt()).collect()
}

fn near(a: &[f64], b: &[f64]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-9)
}

#[test]
fn a_dense_model_has_its_shape_and_no_gates() {
    let dir = tempfile::tempdir().unwrap();
    let tiny = Tiny::new("qwen2", 2, HEAD_DIM, false, json!({}));
    tiny.write_dir(dir.path());
    let found = inspect(dir.path());
    let model = found.model.as_ref().unwrap();
    assert_eq!((model.architecture.as_str(), model.layers, model.kv_heads), ("Qwen2ForCausalLM", LAYERS, 2));
    assert_eq!((model.hidden, model.ffn, model.vocab, model.tied), (HIDDEN, FFN, VOCAB, false));
    assert_eq!(model.kv_bytes(2), (LAYERS * 2 * 2 * HEAD_DIM * 2) as u64);
    assert_eq!((found.tensors.len(), &found.gates, &found.refused), (tiny.tensors.len(), &None, &None));
    let elements: usize = tiny.tensors.values().map(|tensor| tensor.elem_count()).sum();
    assert_eq!(found.parameters(), [("F32", elements as u64)].into());
    let expected = TensorSummary { dtype: "F32".into(), shape: vec![FFN, HIDDEN] };
    assert_eq!(found.tensors["model.layers.1.mlp.up_proj.weight"], expected);
    let bytes = std::fs::metadata(dir.path().join("model.safetensors")).unwrap().len();
    assert_eq!(found.files, [("model.safetensors".to_string(), bytes)]);
}

#[test]
fn windows_of_layers_are_told() {
    let dir = tempfile::tempdir().unwrap();
    for (window, told) in [(json!(8), Some((LAYERS, 8))), (json!(null), None)] {
        Tiny::new("mistral", 2, HEAD_DIM, false, json!({ "sliding_window": window })).write_dir(dir.path());
        assert_eq!(inspect(dir.path()).model.unwrap().windows, told);
    }
}

#[test]
fn a_gguf_file_has_the_types_of_its_blocks() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    Tiny::new("llama", 2, HEAD_DIM, true, json!({})).write_gguf(&path, GgmlDType::Q8_0);
    let found = inspect(&path);
    assert_eq!(found.model.as_ref().unwrap().architecture, "LlamaForCausalLM");
    assert_eq!(found.tensors["blk.0.attn_q.weight"].dtype, "Q8_0");
    assert_eq!(found.parameters().keys().copied().collect::<Vec<_>>(), ["F32", "Q8_0"]);
}

#[test]
fn an_adapter_is_known_by_itself_and_in_a_model() {
    let dir = tempfile::tempdir().unwrap();
    let gates = dir.path().join("gates");
    let tiny = Tiny::new("qwen3", 2, HEAD_DIM, true, json!({}));
    tiny.write_gates(&gates);
    let tensors = candle_core::safetensors::load(gates.join("gates.safetensors"), &candle_core::Device::Cpu).unwrap();
    for path in [gates.clone(), gates.join("gates.safetensors")] {
        let found = inspect(&path);
        assert!(found.model.is_none() && found.refused.is_none());
        let gates = found.gates.unwrap();
        assert_eq!((gates.layout.as_str(), gates.source.as_str()), ("nvidia", "adapter"));
        assert_eq!((gates.window, gates.lag.as_str(), gates.per.as_str()), (8, "previous", "head"));
        assert_eq!((gates.scale, gates.offset, gates.disabled), (50.0, 1.0, false));
        assert_eq!(gates.policy, format!("dms:weights={}", path.display()));
        assert_eq!(gates.layers.len(), LAYERS);
        for layer in &gates.layers {
            let name = format!("model.layers.{}.self_attn.dms_proj_alpha", layer.layer);
            assert!(near(&layer.norms, &norms(&tensors[&format!("{name}.weight")])), "{layer:?}");
            assert!(layer.biases.is_none() && (layer.input_norm.unwrap() - 1.0).abs() < 0.05);
        }
    }
    // The same gates as those of a checkpoint.
    let mut with = Tiny::new("qwen3", 2, HEAD_DIM, true, json!({"dms_window_size": 8, "dms_separate_alpha": true}));
    with.tensors.extend(tensors);
    with.write_dir(dir.path());
    let found = inspect(dir.path());
    assert_eq!(found.model.unwrap().architecture, "Qwen3ForCausalLM");
    assert_eq!(found.gates.map(|gates| (gates.policy, gates.layers.len())), Some(("dms".into(), LAYERS)));
}

#[test]
fn borrowed_neurons_are_rows_of_the_queries() {
    let nvidia = json!({"dms_window_size": 8, "dms_alpha_per": "layer", "dms_disable_eviction": true});
    let shisa = Some(json!({"window_size": 8}));
    for (arch, part, extra, metadata, layout, lag) in [
        ("qwen2", "q_proj", nvidia, None, "nvidia", "previous"),
        ("qwen2", "q_proj", json!({}), shisa.clone(), "shisa", "own"),
        ("phi3", "qkv_proj", json!({}), shisa, "shisa", "own"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let tiny = Tiny::new(arch, 2, HEAD_DIM, true, extra);
        tiny.write_dir(dir.path());
        if let Some(metadata) = &metadata {
            std::fs::write(dir.path().join("dms_metadata.json"), metadata.to_string()).unwrap();
        }
        let gates = inspect(dir.path()).gates.unwrap();
        assert_eq!(
            (gates.layout.as_str(), gates.source.as_str(), gates.lag.as_str()),
            (layout, "borrowed neuron", lag)
        );
        assert_eq!((gates.policy.as_str(), gates.disabled), ("dms", metadata.is_none()));
        assert_eq!(gates.per, if metadata.is_none() { "layer" } else { "head" });
        for layer in &gates.layers {
            let name = format!("model.layers.{}.self_attn.{part}", layer.layer);
            let all = norms(&tiny.tensors[&format!("{name}.weight")]);
            // The last component of query heads 0 and 2.
            assert!(near(&layer.norms, &[all[HEAD_DIM - 1], all[3 * HEAD_DIM - 1]]), "{layer:?}");
            let biases = tiny.tensors.get(&format!("{name}.bias")).map(|bias| bias.to_vec1::<f32>().unwrap());
            let expected = biases.map(|bias| vec![bias[HEAD_DIM - 1] as f64, bias[3 * HEAD_DIM - 1] as f64]);
            assert_eq!((&layer.biases, expected.is_some()), (&expected, arch == "qwen2"));
        }
    }
}

#[test]
fn a_model_of_another_family_is_inspected_and_named() {
    let dir = tempfile::tempdir().unwrap();
    Tiny::new("llama", 2, HEAD_DIM, true, json!({"model_type": "mamba"})).write_dir(dir.path());
    let found = inspect(dir.path());
    assert!(found.refused.unwrap().contains("mamba") && found.model.is_none() && !found.tensors.is_empty());
}

#[test]
fn damaged_files_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    Tiny::new("llama", 2, HEAD_DIM, true, json!({})).write_dir(dir.path());
    let whole = std::fs::read(&path).unwrap();
    for length in [0, 7, 8, 100, whole.len() - 1] {
        std::fs::write(&path, &whole[..length]).unwrap();
        refused(&path, &["model.safetensors", "damaged"]);
    }
    std::fs::write(&path, [&u64::MAX.to_le_bytes()[..], b"{}"].concat()).unwrap();
    refused(&path, &["header is longer than the file"]);
    std::fs::write(&path, [&2u64.to_le_bytes()[..], b"[]"].concat()).unwrap();
    refused(&path, &["damaged"]);
    refused(&dir.path().join("nothing"), &["no such file"]);
    std::fs::write(dir.path().join("m.gguf"), "no model").unwrap();
    refused(&dir.path().join("m.gguf"), &["m.gguf"]);
}
