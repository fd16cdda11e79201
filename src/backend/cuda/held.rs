//! A policy's view of held entries.

use super::{Cuda, driver, output, tensor_address};
use crate::{
    error::{Error, Result},
    policy::{Held, Moments},
    step::Span,
};
use candle_core::{D, DType, Tensor};
use kvpolicy_kernels::{Address, GatherParams, LanesParams, ListedRows, OrderParams};
use std::cell::OnceCell;

pub(super) struct Gathered<'a> {
    cuda: &'a Cuda,
    layer: usize,
    spans: &'a [Span],
    /// Slots of each row, oldest first: u32 `[rows, max_len]`.
    order: OnceCell<Tensor>,
}

impl Cuda {
    /// Slots of each row, oldest first, and beyond its end `u32::MAX`: u32 `[rows, max_len]`.
    pub(super) fn order(&self, rows: &ListedRows) -> Result<Tensor> {
        let (listed, heads) = (self.layers[rows.layer as usize].asked.list.len(), self.spec.kv_heads);
        let order = output(&[listed * heads, rows.max_len as usize], DType::U32, &self.device)?;
        let lens = output(&[listed * heads], DType::U32, &self.device)?;
        let seen = self.current.spans.iter().map(Span::seen).max().unwrap_or(0);
        if self.capturing {
            *self.unrepeatable.borrow_mut() =
                Some("the policy asks for the order of entries, which takes their number");
        }
        let params = OrderParams {
            rows: ListedRows { order: tensor_address(&order)?, ..*rows },
            lens: tensor_address(&lens)?,
            seen: seen as u32,
        };
        // SAFETY: both bounds hold: the row's, and the tokens that its sequence has seen.
        unsafe { self.kernels.order(&self.stream, listed as u32, &params) }.map_err(driver("ordering entries"))?;
        Ok(order)
    }
}

impl<'a> Gathered<'a> {
    pub(super) fn new(cuda: &'a Cuda, layer: usize, spans: &'a [Span]) -> Self {
        Self { cuda, layer, spans, order: OnceCell::new() }
    }

    fn rows(&self) -> Result<ListedRows> {
        let rows = self.cuda.listed_rows(self.layer, self.spans, 0)?;
        let order = match self.order.get() {
            Some(order) => order,
            None => {
                let order = self.cuda.order(&rows)?;
                self.order.get_or_init(|| order)
            }
        };
        Ok(ListedRows { order: tensor_address(order)?, ..rows })
    }

    fn count(&self) -> usize {
        self.spans.len() * self.cuda.spec.kv_heads
    }

    /// f32 `[rows, max_len, head_dim]`.
    fn vectors(&self, plane: Address, values: bool) -> Result<Tensor> {
        let (rows, cuda) = (self.rows()?, self.cuda);
        let out = output(&[self.count(), rows.max_len as usize, cuda.spec.head_dim], DType::F32, &cuda.device)?;
        let key_factors = if values { 0 } else { cuda.key_factors(self.layer) };
        let params = GatherParams { rows, plane, out: tensor_address(&out)?, key_factors, values: values as u32 };
        // SAFETY: the order was made, `out` has the shape, the plane is one of the store's.
        unsafe { cuda.kernels.gather(&cuda.stream, cuda.element(), self.spans.len() as u32, &params) }
            .map_err(driver("gathering entries"))?;
        Ok(out)
    }

    /// f32 `[rows, max_len]` of one lane.
    fn lane(&self, which: fn(&mut LanesParams) -> &mut Address) -> Result<Tensor> {
        let (rows, cuda) = (self.rows()?, self.cuda);
        let out = output(&[self.count(), rows.max_len as usize], DType::F32, &cuda.device)?;
        let mut params = LanesParams { rows, positions: 0, scores: 0, valid: 0 };
        *which(&mut params) = tensor_address(&out)?;
        // SAFETY: the order was made and `out` has the shape.
        unsafe { cuda.kernels.lanes(&cuda.stream, self.spans.len() as u32, &params) }
            .map_err(driver("gathering lanes"))?;
        Ok(out)
    }

