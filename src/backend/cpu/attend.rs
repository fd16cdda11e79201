//! Attention over pages: flash style, by tiles, no score matrix beyond a tile.
//!
//! One query a sequence (decode) is split over page ranges and merged; several queries (prefill) are cut into query
//! tiles that walk the row. Attention mass is a second pass over keys alone, with the log-sum-exp of the first.

use super::{Cpu, element::Element, math, offsets, row::Row};
use crate::{backend::Tap, policy::Protect, step::Span};
use rayon::prelude::*;
use std::ops::Range;

/// Entries per split of a decode row.
const SPLIT: usize = 512;
/// Rows (queries times group) of a query tile.
const QUERY_ROWS: usize = 64;
/// Entries of a key tile.
const KEYS: usize = 64;

/// One KV head of one span.
struct Job<'a> {
    row: &'a Row,
    span: &'a Span,
    head: usize,
    /// Index of the span's first token in the step.
    first: usize,
    /// Index of (span, head): where the mass goes.
    index: usize,
}

/// What every job needs.
struct Layer<'a, E> {
    cpu: &'a Cpu<E>,
    layer: usize,
    queries: &'a [f32], // [tokens, q_heads, head_dim]
    protect: Protect,
}

/// The queries' results: `y` `[tokens, q_heads, head_dim]`, `lse` `[tokens, q_heads]`.
struct Output {
    y: Vec<f32>,
    lse: Vec<f32>,
}

/// Attention of all spans, and with a tap the mass of each (span, KV head) in slot order.
pub(super) fn attend<E: Element>(
    cpu: &Cpu<E>,
    layer: usize,
    spans: &[Span],
    queries: &[f32],
    protect: Protect,
    tap: Tap,
) -> (Vec<f32>, Vec<Vec<f32>>) {
    let heads = cpu.spec.kv_heads;
    let jobs = offsets(spans).enumerate().flat_map(|(i, (first, span))| {
        (0..heads).filter_map(move |head| {
            let row = cpu.row(layer, span.seq, head)?;
            Some(Job { row, span, head, first, index: i * heads + head })
        })
    });
    let jobs: Vec<Job> = jobs.collect();
    let layer = Layer { cpu, layer, queries, protect };
    let rows = queries.len() / cpu.spec.head_dim;
    let mut output = Output { y: vec![0.0; queries.len()], lse: vec![0.0; rows] };
    let mut mass = vec![vec![]; spans.len() * heads];
    let (decode, prefill): (Vec<&Job>, Vec<&Job>) = jobs.iter().partition(|job| job.span.len == 1);
    layer.decode(&decode, &mut output, tap, &mut mass);
    layer.prefill(&prefill, &mut output);
    if let Tap::Mass { decay, .. } = tap {
        layer.prefill_mass(&prefill, &output.lse, decay, &mut mass);
    }
    (output.y, mass)
}

/// Softmax over a part of a row for the group's queries: running maximum, sum and unnormalised output.
struct Part {
    max: Vec<f32>,    // [group]
    sum: Vec<f32>,    // [group]
    y: Vec<f32>,      // [group, head_dim]
    scores: Vec<f32>, // page by page [group, entries]
}

