//! Page size, chunking, the time of reclaim and batch mates never change an output or a kept set, whatever the policy.

use crate::common::{
    DECODE, LAST, Move, Rng, Stream, Work, assert_close, chunks, complete,
    lazy::Lazy,
    life,
    play::{Play, store},
    policies::{EVERY_POLICY, MarkAndRank},
    policy,
};
use candle_core::DType;
use kvpolicy::{Budget, ModelSpec, Phase, Policy, Registry};
use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};

const TOKENS: usize = 85;

fn spec() -> ModelSpec {
    complete(3, 4, 2, 16)
}

fn stream() -> Stream {
    Stream::random(&spec(), TOKENS, 77)
}

/// Two turns, each a prompt and some decode, and the start of a third, with each prompt as `prompt` cuts it.
fn turns(mut prompt: impl FnMut(usize) -> Vec<Move>) -> Vec<Move> {
    let decode = |n| vec![(1, DECODE); n];
    [prompt(41), decode(11), prompt(20), decode(9), prompt(4)].concat()
}

fn whole(tokens: usize) -> Vec<Move> {
    vec![(tokens, LAST)]
}

/// What the outside can tell of a sequence's life.
struct Seen {
    /// Each layer's outputs.
    y: Vec<Vec<f32>>,
    /// By tokens seen, wherever a prompt ends or a token was decoded: the positions of every row.
    held: BTreeMap<usize, Vec<Vec<usize>>>,
}

/// Sequence 0 of the script under observation.
fn observe(play: &mut Play, script: impl IntoIterator<Item = Work>) -> Seen {
    let mut held = BTreeMap::new();
    for work in script {
        play.run(std::slice::from_ref(&work));
        if work.iter().any(|&(who, _, phase)| who == 0 && phase != (Phase::Prefill { last: false })) {
            held.insert(play.actors[0].at, play.rows(0));
        }
    }
    Seen { y: play.actors[0].y.clone(), held }
}

fn alone(moves: Vec<Move>) -> impl Iterator<Item = Work> {
    moves.into_iter().map(|(len, phase)| vec![(0, len, phase)])
}

fn plain(policy: &Arc<dyn Policy>, page_size: usize, moves: Vec<Move>) -> Seen {
    let mut play = Play::new(&spec(), policy.clone(), page_size).with(&[stream()]);
    observe(&mut play, alone(moves))
}

fn same_outputs(got: &Seen, want: &Seen, what: &str) {
    for (layer, (got, want)) in got.y.iter().zip(&want.y).enumerate() {
        let want: Vec<f64> = want.iter().map(|&y| y as f64).collect();
        assert_close(got, &want, 2e-5, &format!("{what}, layer {layer}"));
    }
}

fn same(got: &Seen, want: &Seen, what: &str) {
    for (seen, rows) in &want.held {
        assert_eq!(got.held.get(seen), Some(rows), "{what}: held after {seen} tokens");
    }
    same_outputs(got, want, what);
}

/// Every registered policy with what it does on its own.
fn each(check: impl Fn(&str, &Arc<dyn Policy>, &Seen)) {
    let own: [(&str, Arc<dyn Policy>); 2] = [
        ("mark-and-rank", Arc::new(MarkAndRank { recent: 4, budget: Budget::PerHead(9.0) })),
        ("mark-and-rank, pooled", Arc::new(MarkAndRank { recent: 4, budget: Budget::Pooled { total: 20, floor: 6 } })),
    ];
    let registered = EVERY_POLICY.iter().map(|text| (*text, policy(text)));
    for (text, policy) in registered.chain(own) {
        check(text, &policy, &plain(&policy, 16, turns(whole)));
    }
}

#[test]
fn the_list_names_every_registered_policy() {
    for entry in Registry::standard().entries() {
        let name = entry.info.name;
        let named = EVERY_POLICY.iter().any(|text| text.split(&[':', '(', ' ', '=']).any(|word| word == name));
        assert!(named, "`{name}` is in no string");
    }
}

