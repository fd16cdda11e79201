//! Models on a GPU under mistral.rs: `full` against the host's own cache there, policies against the candle adapter on the
//! CPU. Skips, and says so, where there is no GPU.
#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod common;

use candle_core::{DType, Device, quantized::GgmlDType};
use common::{
    Answer, by_candle_following, ended, endless, follow, gguf_loader, load_on, loader, policy, prompt, start, write,
};
use kvpolicy_mistralrs::{CacheOptions, Figures, Hosting, register, unregister};
use mistralrs_core::{Loader, MistralRs, ModelDType, NormalLoaderType};
use serde_json::json;
use std::{
    path::Path,
    sync::{Arc, Mutex, mpsc::channel},
};

const LLAMA: NormalLoaderType = NormalLoaderType::Llama;
const POLICIES: [&str; 4] = ["full", "window:size=8,sinks=2", "tova:budget=12", "random-gate:rate=0.7,window=8"];
/// Both compute the same but for the order of sums.
const F32: f32 = 5e-3; // the host multiplies f32 in TF32, 10 bits of mantissa
/// Keys, values and activations are rounded, in the host's own cache as here.
const BF16: f32 = 0.1;

fn gpu() -> Option<Device> {
    match Device::new_cuda(0) {
        Ok(device) => Some(device),
        Err(error) => {
            println!("skipped: no GPU here ({})", error.to_string().lines().next().unwrap_or_default());
            None
        }
    }
}

/// Whom a model is loaded under is a matter of the process: one test at a time.
static TURN: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

