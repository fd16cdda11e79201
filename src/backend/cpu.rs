//! The CPU backend: pages in main memory, attention by tiles on all cores.
//!
//! It is the reference every kernel is tested against, so it favours a plain structure; it is fast where that costs
//! little. Storage is f32, f16, bf16, or 8 bits with a factor for each vector; all arithmetic is f32.

mod attend;
mod element;
mod held;
mod math;
mod moments;
mod pool;
mod row;

use crate::{
    backend::{Attention, Backend, Capture, Storage, Tap},
    error::{Error, Result},
    policy::{Budget, Evict, Held, Needs, NewTokens, Protect, Score, Verdict},
    spec::{KeyRange, Lag, ModelSpec},
    stats::Usage,
    step::{SeqId, Span},
};
use candle_core::{DType, Device, Tensor};
use element::{Element, Fp8, Int8};
use half::{bf16, f16};
use moments::Accumulator;
use pool::{Entry, Full, Pool};
use row::Row;
use std::collections::{HashMap, VecDeque};

/// How the CPU store is laid out.
#[derive(Debug, Clone)]
pub struct CpuConfig {
    /// Entries of one KV head per page. Never changes a result.
    pub page_size: usize,
    /// The most bytes the pool may reserve; `None` for no limit.
    pub limit_bytes: Option<u64>,
    /// Type of stored keys and values: f32, f16, bf16, or with a factor for each entry's key and value `F8E4M3` (fp8) and
    /// `U8` (whole numbers from -127 to 127).
    pub dtype: DType,
}

impl Default for CpuConfig {
    fn default() -> Self {
        Self { page_size: 16, limit_bytes: None, dtype: DType::F32 }
    }
}

/// A CPU backend for a model.
///
/// # Errors
/// [`Error::Config`] for a page size of 0, a dtype that is none of those, or a limit below one page.
pub fn cpu(spec: &ModelSpec, config: &CpuConfig) -> Result<Box<dyn Backend>> {
    Ok(match config.dtype {
        DType::F32 => Box::new(Cpu::<f32>::new(spec, config)?),
        DType::F16 => Box::new(Cpu::<f16>::new(spec, config)?),
        DType::BF16 => Box::new(Cpu::<bf16>::new(spec, config)?),
        DType::F8E4M3 => Box::new(Cpu::<Fp8>::new(spec, config)?),
        DType::U8 => Box::new(Cpu::<Int8>::new(spec, config)?),
        other => {
            return Err(Error::Config(format!("kv dtype {other:?} is not supported: f32, f16, bf16, fp8 or int8")));
        }
    })
}

/// Everything stored for one sequence.
#[derive(Debug)]
struct Sequence {
    rows: Vec<Row>, // [layers * kv_heads]
    /// Newest queries of each layer: (position, `[q_heads * head_dim]`).
    queries: Vec<VecDeque<(u32, Vec<f32>)>>,
    moments: Vec<Option<Accumulator>>,
}

#[derive(Debug)]
struct Cpu<E> {
    spec: ModelSpec,
    /// Of each component of a key, in 8 bits; else none: `[layers, kv_heads, head_dim]`.
    key_factors: Option<Vec<f32>>,
    pool: Pool<E>,
    needs: Vec<Needs>,
    sequences: HashMap<SeqId, Sequence>,
    /// Dropped sequences until they are released; the reason until it was told.
    failures: HashMap<SeqId, Option<Error>>,
    live: u64,
    written: u64,
    evicted: u64,
}

impl<E: Element> Cpu<E> {
    fn new(spec: &ModelSpec, config: &CpuConfig) -> Result<Self> {
        Ok(Self {
            spec: spec.clone(),
            key_factors: spec.key_range.as_ref().filter(|_| E::SCALED).map(KeyRange::factors),
            pool: Pool::new(spec.head_dim, config.page_size, config.limit_bytes)?,
            needs: vec![Needs::default(); spec.layers],
            sequences: HashMap::new(),
            failures: HashMap::new(),
            live: 0,
            written: 0,
            evicted: 0,
        })
    }

    /// What the stored components of a layer's keys are to be multiplied by, `[kv_heads, head_dim]`.
    fn key_factors(&self, layer: usize) -> Option<&[f32]> {
        let width = self.spec.kv_heads * self.spec.head_dim;
        Some(&self.key_factors.as_ref()?[layer * width..][..width])
    }

    fn row(&self, layer: usize, seq: SeqId, head: usize) -> Option<&Row> {
        self.sequences.get(&seq).map(|s| &s.rows[layer * self.spec.kv_heads + head])
    }

