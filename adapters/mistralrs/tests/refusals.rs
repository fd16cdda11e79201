//! What cannot run under a policy is refused when it is loaded, with the reason; what the host can go on without is off.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use candle_core::Device;
use common::{endless, generate, load, loader, policy, prompt, start, write};
use kvpolicy_mistralrs::{CacheOptions, Hosting, register, unregister};
use mistralrs_core::{
    AdapterPaths, AnyMoeLoader, DefaultSchedulerMethod, DeviceMapSetting, Loader, LocalModelPaths, MemoryGpuConfig,
    MistralRsBuilder, ModelDType, ModelPaths, NormalLoaderBuilder, NormalLoaderType, NormalSpecificConfig, Ordering,
    PagedAttentionConfig, PagedCacheType, SchedulerConfig, SpeculativeConfig, SpeculativePipeline, TokenSource,
};
use serde_json::{Value, json};
use std::{path::Path, sync::Arc};
use tempfile::TempDir;

const LLAMA: NormalLoaderType = NormalLoaderType::Llama;

fn model(arch: &'static str) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    write(&endless(arch, json!({})), dir.path());
    dir
}

fn change_config(dir: &Path, changes: Value) {
    let path = dir.join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    std::fs::write(path, config.to_string()).unwrap();
}

fn under(text: &str) -> Arc<Hosting> {
    register(policy(text), &CacheOptions::default())
}

fn refusal(loader: &dyn Loader) -> String {
    load(loader).map(|_| ()).unwrap_err().to_string()
}

/// One test: whom a model is loaded under is a matter of the process.
#[tokio::test(flavor = "multi_thread")]
async fn with_one_reason_each() {
    loaders().await;
    adapters_and_experts();
    paged_attention_is_off().await;
    speculative();
    prefixes_are_not_reused().await;
    a_full_pool_ends_its_batch_only().await;
}

async fn loaders() {
    let llama = model("llama");
    under("full");
    let why = refusal(&*loader(llama.path(), LLAMA, true));
    assert!(why.ends_with("cannot run under a KV policy: it is loaded without a KV cache"), "{why}");

    change_config(llama.path(), json!({"model_type": "mistral"}));
    let why = refusal(&*loader(llama.path(), LLAMA, false));
    assert!(why.ends_with("its architecture `mistral` is none of llama, qwen2, qwen3"), "{why}");
    change_config(llama.path(), json!({"model_type": "llama"}));

    under("dms");
    let why = refusal(&*loader(llama.path(), LLAMA, false));
    assert!(why.contains("policy `dms") && why.contains("the model has no decision gates"), "{why}");

    // Qwen3 with a window in some layers keeps another kind of cache there.
    let qwen = model("qwen3");
    change_config(qwen.path(), json!({"use_sliding_window": true, "sliding_window": 16, "max_window_layers": 0}));
    under("full");
    let why = refusal(&*loader(qwen.path(), NormalLoaderType::Qwen3, false));
    assert!(why.ends_with("some of its layers have a sliding window or share a cache"), "{why}");

    // Qwen2 hands its window to attention: short texts never notice.
    let qwen = model("qwen2");
    change_config(qwen.path(), json!({"sliding_window": 32}));
    let host = start(load(&*loader(qwen.path(), NormalLoaderType::Qwen2, false)).unwrap()).await;
    assert_eq!(generate(&host, &prompt(28), 5).await.unwrap().len(), 5);
    let why = generate(&host, &prompt(28), 8).await.unwrap_err();
    assert!(why.contains("it attends to 32 tokens only, which policies do not: 33 are too many"), "{why}");
}

