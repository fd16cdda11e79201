//! Queries, keys and values of a training step, in one tensor.

use crate::{
    error::Result,
    ops::{self, Heads, Rotation},
};
use candle_core::{DType, Tensor};

impl Heads {
    /// The projection `[tokens, heads * head_dim]` with its bias: `[tokens, q_heads + 2 kv_heads, head_dim]`.
    pub(super) fn biased(&self, product: &Tensor) -> Result<Tensor> {
        let biased = match &self.bias {
            Some(bias) => product.broadcast_add(bias)?,
            None => product.copy()?,
        };
        Ok(biased.reshape((biased.dim(0)?, self.q_heads + 2 * self.kv_heads, self.head_dim))?)
    }

    /// The same after bias, head norms and RoPE. Takes the projection's memory where it can.
    pub(super) fn rotated(&self, product: Tensor, rotation: &Rotation) -> Result<Tensor> {
        if !product.device().is_cuda() {
            return Ok(Tensor::cat(&self.finish(product, rotation)?, 1)?);
        }
        let (tokens, heads) = (product.dim(0)?, self.q_heads + 2 * self.kv_heads);
        // A GPU overwrites the projection.
        let whole = product.clone();
        self.finish(product, rotation)?;
        Ok(whole.reshape((tokens, heads, self.head_dim))?)
    }

    /// Gradients of the head norms' weights, f32 `[head_dim]`. `raw`: before the norms; `gradient`: after them.
    pub(super) fn norm_gradients(&self, raw: &Tensor, gradient: &Tensor) -> Result<Vec<(&'static str, Tensor)>> {
        let mut all = vec![];
        for (part, norm, first, heads) in
            [("q_norm", &self.q_norm, 0, self.q_heads), ("k_norm", &self.k_norm, self.q_heads, self.kv_heads)]
        {
            if norm.is_some() {
                let rows = |x: &Tensor| -> Result<Tensor> {
                    let own = x.narrow(1, first, heads)?.contiguous()?;
                    Ok(own.reshape((own.dim(0)? * heads, self.head_dim))?)
                };
                let gradient = ops::rms_norm_weight_gradient(&rows(raw)?, self.eps, &rows(gradient)?)?;
                all.push((part, gradient.to_dtype(DType::F32)?));
            }
        }
        Ok(all)
    }
}
