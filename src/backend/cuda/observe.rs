//! What policies ask to be remembered of the queries: the newest ones, and running moments.

use super::{Cuda, driver, element, memory};
use crate::{
    error::Result,
    policy::QueryMoments,
    spec::{ModelSpec, Rope, RopeLayout},
    step::{SeqId, Span},
};
use candle_core::{D, DType, Device, Tensor};
use cudarc::driver::CudaSlice;
use kvpolicy_kernels::ObserveParams;

/// The newest queries of every sequence in one layer: f32 `[seats, size, q_heads * head_dim]`, by position modulo size.
#[derive(Debug)]
pub(super) struct QueryRing {
    pub(super) data: CudaSlice<f32>,
    pub(super) size: usize,
}

/// Running sums over the queries of one sequence in one layer, as they were before RoPE; f64, so that the covariance
/// survives the subtraction.
#[derive(Debug, Default, Clone)]
pub(super) struct Observed {
    count: usize,
    sum: Option<Tensor>,   // [q_heads, head_dim]
    outer: Option<Tensor>, // [q_heads, head_dim, head_dim]
}

impl Cuda {
    pub(super) fn observe_queries(&mut self, layer: usize, spans: &[Span], q: &Tensor) -> Result<()> {
        let needs = &self.layers[layer].needs;
        let (last_queries, moments) = (needs.last_queries, needs.query_moments);
        if spans.is_empty() {
            return Ok(());
        }
        if last_queries > 0 {
            self.remember(layer, last_queries, q)?;
        }
        if let Some(asked) = moments {
            self.add_moments(layer, spans, q, asked)?;
        }
        Ok(())
    }

    fn remember(&mut self, layer: usize, size: usize, q: &Tensor) -> Result<()> {
        let width = self.spec.q_heads * self.spec.head_dim;
        if self.layers[layer].queries.is_none() {
            let places = self.memory.store.seats as usize * size * width;
            let data = memory::scratch(&self.stream, places)?;
            self.layers[layer].queries = Some(QueryRing { data, size });
        }
        let Some(ring) = &self.layers[layer].queries else { return Ok(()) };
        let heads = self.heads(q)?;
        let params = ObserveParams {
            q: heads.address,
            ring: memory::address(&ring.data),
            spans: self.control().spans(),
            span_of: self.control().span_of(),
            q_stride: heads.stride,
            width: width as u32,
            size: size as u32,
        };
        // SAFETY: the ring has room for every seat; the step's spans are on the device.
        unsafe { self.kernels.observe(&self.stream, element(self.beside()), self.current.tokens as u32, &params) }
            .map_err(driver("remembering queries"))
    }

    /// The queries a sequence of `seen` tokens remembers, oldest first: f32 `[n, q_heads, head_dim]`, n at most the size.
    /// `None` if there are none.
    pub(super) fn remembered(&self, layer: usize, seq: SeqId, seen: usize) -> Result<Option<Tensor>> {
        let (Some(ring), Some(seat)) = (&self.layers[layer].queries, self.seat_of(seq)) else { return Ok(None) };
        let (size, width) = (ring.size, self.spec.q_heads * self.spec.head_dim);
        let n = size.min(seen);
        let base = seat as usize * size;
        let mut rows = vec![];
        for pos in seen - n..seen {
            let at = (base + pos % size) * width;
            rows.push(ring.data.slice(at..at + width));
        }
        let out = memory::output(&[n, self.spec.q_heads, self.spec.head_dim], DType::F32, &self.device)?;
        let mut to = memory::tensor_address(&out)?;
        for row in rows {
            let from = cudarc::driver::DevicePtr::device_ptr(&row, &self.stream).0;
            // SAFETY: both ends are device memory of this length that outlives the copy.
            unsafe { cudarc::driver::result::memcpy_dtod_async(to, from, 4 * width, self.stream.cu_stream()) }
                .map_err(driver("reading remembered queries"))?;
            to += 4 * width as u64;
        }
        Ok(Some(out))
    }

