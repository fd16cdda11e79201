//! Sequences of every length in one batch: each gets what it would get alone, within the pool's memory, whatever becomes
//! of the others.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod common;

use candle_core::{Tensor, quantized::GgmlDType};
use common::{
    Answer, Asked, ask, ended, endless, generate, gguf_loader, greedy, load, loader, max_difference, policy, prompt,
    send, start, together, write,
};
use kvpolicy::{Evict, LayerCx, NewTokens, Policy, Protect, Verdict};
use kvpolicy_mistralrs::{CacheOptions, Figures, Hosting, register, unregister};
use mistralrs_core::{Loader, MistralRs, NormalLoaderType};
use serde_json::json;
use std::{
    path::Path,
    sync::{
        Arc, Mutex,
        mpsc::{Sender, channel},
    },
};
use tempfile::TempDir;

const LLAMA: NormalLoaderType = NormalLoaderType::Llama;
/// Bytes of a page of the tiny models: 16 entries of 16 components, keys and values in f32, and 9 bytes beside them.
const PAGE: u64 = 16 * (2 * 16 * 4 + 9);
/// KV heads of all layers.
const ROWS: u64 = 4;

/// One test: whom a model is loaded under is a matter of the process.
#[tokio::test(flavor = "multi_thread")]
async fn batches() {
    for (arch, loads_as) in [("llama", LLAMA), ("qwen2", NormalLoaderType::Qwen2), ("qwen3", NormalLoaderType::Qwen3)] {
        let (dir, tiny) = (tempfile::tempdir().unwrap(), endless(arch, json!({})));
        write(&tiny, dir.path());
        tiny.write_gates(&dir.path().join("gates"));
        each_as_alone(dir.path(), &*loader(dir.path(), loads_as, false), 1e-5).await;
        let file = dir.path().join("model.gguf");
        tiny.write_gguf(&file, GgmlDType::Q8_0);
        each_as_alone(dir.path(), &*gguf_loader(&file), 0.0).await;
    }
    let llama = tempfile::tempdir().unwrap();
    write(&endless("llama", json!({})), llama.path());
    more_than_the_pool_holds(&llama).await;
    no_more_than_may_run(&llama).await;
    compression_is_room(&llama).await;
    what_fits_nowhere_ends_alone(&llama).await;
    a_lost_prompt_starts_over(&llama).await;
    who_leaves_gives_room(&llama).await;
    who_leaves_at_the_last_moment_harms_nobody(&llama).await;
    who_leaves_before_an_error_harms_nobody(&llama).await;
    who_leaves_within_its_prompt_gives_room(&llama).await;
    a_sampling_error_leaves_nothing_behind(&llama).await;
    what_a_model_cannot_read_ends_alone().await;
}

/// Prompts of some lengths, two of them equal, and what each generates.
fn requests() -> Vec<(Vec<u32>, usize)> {
    [(40, 24), (17, 30), (40, 12), (70, 24), (5, 40)].map(|(length, tokens)| (prompt(length), tokens)).to_vec()
}

async fn host(loader: &dyn Loader, policy: Arc<dyn Policy>, pages: Option<u64>) -> (Arc<Hosting>, Arc<MistralRs>) {
    let options = CacheOptions { kv_bytes: pages.map(|pages| pages * PAGE), ..CacheOptions::default() };
    let hosting = register(policy, &options);
    let host = start(load(loader).unwrap()).await;
    ended(&hosting).await; // the host says hello to a new model
    (hosting, host)
}

async fn one_by_one(host: &MistralRs, requests: &[(Vec<u32>, usize)]) -> Vec<Answer> {
    let mut answers = vec![];
    for (prompt, tokens) in requests {
        answers.push(generate(host, prompt, *tokens).await);
    }
    answers
}

fn figures(hosting: &Hosting) -> Figures {
    hosting.figures().remove(0)
}

/// `apart`: how far logits may be from those of the same request alone.
fn same(name: &str, batch: &[Answer], alone: &[Answer], apart: f32) {
    for (i, (here, there)) in batch.iter().zip(alone).enumerate() {
        let (here, there) = (here.as_ref().unwrap(), there.as_ref().unwrap());
        assert_eq!(greedy(here), greedy(there), "{name}, request {i}");
        let difference = max_difference(here, there);
        assert!(difference <= apart, "{name}, request {i}: {difference}");
    }
}

