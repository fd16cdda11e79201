//! A pool without room drops one sequence whole, and nobody else notices.

use crate::common::{DECODE, LAST, MORE, Stream, complete, play::Play, policies::EVERY_POLICY, policy};
use candle_core::DType;
use kvpolicy::{CpuConfig, Error, ModelSpec, SeqId, cpu};

const PAGE: usize = 4;
/// Tokens of the two that fit, and of the one that does not.
const SMALL: usize = 24;
const LARGE: usize = 400;

fn spec() -> ModelSpec {
    complete(3, 4, 2, 8)
}

/// Pages that `tokens` tokens take in one layer.
fn pages_per_layer(tokens: usize) -> u64 {
    (spec().kv_heads * tokens.div_ceil(PAGE)) as u64
}

fn limited(text: &str, pages: Option<u64>) -> Play {
    let page_bytes = (PAGE * (2 * 8 * 4 + 9)) as u64;
    let limit_bytes = pages.map(|n| n * page_bytes);
    let store = cpu(&spec(), &CpuConfig { page_size: PAGE, limit_bytes, dtype: DType::F32 }).unwrap();
    Play::on(store, &spec(), policy(text))
}

/// Room for the small ones in all layers, and half-layers of the large one.
fn room(halves: u64) -> u64 {
    3 * 2 * pages_per_layer(SMALL) + pages_per_layer(LARGE) * halves / 2
}

fn streams() -> [Stream; 3] {
    [(SMALL, 1), (SMALL, 2), (LARGE, 3)].map(|(tokens, seed)| Stream::random(&spec(), tokens, seed))
}

/// The layer in which `seq`, and nobody else, was dropped.
#[track_caller]
fn dropped_in(failures: &[(SeqId, Error)], seq: SeqId) -> usize {
    match failures {
        [(dropped, Error::PoolExhausted { seq: named, layer, .. })] if *dropped == seq && *named == seq => *layer,
        other => panic!("{seq} was to be dropped: {other:?}"),
    }
}

/// Each step of the small ones.
fn small_steps() -> Vec<Vec<(usize, usize, kvpolicy::Phase)>> {
    let mut steps = vec![vec![(0, 5, MORE), (1, 9, LAST)], vec![(0, 12, LAST), (1, 1, DECODE)]];
    steps.extend(vec![vec![(0, 1, DECODE), (1, 1, DECODE)]; 7]);
    steps
}

#[test]
fn the_sequence_without_room_is_dropped_and_the_others_do_not_notice() {
    for text in EVERY_POLICY {
        let mut alone = limited(text, None).with(&streams()[..2]);
        alone.run(&small_steps());
        // The large one first, between and last in the batch, in the first step or amid decode.
        for (place, at) in [(0, 0), (1, 1), (2, 4)] {
            drops_the_large_one(text, 1, place, at, &alone);
        }
    }
}

/// A policy that marks gives pages back from layer to layer, so this is for those that do not.
#[test]
fn a_sequence_may_be_dropped_amid_any_layer() {
    for text in
        ["full", "h2o:budget=12,recent=4", "tova:budget=11", "snapkv:budget=13,window=4", "adakv(knorm:budget=9)"]
    {
        let mut alone = limited(text, None).with(&streams()[..2]);
        alone.run(&small_steps());
        for place in 0..=2 {
            let layers = [1, 3, 5].map(|halves| drops_the_large_one(text, halves, place, 4, &alone));
            assert_eq!(layers, [0, 1, 2], "{text}: place {place}");
        }
    }
}

