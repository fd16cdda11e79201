//! The CUDA backend against the CPU backend, which is its specification. Without a GPU every test says so and passes.

#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
mod cuda {
    mod forks;
}

use candle_core::{DType, Device, Tensor};
use common::{
    DECODE, LAST, LayerData, MORE, Move, Rng, Stream, Work, complete, gather, gpu, life,
    play::{Play, store},
    policies::EVERY_POLICY,
    policy, weave,
};
use kvpolicy::{CudaConfig, Error, Held, KvCache, LayerCx, ModelSpec, Needs, Phase, Policy, Score, SeqId, When, cuda};
use std::sync::{Arc, Mutex};

fn config(page_size: usize, dtype: DType) -> CudaConfig {
    CudaConfig { page_size, limit_bytes: Some(64 << 20), dtype, max_sequences: 8, max_entries: 1 << 14 }
}

fn on_gpu(device: &Device, spec: &ModelSpec, policy: Arc<dyn Policy>, config: &CudaConfig) -> Play {
    Play::on(cuda(spec, config, device).unwrap(), spec, policy)
}

/// What kernels are given for a store of this type.
fn rounded(stream: &Stream, dtype: DType) -> Stream {
    let dtype = if dtype.size_in_bytes() == 1 { DType::BF16 } else { dtype };
    Stream { layers: stream.layers.iter().map(|data| data.rounded(dtype)).collect(), tokens: stream.tokens }
}

/// The largest difference of two outputs; infinity for one that is no number.
fn apart(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, |most, x| {
        if x <= most {
            most
        } else if x.is_nan() {
            f32::INFINITY
        } else {
            x
        }
    })
}

/// Both backends through the same script; rows are compared every few steps and at the end.
fn same_lives(cpu: &mut Play, gpu: &mut Play, script: &[Work], tolerance: f32, rows: bool, what: &str) {
    for (i, work) in script.iter().enumerate() {
        assert!(cpu.step(work).is_empty() && gpu.step(work).is_empty(), "{what}: step {i}");
        if i % 7 == 6 || i + 1 == script.len() {
            for who in 0..cpu.actors.len() {
                let (want, got) = (cpu.rows(who), gpu.rows(who));
                if rows {
                    assert_eq!(got, want, "{what}: rows of {who} after step {i} {work:?}");
                } else {
                    let lens = |rows: &[Vec<usize>]| rows.iter().map(Vec::len).collect::<Vec<_>>();
                    assert_eq!(lens(&got), lens(&want), "{what}: row lengths of {who} after step {i}");
                }
            }
        }
    }
    for (who, (cpu, gpu)) in cpu.actors.iter().zip(&gpu.actors).enumerate() {
        for (layer, (want, got)) in cpu.y.iter().zip(&gpu.y).enumerate() {
            let off = apart(got, want);
            assert!(off <= tolerance, "{what}: sequence {who}, layer {layer} is off by {off}");
        }
    }
}

/// Several sequences in random chunks, decode and further turns.
fn lives(seed: u64, lens: &[usize], longest: usize) -> Vec<Work> {
    let mut rng = Rng(seed);
    let lives = lens.iter().map(|&len| life(&mut rng, len, longest)).collect();
    weave(&mut rng, lives)
}

fn streams(spec: &ModelSpec, lens: &[usize], dtype: DType) -> Vec<Stream> {
    lens.iter().enumerate().map(|(i, &len)| rounded(&Stream::random(spec, len, 100 + i as u64), dtype)).collect()
}

#[allow(clippy::too_many_arguments)] // the axes of one comparison
fn run_both(
    device: &Device,
    spec: &ModelSpec,
    text: &str,
    config: &CudaConfig,
    lens: &[usize],
    longest: usize,
    tolerance: f32,
    rows: bool,
) {
    let streams = streams(spec, lens, config.dtype);
    let mut cpu = Play::on(store(spec, 16, config.dtype), spec, policy(text)).with(&streams);
    let mut gpu = on_gpu(device, spec, policy(text), config).with(&streams);
    let what = format!("{text}, pages of {}, {:?}, head_dim {}", config.page_size, config.dtype, spec.head_dim);
    same_lives(&mut cpu, &mut gpu, &lives(config.page_size as u64, lens, longest), tolerance, rows, &what);
}

