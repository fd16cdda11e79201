//! The router: which arm a request gets, what is told of it, and when an arm loses its requests.
#![allow(clippy::unwrap_used, clippy::panic)]

use kvpolicy::{
    ModelSpec, Policy, Registry, Result, Stats,
    compare::{self, Sequence, Subject},
    router::{Arm, ArmReport, Guard, Limits, Next, Outcome, Router, RouterConfig, Ticket, answer, divergence},
    runtime::{HostError, TextModel},
};
use metrics_util::debugging::{DebugValue, DebuggingRecorder};
use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};
use tracing::{Event, Metadata, Subscriber, field, span};

const WINDOW: &str = "window:size=4";

fn arm(text: &str, weight: f64, shadow: f64) -> Arm {
    Arm { name: text.into(), policy: Registry::standard().parse(text).unwrap(), weight, shadow }
}

fn config(arms: Vec<Arm>) -> RouterConfig {
    RouterConfig { arms, salt: 3, guard: None, limits: Limits::default() }
}

fn halves() -> RouterConfig {
    config(vec![arm("full", 1.0, 1.0), arm(WINDOW, 1.0, 1.0)])
}

fn keys() -> impl Iterator<Item = String> {
    (0..2000).map(|i| format!("key {i}"))
}

fn served(router: &Router) -> Vec<String> {
    keys().map(|key| router.route(&key).arm().to_string()).collect()
}

/// A key of the arm.
fn key_of(router: &Router, arm: &str) -> String {
    keys().find(|key| router.route(key).arm() == arm).unwrap()
}

fn outcome(decode_seconds: f64) -> Outcome {
    let kv =
        Stats { mean_bytes: 8.0, peak_bytes: 9, mean_dense_entries: 6.0, mean_live_entries: 3.0, ..Stats::default() };
    Outcome { prefill_seconds: 0.5, decoded: 4, decode_seconds, kv }
}

/// A request whose tokens have these divergences.
fn play(router: &Router, key: &str, kl: &[f64]) -> Option<String> {
    let mut ticket = router.route(key);
    for &kl in kl {
        let _ = ticket.record(kl);
    }
    router.finish(ticket, &outcome(1.0)).map(|rolled_back| rolled_back.reason)
}

fn named(router: &Router, name: &str) -> ArmReport {
    router.arms().into_iter().find(|arm| arm.name == name).unwrap()
}

fn shares(router: &Router) -> Vec<f64> {
    router.arms().iter().map(|arm| arm.share).collect()
}

#[test]
fn a_key_keeps_its_arm_and_shares_are_as_wanted() {
    let router = Router::new(config(vec![arm("full", 3.0, 0.0), arm(WINDOW, 1.0, 0.0)])).unwrap();
    let first = served(&router);
    assert_eq!(first, served(&router));
    let windows = first.iter().filter(|arm| *arm == WINDOW).count() as f64;
    assert!((windows - 500.0).abs() < 4.0 * (2000.0 * 0.25 * 0.75f64).sqrt(), "{windows}");
    assert_eq!(shares(&router), [0.75, 0.25]);
}

#[test]
fn a_shift_moves_only_keys_of_the_arm_that_is_shifted() {
    let arms = vec![arm("full", 5.0, 0.0), arm(WINDOW, 1.0, 0.0), arm("tova:budget=9", 4.0, 0.0)];
    let router = Router::new(config(arms)).unwrap();
    let before = served(&router);
    router.set_weight(WINDOW, 3.0).unwrap();
    let after = served(&router);
    let moved: Vec<_> = before.iter().zip(&after).filter(|(was, is)| was != is).collect();
    assert!(moved.iter().all(|(_, is)| *is == WINDOW) && moved.len() > 200, "{}", moved.len());
    router.set_weight(WINDOW, 1.0).unwrap();
    assert_eq!(served(&router), before);
}

