//! The decoder of [`Model`] over sequences of equal length, forward and backward, by hand: a block's activations live
//! while the block is at work, and are made again from its input when its gradients are due.

use super::{dense, donors::Donors};
use crate::{
    config::Config,
    error::Result,
    model::{Model, Rotations},
    ops,
};
use candle_core::{DType, Tensor};
use kvpolicy::retrofit::{Named, SoftAttention};

/// One batch on its way through a model.
#[derive(Debug)]
pub(super) struct Pass<'a> {
    model: &'a Model,
    attention: SoftAttention,
    rotations: Rotations<'a>,
    donors: Option<&'a Donors>,
}

/// What a block computed on the way.
pub(super) struct Activations {
    normed: Tensor,      // [tokens, hidden]
    raw: Option<Tensor>, // q, k, v before the head norms, where there are any: [tokens, heads, head_dim]
    qkv: Tensor,         // after RoPE: [tokens, heads, head_dim]
    lse: Tensor,         // f32 [tokens, q_heads]
    attended: Tensor,    // [tokens, q_heads, head_dim]
    middle: Tensor,      // the residual stream between attention and feed-forward: [tokens, hidden]
    mlp_normed: Tensor,  // [tokens, hidden]
    gate_up: Tensor,     // [tokens, 2 ffn]
}

impl Activations {
    /// What they take.
    pub(super) fn bytes(&self) -> usize {
        let Self { normed, raw, qkv, lse, attended, middle, mlp_normed, gate_up } = self;
        let all = [normed, qkv, lse, attended, middle, mlp_normed, gate_up].into_iter().chain(raw);
        all.map(|tensor| tensor.elem_count() * tensor.dtype().size_in_bytes()).sum()
    }
}

/// Gradients of a block.
pub(super) struct BlockGrads {
    /// With respect to its input: `[tokens, hidden]`.
    pub(super) x: Tensor,
    /// With respect to the log-probabilities of keeping, f32 `[tokens, kv_heads]`.
    pub(super) keep: Tensor,
    /// With respect to its weights, if they were asked for.
    pub(super) weights: Named,
}

impl<'a> Pass<'a> {
    /// `length`: tokens of each sequence; `window`: from which distance on keys count as kept or not; `donors`: neurons of
    /// the queries that attention does not see.
    pub(super) fn new(
        model: &'a Model,
        sequences: usize,
        length: usize,
        window: usize,
        donors: Option<&'a Donors>,
    ) -> Result<Self> {
        model.config().check_trainable(length)?;
        let Config { q_heads, kv_heads, head_dim, .. } = *model.config();
        let scale = 1.0 / (head_dim as f32).sqrt();
        let positions: Vec<u32> = (0..sequences).flat_map(|_| 0..length as u32).collect();
        let positions = Tensor::new(positions, model.device())?;
        let rotations = model.rotations(&positions);
        let attention = SoftAttention { sequences, length, q_heads, kv_heads, head_dim, window, scale };
        Ok(Self { model, attention, rotations, donors })
    }

    pub(super) fn embed(&self, tokens: &Tensor) -> Result<Tensor> {
        Ok(self.model.embedding.index_select(tokens, 0)?)
    }

    /// The residual stream after a block. `x`: before it, `[tokens, hidden]`; `keep`: f32 `[tokens, kv_heads]`.
    pub(super) fn forward(&self, layer: usize, x: &Tensor, keep: Option<&Tensor>) -> Result<(Tensor, Activations)> {
        let block = &self.model.blocks[layer];
        let eps = self.model.config().rms_eps;
        let normed = ops::rms_norm(x, &block.attention_norm, eps)?;
        let (raw, qkv) = self.heads(layer, &normed)?;
        let (attended, lse) = self.attention.forward(&qkv, keep)?;
        let y = block.o.forward(&attended.flatten_from(1)?)?;
        let (middle, mlp_normed) = ops::add_rms_norm(x, &y, &block.mlp_norm, eps)?;
        let gate_up = block.gate_up.forward(&mlp_normed)?;
        let out = (&middle + block.down.forward(&ops::silu_mul(&gate_up)?)?)?;
        Ok((out, Activations { normed, raw, qkv, lse, attended, middle, mlp_normed, gate_up }))
    }

    fn heads(&self, layer: usize, normed: &Tensor) -> Result<(Option<Tensor>, Tensor)> {
        let (block, rotation) = (&self.model.blocks[layer], self.rotations.of(layer));
        let product = block.qkv.product(normed)?;
        let raw = if block.heads.q_norm.is_some() { Some(block.heads.biased(&product)?) } else { None };
        let Some(donors) = self.donors else { return Ok((raw, block.heads.rotated(product, rotation)?)) };
        let [q, k, v] = block.heads.before_rope(&product)?;
        let rotated = Tensor::cat(&[rotation.apply(&donors.hide(&q)?)?, rotation.apply(&k)?, v], 1)?;
        Ok((raw, donors.hide(&rotated)?))
    }

