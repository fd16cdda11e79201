//! What the suites share: random inputs, a driver of the cache, and oracles written another way than the code.

#![allow(dead_code)] // each suite uses a part of it

pub(crate) mod dense;
pub(crate) mod lazy;
pub(crate) mod lists;
pub(crate) mod play;
pub(crate) mod policies;

use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use kvpolicy::{GateSpec, KeyRange, Lag, ModelSpec, PerGate, Phase, Policy, Registry, Rope, RopeLayout};
use proptest::test_runner::{Config, RngSeed};
use std::{ops::Range, sync::Arc};

pub(crate) const MORE: Phase = Phase::Prefill { last: false };
pub(crate) const LAST: Phase = Phase::Prefill { last: true };
pub(crate) const DECODE: Phase = Phase::Decode;

/// SplitMix64.
#[derive(Debug, Clone)]
pub(crate) struct Rng(pub(crate) u64);

impl Rng {
    pub(crate) fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// In `0..n`.
    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.draw() % n as u64) as usize
    }

    pub(crate) fn chance(&mut self, p: f64) -> bool {
        ((self.draw() >> 11) as f64) < p * (1u64 << 53) as f64
    }

    /// In (-2, 2): the logits of a head of any size then spread by about 1.3.
    pub(crate) fn number(&mut self) -> f32 {
        ((self.draw() >> 40) as f32 / (1u32 << 24) as f32 - 0.5) * 4.0
    }

    pub(crate) fn numbers(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.number()).collect()
    }

    pub(crate) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }
}

/// `cases` cases, the same ones in every run: what one machine proves, the next must not lose to luck.
/// `PROPTEST_CASES` and `PROPTEST_RNG_SEED` look further.
pub(crate) fn cases(cases: u32) -> Config {
    let default = Config::default();
    let rng_seed = if default.rng_seed == RngSeed::Random { RngSeed::Fixed(20_251_123) } else { default.rng_seed };
    let cases = if std::env::var_os("PROPTEST_CASES").is_some() { default.cases } else { cases };
    Config { cases, rng_seed, failure_persistence: None, max_global_rejects: cases, ..default }
}

pub(crate) fn policy(text: &str) -> Arc<dyn Policy> {
    Registry::standard().parse(text).unwrap()
}

/// Keys whose components differ up to 64-fold in size, or so a store is told.
pub(crate) fn uneven_keys(layers: usize, kv_heads: usize, head_dim: usize) -> KeyRange {
    let largest = (0..layers * kv_heads * head_dim).map(|i| 2f32.powi((i * 5 % 7) as i32 - 3));
    KeyRange::of_largest(&largest.collect::<Vec<_>>())
}

/// A model with RoPE and gates, so that it can run every policy.
pub(crate) fn complete(layers: usize, q_heads: usize, kv_heads: usize, head_dim: usize) -> ModelSpec {
    let inv_freq = (0..head_dim / 2).map(|i| 10_000f32.powf(-2.0 * i as f32 / head_dim as f32)).collect();
    ModelSpec {
        rope: Some(Rope { inv_freq, layout: RopeLayout::HalfSplit }),
        gates: Some(GateSpec { window: 6, lag: Lag::Previous, per: PerGate::Head, disable: false }),
        key_range: Some(uneven_keys(layers, kv_heads, head_dim)),
        ..ModelSpec::new(layers, q_heads, kv_heads, head_dim)
    }
}

/// What one layer is given over the whole life of a sequence.
#[derive(Debug, Clone)]
pub(crate) struct LayerData {
    pub(crate) q: Vec<f32>,      // [tokens, q_heads, head_dim]
    pub(crate) k: Vec<f32>,      // [tokens, kv_heads, head_dim]
    pub(crate) v: Vec<f32>,      // [tokens, kv_heads, head_dim]
    pub(crate) logits: Vec<f32>, // [tokens, kv_heads], multiples of 0.5 so that thresholds are met exactly
}