#[test]
fn an_arm_that_is_rolled_back_gives_its_keys_to_the_control_and_gets_them_again() {
    let arms = vec![arm("full", 1.0, 0.0), arm(WINDOW, 1.0, 0.0), arm("tova:budget=9", 2.0, 0.0)];
    let router = Router::new(config(arms)).unwrap();
    let before = served(&router);
    router.roll_back(WINDOW, "a page at night").unwrap();
    let after = served(&router);
    let expected = before.iter().map(|arm| if arm == WINDOW { "full".to_string() } else { arm.clone() });
    assert_eq!(after, expected.collect::<Vec<_>>());
    assert_eq!(shares(&router), [0.5, 0.0, 0.5]);
    assert_eq!(named(&router, WINDOW).rolled_back.as_deref(), Some("a page at night"));
    router.restore(WINDOW).unwrap();
    assert_eq!(served(&router), before);
}

#[test]
fn shadows_are_as_many_as_wanted() {
    for (share, off) in [(0.0, 0.0), (1.0, 0.0), (0.2, 4.0 * (2000.0 * 0.2 * 0.8f64).sqrt())] {
        let router = Router::new(config(vec![arm("full", 1.0, share)])).unwrap();
        let shadowed = keys().filter(|key| router.route(key).is_shadowed()).count() as f64;
        assert!((shadowed - 2000.0 * share).abs() <= off, "{shadowed} of {share}");
        // One key is not always or never the one.
        let drawn: HashSet<bool> = (0..200).map(|_| router.route("the same").is_shadowed()).collect();
        assert_eq!(drawn.len(), 1 + (share == 0.2) as usize);
    }
}

#[test]
fn a_request_falls_back_when_its_newest_tokens_stray_too_far() {
    let guarded = |kl, tokens| Router::new(RouterConfig { guard: Some(Guard { kl, tokens }), ..halves() }).unwrap();
    let walk = |router: &Router, kl: &[f64]| {
        let mut ticket = router.route("anyone");
        let at = kl.iter().position(|&kl| ticket.record(kl) == Next::FallBack);
        (at, ticket.fell_back(), ticket.kl())
    };
    let router = guarded(0.5, 4);
    assert_eq!(walk(&router, &[0.5; 9]), (None, false, Some(0.5)), "the threshold itself is no fault");
    assert_eq!(walk(&router, &[0.0, 0.0, 0.0, 2.0, 0.5]), (Some(4), true, Some(0.5)), "2.5 over the last four");
    assert_eq!(walk(&router, &[1.9, 0.0, 0.0, 0.0, 1.9]).0, None, "the first one is past");
    assert_eq!(walk(&router, &[2.1]).0, Some(0), "enough for four");
    assert_eq!(walk(&router, &[0.0, f64::NAN]).0, Some(1), "no number is as bad as can be");
    assert_eq!(walk(&router, &[]), (None, false, None));
    let unguarded = Router::new(halves()).unwrap();
    assert_eq!(walk(&unguarded, &[f64::INFINITY; 3]), (None, false, Some(f64::INFINITY)));

    let mut ticket = router.route("anyone");
    assert_eq!([ticket.record(9.0), ticket.record(0.0)], [Next::FallBack; 2]);
    assert_eq!(ticket.kl(), Some(9.0), "what comes after is not the arm's");
    let name = ticket.arm().to_string();
    router.finish(ticket, &outcome(1.0));
    assert_eq!((named(&router, &name).fallbacks, named(&router, &name).shadowed), (1, 1));
}

#[test]
fn an_arm_over_its_divergence_is_rolled_back_once_a_window_is_full() {
    let limits = Limits { kl: Some(0.1), seconds_per_token: None, window: 3 };
    let router = Router::new(RouterConfig { limits, ..halves() }).unwrap();
    let key = key_of(&router, WINDOW);
    assert_eq!(play(&router, &key, &[0.9]), None);
    assert_eq!(play(&router, &key, &[0.9]), None, "two are no window");
    assert_eq!(play(&router, &key, &[]), None, "requests without a shadow say nothing");
    let reason = play(&router, &key, &[0.0, 0.0]).unwrap();
    assert_eq!(reason, "KL in nats per token of the last 3 requests is 0.4500, the limit 0.1");
    assert_eq!(named(&router, WINDOW).rolled_back, Some(reason));
    assert_eq!(router.route(&key).arm(), "full");

    router.restore(WINDOW).unwrap();
    assert_eq!(play(&router, &key, &[0.9]), None, "the window began anew");
    for _ in 0..20 {
        assert_eq!(play(&router, &key, &[0.0; 9]), None, "9 tokens weigh more than one");
    }
    assert_eq!(play(&router, &key, &[f64::NAN]).unwrap().split(',').count(), 2, "what is no number passes every limit");
}