    /// The gradient of queries, keys and values before RoPE, given that after it.
    fn unrotated(&self, layer: usize, after: Tensor) -> Result<Tensor> {
        let (heads, rotation) = (&self.model.blocks[layer].heads, self.rotations.of(layer));
        let Some(donors) = self.donors else { return heads.unrotate(after, rotation) };
        donors.hide(&heads.unrotate(donors.hide(&after)?, rotation)?)
    }

    /// Gradients of a block, given that with respect to what it returned. `weights`: whether those of its weights count.
    pub(super) fn backward(
        &self,
        layer: usize,
        x: &Tensor,
        keep: Option<&Tensor>,
        on_the_way: &Activations,
        out: &Tensor,
        weights: bool,
    ) -> Result<BlockGrads> {
        let block = &self.model.blocks[layer];
        let eps = self.model.config().rms_eps;
        let a = on_the_way;
        let gate_up = ops::silu_mul_backward(&a.gate_up, &out.matmul(dense(&block.down.matrix)?)?)?;
        let mlp_normed = gate_up.matmul(dense(&block.gate_up.matrix)?)?;
        let middle = ops::rms_norm_backward(&a.middle, &block.mlp_norm, eps, &mlp_normed, Some(out))?;
        let attended = middle.matmul(dense(&block.o.matrix)?)?.reshape(a.attended.dims())?;
        let grads = self.attention.backward(&a.qkv, keep, &a.attended, &a.lse, &attended)?;
        let after_norm = self.unrotated(layer, grads.qkv)?;
        let qkv = match &a.raw {
            // A GPU overwrites what it is given, and the weights' gradients need it again.
            Some(raw) => block.heads.norm_backward(raw, after_norm.copy()?)?,
            None => after_norm.clone(),
        };
        let qkv = qkv.flatten_from(1)?;
        let normed = qkv.matmul(dense(&block.qkv)?)?;
        let x_grad = ops::rms_norm_backward(x, &block.attention_norm, eps, &normed, Some(&middle))?;
        let mut named = Named::new();
        if weights {
            let mut add = |part: &str, gradient: Tensor| -> Result<()> {
                named.insert(format!("layers.{layer}.{part}"), gradient.to_dtype(DType::F32)?);
                Ok(())
            };
            let product = |out: &Tensor, x: &Tensor| -> Result<Tensor> { Ok(out.t()?.matmul(x)?) };
            let bias = |out: &Tensor| -> Result<Tensor> { Ok(out.to_dtype(DType::F32)?.sum(0)?) };
            add("down", product(out, &ops::silu_mul(&a.gate_up)?)?)?;
            add("gate_up", product(&gate_up, &a.mlp_normed)?)?;
            add("mlp_norm", ops::rms_norm_weight_gradient(&a.middle, eps, &mlp_normed)?)?;
            add("o", product(&middle, &a.attended.flatten_from(1)?)?)?;
            add("qkv", product(&qkv, &a.normed)?)?;
            add("attention_norm", ops::rms_norm_weight_gradient(x, eps, &normed)?)?;
            for (part, linear, gradient) in [
                ("down_bias", &block.down, out),
                ("gate_up_bias", &block.gate_up, &gate_up),
                ("o_bias", &block.o, &middle),
            ] {
                if linear.bias.is_some() {
                    add(part, bias(gradient)?)?;
                }
            }
            if block.heads.bias.is_some() {
                add("qkv_bias", bias(&qkv)?)?;
            }
            if let Some(raw) = &a.raw {
                for (part, gradient) in block.heads.norm_gradients(raw, &after_norm)? {
                    add(part, gradient)?;
                }
            }
        }
        Ok(BlockGrads { x: x_grad, keep: grads.keep, weights: named })
    }

    /// The last norm of the residual stream, `[tokens, hidden]`.
    pub(super) fn finish(&self, x: &Tensor) -> Result<Tensor> {
        ops::rms_norm(x, &self.model.norm, self.model.config().rms_eps)
    }

    /// Gradient with respect to the residual stream of that with respect to [`Pass::finish`].
    pub(super) fn finish_backward(&self, x: &Tensor, normed: &Tensor) -> Result<Tensor> {
        ops::rms_norm_backward(x, &self.model.norm, self.model.config().rms_eps, normed, None)
    }

    /// Logits in the model's type, `[rows, vocab]`, of `[rows, hidden]`.
    pub(super) fn logits(&self, normed: &Tensor) -> Result<Tensor> {
        self.model.output.matrix.product(normed)
    }

    /// Gradient with respect to the normed states of that with respect to their logits.
    pub(super) fn logits_backward(&self, logits: &Tensor) -> Result<Tensor> {
        Ok(logits.matmul(dense(&self.model.output.matrix)?)?)
    }
}

/// Sum over tokens of the outer products of one-hot `ids` and `x`: the gradient of an embedding, f32 `[vocab, hidden]`.
pub(super) fn embedding_gradient(ids: &Tensor, x: &Tensor, vocab: usize) -> Result<Tensor> {
    let all = Tensor::arange(0u32, vocab as u32, ids.device())?.unsqueeze(1)?;
    let one_hot = all.broadcast_eq(&ids.unsqueeze(0)?)?.to_dtype(x.dtype())?;
    Ok(one_hot.matmul(x)?.to_dtype(DType::F32)?)
}
