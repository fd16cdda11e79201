//! What the store says it holds equals a recount, through random lives of several sequences.

use crate::common::{
    DECODE, LAST, MORE, Rng, Stream, Work, cases, complete, play::Play, policies::EVERY_POLICY, policy,
};
use candle_core::DType;
use kvpolicy::{CpuConfig, Error, ModelSpec, cpu};
use proptest::{prelude::*, sample::select};

/// Tokens a sequence may take before it has to be released.
const LONGEST: usize = 90;

/// The books beside the cache's own.
#[derive(Debug, Default)]
struct Books {
    /// Sequences in use, by index; the others were released.
    open: Vec<usize>,
    written: u64,
    /// Entries given back by releases.
    released: u64,
    /// False once a sequence was dropped: how far it came is the store's own affair.
    complete: bool,
    peak_bytes: u64,
    /// (bytes in use, live entries, entries of a dense cache) after each step that is sampled.
    samples: Vec<[f64; 3]>,
}

struct World {
    play: Play,
    page_size: usize,
    page_bytes: u64,
    books: Books,
}

impl World {
    fn new(spec: &ModelSpec, text: &str, page_size: usize, dtype: DType, limit_pages: Option<u64>) -> Self {
        let factor = if dtype.size_in_bytes() == 1 { 4 } else { 0 };
        let page_bytes = (page_size * (2 * (spec.head_dim * dtype.size_in_bytes() + factor) + 4 + 1 + 4)) as u64;
        let limit_bytes = limit_pages.map(|pages| pages * page_bytes + page_bytes / 2);
        let store = cpu(spec, &CpuConfig { page_size, limit_bytes, dtype }).unwrap();
        let books = Books { complete: true, ..Books::default() };
        Self { play: Play::on(store, spec, policy(text)), page_size, page_bytes, books }
    }

    fn rows(&self) -> usize {
        self.play.spec.layers * self.play.spec.kv_heads
    }

    fn live(&self, who: usize) -> u64 {
        self.play.rows(who).iter().map(|row| row.len() as u64).sum()
    }

    /// One random thing that can happen.
    fn act(&mut self, rng: &mut Rng) {
        match rng.below(12) {
            0 | 1 if self.books.open.len() < 4 => self.open(rng),
            2 if !self.books.open.is_empty() => {
                let who = self.books.open.swap_remove(rng.below(self.books.open.len()));
                self.release(who);
            }
            _ => self.step(rng),
        }
    }

    fn open(&mut self, rng: &mut Rng) {
        let stream = Stream::random(&self.play.spec, LONGEST, rng.draw());
        self.books.open.push(self.play.add(stream));
    }

    fn release(&mut self, who: usize) {
        self.books.released += self.live(who);
        self.play.release(who);
        assert_eq!(self.live(who), 0);
    }

    /// A step of a random choice of sequences in random phases.
    fn step(&mut self, rng: &mut Rng) {
        let mut work: Work = vec![];
        for &who in &self.books.open {
            let left = LONGEST - self.play.actors[who].at;
            if left > 0 && rng.chance(0.7) {
                let (len, phase) =
                    if rng.chance(0.6) { (1, DECODE) } else { (1 + rng.below(25), rng.pick(&[MORE, LAST])) };
                work.insert(rng.below(work.len() + 1), (who, len.min(left), phase));
            }
        }
        if work.is_empty() {
            return;
        }
        let failures = self.play.step(&work);
        self.books.written += work.iter().map(|(_, len, _)| (len * self.rows()) as u64).sum::<u64>();
        for (seq, error) in failures {
            assert!(matches!(error, Error::PoolExhausted { seq: named, .. } if named == seq), "{error}");
            self.books.complete = false;
            let who = *self.books.open.iter().find(|&&who| self.play.actors[who].seq == seq).unwrap();
            self.books.open.retain(|&open| open != who);
            assert_eq!(self.live(who), 0, "a dropped sequence holds nothing");
            self.play.release(who);
        }
        let usage = self.play.cache.usage();
        self.books.peak_bytes = self.books.peak_bytes.max(usage.bytes_in_use);
        if work.iter().any(|&(.., phase)| phase != MORE) {
            let tokens: usize = self.books.open.iter().map(|&who| self.play.actors[who].at).sum();
            let dense = (tokens * self.rows()) as f64;
            self.books.samples.push([usage.bytes_in_use as f64, usage.live_entries as f64, dense]);
        }
    }