#[test]
fn an_arm_that_is_slow_is_rolled_back_and_the_control_never() {
    let limits = Limits { kl: Some(0.0), seconds_per_token: Some(0.5), window: 2 };
    let router = Router::new(RouterConfig { limits, ..halves() }).unwrap();
    for key in [key_of(&router, "full"), key_of(&router, WINDOW)] {
        let rolled_back = |seconds: f64| router.finish(router.route(&key), &outcome(seconds));
        assert!(rolled_back(1.9).is_none(), "4 tokens took 1.9 seconds");
        assert!(rolled_back(2.0).is_none());
        let found = rolled_back(2.5);
        match found {
            Some(found) => {
                assert_eq!(found.arm, WINDOW);
                assert!(found.reason.starts_with("seconds per token of the last 2 requests is 0.5625"), "{found:?}");
            }
            None => assert_eq!(router.route(&key).arm(), "full"),
        }
    }
    assert!(named(&router, "full").rolled_back.is_none() && named(&router, WINDOW).rolled_back.is_some());
    assert_eq!(named(&router, "full").share, 1.0);
}

#[test]
fn requests_that_were_under_way_do_not_roll_back_twice() {
    let limits = Limits { kl: Some(0.1), seconds_per_token: None, window: 1 };
    let router = Router::new(RouterConfig { limits, ..halves() }).unwrap();
    let key = key_of(&router, WINDOW);
    let mut tickets: Vec<Ticket> = (0..2).map(|_| router.route(&key)).collect();
    for ticket in &mut tickets {
        let _ = ticket.record(1.0);
    }
    let told: Vec<bool> = tickets.into_iter().map(|ticket| router.finish(ticket, &outcome(1.0)).is_some()).collect();
    assert_eq!((told, named(&router, WINDOW).requests), (vec![true, false], 2));
}

#[test]
fn sums_are_of_all_requests() {
    let router = Router::new(halves()).unwrap();
    let key = key_of(&router, WINDOW);
    play(&router, &key, &[1.0]);
    play(&router, &key, &[0.0, 0.5, 0.5]);
    router.fail(router.route(&key), &"no memory");
    let arm = named(&router, WINDOW);
    assert_eq!((arm.requests, arm.failures, arm.shadowed, arm.kl), (2, 1, 2, Some(0.5)));
    assert_eq!((arm.prefill_seconds, arm.seconds_per_token), (Some(0.5), Some(0.25)));
    assert_eq!((arm.kv_mean_bytes, arm.kv_peak_bytes, arm.compression), (Some(8.0), 9, Some(2.0)));
    assert_eq!(arm.policy, Registry::standard().parse(WINDOW).unwrap().to_string());
    let untouched = named(&router, "full");
    assert_eq!((untouched.requests, untouched.kl, untouched.compression), (0, None, None));
}

