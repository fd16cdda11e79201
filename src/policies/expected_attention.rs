use crate::{error::Result, params::Amount, policy::*, spec::Rope};
use candle_core::{D, Tensor};

crate::policy_params! {
    /// Expected Attention: ranks by the attention that future queries are expected to pay, from the mean and
    /// covariance of the queries so far, rotated to the average of the next `future` positions. Values weigh by their
    /// norm (the paper takes the norm after the output projection, which a cache does not see).
    pub struct ExpectedAttention = "expected-attention", paper "arXiv 2510.00636" {
        /// Entries each KV head keeps, the sinks included.
        budget: Amount, in ..;
        /// First positions that always stay and are left out of the statistics.
        sinks: u32 = 4, in 0..=1 << 20;
        /// Future positions to average over.
        future: u32 = 512, in 1..=1 << 20;
        /// Use the covariance of the queries, not only their mean.
        covariance: bool = true, in ..;
        /// Weigh by the norm of the value.
        vnorm: bool = true, in ..;
        /// Added to the expected attention before it is weighed.
        epsilon: f64 = 0.0, in 0.0..=1.0;
    }
}

impl Policy for ExpectedAttention {
    fn faults(&self) -> Vec<String> {
        self.budget.too_small_for("sinks", self.sinks as usize).into_iter().collect()
    }

    fn misfits(&self, spec: &crate::ModelSpec) -> Vec<String> {
        let why = "expected-attention: the model has no RoPE to average, or not the same in each layer";
        if spec.rope.is_some() { vec![] } else { vec![why.into()] }
    }

    fn needs(&self, _: &LayerCx) -> Needs {
        let moments = QueryMoments { skip: self.sinks, covariance: self.covariance };
        Needs { query_moments: Some(moments), ..Needs::default() }
    }

    fn protect(&self, _: &LayerCx) -> Protect {
        Protect { sinks: self.sinks, ..Protect::default() }
    }

    fn budget(&self, _: &LayerCx, seen: usize) -> Budget {
        Budget::PerHead(self.budget.of(seen))
    }

    fn when(&self, _: &LayerCx) -> When {
        When::PREFILL_END
    }

    fn score(&self, cx: &LayerCx, held: &dyn Held) -> Result<Score> {
        let Some(rope) = &cx.spec.rope else { return Ok(Score::Carried) };
        let (keys, moments) = (held.keys()?, held.query_moments()?);
        let d = cx.spec.head_dim as f64;
        // Row vectors: q' = q R^T with R averaged over the future positions of each row's sequence.
        let turn = average_rotation(rope, &held.seen(), self.future, keys.device())?; // R^T: [rows, d, d]
        let mean = moments.mean.matmul(&turn)?; // [rows, group, d]
        let mut logit = (mean.matmul(&keys.t()?)? / d.sqrt())?; // [rows, group, len]
        if let Some(cov) = moments.covariance {
            let turn = turn.unsqueeze(1)?.broadcast_as(cov.shape())?.contiguous()?;
            let cov = turn.transpose(2, 3)?.contiguous()?.matmul(&cov.contiguous()?)?.matmul(&turn)?;
            let keys = keys.unsqueeze(1)?;
            let spread = keys.broadcast_matmul(&cov)?.broadcast_mul(&keys)?.sum(D::Minus1)?;
            logit = (logit + (spread / (2.0 * d))?)?;
        }
        let ranked = (held.positions()?.ge(self.sinks as f64)?.to_dtype(candle_core::DType::F32)? * held.valid()?)?;
        let hidden = ((ranked.ones_like()? - &ranked)? * -1e30)?;
        let share = softmax(&logit.broadcast_add(&hidden.unsqueeze(1)?)?)?.mean(1)?;
        if !self.vnorm {
            return Ok(Score::Dense(share));
        }
        let norm = held.values()?.sqr()?.sum(2)?.sqrt()?;
        Ok(Score::Dense(((share + self.epsilon)? * norm)?))
    }
}

fn softmax(x: &Tensor) -> Result<Tensor> {
    let exp = x.broadcast_sub(&x.max_keepdim(D::Minus1)?)?.exp()?;
    Ok(exp.broadcast_div(&exp.sum_keepdim(D::Minus1)?)?)
}

/// Transposed mean of the rotations at positions `seen..seen + future`, f32 `[rows, head_dim, head_dim]`.
fn average_rotation(rope: &Rope, seen: &[usize], future: u32, device: &candle_core::Device) -> Result<Tensor> {
    let d = rope.inv_freq.len() * 2;
    let mut turn = vec![0f32; seen.len() * d * d];
    for (row, &start) in seen.iter().enumerate() {
        for (i, &freq) in rope.inv_freq.iter().enumerate() {
            let angles = (0..future as usize).map(|t| (start + t) as f64 * freq as f64);
            let (sin, cos) = angles.fold((0.0, 0.0), |(s, c), a| (s + a.sin(), c + a.cos()));
            let (sin, cos) = ((sin / future as f64) as f32, (cos / future as f64) as f32);
            let (a, b) = rope.pair(i, d);
            let at = |r: usize, c: usize| (row * d + r) * d + c;
            (turn[at(a, a)], turn[at(a, b)]) = (cos, sin);
            (turn[at(b, a)], turn[at(b, b)]) = (-sin, cos);
        }
    }
    Ok(Tensor::from_vec(turn, (seen.len(), d, d), device)?)
}
