//! Budgets of every kind hold exactly, protection comes first, ties drop the older.

use crate::common::{DECODE, LAST, Rng, Stream, cases, complete, play::Play, policies::FirstComponent, policy};
use kvpolicy::{Budget, Protect, When};
use proptest::prelude::*;
use std::sync::Arc;

/// A stream whose scores are few, so that many tie: multiples of 0.5 in the first component of each key.
fn with_ties(spec: &kvpolicy::ModelSpec, tokens: usize, seed: u64) -> Stream {
    let mut stream = Stream::random(spec, tokens, seed);
    for data in &mut stream.layers {
        data.k.iter_mut().step_by(spec.head_dim).for_each(|k| *k = (*k * 2.0).round() / 2.0 + 0.0);
    }
    stream
}

#[derive(Debug, Clone, Copy)]
struct Held {
    score: f32,
    pos: usize,
    head: usize,
}

/// Drops one entry at a time: of those that may go, the lowest; of equal ones the oldest, then that of the first head.
fn trim(rows: &mut [Vec<Held>], budget: &Budget, protect: Protect, newest: usize) {
    let len = |rows: &[Vec<Held>], head: usize| rows[head].len();
    let may_go = |rows: &[Vec<Held>], head: usize| match budget {
        Budget::Unlimited => false,
        Budget::PerHead(n) => len(rows, head) > *n as usize,
        Budget::Heads(n) => len(rows, head) > n[head],
        Budget::Pooled { total, floor } => {
            rows.iter().map(Vec::len).sum::<usize>() > *total && len(rows, head) > *floor
        }
    };
    let free = |e: &Held| e.pos >= protect.sinks as usize && newest - e.pos >= protect.recent as usize;
    loop {
        let candidates = (0..rows.len()).filter(|&head| may_go(rows, head)).flat_map(|head| &rows[head]);
        let order = |e: &Held| ((e.score * 2.0) as i32, e.pos, e.head);
        let Some(lowest) = candidates.filter(|e| free(e)).min_by_key(|e| order(e)).copied() else { return };
        rows[lowest.head].retain(|e| e.pos != lowest.pos);
    }
}

fn budget() -> impl Strategy<Value = Budget> {
    prop_oneof![
        Just(Budget::Unlimited),
        (0.0..30.0).prop_map(Budget::PerHead),
        prop::collection::vec(0..30usize, 3).prop_map(Budget::Heads),
        (0..60usize, 0..25usize).prop_map(|(total, floor)| Budget::Pooled { total, floor }),
    ]
}

proptest! {
    #![proptest_config(cases(200))]

    #[test]
    fn what_stays_is_what_dropping_one_at_a_time_leaves(
        budget in budget(), sinks in 0..4u32, recent in 0..6u32, prompt in 1..40usize, decoded in 0..8usize, seed: u64,
    ) {
        let (spec, tokens, protect) = (complete(2, 3, 3, 8), prompt + decoded, Protect { sinks, recent });
        let stream = with_ties(&spec, tokens, seed);
        let policy = FirstComponent { budget: budget.clone(), protect, when: When::ALWAYS };
        let mut play = Play::new(&spec, Arc::new(policy), 3).with(std::slice::from_ref(&stream));
        let mut layers = vec![vec![vec![]; 3]; 2];
        let mut at = 0;
        for (len, phase) in std::iter::once((prompt, LAST)).chain(vec![(1, DECODE); decoded]) {
            play.run(&[vec![(0, len, phase)]]);
            for (layer, rows) in layers.iter_mut().enumerate() {
                for (pos, head) in (at..at + len).flat_map(|pos| (0..3).map(move |head| (pos, head))) {
                    let score = stream.layers[layer].k[(pos * 3 + head) * spec.head_dim];
                    rows[head].push(Held { score, pos, head });
                }
                trim(rows, &budget, protect, at + len - 1);
                for (head, row) in rows.iter().enumerate() {
                    let want: Vec<usize> = row.iter().map(|e| e.pos).collect();
                    prop_assert_eq!(play.held(0, layer, head), want, "layer {}, head {}", layer, head);
                }
            }
            at += len;
        }
    }
}

#[test]
fn equal_scores_drop_the_older() {
    let spec = complete(1, 2, 2, 8);
    let mut stream = Stream::random(&spec, 40, 1);
    stream.layers[0].k.fill(1.0);
    let policy = FirstComponent { budget: Budget::Heads(vec![2, 7]), protect: Protect::default(), when: When::ALWAYS };
    let mut play = Play::new(&spec, Arc::new(policy), 4).with(&[stream]);
    play.run(&[vec![(0, 30, LAST)]]);
    assert_eq!(play.rows(0), [Vec::from_iter(28..30), Vec::from_iter(23..30)]);
    (30..40).for_each(|_| play.run(&[vec![(0, 1, DECODE)]]));
    assert_eq!(play.rows(0), [Vec::from_iter(38..40), Vec::from_iter(33..40)]);
}

#[test]
fn a_negative_zero_ties_with_zero() {
    let spec = complete(1, 1, 1, 8);
    let mut stream = Stream::random(&spec, 4, 1);
    stream.layers[0].k.chunks_mut(8).zip([0.0, -0.0, 0.0, -0.0]).for_each(|(k, score)| k[0] = score);
    let (protect, when) = (Protect::default(), When::PREFILL_END);
    let policy = FirstComponent { budget: Budget::PerHead(2.0), protect, when };
    let mut play = Play::new(&spec, Arc::new(policy), 4).with(&[stream]);
    play.run(&[vec![(0, 4, LAST)]]);
    assert_eq!(play.held(0, 0, 0), [2, 3]);
}