impl LayerData {
    fn random(spec: &ModelSpec, tokens: usize, rng: &mut Rng) -> Self {
        let (query, key) = (tokens * spec.q_heads * spec.head_dim, tokens * spec.kv_heads * spec.head_dim);
        let (q, k, v) = (rng.numbers(query), rng.numbers(key), rng.numbers(key));
        let logits = (0..tokens * spec.kv_heads).map(|_| (rng.below(9) as f32 - 4.0) / 2.0).collect();
        Self { q, k, v, logits }
    }

    /// Keys and values of a layer as a store of this type gives them back.
    pub(crate) fn stored_as(&self, dtype: DType, spec: &ModelSpec, layer: usize) -> Self {
        let stored = |x: &[f32]| -> Vec<f32> { x.chunks(spec.head_dim).flat_map(|x| stored(x, dtype)).collect() };
        let eight_bits = dtype.size_in_bytes() == 1;
        let factors = spec.key_range.as_ref().filter(|_| eight_bits).map(|range| range.factors());
        let all = spec.kv_heads * spec.head_dim;
        let factor = |i: usize| factors.as_ref().map_or(1.0, |factors| factors[layer * all + i % all]);
        let divided: Vec<f32> = self.k.iter().enumerate().map(|(i, k)| k / factor(i)).collect();
        let k = stored(&divided).iter().enumerate().map(|(i, k)| k * factor(i)).collect();
        Self { k, v: stored(&self.v), ..self.clone() }
    }

    /// Queries, too, in this type: what a backend that computes in it is given.
    pub(crate) fn rounded(&self, dtype: DType) -> Self {
        let rounded = |x: &[f32]| stored(x, dtype);
        Self { q: rounded(&self.q), k: rounded(&self.k), v: rounded(&self.v), ..self.clone() }
    }
}

/// A vector as a store of this type gives it back. The 8-bit types from their definitions: the nearest of all numbers
/// there are, times a factor that depends on the largest component.
fn stored(vector: &[f32], dtype: DType) -> Vec<f32> {
    let largest = vector.iter().fold(0f32, |most, x| most.max(x.abs()));
    let round = |x: &f32| match dtype {
        DType::F16 => f16::from_f32(*x).to_f32(),
        DType::BF16 => bf16::from_f32(*x).to_f32(),
        DType::F8E4M3 if largest > 0.0 => {
            let factor = (-60..60).map(|e| 2f32.powi(e)).find(|factor| largest / factor <= 448.0).unwrap();
            factor * nearest_e4m3(x / factor)
        }
        DType::U8 if largest > 0.0 => {
            let factor = (-60..60).map(|e| 2f32.powi(e)).find(|factor| largest / factor <= 127.0).unwrap();
            factor * (x / factor).round_ties_even()
        }
        _ => *x,
    };
    vector.iter().map(round).collect()
}

/// Of 1, 1 1/8, .., 1 7/8 times 2^-6 to 2^8 and the eighths of 2^-6 below; of two equally near ones the even.
fn nearest_e4m3(x: f32) -> f32 {
    let normal = (-6..=8).flat_map(|e| (8..16).map(move |m| m as f32 / 8.0 * 2f32.powi(e)));
    let all: Vec<f32> = (0..8).map(|m| m as f32 / 8.0 * 2f32.powi(-6)).chain(normal).collect();
    let distance = |i: usize| (all[i] - x.abs()).abs();
    let best = (0..all.len()).min_by(|&a, &b| distance(a).total_cmp(&distance(b)).then((a % 2).cmp(&(b % 2)))).unwrap();
    all[best].copysign(x)
}

/// What a model computes for one sequence: every layer's tokens, known in advance.
#[derive(Debug, Clone)]
pub(crate) struct Stream {
    pub(crate) layers: Vec<LayerData>,
    pub(crate) tokens: usize,
}

impl Stream {
    pub(crate) fn random(spec: &ModelSpec, tokens: usize, seed: u64) -> Self {
        let mut rng = Rng(seed);
        Self { layers: (0..spec.layers).map(|_| LayerData::random(spec, tokens, &mut rng)).collect(), tokens }
    }

