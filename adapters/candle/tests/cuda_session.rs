//! Sessions with model and store on a GPU against the same sessions on the CPU. Skips, and says so, where there is no GPU.
#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used)]

#[path = "common/tiny.rs"]
mod tiny;

use candle_core::{DType, Device, quantized::GgmlDType};
use kvpolicy::{Error as CacheError, Registry, cuda_device};
use kvpolicy_candle::{Error, Lm, LoadOptions, Session, SessionOptions};
use serde_json::json;
use tempfile::TempDir;
use tiny::{HEADS, HIDDEN, Tiny};

fn gpu() -> Option<Device> {
    match cuda_device(0) {
        Ok(device) => Some(device),
        Err(error) => {
            println!("skipped: no GPU here ({})", error.to_string().lines().next().unwrap_or_default());
            None
        }
    }
}

/// Weights in f32, so that both devices compute the same but for the order of sums.
struct Bench {
    dir: TempDir,
}

impl Bench {
    fn new(arch: &'static str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let model = Tiny::new(arch, 2, HIDDEN / HEADS, true, json!({}));
        model.write_gguf(&dir.path().join("m.gguf"), GgmlDType::F32);
        Self { dir }
    }

    fn load(&self, device: &Device) -> Lm {
        Lm::load(self.dir.path().join("m.gguf").to_str().unwrap(), &LoadOptions::on(device.clone())).unwrap()
    }
}

fn session<'a>(lm: &'a Lm, policy: &str, options: &SessionOptions) -> Session<'a> {
    lm.session(Registry::standard().parse(policy).unwrap(), options).unwrap()
}

fn in_f32() -> SessionOptions {
    SessionOptions { kv_dtype: Some(DType::F32), ..SessionOptions::default() }
}

fn greedy(logits: &[f32]) -> u32 {
    (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap() as u32
}

/// ‖got − expected‖ against ‖expected‖; NaN never passes.
#[track_caller]
fn close(got: &[f32], expected: &[f32], tolerance: f64, what: &str) {
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|e| e * e).sum::<f64>().sqrt();
    let error = norm(&mut got.iter().zip(expected).map(|(&a, &b)| f64::from(a) - f64::from(b)));
    let size = norm(&mut expected.iter().map(|&e| f64::from(e)));
    assert!(got.len() == expected.len() && error <= tolerance * size, "{what}: off by {error:.3e} of {size:.3e}");
}

const POLICIES: [&str; 10] = [
    "full",
    "window:size=24,sinks=3",
    "random-gate:rate=0.5,window=16",
    "h2o:budget=40,recent=8",
    "tova:budget=25%",
    "snapkv:budget=40,window=8",
    "knorm:budget=40",
    "keydiff:budget=40",
    "adakv(knorm:budget=40)",
    "per-layer(0=full; rest=window:size=16)",
];

/// Two turns of prompt and answer: what is said, what it was said from, and what was held.
#[test]
fn sessions_say_the_same_as_on_the_cpu() {
    let Some(device) = gpu() else { return };
    for arch in ["llama", "qwen3"] {
        let bench = Bench::new(arch);
        let (here, there) = (bench.load(&Device::Cpu), bench.load(&device));
        for policy in POLICIES {
            let (mut cpu, mut gpu) = (session(&here, policy, &in_f32()), session(&there, policy, &in_f32()));
            for turn in 0..2u32 {
                let prompt: Vec<u32> = (0..150).map(|i| (i * 37 + turn * 11 + i * i % 91) % 256).collect();
                let (mut expected, mut got) =
                    (cpu.prefill(&prompt, true).unwrap(), gpu.prefill(&prompt, true).unwrap());
                for i in 0..24 {
                    let what = format!("{arch} {policy}, turn {turn}, token {i}");
                    let (ours, theirs): (Vec<f32>, Vec<f32>) = (got.to_vec1().unwrap(), expected.to_vec1().unwrap());
                    close(&ours, &theirs, 1e-4, &what);
                    let token = greedy(&theirs);
                    assert_eq!(greedy(&ours), token, "{what}");
                    assert_eq!(got.argmax(0).unwrap().to_scalar::<u32>().unwrap(), token, "{what}");
                    (expected, got) = (cpu.decode(token).unwrap(), gpu.decode(token).unwrap());
                }
            }
            let (expected, got) = (cpu.stats(), gpu.stats());
            let counts = |stats: &kvpolicy::Stats| (stats.sampled_steps, stats.written, stats.dense_peak_bytes);
            assert_eq!(counts(&got), counts(&expected), "{policy}");
            // When the dead are reclaimed is each store's own business.
            let off = (got.mean_live_entries / expected.mean_live_entries - 1.0).abs();
            assert!(off < 0.02, "{policy}: {} held, {} expected", got.mean_live_entries, expected.mean_live_entries);
            assert_eq!(got.evicted > 0, policy != "full", "{policy}");
        }
    }
}

/// What a GPU keeps by default: bf16, and no more memory than the session may take.
#[test]
fn a_session_reserves_what_it_may_take() {
    let Some(device) = gpu() else { return };
    let lm = Bench::new("llama").load(&device);
    let tokens = |max_tokens| SessionOptions { max_tokens: Some(max_tokens), ..SessionOptions::default() };
    let mut full = session(&lm, "full", &tokens(100));
    let usage = full.cache().usage();
    let entry = 2 * 2 * (HIDDEN / HEADS) as u64 + 8; // bf16 keys and values; position and mark, score
    assert_eq!(usage.bytes_reserved, 2 * 2 * 128 * entry, "100 tokens are 4 pages of 32, a head of a layer");
    full.prefill(&[65; 100], true).unwrap();
    assert!(!full.has_room());
    assert!(matches!(full.decode(65), Err(Error::Model(_))));
}

/// The store names what it dropped late; a session does not go on without it.
#[test]
fn a_session_that_runs_out_of_memory_says_so_at_once() {
    let Some(device) = gpu() else { return };
    let lm = Bench::new("llama").load(&device);
    let kv_bytes = Some(2 * 2 * 64 * (2 * 2 * (HIDDEN / HEADS) as u64 + 8)); // 64 tokens
    let small = SessionOptions { kv_bytes, ..SessionOptions::default() };
    let exhausted = |error| matches!(error, Error::Cache(CacheError::PoolExhausted { .. }));
    let mut full = session(&lm, "full", &small);
    full.prefill(&[65; 60], true).unwrap();
    for _ in 60..64 {
        full.decode(65).unwrap();
    }
    assert!(exhausted(full.decode(65).unwrap_err()), "the step that found no page returns the error");
    assert!(full.decode(65).is_err());
    assert!(exhausted(session(&lm, "full", &small).prefill(&[65; 65], true).unwrap_err()));
    let mut window = session(&lm, "window:size=20", &small);
    for _ in 0..100 {
        window.prefill(&[65; 4], false).unwrap();
    }
}
