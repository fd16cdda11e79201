//! Forks on the GPU against forks on the CPU.

use crate::{
    MARKING,
    common::{
        DECODE, LAST, MORE, Stream, Work, complete, forked_script, gpu,
        play::{Play, store},
        policies::EVERY_POLICY,
        policy,
    },
    config, on_gpu, rounded, same_lives,
};
use candle_core::{DType, Device};
use kvpolicy::{CudaConfig, Error, ModelSpec, Phase};

const TOKENS: usize = 150;

/// A parent, two of its forks and a fork of a fork.
fn fork_thrice(play: &mut Play, streams: &[Stream]) {
    for (parent, stream) in [(0, 1), (0, 2), (2, 3)] {
        play.fork(parent, streams[stream].clone()).unwrap();
    }
}

fn forked_lives(device: &Device, spec: &ModelSpec, text: &str, config: &CudaConfig, last: Phase, tolerance: f32) {
    let streams: Vec<Stream> = (1..=4).map(|seed| rounded(&Stream::random(spec, TOKENS, seed), config.dtype)).collect();
    let mut cpu = Play::on(store(spec, 16, config.dtype), spec, policy(text)).with(&streams[..1]);
    let mut gpu = on_gpu(device, spec, policy(text), config).with(&streams[..1]);
    let mut before: Vec<Work> = vec![vec![(0, 37, MORE)], vec![(0, 20, if last == MORE { MORE } else { LAST })]];
    if last == DECODE {
        before.extend(vec![vec![(0, 1, DECODE)]; 12]);
    }
    for play in [&mut cpu, &mut gpu] {
        play.run(&before);
        fork_thrice(play, &streams);
    }
    let at = gpu.actors[0].at;
    let what = format!("{text}, pages of {}, {:?}, forked after {last:?}", config.page_size, config.dtype);
    let rows = tolerance < 1e-3 || MARKING.contains(&text);
    same_lives(&mut cpu, &mut gpu, &forked_script(at as u64, TOKENS - at, 30), tolerance, rows, &what);
    gpu.cache.wait().unwrap();
    let usage = gpu.cache.usage();
    let held: usize = (0..4).flat_map(|who| gpu.rows(who)).map(|row| row.len()).sum();
    assert_eq!(usage.live_entries, held as u64, "{what}");
    (0..4).for_each(|who| gpu.release(who));
    gpu.cache.wait().unwrap();
    let usage = gpu.cache.usage();
    assert_eq!((usage.pages_in_use, usage.live_entries), (0, 0), "{what}");
}

#[test]
fn a_fork_does_what_it_does_on_the_cpu() {
    let Some(device) = gpu() else { return };
    let spec = complete(3, 4, 2, 16);
    for text in EVERY_POLICY {
        for last in [MORE, LAST, DECODE] {
            forked_lives(&device, &spec, text, &config(16, DType::F32), last, 5e-5);
        }
    }
    let spec = complete(2, 8, 2, 64);
    for text in MARKING {
        for (dtype, page_size) in [(DType::BF16, 16), (DType::F16, 64), (DType::F8E4M3, 32), (DType::U8, 16)] {
            forked_lives(&device, &spec, text, &config(page_size, dtype), DECODE, 2e-2);
        }
    }
}

fn pages(play: &mut Play) -> u64 {
    play.cache.wait().unwrap();
    play.cache.usage().pages_in_use
}

#[test]
fn eight_answers_to_one_prompt_hold_it_once() {
    let Some(device) = gpu() else { return };
    let spec = complete(3, 4, 2, 64);
    let rows = (spec.layers * spec.kv_heads) as u64;
    let streams: Vec<Stream> = (0..8).map(|i| rounded(&Stream::random(&spec, 1040, i), DType::BF16)).collect();
    for text in ["full", "snapkv:budget=301,window=4", "dms:window=3", "random-gate:rate=0.8,window=20"] {
        let mut play = on_gpu(&device, &spec, policy(text), &config(16, DType::BF16)).with(&streams[..1]);
        play.run(&[vec![(0, 1001, LAST)]]);
        let one = pages(&mut play);
        (1..8).for_each(|i| _ = play.fork(0, streams[i].clone()).unwrap());
        assert_eq!(pages(&mut play), one, "{text}");
        play.run(&[(0..8).map(|who| (who, 1, DECODE)).collect()]);
        let eight = pages(&mut play);
        assert!(one < eight && eight <= one + 8 * 2 * rows, "{text}: {eight} pages for eight, {one} for one");
        if text == "full" {
            assert_eq!(eight, one + 7 * rows); // the page each writes to
        }
    }
    let mut play = on_gpu(&device, &spec, policy("h2o:budget=100,recent=4"), &config(16, DType::BF16));
    play.add(streams[0].clone());
    play.run(&[vec![(0, 1001, LAST)]]);
    let one = pages(&mut play);
    play.fork(0, streams[1].clone()).unwrap();
    assert_eq!(pages(&mut play), 2 * one, "what changes at every token is copied at once");
}

