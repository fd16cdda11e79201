//! One request on its way.

use super::{Outcome, arm::Ratio};
use crate::policy::Policy;
use std::{collections::VecDeque, sync::Arc};

/// When a request that has a shadow leaves its arm.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Guard {
    /// Mean KL divergence from `full`, nats per token.
    pub kl: f64,
    /// Over the newest so many tokens; those that were not generated yet count as 0.
    pub tokens: usize,
}

impl Guard {
    pub(super) fn faults(&self) -> Vec<String> {
        let mut why = vec![];
        if self.kl.is_nan() || self.kl < 0.0 {
            why.push(format!("guard: kl={} is no threshold: 0 or more", self.kl));
        }
        if self.tokens == 0 {
            why.push("guard: tokens=0: at least one".to_string());
        }
        why
    }
}

/// Where a request goes on.
#[must_use]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Under its arm.
    Stay,
    /// Under `full`, with its shadow: the arm strayed too far.
    FallBack,
}

/// A request and its arm, from [`Router::route`](super::Router::route) to [`Router::finish`](super::Router::finish). One that is
/// dropped instead, as of a client that left, counts for nothing.
#[derive(Debug)]
pub struct Ticket {
    pub(super) index: usize,
    pub(super) name: Arc<str>,
    policy: Arc<dyn Policy>,
    shadowed: bool,
    guard: Option<Guard>,
    newest: VecDeque<f64>,
    pub(super) kl: Ratio,
    fell_back: bool,
}

impl Ticket {
    pub(super) fn new(
        index: usize,
        name: Arc<str>,
        policy: Arc<dyn Policy>,
        shadowed: bool,
        guard: Option<Guard>,
    ) -> Self {
        let (newest, kl, fell_back) = Default::default();
        Self { index, name, policy, shadowed, guard, newest, kl, fell_back }
    }

    /// The arm's name.
    pub fn arm(&self) -> &str {
        &self.name
    }

    /// What the arm's sequence runs under.
    pub fn policy(&self) -> &Arc<dyn Policy> {
        &self.policy
    }

    /// Whether a sequence under `full` is to read the same tokens beside it.
    pub fn is_shadowed(&self) -> bool {
        self.shadowed
    }

    /// Notes the divergence at one token, nats, before the token is chosen; what is no number counts as infinite. After
    /// [`Next::FallBack`] nothing is noted: the arm is out.
    pub fn record(&mut self, kl: f64) -> Next {
        if self.fell_back {
            return Next::FallBack;
        }
        let kl = if kl.is_nan() { f64::INFINITY } else { kl };
        self.kl += Ratio { sum: kl, count: 1.0 };
        let Some(guard) = self.guard else { return Next::Stay };
        self.newest.push_back(kl);
        self.newest.drain(..self.newest.len().saturating_sub(guard.tokens));
        self.fell_back = self.newest.iter().sum::<f64>() > guard.kl * guard.tokens as f64;
        if self.fell_back { Next::FallBack } else { Next::Stay }
    }

    /// Mean divergence so far, nats per token; `None` if none was noted.
    pub fn kl(&self) -> Option<f64> {
        self.kl.mean()
    }

    /// Whether the request left its arm.
    pub fn fell_back(&self) -> bool {
        self.fell_back
    }

    /// To the facades.
    pub(super) fn show(&self, outcome: &Outcome) {
        let name = || self.name.clone();
        metrics::counter!("kvpolicy_router_requests", "arm" => name()).increment(1);
        metrics::counter!("kvpolicy_router_fallbacks", "arm" => name()).increment(self.fell_back as u64);
        metrics::histogram!("kvpolicy_router_prefill_seconds", "arm" => name()).record(outcome.prefill_seconds);
        metrics::histogram!("kvpolicy_router_kv_mean_bytes", "arm" => name()).record(outcome.kv.mean_bytes);
        if outcome.decoded > 0 {
            let seconds = outcome.decode_seconds / outcome.decoded as f64;
            metrics::histogram!("kvpolicy_router_seconds_per_token", "arm" => name()).record(seconds);
        }
        if let Some(kl) = self.kl() {
            metrics::histogram!("kvpolicy_router_kl_nats_per_token", "arm" => name()).record(kl);
        }
        if self.fell_back {
            tracing::info!(arm = self.arm(), kl = self.kl(), "a request fell back to full");
        }
        tracing::debug!(arm = self.arm(), kl = self.kl(), ?outcome, "a request ended");
    }
}