    fn sequence(&mut self, seq: SeqId) -> &mut Sequence {
        let (spec, needs) = (&self.spec, &self.needs);
        self.sequences.entry(seq).or_insert_with(|| Sequence {
            rows: (0..spec.layers * spec.kv_heads).map(|_| Row::default()).collect(),
            queries: vec![VecDeque::new(); spec.layers],
            moments: needs.iter().map(|n| n.query_moments.map(|m| Accumulator::new(spec, m))).collect(),
        })
    }

    /// Runs `f` on one layer's rows of a sequence; a sequence without rows is passed over.
    fn on_rows(&mut self, layer: usize, seq: SeqId, mut f: impl FnMut(&mut Pool<E>, usize, &mut Row)) {
        let heads = self.spec.kv_heads;
        let Some(sequence) = self.sequences.get_mut(&seq) else { return };
        let rows = &mut sequence.rows[layer * heads..][..heads];
        let before: usize = rows.iter().map(Row::len).sum();
        for (head, row) in rows.iter_mut().enumerate() {
            f(&mut self.pool, head, row);
        }
        let dropped = (before - rows.iter().map(Row::len).sum::<usize>()) as u64;
        (self.live, self.evicted) = (self.live - dropped, self.evicted + dropped);
    }

    /// A sequence that finds no page goes whole.
    fn drop_for(&mut self, seq: SeqId, error: Error) {
        self.release(seq);
        self.failures.insert(seq, Some(error));
    }

    fn append_span(
        &mut self,
        layer: usize,
        span: &Span,
        first: usize,
        tokens: &Tokens,
        protect: Protect,
    ) -> Result<()> {
        let (heads, d) = (self.spec.kv_heads, self.spec.head_dim);
        self.sequence(span.seq);
        let Some(sequence) = self.sequences.get_mut(&span.seq) else { return Ok(()) };
        for i in 0..span.len {
            let (token, pos) = (first + i, span.start + i as u32);
            for head in 0..heads {
                let row = &mut sequence.rows[layer * heads + head];
                let full = exhausted(span.seq, layer, pos);
                let at = token * heads + head;
                let own = match tokens.marks {
                    Marks::Never => false,
                    Marks::Always => true,
                    Marks::Bits(ref bits, Lag::Own) => bits[at] != 0,
                    Marks::Bits(ref bits, Lag::Previous) => {
                        if bits[at] != 0 {
                            row.mark_newest(&mut self.pool, protect).map_err(&full)?;
                        }
                        false
                    }
                };
                let entry = Entry {
                    k: &tokens.k[at * d..][..d],
                    v: &tokens.v[at * d..][..d],
                    pos,
                    mark: own,
                    score: tokens.scores.as_ref().map_or(0.0, |s| s[at]),
                };
                let before = row.len();
                row.write(&mut self.pool, &entry, span.start, protect).map_err(full)?;
                let reused = (row.len() == before) as u64;
                self.written += 1;
                self.evicted += reused;
                self.live += 1 - reused;
            }
        }
        Ok(())
    }
}

/// What a sequence that finds no page is dropped for.
fn exhausted(seq: SeqId, layer: usize, position: u32) -> impl Fn(Full) -> Error {
    move |full| Error::PoolExhausted { seq, layer, position, limit: full.limit }
}

/// New tokens as slices.
struct Tokens {
    k: Vec<f32>, // [tokens, kv_heads, head_dim]
    v: Vec<f32>,
    scores: Option<Vec<f32>>, // [tokens, kv_heads]
    marks: Marks,
}

enum Marks {
    Never,
    Always,
    Bits(Vec<u8>, Lag), // [tokens, kv_heads]
}

impl Tokens {
    fn read(new: &NewTokens, verdict: &Verdict) -> Result<Self> {
        let flat = |t: &Tensor| -> Result<Vec<f32>> { Ok(t.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?) };
        let scores = verdict.score.as_ref().map(|s| s.to_dtype(DType::F32)?.flatten_all()?.to_vec1());
        let marks = match &verdict.evict {
            Evict::Never => Marks::Never,
            Evict::Always => Marks::Always,
            Evict::Bits { bits, lag } => Marks::Bits(bits.to_dtype(DType::U8)?.flatten_all()?.to_vec1()?, *lag),
        };
        Ok(Self { k: flat(&new.k)?, v: flat(&new.v)?, scores: scores.transpose()?, marks })
    }
}

/// Each span with the index of its first token.
fn offsets(spans: &[Span]) -> impl Iterator<Item = (usize, &Span)> {
    spans.iter().scan(0, |at, span| {
        let first = *at;
        *at += span.len;
        Some((first, span))
    })
}

impl<E: Element> Storage for Cpu<E> {
    fn device(&self) -> &Device {
        &Device::Cpu
    }