#[test]
fn a_pool_keeps_its_total_and_every_head_its_floor() {
    // Head 0 has by far the longest keys, so that key norm likes it least: only the floor saves it.
    let spec = complete(1, 2, 2, 8);
    let mut stream = Stream::random(&spec, 20, 31);
    stream.layers[0].k.chunks_mut(16).for_each(|token| token[..8].iter_mut().for_each(|k| *k *= 100.0));
    for (text, want) in [
        ("adakv:floor=0.5(knorm:budget=10)", [5, 15]),
        ("adakv:floor=0.2(knorm:budget=50%)", [2, 18]),
        ("adakv:floor=0(knorm:budget=10)", [0, 20]),
        ("adakv:floor=1(knorm:budget=10)", [10, 10]),
        ("adakv:floor=0(knorm:budget=10,recent=3)", [3, 17]),
    ] {
        let mut play = Play::new(&spec, policy(text), 4).with(std::slice::from_ref(&stream));
        play.run(&[vec![(0, 20, LAST)]]);
        assert_eq!([play.held(0, 0, 0).len(), play.held(0, 0, 1).len()], want, "{text}");
    }
}

/// Entries per head after a prompt.
fn kept(text: &str, tokens: usize) -> Vec<usize> {
    let spec = complete(4, 2, 2, 8);
    let mut play = Play::new(&spec, policy(text), 16).with(&[Stream::random(&spec, tokens, 3)]);
    play.run(&[vec![(0, tokens, LAST)]]);
    play.rows(0).iter().map(Vec::len).collect()
}

#[test]
fn a_share_is_the_whole_part_of_the_tokens_seen() {
    for (percent, tokens, want) in
        [(25, 100, 25), (25, 103, 25), (25, 3, 0), (50, 7, 3), (100, 9, 9), (1, 99, 0), (1, 100, 1), (12, 50, 6)]
    {
        assert_eq!(kept(&format!("knorm:budget={percent}%"), tokens), [want; 8], "{percent}% of {tokens}");
    }
}

#[test]
fn a_share_that_is_whole_is_not_lost_to_rounding() {
    for percent in 1..=100usize {
        assert_eq!(kept(&format!("knorm:budget={percent}%"), 100), [percent; 8], "{percent}% of 100 tokens");
    }
}

#[test]
fn a_share_grows_with_the_sequence() {
    let spec = complete(1, 2, 2, 8);
    let mut rng = Rng(1);
    let mut play =
        Play::new(&spec, policy("h2o:budget=25%,recent=2"), 4).with(&[Stream::random(&spec, 80, rng.draw())]);
    play.run(&[vec![(0, 20, LAST)]]);
    for seen in 21..=80 {
        play.run(&[vec![(0, 1, DECODE)]]);
        assert_eq!(play.held(0, 0, 0).len(), seen / 4, "at {seen} tokens");
    }
}

#[test]
fn a_pyramid_spends_the_same_total_and_narrows_from_layer_to_layer() {
    let lens = kept("pyramid:beta=5(knorm:budget=20)", 100);
    assert_eq!(lens, [36, 36, 25, 25, 15, 15, 4, 4]); // 40 - 4 = 36 down to 20/5 = 4 in equal steps
    assert_eq!(kept("pyramid:beta=1(knorm:budget=20)", 100), [20; 8]);
    assert_eq!(kept("pyramid:beta=5(knorm:budget=20)", 15), [15; 8]); // nothing to drop
}

#[test]
fn a_pyramid_is_the_same_inside_and_outside_of_adakv() {
    let spec = complete(4, 2, 2, 8);
    let rows = |text: &str| {
        let mut play = Play::new(&spec, policy(text), 16).with(&[Stream::random(&spec, 100, 3)]);
        play.run(&[vec![(0, 100, LAST)]]);
        play.rows(0)
    };
    let inside = rows("adakv:floor=0.5(pyramid:beta=5(knorm:budget=20))");
    assert_eq!(rows("pyramid:beta=5(adakv:floor=0.5(knorm:budget=20))"), inside);
    let by_layer: Vec<usize> = inside.chunks(2).map(|heads| heads.concat().len()).collect();
    assert_eq!(by_layer, [72, 50, 30, 8]);
}

#[test]
fn protection_comes_before_any_budget() {
    for budget in [Budget::PerHead(0.0), Budget::Heads(vec![0, 1]), Budget::Pooled { total: 0, floor: 0 }] {
        let spec = complete(1, 2, 2, 8);
        let policy = FirstComponent { budget, protect: Protect { sinks: 2, recent: 3 }, when: When::ALWAYS };
        let mut play = Play::new(&spec, Arc::new(policy), 4).with(&[Stream::random(&spec, 20, 5)]);
        play.run(&[vec![(0, 15, LAST)]]);
        assert_eq!(play.rows(0), [[0, 1, 12, 13, 14], [0, 1, 12, 13, 14]]);
        (15..20).for_each(|_| play.run(&[vec![(0, 1, DECODE)]]));
        assert_eq!(play.rows(0), [[0, 1, 17, 18, 19], [0, 1, 17, 18, 19]]);
    }
}