#[test]
fn every_policy_does_what_it_does_on_the_cpu() {
    let Some(device) = gpu() else { return };
    let spec = complete(3, 4, 2, 16);
    for text in EVERY_POLICY {
        for page_size in [16, 32] {
            run_both(&device, &spec, text, &config(page_size, DType::F32), &[85, 130, 30], 40, 5e-5, true);
        }
    }
}

/// Policies whose sets do not depend on the rounding of a score.
const MARKING: [&str; 4] = ["full", "window:size=40,sinks=3", "random-gate:rate=0.7,window=20", "dms:window=9"];

#[test]
fn tensor_cores_agree_for_every_head_size_and_group() {
    let Some(device) = gpu() else { return };
    for (head_dim, q_heads, kv_heads) in
        [(64, 8, 2), (64, 3, 3), (80, 5, 1), (96, 12, 2), (128, 12, 2), (128, 16, 1), (256, 4, 2), (64, 40, 2)]
    {
        let spec = complete(2, q_heads, kv_heads, head_dim);
        for (dtype, page_size) in
            [(DType::BF16, 16), (DType::F16, 64), (DType::BF16, 32), (DType::F8E4M3, 32), (DType::U8, 16)]
        {
            for text in MARKING {
                let tolerance = if dtype == DType::F16 { 4e-3 } else { 2e-2 };
                run_both(&device, &spec, text, &config(page_size, dtype), &[150, 300, 17, 65], 90, tolerance, true);
            }
        }
    }
}

#[test]
fn ranking_policies_keep_as_many_in_half_precision() {
    let Some(device) = gpu() else { return };
    let spec = complete(2, 8, 2, 64);
    for text in EVERY_POLICY.iter().filter(|text| !text.contains("adakv")) {
        // Which entries stay may turn on a rounding, and then outputs differ: lengths are what both must agree on.
        for dtype in [DType::BF16, DType::F8E4M3, DType::U8] {
            run_both(&device, &spec, text, &config(32, dtype), &[120, 200], 60, f32::MAX, false);
        }
    }
}

#[test]
fn rows_of_every_odd_length() {
    let Some(device) = gpu() else { return };
    let spec = complete(1, 8, 2, 64);
    for page_size in [16, 32, 64, 128] {
        let lens: Vec<usize> = vec![1, page_size - 1, page_size, page_size + 1, 2 * page_size, 255, 257];
        for dtype in [DType::BF16, DType::F32, DType::F8E4M3, DType::U8] {
            let streams = streams(&spec, &lens, dtype);
            let mut cpu = Play::on(store(&spec, 16, dtype), &spec, policy("full")).with(&streams);
            let mut gpu = on_gpu(&device, &spec, policy("full"), &config(page_size, dtype)).with(&streams);
            let prompts = lens.iter().enumerate().filter(|(_, len)| **len > 1).map(|(i, len)| (i, len - 1, LAST));
            let decode = (0..lens.len()).map(|i| (i, 1, DECODE)).collect();
            let tolerance = if dtype == DType::F32 { 5e-5 } else { 2e-2 };
            let what = format!("pages of {page_size}, {dtype:?}");
            same_lives(&mut cpu, &mut gpu, &[prompts.collect(), decode], tolerance, true, &what);
        }
    }
}

/// Without tensor cores.
#[test]
fn codes_of_heads_of_any_size() {
    let Some(device) = gpu() else { return };
    for head_dim in [16, 20, 72] {
        let spec = complete(2, 4, 2, head_dim);
        for text in MARKING {
            for dtype in [DType::F8E4M3, DType::U8] {
                run_both(&device, &spec, text, &config(16, dtype), &[85, 130, 30], 40, 2e-2, true);
            }
        }
    }
}

/// What a policy saw at each trim: keys, values and carried scores.
type Seen = Vec<[Vec<f32>; 3]>;

