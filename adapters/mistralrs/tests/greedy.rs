//! The same model, prompt and policy give the same greedy tokens under mistral.rs and under the candle adapter.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::{
    by_candle, by_host, endless, generate, greedy, load, loader, max_difference, policy, prompt, start, write,
};
use kvpolicy_mistralrs::unregister;
use mistralrs_core::NormalLoaderType;
use serde_json::json;

const TOKENS: usize = 24;
const POLICIES: [&str; 3] = ["full", "window:size=8,sinks=2", "tova:budget=12"];

/// One test: whom a model is loaded under is a matter of the process.
#[tokio::test(flavor = "multi_thread")]
async fn runtimes_agree() {
    for (arch, loads_as) in
        [("llama", NormalLoaderType::Llama), ("qwen2", NormalLoaderType::Qwen2), ("qwen3", NormalLoaderType::Qwen3)]
    {
        let dir = tempfile::tempdir().unwrap();
        write(&endless(arch, json!({})), dir.path());
        let dense = own_cache(dir.path(), loads_as.clone()).await;
        for text in POLICIES {
            let (here, evicted_here) =
                by_host(&*loader(dir.path(), loads_as.clone(), false), policy(text), &prompt(40), TOKENS).await;
            let (there, evicted_there) = by_candle(dir.path(), policy(text), &prompt(40), TOKENS);
            assert_eq!(greedy(&here), greedy(&there), "{arch} {text}");
            assert_eq!(here.len(), TOKENS, "{arch} {text}");
            assert!(max_difference(&here, &there) < 1e-3, "{arch} {text}: {}", max_difference(&here, &there));
            assert_eq!(evicted_here, evicted_there, "{arch} {text}");
            if text == "full" {
                assert!(max_difference(&here, &dense) < 1e-4, "{arch}: {}", max_difference(&here, &dense));
                assert_eq!(evicted_here, 0);
            } else {
                assert!(evicted_here > 0, "{arch} {text}");
                assert!(max_difference(&here, &dense) > 1e-2, "{arch} {text}: the policy must matter");
            }
        }
    }
}

async fn own_cache(dir: &std::path::Path, arch: NormalLoaderType) -> Vec<Vec<f32>> {
    unregister();
    let host = start(load(&*loader(dir, arch, false)).unwrap()).await;
    generate(&host, &prompt(40), TOKENS).await.unwrap()
}
