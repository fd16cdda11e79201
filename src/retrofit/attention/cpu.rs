//! On the CPU: the specification. Blocks of tokens are independent, forward and backward.

use super::{LEAST_KEEP, SoftAttention, SoftGrads};
use crate::error::{Error, Result};
use candle_core::{DType, Device, Tensor, WithDType};
use rayon::prelude::*;
use std::ops::Range;

/// Tokens of a block, which one thread computes.
const BLOCK: usize = 32;
/// Keys or queries taken at a time.
const TILE: usize = 64;

/// f32 or f64.
trait Real: WithDType + Default {
    const LOWEST: Self;
    fn of(x: f32) -> Self;
    fn exp(self) -> Self;
    fn ln(self) -> Self;
}

macro_rules! real {
    ($($float:ident),*) => {$(
        impl Real for $float {
            const LOWEST: Self = $float::NEG_INFINITY;
            fn of(x: f32) -> Self {
                x.into()
            }
            fn exp(self) -> Self {
                self.exp()
            }
            fn ln(self) -> Self {
                self.ln()
            }
        }
    )*};
}
real!(f32, f64);

pub(super) fn forward(of: &SoftAttention, qkv: &Tensor, keep: Option<&Tensor>) -> Result<(Tensor, Tensor)> {
    match qkv.dtype() {
        DType::F32 => forward_in::<f32>(of, qkv, keep),
        DType::F64 => forward_in::<f64>(of, qkv, keep),
        other => Err(unserved(other)),
    }
}

pub(super) fn backward(
    of: &SoftAttention,
    qkv: &Tensor,
    keep: Option<&Tensor>,
    y: &Tensor,
    lse: &Tensor,
    dy: &Tensor,
) -> Result<SoftGrads> {
    match qkv.dtype() {
        DType::F32 => backward_in::<f32>(of, qkv, keep, y, lse, dy),
        DType::F64 => backward_in::<f64>(of, qkv, keep, y, lse, dy),
        other => Err(unserved(other)),
    }
}

fn unserved(dtype: DType) -> Error {
    Error::Config(format!("soft attention on the CPU is in f32 or f64, not {dtype:?}"))
}

fn flat<E: Real>(tensor: &Tensor) -> Result<Vec<E>> {
    Ok(tensor.flatten_all()?.to_vec1()?)
}

/// The operands. Tokens are numbered through all sequences.
struct Operands<'a, E> {
    of: &'a SoftAttention,
    qkv: Vec<E>,
    keep: Option<Vec<E>>,
}

impl<'a, E: Real> Operands<'a, E> {
    fn new(of: &'a SoftAttention, qkv: &Tensor, keep: Option<&Tensor>) -> Result<Self> {
        Ok(Self { of, qkv: flat(qkv)?, keep: keep.map(flat).transpose()? })
    }

    /// A head of `qkv`, the queries' first.
    fn head(&self, token: usize, head: usize) -> &[E] {
        let (heads, dim) = (self.of.heads(), self.of.head_dim);
        &self.qkv[(token * heads + head) * dim..][..dim]
    }

    fn k(&self, token: usize, kv_head: usize) -> &[E] {
        self.head(token, self.of.q_heads + kv_head)
    }

    fn v(&self, token: usize, kv_head: usize) -> &[E] {
        self.head(token, self.of.q_heads + self.of.kv_heads + kv_head)
    }

    /// Of a key no later than the query, in the same sequence.
    fn score(&self, query: usize, key: usize, head: usize) -> E {
        let kv_head = head / self.of.group();
        let score = E::of(self.of.scale) * dot(self.head(query, head), self.k(key, kv_head));
        match &self.keep {
            Some(keep) if self.beyond(query, key) => {
                score + keep[key * self.of.kv_heads + kv_head].max(E::of(LEAST_KEEP))
            }
            _ => score,
        }
    }

    fn beyond(&self, query: usize, key: usize) -> bool {
        query - key > self.of.window
    }