/// Keeps everything and writes down what it sees.
#[derive(Debug, Default)]
struct Witness {
    seen: Mutex<Seen>,
}

impl std::fmt::Display for Witness {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("witness")
    }
}

impl Policy for Witness {
    fn needs(&self, _: &LayerCx) -> Needs {
        Needs { attn_mass: Some(0.9), ..Needs::default() }
    }
    fn when(&self, _: &LayerCx) -> When {
        When::ALWAYS
    }
    fn score(&self, _: &LayerCx, held: &dyn Held) -> kvpolicy::Result<Score> {
        let flat = |tensor: Tensor| -> kvpolicy::Result<Vec<f32>> { Ok(tensor.flatten_all()?.to_vec1()?) };
        let seen = [flat(held.keys()?)?, flat(held.values()?)?, flat(held.scores()?)?];
        self.seen.lock().unwrap().push(seen);
        Ok(Score::Carried)
    }
}

#[test]
fn what_a_policy_sees_is_what_it_sees_on_the_cpu() {
    let Some(device) = gpu() else { return };
    for (dtype, head_dim, tolerance) in [
        (DType::F32, 16, 1e-4),
        (DType::F8E4M3, 16, 1e-2),
        (DType::BF16, 64, 1e-2),
        (DType::F8E4M3, 64, 1e-2),
        (DType::F8E4M3, 80, 1e-2),
        (DType::F8E4M3, 128, 1e-2),
        (DType::U8, 16, 1e-2),
        (DType::U8, 64, 1e-2),
        (DType::U8, 96, 1e-2),
    ] {
        let spec = complete(2, 6, 2, head_dim);
        let streams = streams(&spec, &[150, 70], dtype);
        let script = lives(7, &[150, 70], 60);
        let witness = |backend| {
            let policy = Arc::new(Witness::default());
            let mut play = Play::on(backend, &spec, policy.clone()).with(&streams);
            play.run(&script);
            std::mem::take(&mut *policy.seen.lock().unwrap())
        };
        let want = witness(store(&spec, 16, dtype));
        let got = witness(cuda(&spec, &config(32, dtype), &device).unwrap());
        assert_eq!(got.len(), want.len());
        for (step, (got, want)) in got.iter().zip(&want).enumerate() {
            let what = format!("{dtype:?}, head_dim {head_dim}, trim {step}");
            assert!(got[0] == want[0] && got[1] == want[1], "{what}: keys or values differ");
            let off = got[2].iter().zip(&want[2]).map(|(a, b)| (a - b).abs() / b.abs().max(0.1)).fold(0.0, f32::max);
            assert!(off <= tolerance, "{what}: scores are off by {off}");
        }
    }
}

#[test]
fn many_sequences_decode_together() {
    let Some(device) = gpu() else { return };
    let spec = complete(2, 8, 2, 64);
    let lens: Vec<usize> = (0..40).map(|i| 30 + 7 * i).collect();
    let config = CudaConfig { max_sequences: 40, ..config(32, DType::BF16) };
    for (text, dtype) in [
        ("full", DType::BF16),
        ("random-gate:rate=0.8,window=16", DType::BF16),
        ("random-gate:rate=0.8,window=16", DType::F8E4M3),
    ] {
        let streams = streams(&spec, &lens, dtype);
        let config = CudaConfig { dtype, ..config.clone() };
        let mut cpu = Play::on(store(&spec, 16, dtype), &spec, policy(text)).with(&streams);
        let mut gpu = on_gpu(&device, &spec, policy(text), &config).with(&streams);
        let mut script: Vec<Work> = vec![lens.iter().enumerate().map(|(i, len)| (i, len - 20, LAST)).collect()];
        script.extend((0..20).map(|_| (0..lens.len()).map(|i| (i, 1, DECODE)).collect::<Work>()));
        same_lives(&mut cpu, &mut gpu, &script, 2e-2, true, text);
    }
}