fn adapters_and_experts() {
    let llama = model("llama");
    let (dir, path) = (llama.path().display().to_string(), |name: &str| llama.path().join(name));
    let builder = NormalLoaderBuilder::new(NormalSpecificConfig::default(), None, None, Some(dir), false, None);
    let order = Ordering { adapters: None, layers: None, base_model_id: "tiny".into(), preload_adapters: None };
    let xlora = builder.with_xlora("adapters".into(), order, false, None).build(Some(LLAMA)).unwrap();
    let weights = vec![path("model.safetensors")]; // the adapters' own would come from the hub
    let (tokenizer, config) = (path("tokenizer.json"), path("config.json"));
    let template = path("tokenizer_config.json");
    let paths: Box<dyn ModelPaths> = Box::new(LocalModelPaths::new(
        tokenizer,
        config,
        template,
        weights,
        AdapterPaths::None,
        None,
        None,
        None,
        None,
    ));
    under("full");
    let (dtype, mapper) = (ModelDType::F32, DeviceMapSetting::dummy());
    let loaded = xlora.load_model_from_path(&paths, &dtype, &Device::Cpu, true, mapper, None, None);
    let why = loaded.map(|_| ()).unwrap_err().to_string();
    assert!(why.ends_with("cannot run under a KV policy: X-LoRA is not supported"), "{why}");

    let config = json!({"hidden_size": 64, "expert_type": "fine_tuned"});
    let experts = AnyMoeLoader {
        target: loader(llama.path(), LLAMA, false),
        config: serde_json::from_value(config).unwrap(),
        path: "no inputs".into(),
        prefix: "model.layers".into(),
        mlp: "mlp".into(),
        model_ids: vec![],
        layers: vec![],
    };
    let why = refusal(&experts);
    assert!(why.ends_with("cannot run under a KV policy: AnyMoE runs it outside of steps"), "{why}");
}

/// A model under a policy comes without the blocks that were asked for, so that the host takes another scheduler.
async fn paged_attention_is_off() {
    let llama = model("llama");
    under("full");
    let blocks = PagedAttentionConfig::new(Some(32), MemoryGpuConfig::ContextSize(256), PagedCacheType::Auto).unwrap();
    let (dtype, mapper) = (ModelDType::F32, DeviceMapSetting::dummy());
    let loader = loader(llama.path(), LLAMA, false);
    let loaded =
        loader.load_model_from_hf(None, TokenSource::None, &dtype, &Device::Cpu, true, mapper, None, Some(blocks));
    let pipeline = loaded.unwrap();
    assert!(pipeline.lock().await.get_metadata().cache_config.is_none());
    let host = start(pipeline).await;
    assert_eq!(generate(&host, &prompt(20), 4).await.unwrap().len(), 4);
}

fn speculative() {
    let llama = model("llama");
    unregister();
    let fresh = || load(&*loader(llama.path(), LLAMA, false)).unwrap();
    let (plain, other) = (fresh(), fresh()); // the host locks both at once
    under("full");
    let hosted = fresh();
    let pair = |target, draft| SpeculativePipeline::new(target, draft, SpeculativeConfig { gamma: 2 }).map(|_| ());
    assert!(pair(plain.clone(), other).is_ok(), "the pair must be good but for the policy");
    for (target, draft) in [(hosted.clone(), plain.clone()), (plain, hosted)] {
        let why = pair(target, draft).unwrap_err().to_string();
        assert!(why.starts_with("speculative decoding rewinds, which a model under a KV policy cannot"), "{why}");
    }
}

/// The host would take a prompt that it has seen from its prefix cache, and write less.
async fn prefixes_are_not_reused() {
    let llama = model("llama");
    let hosting = under("full");
    let written = || hosting.figures()[0].stats.written;
    let pipeline = load(&*loader(llama.path(), LLAMA, false)).unwrap();
    let method = DefaultSchedulerMethod::Fixed(8.try_into().unwrap());
    let config = SchedulerConfig::DefaultScheduler { method };
    let host = MistralRsBuilder::new(pipeline, config, false, None).with_prefix_cache_n(16).build().await;
    let mut runs = vec![];
    for _ in 0..2 {
        let before = written();
        let logits = generate(&host, &prompt(40), 4).await.unwrap();
        runs.push((logits, written() - before));
    }
    assert_eq!(runs[0], runs[1]);
}

async fn a_full_pool_ends_its_batch_only() {
    let llama = model("llama");
    let options = CacheOptions { kv_bytes: Some(40_000), ..CacheOptions::default() };
    let hosting = register(policy("full"), &options);
    let host = start(load(&*loader(llama.path(), LLAMA, false)).unwrap()).await;
    let why = generate(&host, &prompt(200), 4).await.unwrap_err();
    assert!(why.contains("the KV pool of 40000 bytes is exhausted"), "{why}");
    assert_eq!(generate(&host, &prompt(20), 4).await.unwrap().len(), 4);
    let usage = hosting.figures()[0].usage;
    assert!(usage.bytes_peak <= 40_000, "{usage:?}");
}
