//! Tiny models under mistral.rs and under the candle adapter.
#![allow(dead_code, unreachable_pub, missing_docs, clippy::unwrap_used, clippy::panic)] // each test crate uses its own part

#[path = "../../../candle/tests/common/tiny.rs"]
pub mod tiny;

use candle_core::{DType, Device, Tensor};
use kvpolicy::{Policy, Registry};
use kvpolicy_candle::{Lm, LoadOptions, demo};
use kvpolicy_mistralrs::{CacheOptions, Hosting, register};
use mistralrs_core::{
    DefaultSchedulerMethod, DeviceMapSetting, GGUFLoaderBuilder, GGUFSpecificConfig, Loader, MistralRs,
    MistralRsBuilder, ModelDType, NormalLoaderBuilder, NormalLoaderType, NormalRequest, NormalSpecificConfig, Request,
    RequestMessage, Response, SamplingParams, SchedulerConfig, TokenSource,
};
use serde_json::{Value, json};
use std::{
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};
use tiny::Tiny;
use tokio::sync::mpsc::Receiver;

pub const TEMPLATE: &str = "{% for m in messages %}{{ m['content'] }}{% endfor %}";

pub fn policy(text: &str) -> Arc<dyn Policy> {
    Registry::standard().parse(text).unwrap()
}

/// A random model that never ends a text; fields of its `config.json` beside the usual ones.
pub fn endless(arch: &'static str, config: Value) -> Tiny {
    let mut tiny = Tiny::new(arch, 2, 16, false, config);
    let ends = Tensor::zeros((3, tiny::HIDDEN), DType::F32, &Device::Cpu).unwrap();
    let head = tiny.tensors.get_mut("lm_head.weight").unwrap();
    *head = head.slice_assign(&[256..259, 0..tiny::HIDDEN], &ends).unwrap(); // what ends one, for either tokenizer
    tiny
}

/// A model folder that both runtimes read.
pub fn write(tiny: &Tiny, dir: &Path) {
    tiny.write_dir(dir);
    std::fs::write(dir.join("tokenizer.json"), demo::TOKENIZER).unwrap();
    let config = json!({"chat_template": TEMPLATE, "eos_token": "<|end|>"});
    std::fs::write(dir.join("tokenizer_config.json"), config.to_string()).unwrap();
}

pub fn loader(dir: &Path, arch: NormalLoaderType, no_kv_cache: bool) -> Box<dyn Loader> {
    let dir = Some(dir.display().to_string());
    let builder = NormalLoaderBuilder::new(NormalSpecificConfig::default(), None, None, dir, no_kv_cache, None);
    builder.build(Some(arch)).unwrap()
}

pub fn gguf_loader(file: &Path) -> Box<dyn Loader> {
    let (dir, name) = (file.parent().unwrap(), file.file_name().unwrap());
    let (dir, names) = (dir.display().to_string(), vec![name.to_string_lossy().into_owned()]);
    GGUFLoaderBuilder::new(None, None, dir, names, GGUFSpecificConfig::default(), false, None).build()
}

pub type Pipeline = Arc<tokio::sync::Mutex<dyn mistralrs_core::Pipeline + Send + Sync>>;

pub fn load(loader: &dyn Loader) -> anyhow::Result<Pipeline> {
    load_on(loader, &Device::Cpu, ModelDType::F32)
}

pub fn load_on(loader: &dyn Loader, device: &Device, dtype: ModelDType) -> anyhow::Result<Pipeline> {
    let mapper = DeviceMapSetting::dummy();
    loader.load_model_from_hf(None, TokenSource::None, &dtype, device, true, mapper, None, None)
}

pub async fn start(pipeline: Pipeline) -> Arc<MistralRs> {
    let method = DefaultSchedulerMethod::Fixed(8.try_into().unwrap());
    MistralRsBuilder::new(pipeline, SchedulerConfig::DefaultScheduler { method }, false, None).build().await
}

/// The logits of each generated token, greedily, or the host's message.
pub type Answer = Result<Vec<Vec<f32>>, String>;

/// A request under way.
pub struct Asked {
    pub answers: Receiver<Response>,
    seen: Arc<Mutex<Vec<Vec<f32>>>>,
}

/// `at`: called on the host's thread before each token is chosen, with the number of tokens before it.
pub async fn ask(host: &MistralRs, prompt: &[u32], tokens: usize, at: impl Fn(usize) + Send + Sync + 'static) -> Asked {
    send(host, prompt, tokens, move |step, logits| {
        at(step);
        Ok(logits.clone())
    })
    .await
}

/// As [`ask`], for these tokens, whichever are likely.
pub async fn follow(
    host: &MistralRs,
    prompt: &[u32],
    text: &[u32],
    at: impl Fn(usize) + Send + Sync + 'static,
) -> Asked {
    let next = text.to_vec();
    send(host, prompt, text.len(), move |step, logits| {
        at(step);
        let only: Vec<f32> = (0..logits.elem_count() as u32).map(|token| (token == next[step]) as u8 as f32).collect();
        Tensor::from_vec(only, logits.dims(), logits.device())
    })
    .await
}