#[tokio::test(flavor = "multi_thread")]
async fn llama() {
    family("llama", LLAMA).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn qwen2() {
    family("qwen2", NormalLoaderType::Qwen2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn qwen3() {
    family("qwen3", NormalLoaderType::Qwen3).await;
}

async fn family(arch: &'static str, loads_as: NormalLoaderType) {
    let Some(device) = gpu() else { return };
    let _turn = TURN.lock().await;
    let (dir, tiny) = (tempfile::tempdir().unwrap(), endless(arch, json!({})));
    write(&tiny, dir.path());
    tiny.write_gates(&dir.path().join("gates"));
    let gates = format!("dms:window=6,weights={}", dir.path().join("gates/gates.safetensors").display());
    let loads = |loader: Box<dyn Loader>, dtype| Model { loader, device: device.clone(), dtype };
    let folder = loads(loader(dir.path(), loads_as.clone(), false), ModelDType::F32);
    as_the_own_cache(arch, &folder, F32).await;
    for text in POLICIES.into_iter().chain([gates.as_str()]) {
        as_on_the_cpu(arch, &folder, dir.path(), text, F32).await;
    }
    each_as_alone(arch, &folder, F32).await;
    as_the_own_cache(arch, &loads(loader(dir.path(), loads_as, false), ModelDType::BF16), BF16).await;
    let file = dir.path().join("model.gguf");
    tiny.write_gguf(&file, GgmlDType::Q8_0);
    as_the_own_cache(arch, &loads(gguf_loader(&file), ModelDType::F32), BF16).await; // it rounds activations
}

struct Model {
    loader: Box<dyn Loader>,
    device: Device,
    dtype: ModelDType,
}

impl Model {
    async fn under(&self, text: &str, kv_bytes: Option<u64>) -> (Arc<Hosting>, Arc<MistralRs>) {
        let kv_dtype = Some(if self.dtype == ModelDType::F32 { DType::F32 } else { DType::BF16 });
        let options = CacheOptions { kv_dtype, kv_bytes: kv_bytes.or(Some(64 << 20)), max_sequences: 8 };
        let hosting = register(policy(text), &options);
        let host = start(load_on(&*self.loader, &self.device, self.dtype).unwrap()).await;
        ended(&hosting).await; // the host says hello to a new model
        (hosting, host)
    }

    async fn with_own_cache(&self) -> Arc<MistralRs> {
        unregister();
        start(load_on(&*self.loader, &self.device, self.dtype).unwrap()).await
    }
}

fn figures(hosting: &Hosting) -> Figures {
    hosting.figures().remove(0)
}

/// What is to be generated, of these lengths.
fn requests(of: &[(usize, usize)]) -> Vec<(Vec<u32>, Vec<u32>)> {
    of.iter().map(|&(length, tokens)| (prompt(length as u32), prompt(tokens as u32 + 3).split_off(3))).collect()
}

async fn alone(host: &MistralRs, requests: &[(Vec<u32>, Vec<u32>)]) -> Vec<Answer> {
    let mut answers = vec![];
    for (prompt, text) in requests {
        answers.push(follow(host, prompt, text, |_| {}).await.answer().await);
    }
    answers
}

/// All are there before the first one has its first token.
async fn together(host: &MistralRs, requests: &[(Vec<u32>, Vec<u32>)]) -> Vec<Answer> {
    let (all_there, wait) = channel::<()>();
    let wait = Mutex::new(wait);
    let mut until_all_there = Some(move |_| _ = wait.lock().unwrap().recv());
    let mut asked = vec![];
    for (prompt, text) in requests {
        asked.push(match until_all_there.take() {
            Some(at) => follow(host, prompt, text, at).await,
            None => follow(host, prompt, text, |_| {}).await,
        });
    }
    drop(all_there);
    let mut answers = vec![];
    for one in asked {
        answers.push(one.answer().await);
    }
    answers
}

/// How far the logits of a step are from those expected at most, relative to their size. NaN never passes.
#[track_caller]
fn same(name: &str, got: &[Answer], expected: &[Answer], apart: f32) {
    let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|e| e * e).sum::<f32>().sqrt();
    let error =
        |(a, b): (&Vec<f32>, &Vec<f32>)| norm(&mut a.iter().zip(b).map(|(a, b)| a - b)) / norm(&mut b.iter().copied());
    assert_eq!(got.len(), expected.len(), "{name}");
    for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
        let (got, expected) = (got.as_ref().unwrap(), expected.as_ref().unwrap());
        assert_eq!(got.len(), expected.len(), "{name}, request {i}: steps");
        let errors: Vec<f32> = got.iter().zip(expected).map(error).collect();
        let most = errors.iter().copied().fold(0.0, f32::max);
        println!("{name}, request {i}: {most:.1e}");
        assert!(errors.iter().all(|error| *error <= apart), "{name}, request {i}: {errors:?}");
    }
}

async fn as_the_own_cache(arch: &str, model: &Model, apart: f32) {
    let requests = requests(&[(40, 24), (1, 12), (300, 8)]);
    let own = alone(&*model.with_own_cache().await, &requests).await;
    let (hosting, host) = model.under("full", None).await;
    same(
        &format!("{arch} {} as with its own cache", model.loader.get_id()),
        &alone(&host, &requests).await,
        &own,
        apart,
    );
    assert_eq!(figures(&hosting).stats.evicted, 0);
}

async fn as_on_the_cpu(arch: &str, model: &Model, dir: &Path, text: &str, apart: f32) {
    let requests = requests(&[(40, 24), (100, 12)]);
    let (hosting, host) = model.under(text, None).await;
    let before = figures(&hosting).stats.evicted;
    let here = alone(&host, &requests).await;
    ended(&hosting).await;
    let dropped = figures(&hosting).stats.evicted - before;
    let mut there = (vec![], 0);
    for (prompt, tokens) in &requests {
        let (logits, dropped) = by_candle_following(dir, policy(text), prompt, tokens);
        there.0.push(Ok(logits));
        there.1 += dropped;
    }
    same(&format!("{arch} {text} as on the CPU"), &here, &there.0, apart);
    assert_eq!(dropped, there.1, "{arch} {text}: entries dropped");
    assert_eq!(dropped > 0, text != "full", "{arch} {text}");
}

/// Sequences of five lengths in one pass.
async fn each_as_alone(arch: &str, model: &Model, apart: f32) {
    let requests = requests(&[(40, 24), (17, 30), (40, 12), (70, 24), (5, 40)]);
    for text in POLICIES {
        let (hosting, host) = model.under(text, None).await;
        let alone = alone(&host, &requests).await;
        let before = figures(&hosting).served;
        same(&format!("{arch} {text} in a batch"), &together(&host, &requests).await, &alone, apart);
        ended(&hosting).await;
        let served = figures(&hosting).served;
        let decoded = served.decoded_tokens - before.decoded_tokens;
        assert!(decoded > 2 * (served.decode_steps - before.decode_steps), "{arch} {text}: not in batches, {served:?}");
        assert_eq!((served.running, served.waits, served.set_aside), (0, 0, 0), "{arch} {text}");
    }
}

/// Sequences wait, are set aside and start over, and each gets what it would get alone.
#[tokio::test(flavor = "multi_thread")]
async fn more_than_the_pool_holds() {
    let Some(device) = gpu() else { return };
    let _turn = TURN.lock().await;
    let dir = tempfile::tempdir().unwrap();
    write(&endless("llama", json!({})), dir.path());
    let model = Model { loader: loader(dir.path(), LLAMA, false), device, dtype: ModelDType::F32 };
    let requests = requests(&[(60, 120), (40, 120), (90, 120), (60, 120), (20, 120), (128, 120)]);
    let (roomy, host) = model.under("full", None).await;
    let alone = alone(&host, &requests).await;
    let limit = 16 * 4 * figures(&roomy).usage.page_bytes; // the last takes 8 pages in each of 4 rows, all together 37
    let (hosting, host) = model.under("full", Some(limit)).await;
    same("more than the pool holds", &together(&host, &requests).await, &alone, F32);
    ended(&hosting).await;
    let Figures { served, usage, .. } = figures(&hosting);
    assert!(served.waits > 0 && served.set_aside > 0, "{served:?}");
    assert!(usage.bytes_peak <= limit && usage.pages_in_use == 0, "{usage:?}");

    let too_long = [(prompt(400), prompt(4))]; // 13 pages in each of 4 rows
    let (_, host) = model.under("full", Some(12 * 4 * usage.page_bytes)).await;
    let why = together(&host, &too_long).await.remove(0).unwrap_err();
    assert!(why.contains("is exhausted"), "{why}");
    assert!(together(&host, &requests[..1]).await[0].is_ok());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_borrowed_neuron() {
    let Some(device) = gpu() else { return };
    let _turn = TURN.lock().await;
    let dir = tempfile::tempdir().unwrap();
    let fields = json!({"dms_window_size": 8, "dms_separate_alpha": false, "dms_alpha_scale": 5.0,
        "dms_initial_alpha_offset": 0.5});
    write(&endless("llama", fields), dir.path());
    let model = Model { loader: loader(dir.path(), LLAMA, false), device, dtype: ModelDType::F32 };
    as_on_the_cpu("llama, borrowed", &model, dir.path(), "dms", F32).await;
}
