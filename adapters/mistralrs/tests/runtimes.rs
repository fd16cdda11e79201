//! One model in two runtimes, through one trait: the same text, the same figures, the same comparison.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod common;

use candle_core::{Device, quantized::GgmlDType};
use common::{endless, policy, prompt, write};
use futures_util::StreamExt;
use kvpolicy::{
    Registry, Stats,
    compare::{self, Contender, Contest, Generating, Plan, Progress, Sample, Subject, Task},
    runtime::Runtime,
};
use kvpolicy_candle::{CandleRuntime, Hosted, Lm, LoadOptions};
use kvpolicy_mistralrs::{CacheOptions, MistralRuntime};
use serde_json::json;
use std::path::Path;

const POLICIES: [&str; 3] = ["full", "window:size=24,sinks=4", "tova:budget=32"];
/// With those all that a policy may be called; `dms` needs gates, and tests/gates.rs has it.
const OTHERS: [&str; 12] = [
    "h2o:budget=32",
    "snapkv:budget=32,window=8",
    "knorm:budget=32",
    "keydiff:budget=32",
    "expected-attention:budget=32",
    "rkv:budget=32",
    "random:budget=32",
    "random-gate:rate=0.5,window=8",
    "adakv(snapkv:budget=32,window=8)",
    "pyramid(snapkv:budget=32,window=8)",
    "per-layer(0=full; rest=tova:budget=24)",
    "every(4, tova:budget=32)",
];

/// One test: whom a model is loaded under is a matter of the process.
#[tokio::test(flavor = "multi_thread")]
async fn runtimes_agree() {
    let dir = tempfile::tempdir().unwrap();
    let tiny = endless("llama", json!({"max_position_embeddings": 1024}));
    write(&tiny, dir.path());
    let file = dir.path().join("model.gguf");
    tiny.write_gguf(&file, GgmlDType::Q8_0);
    for model in [dir.path(), &file] {
        let (candle, mistral) = (in_candle(model), in_mistral(model).await);
        the_same_text(&candle, &mistral).await;
        under_any_policy(&candle, &mistral).await;
        prompts_that_fail_are_told(&mistral).await;
        tokio::task::spawn_blocking(|| {
            the_same_comparison(Generating(candle), Generating(mistral));
        })
        .await
        .unwrap();
    }
}

fn in_candle(model: &Path) -> CandleRuntime {
    let lm = Lm::load(&model.display().to_string(), &LoadOptions::default()).unwrap();
    CandleRuntime::new(Hosted { lm, options: Default::default() })
}

async fn in_mistral(model: &Path) -> MistralRuntime {
    MistralRuntime::start(model, &Device::Cpu, &CacheOptions::default()).await.unwrap()
}

/// The first `taken` of `most` tokens, and what the cache held for them.
async fn generated(runtime: &dyn Runtime, length: u32, most: usize, taken: usize) -> (Vec<u32>, Stats) {
    let tokens = runtime.generate(&prompt(length), most).await.unwrap();
    let tokens: Vec<u32> = tokens.take(taken).map(Result::unwrap).collect().await;
    (tokens, runtime.stats().await)
}

async fn the_same_text(candle: &dyn Runtime, mistral: &dyn Runtime) {
    for text in POLICIES {
        for runtime in [candle, mistral] {
            runtime.load(&policy(text)).await.unwrap();
        }
        // To the end, and from a generation that is dropped on the way.
        for (length, most, taken) in [(40, 20, 30), (70, 400, 25), (40, 20, 30)] {
            let there = generated(candle, length, most, taken).await;
            let here = generated(mistral, length, most, taken).await;
            assert_eq!(here.0.len(), most.min(taken), "{text}");
            assert_eq!(here, there, "{text}");
            assert_eq!(here.1.evicted > 0, text != "full", "{text}");
        }
    }
    let unknown = mistral.load(&policy("dms")).await.unwrap_err().to_string();
    assert!(unknown.contains("the model has no decision gates"), "{unknown}");
    let last = POLICIES[POLICIES.len() - 1];
    assert_eq!(generated(mistral, 70, 20, 20).await, generated(candle, 70, 20, 20).await, "still {last}");
    let spoken = [candle, mistral].map(|runtime| runtime.encode(&runtime.chat("hello").unwrap()).unwrap());
    assert_eq!(spoken[0], spoken[1]);
}

async fn under_any_policy(candle: &dyn Runtime, mistral: &dyn Runtime) {
    let named = |name: &str| POLICIES.iter().chain(&OTHERS).any(|text| text.split([':', '(']).next() == Some(name));
    for entry in Registry::standard().entries() {
        assert!(entry.info.name == "dms" || named(entry.info.name), "{} is missing", entry.info.name);
    }
    for text in OTHERS {
        for runtime in [candle, mistral] {
            runtime.load(&policy(text)).await.unwrap();
        }
        let here = generated(mistral, 70, 20, 20).await;
        assert_eq!(here, generated(candle, 70, 20, 20).await, "{text}");
        assert!(here.1.evicted > 0, "{text}");
    }
}

async fn prompts_that_fail_are_told(mistral: &dyn Runtime) {
    mistral.load(&policy("full")).await.unwrap();
    let mut tokens = mistral.generate(&prompt(1100), 4).await.unwrap(); // of a model with 1024 positions
    assert!(tokens.next().await.unwrap().is_err());
    assert!(tokens.next().await.is_none());
    drop(tokens);
    assert_eq!(generated(mistral, 20, 4, 4).await.0.len(), 4);
}

#[derive(Default)]
struct Notes(Vec<Sample>);

impl Progress for Notes {
    fn start(&mut self, _: u64) {}

    fn unit(&mut self, _: &str) {}

    /// Without the figures of the cache, which are of steps: candle reads a prompt in several. Short ones are compared above.
    fn sample(&mut self, sample: &Sample) -> kvpolicy::Result<()> {
        self.0.push(Sample { kv: None, ..sample.clone() });
        Ok(())
    }
}

fn plan(tasks: &str) -> Plan {
    let contenders = POLICIES.map(|text| Contender { label: text.into(), policy: policy(text) });
    let groups = compare::task_groups(&Task::parse_list(tasks).unwrap());
    let contest = |tasks| Contest { context: 1000, tasks, contenders: contenders.to_vec() };
    let contests = groups.into_iter().map(contest).collect();
    Plan { contests, samples: 2, seed: 5, text: None, exams: vec![], sampling: Default::default() }
}

fn samples(subject: &dyn Subject) -> Vec<Sample> {
    let mut notes = Notes::default();
    let rows = compare::run(subject, &plan("word-key-aware,variable-tracking-aware"), vec![], &mut notes).unwrap();
    assert_eq!(rows.len(), 2 * POLICIES.len());
    notes.0
}

fn the_same_comparison(candle: Generating<CandleRuntime>, mistral: Generating<MistralRuntime>) {
    let (there, here) = (samples(&candle), samples(&mistral));
    let text = |samples: &[Sample]| serde_json::to_string_pretty(samples).unwrap();
    assert_eq!(text(&here), text(&there));
    assert!(here.iter().any(|sample| sample.answer != here[0].answer), "policies must matter");
    for task in ["ppl", "kl", "word-key", "recall", "speed"] {
        let why = compare::check_subject(&mistral, &plan(task)).unwrap_err().to_string();
        assert!(why.contains(&format!("the task {task} cannot run here: the runtime gives no logits")), "{why}");
    }
}
