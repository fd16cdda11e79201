//! What a GPU serves within a budget for keys and values: with mistral.rs's own cache, with its PagedAttention, or under a
//! policy. Everything runs on random weights in the shape of Llama-3.2-1B, so no download is needed.
//!
//! ```text
//! cargo run --release --features cuda --example saturate -- write /tmp/model
//! cargo run --release --features cuda --example saturate -- run /tmp/model own
//! cargo run --release --features cuda --example saturate -- run /tmp/model paged
//! cargo run --release --features cuda --example saturate -- run /tmp/model random-gate:rate=0.9,window=256
//! ```
//!
//! Requests of one length come one after the other, each as soon as the one before has its first token, or several at a time
//! with `--together`. The host's own scheduler decodes only sequences of one length in a step, so it does best with many
//! together; without flash attention a batch of long prompts is more than its kernels can address. Its cache knows no
//! budget, so it gets no more requests at a time than fit in.

use anyhow::Context;
use candle_core::{DType, Device, Tensor};
use clap::Parser;
use kvpolicy::Registry;
use kvpolicy_candle::demo;
use kvpolicy_mistralrs::{CacheOptions, Hosting, register};
use mistralrs_core::{
    DefaultSchedulerMethod, DeviceMapSetting, MemoryGpuConfig, MistralRs, MistralRsBuilder, ModelDType,
    NormalLoaderBuilder, NormalLoaderType, NormalRequest, NormalSpecificConfig, PagedAttentionConfig, PagedCacheType,
    Pipeline, Request, RequestMessage, Response, SamplingParams, SchedulerConfig, TokenSource,
};
use serde_json::{Value, json};
use std::{
    collections::{HashMap, HashSet},
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, mpsc},
    time::{Duration, Instant},
};
use tokio::{
    sync::{
        Semaphore,
        mpsc::{Receiver, channel, unbounded_channel},
    },
    task::JoinSet,
};

#[derive(Debug, Parser)]
enum Command {
    /// Writes a model of random weights.
    Write(Shape),
    /// Serves requests and prints what came of them.
    Run(Run),
}

#[derive(Debug, clap::Args)]
struct Shape {
    dir: PathBuf,
    #[arg(long, default_value_t = 16)]
    layers: usize,
    #[arg(long, default_value_t = 2048)]
    hidden: usize,
    #[arg(long, default_value_t = 128_256)]
    vocab: usize,
}

#[derive(Debug, clap::Args)]
struct Run {
    dir: PathBuf,
    /// `own`, `paged`, or a policy.
    mode: String,
    #[arg(long, default_value_t = 128)]
    requests: usize,
    /// Tokens of each prompt.
    #[arg(long, default_value_t = 8000)]
    prompt: usize,
    /// Tokens to generate for each.
    #[arg(long, default_value_t = 128)]
    tokens: usize,
    /// Requests that come at the same time.
    #[arg(long, default_value_t = 1)]
    together: usize,
    /// MiB that keys and values may take.
    #[arg(long, default_value_t = 4096)]
    kv_mib: usize,
    /// Seconds after which what came so far is printed.
    #[arg(long, default_value_t = 90)]
    limit_s: u64,
}

const HEAD_DIM: usize = 64;
const KV_HEADS: usize = 8;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    match Command::parse() {
        Command::Write(shape) => write(&shape),
        Command::Run(run) => {
            measure(&run).await?;
            std::process::exit(0) // requests may be under way
        }
    }
}

fn device() -> anyhow::Result<Device> {
    if cfg!(feature = "cuda") { Ok(Device::new_cuda(0)?) } else { Ok(Device::Cpu) }
}

fn dtype(device: &Device) -> DType {
    if device.is_cpu() { DType::F32 } else { DType::BF16 }
}

