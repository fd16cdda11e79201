//! Which arm a key belongs to.
//!
//! Weighted rendezvous hashing (Thaler and Ravishankar, 1998; Schindelhauer and Schomaker, *Weighted Distributed Hash Tables*,
//! 2005): every arm draws a time from an exponential distribution with its weight as rate, by a hash of key and arm, and the
//! first one has the key. An arm is first as often as its share of the weights, and another weight of one arm moves only keys to
//! it or away from it.

use siphasher::sip::SipHasher13;
use std::hash::Hasher;

/// Index of the arm that a key belongs to; an arm of weight 0 has none. `None` if all weights are 0.
pub(super) fn choose<'a>(salt: u64, key: &str, arms: impl Iterator<Item = (&'a str, f64)>) -> Option<usize> {
    let time = |(i, (name, weight)): (usize, (&str, f64))| {
        (weight > 0.0).then(|| (i, -uniform(salt, &[key.as_bytes(), name.as_bytes()]).ln() / weight))
    };
    arms.enumerate().filter_map(time).min_by(|a, b| a.1.total_cmp(&b.1)).map(|(i, _)| i)
}

/// A number within 0 and 1, the same for the same parts on every machine.
pub(super) fn uniform(salt: u64, parts: &[&[u8]]) -> f64 {
    let mut hasher = SipHasher13::new_with_keys(salt, 0);
    for part in parts {
        // With their length: ("ab", "c") is not ("a", "bc").
        hasher.write(&(part.len() as u64).to_le_bytes());
        hasher.write(part);
    }
    ((hasher.finish() >> 11) as f64 + 0.5) / (1u64 << 53) as f64
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const KEYS: usize = 20_000;
    const ARMS: [&str; 4] = ["full", "tova:budget=25%", "dms", "window:size=64"];

    fn arms_of_keys(salt: u64, weights: [f64; 4]) -> Vec<usize> {
        let arms = || ARMS.into_iter().zip(weights);
        (0..KEYS).map(|i| choose(salt, &format!("user-{i}"), arms()).unwrap()).collect()
    }

    fn count(arms: &[usize], arm: usize) -> f64 {
        arms.iter().filter(|&&a| a == arm).count() as f64
    }

    #[test]
    fn arms_have_their_share_of_the_keys() {
        for (salt, weights) in [(0, [1.0; 4]), (1, [90.0, 5.0, 4.0, 1.0]), (2, [0.3, 0.7, 0.0, 1e-9])] {
            let arms = arms_of_keys(salt, weights);
            for (arm, weight) in weights.into_iter().enumerate() {
                let share = weight / weights.iter().sum::<f64>();
                let off = 4.0 * (KEYS as f64 * share * (1.0 - share)).sqrt(); // standard deviations
                let keys = count(&arms, arm);
                assert!((keys - KEYS as f64 * share).abs() <= off, "{keys} keys of {weights:?} for arm {arm}");
            }
        }
    }

    #[test]
    fn another_weight_moves_only_the_keys_it_must() {
        let before = arms_of_keys(7, [4.0, 3.0, 2.0, 1.0]);
        for (weight, moves_to) in [(6.0, true), (1.0, false), (0.0, false)] {
            let after = arms_of_keys(7, [4.0, weight, 2.0, 1.0]);
            let moved = before.iter().zip(&after).filter(|(was, is)| was != is);
            assert!(moved.clone().all(|(was, is)| if moves_to { *is == 1 } else { *was == 1 }));
            assert_eq!(moved.count() as f64, (count(&before, 1) - count(&after, 1)).abs(), "{weight}");
        }
        assert_eq!(before, arms_of_keys(7, [8.0, 6.0, 4.0, 2.0]), "only proportions count");
    }

    #[test]
    fn salts_are_experiments_of_their_own() {
        let (a, b) = (arms_of_keys(1, [1.0; 4]), arms_of_keys(2, [1.0; 4]));
        let same = a.iter().zip(&b).filter(|(a, b)| a == b).count() as f64;
        assert!((same - KEYS as f64 / 4.0).abs() < 4.0 * (KEYS as f64 * 3.0 / 16.0).sqrt(), "{same}");
    }

    #[test]
    fn keys_keep_their_arm_across_versions_and_machines() {
        let arms = || ARMS.into_iter().zip([1.0; 4]);
        let chosen: Vec<usize> = (0..12).map(|i| choose(5, &format!("user-{i}"), arms()).unwrap()).collect();
        assert_eq!(chosen, KNOWN);
        assert_eq!(choose(5, "user-0", ARMS.into_iter().zip([0.0; 4])), None);
    }

    /// By another implementation of SipHash-1-3.
    const KNOWN: [usize; 12] = [1, 2, 3, 2, 3, 3, 1, 0, 3, 3, 2, 3];
}
