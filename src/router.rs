//! Online A/B: requests of a server split between policies.
//!
//! A [`Router`] decides and counts, and runs no model: it gives each request an arm by its key, is told how far the arm's
//! distribution was from `full`'s, how long it took and what its cache held, sends keys back to the control when an arm passes a
//! limit, and may be given other weights while requests run. [`answer`] is the loop around it for whoever has a
//! [`Subject`](crate::compare::Subject).
//!
//! ```
//! use kvpolicy::{Registry, Stats, router::{Arm, Guard, Limits, Next, Outcome, Router, RouterConfig, divergence}};
//!
//! # fn main() -> kvpolicy::Result<()> {
//! let registry = Registry::standard();
//! let arm = |text: &str, weight| -> kvpolicy::Result<Arm> {
//!     Ok(Arm { name: text.into(), policy: registry.parse(text)?, weight, shadow: 1.0 })
//! };
//! let router = Router::new(RouterConfig {
//!     arms: vec![arm("full", 90.0)?, arm("tova:budget=25%", 10.0)?], // the first is the control
//!     salt: 1,
//!     guard: Some(Guard { kl: 0.5, tokens: 2 }), // a request over it goes on under `full`
//!     limits: Limits { kl: Some(0.1), seconds_per_token: None, window: 3 }, // an arm over it is rolled back
//! })?;
//!
//! router.set_weight("tova:budget=25%", 90.0)?; // shifts traffic: half of the keys are its own from here on
//! let key = (0..).map(|i| format!("user-{i}")).find(|key| router.route(key).arm() == "tova:budget=25%").unwrap();
//! for _ in 0..3 {
//!     let mut ticket = router.route(&key); // the same key, the same arm
//!     // A sequence under `ticket.policy()`, one under `full` beside it if `ticket.is_shadowed()`; for each token the logits of both:
//!     assert_eq!(ticket.record(divergence(&[2.0, 1.0], &[2.0, 1.0])?), Next::Stay);
//!     assert_eq!(ticket.record(divergence(&[9.0, 1.0], &[1.0, 4.0])?), Next::FallBack); // go on with the sequence under `full`
//!     let kv = Stats::default(); // of the arm's sequence
//!     router.finish(ticket, &Outcome { prefill_seconds: 0.1, decoded: 1, decode_seconds: 0.02, kv });
//! }
//! assert!(router.arms()[1].rolled_back.is_some());
//! assert_eq!((router.route(&key).arm(), router.arms()[0].share), ("full", 1.0));
//! # Ok(())
//! # }
//! ```
//!
//! # What is measured
//!
//! A request has a *shadow* with the probability [`Arm::shadow`]: a second sequence under `full` that is fed the tokens the arm
//! chose. KL(`full` ‖ arm) of the two distributions at each of them is exact, and costs a dense sequence beside the arm's.
//! Because the shadow has read all that the arm has, a request that strays too far goes on with it ([`Guard`]): no token is
//! lost. Requests without a shadow are not guarded.
//!
//! # Facades
//!
//! To the recorder of the `metrics` crate, each with the label `arm`: counters `kvpolicy_router_requests`, `_failures`,
//! `_fallbacks`, `_rollbacks`; gauges `kvpolicy_router_weight`, and `_rolled_back` (0 or 1); histograms of requests
//! `kvpolicy_router_kl_nats_per_token`, `_prefill_seconds`, `_seconds_per_token`, `_kv_mean_bytes`. To the subscriber of `tracing`:
//! what changes where traffic goes, and each request that ends (`debug`).

mod answer;
mod arm;
mod shares;
mod ticket;

pub use answer::{Answer, answer};
pub use arm::ArmReport;
pub use ticket::{Guard, Next, Ticket};