fn write(Shape { dir, layers, hidden, vocab }: &Shape) -> anyhow::Result<()> {
    let (hidden, ffn, kv) = (*hidden, 4 * hidden, KV_HEADS * HEAD_DIM);
    let device = device()?;
    let random = |rows: usize, columns: usize| -> candle_core::Result<Tensor> {
        Tensor::randn(0f32, 0.02, (rows, columns), &device)?.to_dtype(DType::BF16)?.to_device(&Device::Cpu)
    };
    let ones = || Tensor::ones(hidden, DType::BF16, &Device::Cpu);
    let mut tensors = HashMap::new();
    for layer in 0..*layers {
        for (part, rows, columns) in [
            ("self_attn.q_proj", hidden, hidden),
            ("self_attn.k_proj", kv, hidden),
            ("self_attn.v_proj", kv, hidden),
            ("self_attn.o_proj", hidden, hidden),
            ("mlp.gate_proj", ffn, hidden),
            ("mlp.up_proj", ffn, hidden),
            ("mlp.down_proj", hidden, ffn),
        ] {
            tensors.insert(format!("model.layers.{layer}.{part}.weight"), random(rows, columns)?);
        }
        for part in ["input_layernorm", "post_attention_layernorm"] {
            tensors.insert(format!("model.layers.{layer}.{part}.weight"), ones()?);
        }
    }
    let embedding = random(*vocab, hidden)?;
    let never = Tensor::zeros((3, hidden), DType::BF16, &Device::Cpu)?; // so that no text ends before its length
    tensors.insert("model.embed_tokens.weight".into(), embedding.slice_assign(&[256..259, 0..hidden], &never)?);
    tensors.insert("model.norm.weight".into(), ones()?);
    fs::create_dir_all(dir)?;
    candle_core::safetensors::save(&tensors, dir.join("model.safetensors"))?;
    let config = json!({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "hidden_size": hidden,
        "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": hidden / HEAD_DIM,
        "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "vocab_size": vocab, "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0, "max_position_embeddings": 16_384, "tie_word_embeddings": true, "attention_bias": false,
    });
    fs::write(dir.join("config.json"), config.to_string())?;
    fs::write(dir.join("tokenizer.json"), demo::TOKENIZER)?;
    let template = json!({"chat_template": "{{ messages[0]['content'] }}", "eos_token": "<|end|>"});
    Ok(fs::write(dir.join("tokenizer_config.json"), template.to_string())?)
}

/// A model that is loaded, and how it keeps keys and values.
struct Loaded {
    host: Arc<MistralRs>,
    hosting: Option<Arc<Hosting>>,
    /// Requests that may be under way.
    places: usize,
    /// What its pool has taken, if that is known before.
    pool_bytes: Option<u64>,
}

async fn load(run: &Run, device: &Device) -> anyhow::Result<Loaded> {
    let config: Value = serde_json::from_slice(&fs::read(run.dir.join("config.json"))?)?;
    let layers = config["num_hidden_layers"].as_u64().context("config.json: num_hidden_layers is missing")? as usize;
    let bytes_per_token = 2 * layers * KV_HEADS * HEAD_DIM * dtype(device).size_in_bytes();
    let policy = !["own", "paged"].contains(&run.mode.as_str());
    let options =
        CacheOptions { kv_dtype: None, kv_bytes: Some((run.kv_mib as u64) << 20), max_sequences: run.requests };
    let under = |text| anyhow::Ok(register(Registry::standard().parse(text)?, &options));
    let hosting = policy.then(|| under(&run.mode)).transpose()?;
    let blocks = (run.mode == "paged")
        .then(|| PagedAttentionConfig::new(Some(32), MemoryGpuConfig::MbAmount(run.kv_mib), PagedCacheType::Auto))
        .transpose()?;
    let pipeline = pipeline(&run.dir, device, blocks)?;
    let blocks = pipeline.lock().await.get_metadata().cache_config.clone();
    anyhow::ensure!(blocks.is_some() == (run.mode == "paged"), "mistral.rs did not do what it was asked: blocks");
    // mistral.rs makes a sequence's own cache in pieces of 512 tokens.
    let fit = (run.kv_mib << 20) / (bytes_per_token * (run.prompt + run.tokens).next_multiple_of(512));
    let places = if run.mode == "own" { fit.clamp(1, run.requests) } else { run.requests };
    let pool_bytes = blocks.as_ref().map(|blocks| (blocks.num_gpu_blocks * blocks.block_size * bytes_per_token) as u64);
    let scheduler = match blocks {
        Some(config) => SchedulerConfig::PagedAttentionMeta { max_num_seqs: run.requests, config },
        None => SchedulerConfig::DefaultScheduler { method: DefaultSchedulerMethod::Fixed(places.try_into()?) },
    };
    let host = MistralRsBuilder::new(pipeline, scheduler, false, None).with_no_prefix_cache(true).build().await;
    Ok(Loaded { host, hosting, places, pool_bytes })
}

