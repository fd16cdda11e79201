//! Whether two policies differ, from what both made of the same samples.
//!
//! Samples are the unit: the questions of one sample share a text, and so they stay together. The interval is a paired
//! bootstrap (Efron and Tibshirani, *An Introduction to the Bootstrap*, 1993, chapter 13), the p-value a paired randomization
//! test (Fisher's; see Noreen, *Computer Intensive Methods for Testing Hypotheses*, 1989), which holds for few samples as well:
//! of `n` pairs it is never below `2^(1-n)`.

use crate::{params::Args, policy::Policy};
use rand::{Rng, SeedableRng, rngs::StdRng};
use serde::{Deserialize, Serialize};

/// How a policy differs from another one at the same samples.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Against {
    /// The other policy's label.
    pub policy: String,
    /// What it is; `None` in files that do not say it yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub measure: Option<Measure>,
    /// The policy's figure less the other's: of `ppl` the mean negative log-likelihood, of `kl` the divergence, nats per token;
    /// of questions the share that was answered right, of `speed` tokens of decode per second.
    pub difference: f64,
    /// 95% interval of the difference.
    pub interval: [f64; 2],
    /// How often chance alone would make a difference as large, in either direction.
    pub p: f64,
    /// Samples behind it.
    pub pairs: usize,
}

/// Policies that the others are measured by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Measure {
    /// Dense attention.
    Full,
    /// What the model has learned to keep.
    Dms,
}

impl Measure {
    /// The one that a policy is; `None` for another, a wrapper around one of them included.
    pub fn of(policy: &dyn Policy) -> Option<Self> {
        match Args::split(&policy.to_string()).name() {
            "full" => Some(Self::Full),
            "dms" => Some(Self::Dms),
            _ => None,
        }
    }
}

/// What two policies made of one sample.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Pair {
    /// Sum of the first one's scores.
    pub a: f64,
    /// Sum of the other one's.
    pub b: f64,
    /// How many scores each sum has.
    pub count: f64,
}

/// The first less the second: difference, interval and p-value, the same for the same seed. `None` for fewer than two pairs:
/// nothing can be said of one.
pub fn paired(pairs: &[Pair], seed: u64) -> Option<(f64, [f64; 2], f64)> {
    let scores: f64 = pairs.iter().map(|pair| pair.count).sum();
    if pairs.len() < 2 || scores <= 0.0 {
        return None;
    }
    let difference = pairs.iter().map(|pair| pair.a - pair.b).sum::<f64>() / scores;
    let mut rng = StdRng::seed_from_u64(seed);
    let interval = interval(pairs, &mut rng);
    Some((difference, interval, p_value(pairs, &mut rng)))
}

/// The middle 95% of the difference over resampled pairs.
fn interval(pairs: &[Pair], rng: &mut StdRng) -> [f64; 2] {
    let mut figures: Vec<f64> = (0..RESAMPLES)
        .map(|_| {
            let drawn = pairs.iter().map(|_| &pairs[rng.random_range(0..pairs.len())]);
            let (sum, count) = drawn.fold((0.0, 0.0), |(sum, count), pair| (sum + pair.a - pair.b, count + pair.count));
            sum / count
        })
        .collect();
    figures.sort_by(f64::total_cmp);
    let beyond = RESAMPLES / 40; // 2.5%
    [figures[beyond], figures[RESAMPLES - 1 - beyond]]
}

/// Without a difference either policy could have made either score of a pair: how often do exchanges make one as large?
fn p_value(pairs: &[Pair], rng: &mut StdRng) -> f64 {
    let differences: Vec<f64> = pairs.iter().map(|pair| pair.a - pair.b).filter(|d| *d != 0.0).collect();
    let size: f64 = differences.iter().map(|d| d.abs()).sum();
    // Sums of the same numbers in another order differ by rounding.
    let found = differences.iter().sum::<f64>().abs() - 1e-12 * size;
    let as_large = |exchanged: &dyn Fn(usize) -> bool| {
        let sum: f64 = differences.iter().enumerate().map(|(i, d)| if exchanged(i) { -d } else { *d }).sum();
        sum.abs() >= found
    };
    if differences.len() <= ALL_EXCHANGES {
        let all = 1u32 << differences.len();
        let as_large = (0..all).filter(|bits| as_large(&|i| bits >> i & 1 == 1)).count();
        return as_large as f64 / all as f64;
    }
    let mut words = vec![0u64; differences.len().div_ceil(64)];
    let as_large = (0..EXCHANGES).filter(|_| {
        words.iter_mut().for_each(|word| *word = rng.random());
        as_large(&|i| words[i / 64] >> (i % 64) & 1 == 1)
    });
    // What was found counts as one of them: chance never has no share.
    (as_large.count() + 1) as f64 / (EXCHANGES + 1) as f64
}

