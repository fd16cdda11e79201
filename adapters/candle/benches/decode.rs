//! Decode speed on a real GGUF model, against candle-transformers in the same process.
//!
//! `cargo bench -p kvpolicy-candle --bench decode -- MODEL.gguf [CONTEXT]` (llama architecture)
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use candle_core::{Device, Tensor, quantized::gguf_file};
use candle_transformers::models::quantized_llama::ModelWeights;
use kvpolicy::{CpuConfig, Registry};
use kvpolicy_candle::{Lm, LoadOptions};
use std::{fs::File, time::Instant};

const TIMED: usize = 40;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with("--")).collect();
    let Some(path) = args.first() else {
        println!("skipped: name a GGUF file of llama architecture");
        return;
    };
    let context: usize = args.get(1).map_or(2048, |n| n.parse().expect("a number of tokens"));
    let lm = Lm::load(path, &LoadOptions::default()).unwrap();
    let tokens: Vec<u32> = (0..context as u32).map(|i| 1000 + i * 7919 % 20000).collect();

    println!("context {context}, {TIMED} tokens, median and quartiles in ms a token");
    let mut file = File::open(path).unwrap();
    let content = gguf_file::Content::read(&mut file).unwrap();
    let mut model = ModelWeights::from_gguf(content, &mut file, &Device::Cpu).unwrap();
    let input = |tokens: &[u32]| Tensor::new(tokens, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    let start = Instant::now();
    let mut logits = model.forward(&input(&tokens), 0).unwrap();
    let prefill = context as f64 / start.elapsed().as_secs_f64();
    let times = time(|i| {
        let token = logits.flatten_all().unwrap().argmax(0).unwrap().to_scalar::<u32>().unwrap();
        logits = model.forward(&input(&[token]), context + i).unwrap();
    });
    print("candle-transformers quantized_llama", prefill, &times);

    for policy in ["full".to_string(), format!("window:size={},sinks=4", context / 8 - 4)] {
        for dtype in [candle_core::DType::F32, candle_core::DType::F16] {
            let store = CpuConfig { dtype, ..CpuConfig::default() };
            let mut session = lm.session(Registry::standard().parse(&policy).unwrap(), &store).unwrap();
            let start = Instant::now();
            let mut logits = session.prefill(&tokens, true).unwrap();
            let prefill = context as f64 / start.elapsed().as_secs_f64();
            let times = time(|_| {
                let token = logits.argmax(0).unwrap().to_scalar::<u32>().unwrap();
                logits = session.decode(token).unwrap();
            });
            print(&format!("kvpolicy {policy} kv {}", dtype.as_str()), prefill, &times);
        }
    }
}

fn time(mut step: impl FnMut(usize)) -> Vec<f64> {
    let once = |i| {
        let start = Instant::now();
        step(i);
        start.elapsed().as_secs_f64() * 1e3
    };
    let mut times: Vec<f64> = (0..TIMED).map(once).collect();
    times.sort_by(f64::total_cmp);
    times
}

fn print(what: &str, prefill: f64, times: &[f64]) {
    let at = |share: usize| times[times.len() * share / 4];
    let decode = 1e3 / at(2);
    println!("{what:44} {:6.2} ({:.2}-{:.2})  {decode:6.1} tok/s  prefill {prefill:6.1} tok/s", at(2), at(1), at(3));
}