type Loading = Arc<tokio::sync::Mutex<dyn Pipeline + Send + Sync>>;

fn pipeline(dir: &Path, device: &Device, blocks: Option<PagedAttentionConfig>) -> anyhow::Result<Loading> {
    let dtype = if device.is_cpu() { ModelDType::F32 } else { ModelDType::BF16 };
    let (dir, mapper) = (Some(dir.display().to_string()), DeviceMapSetting::dummy());
    let builder = NormalLoaderBuilder::new(NormalSpecificConfig::default(), None, None, dir, false, None);
    let loader = builder.build(Some(NormalLoaderType::Llama))?;
    loader.load_model_from_hf(None, TokenSource::None, &dtype, device, true, mapper, None, blocks)
}

/// When each request got its tokens, in seconds from the start.
type Times = Arc<Mutex<Vec<Vec<f64>>>>;

async fn measure(run: &Run) -> anyhow::Result<()> {
    let device = device()?;
    let before = used_bytes(&device);
    let loaded = load(run, &device).await?;
    let after_loading = used_bytes(&device);
    let (start, times): (_, Times) = (Instant::now(), Arc::new(Mutex::new(vec![vec![]; run.requests])));
    let (stop, most_used) = watch_memory(device.clone());
    let all = serve(run, &loaded, start, &times);
    let outcome = tokio::time::timeout(Duration::from_secs(run.limit_s), all).await;
    let wall = start.elapsed().as_secs_f64();
    drop(stop);
    let most_used = most_used.join().unwrap_or(after_loading);
    let note = match outcome {
        Ok(Ok(())) => String::new(),
        Ok(Err(error)) => format!(" ({error})"),
        Err(_) => format!(" (stopped after {} s)", run.limit_s),
    };
    let times = times.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let tokens: usize = times.iter().map(Vec::len).sum();
    let done = times.iter().filter(|times| times.len() >= run.tokens).count();
    let figures = loaded.hosting.as_ref().and_then(|hosting| hosting.figures().pop());
    let peak = figures.as_ref().map(|figures| figures.usage.bytes_peak).or(loaded.pool_bytes);
    let mib = |bytes: u64| bytes >> 20;
    println!(
        "{} | done {done}/{} | at once {} | {:.0} tokens/s, best second {} | {wall:.1} s | KV peak {} MiB | device: {} \
         MiB loaded, {} MiB at most{note}",
        run.mode,
        run.requests,
        at_once(&times),
        tokens as f64 / wall,
        best_second(&times),
        peak.map_or("?".into(), |bytes| mib(bytes).to_string()),
        mib(after_loading.saturating_sub(before)),
        mib(most_used.saturating_sub(before)),
    );
    if let Some(figures) = figures {
        println!("  compression {:.2}x, {:?}", figures.stats.compression(), figures.served);
    }
    Ok(())
}

/// The most requests between their first and their last token.
fn at_once(times: &[Vec<f64>]) -> usize {
    let spans: Vec<_> = times.iter().filter_map(|times| Some((*times.first()?, *times.last()?))).collect();
    let during = |at: f64| spans.iter().filter(|(first, last)| *first <= at && at <= *last).count();
    spans.iter().map(|(first, _)| during(*first)).max().unwrap_or(0)
}

/// The most tokens within a second.
fn best_second(times: &[Vec<f64>]) -> usize {
    let mut all: Vec<f64> = times.iter().flatten().copied().collect();
    all.sort_by(f64::total_cmp);
    (0..all.len()).map(|first| all.partition_point(|at| *at < all[first] + 1.0) - first).max().unwrap_or(0)
}