/// Drawn for an interval.
const RESAMPLES: usize = 2000;
/// Drawn for a p-value of more pairs than have all their exchanges tried.
const EXCHANGES: usize = 4000;
const ALL_EXCHANGES: usize = 11;

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// Roughly normal, of variance 1.
    fn noise(rng: &mut StdRng) -> f64 {
        (0..12).map(|_| rng.random::<f64>()).sum::<f64>() - 6.0
    }

    /// Samples that are hard or easy for both, with noise of a tenth, the first policy better by `gain`.
    fn pairs(rng: &mut StdRng, count: usize, gain: f64) -> Vec<Pair> {
        let pair = |rng: &mut StdRng| {
            let hard = noise(rng);
            Pair { a: hard + gain + 0.1 * noise(rng), b: hard + 0.1 * noise(rng), count: 1.0 }
        };
        (0..count).map(|_| pair(rng)).collect()
    }

    #[test]
    fn without_a_difference_p_is_uniform_and_the_interval_covers_0() {
        const RUNS: u64 = 240;
        let mut rng = StdRng::seed_from_u64(1);
        for count in [9, 40] {
            let runs: Vec<_> = (0..RUNS).map(|i| paired(&pairs(&mut rng, count, 0.0), i).unwrap()).collect();
            for level in [0.05, 0.25, 0.5, 0.75] {
                let below = runs.iter().filter(|(_, _, p)| *p <= level).count() as f64 / RUNS as f64;
                let off = 3.5 * (level * (1.0 - level) / RUNS as f64).sqrt(); // standard errors
                assert!((below - level).abs() < off, "{below} of p are below {level}, {count} pairs");
            }
            let covers = |interval: &[f64; 2]| interval[0] <= 0.0 && 0.0 <= interval[1];
            let covered = runs.iter().filter(|(_, interval, _)| covers(interval)).count() as f64 / RUNS as f64;
            // The bootstrap is a little narrow for few samples.
            assert!((if count == 9 { 0.85 } else { 0.91 }..0.985).contains(&covered), "{covered}, {count} pairs");
        }
    }

    #[test]
    fn a_real_difference_is_found_and_its_interval_covers_it() {
        let mut rng = StdRng::seed_from_u64(2);
        let runs: Vec<_> = (0..200).map(|i| paired(&pairs(&mut rng, 30, 0.15), i).unwrap()).collect();
        assert!(runs.iter().filter(|(_, _, p)| *p < 0.05).count() > 195);
        let covered = runs.iter().filter(|(_, [low, high], _)| (*low..*high).contains(&0.15)).count();
        assert!((178..199).contains(&covered), "{covered}");
        assert!(runs.iter().all(|(difference, [low, high], _)| low <= difference && difference <= high));
    }

    #[test]
    fn pairs_see_what_is_lost_between_strangers() {
        let mut rng = StdRng::seed_from_u64(3);
        let own = pairs(&mut rng, 30, 0.15);
        let strangers: Vec<Pair> = (0..30).map(|i| Pair { b: own[(i + 7) % 30].b, ..own[i] }).collect();
        let ((a, near, p), (b, far, q)) = (paired(&own, 0).unwrap(), paired(&strangers, 0).unwrap());
        assert!((a - b).abs() < 1e-9, "the same means");
        assert!(p < 0.001 && q > 0.2, "{p} {q}");
        assert!((far[1] - far[0]) > 5.0 * (near[1] - near[0]), "{near:?} {far:?}");
    }

    #[test]
    fn few_pairs_prove_little() {
        let all_won = |n| vec![Pair { a: 1.0, b: 0.0, count: 1.0 }; n];
        for n in [2, 3, 6, 11] {
            assert_eq!(paired(&all_won(n), 0).unwrap().2, 2f64.powi(1 - n as i32), "{n}");
        }
        assert!(paired(&all_won(12), 0).unwrap().2 < 0.002);
        assert_eq!(paired(&all_won(1), 0), None);
        let same = vec![Pair { a: 1.0, b: 1.0, count: 1.0 }; 5];
        assert_eq!(paired(&same, 0), Some((0.0, [0.0, 0.0], 1.0)));
    }

    #[test]
    fn samples_of_more_questions_weigh_more_and_a_seed_repeats() {
        let pairs = [Pair { a: 3.0, b: 0.0, count: 3.0 }, Pair { a: 0.0, b: 0.0, count: 1.0 }];
        let found = paired(&pairs, 4).unwrap();
        assert_eq!((found.0, found.1), (0.75, [0.0, 1.0]));
        let mut rng = StdRng::seed_from_u64(5);
        let many = super::tests::pairs(&mut rng, 50, 0.05);
        assert_eq!(paired(&many, 6), paired(&many, 6));
        assert_ne!(paired(&many, 6), paired(&many, 7));
    }
}
