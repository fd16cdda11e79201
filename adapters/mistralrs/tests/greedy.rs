//! The same model, prompt and policy give the same greedy tokens under mistral.rs and under the candle adapter.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use candle_core::quantized::GgmlDType;
use common::{
    by_candle, by_host, endless, generate, gguf_loader, greedy, load, loader, max_difference, policy, prompt, start,
    write,
};
use kvpolicy_mistralrs::{CacheOptions, register, unregister};
use mistralrs::{RequestBuilder, TextMessageRole, TextModelBuilder};
use mistralrs_core::{Loader, ModelDType, NormalLoaderType};
use serde_json::json;
use std::path::Path;

const TOKENS: usize = 24;
const POLICIES: [&str; 3] = ["full", "window:size=8,sinks=2", "tova:budget=12"];

/// One test: whom a model is loaded under is a matter of the process.
#[tokio::test(flavor = "multi_thread")]
async fn runtimes_agree() {
    for (arch, loads_as) in
        [("llama", NormalLoaderType::Llama), ("qwen2", NormalLoaderType::Qwen2), ("qwen3", NormalLoaderType::Qwen3)]
    {
        let (dir, tiny) = (tempfile::tempdir().unwrap(), endless(arch, json!({})));
        write(&tiny, dir.path());
        agree(&format!("{arch} folder"), dir.path(), &*loader(dir.path(), loads_as, false), 1e-5).await;
        let file = dir.path().join("model.gguf");
        tiny.write_gguf(&file, GgmlDType::Q8_0);
        agree(&format!("{arch} file"), &file, &*gguf_loader(&file), 0.0).await;
    }
    the_facade_runs_it().await;
}

/// The `mistralrs` crate as it is published, on the patched core.
async fn the_facade_runs_it() {
    let dir = tempfile::tempdir().unwrap();
    write(&endless("llama", json!({"architectures": ["LlamaForCausalLM"]})), dir.path());
    let path = dir.path().display().to_string();
    let mut answers = vec![];
    for text in ["full", "window:size=8"] {
        let hosting = register(policy(text), &CacheOptions::default());
        let model = TextModelBuilder::new(&path).with_force_cpu().with_dtype(ModelDType::F32).build().await.unwrap();
        let request = RequestBuilder::new().set_deterministic_sampler().set_sampler_max_len(20);
        let answer = model.send_chat_request(request.add_message(TextMessageRole::User, "hello there")).await.unwrap();
        assert_eq!(answer.usage.completion_tokens, 20);
        assert_eq!(hosting.figures()[0].usage.evicted > 0, text != "full");
        answers.push(answer.choices[0].message.content.clone().unwrap());
    }
    assert_ne!(answers[0], answers[1], "the policy must matter");
}

/// `apart`: how far logits may be from the candle adapter's, and under `full` from those of the host's own cache.
async fn agree(name: &str, model: &Path, loader: &dyn Loader, apart: f32) {
    let dense = own_cache(loader).await;
    for text in POLICIES {
        let (here, dropped) = by_host(loader, policy(text), &prompt(40), TOKENS).await;
        let (there, dropped_there) = by_candle(model, policy(text), &prompt(40), TOKENS);
        assert_eq!(here.len(), TOKENS, "{name} {text}");
        assert_eq!(greedy(&here), greedy(&there), "{name} {text}");
        assert!(max_difference(&here, &there) <= apart, "{name} {text}: {}", max_difference(&here, &there));
        assert_eq!(dropped, dropped_there, "{name} {text}");
        let from_dense = max_difference(&here, &dense);
        if text == "full" {
            assert!(from_dense <= apart, "{name}: {from_dense}");
            assert_eq!(dropped, 0);
        } else {
            assert!(dropped > 0 && from_dense > 1e-2, "{name} {text}: the policy must matter");
        }
    }
}

async fn own_cache(loader: &dyn Loader) -> Vec<Vec<f32>> {
    unregister();
    let host = start(load(loader).unwrap()).await;
    generate(&host, &prompt(40), TOKENS).await.unwrap()
}