/// Runs the small ones with the large one in one of their steps; `alone` is their run without it. Returns the layer in
/// which the large one was dropped.
fn drops_the_large_one(text: &str, halves: u64, place: usize, at: usize, alone: &Play) -> usize {
    let case = format!("{text}: place {place} in step {at}, room for {halves} halves of a layer");
    let mut play = limited(text, Some(room(halves))).with(&streams());
    let large = play.actors[2].seq;
    let mut dropped = None;
    for (i, mut work) in small_steps().into_iter().enumerate() {
        if i != at {
            assert!(play.step(&work).is_empty(), "{case}");
            continue;
        }
        work.insert(place, (2, LARGE, MORE));
        let layer = *dropped.insert(dropped_in(&play.step(&work), large));
        assert!(play.rows(2).iter().all(Vec::is_empty), "{case}: it holds something");
        let zero = |y: &Vec<f32>| y.len() == LARGE * 32 && y.iter().all(|&y| y == 0.0);
        assert!(play.actors[2].y[layer..].iter().all(zero), "{case}: its outputs are not zero");
        let begun = play.cache.begin(&[(large, 1, DECODE)]);
        assert!(matches!(begun, Err(Error::Sequence { seq, .. }) if seq == large), "{case}: it may go on");
    }
    for who in 0..2 {
        assert_eq!(play.actors[who].y, alone.actors[who].y, "{case}: outputs of sequence {who}");
        assert_eq!(play.rows(who), alone.rows(who), "{case}: rows of sequence {who}");
    }
    let (usage, want) = (play.cache.usage(), alone.cache.usage());
    assert_eq!((usage.pages_in_use, usage.live_entries), (want.pages_in_use, want.live_entries), "{case}");
    assert!(usage.bytes_reserved <= usage.bytes_limit.unwrap(), "{case}");
    dropped.unwrap()
}

#[test]
fn room_that_was_given_back_can_be_used_again() {
    let mut play = limited("full", Some(room(3))).with(&streams());
    let large = play.actors[2].seq;
    dropped_in(&play.step(&[(2, LARGE, LAST)]), large);
    assert_eq!(play.cache.usage().pages_in_use, 0);
    play.release(2);
    assert!(matches!(play.cache.begin(&[(large, 1, DECODE)]), Err(Error::Sequence { .. })), "released");
    play.run(&[vec![(0, SMALL, LAST), (1, SMALL, LAST)]]);
    // The rest of the pool holds one more of half the large one's size in all three layers.
    let half = play.add(Stream::random(&spec(), LARGE / 2, 3));
    play.run(&[vec![(half, LARGE / 2, LAST)]]);
    assert_eq!(play.rows(half), vec![Vec::from_iter(0..LARGE / 2); 6]);
    // Every page is taken now.
    assert_eq!(play.cache.usage().pages_left(), Some(0));
    let one_more = play.add(Stream::random(&spec(), 1, 4));
    let seq = play.actors[one_more].seq;
    assert_eq!(dropped_in(&play.step(&[(one_more, 1, LAST)]), seq), 0);
}

#[test]
fn the_error_says_where_the_pool_ended() {
    let mut play = limited("full", Some(room(3))).with(&streams());
    let [(seq, error)] = play.step(&[(2, LARGE, LAST)]).try_into().unwrap();
    let limit = play.cache.usage().bytes_limit.unwrap();
    let Error::PoolExhausted { layer, position, limit: named, .. } = error else { panic!("{error}") };
    // Whole layers take their pages; both heads grow together through what is left.
    let (whole, left) = (room(3) / pages_per_layer(LARGE), room(3) % pages_per_layer(LARGE));
    assert_eq!((layer as u64, position as u64, named), (whole, left / 2 * PAGE as u64, limit));
    let text = Error::PoolExhausted { seq, layer, position, limit }.to_string();
    for part in
        [format!("sequence {seq}"), format!("{limit} bytes"), format!("layer {layer}"), format!("position {position}")]
    {
        assert!(text.contains(&part), "{text}");
    }
}

#[test]
fn a_policy_that_evicts_lasts_where_the_dense_one_runs_out() {
    let lasted = |text: &str| {
        let mut play = limited(text, Some(3 * pages_per_layer(12))).with(&[Stream::random(&spec(), 60, 1)]);
        play.run(&[vec![(0, 10, LAST)]]);
        (10..60).find(|_| !play.step(&[(0, 1, DECODE)]).is_empty())
    };
    assert_eq!(lasted("full"), Some(12));
    assert_eq!(lasted("window:size=8,sinks=2"), None);
    assert_eq!(lasted("h2o:budget=8,recent=2"), None);
}
