//! A fork is, to the bit, a sequence that did all its parent did; what both hold is stored once until one of them writes.

use crate::common::{
    DECODE, LAST, MORE, Stream, complete, forked_script,
    play::{Play, store},
    policies::EVERY_POLICY,
    policy,
};
use candle_core::DType;
use kvpolicy::{CpuConfig, Error, ModelSpec, Phase, cpu};

/// Tokens of each sequence, and how many of them are the parent's.
const TOKENS: usize = 60;
const PAGE: usize = 4;

fn spec() -> ModelSpec {
    complete(3, 4, 2, 8)
}

fn stream(seed: u64) -> Stream {
    Stream::random(&spec(), TOKENS, seed)
}

/// The steps that the parent makes alone.
fn before(phase: Phase) -> Vec<(usize, Phase)> {
    match phase {
        MORE => vec![(13, MORE)],
        LAST => vec![(9, MORE), (14, LAST)],
        DECODE => [vec![(9, MORE), (14, LAST)], vec![(1, DECODE); 7]].concat(),
    }
}

fn forked_lives(text: &str, phase: Phase, dtype: DType) {
    let (before, at) = (before(phase), before(phase).iter().map(|(len, _)| len).sum());
    let play = || Play::on(store(&spec(), PAGE, dtype), &spec(), policy(text));
    let parent = stream(1);
    let streams: Vec<Stream> = (1..=4).map(|seed| parent.until(at, &stream(seed))).collect();

    let mut alone = play().with(&streams);
    for &(len, phase) in &before {
        alone.run(&[(0..4).map(|who| (who, len, phase)).collect()]);
    }
    let mut forked = play().with(&streams[..1]);
    forked.run(&before.iter().map(|&(len, phase)| vec![(0, len, phase)]).collect::<Vec<_>>());
    forked.fork(0, streams[1].clone()).unwrap();
    forked.fork(0, streams[2].clone()).unwrap();
    forked.fork(2, streams[3].clone()).unwrap();

    for (i, work) in forked_script(at as u64, TOKENS - at, 9).into_iter().enumerate() {
        alone.run(std::slice::from_ref(&work));
        forked.run(std::slice::from_ref(&work));
        let usage = [&alone, &forked].map(|play| play.cache.usage());
        assert_eq!(usage[0].live_entries, usage[1].live_entries, "{text}, forked after {phase:?}, step {i}");
        assert!(usage[1].pages_in_use <= usage[0].pages_in_use, "{text}, forked after {phase:?}, step {i}");
    }
    for who in 0..4 {
        let case = format!("{text} in {dtype:?}, forked after {phase:?}: sequence {who}");
        assert_eq!(forked.rows(who), alone.rows(who), "{case}");
        assert_eq!(forked.actors[who].y, alone.actors[who].y, "{case}");
    }
    (0..4).for_each(|who| forked.release(who));
    let usage = forked.cache.usage();
    assert_eq!((usage.pages_in_use, usage.live_entries), (0, 0), "{text}, forked after {phase:?}");
}

#[test]
fn a_fork_goes_on_as_if_it_had_done_it_all_itself() {
    for text in EVERY_POLICY {
        for phase in [MORE, LAST, DECODE] {
            forked_lives(text, phase, DType::F32);
        }
        forked_lives(text, DECODE, DType::F8E4M3);
    }
}

/// After a prompt of this many tokens, forked seven times, and `decoded` more in each of the eight: pages that one of the
/// eight alone would hold, and that they hold together.
fn pages_of_eight(text: &str, prompt: usize, decoded: usize) -> [u64; 2] {
    let run = |forks: usize| {
        let streams: Vec<Stream> = (0..=7).map(|seed| Stream::random(&spec(), prompt + decoded, seed)).collect();
        let mut play = Play::new(&spec(), policy(text), PAGE).with(&streams[..1]);
        play.run(&[vec![(0, prompt, LAST)]]);
        (1..=forks).for_each(|i| _ = play.fork(0, streams[i].clone()).unwrap());
        play.run(&vec![(0..=forks).map(|who| (who, 1, DECODE)).collect(); decoded]);
        play.cache.usage().pages_in_use
    };
    [run(0), run(7)]
}