    fn audit(&self) {
        let usage = self.play.cache.usage();
        let rows = self.books.open.iter().flat_map(|&who| self.play.rows(who));
        let lens: Vec<usize> = rows.map(|row| row.len()).collect();
        assert_eq!(usage.live_entries, lens.iter().sum::<usize>() as u64);
        let (cache, layers) = (&self.play.cache, 0..self.play.spec.layers);
        let seqs = self.books.open.iter().map(|&who| self.play.actors[who].seq);
        let live = seqs.flat_map(|seq| layers.clone().flat_map(move |layer| cache.live(layer, seq)));
        assert_eq!(live.collect::<Vec<_>>(), lens);
        let pages: usize = lens.iter().map(|len| len.div_ceil(self.page_size)).sum();
        assert_eq!(usage.pages_in_use, pages as u64);
        assert_eq!((usage.page_entries, usage.page_bytes), (self.page_size as u64, self.page_bytes));
        assert_eq!(usage.bytes_in_use, usage.pages_in_use * self.page_bytes);
        let limit = usage.bytes_limit.map(|limit| limit / self.page_bytes);
        assert_eq!(usage.pages_left(), limit.map(|pages| pages - usage.pages_in_use));
        assert!(usage.bytes_reserved >= usage.bytes_in_use);
        assert_eq!(usage.bytes_reserved % self.page_bytes, 0);
        assert!(usage.bytes_limit.is_none_or(|limit| usage.bytes_reserved <= limit));
        if self.books.complete {
            assert_eq!(usage.written, self.books.written);
            assert_eq!(usage.live_entries, usage.written - usage.evicted - self.books.released);
        }
    }

    fn audit_stats(&self) {
        let (stats, samples) = (self.play.cache.stats(), &self.books.samples);
        assert_eq!(stats.sampled_steps, samples.len() as u64);
        // Within a step there may be more: what is written before the policy trims.
        let reserved = self.play.cache.usage().bytes_reserved;
        assert!((self.books.peak_bytes..=reserved).contains(&stats.peak_bytes), "{stats:?}");
        assert_eq!(stats.peak_bytes % self.page_bytes, 0);
        let mean = |i: usize| samples.iter().map(|sample| sample[i]).sum::<f64>() / samples.len().max(1) as f64;
        let close = |a: f64, b: f64| (a - b).abs() <= 1e-9 * b.abs();
        assert!(close(stats.mean_bytes, mean(0)) && close(stats.mean_live_entries, mean(1)), "{stats:?}");
        if self.books.complete {
            assert!(close(stats.mean_dense_entries, mean(2)), "{stats:?}, {}", mean(2));
        }
    }
}

proptest! {
    #![proptest_config(cases(120))]

    #[test]
    fn the_books_balance_after_every_operation(
        text in select(EVERY_POLICY),
        page_size in select(vec![1, 3, 16]),
        dtype in select(vec![DType::F32, DType::BF16, DType::F8E4M3, DType::U8]),
        limit_pages in prop::option::of(1..=200u64),
        seed: u64,
    ) {
        let mut rng = Rng(seed);
        let mut world = World::new(&complete(3, 4, 2, 8), text, page_size, dtype, limit_pages);
        world.open(&mut rng);
        for _ in 0..40 {
            world.act(&mut rng);
            world.audit();
        }
        world.audit_stats();
        while let Some(who) = world.books.open.pop() {
            world.release(who);
            world.audit();
        }
        let usage = world.play.cache.usage();
        prop_assert_eq!((usage.pages_in_use, usage.live_entries, usage.bytes_in_use), (0, 0, 0));
    }
}

#[test]
fn an_idle_store_reserves_nothing_and_a_used_one_takes_its_pages_again() {
    let spec = complete(1, 2, 2, 8);
    let mut play = Play::new(&spec, policy("full"), 16);
    assert_eq!(play.cache.usage().bytes_reserved, 0);
    let mut reserved = 0;
    for round in 0..5 {
        let who = play.add(Stream::random(&spec, 50, round));
        play.run(&[vec![(who, 50, LAST)]]);
        let usage = play.cache.usage();
        assert_eq!(usage.live_entries, 100);
        assert!(round == 0 || usage.bytes_reserved == reserved, "the pages of round {round} were not taken again");
        reserved = usage.bytes_reserved;
        play.release(who);
    }
}

#[test]
fn compression_is_what_a_dense_cache_would_hold_for_what_is_held() {
    let spec = complete(1, 2, 2, 8);
    let mut play = Play::new(&spec, policy("window:size=10"), 1).with(&[Stream::random(&spec, 40, 0)]);
    assert_eq!(play.cache.stats().compression(), 1.0);
    play.run(&[vec![(0, 40, LAST)]]);
    let stats = play.cache.stats();
    assert_eq!((stats.compression(), stats.written, stats.evicted), (4.0, 80, 60));
    assert_eq!(stats.dense_peak_bytes, 40 * 2 * 2 * 8 * 4);
}
