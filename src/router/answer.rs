//! A request from its prompt to the end of its answer.

use super::{Next, Outcome, Ticket, divergence};
use crate::{
    compare::{Sequence, Subject},
    error::Result,
    logits::argmax,
    policies::Full,
    policy::Policy,
};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};

/// What a request got.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// Tokens of the answer.
    pub tokens: Vec<u32>,
    /// The token, counted from 0, from which on they were chosen under `full`; `None` if all are the arm's.
    pub fell_back_at: Option<usize>,
    /// For [`Router::finish`](super::Router::finish).
    pub outcome: Outcome,
}

/// Answers a prompt under a ticket's arm, with a shadow if the ticket asks for one: greedy, to the model's end of an answer or
/// `max_tokens`. Each token is told as it is chosen. A shadow takes time of its own, which is not the arm's and is not in the
/// outcome.
///
/// # Errors
/// Those of the model and of `told`; the caller hands the ticket to [`Router::fail`](super::Router::fail).
pub fn answer(
    subject: &dyn Subject,
    ticket: &mut Ticket,
    prompt: &[u32],
    max_tokens: usize,
    told: &mut dyn FnMut(u32) -> Result<()>,
) -> Result<Answer> {
    let mut lane = Lane::open(subject, ticket.policy(), prompt)?;
    let full: Arc<dyn Policy> = Arc::new(Full {});
    let mut shadow = if ticket.is_shadowed() { Some(Lane::open(subject, &full, prompt)?) } else { None };
    let (mut tokens, mut left): (Vec<u32>, Option<(usize, Outcome)>) = (vec![], None);
    while tokens.len() < max_tokens {
        if let Some(dense) = shadow.take() {
            match ticket.record(divergence(&dense.logits, &lane.logits)?) {
                Next::Stay => shadow = Some(dense),
                Next::FallBack => {
                    left = Some((tokens.len(), lane.outcome()));
                    lane = dense;
                }
            }
        }
        let token = argmax(&lane.logits);
        if subject.is_end(token) {
            break;
        }
        told(token)?;
        tokens.push(token);
        if tokens.len() == max_tokens {
            break;
        }
        lane.decode(token)?;
        if let Some(shadow) = &mut shadow {
            shadow.decode(token)?;
        }
    }
    let (fell_back_at, outcome) = left.map_or_else(|| (None, lane.outcome()), |(at, outcome)| (Some(at), outcome));
    Ok(Answer { tokens, fell_back_at, outcome })
}

/// A sequence with its newest logits and the time it took.
struct Lane<'a> {
    sequence: Box<dyn Sequence + 'a>,
    logits: Vec<f32>,
    prefill: Duration,
    decode: Duration,
    decoded: usize,
}

impl<'a> Lane<'a> {
    fn open(subject: &'a dyn Subject, policy: &Arc<dyn Policy>, prompt: &[u32]) -> Result<Self> {
        let clock = Instant::now();
        let mut sequence = subject.open(policy)?;
        let logits = sequence.prefill(prompt, true)?.into_logits()?;
        Ok(Self { sequence, logits, prefill: clock.elapsed(), decode: Duration::ZERO, decoded: 0 })
    }

    fn decode(&mut self, token: u32) -> Result<()> {
        let clock = Instant::now();
        self.logits = self.sequence.decode(token)?.into_logits()?;
        self.decode += clock.elapsed();
        self.decoded += 1;
        Ok(())
    }

    fn outcome(&self) -> Outcome {
        Outcome {
            prefill_seconds: self.prefill.as_secs_f64(),
            decoded: self.decoded,
            decode_seconds: self.decode.as_secs_f64(),
            kv: self.sequence.stats(),
        }
    }
}