use crate::{
    error::{Error, Result},
    logits::{kl, log_softmax},
    policy::Policy,
    stats::Stats,
};
use arm::Tally;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A policy that serves requests.
#[derive(Debug, Clone)]
pub struct Arm {
    /// Names it in reports; keys are drawn by it, so that another name draws other keys.
    pub name: String,
    /// What its sequences run under.
    pub policy: Arc<dyn Policy>,
    /// How many keys it serves, relative to the other arms.
    pub weight: f64,
    /// The share of its requests that have a shadow, 0 to 1.
    pub shadow: f64,
}

/// What to split, and how much is too much.
#[derive(Debug, Clone)]
pub struct RouterConfig {
    /// The first is the control, which serves the keys of arms that were rolled back.
    pub arms: Vec<Arm>,
    /// Another one draws other keys for each arm.
    pub salt: u64,
    /// When a request leaves its arm; `None` for never.
    pub guard: Option<Guard>,
    /// When an arm leaves all of its requests.
    pub limits: Limits,
}

/// Limits of the newest requests of an arm. One that passes a limit is rolled back; the control never is.
#[derive(Debug, Clone, Default)]
pub struct Limits {
    /// Mean KL divergence from `full`, nats per token, over the tokens of requests that had a shadow.
    pub kl: Option<f64>,
    /// Mean seconds of a token after a request's first, over tokens.
    pub seconds_per_token: Option<f64>,
    /// How many requests; before there are so many there is no limit.
    pub window: usize,
}

/// How a request went under its arm; what it went on with under `full` is left out.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Outcome {
    /// From its begin to the logits of its first token.
    pub prefill_seconds: f64,
    /// Tokens after the first one.
    pub decoded: usize,
    /// What these took.
    pub decode_seconds: f64,
    /// Its sequence's cache.
    pub kv: Stats,
}

/// An arm that lost its requests to the control.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RolledBack {
    /// The arm's name.
    pub arm: String,
    /// Why.
    pub reason: String,
}

/// Splits requests between arms. Shared by threads: whoever has a reference may do anything at any time.
#[derive(Debug)]
pub struct Router {
    arms: Vec<Fixed>,
    salt: u64,
    guard: Option<Guard>,
    limits: Limits,
    states: Mutex<Vec<State>>, // of each arm
}

/// What never changes of an arm.
#[derive(Debug)]
struct Fixed {
    name: Arc<str>,
    policy: Arc<dyn Policy>,
    shadow: f64,
}

/// What changes.
#[derive(Debug, Default)]
struct State {
    weight: f64,
    routed: u64,
    rolled_back: Option<String>,
    tally: Tally,
}

impl Router {
    /// A router in which nothing was asked yet.
    ///
    /// # Errors
    /// [`Error::Config`] with every fault of the configuration.
    pub fn new(config: RouterConfig) -> Result<Self> {
        let faults = config.faults();
        if !faults.is_empty() {
            return Err(refusal(faults.join("; ")));
        }
        let states = config.arms.iter().map(|arm| State { weight: arm.weight, ..State::default() }).collect();
        let fixed = |arm: Arm| Fixed { name: arm.name.into(), policy: arm.policy, shadow: arm.shadow };
        let arms: Vec<Fixed> = config.arms.into_iter().map(fixed).collect();
        let router =
            Self { arms, salt: config.salt, guard: config.guard, limits: config.limits, states: Mutex::new(states) };
        router.states().iter().zip(&router.arms).for_each(|(state, arm)| arm.show_place(state));
        Ok(router)
    }

    /// The arm of a request. The same key has the same arm, until weights change or its arm is rolled back.
    pub fn route(&self, key: &str) -> Ticket {
        let mut states = self.states();
        let weights = self.arms.iter().zip(states.iter()).map(|(arm, state)| (&*arm.name, state.weight));
        let own = shares::choose(self.salt, key, weights).unwrap_or(CONTROL);
        let index = if states[own].rolled_back.is_some() { CONTROL } else { own };
        let (arm, state) = (&self.arms[index], &mut states[index]);
        let drawn = shares::uniform(self.salt, &[b"shadow", arm.name.as_bytes(), &state.routed.to_le_bytes()]);
        state.routed += 1;
        Ticket::new(index, arm.name.clone(), arm.policy.clone(), drawn < arm.shadow, self.guard)
    }