    fn prepare(&mut self, spec: &ModelSpec, needs: &[Needs]) -> Vec<String> {
        let why = super::misfits(&self.spec, spec, needs);
        self.needs = needs.to_vec();
        why
    }

    fn append(
        &mut self,
        layer: usize,
        spans: &[Span],
        new: &NewTokens,
        verdict: &Verdict,
        protect: Protect,
    ) -> Result<()> {
        let mut tokens = Tokens::read(new, verdict)?;
        if let Some(factors) = self.key_factors(layer) {
            tokens.k.iter_mut().zip(factors.iter().cycle()).for_each(|(k, factor)| *k /= factor);
        }
        for (first, span) in offsets(spans) {
            if self.failures.contains_key(&span.seq) {
                continue;
            }
            if let Err(error) = self.append_span(layer, span, first, &tokens, protect) {
                self.drop_for(span.seq, error);
            }
        }
        Ok(())
    }

    fn observe(&mut self, layer: usize, spans: &[Span], q: &Tensor) -> Result<()> {
        let Needs { last_queries, query_moments, .. } = self.needs[layer];
        if last_queries == 0 && query_moments.is_none() {
            return Ok(());
        }
        let width = self.spec.q_heads * self.spec.head_dim;
        let q: Vec<f32> = q.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
        let spec = &self.spec;
        for (first, span) in offsets(spans) {
            let Some(sequence) = self.sequences.get_mut(&span.seq) else { continue };
            let queries = &q[first * width..][..span.len * width];
            if let Some(moments) = &mut sequence.moments[layer] {
                moments.add(spec, span.start, queries);
            }
            let ring = &mut sequence.queries[layer];
            let skip = span.len.saturating_sub(last_queries);
            ring.extend(queries.chunks(width).enumerate().skip(skip).map(|(i, q)| (span.start + i as u32, q.to_vec())));
            ring.drain(..ring.len().saturating_sub(last_queries));
        }
        Ok(())
    }

    fn expire(&mut self, layer: usize, spans: &[Span], protect: Protect) -> Result<()> {
        for span in spans {
            self.on_rows(layer, span.seq, |pool, _, row| row.expire(pool, span.newest(), protect));
        }
        Ok(())
    }

    fn trim(
        &mut self,
        layer: usize,
        spans: &[Span],
        score: &Score,
        budgets: &[Budget],
        protect: Protect,
    ) -> Result<()> {
        let dense = match score {
            Score::Carried => None,
            Score::Dense(scores) => {
                let rows = spans.len() * self.spec.kv_heads;
                let longest =
                    spans.iter().flat_map(|s| (0..self.spec.kv_heads).filter_map(|h| self.row(layer, s.seq, h)));
                let expected = vec![rows, longest.map(Row::len).max().unwrap_or(0).max(1)];
                if scores.dims() != expected {
                    return Err(Error::Shape { what: "the policy's scores", expected, got: scores.dims().to_vec() });
                }
                Some(scores.to_dtype(DType::F32)?.to_vec2::<f32>()?)
            }
        };
        let heads = self.spec.kv_heads;
        for (i, (span, budget)) in spans.iter().zip(budgets).enumerate() {
            let Some(sequence) = self.sequences.get(&span.seq) else { continue };
            let rows = &sequence.rows[layer * heads..][..heads];
            let ranks = dense.as_ref().map(|dense| {
                let of_row = rows.iter().zip(&dense[i * heads..]).map(|(row, ranks)| row.by_slot(&self.pool, ranks));
                of_row.collect::<Vec<_>>()
            });
            let doomed = row::over_budget(&self.pool, rows, ranks.as_deref(), budget, span.newest(), protect);
            self.on_rows(layer, span.seq, |pool, head, row| row.remove(pool, &doomed[head]));
        }
        Ok(())
    }

    fn held<'a>(&'a self, layer: usize, spans: &'a [Span]) -> Result<Box<dyn Held + 'a>> {
        Ok(Box::new(held::Gathered::new(self, layer, spans)))
    }

    fn fork(&mut self, from: SeqId, to: SeqId, share: &[bool]) -> Result<()> {
        let (heads, mut rows) = (self.spec.kv_heads, vec![]);
        let Some(parent) = self.sequences.get(&from) else { return Ok(()) };
        for (i, row) in parent.rows.iter().enumerate() {
            match row.fork(&mut self.pool, share[i / heads]) {
                Ok(row) => rows.push(row),
                Err(full) => {
                    rows.into_iter().for_each(|row| row.free(&mut self.pool));
                    let position = parent.rows.iter().map(Row::len).max().unwrap_or(0) as u32;
                    return Err(exhausted(from, i / heads, position)(full));
                }
            }
        }
        self.live += rows.iter().map(|row| row.len() as u64).sum::<u64>();
        let (queries, moments) = (parent.queries.clone(), parent.moments.clone());
        self.sequences.insert(to, Sequence { rows, queries, moments });
        Ok(())
    }