/// One seat, and prompts around the size of what is kept for a step.
#[test]
fn one_sequence_with_the_shortest_prompts() {
    let Some(device) = gpu() else { return };
    let spec = complete(2, 8, 2, 64);
    let config = CudaConfig { max_sequences: 1, ..config(16, DType::BF16) };
    for text in ["h2o:budget=12,recent=4", "tova:budget=11", "full"] {
        for prompt in 1..7 {
            let streams = streams(&spec, &[prompt + 20], DType::BF16);
            let mut cpu = Play::on(store(&spec, 16, DType::BF16), &spec, policy(text)).with(&streams);
            let mut gpu = on_gpu(&device, &spec, policy(text), &config).with(&streams);
            let mut script: Vec<Work> = vec![vec![(0, prompt, LAST)]];
            script.extend(vec![vec![(0, 1, DECODE)]; 20]);
            let tolerance = if text == "full" { 2e-2 } else { f32::MAX };
            same_lives(&mut cpu, &mut gpu, &script, tolerance, false, &format!("{text}, a prompt of {prompt}"));
        }
    }
}

/// Page size and neighbours never change a kept set; outputs up to the order of sums.
#[test]
fn page_size_and_chunks_never_matter() {
    let Some(device) = gpu() else { return };
    let spec = complete(2, 8, 2, 64);
    let stream = rounded(&Stream::random(&spec, 200, 5), DType::BF16);
    for text in MARKING {
        let run = |page_size, moves: Vec<Move>| {
            let mut play = on_gpu(&device, &spec, policy(text), &config(page_size, DType::BF16))
                .with(std::slice::from_ref(&stream));
            let script: Vec<Work> = moves.into_iter().map(|(len, phase)| vec![(0, len, phase)]).collect();
            play.run(&script);
            (play.rows(0), play.actors[0].y.concat())
        };
        let decode = vec![(1, DECODE); 20];
        let want = run(32, [vec![(180, LAST)], decode.clone()].concat());
        for (page_size, chunks) in [
            (16, vec![(180, LAST)]),
            (64, vec![(100, MORE), (80, LAST)]),
            (128, vec![(1, MORE); 179].into_iter().chain([(1, LAST)]).collect()),
        ] {
            let got = run(page_size, [chunks, decode.clone()].concat());
            assert_eq!(got.0, want.0, "{text}, pages of {page_size}");
            let off = apart(&got.1, &want.1);
            assert!(off <= 2e-2, "{text}, pages of {page_size}: off by {off}");
        }
    }
}

#[test]
fn the_sequence_without_room_is_dropped_and_the_others_do_not_notice() {
    let Some(device) = gpu() else { return };
    let spec = complete(3, 4, 2, 64);
    let page_bytes = 16 * (2 * 64 * 2 + 8);
    for text in ["full", "window:size=9", "h2o:budget=12,recent=4"] {
        let small = streams(&spec, &[40, 40], DType::BF16);
        let large = rounded(&Stream::random(&spec, 400, 9), DType::BF16);
        let steps = |large_at: Option<(usize, usize)>| -> Vec<Work> {
            let mut steps: Vec<Work> = vec![vec![(0, 20, LAST), (1, 9, LAST)]];
            steps.extend((0..20).map(|_| vec![(0, 1, DECODE), (1, 1, DECODE)]));
            if let Some((step, place)) = large_at {
                steps[step].insert(place, (2, 400, MORE));
            }
            steps
        };
        let roomy = config(16, DType::BF16);
        let mut alone = on_gpu(&device, &spec, policy(text), &roomy).with(&small);
        alone.run(&steps(None));
        for (step, place) in [(0, 0), (0, 2), (3, 1)] {
            let tight = CudaConfig { limit_bytes: Some(40 * page_bytes), ..roomy.clone() };
            let mut play = on_gpu(&device, &spec, policy(text), &tight).with(&small).with(std::slice::from_ref(&large));
            let seq = play.actors[2].seq;
            for (i, work) in steps(Some((step, place))).iter().enumerate() {
                let mut failures = play.step(work);
                failures.extend(play.cache.wait().unwrap());
                if i == step {
                    assert!(
                        matches!(&failures[..], [(who, Error::PoolExhausted { seq: named, .. })] if *who == seq && *named == seq),
                        "{text}: {failures:?}"
                    );
                    assert!(play.rows(2).iter().all(Vec::is_empty), "{text}");
                    assert!(play.cache.begin(&[(seq, 1, DECODE)]).is_err(), "{text}: it may go on");
                } else {
                    assert!(failures.is_empty(), "{text}: {failures:?}");
                }
            }
            for who in 0..2 {
                assert_eq!(play.rows(who), alone.rows(who), "{text}: rows of {who}");
                for (got, want) in play.actors[who].y.iter().zip(&alone.actors[who].y) {
                    assert!(apart(got, want) <= 1e-2, "{text}: outputs of {who}");
                }
            }
            assert!(play.cache.wait().unwrap().is_empty());
            let usage = play.cache.usage();
            assert!(
                usage.bytes_peak <= usage.bytes_limit.unwrap() && usage.bytes_reserved <= usage.bytes_limit.unwrap()
            );
            (0..3).for_each(|who| play.release(who));
            assert!(play.cache.wait().unwrap().is_empty());
            let usage = play.cache.usage();
            assert_eq!((usage.pages_in_use, usage.live_entries), (0, 0), "{text}");
        }
    }
}