async fn each_as_alone(dir: &Path, loader: &dyn Loader, apart: f32) {
    unregister();
    let dense = one_by_one(&*start(load(loader).unwrap()).await, &requests()).await;
    let gates = format!("dms:window=6,weights={}", dir.join("gates/gates.safetensors").display());
    for text in ["full", "window:size=8,sinks=2", "tova:budget=12", &gates] {
        let name = format!("{} {text}", loader.get_id());
        let (hosting, host) = host(loader, policy(text), None).await;
        let alone = if text == "full" { dense.clone() } else { one_by_one(&host, &requests()).await };
        let before = figures(&hosting).served;
        same(&name, &together(&host, &requests()).await, &alone, apart);
        ended(&hosting).await;
        let Figures { served, stats, .. } = figures(&hosting);
        let decoded = served.decoded_tokens - before.decoded_tokens;
        assert!(decoded > 2 * (served.decode_steps - before.decode_steps), "{name}: not in batches, {served:?}");
        assert_eq!((served.running, served.waits, served.set_aside), (0, 0, 0), "{name}");
        assert_eq!(stats.evicted > 0, text != "full", "{name}");
    }
}

/// What six requests need together does not fit, and what each of them will need is not known when it begins.
async fn more_than_the_pool_holds(dir: &TempDir) {
    let loader = loader(dir.path(), LLAMA, false);
    let requests: Vec<_> = [30, 20, 45, 30, 10, 64].map(|length| (prompt(length), 60)).to_vec();
    for text in ["full", "window:size=60"] {
        let (_, roomy) = host(&*loader, policy(text), None).await;
        let alone = one_by_one(&roomy, &requests).await;
        let pages = 20 * ROWS;
        let (hosting, host) = host(&*loader, policy(text), Some(pages)).await;
        same(text, &together(&host, &requests).await, &alone, 1e-5);
        ended(&hosting).await;
        let Figures { served, usage, .. } = figures(&hosting);
        assert!(served.waits > 0, "{text}: {served:?}");
        assert_eq!(served.set_aside > 0, text == "full", "{text}: {served:?}"); // a window is known before
        assert!(usage.bytes_peak <= pages * PAGE, "{text}: {usage:?}");
        assert_eq!((served.running, usage.pages_in_use), (0, 0), "{text}");
    }
}

async fn no_more_than_may_run(dir: &TempDir) {
    let loader = loader(dir.path(), LLAMA, false);
    let (_, roomy) = host(&*loader, policy("full"), None).await;
    let alone = one_by_one(&roomy, &requests()).await;
    let hosting = register(policy("full"), &CacheOptions { max_sequences: 2, ..CacheOptions::default() });
    let host = start(load(&*loader).unwrap()).await;
    same("two at a time", &together(&host, &requests()).await, &alone, 1e-5);
    let Figures { served, .. } = figures(&hosting);
    assert!(served.waits > 0 && served.decoded_tokens <= 2 * served.decode_steps, "{served:?}");
}

/// In the same pool, with the same requests, more sequences decode in a step if each holds less.
async fn compression_is_room(dir: &TempDir) {
    let loader = loader(dir.path(), LLAMA, false);
    let requests: Vec<_> = (0..8).map(|i| (prompt(100 + i), 60)).collect();
    let mut batch = vec![];
    for text in ["full", "window:size=28,sinks=4"] {
        let (hosting, host) = host(&*loader, policy(text), Some(24 * ROWS)).await;
        assert!(together(&host, &requests).await.iter().all(Result::is_ok), "{text}");
        let served = figures(&hosting).served;
        batch.push(served.decoded_tokens as f64 / served.decode_steps as f64);
    }
    assert!(batch[1] > 2.0 * batch[0], "sequences a step: {batch:?}");
}