    fn unshare(&mut self, layer: usize, spans: &[Span]) -> Result<()> {
        for span in spans {
            let heads = self.spec.kv_heads;
            let Some(sequence) = self.sequences.get_mut(&span.seq) else { continue };
            let mut rows = sequence.rows[layer * heads..][..heads].iter_mut();
            if let Err(full) = rows.try_for_each(|row| row.unshare(&mut self.pool)) {
                self.drop_for(span.seq, exhausted(span.seq, layer, span.start)(full));
            }
        }
        Ok(())
    }

    fn release(&mut self, seq: SeqId) {
        self.failures.remove(&seq);
        let Some(sequence) = self.sequences.remove(&seq) else { return };
        for row in sequence.rows {
            self.live -= row.len() as u64;
            row.free(&mut self.pool);
        }
    }

    fn take_failures(&mut self, spans: &[Span]) -> Vec<(SeqId, Error)> {
        let told = spans.iter().filter_map(|span| Some((span.seq, self.failures.get_mut(&span.seq)?.take()?)));
        told.collect()
    }

    fn usage(&self) -> Usage {
        let kv = self.pool.vector_bytes();
        Usage {
            live_entries: self.live,
            pages_in_use: self.pool.pages_in_use(),
            bytes_in_use: self.pool.pages_in_use() * self.pool.page_bytes(),
            bytes_peak: self.pool.pages_peak() * self.pool.page_bytes(),
            bytes_reserved: self.pool.pages_reserved() * self.pool.page_bytes(),
            bytes_limit: self.pool.limit(),
            page_entries: self.pool.page_size as u64,
            page_bytes: self.pool.page_bytes(),
            written: self.written,
            evicted: self.evicted,
            dense_bytes_per_token: (self.spec.layers * self.spec.kv_heads * kv) as u64,
        }
    }

    fn full_rows(&self, sequences: &[SeqId]) -> u64 {
        let page = self.usage().page_entries as usize;
        let lens = sequences.iter().flat_map(|&seq| (0..self.spec.layers).flat_map(move |layer| self.live(layer, seq)));
        lens.filter(|len| len.is_multiple_of(page)).count() as u64
    }

    fn live(&self, layer: usize, seq: SeqId) -> Vec<usize> {
        (0..self.spec.kv_heads).map(|head| self.row(layer, seq, head).map_or(0, Row::len)).collect()
    }

    fn held_positions(&self, layer: usize, seq: SeqId, kv_head: usize) -> Vec<u32> {
        let Some(row) = self.row(layer, seq, kv_head) else { return vec![] };
        let mut positions: Vec<u32> = row.pages(&self.pool).flat_map(|page| page.pos.iter().copied()).collect();
        positions.sort_unstable();
        positions
    }
}

impl<E: Element> Capture for Cpu<E> {}

/// The rows of each sequence, one a KV head, replaced by their sum over `q_heads`. They hold the same positions in the
/// same slots.
fn mean_over_heads(mass: Vec<Vec<f32>>, heads: usize, q_heads: usize) -> Vec<Vec<f32>> {
    let mean = |rows: &[Vec<f32>]| -> Vec<f32> {
        let slots = rows.iter().map(Vec::len).min().unwrap_or(0);
        (0..slots).map(|slot| rows.iter().map(|row| row[slot]).sum::<f32>() / q_heads as f32).collect()
    };
    mass.chunks(heads).flat_map(|rows| vec![mean(rows); heads]).collect()
}

impl<E: Element> Attention for Cpu<E> {
    fn attend(&mut self, layer: usize, spans: &[Span], q: &Tensor, protect: Protect, tap: Tap) -> Result<Tensor> {
        let (y, mass) = {
            let queries: Vec<f32> = q.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
            attend::attend(self, layer, spans, &queries, protect, tap)
        };
        if let Tap::Mass { decay, layer: whole } = tap {
            let heads = self.spec.kv_heads;
            let mass = if whole { mean_over_heads(mass, heads, self.spec.q_heads) } else { mass };
            for (i, span) in spans.iter().enumerate() {
                let fade = decay.powi(span.len as i32);
                self.on_rows(layer, span.seq, |pool, head, row| row.add_scores(pool, fade, &mass[i * heads + head]));
            }
        }
        Ok(Tensor::from_vec(y, q.shape(), &Device::Cpu)?.to_dtype(q.dtype())?)
    }
}