/// A decode step that finds no page: the host learns of it late, or at once if it asks.
#[test]
fn decode_that_runs_out_is_told_when_asked() {
    let Some(device) = gpu() else { return };
    let spec = complete(3, 4, 2, 64);
    let page_bytes = 16 * (2 * 64 * 2 + 8);
    let tight = CudaConfig { limit_bytes: Some(6 * page_bytes), ..config(16, DType::BF16) };
    let mut play = on_gpu(&device, &spec, policy("full"), &tight).with(&streams(&spec, &[40], DType::BF16));
    assert!(play.step(&[(0, 10, LAST)]).is_empty());
    let mut failures = vec![];
    let mut decoded = 0;
    while failures.is_empty() && decoded < 12 {
        failures = play.step(&[(0, 1, DECODE)]);
        decoded += 1;
        if failures.is_empty() && decoded == 7 {
            failures = play.cache.wait().unwrap();
        }
    }
    let [(_, Error::PoolExhausted { position, .. })] = &failures[..] else { panic!("{failures:?}") };
    assert_eq!(*position, 16);
    assert!(play.rows(0).iter().all(Vec::is_empty));
}

#[test]
fn what_the_store_says_it_holds_equals_a_recount() {
    let Some(device) = gpu() else { return };
    let spec = complete(2, 4, 2, 64);
    for text in
        ["full", "window:size=9", "h2o:budget=12,recent=4", "adakv(knorm:budget=10)", "random-gate:rate=0.6,window=6"]
    {
        let lens = [90, 60, 110];
        let mut play =
            on_gpu(&device, &spec, policy(text), &config(16, DType::BF16)).with(&streams(&spec, &lens, DType::BF16));
        play.run(&lives(3, &lens, 30));
        assert!(play.cache.wait().unwrap().is_empty());
        let rows: Vec<Vec<usize>> = (0..3).flat_map(|who| play.rows(who)).collect();
        let (live, pages): (usize, usize) =
            rows.iter().fold((0, 0), |(l, p), row| (l + row.len(), p + row.len().div_ceil(16)));
        let usage = play.cache.usage();
        assert_eq!(usage.live_entries as usize, live, "{text}");
        assert_eq!(usage.pages_in_use as usize, pages, "{text}");
        assert_eq!(usage.written as usize, lens.iter().sum::<usize>() * 4, "{text}");
        assert_eq!((usage.written - usage.evicted) as usize, live, "{text}");
    }
}

/// The tensors of one decode step at addresses that do not change.
struct Inputs {
    q: Tensor,
    k: Tensor,
    v: Tensor,
}