    /// The keys a query attends to.
    fn keys(&self, query: usize) -> Range<usize> {
        query - query % self.of.length..query + 1
    }

    /// The queries that attend to a key.
    fn queries(&self, key: usize) -> Range<usize> {
        key..key - key % self.of.length + self.of.length
    }
}

fn tiles(range: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let end = range.end;
    range.step_by(TILE).map(move |first| first..end.min(first + TILE))
}

fn dot<E: Real>(a: &[E], b: &[E]) -> E {
    const LANES: usize = 16; // one after another, each sum would wait for the one before
    let mut lanes = [E::default(); LANES];
    let (a_chunks, b_chunks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let rest = a_chunks.remainder().iter().zip(b_chunks.remainder());
    let rest = rest.fold(E::default(), |sum, (&x, &y)| sum + x * y);
    for (x, y) in a_chunks.zip(b_chunks) {
        for i in 0..LANES {
            lanes[i] += x[i] * y[i];
        }
    }
    lanes.into_iter().fold(rest, |sum, x| sum + x)
}

/// `sum += weight * x`
fn add<E: Real>(sum: &mut [E], weight: E, x: &[E]) {
    sum.iter_mut().zip(x).for_each(|(sum, &x)| *sum += weight * x);
}

fn multiply<E: Real>(x: &mut [E], by: E) {
    x.iter_mut().for_each(|x| *x *= by);
}

fn forward_in<E: Real>(of: &SoftAttention, qkv: &Tensor, keep: Option<&Tensor>) -> Result<(Tensor, Tensor)> {
    let operands = Operands::<E>::new(of, qkv, keep)?;
    let &SoftAttention { q_heads, head_dim, .. } = of;
    let (tokens, width) = (of.tokens(), q_heads * head_dim);
    let (mut y, mut lse) = (vec![E::default(); tokens * width], vec![E::default(); tokens * q_heads]);
    let blocks = y.par_chunks_mut(BLOCK * width).zip(lse.par_chunks_mut(BLOCK * q_heads));
    blocks.enumerate().for_each(|(block, (y, lse))| {
        for (i, (y, lse)) in y.chunks_exact_mut(head_dim).zip(lse).enumerate() {
            *lse = attend(&operands, block * BLOCK + i / q_heads, i % q_heads, y);
        }
    });
    let y = Tensor::from_vec(y, (tokens, q_heads, head_dim), &Device::Cpu)?;
    Ok((y, Tensor::from_vec(lse, (tokens, q_heads), &Device::Cpu)?))
}

/// One query: its output, from zeros, and the logarithm of its softmax sum.
fn attend<E: Real>(operands: &Operands<E>, query: usize, head: usize, y: &mut [E]) -> E {
    let kv_head = head / operands.of.group();
    let (mut top, mut sum) = (E::LOWEST, E::default());
    for tile in tiles(operands.keys(query)) {
        let mut scores = [E::LOWEST; TILE];
        scores.iter_mut().zip(tile.clone()).for_each(|(score, key)| *score = operands.score(query, key, head));
        let higher = scores.iter().fold(top, |top, &score| top.max(score));
        let fade = (top - higher).exp();
        (top, sum) = (higher, sum * fade);
        multiply(y, fade);
        for (&score, key) in scores.iter().zip(tile) {
            let weight = (score - top).exp();
            sum += weight;
            add(y, weight, operands.v(key, kv_head));
        }
    }
    y.iter_mut().for_each(|y| *y /= sum);
    top + sum.ln()
}

/// What the backward pass has beside the operands.
struct Back<'a, E> {
    operands: Operands<'a, E>,
    dy: Vec<E>,
    lse: Vec<E>,   // [tokens, q_heads]
    delta: Vec<E>, // [tokens, q_heads]: the sum of dy * y
}

