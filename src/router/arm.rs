//! What is known of an arm: sums over all of its requests, and the newest of them against the limits.

use super::{Limits, Outcome};
use serde::Serialize;
use std::collections::VecDeque;

/// An arm now.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct ArmReport {
    /// The arm's name.
    pub name: String,
    /// Its policy, with every parameter.
    pub policy: String,
    /// Of its keys, relative to the other arms.
    pub weight: f64,
    /// The share of all keys that it serves now, those of arms that were rolled back included.
    pub share: f64,
    /// Why its keys are served by the control; `None` if it serves them itself.
    pub rolled_back: Option<String>,
    /// Requests that ended.
    pub requests: u64,
    /// Requests that an error ended.
    pub failures: u64,
    /// Requests that had a shadow.
    pub shadowed: u64,
    /// Requests that went on under `full`.
    pub fallbacks: u64,
    /// KL divergence from `full`, nats per token: mean over the tokens of requests that had a shadow.
    pub kl: Option<f64>,
    /// Seconds to the first token: mean over requests.
    pub prefill_seconds: Option<f64>,
    /// Seconds of a further token: mean over tokens.
    pub seconds_per_token: Option<f64>,
    /// Bytes of pages in use: mean over requests of their means.
    pub kv_mean_bytes: Option<f64>,
    /// The most that one request had in use.
    pub kv_peak_bytes: u64,
    /// Entries a dense cache would have held for one that was held: of the means over requests.
    pub compression: Option<f64>,
}

/// Sums over the requests of an arm.
#[derive(Debug, Clone, Default)]
pub(super) struct Tally {
    pub(super) requests: u64,
    pub(super) failures: u64,
    pub(super) fallbacks: u64,
    pub(super) shadowed: u64,
    kl: Ratio,
    prefill: Ratio,
    decode: Ratio,
    bytes: Ratio,
    entries: Ratio, // dense over live
    peak_bytes: u64,
    kl_window: Window,
    decode_window: Window,
}

impl Tally {
    /// A request that ended; `kl`: the sum over its tokens and how many these were.
    pub(super) fn add(&mut self, outcome: &Outcome, kl: Ratio, limits: &Limits) {
        let decode = Ratio { sum: outcome.decode_seconds, count: outcome.decoded as f64 };
        self.requests += 1;
        self.prefill += Ratio { sum: outcome.prefill_seconds, count: 1.0 };
        self.decode += decode;
        self.bytes += Ratio { sum: outcome.kv.mean_bytes, count: 1.0 };
        self.entries += Ratio { sum: outcome.kv.mean_dense_entries, count: outcome.kv.mean_live_entries };
        self.peak_bytes = self.peak_bytes.max(outcome.kv.peak_bytes);
        self.kl += kl;
        self.kl_window.push(kl, limits.window);
        self.decode_window.push(decode, limits.window);
    }

    /// Why the arm must not go on: the newest requests pass a limit.
    pub(super) fn breach(&self, limits: &Limits) -> Option<String> {
        let passed = |what: &str, window: &Window, limit: Option<f64>| {
            let (mean, limit) = (window.mean(limits.window)?, limit?);
            let requests = limits.window;
            (mean > limit).then(|| format!("{what} of the last {requests} requests is {mean:.4}, the limit {limit}"))
        };
        passed("KL in nats per token", &self.kl_window, limits.kl)
            .or_else(|| passed("seconds per token", &self.decode_window, limits.seconds_per_token))
    }

    /// What came before says nothing of what comes.
    pub(super) fn forget_windows(&mut self) {
        (self.kl_window, self.decode_window) = Default::default();
    }

    pub(super) fn report(&self, named: ArmReport) -> ArmReport {
        ArmReport {
            requests: self.requests,
            failures: self.failures,
            shadowed: self.shadowed,
            fallbacks: self.fallbacks,
            kl: self.kl.mean(),
            prefill_seconds: self.prefill.mean(),
            seconds_per_token: self.decode.mean(),
            kv_mean_bytes: self.bytes.mean(),
            kv_peak_bytes: self.peak_bytes,
            compression: self.entries.mean(),
            ..named
        }
    }
}

/// A sum and what it is divided by.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Ratio {
    pub(super) sum: f64,
    pub(super) count: f64,
}

impl Ratio {
    pub(super) fn mean(self) -> Option<f64> {
        (self.count > 0.0).then(|| self.sum / self.count)
    }
}

impl std::ops::AddAssign for Ratio {
    fn add_assign(&mut self, other: Self) {
        self.sum += other.sum;
        self.count += other.count;
    }
}

/// The newest requests that have a figure.
#[derive(Debug, Clone, Default)]
struct Window(VecDeque<Ratio>);

impl Window {
    fn push(&mut self, figure: Ratio, size: usize) {
        if figure.count == 0.0 {
            return;
        }
        self.0.push_back(figure);
        self.0.drain(..self.0.len().saturating_sub(size));
    }

    /// Of as many as there must be; `None` of fewer. Summed anew each time: what was infinite leaves no trace.
    fn mean(&self, size: usize) -> Option<f64> {
        let mut all = Ratio::default();
        self.0.iter().for_each(|figure| all += *figure);
        if self.0.len() < size { None } else { all.mean() }
    }
}