    /// The first `at` tokens of this and then those of `other`.
    pub(crate) fn until(&self, at: usize, other: &Self) -> Self {
        let splice =
            |a: &[f32], b: &[f32]| [&a[..a.len() / self.tokens * at], &b[b.len() / other.tokens * at..]].concat();
        let layers = self.layers.iter().zip(&other.layers).map(|(a, b)| LayerData {
            q: splice(&a.q, &b.q),
            k: splice(&a.k, &b.k),
            v: splice(&a.v, &b.v),
            logits: splice(&a.logits, &b.logits),
        });
        Self { layers: layers.collect(), tokens: other.tokens }
    }
}

/// `rows` of a `[tokens, heads, width]` array, several ranges laid end to end.
pub(crate) fn gather(parts: &[(&[f32], Range<usize>)], heads: usize, width: usize) -> Tensor {
    let size = heads * width;
    let data: Vec<f32> =
        parts.iter().flat_map(|(all, range)| all[range.start * size..range.end * size].iter().copied()).collect();
    let shape = (data.len() / size, heads, width);
    Tensor::from_vec(data, shape, &Device::Cpu).unwrap()
}

/// A step of one sequence.
pub(crate) type Move = (usize, Phase);
/// A step of several sequences, by index.
pub(crate) type Work = Vec<(usize, usize, Phase)>;

/// A random life of `tokens` tokens: prompts in chunks of up to `longest`, decode, further turns.
pub(crate) fn life(rng: &mut Rng, tokens: usize, longest: usize) -> Vec<Move> {
    let (mut moves, mut left) = (vec![], tokens);
    while left > 0 {
        let turn = (1 + rng.below(3 * longest)).min(left);
        moves.extend(chunks(rng, turn, longest));
        left -= turn;
        let decoded = rng.below(8).min(left);
        moves.extend((0..decoded).map(|_| (1, DECODE)));
        left -= decoded;
    }
    moves
}

/// A prompt in random chunks of up to `longest`.
pub(crate) fn chunks(rng: &mut Rng, tokens: usize, longest: usize) -> Vec<Move> {
    let (mut moves, mut left) = (vec![], tokens);
    while left > 0 {
        let len = (1 + rng.below(longest)).min(left);
        left -= len;
        moves.push((len, if left == 0 { LAST } else { MORE }));
    }
    moves
}

/// The lives of several sequences woven together: each step takes the next move of a random choice of them, in a random
/// order.
pub(crate) fn weave(rng: &mut Rng, lives: Vec<Vec<Move>>) -> Vec<Work> {
    let mut lives: Vec<_> = lives.into_iter().map(|life| life.into_iter().peekable()).collect();
    let mut steps = vec![];
    while lives.iter_mut().any(|life| life.peek().is_some()) {
        let mut work: Work = vec![];
        for (who, life) in lives.iter_mut().enumerate() {
            if rng.chance(0.7)
                && let Some((len, phase)) = life.next()
            {
                work.insert(rng.below(work.len() + 1), (who, len, phase));
            }
        }
        if !work.is_empty() {
            steps.push(work);
        }
    }
    steps
}

/// Four sequences of `tokens` more tokens, such as a parent and its forks, go on together in random chunks, decode and further
/// turns; all but one begin with decode.
pub(crate) fn forked_script(seed: u64, tokens: usize, longest: usize) -> Vec<Work> {
    let mut rng = Rng(seed);
    let lives = [5, 0, 1, 9].map(|n| [vec![(1, DECODE); n], life(&mut rng, tokens - n, longest)].concat());
    weave(&mut rng, lives.to_vec())
}

/// The largest difference, NaN if there is one.
pub(crate) fn worst(got: &[f32], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    got.iter().zip(want).map(|(a, b)| (*a as f64 - b).abs()).max_by(f64::total_cmp).unwrap_or(0.0)
}

#[track_caller]
pub(crate) fn assert_close(got: &[f32], want: &[f64], tolerance: f64, what: &str) {
    let off = worst(got, want);
    assert!(off <= tolerance, "{what}: off by {off:e}, more than {tolerance:e}"); // false for NaN, too
}

/// A GPU, or none: the test says so.
#[cfg(feature = "cuda")]
pub(crate) fn gpu() -> Option<candle_core::Device> {
    match kvpolicy::cuda_device(0) {
        Ok(device) => Some(device),
        Err(error) => {
            println!("skipped: no GPU ({})", error.to_string().lines().next().unwrap_or_default());
            None
        }
    }
}