async fn what_fits_nowhere_ends_alone(dir: &TempDir) {
    let loader = loader(dir.path(), LLAMA, false);
    let (_, roomy) = host(&*loader, policy("full"), None).await;
    let mut requests: Vec<_> = [30, 20, 12].map(|length| (prompt(length), 40)).to_vec();
    let alone = one_by_one(&roomy, &requests).await;
    let (hosting, host) = host(&*loader, policy("full"), Some(12 * ROWS)).await;
    requests.insert(1, (prompt(64), 200)); // begins well, and grows beyond the pool
    requests.insert(3, (prompt(300), 4)); // never begins
    let mut answers = together(&host, &requests).await;
    for large in [3, 1] {
        let why = answers.remove(large).unwrap_err();
        assert!(why.contains(&format!("the KV pool of {} bytes is exhausted", 12 * ROWS * PAGE)), "{why}");
    }
    same("beside what fits nowhere", &answers, &alone, 1e-5);
    ended(&hosting).await;
}

kvpolicy::policy_params! {
    /// Keeps prompts of 100 tokens and more, and else next to nothing: what it will keep cannot be told from what it kept.
    struct Fickle = "fickle", paper "none: a test" {}
}

impl Policy for Fickle {
    fn protect(&self, _: &LayerCx) -> Protect {
        Protect { recent: 2, ..Protect::default() }
    }

    fn on_write(&self, _: &LayerCx, new: &NewTokens) -> kvpolicy::Result<Verdict> {
        let evict = if new.positions.elem_count() >= 100 { Evict::Never } else { Evict::Always };
        Ok(Verdict { evict, score: None })
    }
}

async fn a_lost_prompt_starts_over(dir: &TempDir) {
    let loader = loader(dir.path(), LLAMA, false);
    let requests = [(prompt(140), 60), (prompt(90), 4), (prompt(150), 8)];
    let (_, roomy) = host(&*loader, Arc::new(Fickle {}), None).await;
    let alone = one_by_one(&roomy, &requests).await;
    let (hosting, host) = host(&*loader, Arc::new(Fickle {}), Some(18 * ROWS)).await;
    for _ in 0..8 {
        generate(&host, &prompt(90), 40).await.unwrap(); // it seems to keep little
    }
    let before = figures(&hosting).served;
    same("fickle", &together(&host, &requests).await, &alone, 1e-5);
    ended(&hosting).await;
    let Figures { served, usage, .. } = figures(&hosting);
    // Read once in vain: what was lost is not tried again before someone ends.
    assert_eq!(served.set_aside - before.set_aside, 1, "{served:?}");
    assert_eq!(served.prompt_tokens - before.prompt_tokens, 140 + 90 + 2 * 150, "{served:?}");
    assert!(usage.bytes_peak <= 18 * ROWS * PAGE);
}

/// A client that leaves while its sequence runs, and one that leaves before its sequence has begun.
async fn who_leaves_gives_room(dir: &TempDir) {
    let (hosting, host) = host(&*loader(dir.path(), LLAMA, false), policy("full"), None).await;
    let alone = generate(&host, &prompt(30), 30).await;
    let before = figures(&hosting).served;
    let (client, leave) = leaving(10);
    let stays = ask(&host, &prompt(30), 30, leave).await;
    let runs = ask(&host, &prompt(50), 1000, |_| {}).await;
    client.send(runs).unwrap();
    same("beside one that leaves", &[stays.answer().await], &[alone], 1e-5);
    ended(&hosting).await;
    let decoded = figures(&hosting).served.decoded_tokens - before.decoded_tokens;
    assert!(decoded < 100, "{decoded} tokens were decoded for nobody");

    drop(ask(&host, &prompt(50), 1000, |_| {}).await);
    assert_eq!(generate(&host, &prompt(20), 4).await.unwrap().len(), 4);
    ended(&hosting).await;
}

/// Within the step that ends its sequence.
async fn who_leaves_at_the_last_moment_harms_nobody(dir: &TempDir) {
    let (hosting, host) = host(&*loader(dir.path(), LLAMA, false), policy("full"), None).await;
    let requests = [(prompt(30), 20), (prompt(31), 20)];
    let alone = one_by_one(&host, &requests).await;
    let (client, leave) = leaving(9);
    let leaves = ask(&host, &prompt(20), 10, leave).await;
    let stay = [ask(&host, &requests[0].0, 20, |_| {}).await, ask(&host, &requests[1].0, 20, |_| {}).await];
    client.send(leaves).unwrap();
    let mut answers = vec![];
    for one in stay {
        answers.push(one.answer().await);
    }
    same("beside one that leaves", &answers, &alone, 1e-5);
    ended(&hosting).await;
}