#[test]
fn weights_may_change_while_requests_run() {
    let limits = Limits { kl: Some(0.1), seconds_per_token: None, window: 50 };
    let router = Router::new(RouterConfig { limits, ..halves() }).unwrap();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..4)
            .map(|worker| {
                let router = &router;
                scope.spawn(move || {
                    (0..1000).for_each(|i| drop(play(router, &format!("{worker} {i}"), &[0.01])));
                })
            })
            .collect();
        scope.spawn(|| {
            for i in 0.. {
                router.set_weight(WINDOW, (i % 7) as f64).unwrap();
                router.roll_back(WINDOW, "to see").unwrap();
                assert_eq!(shares(&router), [1.0, 0.0]);
                router.restore(WINDOW).unwrap();
                if done.load(Ordering::Relaxed) {
                    break;
                }
            }
        });
        workers.into_iter().for_each(|worker| worker.join().unwrap());
        done.store(true, Ordering::Relaxed);
    });
    let arms = router.arms();
    assert_eq!(arms.iter().map(|arm| arm.requests).sum::<u64>(), 4000, "none is lost");
    assert!(arms.iter().all(|arm| arm.requests > 0 && (arm.kl.unwrap() - 0.01).abs() < 1e-9));
    router.set_weight(WINDOW, 1.0).unwrap();
    assert_eq!(served(&router), served(&Router::new(halves()).unwrap()), "nothing of it is left in the shares");
}

#[test]
fn what_cannot_be_is_refused_with_every_reason() {
    let mut bad = config(vec![arm("full", -1.0, 0.0), arm("full", f64::NAN, 1.5)]);
    bad.guard = Some(Guard { kl: -0.1, tokens: 0 });
    bad.limits = Limits { kl: Some(f64::NAN), seconds_per_token: None, window: 0 };
    let error = Router::new(bad).unwrap_err().to_string();
    for words in ["twice", "weight=-1", "weight=NaN", "shadow=1.5", "kl=-0.1", "tokens=0", "kl=NaN", "window=0"] {
        assert!(error.contains(words), "`{error}` does not say `{words}`");
    }
    let refused = |config| Router::new(config).unwrap_err().to_string();
    assert!(refused(config(vec![])).contains("no arm"));
    assert!(refused(config(vec![arm("full", 0.0, 0.0)])).contains("leaves no arm"));

    let router = Router::new(halves()).unwrap();
    let says = |result: Result<()>, words: &str| assert!(result.unwrap_err().to_string().contains(words), "{words}");
    says(router.set_weight("tova", 1.0), "no arm is named `tova` (known: `full`, `window:size=4`)");
    says(router.set_weight(WINDOW, f64::INFINITY), "weight=inf");
    says(router.roll_back("full", "why not"), "control");
    says(router.restore("x"), "no arm is named");
    router.set_weight("full", 0.0).unwrap();
    says(router.set_weight(WINDOW, 0.0), "leaves no arm");
    assert!(divergence(&[1.0, 2.0], &[1.0]).is_err());
}

#[test]
fn facades_hear_of_it() {
    let recorder = DebuggingRecorder::new();
    let snapshot = recorder.snapshotter();
    metrics::with_local_recorder(&recorder, || {
        let limits = Limits { kl: Some(0.1), seconds_per_token: None, window: 1 };
        let router = Router::new(RouterConfig { limits, ..halves() }).unwrap();
        play(&router, &key_of(&router, WINDOW), &[0.25, 0.75]);
        router.fail(router.route("x"), &"no memory");
    });
    let mut heard: HashMap<(String, String), DebugValue> = HashMap::new();
    for (key, _, _, value) in snapshot.snapshot().into_vec() {
        let labels: Vec<String> = key.key().labels().map(|l| format!("{}={}", l.key(), l.value())).collect();
        heard.insert((key.key().name().to_string(), labels.join(",")), value);
    }
    let of = |name: &str, arm: &str| heard.get(&(format!("kvpolicy_router_{name}"), format!("arm={arm}")));
    assert_eq!(of("requests", WINDOW), Some(&DebugValue::Counter(1)));
    assert_eq!(of("rollbacks", WINDOW), Some(&DebugValue::Counter(1)));
    assert_eq!(of("failures", "full"), Some(&DebugValue::Counter(1)));
    assert_eq!(of("weight", "full"), Some(&DebugValue::Gauge(1.0.into())));
    assert_eq!(of("rolled_back", WINDOW), Some(&DebugValue::Gauge(1.0.into())));
    for (name, value) in [("kl_nats_per_token", 0.5), ("seconds_per_token", 0.25), ("prefill_seconds", 0.5)] {
        assert_eq!(of(name, WINDOW), Some(&DebugValue::Histogram(vec![f64::into(value)])), "{name}");
    }
}