    /// The remembered queries by row: f32 `[rows, group * n, head_dim]`, zeros where there are fewer than n.
    fn queries(&self, n: usize) -> Result<Tensor> {
        let (cuda, spec) = (self.cuda, &self.cuda.spec);
        let by_span = self.spans.iter().map(|span| {
            let queries = match cuda.remembered(self.layer, span.seq, span.seen())? {
                Some(queries) => queries.pad_with_zeros(0, n - queries.dim(0)?, 0)?,
                None => Tensor::zeros((n, spec.q_heads, spec.head_dim), DType::F32, &cuda.device)?,
            };
            let by_head = queries.reshape((n, spec.kv_heads, spec.group(), spec.head_dim))?.permute((1, 2, 0, 3))?;
            Ok(by_head.contiguous()?.reshape((spec.kv_heads, spec.group() * n, spec.head_dim))?)
        });
        Ok(Tensor::cat(&by_span.collect::<Result<Vec<_>>>()?, 0)?)
    }
}

impl Held for Gathered<'_> {
    fn keys(&self) -> Result<Tensor> {
        self.vectors(self.cuda.memory.store.k, false)
    }

    fn values(&self) -> Result<Tensor> {
        self.vectors(self.cuda.memory.store.v, true)
    }

    fn valid(&self) -> Result<Tensor> {
        self.lane(|params| &mut params.valid)
    }

    fn positions(&self) -> Result<Tensor> {
        self.lane(|params| &mut params.positions)
    }

    fn scores(&self) -> Result<Tensor> {
        self.lane(|params| &mut params.scores)
    }

    fn seen(&self) -> Vec<usize> {
        if self.cuda.capturing {
            *self.cuda.unrepeatable.borrow_mut() = Some("the policy ranks by the number of tokens seen");
        }
        let heads = self.cuda.spec.kv_heads;
        self.spans.iter().flat_map(|s| std::iter::repeat_n(s.seen(), heads)).collect()
    }

    fn attention_of_last_queries(&self) -> Result<Tensor> {
        let (cuda, spec) = (self.cuda, &self.cuda.spec);
        let n = cuda.layers[self.layer].needs.last_queries;
        let (rows, group) = (self.count(), spec.group());
        let keys = self.keys()?;
        let len = keys.dim(1)?;
        let scale = 1.0 / (spec.head_dim as f64).sqrt();
        let logits = (self.queries(n)?.matmul(&keys.t()?)? * scale)?.reshape((rows, group, n, len))?;
        // Query i of n is at position seen - n + i; below 0 there was none.
        let now = |seen: usize| (0..n).map(move |i| (seen + i) as f32 - n as f32);
        let now: Vec<f32> = self.seen().into_iter().flat_map(now).collect();
        let now = Tensor::from_vec(now, (rows, n, 1), &cuda.device)?;
        let seen = self.positions()?.unsqueeze(1)?.broadcast_le(&now)?.to_dtype(DType::F32)?;
        let seen = seen.broadcast_mul(&self.valid()?.unsqueeze(1)?)?.unsqueeze(1)?; // [rows, 1, n, len]
        let hidden = seen.affine(1e30, -1e30)?;
        let logits = logits.broadcast_add(&hidden)?;
        let weights = logits.broadcast_sub(&logits.max_keepdim(D::Minus1)?)?.exp()?.broadcast_mul(&seen)?;
        let sum = weights.sum_keepdim(D::Minus1)?.clamp(f32::MIN_POSITIVE, f32::MAX)?;
        Ok(weights.broadcast_div(&sum)?)
    }

    fn query_moments(&self) -> Result<Moments> {
        let (cuda, spec) = (self.cuda, &self.cuda.spec);
        let asked = cuda.layers[self.layer].needs.query_moments;
        let asked = asked.ok_or_else(|| Error::Config("query moments were not asked for in `needs`".into()))?;
        let none = super::observe::Observed::default();
        let (mut mean, mut covariance) = (vec![], vec![]);
        for span in self.spans {
            let observed = cuda.seats.get(&span.seq).map_or(&none, |seat| &seat.observed[self.layer]);
            let (m, c) = observed.moments(spec, asked, &cuda.device)?;
            mean.push(m);
            covariance.extend(c);
        }
        let covariance = if asked.covariance { Some(Tensor::cat(&covariance, 0)?) } else { None };
        Ok(Moments { mean: Tensor::cat(&mean, 0)?, covariance })
    }
}