    fn add_moments(&mut self, layer: usize, spans: &[Span], q: &Tensor, asked: QueryMoments) -> Result<()> {
        let Some(rope) = self.spec.rope.clone() else { return Ok(()) };
        let mut first = 0;
        for span in spans {
            let skip = (asked.skip.saturating_sub(span.start) as usize).min(span.len);
            let (from, n) = (first + skip, span.len - skip);
            first += span.len;
            let Some(seat) = self.seats.get_mut(&span.seq) else { continue };
            if n > 0 {
                let queries = q.narrow(0, from, n)?.to_dtype(DType::F64)?;
                let queries = unrotate(&rope, span.start as usize + skip, &queries)?;
                seat.observed[layer].add(&queries, asked.covariance)?;
            }
        }
        Ok(())
    }
}

impl Observed {
    /// `queries`: f64 `[n, q_heads, head_dim]`.
    fn add(&mut self, queries: &Tensor, covariance: bool) -> Result<()> {
        let plus = |old: &Option<Tensor>, new: Tensor| -> Result<Option<Tensor>> {
            Ok(Some(match old {
                Some(old) => (old + new)?,
                None => new,
            }))
        };
        self.count += queries.dim(0)?;
        self.sum = plus(&self.sum, queries.sum(0)?)?;
        if covariance {
            let by_head = queries.transpose(0, 1)?.contiguous()?; // [q_heads, n, head_dim]
            let outer = by_head.transpose(1, 2)?.contiguous()?.matmul(&by_head)?;
            self.outer = plus(&self.outer, outer)?;
        }
        Ok(())
    }

    /// Mean `[kv_heads, group, head_dim]` and covariance `[kv_heads, group, head_dim, head_dim]`, f32.
    pub(super) fn moments(
        &self,
        spec: &ModelSpec,
        asked: QueryMoments,
        device: &Device,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let (heads, group, d) = (spec.kv_heads, spec.group(), spec.head_dim);
        let n = self.count.max(1) as f64;
        let of = |sum: &Option<Tensor>, shape: &[usize]| -> Result<Tensor> {
            Ok(match sum {
                Some(sum) => (sum / n)?,
                None => Tensor::zeros(shape, DType::F64, device)?,
            })
        };
        let mean = of(&self.sum, &[heads * group, d])?;
        let covariance = if asked.covariance {
            let square = mean.unsqueeze(2)?.broadcast_mul(&mean.unsqueeze(1)?)?;
            let centred = (of(&self.outer, &[heads * group, d, d])? - square)?;
            Some(centred.to_dtype(DType::F32)?.reshape((heads, group, d, d))?)
        } else {
            None
        };
        Ok((mean.to_dtype(DType::F32)?.reshape((heads, group, d))?, covariance))
    }
}

/// Queries of positions `start..` as they were before RoPE; f64 `[n, q_heads, head_dim]`.
fn unrotate(rope: &Rope, start: usize, queries: &Tensor) -> Result<Tensor> {
    let (n, heads, d) = queries.dims3()?;
    let half = d / 2;
    // The model took the angle in f32.
    let angles = (start..start + n).flat_map(|pos| rope.inv_freq.iter().map(move |freq| (pos as f32 * freq) as f64));
    let angles = Tensor::from_vec(angles.collect::<Vec<f64>>(), (n, 1, half), queries.device())?;
    let (cos, sin) = (angles.cos()?, angles.sin()?);
    let pairs = match rope.layout {
        RopeLayout::HalfSplit => queries.reshape((n, heads, 2, half))?,
        RopeLayout::Interleaved => queries.reshape((n, heads, half, 2))?.transpose(2, 3)?,
    };
    let (a, b) = (pairs.narrow(2, 0, 1)?.squeeze(2)?, pairs.narrow(2, 1, 1)?.squeeze(2)?);
    let first = (a.broadcast_mul(&cos)? + b.broadcast_mul(&sin)?)?;
    let second = (b.broadcast_mul(&cos)? - a.broadcast_mul(&sin)?)?;
    Ok(match rope.layout {
        RopeLayout::HalfSplit => Tensor::cat(&[first, second], D::Minus1)?,
        RopeLayout::Interleaved => Tensor::stack(&[first, second], D::Minus1)?.reshape((n, heads, d))?,
    })
}
