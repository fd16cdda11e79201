//! Real models say the same in both runtimes, with the gates that the candle adapter brings for them as well. In release, or a
//! token takes seconds: `KVPOLICY_MODELS=DIR cargo test --release --test models`.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use candle_core::Device;
use common::policy;
use futures_util::StreamExt;
use kvpolicy::{Stats, runtime::Runtime};
use kvpolicy_candle::{CandleRuntime, Hosted, Lm, LoadOptions};
use kvpolicy_mistralrs::{CacheOptions, MistralRuntime};
use std::path::{Path, PathBuf};

const FILES: [&str; 2] = ["SmolLM2-135M-Instruct.Q4_1.gguf", "qwen2.5-coder-0.5b-instruct.gguf"];
const POLICIES: [&str; 5] =
    ["full", "window:size=128,sinks=4", "tova:budget=128", "dms", "snapkv:budget=128,window=16"];

/// One test: whom a model is loaded under is a matter of the process.
#[tokio::test(flavor = "multi_thread")]
async fn runtimes_agree() {
    for file in FILES {
        match std::env::var_os("KVPOLICY_MODELS").map(|dir| PathBuf::from(dir).join(file)) {
            Some(path) if path.is_file() => agree(&path).await,
            _ => println!("skipped: KVPOLICY_MODELS names no folder with {file}"),
        }
    }
}

async fn agree(model: &Path) {
    let lm = Lm::load(&model.display().to_string(), &LoadOptions::default()).unwrap();
    let candle = CandleRuntime::new(Hosted { lm, options: Default::default() });
    let mistral = MistralRuntime::start(model, &Device::Cpu, &CacheOptions::default()).await.unwrap();
    let prompt = prompt_of(&candle);
    assert_eq!(prompt_of(&mistral), prompt);
    assert!((256..512).contains(&prompt.len()), "{}: candle reads 512 tokens of a prompt at a time", prompt.len());
    let mut texts = vec![];
    for text in POLICIES {
        let there = generated(&candle, text, &prompt).await;
        let here = generated(&mistral, text, &prompt).await;
        assert_eq!(here, there, "{} {text}", model.display());
        assert_eq!(here.1.evicted > 0, text != "full", "{text}");
        texts.push(here.0);
    }
    assert!(texts[1..].iter().any(|text| *text != texts[0]), "policies must matter");
}

fn prompt_of(runtime: &dyn Runtime) -> Vec<u32> {
    runtime.encode(&runtime.chat(&story()).unwrap()).unwrap()
}

/// Many little facts, and a question about them.
fn story() -> String {
    let town =
        |i: usize| format!("In town {i} the market is on day {}, and the bridge is {} steps long.", i % 7, 90 + 13 * i);
    let towns: Vec<String> = (1..15).map(town).collect();
    format!(
        "{} How long is the bridge of town 3, and when is the market there? Tell it as a short story.",
        towns.join(" ")
    )
}

async fn generated(runtime: &dyn Runtime, text: &str, prompt: &[u32]) -> (Vec<u32>, Stats) {
    runtime.load(&policy(text)).await.unwrap();
    let tokens: Vec<u32> = runtime.generate(prompt, 48).await.unwrap().map(Result::unwrap).collect().await;
    (tokens, runtime.stats().await)
}