impl Inputs {
    fn new(spec: &ModelSpec, sequences: usize, device: &Device) -> Vec<Self> {
        let zeros = |heads| Tensor::zeros((sequences, heads, spec.head_dim), DType::BF16, device).unwrap();
        (0..spec.layers)
            .map(|_| Self { q: zeros(spec.q_heads), k: zeros(spec.kv_heads), v: zeros(spec.kv_heads) })
            .collect()
    }

    fn fill(&self, data: &[&LayerData], at: &[usize], spec: &ModelSpec) {
        let cut = |field: fn(&LayerData) -> &[f32], heads| {
            let parts: Vec<_> = data.iter().zip(at).map(|(data, &at)| (field(data), at..at + 1)).collect();
            gather(&parts, heads, spec.head_dim).to_dtype(DType::BF16).unwrap()
        };
        let set = |to: &Tensor, from: Tensor| to.slice_set(&from.to_device(to.device()).unwrap(), 0, 0).unwrap();
        set(&self.q, cut(|data| &data.q, spec.q_heads));
        set(&self.k, cut(|data| &data.k, spec.kv_heads));
        set(&self.v, cut(|data| &data.v, spec.kv_heads));
    }
}

/// A whole decode step is recorded once and replayed while pages are taken and entries die; each output equals the
/// eager one.
#[test]
fn a_recorded_step_replays() {
    let Some(device) = gpu() else { return };
    let spec = complete(3, 8, 2, 64);
    for text in [
        "full",
        "window:size=40,sinks=2",
        "random-gate:rate=0.7,window=20",
        "h2o:budget=24,recent=8",
        "random:budget=30",
        "adakv(h2o:budget=24,recent=8)",
        "tova:budget=20",
        "snapkv:budget=30,window=8",
    ] {
        let policy = policy(text);
        let (prompt, steps) = (50, 200);
        let streams = streams(&spec, &[prompt + steps, prompt + steps], DType::BF16);
        let config = config(16, DType::BF16);
        let mut eager = on_gpu(&device, &spec, policy.clone(), &config).with(&streams);
        let mut cache = KvCache::new(spec.clone(), policy, cuda(&spec, &config, &device).unwrap()).unwrap();
        let seqs: Vec<SeqId> = streams.iter().map(|_| cache.open()).collect();
        let work =
            |len, phase: Phase| -> Vec<(SeqId, usize, Phase)> { seqs.iter().map(|&seq| (seq, len, phase)).collect() };

        eager.run(&[vec![(0, prompt, LAST), (1, prompt, LAST)]]);
        let step = cache.begin(&work(prompt, LAST)).unwrap();
        for layer in 0..spec.layers {
            let new = eager_tokens(&spec, &streams, layer, prompt, &device);
            cache.attend(layer, &step, &step.tokens(new.q, new.k, new.v, None)).unwrap();
        }
        assert!(cache.end(step).is_empty());

        let inputs = Inputs::new(&spec, 2, &device);
        let fill = |at: usize| {
            for (layer, inputs) in inputs.iter().enumerate() {
                let data: Vec<&LayerData> = streams.iter().map(|stream| &stream.layers[layer]).collect();
                inputs.fill(&data, &[at, at], &spec);
            }
        };
        let forward = |step: &kvpolicy::Step, cache: &mut KvCache| -> kvpolicy::Result<Vec<Tensor>> {
            let layers = inputs.iter().enumerate();
            layers
                .map(|(layer, i)| cache.attend(layer, step, &step.tokens(i.q.clone(), i.k.clone(), i.v.clone(), None)))
                .collect()
        };
        for at in prompt..prompt + 2 {
            fill(at);
            let step = cache.begin(&work(1, DECODE)).unwrap();
            forward(&step, &mut cache).unwrap();
            assert!(cache.end(step).is_empty());
            eager.run(&[vec![(0, 1, DECODE), (1, 1, DECODE)]]);
        }
        fill(prompt + 2);
        let (graph, outputs) = cache.capture(&seqs, forward).unwrap_or_else(|error| panic!("{text}: {error}"));
        for at in prompt + 2..prompt + steps {
            if at > prompt + 2 {
                fill(at);
                assert!(cache.replay(&graph).unwrap().is_empty());
            }
            eager.run(&[vec![(0, 1, DECODE), (1, 1, DECODE)]]);
            for (layer, y) in outputs.iter().enumerate() {
                let y: Vec<f32> = y.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap();
                let width = spec.q_heads * spec.head_dim;
                let want: Vec<f32> = eager
                    .actors
                    .iter()
                    .flat_map(|actor| &actor.y[layer][at * width..(at + 1) * width])
                    .copied()
                    .collect();
                let off = apart(&y, &want);
                assert!(off <= 1e-2, "{text}: token {at}, layer {layer} is off by {off}");
            }
        }
        for (who, &seq) in seqs.iter().enumerate() {
            for layer in 0..spec.layers {
                for head in 0..spec.kv_heads {
                    let held: Vec<usize> =
                        cache.held_positions(layer, seq, head).into_iter().map(|pos| pos as usize).collect();
                    assert_eq!(held, eager.held(who, layer, head), "{text}: layer {layer}, head {head} of {who}");
                }
            }
        }
    }
}