async fn serve(run: &Run, loaded: &Loaded, start: Instant, times: &Times) -> anyhow::Result<()> {
    let places = Arc::new(Semaphore::new(loaded.places));
    let mut under_way = JoinSet::new();
    let requests: Vec<usize> = (0..run.requests).collect();
    for group in requests.chunks(run.together.clamp(1, loaded.places)) {
        let mut taken = vec![];
        for _ in group {
            taken.push(places.clone().acquire_owned().await?);
        }
        // A short request holds the engine until the whole group is there.
        let (all_there, wait) = mpsc::channel::<()>();
        let wait = Mutex::new(wait);
        let hold = move || _ = wait.lock().map(|wait| wait.recv());
        let held =
            if group.len() > 1 { Some(send(&loaded.host, prompt(16, run.requests), 1, hold).await?) } else { None };
        let (began, mut beginnings) = unbounded_channel();
        for (&i, place) in group.iter().zip(taken) {
            let (times, began) = (times.clone(), began.clone());
            let note = move || {
                times.lock().unwrap_or_else(PoisonError::into_inner)[i].push(start.elapsed().as_secs_f64());
                _ = began.send(i);
            };
            let answers = send(&loaded.host, prompt(run.prompt, i), run.tokens, note).await?;
            under_way.spawn(async move {
                let _place = place;
                answered(answers).await
            });
        }
        drop((all_there, began));
        if let Some(held) = held {
            answered(held).await?;
        }
        let mut waiting: HashSet<usize> = group.iter().copied().collect();
        while !waiting.is_empty()
            && let Some(i) = beginnings.recv().await
        {
            waiting.remove(&i);
        }
        while let Some(ended) = under_way.try_join_next() {
            ended??;
        }
    }
    while let Some(ended) = under_way.join_next().await {
        ended??;
    }
    Ok(())
}

async fn answered(mut answers: Receiver<Response>) -> anyhow::Result<()> {
    match answers.recv().await {
        Some(Response::CompletionDone(_)) => Ok(()),
        Some(Response::CompletionModelError(error, _)) => anyhow::bail!(error),
        Some(Response::InternalError(error) | Response::ValidationError(error)) => anyhow::bail!(error.to_string()),
        _ => anyhow::bail!("mistral.rs hung up"),
    }
}

/// `at`: called on the host's thread before each token is chosen.
async fn send(
    host: &MistralRs,
    prompt: Vec<u32>,
    tokens: usize,
    at: impl Fn() + Send + Sync + 'static,
) -> anyhow::Result<Receiver<Response>> {
    let (sender, answers) = channel(4);
    let sampling = SamplingParams { max_len: Some(tokens), ..SamplingParams::deterministic() };
    let prompt = RequestMessage::CompletionTokens(prompt);
    let mut request = NormalRequest::new_simple(prompt, sampling, sender, host.next_request_id(), None, None);
    let look = move |logits: &Tensor, _: &[u32]| {
        at();
        Ok(logits.clone())
    };
    request.logits_processors = Some(vec![Arc::new(look)]);
    let engine = host.get_sender(None).map_err(|error| anyhow::anyhow!("{error}"))?;
    engine.send(Request::Normal(Box::new(request))).await?;
    Ok(answers)
}

/// Random tokens, others for each request.
fn prompt(tokens: usize, request: usize) -> Vec<u32> {
    let mut state = request as u64 + 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as u32 % 256
    };
    (0..tokens).map(|_| next()).collect()
}

/// Bytes of the device that are taken, by anyone; 0 on the CPU.
#[cfg_attr(not(feature = "cuda"), allow(unused_variables))]
fn used_bytes(device: &Device) -> u64 {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(cuda) = device
        && let Ok((free, total)) = cuda.cuda_stream().context().mem_get_info()
    {
        return (total - free) as u64;
    }
    0
}

/// The most bytes taken, until the sender is dropped.
fn watch_memory(device: Device) -> (mpsc::Sender<()>, std::thread::JoinHandle<u64>) {
    let (stop, stopped) = mpsc::channel::<()>();
    let watch = std::thread::spawn(move || {
        let mut most = 0;
        while stopped.recv_timeout(Duration::from_millis(50)) == Err(mpsc::RecvTimeoutError::Timeout) {
            most = most.max(used_bytes(&device));
        }
        most
    });
    (stop, watch)
}