    /// A request ended. Tells if its arm passed a limit by that and was rolled back.
    pub fn finish(&self, ticket: Ticket, outcome: &Outcome) -> Option<RolledBack> {
        ticket.show(outcome);
        let mut states = self.states();
        let state = &mut states[ticket.index];
        state.tally.shadowed += ticket.is_shadowed() as u64;
        state.tally.fallbacks += ticket.fell_back() as u64;
        state.tally.add(outcome, ticket.kl, &self.limits);
        if ticket.index == CONTROL || state.rolled_back.is_some() {
            return None;
        }
        let reason = state.tally.breach(&self.limits)?;
        let arm = &self.arms[ticket.index];
        arm.leave(state, &reason);
        Some(RolledBack { arm: arm.name.to_string(), reason })
    }

    /// A request was ended by an error. It counts as failed, and its figures count for nothing.
    pub fn fail(&self, ticket: Ticket, error: &dyn std::fmt::Display) {
        self.states()[ticket.index].tally.failures += 1;
        metrics::counter!("kvpolicy_router_failures", "arm" => ticket.name.clone()).increment(1);
        tracing::warn!(arm = ticket.arm(), %error, "a request failed");
    }

    /// Gives an arm another weight: keys move to it or away from it, and no others. Requests under way stay where they are.
    ///
    /// # Errors
    /// [`Error::Config`] for a name that no arm has, a weight that is none, or if no arm would have any.
    pub fn set_weight(&self, arm: &str, weight: f64) -> Result<()> {
        let index = self.index(arm)?;
        let mut states = self.states();
        let others = states.iter().enumerate().filter(|(i, _)| *i != index).map(|(_, state)| state.weight);
        let faults = weight_faults(arm, weight, others.sum());
        if !faults.is_empty() {
            return Err(refusal(faults.join("; ")));
        }
        states[index].weight = weight;
        tracing::info!(arm, weight, "another weight");
        self.arms[index].show_place(&states[index]);
        Ok(())
    }

    /// Lets the control serve an arm's keys. No other key moves.
    ///
    /// # Errors
    /// [`Error::Config`] for a name that no arm has, or the control's.
    pub fn roll_back(&self, arm: &str, reason: &str) -> Result<()> {
        let index = self.index(arm)?;
        if index == CONTROL {
            return Err(refusal(format!(
                "`{arm}` is the control, to which others are rolled back; give it another weight"
            )));
        }
        self.arms[index].leave(&mut self.states()[index], reason);
        Ok(())
    }

    /// Gives an arm that was rolled back its keys again. Its limits begin anew.
    ///
    /// # Errors
    /// [`Error::Config`] for a name that no arm has.
    pub fn restore(&self, arm: &str) -> Result<()> {
        let index = self.index(arm)?;
        let state = &mut self.states()[index];
        state.rolled_back = None;
        state.tally.forget_windows();
        tracing::info!(arm, "restored");
        self.arms[index].show_place(state);
        Ok(())
    }

    /// Every arm now, in the order of the configuration.
    pub fn arms(&self) -> Vec<ArmReport> {
        let states = self.states();
        let all: f64 = states.iter().map(|state| state.weight).sum();
        let away: f64 = states.iter().filter(|state| state.rolled_back.is_some()).map(|state| state.weight).sum();
        let report = |(index, (arm, state)): (usize, (&Fixed, &State))| {
            let serves = match (index, &state.rolled_back) {
                (CONTROL, _) => state.weight + away,
                (_, Some(_)) => 0.0,
                (_, None) => state.weight,
            };
            state.tally.report(ArmReport {
                name: arm.name.to_string(),
                policy: arm.policy.to_string(),
                weight: state.weight,
                share: serves / all,
                rolled_back: state.rolled_back.clone(),
                ..ArmReport::default()
            })
        };
        self.arms.iter().zip(states.iter()).enumerate().map(report).collect()
    }