#[test]
fn eight_answers_to_one_prompt_hold_it_once() {
    let rows = (spec().layers * spec().kv_heads) as u64;
    for text in ["full", "snapkv:budget=301,window=4", "pyramid:beta=4(keydiff:budget=301)", "dms:window=3"] {
        let [one, none_decoded] = pages_of_eight(text, 402, 0);
        assert_eq!(none_decoded, one, "{text}");
        let [one, eight] = pages_of_eight(text, 402, 1);
        // A token is written to one page of a row at most, and one more is marked.
        assert!(one < eight && eight <= one + 7 * 2 * rows, "{text}: {eight} pages for eight, {one} for one");
    }
    // The page that each writes to, and nothing else: 402 tokens end amid a page.
    assert_eq!(pages_of_eight("full", 402, 1)[1], rows * (402u64.div_ceil(4) + 7));
}

#[test]
fn what_changes_at_every_token_is_copied_at_once() {
    let [one, eight] = pages_of_eight("h2o:budget=100,recent=4", 402, 0);
    assert_eq!(eight, 8 * one);
}

fn limited(text: &str, pages: u64) -> Play {
    let page_bytes = (PAGE * (2 * 8 * 4 + 9)) as u64;
    let config = CpuConfig { page_size: PAGE, limit_bytes: Some(pages * page_bytes), dtype: DType::F32 };
    Play::on(cpu(&spec(), &config).unwrap(), &spec(), policy(text))
}

#[test]
fn a_fork_without_room_changes_nothing() {
    // Three pages in each of six rows; the fork finds room for two rows and a half.
    let mut play = limited("h2o:budget=12,recent=4", 18 + 8).with(&[stream(1)]);
    play.run(&[vec![(0, 12, LAST)]]);
    let (seq, rows, usage) = (play.actors[0].seq, play.rows(0), play.cache.usage());
    let error = play.fork(0, stream(2)).unwrap_err();
    assert!(matches!(error, Error::PoolExhausted { seq: named, layer: 1, .. } if named == seq), "{error}");
    let now = play.cache.usage();
    assert_eq!((play.rows(0), now.pages_in_use, now.live_entries), (rows, usage.pages_in_use, usage.live_entries));
    play.run(&vec![vec![(0, 1, DECODE)]; 9]);
}

#[test]
fn who_cannot_copy_a_page_is_dropped_and_the_others_do_not_notice() {
    // A window writes over what it dropped: in shared pages. Two pages are left for the copies of six rows.
    let mut play = limited("window:size=8", 12 + 2).with(&[stream(1)]);
    play.run(&[vec![(0, 8, LAST)]]);
    let fork = play.fork(0, stream(2)).unwrap();
    let (seq, mut alone) = (play.actors[fork].seq, limited("window:size=8", 12).with(&[stream(1)]));
    alone.run(&[vec![(0, 8, LAST)]]);
    let failures = play.step(&[(fork, 1, DECODE)]);
    assert!(matches!(failures[..], [(named, Error::PoolExhausted { layer: 1, .. })] if named == seq), "{failures:?}");
    play.run(&vec![vec![(0, 1, DECODE)]; 9]);
    alone.run(&vec![vec![(0, 1, DECODE)]; 9]);
    assert_eq!((play.rows(0), &play.actors[0].y), (alone.rows(0), &alone.actors[0].y));
    assert_eq!(play.cache.usage().pages_in_use, 12);
}

#[test]
fn what_is_not_there_cannot_be_forked() {
    let mut play = Play::new(&spec(), policy("full"), PAGE).with(&[stream(1)]);
    let seq = play.actors[0].seq;
    let empty = play.cache.fork(seq).unwrap(); // an empty sequence is one as well
    assert_eq!(play.cache.seen(empty).unwrap(), 0);
    let step = play.cache.begin(&[(seq, 3, LAST)]).unwrap();
    let refused = |play: &mut Play| play.cache.fork(seq).unwrap_err().to_string();
    assert!(refused(&mut play).contains("is in a step"));
    play.cache.abort(step);
    assert!(refused(&mut play).contains("was dropped"));
    play.cache.release(seq);
    assert!(refused(&mut play).contains("is unknown"));
}