/// Notes each event with its fields.
#[derive(Default, Clone)]
struct Heard(Arc<Mutex<Vec<String>>>);

struct Fields(String);

impl field::Visit for Fields {
    fn record_debug(&mut self, field: &field::Field, value: &dyn std::fmt::Debug) {
        self.0 += &format!(" {field}={value:?}");
    }
}

impl Subscriber for Heard {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }
    fn event(&self, event: &Event<'_>) {
        let mut fields = Fields(event.metadata().level().to_string());
        event.record(&mut fields);
        self.0.lock().unwrap().push(fields.0);
    }
    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }
    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
    fn enter(&self, _: &span::Id) {}
    fn exit(&self, _: &span::Id) {}
}

#[test]
fn traces_tell_where_traffic_goes() {
    let heard = Heard::default();
    tracing::subscriber::with_default(heard.clone(), || {
        let limits = Limits { kl: Some(0.1), seconds_per_token: None, window: 1 };
        let guard = Some(Guard { kl: 0.5, tokens: 1 });
        let router = Router::new(RouterConfig { limits, guard, ..halves() }).unwrap();
        play(&router, &key_of(&router, WINDOW), &[0.75]);
        router.restore(WINDOW).unwrap();
        router.set_weight(WINDOW, 3.0).unwrap();
        router.fail(router.route("x"), &"no memory");
    });
    let heard = heard.0.lock().unwrap();
    for words in [
        &["INFO", "fell back", "window:size=4", "kl=0.75"][..],
        &["DEBUG", "a request ended", "decoded: 4"],
        &["WARN", "rolled back", "window:size=4", "the limit 0.1"],
        &["INFO", "restored"],
        &["INFO", "another weight", "weight=3.0"],
        &["WARN", "a request failed", "no memory"],
    ] {
        assert!(heard.iter().any(|line| words.iter().all(|word| line.contains(word))), "{words:?} in {heard:?}");
    }
}

/// Says next the token that comes most often in what it sees: all of it under `full`, else the last four. Token 0 ends.
struct Counts;

struct Seen {
    tokens: Vec<u32>,
    sees: usize,
}

const VOCAB: usize = 5;

impl Seen {
    fn logits(&self) -> Vec<f32> {
        let seen = &self.tokens[self.tokens.len().saturating_sub(self.sees)..];
        let count = |token: usize| seen.iter().filter(|&&t| t as usize == token).count() as f32;
        (0..VOCAB).map(count).collect()
    }
}

type Hosted<T> = std::result::Result<T, HostError>;

impl TextModel for Counts {
    fn spec(&self) -> ModelSpec {
        ModelSpec::new(1, 1, 1, 8)
    }
    fn max_context(&self) -> usize {
        100
    }
    fn encode(&self, text: &str) -> Hosted<Vec<u32>> {
        Ok(text.bytes().map(|byte| (byte - b'0') as u32).collect())
    }
    fn decode(&self, tokens: &[u32]) -> Hosted<String> {
        Ok(tokens.iter().map(u32::to_string).collect())
    }
    fn is_end(&self, token: u32) -> bool {
        token == 0
    }
    fn chat(&self, user: &str) -> Hosted<String> {
        Ok(user.into())
    }
}

impl Subject for Counts {
    fn open(&self, policy: &Arc<dyn Policy>) -> Hosted<Box<dyn Sequence + '_>> {
        let sees = if policy.to_string() == "full" { usize::MAX } else { 4 };
        Ok(Box::new(Seen { tokens: vec![], sees }))
    }
}

impl Sequence for Seen {
    fn prefill(&mut self, tokens: &[u32], _: bool) -> Hosted<compare::Next> {
        self.tokens.extend(tokens);
        Ok(compare::Next::Logits(self.logits()))
    }
    fn decode(&mut self, token: u32) -> Hosted<compare::Next> {
        self.prefill(&[token], true)
    }
    fn stats(&self) -> Stats {
        Stats { written: self.tokens.len() as u64, ..Stats::default() }
    }
    fn held(&self, _: usize) -> Vec<Vec<u32>> {
        vec![]
    }
}

