//! Policies that rank hold what plain lists in f64 hold, written from the methods' definitions.

use crate::common::{
    DECODE, LAST, Rng, Stream, assert_close, cases, chunks, complete, life,
    lists::{Entry, Lists, Method},
    play::Play,
    policy,
};
use kvpolicy::ModelSpec;
use proptest::{prelude::*, sample::select, test_runner::TestCaseError};
use std::slice::from_ref;

type Verdict = Result<(), TestCaseError>;

/// A sequence and how it is passed.
#[derive(Debug, Clone)]
struct Case {
    spec: ModelSpec,
    page_size: usize,
    tokens: usize,
    longest: usize,
    seed: u64,
}

fn case() -> impl Strategy<Value = Case> {
    let shape = (1..=2usize, 1..=3usize, 1..=3usize, select(vec![8, 16]));
    (shape, select(vec![1, 3, 16]), 8..=60usize, select(vec![1, 6, 60]), any::<u64>()).prop_map(
        |((layers, kv_heads, group, head_dim), page_size, tokens, longest, seed)| {
            let spec = complete(layers, kv_heads * group, kv_heads, head_dim);
            Case { spec, page_size, tokens, longest, seed }
        },
    )
}

/// Entries or a share in percent, as text and as a number at any time.
fn budget() -> impl Strategy<Value = (String, Keep)> {
    let entries = (6..=20usize).prop_map(|n| (n.to_string(), Keep::Entries(n)));
    let share = select(vec![25usize, 50, 75, 100]).prop_map(|p| (format!("{p}%"), Keep::Percent(p)));
    prop_oneof![entries, share]
}

#[derive(Debug, Clone, Copy)]
enum Keep {
    Entries(usize),
    Percent(usize),
}

impl Keep {
    fn of(self, seen: usize) -> usize {
        match self {
            Self::Entries(n) => n,
            Self::Percent(p) => seen * p / 100,
        }
    }
}

fn method<'a>(
    keep: Keep,
    recent: usize,
    every: Option<usize>,
    rank: impl Fn(&Lists, usize) -> Vec<f64> + 'a,
) -> Method<'a> {
    Method { keep: Box::new(move |seen| keep.of(seen)), sinks: 0, recent, every, ties: false, rank: Box::new(rank) }
}

fn of_each(lists: &Lists, head: usize, score: impl Fn(&Entry) -> f64) -> Vec<f64> {
    lists.heads[head].iter().map(score).collect()
}

/// Outputs and held positions after every step of a random life with several turns.
fn equals_lists(text: &str, case: &Case, method: &Method) -> Verdict {
    let Case { spec, page_size, tokens, longest, seed } = case;
    let mut rng = Rng(*seed);
    let stream = Stream::random(spec, *tokens, rng.draw());
    let mut play = Play::new(spec, policy(text), *page_size).with(from_ref(&stream));
    let mut layers: Vec<Lists> = stream.layers.iter().map(|data| Lists::new(spec, data)).collect();
    for (len, phase) in life(&mut rng, *tokens, *longest) {
        let before = layers[0].seen * spec.q_heads * spec.head_dim;
        play.run(&[vec![(0, len, phase)]]);
        for (layer, lists) in layers.iter_mut().enumerate() {
            let want = lists.step(len, phase, method);
            assert_close(&play.actors[0].y[layer][before..], &want, 3e-5, &format!("layer {layer}, {phase:?}"));
            prop_assume!(lists.clear, "two scores are too close for f32");
            for head in 0..spec.kv_heads {
                let (held, seen) = (play.held(0, layer, head), lists.seen);
                assert_eq!(held, lists.positions(head), "layer {layer}, head {head}, {seen} tokens, {phase:?}");
            }
        }
    }
    Ok(())
}

/// The mean attention that the newest `window` queries, over all of the group, pay to each entry older than them,
/// smoothed over `kernel` neighbours.
fn snapkv(lists: &Lists, head: usize, window: usize, kernel: usize, max: bool) -> Vec<f64> {
    let (group, seen) = (lists.group(), lists.seen);
    let mut total = vec![0.0; lists.heads[head].len()];
    for q_head in head * group..(head + 1) * group {
        let mut votes = vec![0.0; total.len()];
        for query in seen.saturating_sub(window)..seen {
            for ((vote, weight), entry) in votes.iter_mut().zip(lists.weights(q_head, query)).zip(&lists.heads[head]) {
                *vote += if entry.pos + window < seen { weight / window as f64 } else { 0.0 };
            }
        }
        for (i, total) in total.iter_mut().enumerate() {
            let near = &votes[i.saturating_sub(kernel / 2)..(i + kernel / 2 + 1).min(votes.len())];
            let pooled = match max {
                true => near.iter().copied().fold(0.0, f64::max),
                false => near.iter().sum::<f64>() / kernel as f64,
            };
            *total += pooled / group as f64;
        }
    }
    total
}

