//! Requests of the embedded model, split between policies.
#![allow(clippy::unwrap_used)]

use kvpolicy::{
    Registry,
    compare::{Sequence, Subject, problems},
    router::{Answer, Arm, Guard, Limits, Router, RouterConfig, Ticket, answer},
    runtime::TextModel,
};
use kvpolicy_candle::{Hosted, Lm, LoadOptions, SessionOptions};
use rand::{SeedableRng, rngs::StdRng};

const WINDOW: &str = "window:size=24,sinks=4";
const TOKENS: usize = 40;

fn hosted() -> Hosted {
    Hosted { lm: Lm::embedded(&LoadOptions::default()).unwrap(), options: SessionOptions::default() }
}

/// A walk along a map that a tiny window has lost.
fn prompt(hosted: &Hosted) -> Vec<u32> {
    hosted.encode(&problems::chain(&mut StdRng::seed_from_u64(5), 512).before_answer(0)).unwrap()
}

fn ask(hosted: &Hosted, policy: &str, guard: Option<Guard>) -> (Answer, Ticket) {
    let policy = Registry::standard().parse(policy).unwrap();
    let arms = vec![Arm { name: "the arm".into(), policy, weight: 1.0, shadow: 1.0 }];
    let router = Router::new(RouterConfig { arms, salt: 0, guard, limits: Limits::default() }).unwrap();
    let mut ticket = router.route("anyone");
    let answer = answer(hosted, &mut ticket, &prompt(hosted), TOKENS, &mut |_| Ok(())).unwrap();
    (answer, ticket)
}

/// Logits before each token of an answer: [tokens][vocab].
fn logits(hosted: &Hosted, policy: &str, answer: &[u32]) -> Vec<Vec<f64>> {
    let policy = Registry::standard().parse(policy).unwrap();
    let mut session: Box<dyn Sequence> = hosted.open(&policy).unwrap();
    let mut all = vec![session.prefill(&prompt(hosted), true).unwrap()];
    answer[..answer.len() - 1].iter().for_each(|&token| all.push(session.decode(token).unwrap()));
    let wide = |next: kvpolicy::compare::Next| next.logits().unwrap().iter().map(|&x| f64::from(x)).collect();
    all.into_iter().map(wide).collect()
}

#[test]
fn full_does_not_diverge_from_itself() {
    let (answer, ticket) = ask(&hosted(), "full", None);
    assert_eq!((ticket.kl(), answer.tokens.len(), answer.outcome.kv.evicted), (Some(0.0), TOKENS, 0));
}

#[test]
fn the_divergence_of_a_tiny_window_is_that_of_both_distributions_at_its_tokens() {
    let hosted = hosted();
    let (answer, ticket) = ask(&hosted, WINDOW, None);
    let softmax = |logits: &[f64]| {
        let sum: f64 = logits.iter().map(|x| x.exp()).sum();
        logits.iter().map(|x| x.exp() / sum).collect::<Vec<f64>>()
    };
    let both = logits(&hosted, "full", &answer.tokens).into_iter().zip(logits(&hosted, WINDOW, &answer.tokens));
    let at_token = |(full, own): (Vec<f64>, Vec<f64>)| -> f64 {
        softmax(&full).iter().zip(softmax(&own)).map(|(p, q)| p * (p / q).ln()).sum()
    };
    let direct = both.map(at_token).sum::<f64>() / answer.tokens.len() as f64;
    let kl = ticket.kl().unwrap();
    assert!(direct > 0.01 && (kl - direct).abs() < 1e-9 * direct.max(1.0), "{kl} {direct}");
    assert!(answer.outcome.kv.evicted > 0 && answer.outcome.decoded == TOKENS - 1);
}

#[test]
fn a_request_that_strays_ends_as_full_would_have_ended_it() {
    let hosted = hosted();
    let (answer, ticket) = ask(&hosted, WINDOW, Some(Guard { kl: 0.01, tokens: 1 }));
    let at = answer.fell_back_at.unwrap();
    assert!(ticket.fell_back() && at < TOKENS && answer.tokens.len() == TOKENS);
    let full = logits(&hosted, "full", &answer.tokens);
    for (i, token) in answer.tokens.iter().enumerate().skip(at) {
        assert!(full[i].iter().all(|x| *x <= full[i][*token as usize]), "token {i} is not what full says");
    }
}
