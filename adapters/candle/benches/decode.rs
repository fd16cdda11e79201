//! Decode speed on a real GGUF model, against candle-transformers in the same process.
//!
//! `cargo bench -p kvpolicy-candle --bench decode -- MODEL.gguf [CONTEXT]` (llama architecture)
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use candle_core::{DType, Device, Tensor, quantized::gguf_file};
use candle_transformers::models::quantized_llama::ModelWeights;
use kvpolicy::Registry;
use kvpolicy_candle::{Lm, LoadOptions, SessionOptions};
use std::{fs::File, time::Instant};

/// Tokens timed for each contender.
const TIMED: usize = 40;

/// Something that generates: its name, prompt tokens per second, and the step to the next token.
struct Contender<'a> {
    name: String,
    prefill: f64,
    step: Box<dyn FnMut(usize) + 'a>,
    times: Vec<f64>, // ms
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with("--")).collect();
    let Some(path) = args.first() else {
        println!("skipped: name a GGUF file of llama architecture");
        return;
    };
    let context: usize = args.get(1).map_or(2048, |n| n.parse().expect("a number of tokens"));
    let lm = Lm::load(path, &LoadOptions::default()).unwrap();
    let tokens: Vec<u32> = (0..context as u32).map(|i| 1000 + i * 7919 % 20000).collect();

    let mut contenders = vec![candle(path, &tokens)];
    for policy in ["full".to_string(), format!("window:size={},sinks=4", context / 8 - 4)] {
        for dtype in [DType::F32, DType::F16] {
            contenders.push(ours(&lm, &policy, dtype, &tokens));
        }
    }
    // In turns, so that what else the machine does falls on all alike.
    for i in 0..TIMED {
        for contender in &mut contenders {
            let start = Instant::now();
            (contender.step)(i);
            contender.times.push(start.elapsed().as_secs_f64() * 1e3);
        }
    }
    println!("context {context}, {TIMED} tokens in turns; ms a token: median (quartiles)");
    contenders.iter_mut().for_each(print);
}

fn candle<'a>(path: &str, tokens: &[u32]) -> Contender<'a> {
    let mut file = File::open(path).unwrap();
    let content = gguf_file::Content::read(&mut file).unwrap();
    let mut model = ModelWeights::from_gguf(content, &mut file, &Device::Cpu).unwrap();
    let input = |tokens: &[u32]| Tensor::new(tokens, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    let (start, context) = (Instant::now(), tokens.len());
    let mut logits = model.forward(&input(tokens), 0).unwrap();
    let prefill = context as f64 / start.elapsed().as_secs_f64();
    let step = move |i| {
        let token = logits.flatten_all().unwrap().argmax(0).unwrap().to_scalar::<u32>().unwrap();
        logits = model.forward(&input(&[token]), context + i).unwrap();
    };
    Contender { name: "candle-transformers quantized_llama".into(), prefill, step: Box::new(step), times: vec![] }
}

fn ours<'a>(lm: &'a Lm, policy: &str, dtype: DType, tokens: &[u32]) -> Contender<'a> {
    let options = SessionOptions { kv_dtype: Some(dtype), ..SessionOptions::default() };
    let mut session = lm.session(Registry::standard().parse(policy).unwrap(), &options).unwrap();
    let start = Instant::now();
    let mut logits = session.prefill(tokens, true).unwrap();
    let prefill = tokens.len() as f64 / start.elapsed().as_secs_f64();
    let step = move |_| {
        let token = logits.argmax(0).unwrap().to_scalar::<u32>().unwrap();
        logits = session.decode(token).unwrap();
    };
    let name = format!("kvpolicy {policy} kv {}", dtype.as_str());
    Contender { name, prefill, step: Box::new(step), times: vec![] }
}

fn print(contender: &mut Contender) {
    let Contender { name, prefill, times, .. } = contender;
    times.sort_by(f64::total_cmp);
    let at = |quarter: usize| times[times.len() * quarter / 4];
    let rate = 1e3 / at(2);
    println!("{name:44} {:6.2} ({:.2}-{:.2})  {rate:6.1} tok/s  prefill {prefill:6.1} tok/s", at(2), at(1), at(3));
}