/// Softmax and the sum of p ln(p / q), as the textbook has them.
fn textbook_kl(full: &[f32], arm: &[f32]) -> f64 {
    let softmax = |logits: &[f32]| {
        let powers: Vec<f64> = logits.iter().map(|&x| (x as f64).exp()).collect();
        let sum: f64 = powers.iter().sum();
        powers.into_iter().map(|x| x / sum).collect::<Vec<f64>>()
    };
    softmax(full).iter().zip(softmax(arm)).map(|(p, q)| p * (p / q).ln()).sum()
}

const PROMPT: &str = "11111112223";

fn ask(router: &Router, arm: &str, most: usize) -> (kvpolicy::router::Answer, Ticket, String) {
    let mut ticket = router.route(&key_of(router, arm));
    let mut told = String::new();
    let hear = &mut |token: u32| {
        told += &token.to_string();
        Ok(())
    };
    let prompt = Counts.encode(PROMPT).unwrap();
    let answer = answer(&Counts, &mut ticket, &prompt, most, hear).unwrap();
    (answer, ticket, told)
}

#[test]
fn an_answer_is_the_arms_and_its_divergence_that_of_the_same_tokens() {
    let router = Router::new(halves()).unwrap();
    let (own, ticket, told) = ask(&router, WINDOW, 6);
    assert_eq!((told.as_str(), own.tokens.len(), own.fell_back_at), ("222222", 6, None));
    assert_eq!((own.outcome.decoded, own.outcome.kv.written), (5, PROMPT.len() as u64 + 5));
    let at = |said: usize| {
        let tokens = Counts.encode(&(PROMPT.to_string() + &"2".repeat(said))).unwrap();
        let logits = |sees| Seen { tokens: tokens.clone(), sees }.logits();
        textbook_kl(&logits(usize::MAX), &logits(4))
    };
    let sum: f64 = (0..6).map(at).sum();
    assert!((ticket.kl().unwrap() - sum / 6.0).abs() < 1e-12 && sum > 1.0, "{sum}");

    let (dense, ticket, told) = ask(&router, "full", 6);
    assert_eq!((told.as_str(), ticket.kl()), ("111111", Some(0.0)));
    assert_eq!(dense.fell_back_at, None);
}

#[test]
fn an_answer_that_strays_goes_on_under_full() {
    let guard = Some(Guard { kl: 2.0, tokens: 2 });
    let router = Router::new(RouterConfig { guard, ..halves() }).unwrap();
    let (answer, ticket, told) = ask(&router, WINDOW, 8);
    let at = answer.fell_back_at.unwrap();
    assert!(at > 0 && told == "2".repeat(at) + &"1".repeat(8 - at), "{at}: {told}");
    assert_eq!((answer.outcome.decoded, answer.outcome.kv.written), (at, (PROMPT.len() + at) as u64), "the arm's part");
    assert!(ticket.fell_back());

    let unshadowed = config(vec![arm("full", 1.0, 0.0), arm(WINDOW, 1.0, 0.0)]);
    let (answer, ticket, told) = ask(&Router::new(RouterConfig { guard, ..unshadowed }).unwrap(), WINDOW, 8);
    assert_eq!((answer.fell_back_at, ticket.kl(), told.as_str()), (None, None, "22222222"));
}

#[test]
fn an_answer_ends_where_the_model_or_the_listener_ends_it() {
    let router = Router::new(halves()).unwrap();
    let mut ticket = router.route("anyone");
    let ends = answer(&Counts, &mut ticket, &[0, 0, 0, 1], 9, &mut |_| Ok(())).unwrap();
    assert!(ends.tokens.is_empty() && ends.outcome.decoded == 0);
    let gone = &mut |_| Err(kvpolicy::Error::Host("the client left".into()));
    assert!(answer(&Counts, &mut ticket, &[1], 9, gone).unwrap_err().to_string().contains("left"));
}