fn norm(x: &[f64]) -> f64 {
    x.iter().map(|x| x * x).sum::<f64>().sqrt()
}

proptest! {
    #![proptest_config(cases(80))]

    /// Sums run over prefill and decode, entries of earlier trims and turns included.
    #[test]
    fn h2o_keeps_the_largest_sums(case in case(), (text, keep) in budget(), recent in 0..=6usize) {
        let sums = method(keep, recent, Some(1), |lists, head| of_each(lists, head, |e| e.sum));
        equals_lists(&format!("h2o:budget={text},recent={recent}"), &case, &sums)?;
    }

    #[test]
    fn h2o_normalised_keeps_the_largest_means(case in case(), (text, keep) in budget(), recent in 0..=6usize) {
        let means = method(keep, recent, Some(1), |lists, head| {
            of_each(lists, head, |e| e.sum / (lists.seen - e.pos) as f64 / lists.group() as f64)
        });
        equals_lists(&format!("h2o:budget={text},recent={recent},normalise=true"), &case, &means)?;
    }

    #[test]
    fn tova_drops_what_the_newest_query_looks_at_least(
        case in case(), (text, keep) in budget(), recent in 0..=6usize,
    ) {
        let newest = method(keep, recent, Some(1), |lists, head| {
            let over_heads = |i: usize| lists.heads.iter().map(|row| row[i].last).sum::<f64>();
            (0..lists.heads[head].len()).map(over_heads).collect()
        });
        equals_lists(&format!("tova:budget={text},recent={recent}"), &case, &newest)?;
    }

    #[test]
    fn snapkv_keeps_what_the_window_votes_for(
        case in case(),
        (text, keep) in budget(),
        window in 1..=6usize,
        kernel in select(vec![1usize, 3, 5, 9]),
        max: bool,
        every in prop::option::of(1..=4usize),
    ) {
        let mut votes = method(keep, window, every, |lists, head| snapkv(lists, head, window, kernel, max));
        votes.ties = max; // neighbours share their maximum
        let pool = if max { "max" } else { "avg" };
        let own = format!("snapkv:budget={text},window={window},kernel={kernel},pool={pool}");
        equals_lists(&every.map_or(own.clone(), |n| format!("every({n}, {own})")), &case, &votes)?;
    }

    #[test]
    fn knorm_keeps_the_smallest_keys(
        case in case(), (text, keep) in budget(), recent in 0..=6usize, every in prop::option::of(1..=4usize),
    ) {
        let norms = method(keep, recent, every, |lists, head| {
            of_each(lists, head, |e| -norm(&lists.key(head, e.pos)))
        });
        let own = format!("knorm:budget={text},recent={recent}");
        equals_lists(&every.map_or(own.clone(), |n| format!("every({n}, {own})")), &case, &norms)?;
    }

    #[test]
    fn keydiff_drops_the_keys_most_like_the_average(
        case in case(), (text, keep) in budget(), recent in 0..=6usize, every in prop::option::of(1..=4usize),
    ) {
        let unlike = method(keep, recent, every, |lists, head| {
            let unit = |e: &Entry| {
                let key = lists.key(head, e.pos);
                let length = norm(&key);
                key.into_iter().map(|x| x / length).collect::<Vec<_>>()
            };
            let units: Vec<Vec<f64>> = lists.heads[head].iter().map(unit).collect();
            let mean = (0..lists.spec.head_dim).map(|i| units.iter().map(|u| u[i]).sum::<f64>() / units.len() as f64);
            let mean: Vec<f64> = mean.collect();
            units.iter().map(|u| -u.iter().zip(&mean).map(|(a, b)| a * b).sum::<f64>() / norm(&mean)).collect()
        });
        let own = format!("keydiff:budget={text},recent={recent}");
        equals_lists(&every.map_or(own.clone(), |n| format!("every({n}, {own})")), &case, &unlike)?;
    }

    /// Each position has one number for good, so the best n of a whole prompt are those that trims on the way leave.
    #[test]
    fn random_keeps_the_same_choice_however_it_is_reached(case in case(), budget in 1..=20usize, every in 1..=5usize) {
        let mut rng = Rng(case.seed);
        let stream = Stream::random(&case.spec, case.tokens, 1);
        let held = |text: &str, moves: &[(usize, kvpolicy::Phase)]| {
            let mut play = Play::new(&case.spec, policy(text), case.page_size).with(from_ref(&stream));
            moves.iter().for_each(|&(len, phase)| play.run(&[vec![(0, len, phase)]]));
            play.rows(0)
        };
        let (all, own) = ([(case.tokens, LAST)], format!("random:budget={budget},seed=3"));
        let want = held(&own, &all);
        prop_assert!(want.iter().all(|row| row.len() == budget.min(case.tokens)));
        prop_assert_eq!(&held(&own, &life(&mut rng, case.tokens, case.longest)), &want);
        prop_assert_eq!(&held(&own, &chunks(&mut rng, case.tokens, case.longest)), &want);
        prop_assert_eq!(&held(&format!("every({every}, {own})"), &all), &want);
        let smaller = held(&format!("random:budget={},seed=3", budget.max(2) - 1), &all);
        for (small, large) in smaller.iter().zip(&want) {
            prop_assert!(small.iter().all(|pos| large.contains(pos)));
        }
    }
}

