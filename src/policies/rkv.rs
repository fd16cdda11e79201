use crate::{error::Result, params::Amount, policies::ops, policy::*};
use candle_core::{D, DType, Tensor};
use std::num::NonZeroU32;

/// Columns of the key similarity that are in memory at a time.
const TILE: usize = 256;

crate::policy_params! {
    /// R-KV: keeps what the newest queries look at and what is not a repetition of a later entry.
    /// Trims at the end of a prefill and then whenever `buffer` tokens were generated.
    pub struct Rkv = "rkv", paper "arXiv 2505.24133" {
        /// Entries each KV head keeps after a trim, the window included.
        budget: Amount, in ..;
        /// Decode steps between trims; the cache swings between budget and budget + buffer.
        buffer: u32 = 128, in 1..=1 << 20;
        /// Newest queries that vote; their own entries always stay.
        window: u32 = 8, in 1..=4096;
        /// Width of the maximum taken over neighbouring entries, odd.
        kernel: u32 = 7, in 1..=255;
        /// Weight of importance; 1 - lambda weighs redundancy.
        lambda: f64 = 0.1, in 0.0..=1.0;
        /// Cosine above which a key repeats another one.
        similar: f64 = 0.5, in -1.0..=1.0;
    }
}

impl Policy for Rkv {
    fn faults(&self) -> Vec<String> {
        let even = self.kernel.is_multiple_of(2).then(|| format!("kernel={} is even: take an odd width", self.kernel));
        even.into_iter().chain(self.budget.too_small_for("window", self.window as usize)).collect()
    }

    fn needs(&self, _: &LayerCx) -> Needs {
        Needs { last_queries: self.window as usize, ..Needs::default() }
    }

    fn protect(&self, _: &LayerCx) -> Protect {
        Protect { recent: self.window, ..Protect::default() }
    }

    fn budget(&self, _: &LayerCx, seen: usize) -> Budget {
        Budget::PerHead(self.budget.of(seen))
    }

    fn when(&self, _: &LayerCx) -> When {
        When { prefill_end: true, every: NonZeroU32::new(self.buffer) }
    }

    fn score(&self, _: &LayerCx, held: &dyn Held) -> Result<Score> {
        let votes = held.attention_of_last_queries()?.max(1)?; // over the group: [rows, window, len]
        let importance = ops::max_pool(&votes, self.kernel as usize)?.mean(1)?;
        let redundancy = redundancy(held, self.similar)?;
        Ok(Score::Dense(((importance * self.lambda)? - (redundancy * (1.0 - self.lambda))?)?))
    }
}

/// Softmax over the entries of their mean cosine with every other key. Of the keys that an entry repeats, the newest
/// does not count, so that one of a set of repetitions survives.
fn redundancy(held: &dyn Held, similar: f64) -> Result<Tensor> {
    let keys = held.keys()?;
    let (_, len, _) = keys.dims3()?;
    let unit = keys.broadcast_div(&ops::norm(&keys, 1e-8)?)?;
    let valid = held.valid()?;
    let index = Tensor::arange(1f32, len as f32 + 1.0, keys.device())?;
    let mut means = vec![];
    for start in (0..len).step_by(TILE) {
        let width = TILE.min(len - start);
        let cos = unit.matmul(&unit.narrow(1, start, width)?.t()?)?; // [rows, len, width]
        let others = index.unsqueeze(1)?.broadcast_ne(&index.narrow(0, start, width)?)?.to_dtype(DType::F32)?;
        let cos = cos.broadcast_mul(&others)?;
        let pairs = others.broadcast_mul(&valid.unsqueeze(2)?)?; // padding repeats nothing, nor does a key itself
        let repeats = cos.gt(similar)?.to_dtype(DType::F32)?.broadcast_mul(&index.unsqueeze(1)?)?;
        let repeats = (repeats * pairs)?;
        let newest = repeats.max_keepdim(1)?; // 0 where nothing is repeated
        let counted = index.unsqueeze(1)?.broadcast_ne(&newest)?.to_dtype(DType::F32)?;
        means.push((cos * counted)?.sum(1)?);
    }
    let mean = Tensor::cat(&means, 1)?.broadcast_div(&valid.sum_keepdim(1)?)?;
    let exp = (mean.exp()? * valid)?; // cosines: no overflow to guard against
    Ok(exp.broadcast_div(&exp.sum_keepdim(D::Minus1)?)?)
}