impl<E: Element> Layer<'_, E> {
    fn group(&self) -> usize {
        self.cpu.spec.group()
    }

    fn dim(&self) -> usize {
        self.cpu.spec.head_dim
    }

    /// The group's queries of consecutive tokens, scaled: `[tokens * group, head_dim]`.
    fn scaled_queries(&self, job: &Job, tokens: Range<usize>) -> Vec<f32> {
        let (d, width) = (self.dim(), self.group() * self.dim());
        let scale = 1.0 / (d as f32).sqrt();
        let start = |token: usize| ((job.first + token) * self.cpu.spec.q_heads) * d + job.head * width;
        let mut queries: Vec<f32> =
            tokens.flat_map(|t| self.queries[start(t)..][..width].iter().map(move |x| x * scale)).collect();
        if let Some(factors) = self.cpu.key_factors(self.layer) {
            let factors = &factors[job.head * d..][..d];
            queries.iter_mut().zip(factors.iter().cycle()).for_each(|(q, factor)| *q *= factor);
        }
        queries
    }

    fn visible(&self, pos: u32, mark: bool, now: u32) -> bool {
        pos <= now && (!mark || self.protect.covers(pos, now))
    }

    fn decode(&self, jobs: &[&Job], output: &mut Output, tap: Tap, mass: &mut [Vec<f32>]) {
        let pages = SPLIT.div_ceil(self.cpu.pool.page_size);
        let splits = jobs.iter().flat_map(|job| {
            let count = job.row.page_count();
            (0..count).step_by(pages).map(move |from| (*job, from..(from + pages).min(count)))
        });
        let splits: Vec<(&Job, Range<usize>)> = splits.collect();
        let parts: Vec<Part> = splits.par_iter().map(|(job, pages)| self.decode_part(job, pages.clone())).collect();
        let mut parts = splits.iter().map(|(job, _)| job.index).zip(parts).peekable();
        for job in jobs {
            let own: Vec<Part> = std::iter::from_fn(|| parts.next_if(|(i, _)| *i == job.index)).map(|p| p.1).collect();
            self.merge(job, &own, output);
            if tap != Tap::None {
                mass[job.index] = self.decode_mass(job, &own, &output.lse);
            }
        }
    }

    fn decode_part(&self, job: &Job, pages: Range<usize>) -> Part {
        let (group, d, now) = (self.group(), self.dim(), job.span.start);
        let (pool, queries) = (&self.cpu.pool, self.scaled_queries(job, 0..1));
        let mut scores = Vec::with_capacity(pages.len() * pool.page_size * group);
        let (mut max, mut sum) = (vec![f32::NEG_INFINITY; group], vec![0f32; group]);
        let mut buffer = vec![];
        for page in pages.clone() {
            let page = job.row.page(pool, page);
            let keys = page.keys(0..page.pos.len(), &mut buffer);
            for (q, max) in queries.chunks(d).zip(&mut max) {
                let entries = keys.chunks(d).zip(page.pos.iter().zip(page.mark));
                let row = entries.map(
                    |(k, (&pos, &mark))| {
                        if self.visible(pos, mark, now) { math::dot(q, k) } else { f32::NEG_INFINITY }
                    },
                );
                let from = scores.len();
                scores.extend(row);
                *max = max.max(math::max(&scores[from..]));
            }
        }
        let mut y = vec![0f32; group * d];
        let mut weights = vec![0f32; pool.page_size * group];
        let mut at = 0;
        for page in pages {
            let page = job.row.page(pool, page);
            let n = page.pos.len();
            let weights = &mut weights[..n * group];
            for (g, weights) in weights.chunks_mut(n).enumerate() {
                // A part without a visible entry has no maximum to subtract.
                let top = if max[g] == f32::NEG_INFINITY { 0.0 } else { max[g] };
                let scores = &scores[at + g * n..][..n];
                weights.iter_mut().zip(scores).for_each(|(w, s)| *w = math::exp(s - top));
                sum[g] += math::sum(weights);
            }
            math::matmul_add(weights, page.values(0..n, &mut buffer), &mut y, n, d);
            at += n * group;
        }
        Part { max, sum, y, scores }
    }

    fn merge(&self, job: &Job, parts: &[Part], output: &mut Output) {
        let (group, d) = (self.group(), self.dim());
        for g in 0..group {
            let row = job.first * self.cpu.spec.q_heads + job.head * group + g;
            let top = parts.iter().map(|p| p.max[g]).fold(f32::NEG_INFINITY, f32::max);
            if top == f32::NEG_INFINITY {
                continue; // nothing visible: the output stays zero
            }
            let sum: f32 = parts.iter().map(|p| p.sum[g] * math::exp(p.max[g] - top)).sum();
            output.lse[row] = top + sum.ln();
            let y = &mut output.y[row * d..][..d];
            for part in parts {
                let weight = math::exp(part.max[g] - top) / sum;
                y.iter_mut().zip(&part.y[g * d..][..d]).for_each(|(y, x)| *y += weight * x);
            }
        }
    }

    fn decode_mass(&self, job: &Job, parts: &[Part], lse: &[f32]) -> Vec<f32> {
        let (group, page_size) = (self.group(), self.cpu.pool.page_size);
        let lse = &lse[job.first * self.cpu.spec.q_heads + job.head * group..][..group];
        let mut mass = vec![0f32; job.row.len()];
        let mut scores = parts.iter().flat_map(|part| part.scores.iter());
        for page in mass.chunks_mut(page_size) {
            for lse in lse {
                page.iter_mut().zip(scores.by_ref()).for_each(|(m, s)| *m += math::exp(s - lse));
            }
        }
        mass
    }

    fn prefill(&self, jobs: &[&Job], output: &mut Output) {
        let tokens = (QUERY_ROWS / self.group()).max(1);
        let tiles = jobs
            .iter()
            .flat_map(|job| (0..job.span.len).step_by(tokens).map(move |t| (*job, t..(t + tokens).min(job.span.len))));
        let tiles: Vec<(&Job, Range<usize>)> = tiles.collect();
        let done: Vec<Output> = tiles.par_iter().map(|(job, tokens)| self.query_tile(job, tokens.clone())).collect();
        let (d, group) = (self.dim(), self.group());
        for ((job, tokens), tile) in tiles.iter().zip(&done) {
            for (i, token) in tokens.clone().enumerate() {
                let row = (job.first + token) * self.cpu.spec.q_heads + job.head * group;
                output.y[row * d..][..group * d].copy_from_slice(&tile.y[i * group * d..][..group * d]);
                output.lse[row..][..group].copy_from_slice(&tile.lse[i * group..][..group]);
            }
        }
    }

    /// A tile of queries against the whole row: `y` `[tokens * group, head_dim]`, `lse` `[tokens * group]`.
    fn query_tile(&self, job: &Job, tokens: Range<usize>) -> Output {
        let (group, d) = (self.group(), self.dim());
        let queries = self.scaled_queries(job, tokens.clone());
        let rows = queries.len() / d;
        let (mut max, mut sum) = (vec![f32::NEG_INFINITY; rows], vec![0f32; rows]);
        let (mut y, mut scores) = (vec![0f32; rows * d], vec![]);
        let mut keys = KeyTile::default();
        for from in (0..job.row.len()).step_by(KEYS) {
            keys.load(self, job.row, from);
            if !self.scores(job, &tokens, &queries, &keys, &mut scores) {
                continue;
            }
            let n = keys.len();
            for (row, scores) in scores.chunks_mut(n).enumerate() {
                let top = max[row].max(math::max(scores));
                if top == f32::NEG_INFINITY {
                    scores.fill(0.0);
                    continue;
                }
                scores.iter_mut().for_each(|s| *s = math::exp(*s - top));
                if top > max[row] {
                    let fade = math::exp(max[row] - top);
                    sum[row] *= fade;
                    y[row * d..][..d].iter_mut().for_each(|y| *y *= fade);
                    max[row] = top;
                }
                sum[row] += math::sum(scores);
            }
            keys.load_values(self, job.row, from);
            math::matmul_add(&scores, &keys.v, &mut y, n, d);
        }
        for (y, sum) in y.chunks_mut(d).zip(&sum).filter(|(_, sum)| **sum > 0.0) {
            y.iter_mut().for_each(|y| *y /= sum);
        }
        debug_assert_eq!(rows, tokens.len() * group);
        // A query that sees nothing puts no mass anywhere.
        let lse = max.iter().zip(&sum).map(|(max, sum)| if *sum == 0.0 { f32::INFINITY } else { max + sum.ln() });
        let lse = lse.collect();
        Output { y, lse }
    }

    /// Masked scores `[tokens * group, keys]`; false if no query of the tile sees any of the keys.
    fn scores(&self, job: &Job, tokens: &Range<usize>, queries: &[f32], keys: &KeyTile, scores: &mut Vec<f32>) -> bool {
        let (first, last) = (job.span.start + tokens.start as u32, job.span.start + tokens.end as u32 - 1);
        if keys.pos.iter().all(|&pos| pos > last) {
            return false;
        }
        let n = keys.len();
        scores.clear();
        scores.resize(queries.len() / self.dim() * n, 0.0);
        math::matmul_add(queries, &keys.k, scores, self.dim(), n);
        let all_visible = keys.pos.iter().all(|&pos| pos <= first) && !keys.mark.contains(&true);
        if !all_visible {
            for (token, scores) in scores.chunks_mut(self.group() * n).enumerate() {
                let now = first + token as u32;
                for (j, (&pos, &mark)) in keys.pos.iter().zip(&keys.mark).enumerate() {
                    if !self.visible(pos, mark, now) {
                        scores[j..].iter_mut().step_by(n).for_each(|s| *s = f32::NEG_INFINITY);
                    }
                }
            }
        }
        true
    }

    /// The softmax mass on each entry. Tiles own their keys, so no two write the same sum.
    fn prefill_mass(&self, jobs: &[&Job], lse: &[f32], decay: f32, mass: &mut [Vec<f32>]) {
        let tiles = jobs.iter().flat_map(|job| (0..job.row.len()).step_by(KEYS).map(move |from| (*job, from)));
        let tiles: Vec<(&Job, usize)> = tiles.collect();
        let done: Vec<Vec<f32>> =
            tiles.par_iter().map(|(job, from)| self.key_tile_mass(job, *from, lse, decay)).collect();
        for ((job, _), tile) in tiles.iter().zip(done) {
            mass[job.index].extend(tile);
        }
    }

    fn key_tile_mass(&self, job: &Job, from: usize, lse: &[f32], decay: f32) -> Vec<f32> {
        let (group, len) = (self.group(), job.span.len);
        let (mut keys, mut scores) = (KeyTile::default(), vec![]);
        keys.load(self, job.row, from);
        let mut mass = vec![0f32; keys.len()];
        let weight = |token: usize| decay.powi((len - 1 - token) as i32);
        let first = (0..len).find(|&token| weight(token) > 0.0).unwrap_or(len);
        let tokens = (QUERY_ROWS / group).max(1);
        for start in (first..len).step_by(tokens) {
            let tile = start..(start + tokens).min(len);
            let queries = self.scaled_queries(job, tile.clone());
            if !self.scores(job, &tile, &queries, &keys, &mut scores) {
                continue;
            }
            for (i, scores) in scores.chunks(keys.len()).enumerate() {
                let token = tile.start + i / group;
                let row = (job.first + token) * self.cpu.spec.q_heads + job.head * group + i % group;
                let (weight, lse) = (weight(token), lse[row]);
                mass.iter_mut().zip(scores).for_each(|(m, s)| *m += weight * math::exp(s - lse));
            }
        }
        mass
    }
}