impl<E: Real> Back<'_, E> {
    fn dy(&self, query: usize, head: usize) -> &[E] {
        let &SoftAttention { q_heads, head_dim, .. } = self.operands.of;
        &self.dy[(query * q_heads + head) * head_dim..][..head_dim]
    }

    /// The weight of a pair, and the gradient of its score.
    fn pair(&self, query: usize, key: usize, head: usize) -> (E, E) {
        let row = query * self.operands.of.q_heads + head;
        let weight = (self.operands.score(query, key, head) - self.lse[row]).exp();
        let dweight = dot(self.dy(query, head), self.operands.v(key, head / self.operands.of.group()));
        (weight, weight * (dweight - self.delta[row]))
    }

    /// A query's gradient, from zeros.
    fn query(&self, query: usize, head: usize, dq: &mut [E]) {
        for key in self.operands.keys(query) {
            let (_, dscore) = self.pair(query, key, head);
            add(dq, dscore, self.operands.k(key, head / self.operands.of.group()));
        }
        multiply(dq, E::of(self.operands.of.scale));
    }

    /// The gradients of a key and its value, from zeros; returns that of its gate.
    fn key(&self, key: usize, kv_head: usize, dk: &mut [E], dv: &mut [E]) -> E {
        let group = self.operands.of.group();
        let mut dkeep = E::default();
        for head in kv_head * group..(kv_head + 1) * group {
            for query in self.operands.queries(key) {
                let (weight, dscore) = self.pair(query, key, head);
                add(dv, weight, self.dy(query, head));
                add(dk, dscore, self.operands.head(query, head));
                if self.operands.beyond(query, key) {
                    dkeep += dscore;
                }
            }
        }
        multiply(dk, E::of(self.operands.of.scale));
        dkeep
    }

    /// The gradients of one token.
    fn token(&self, token: usize, dqkv: &mut [E], dkeep: &mut [E]) {
        let &SoftAttention { q_heads, kv_heads, head_dim, .. } = self.operands.of;
        let (dq, dkv) = dqkv.split_at_mut(q_heads * head_dim);
        let (dk, dv) = dkv.split_at_mut(kv_heads * head_dim);
        for (head, dq) in dq.chunks_exact_mut(head_dim).enumerate() {
            self.query(token, head, dq);
        }
        let kv = dk.chunks_exact_mut(head_dim).zip(dv.chunks_exact_mut(head_dim));
        for (head, ((dk, dv), dkeep)) in kv.zip(dkeep).enumerate() {
            *dkeep = self.key(token, head, dk, dv);
        }
    }
}

fn backward_in<E: Real>(
    of: &SoftAttention,
    qkv: &Tensor,
    keep: Option<&Tensor>,
    y: &Tensor,
    lse: &Tensor,
    dy: &Tensor,
) -> Result<SoftGrads> {
    let (y, dy) = (flat::<E>(y)?, flat::<E>(dy)?);
    let heads = y.par_chunks_exact(of.head_dim).zip(dy.par_chunks_exact(of.head_dim));
    let delta = heads.map(|(y, dy)| dot(y, dy)).collect();
    let back = Back { operands: Operands::new(of, qkv, keep)?, dy, lse: flat(lse)?, delta };
    let (tokens, width) = (of.tokens(), of.heads() * of.head_dim);
    let (mut dqkv, mut dkeep) = (vec![E::default(); tokens * width], vec![E::default(); tokens * of.kv_heads]);
    let each = dqkv.par_chunks_exact_mut(width).zip(dkeep.par_chunks_exact_mut(of.kv_heads));
    each.enumerate().for_each(|(token, (dqkv, dkeep))| back.token(token, dqkv, dkeep));
    Ok(SoftGrads {
        qkv: Tensor::from_vec(dqkv, (tokens, of.heads(), of.head_dim), &Device::Cpu)?,
        keep: Tensor::from_vec(dkeep, (tokens, of.kv_heads), &Device::Cpu)?,
    })
}
