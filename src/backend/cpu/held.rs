//! A policy's view of held entries.

use super::{Cpu, Row, element::Element, math, pool::Page};
use crate::{
    error::{Error, Result},
    policy::{Held, Moments},
    step::Span,
};
use candle_core::{Device, Tensor};
use std::cell::OnceCell;

pub(super) struct Gathered<'a, E> {
    cpu: &'a Cpu<E>,
    layer: usize,
    spans: &'a [Span],
    /// Slots of each row, oldest first.
    order: OnceCell<Vec<Vec<usize>>>,
}

impl<'a, E: Element> Gathered<'a, E> {
    pub(super) fn new(cpu: &'a Cpu<E>, layer: usize, spans: &'a [Span]) -> Self {
        Self { cpu, layer, spans, order: OnceCell::new() }
    }

    /// Rows in order: spans outermost; `None` for a sequence that was dropped.
    fn rows(&self) -> impl Iterator<Item = Option<&Row>> {
        let heads = self.cpu.spec.kv_heads;
        self.spans.iter().flat_map(move |s| (0..heads).map(move |h| self.cpu.row(self.layer, s.seq, h)))
    }

    fn order(&self) -> &[Vec<usize>] {
        self.order.get_or_init(|| self.rows().map(|row| row.map_or(vec![], |r| r.by_age(&self.cpu.pool))).collect())
    }

    /// At least 1, so that no tensor is empty.
    fn max_len(&self) -> usize {
        self.order().iter().map(Vec::len).max().unwrap_or(0).max(1)
    }

    /// `[rows, max_len, width]` from each entry's `width` numbers, padded with zeros.
    fn gather(&self, width: usize, entry: impl Fn(&Row, usize, &mut [f32])) -> Result<Tensor> {
        let (rows, len) = (self.order().len(), self.max_len());
        let mut out = vec![0f32; rows * len * width];
        for ((row, slots), out) in self.rows().zip(self.order()).zip(out.chunks_mut(len * width)) {
            let Some(row) = row else { continue };
            for (&slot, out) in slots.iter().zip(out.chunks_mut(width)) {
                entry(row, slot, out);
            }
        }
        Ok(Tensor::from_vec(out, (rows, len, width), &Device::Cpu)?)
    }

    fn lane(&self, entry: impl Fn(&Row, usize) -> f32) -> Result<Tensor> {
        Ok(self.gather(1, |row, slot, out| out[0] = entry(row, slot))?.squeeze(2)?)
    }

    fn vectors(&self, values: bool) -> Result<Tensor> {
        let (pool, d) = (&self.cpu.pool, self.cpu.spec.head_dim);
        self.gather(d, |row, slot, out| {
            let page = row.page(pool, slot / pool.page_size);
            let (entry, mut buffer) = (slot % pool.page_size, vec![]);
            let vector = if values { Page::values } else { Page::keys };
            out.copy_from_slice(vector(&page, entry..entry + 1, &mut buffer));
        })
    }
}

impl<E: Element> Held for Gathered<'_, E> {
    fn keys(&self) -> Result<Tensor> {
        let keys = self.vectors(false)?;
        let Some(factors) = self.cpu.key_factors(self.layer) else { return Ok(keys) };
        let (rows, len, d) = keys.dims3()?;
        let heads = self.cpu.spec.kv_heads;
        let factors = Tensor::from_slice(factors, (heads, 1, d), &Device::Cpu)?;
        Ok(keys.reshape((rows / heads, heads, len, d))?.broadcast_mul(&factors)?.reshape((rows, len, d))?)
    }

    fn values(&self) -> Result<Tensor> {
        self.vectors(true)
    }

    fn valid(&self) -> Result<Tensor> {
        self.lane(|_, _| 1.0)
    }

    fn positions(&self) -> Result<Tensor> {
        self.lane(|row, slot| row.position(&self.cpu.pool, slot) as f32)
    }

    fn scores(&self) -> Result<Tensor> {
        let pool = &self.cpu.pool;
        self.lane(|row, slot| row.page(pool, slot / pool.page_size).score[slot % pool.page_size])
    }

    fn seen(&self) -> Vec<usize> {
        let heads = self.cpu.spec.kv_heads;
        self.spans.iter().flat_map(|s| std::iter::repeat_n(s.seen(), heads)).collect()
    }

    fn attention_of_last_queries(&self) -> Result<Tensor> {
        let spec = &self.cpu.spec;
        let (d, group, heads) = (spec.head_dim, spec.group(), spec.kv_heads);
        let (n, len) = (self.cpu.needs[self.layer].last_queries, self.max_len());
        let keys: Vec<f32> = self.keys()?.flatten_all()?.to_vec1()?;
        let positions: Vec<Vec<f32>> = self.positions()?.to_vec2()?;
        let scale = 1.0 / (d as f32).sqrt();
        let mut out = vec![0f32; self.order().len() * group * n * len];
        for (r, (slots, out)) in self.order().iter().zip(out.chunks_mut(group * n * len)).enumerate() {
            let Some(sequence) = self.cpu.sequences.get(&self.spans[r / heads].seq) else { continue };
            let ring = &sequence.queries[self.layer];
            for (g, out) in out.chunks_mut(n * len).enumerate() {
                let first = n - ring.len();
                for ((pos, q), out) in ring.iter().zip(out[first * len..].chunks_mut(len)) {
                    let q = &q[(r % heads * group + g) * d..][..d];
                    // Oldest first: the visible entries are a prefix.
                    let visible = positions[r][..slots.len()].partition_point(|&p| p <= *pos as f32);
                    for (j, out) in out[..visible].iter_mut().enumerate() {
                        *out = scale * math::dot(q, &keys[(r * len + j) * d..][..d]);
                    }
                    math::softmax(&mut out[..visible]);
                }
            }
        }
        Ok(Tensor::from_vec(out, (self.order().len(), group, n, len), &Device::Cpu)?)
    }

    fn query_moments(&self) -> Result<Moments> {
        let spec = &self.cpu.spec;
        let (d, group, heads) = (spec.head_dim, spec.group(), spec.kv_heads);
        let asked = self.cpu.needs[self.layer].query_moments;
        let asked = asked.ok_or_else(|| Error::Config("query moments were not asked for in `needs`".into()))?;
        let (mut mean, mut covariance) = (vec![], vec![]);
        for span in self.spans {
            let moments = self.cpu.sequences.get(&span.seq).and_then(|s| s.moments[self.layer].as_ref());
            for head in 0..heads {
                let (m, c) = moments.map_or_else(
                    || (vec![0.0; group * d], asked.covariance.then(|| vec![0.0; group * d * d])),
                    |moments| moments.of_head(spec, head),
                );
                mean.extend(m);
                covariance.extend(c.into_iter().flatten());
            }
        }
        let rows = self.spans.len() * heads;
        let covariance = asked.covariance.then(|| Tensor::from_vec(covariance, (rows, group, d, d), &Device::Cpu));
        Ok(Moments {
            mean: Tensor::from_vec(mean, (rows, group, d), &Device::Cpu)?,
            covariance: covariance.transpose()?,
        })
    }
}