/// Consecutive entries of a row, keys transposed.
#[derive(Default)]
struct KeyTile {
    k: Vec<f32>, // [head_dim, entries]
    v: Vec<f32>, // [entries, head_dim]
    pos: Vec<u32>,
    mark: Vec<bool>,
    buffer: Vec<f32>,
}

impl KeyTile {
    fn len(&self) -> usize {
        self.pos.len()
    }

    /// The slots `from..from + KEYS` of a row, as far as there are, page by page: (page, entries of it).
    fn pages<E: Element>(layer: &Layer<E>, row: &Row, from: usize) -> impl Iterator<Item = (usize, Range<usize>)> {
        let (size, end) = (layer.cpu.pool.page_size, (from + KEYS).min(row.len()));
        (from / size..end.div_ceil(size)).map(move |page| {
            let start = page * size;
            (page, from.max(start) - start..end.min(start + size) - start)
        })
    }

    fn load<E: Element>(&mut self, layer: &Layer<E>, row: &Row, from: usize) {
        let (pool, d) = (&layer.cpu.pool, layer.dim());
        let n = KEYS.min(row.len() - from);
        self.k.resize(d * n, 0.0);
        self.pos.clear();
        self.mark.clear();
        for (page, entries) in Self::pages(layer, row, from) {
            let page = row.page(pool, page);
            let keys = page.keys(entries.clone(), &mut self.buffer);
            for (j, key) in (self.pos.len()..).zip(keys.chunks(d)) {
                key.iter().zip(self.k[j..].iter_mut().step_by(n)).for_each(|(x, k)| *k = *x);
            }
            self.pos.extend(&page.pos[entries.clone()]);
            self.mark.extend(&page.mark[entries]);
        }
    }

    fn load_values<E: Element>(&mut self, layer: &Layer<E>, row: &Row, from: usize) {
        let pool = &layer.cpu.pool;
        self.v.clear();
        for (page, entries) in Self::pages(layer, row, from) {
            let page = row.page(pool, page);
            self.v.extend(page.values(entries, &mut self.buffer));
        }
    }
}
