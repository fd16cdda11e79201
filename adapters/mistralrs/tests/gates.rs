//! DMS decides the same under mistral.rs and under the candle adapter, wherever its gates come from.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use candle_core::{Device, quantized::GgmlDType};
use common::{
    by_candle, by_host, endless, generate, gguf_loader, greedy, load, load_on, loader, max_difference, policy, prompt,
    start, tiny::Tiny, write,
};
use kvpolicy_mistralrs::{CacheOptions, register};
use mistralrs_core::{ModelDType, NormalLoaderType};
use serde_json::{Value, json};
use std::path::Path;

const TOKENS: usize = 24;
const MODELS: [(&str, NormalLoaderType); 3] =
    [("llama", NormalLoaderType::Llama), ("qwen2", NormalLoaderType::Qwen2), ("qwen3", NormalLoaderType::Qwen3)];

/// One test: whom a model is loaded under is a matter of the process.
#[tokio::test(flavor = "multi_thread")]
async fn runtimes_agree() {
    for (arch, loads_as) in MODELS {
        let dir = tempfile::tempdir().unwrap();
        from_a_file(endless(arch, json!({})), dir.path(), loads_as.clone()).await;
        let dir = tempfile::tempdir().unwrap();
        of_the_model(arch, dir.path(), loads_as.clone()).await;
        let dir = tempfile::tempdir().unwrap();
        a_borrowed_neuron(arch, dir.path(), loads_as).await;
    }
}

async fn from_a_file(tiny: Tiny, dir: &Path, arch: NormalLoaderType) {
    write(&tiny, dir);
    tiny.write_gates(&dir.join("gates"));
    let text = format!("dms:weights={}", dir.join("gates/gates.safetensors").display());
    assert!(agree(dir, arch.clone(), &text).await > 0);
    of_any_type(&tiny, dir, &text).await;

    register(policy("dms:weights=nowhere.safetensors"), &CacheOptions::default());
    let why = load(&*loader(dir, arch, false)).map(|_| ()).unwrap_err().to_string();
    assert!(why.contains("nowhere.safetensors"), "{why}");
}

/// A quantized model's activations are f32, whatever type the host is asked for.
async fn of_any_type(tiny: &Tiny, dir: &Path, text: &str) {
    let file = dir.join("model.gguf");
    tiny.write_gguf(&file, GgmlDType::Q8_0);
    for dtype in [ModelDType::F32, ModelDType::BF16, ModelDType::F16] {
        let hosting = register(policy(text), &CacheOptions::default());
        let host = start(load_on(&*gguf_loader(&file), &Device::Cpu, dtype).unwrap()).await;
        assert_eq!(generate(&host, &prompt(40), TOKENS).await.unwrap().len(), TOKENS, "{dtype:?}");
        assert!(hosting.figures()[0].stats.evicted > 0, "{dtype:?}");
    }
}

/// The fields and tensors that a training writes, in the model's own files.
async fn of_the_model(arch: &'static str, dir: &Path, loads_as: NormalLoaderType) {
    let gates = dir.join("gates");
    endless(arch, json!({})).write_gates(&gates);
    let fields: Value = serde_json::from_slice(&std::fs::read(gates.join("config.json")).unwrap()).unwrap();
    let mut tiny = endless(arch, fields);
    let tensors = candle_core::safetensors::load(gates.join("gates.safetensors"), &Device::Cpu).unwrap();
    tiny.tensors.extend(tensors);
    write(&tiny, dir);
    assert!(agree(dir, loads_as.clone(), "dms").await > 0);
    assert_eq!(agree(dir, loads_as, "full").await, 0);
}

async fn a_borrowed_neuron(arch: &'static str, dir: &Path, loads_as: NormalLoaderType) {
    let fields = json!({"dms_window_size": 8, "dms_separate_alpha": false, "dms_alpha_scale": 5.0,
        "dms_initial_alpha_offset": 0.5});
    let tiny = endless(arch, fields);
    write(&tiny, dir);
    assert!(agree(dir, loads_as.clone(), "dms").await > 0);
    assert_eq!(agree(dir, loads_as.clone(), "full").await, 0); // the neuron is no part of attention here either

    tiny.write_gates(&dir.join("gates"));
    let text = format!("dms:weights={}", dir.join("gates/gates.safetensors").display());
    register(policy(&text), &CacheOptions::default());
    let why = load(&*loader(dir, loads_as, false)).map(|_| ()).unwrap_err().to_string();
    assert!(why.contains("it takes no other gates"), "{why}");
}

/// Entries that both dropped.
async fn agree(dir: &Path, arch: NormalLoaderType, text: &str) -> u64 {
    let name = arch.to_string();
    let (here, dropped) = by_host(&*loader(dir, arch, false), policy(text), &prompt(40), TOKENS).await;
    let (there, dropped_there) = by_candle(dir, policy(text), &prompt(40), TOKENS);
    assert_eq!(greedy(&here), greedy(&there), "{name} {text}");
    assert!(max_difference(&here, &there) < 1e-3, "{name} {text}: {}", max_difference(&here, &there));
    assert_eq!(dropped, dropped_there, "{name} {text}");
    dropped
}