    fn index(&self, name: &str) -> Result<usize> {
        let known = || self.arms.iter().map(|arm| &*arm.name).collect::<Vec<_>>().join("`, `");
        let found = self.arms.iter().position(|arm| &*arm.name == name);
        found.ok_or_else(|| refusal(format!("no arm is named `{name}` (known: `{}`)", known())))
    }

    /// Nothing panics while it is held; if it did, sums would still be sums.
    fn states(&self) -> MutexGuard<'_, Vec<State>> {
        self.states.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Index of the arm that takes over.
const CONTROL: usize = 0;

impl Fixed {
    fn leave(&self, state: &mut State, reason: &str) {
        state.rolled_back = Some(reason.to_string());
        metrics::counter!("kvpolicy_router_rollbacks", "arm" => self.name.clone()).increment(1);
        tracing::warn!(arm = &*self.name, reason, "rolled back");
        self.show_place(state);
    }

    fn show_place(&self, state: &State) {
        metrics::gauge!("kvpolicy_router_weight", "arm" => self.name.clone()).set(state.weight);
        let away = state.rolled_back.is_some() as u8;
        metrics::gauge!("kvpolicy_router_rolled_back", "arm" => self.name.clone()).set(away);
    }
}

impl RouterConfig {
    /// Everything that is wrong with it.
    fn faults(&self) -> Vec<String> {
        let mut why = vec![];
        if self.arms.is_empty() {
            why.push("there is no arm: name at least one".to_string());
        }
        for (i, arm) in self.arms.iter().enumerate() {
            if self.arms[..i].iter().any(|other| other.name == arm.name) {
                why.push(format!("the arm `{}` is named twice: once is enough", arm.name));
            }
            let others = self.arms.iter().map(|arm| arm.weight).filter(|weight| weight.is_finite()).sum::<f64>();
            why.extend(weight_faults(&arm.name, arm.weight, others));
            if !(0.0..=1.0).contains(&arm.shadow) {
                why.push(format!("arm `{}`: shadow={} is no share: 0 to 1", arm.name, arm.shadow));
            }
        }
        if let Some(guard) = &self.guard {
            why.extend(guard.faults());
        }
        why.extend(self.limits.faults());
        why
    }
}

impl Limits {
    fn faults(&self) -> Vec<String> {
        let mut why = vec![];
        for (name, limit) in [("kl", self.kl), ("seconds_per_token", self.seconds_per_token)] {
            if let Some(limit) = limit.filter(|limit| limit.is_nan() || *limit < 0.0) {
                why.push(format!("limits: {name}={limit} is no limit: 0 or more"));
            }
        }
        if self.window == 0 && (self.kl.is_some() || self.seconds_per_token.is_some()) {
            why.push("limits: window=0: at least one request".into());
        }
        why
    }
}

/// What is wrong with the weight of an arm, `others` being the sum of the rest.
fn weight_faults(arm: &str, weight: f64, others: f64) -> Vec<String> {
    let mut why = vec![];
    if !(weight.is_finite() && weight >= 0.0) {
        why.push(format!("arm `{arm}`: weight={weight} is none: a finite number, 0 or more"));
    } else if weight + others <= 0.0 {
        why.push(format!("arm `{arm}`: weight={weight} leaves no arm with any: some arm must serve"));
    }
    why
}

fn refusal(what: String) -> Error {
    Error::Config(format!("router: {what}"))
}

/// KL(`full` ‖ arm) in nats of the distributions over the next token, from the logits of both, `[vocab]` each. Infinite where the arm
/// never says what `full` may say.
///
/// # Errors
/// [`Error::Shape`] if one has more tokens than the other.
pub fn divergence(full: &[f32], arm: &[f32]) -> Result<f64> {
    if full.len() != arm.len() {
        return Err(Error::Shape { what: "the arm's logits", expected: vec![full.len()], got: vec![arm.len()] });
    }
    Ok(kl(&log_softmax(full), &log_softmax(arm)))
}
