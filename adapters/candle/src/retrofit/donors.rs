//! Gates that are a neuron of the queries, NVIDIA's way: the last component of the first query head of each group, after
//! the head norm and before RoPE, decides for the group's KV head. For attention it is zero, before RoPE and after it.

use super::dense;
use crate::{config::Config, error::Result, gates, model::Block, ops};
use candle_core::{DType, Tensor};
use kvpolicy::retrofit::{Named, accumulate};

/// Which components are borrowed.
#[derive(Debug, Clone)]
pub(super) struct Donors {
    /// 1, and 0 where a neuron is borrowed, in the model's type: `[q_heads + 2 kv_heads, head_dim]`.
    others: Tensor,
    /// Rows of the projection of q, k and v that belong to the first query heads of the groups: u32
    /// `[kv_heads * head_dim]`.
    heads: Tensor,
    kv_heads: usize,
    head_dim: usize,
}

/// What the way from a layer's input to its decision logits computes.
struct Way {
    normed: Tensor,     // [tokens, hidden]
    weight: Tensor,     // [kv_heads * head_dim, hidden]
    raw: Tensor,        // with bias, before the head norm: [tokens * kv_heads, head_dim]
    after_norm: Tensor, // the same after it
}

impl Donors {
    pub(super) fn new(config: &Config, like: &Tensor) -> Result<Self> {
        let Config { q_heads, kv_heads, head_dim, .. } = *config;
        let group = q_heads / kv_heads;
        let queries = gates::others(config, like.dtype(), like.device())?;
        let others = Tensor::cat(&[queries, Tensor::ones((2 * kv_heads, head_dim), like.dtype(), like.device())?], 0)?;
        let rows = |head: usize| (0..head_dim).map(move |i| (head * group * head_dim + i) as u32);
        let heads: Vec<u32> = (0..kv_heads).flat_map(rows).collect();
        let heads = Tensor::new(heads, like.device())?;
        Ok(Self { others, heads, kv_heads, head_dim })
    }

    /// Queries alone or with keys and values, `[tokens, heads, head_dim]`, or their gradients, without the borrowed
    /// components.
    pub(super) fn hide(&self, heads: &Tensor) -> Result<Tensor> {
        Ok(heads.broadcast_mul(&self.others.narrow(0, 0, heads.dim(1)?)?)?)
    }

    /// Decision logits of a layer's input `[tokens, hidden]`, neither scaled nor moved: f32 `[tokens, kv_heads]`.
    pub(super) fn logits(&self, block: &Block, x: &Tensor) -> Result<Tensor> {
        let after_norm = self.way(block, x)?.after_norm;
        let last = after_norm.narrow(1, self.head_dim - 1, 1)?.reshape(((), self.kv_heads))?;
        Ok(last.to_dtype(DType::F32)?)
    }

    /// The gradient with respect to the layer's input, `x_grad` included, given that with respect to [`Donors::logits`]. Adds
    /// those of the block's weights, f32 by the names of `Model::parameters`, to what is in `weights` of them.
    pub(super) fn backward(
        &self,
        (layer, block): (usize, &Block),
        x: &Tensor,
        logits: &Tensor,
        x_grad: &Tensor,
        weights: &mut Named,
    ) -> Result<Tensor> {
        let (way, eps) = (self.way(block, x)?, block.heads.eps);
        let after_norm = logits.reshape(((), 1))?.pad_with_zeros(1, self.head_dim - 1, 0)?.to_dtype(x.dtype())?;
        let raw = match &block.heads.q_norm {
            Some(norm) => ops::rms_norm_backward(&way.raw, norm, eps, &after_norm, None)?,
            None => after_norm.clone(),
        };
        let raw = raw.reshape((x.dim(0)?, self.kv_heads * self.head_dim))?;
        let normed = raw.matmul(&way.weight)?;

        let mut own = Named::new();
        let mut add = |part: &str, gradient: Tensor| -> Result<()> {
            own.insert(format!("layers.{layer}.{part}"), gradient.to_dtype(DType::F32)?);
            Ok(())
        };
        let joined = dense(&block.qkv)?.dim(0)?;
        add("qkv", self.spread(&raw.t()?.matmul(&way.normed)?, joined)?)?;
        if block.heads.bias.is_some() {
            add("qkv_bias", self.spread(&raw.to_dtype(DType::F32)?.sum(0)?, joined)?)?;
        }
        if block.heads.q_norm.is_some() {
            add("q_norm", ops::rms_norm_weight_gradient(&way.raw, eps, &after_norm)?)?;
        }
        add("attention_norm", ops::rms_norm_weight_gradient(x, eps, &normed)?)?;
        accumulate(weights, own)?;
        ops::rms_norm_backward(x, &block.attention_norm, eps, &normed, Some(x_grad))
    }

    fn way(&self, block: &Block, x: &Tensor) -> Result<Way> {
        let normed = ops::rms_norm(x, &block.attention_norm, block.heads.eps)?;
        let weight = dense(&block.qkv)?.index_select(&self.heads, 0)?;
        let product = ops::linear(&normed, &weight)?;
        let product = match &block.heads.bias {
            Some(bias) => product.broadcast_add(&bias.index_select(&self.heads, 0)?)?,
            None => product,
        };
        let raw = product.reshape(((), self.head_dim))?;
        let after_norm = match &block.heads.q_norm {
            Some(norm) => ops::rms_norm(&raw, norm, block.heads.eps)?,
            None => raw.clone(),
        };
        Ok(Way { normed, weight, raw, after_norm })
    }

    /// Rows of the donors' heads at their place among those of q, k and v, f32; other rows are 0.
    fn spread(&self, rows: &Tensor, joined: usize) -> Result<Tensor> {
        let rows = rows.to_dtype(DType::F32)?.contiguous()?;
        let mut dims = rows.dims().to_vec();
        dims[0] = joined;
        Ok(Tensor::zeros(dims, DType::F32, rows.device())?.index_add(&self.heads, &rows, 0)?)
    }

    /// A tensor with a row for each of q, k and v, f32, and those of the borrowed neurons in place of its own: `rows`,
    /// `[kv_heads, ..]`.
    pub(super) fn replaced(&self, whole: &Tensor, rows: &Tensor) -> Result<Tensor> {
        let neurons = self.neurons()?;
        let kept = self.others.to_dtype(DType::F32)?.flatten_all()?;
        let kept = if whole.rank() > 1 { kept.unsqueeze(1)? } else { kept };
        Ok(whole.broadcast_mul(&kept)?.index_add(&neurons, rows, 0)?)
    }

    /// The rows of the borrowed neurons of such a tensor: `[kv_heads, ..]`.
    pub(super) fn taken(&self, whole: &Tensor) -> Result<Tensor> {
        Ok(whole.index_select(&self.neurons()?, 0)?)
    }

    fn neurons(&self) -> Result<Tensor> {
        let rows = self.heads.reshape((self.kv_heads, self.head_dim))?;
        Ok(rows.narrow(1, self.head_dim - 1, 1)?.flatten_all()?.contiguous()?)
    }
}