fn eager_tokens(spec: &ModelSpec, streams: &[Stream], layer: usize, len: usize, device: &Device) -> Inputs {
    let cut = |field: fn(&LayerData) -> &[f32], heads| {
        let parts: Vec<_> = streams.iter().map(|stream| (field(&stream.layers[layer]), 0..len)).collect();
        gather(&parts, heads, spec.head_dim).to_dtype(DType::BF16).unwrap().to_device(device).unwrap()
    };
    Inputs {
        q: cut(|data| &data.q, spec.q_heads),
        k: cut(|data| &data.k, spec.kv_heads),
        v: cut(|data| &data.v, spec.kv_heads),
    }
}

#[test]
fn policies_that_a_graph_cannot_replay_are_refused() {
    let Some(device) = gpu() else { return };
    let spec = complete(2, 8, 2, 64);
    for (text, reason) in [
        ("every(3, knorm:budget=10)", "every 3 steps"),
        ("h2o:budget=40%,recent=2", "grows with the tokens"),
        ("expected-attention:budget=12,sinks=2,future=16", "moments of the queries"),
    ] {
        let mut cache =
            KvCache::new(spec.clone(), policy(text), cuda(&spec, &config(16, DType::BF16), &device).unwrap()).unwrap();
        let seq = cache.open();
        let captured = cache.capture(&[seq], |_, _| -> kvpolicy::Result<()> { Ok(()) });
        let error = captured.err().unwrap().to_string();
        assert!(error.contains(reason), "{text}: {error}");
    }
}

#[test]
fn configurations_that_make_no_sense_are_refused() {
    let Some(device) = gpu() else { return };
    let spec = complete(2, 8, 2, 64);
    let good = config(16, DType::BF16);
    for (config, reason) in [
        (CudaConfig { page_size: 24, ..good.clone() }, "page_size=24"),
        (CudaConfig { dtype: DType::U32, ..good.clone() }, "U32"),
        (CudaConfig { limit_bytes: Some(100), ..good.clone() }, "100 bytes"),
        (CudaConfig { max_sequences: 0, ..good.clone() }, "max_sequences=0"),
        (CudaConfig { max_entries: 0, ..good.clone() }, "max_entries=0"),
    ] {
        let error = cuda(&spec, &config, &device).err().unwrap().to_string();
        assert!(error.contains(reason), "{error}");
    }
    assert!(cuda(&spec, &good, &Device::Cpu).is_err());
    // One more sequence than there are seats.
    let one = CudaConfig { max_sequences: 1, ..good };
    let mut cache = KvCache::new(spec.clone(), policy("full"), cuda(&spec, &one, &device).unwrap()).unwrap();
    let (a, b) = (cache.open(), cache.open());
    let step = cache.begin(&[(a, 1, LAST)]).unwrap();
    cache.abort(step);
    cache.release(a);
    cache.begin(&[(b, 1, LAST)]).unwrap();
    let c = cache.open();
    assert!(cache.begin(&[(c, 1, LAST)]).unwrap_err().to_string().contains("max_sequences=1"));
}