#[test]
fn every_policy_but_the_dense_ones_evicts_here() {
    each(|text, _, want| {
        let held: usize = want.held[&TOKENS].iter().map(Vec::len).sum();
        let dense = matches!(text, "full" | "dms:disable=true");
        assert_eq!(held == TOKENS * 3 * 2, dense, "{text} holds {held} entries");
    });
}

#[test]
fn page_size_never_matters() {
    each(|text, policy, want| {
        for page_size in [1, 3, 64] {
            same(&plain(policy, page_size, turns(whole)), want, &format!("{text} with pages of {page_size}"));
        }
    });
}

#[test]
fn chunking_never_matters() {
    each(|text, policy, want| {
        for longest in [1, 4, 30] {
            let mut rng = Rng(longest as u64);
            let moves = turns(|tokens| chunks(&mut rng, tokens, longest));
            same(&plain(policy, 3, moves), want, &format!("{text} in chunks of up to {longest}"));
        }
    });
}

#[test]
fn batch_mates_never_matter() {
    each(|text, policy, want| {
        for seed in 0..2 {
            let mut rng = Rng(seed);
            let lens = [TOKENS, 130, 30];
            let mates: Vec<_> = lens[1..].iter().map(|&len| Stream::random(&spec(), len, rng.draw())).collect();
            let mut play = Play::new(&spec(), policy.clone(), 3).with(&[stream()]).with(&mates);
            let lives = [turns(whole), life(&mut rng, lens[1], 40), life(&mut rng, lens[2], 5)];
            let script = crate::common::weave(&mut rng, lives.into());
            same(&observe(&mut play, script), want, &format!("{text} in batch {seed}"));
        }
    });
}

/// The lives of `turns` on a store that skips a random half of its expiries until the last prompt.
fn reclaimed_late(policy: &Arc<dyn Policy>, seed: u64) -> Seen {
    let idle = Arc::new(AtomicBool::new(true));
    let inner = store(&spec(), 3, DType::F32);
    let lazy = Lazy { inner, rng: Rng(seed), idle: idle.clone() };
    let mut play = Play::on(Box::new(lazy), &spec(), policy.clone()).with(&[stream()]);
    let mut rng = Rng(seed);
    let script: Vec<Work> = alone(turns(|tokens| chunks(&mut rng, tokens, 12))).collect();
    let last = script.len() - 1;
    observe(
        &mut play,
        script.into_iter().enumerate().map(|(i, work)| {
            idle.store(i < last, Relaxed);
            work
        }),
    )
}

#[test]
fn the_time_of_reclaim_never_matters() {
    each(|text, policy, want| {
        for seed in 0..2 {
            let got = reclaimed_late(policy, seed);
            same_outputs(&got, want, &format!("{text}, reclaimed late"));
            for (seen, rows) in &want.held {
                let rows = rows.iter().zip(&got.held[seen]);
                for (row, (want, got)) in rows.enumerate() {
                    assert!(want.iter().all(|pos| got.contains(pos)), "{text}: row {row} lost some at {seen}");
                }
            }
            assert_eq!(got.held[&TOKENS], want.held[&TOKENS], "{text}: held once all was reclaimed");
        }
    });
}

#[test]
fn batch_mates_never_matter_to_rkv_when_unlike_keys_count_as_similar() {
    // The padding of shorter rows has cosine 0 to everything, which is above -0.5.
    let policy = policy("rkv:budget=12,buffer=2,window=2,kernel=1,lambda=0.1,similar=-0.5");
    let want = plain(&policy, 16, turns(whole));
    // Wherever the observed sequence trims, a mate with longer rows trims beside it.
    let mate = Stream::random(&spec(), 300, 1);
    let mut play = Play::new(&spec(), policy, 16).with(&[stream(), mate]);
    let beside = |(len, phase)| vec![(0, len, phase), (1, if phase == LAST { 90 } else { 1 }, phase)];
    same(&observe(&mut play, turns(whole).into_iter().map(beside)), &want, "rkv with a longer mate");
}