#[test]
fn h2o_shields_the_newest_half_of_its_budget_unless_told_otherwise() {
    let spec = complete(1, 2, 2, 8);
    let stream = Stream::random(&spec, 100, 4);
    let rows = |text: &str| {
        let mut play = Play::new(&spec, policy(text), 16).with(from_ref(&stream));
        play.run(&[vec![(0, 90, LAST)]]);
        (90..100).for_each(|_| play.run(&[vec![(0, 1, DECODE)]]));
        play.rows(0)
    };
    assert_eq!(rows("h2o:budget=21"), rows("h2o:budget=21,recent=10"));
    assert_ne!(rows("h2o:budget=21"), rows("h2o:budget=21,recent=0"));
    assert_eq!(rows("h2o:budget=50%"), rows("h2o:budget=50%,recent=32"));
}

#[test]
fn random_differs_between_rows_and_seeds_and_spreads_over_the_prompt() {
    let spec = complete(2, 2, 2, 8);
    let stream = Stream::random(&spec, 1_000, 0);
    let rows = |seed: usize| {
        let mut play = Play::new(&spec, policy(&format!("random:budget=500,seed={seed}")), 16).with(from_ref(&stream));
        play.run(&[vec![(0, 1_000, LAST)]]);
        play.rows(0)
    };
    let all = [0, 1, 2].map(rows).concat();
    for (i, row) in all.iter().enumerate() {
        let early = row.iter().filter(|&&pos| pos < 500).count();
        assert!((200..=300).contains(&early), "row {i} keeps {early} of the first half");
        assert!(all[..i].iter().all(|other| other != row), "row {i} repeats another");
    }
    assert_eq!(rows(1), rows(1));
}

#[test]
fn trims_come_at_the_end_of_a_prompt_and_then_at_the_cadence() {
    let spec = complete(1, 1, 1, 8);
    let lens = |text: &str| {
        let mut play = Play::new(&spec, policy(text), 4).with(&[Stream::random(&spec, 60, 2)]);
        let mut lens = vec![];
        let turn = |phase, n: usize| std::iter::repeat_n((1, phase), n);
        let prompt = [(12, crate::common::MORE), (8, LAST)];
        for (len, phase) in prompt.into_iter().chain(turn(DECODE, 5)).chain([(4, LAST)]).chain(turn(DECODE, 4)) {
            play.run(&[vec![(0, len, phase)]]);
            lens.push(play.held(0, 0, 0).len());
        }
        lens
    };
    assert_eq!(lens("knorm:budget=10"), [12, 10, 11, 12, 13, 14, 15, 10, 11, 12, 13, 14]);
    assert_eq!(lens("every(3, knorm:budget=10)"), [12, 10, 11, 12, 10, 11, 12, 10, 11, 12, 10, 11]);
    assert_eq!(lens("h2o:budget=10,recent=2"), [12, 10, 10, 10, 10, 10, 10, 10, 10, 10, 10, 10]);
    assert_eq!(lens("every(2, tova:budget=10)"), [12, 10, 11, 10, 11, 10, 11, 10, 11, 10, 11, 10]);
    assert_eq!(lens("rkv:budget=10,window=2,buffer=4"), [12, 10, 11, 12, 13, 10, 11, 10, 11, 12, 13, 10]);
}