/// As [`ask`]; `choose` makes of each step's logits, and its number, those that decide.
pub async fn send(
    host: &MistralRs,
    prompt: &[u32],
    tokens: usize,
    choose: impl Fn(usize, &Tensor) -> candle_core::Result<Tensor> + Send + Sync + 'static,
) -> Asked {
    let (sender, answers) = tokio::sync::mpsc::channel(64);
    let sampling = SamplingParams { max_len: Some(tokens), ..SamplingParams::deterministic() };
    let prompt = RequestMessage::CompletionTokens(prompt.to_vec());
    let mut request = NormalRequest::new_simple(prompt, sampling, sender, host.next_request_id(), None, None);
    let seen: Arc<Mutex<Vec<Vec<f32>>>> = Arc::default();
    let record = seen.clone();
    let look = move |logits: &Tensor, _: &[u32]| {
        let step = record.lock().unwrap().len();
        let chosen = choose(step, logits)?;
        record.lock().unwrap().push(logits.flatten_all()?.to_dtype(DType::F32)?.to_vec1()?);
        Ok(chosen)
    };
    request.logits_processors = Some(vec![Arc::new(look)]);
    host.get_sender(None).unwrap().send(Request::Normal(Box::new(request))).await.unwrap();
    Asked { answers, seen }
}

impl Asked {
    pub async fn answer(mut self) -> Answer {
        loop {
            match self.answers.recv().await {
                Some(Response::CompletionDone(_)) => return Ok(self.seen.lock().unwrap().clone()),
                Some(Response::CompletionModelError(error, _)) => return Err(error),
                Some(Response::InternalError(error) | Response::ValidationError(error)) => {
                    return Err(error.to_string());
                }
                Some(_) => {}
                None => return Err("the host hung up".into()),
            }
        }
    }
}

pub async fn generate(host: &MistralRs, prompt: &[u32], tokens: usize) -> Answer {
    ask(host, prompt, tokens, |_| {}).await.answer().await
}

/// Requests (prompt, tokens) that are all there before the first one has its first token, so that they run in one batch
/// as far as memory goes.
pub async fn together(host: &MistralRs, requests: &[(Vec<u32>, usize)]) -> Vec<Answer> {
    let (all_there, wait) = std::sync::mpsc::channel::<()>();
    let wait = Mutex::new(wait);
    let ((prompt, tokens), others) = requests.split_first().unwrap();
    let until_all_there = move |_| _ = wait.lock().unwrap().recv(); // at once when the sender is gone
    let mut asked = vec![ask(host, prompt, *tokens, until_all_there).await];
    for (prompt, tokens) in others {
        asked.push(ask(host, prompt, *tokens, |_| {}).await);
    }
    drop(all_there);
    let mut answers = vec![];
    for one in asked {
        answers.push(one.answer().await);
    }
    answers
}

/// Logits under a policy, and the entries it dropped for them.
pub async fn by_host(
    loader: &dyn Loader,
    policy: Arc<dyn Policy>,
    prompt: &[u32],
    tokens: usize,
) -> (Vec<Vec<f32>>, u64) {
    let hosting = register(policy, &CacheOptions::default());
    let host = start(load(loader).unwrap()).await;
    let evicted = || hosting.figures()[0].stats.evicted;
    let before = evicted(); // the host says hello to a new model
    let logits = generate(&host, prompt, tokens).await.unwrap();
    let dropped = evicted() - before;
    ended(&hosting).await;
    (logits, dropped)
}

/// Every sequence gives its memory back, a moment after its answer.
pub async fn ended(hosting: &Hosting) {
    for _ in 0..100 {
        if hosting.figures()[0].usage.live_entries == 0 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("{:?} is still held", hosting.figures());
}

/// The same with the candle adapter.
pub fn by_candle(model: &Path, policy: Arc<dyn Policy>, prompt: &[u32], tokens: usize) -> (Vec<Vec<f32>>, u64) {
    let lm = Lm::load(&model.display().to_string(), &LoadOptions::default()).unwrap();
    let mut session = lm.session(policy, &Default::default()).unwrap();
    let mut all = vec![session.prefill(prompt, true).unwrap().to_vec1().unwrap()];
    while all.len() < tokens {
        let next = greedy(&all[all.len() - 1..])[0];
        all.push(session.decode(next).unwrap().to_vec1().unwrap());
    }
    (all, session.stats().evicted)
}

/// The same for these tokens, whichever are likely.
pub fn by_candle_following(
    model: &Path,
    policy: Arc<dyn Policy>,
    prompt: &[u32],
    text: &[u32],
) -> (Vec<Vec<f32>>, u64) {
    let lm = Lm::load(&model.display().to_string(), &LoadOptions::default()).unwrap();
    let mut session = lm.session(policy, &Default::default()).unwrap();
    let mut all = vec![session.prefill(prompt, true).unwrap().to_vec1().unwrap()];
    for &token in &text[..text.len() - 1] {
        all.push(session.decode(token).unwrap().to_vec1().unwrap());
    }
    (all, session.stats().evicted)
}

/// The most likely token of each step.
pub fn greedy(logits: &[Vec<f32>]) -> Vec<u32> {
    let best = |row: &Vec<f32>| row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).unwrap().0 as u32;
    logits.iter().map(best).collect()
}

pub fn max_difference(a: &[Vec<f32>], b: &[Vec<f32>]) -> f32 {
    assert_eq!(a.len(), b.len(), "steps");
    let differences = a.iter().flatten().zip(b.iter().flatten()).map(|(a, b)| (a - b).abs());
    differences.max_by(f32::total_cmp).unwrap_or(0.0) // NaN if there is one
}

pub fn prompt(tokens: u32) -> Vec<u32> {
    (0..tokens).map(|i| (i * 37 + 11) % 251).collect()
}