kvpolicy::policy_params! {
    /// Keeps everything, and reads a prompt of 300 tokens only when its client has left.
    struct Waits = "waits", paper "none: a test" {}
}

static LEAVES: Mutex<Vec<Asked>> = Mutex::new(Vec::new());

impl Policy for Waits {
    fn on_write(&self, cx: &LayerCx, new: &NewTokens) -> kvpolicy::Result<Verdict> {
        let waits = cx.layer == 0 && new.positions.elem_count() == 300;
        while waits && LEAVES.lock().unwrap().pop().is_none() {
            std::thread::yield_now();
        }
        Ok(Verdict::KEEP)
    }
}

/// The host tells whoever is in a step that fails.
async fn who_leaves_before_an_error_harms_nobody(dir: &TempDir) {
    let (_, host) = host(&*loader(dir.path(), LLAMA, false), Arc::new(Waits {}), Some(12 * ROWS)).await;
    let leaves = ask(&host, &prompt(300), 4, |_| {}).await;
    let stays = ask(&host, &prompt(20), 4, |_| {}).await;
    LEAVES.lock().unwrap().push(leaves);
    assert_eq!(stays.answer().await.unwrap().len(), 4);
}

async fn who_leaves_within_its_prompt_gives_room(dir: &TempDir) {
    let (hosting, host) = host(&*loader(dir.path(), LLAMA, false), Arc::new(Waits {}), None).await;
    let alone = generate(&host, &prompt(20), 4).await;
    let leaves = ask(&host, &prompt(300), 150, |_| {}).await;
    let stays = ask(&host, &prompt(20), 4, |_| {}).await;
    LEAVES.lock().unwrap().push(leaves);
    same("beside one that leaves", &[stays.answer().await], &[alone], 1e-5);
    ended(&hosting).await;
    let decoded = figures(&hosting).served.decoded_tokens;
    assert!(decoded < 20, "{decoded} tokens were decoded for nobody");
}

async fn a_sampling_error_leaves_nothing_behind(dir: &TempDir) {
    let (hosting, host) = host(&*loader(dir.path(), LLAMA, false), policy("full"), None).await;
    let alone = generate(&host, &prompt(20), 8).await;
    let choose = |step: usize, logits: &Tensor| match step {
        5 => candle_core::bail!("no token will do"),
        _ => Ok(logits.clone()),
    };
    let why = send(&host, &prompt(30), 20, choose).await.answer().await.unwrap_err();
    assert!(why.contains("no token will do"), "{why}");
    ended(&hosting).await;
    assert_eq!(figures(&hosting).served.running, 0);
    same("after an error", &[generate(&host, &prompt(20), 8).await], &[alone], 1e-5);
}

/// Qwen2 hands its window to attention. One prompt is too long for it, one sequence grows too long.
async fn what_a_model_cannot_read_ends_alone() {
    let dir = tempfile::tempdir().unwrap();
    write(&endless("qwen2", json!({"sliding_window": 40})), dir.path());
    let (_, host) = host(&*loader(dir.path(), NormalLoaderType::Qwen2, false), policy("full"), None).await;
    let mut requests: Vec<_> = [10, 12].map(|length| (prompt(length), 26)).to_vec();
    let alone = one_by_one(&host, &requests).await;
    requests.insert(1, (prompt(50), 4));
    requests.insert(1, (prompt(30), 20));
    let mut answers = together(&host, &requests).await;
    for _ in 0..2 {
        let why = answers.remove(1).unwrap_err();
        assert!(why.contains("it attends to 40 tokens only"), "{why}");
    }
    same("beside what is too long", &answers, &alone, 1e-5);
}

/// At this token of the request that it watches, the client that was sent leaves.
fn leaving(token: usize) -> (Sender<Asked>, impl Fn(usize) + Send + Sync) {
    let (client, leaves) = channel();
    let leaves = Mutex::new(leaves);
    (client, move |at| {
        if at == token {
            drop(leaves.lock().unwrap().recv());
        }
    })
}