fn limited(device: &Device, spec: &ModelSpec, text: &str, pages: usize) -> Play {
    let page_bytes = 16 * (2 * 64 * 2 + 8);
    let config = CudaConfig { limit_bytes: Some((pages * page_bytes) as u64), ..config(16, DType::BF16) };
    on_gpu(device, spec, policy(text), &config)
}

#[test]
fn want_of_room_hits_the_fork_alone() {
    let Some(device) = gpu() else { return };
    let spec = complete(3, 4, 2, 64);
    let streams: Vec<Stream> = (0..2).map(|i| rounded(&Stream::random(&spec, 90, i), DType::BF16)).collect();
    // Two pages in each of six rows; all is to be copied, and one page is missing for it.
    let mut play = limited(&device, &spec, "h2o:budget=32,recent=4", 12 + 11).with(&streams[..1]);
    play.run(&[vec![(0, 32, LAST)]]);
    let (rows, before) = (play.rows(0), pages(&mut play));
    let error = play.fork(0, streams[1].clone()).unwrap_err();
    assert!(matches!(error, Error::PoolExhausted { seq, .. } if seq == play.actors[0].seq), "{error}");
    assert_eq!((play.rows(0), pages(&mut play)), (rows, before));
    play.run(&vec![vec![(0, 1, DECODE)]; 20]);

    // A window writes over what it dropped, in shared pages; there is no room for the copies of all six rows.
    let run = |forked: bool| {
        let mut play = limited(&device, &spec, "window:size=32", 12 + 3).with(&streams[..1]);
        play.run(&[vec![(0, 32, LAST)]]);
        if forked {
            let fork = play.fork(0, streams[1].clone()).unwrap();
            let mut failures = play.step(&[(fork, 1, DECODE)]);
            failures.extend(play.cache.wait().unwrap());
            let seq = play.actors[fork].seq;
            assert!(matches!(failures[..], [(named, Error::PoolExhausted { .. })] if named == seq), "{failures:?}");
            assert!(play.rows(fork).iter().all(Vec::is_empty));
            play.release(fork);
        }
        play.run(&vec![vec![(0, 1, DECODE)]; 40]);
        (play.rows(0), play.actors[0].y.clone(), pages(&mut play))
    };
    assert_eq!(run(true), run(false));
}

/// A second turn under a policy that drops what died copies the rows first, or the sequence goes.
#[test]
fn a_further_turn_without_room_drops_its_sequence_alone() {
    let Some(device) = gpu() else { return };
    let spec = complete(3, 4, 2, 64);
    let streams: Vec<Stream> = (0..2).map(|i| rounded(&Stream::random(&spec, 90, i), DType::BF16)).collect();
    let mut play = limited(&device, &spec, "window:size=40", 18 + 4).with(&streams[..1]);
    play.run(&[vec![(0, 40, LAST)]]);
    let (rows, before) = (play.rows(0), pages(&mut play));
    let fork = play.fork(0, streams[1].clone()).unwrap();
    let failures = play.step(&[(fork, 5, LAST)]);
    let seq = play.actors[fork].seq;
    assert!(matches!(failures[..], [(named, Error::PoolExhausted { .. })] if named == seq), "{failures:?}");
    assert_eq!((play.rows(0), pages(&mut play)), (rows, before));
    play.release(fork);
    play.run(&vec![vec![(0, 1, DECODE)]; 40]);
}
