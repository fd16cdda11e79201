//! The decoder block that Llama, Qwen2 and Qwen3 share.

use crate::{
    config::{Arch, Config},
    error::{Error, Result},
    gates::Gates,
    weights::{Linear, Weights},
};
use candle_core::{DType, Device, Tensor};
use candle_nn::rotary_emb::{rope, rope_i};
use kvpolicy::{KvCache, RopeLayout, Step};

/// A decoder of one of the families of [`Arch`], without any state: keys and values live in a [`KvCache`].
#[derive(Debug)]
pub struct Model {
    config: Config,
    embedding: Tensor, // [vocab, hidden]
    blocks: Vec<Block>,
    norm: Tensor, // [hidden]
    output: Linear,
    inv_freq: Tensor, // [1, head_dim / 2]
}

#[derive(Debug)]
struct Block {
    attention_norm: Tensor, // [hidden]
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    q_norm: Option<Tensor>, // [head_dim]
    k_norm: Option<Tensor>,
    mlp_norm: Tensor, // [hidden]
    gate: Linear,
    up: Linear,
    down: Linear,
}

/// Rotation of a step's tokens: `[tokens, 1, head_dim / 2]` each.
struct Rotation {
    cos: Tensor,
    sin: Tensor,
    layout: RopeLayout,
}

impl Model {
    pub(crate) fn load(config: Config, weights: &mut Weights, device: &Device) -> Result<Self> {
        let embedding = weights.tensor("model.embed_tokens.weight", &[config.vocab, config.hidden])?;
        let norm = weights.tensor("model.norm.weight", &[config.hidden])?;
        let output = if !config.tied {
            weights.linear("lm_head", config.hidden, config.vocab, false)?
        } else if let Weights::Gguf(_) = weights {
            weights.linear("model.embed_tokens", config.hidden, config.vocab, false)?
        } else {
            Linear::Dense(embedding.clone(), None)
        };
        let blocks = (0..config.layers).map(|layer| Block::load(layer, &config, weights)).collect::<Result<_>>()?;
        let inv_freq = Tensor::new(config.rope.inv_freq.as_slice(), device)?.unsqueeze(0)?;
        Ok(Self { config, embedding, blocks, norm, output, inv_freq })
    }

    /// Shape and constants.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Hidden states after the last norm, `[tokens, hidden]`. `tokens`: as many as the step has, sequences end to end.
    /// `gates` are needed where the cache's policy is, and where the checkpoint was trained with a borrowed neuron.
    ///
    /// # Errors
    /// [`Error::Model`] for a token outside the vocabulary or a number of tokens that does not fit the step.
    pub fn hidden(&self, tokens: &[u32], step: &Step, cache: &mut KvCache, gates: Option<&Gates>) -> Result<Tensor> {
        if tokens.len() != step.len() {
            return Err(Error::Model(format!("{} tokens for a step of {}", tokens.len(), step.len())));
        }
        self.check_tokens(tokens)?;
        let device = self.embedding.device();
        let rotation = self.rotation(step)?;
        let mut x = self.embedding.index_select(&Tensor::new(tokens, device)?, 0)?;
        for (layer, block) in self.blocks.iter().enumerate() {
            let y = block.attend(layer, &self.config, &x, &rotation, step, cache, gates)?;
            x = (x + y)?;
            x = (&x + block.feed_forward(&self.config, &x)?)?;
        }
        self.rms_norm(&x)
    }

    pub(crate) fn check_tokens(&self, tokens: &[u32]) -> Result<()> {
        match tokens.iter().find(|&&token| token as usize >= self.config.vocab) {
            Some(token) => {
                let last = self.config.vocab - 1;
                Err(Error::Model(format!("token {token} is outside the vocabulary 0..={last}")))
            }
            None => Ok(()),
        }
    }

    /// Logits of hidden states `[n, hidden]`: f32 `[n, vocab]`.
    ///
    /// # Errors
    /// Those of the tensor library.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        Ok(self.output.forward(hidden)?.to_dtype(DType::F32)?)
    }

    /// Logits of each sequence's last token: f32 `[sequences, vocab]`. As [`Model::hidden`].
    ///
    /// # Errors
    /// As [`Model::hidden`].
    pub fn forward(&self, tokens: &[u32], step: &Step, cache: &mut KvCache, gates: Option<&Gates>) -> Result<Tensor> {
        let hidden = self.hidden(tokens, step, cache, gates)?;
        let last = Tensor::new(step.last_tokens().as_slice(), hidden.device())?;
        self.logits(&hidden.index_select(&last, 0)?)
    }

    fn rms_norm(&self, x: &Tensor) -> Result<Tensor> {
        Ok(candle_nn::ops::rms_norm(x, &self.norm, self.config.rms_eps as f32)?)
    }

    /// Angles are computed per step, so no table limits the context.
    fn rotation(&self, step: &Step) -> Result<Rotation> {
        let positions = step.positions().to_dtype(DType::F32)?.unsqueeze(1)?;
        let angles = positions.broadcast_mul(&self.inv_freq)?.unsqueeze(1)?;
        let dtype = self.embedding.dtype();
        Ok(Rotation {
            cos: angles.cos()?.to_dtype(dtype)?,
            sin: angles.sin()?.to_dtype(dtype)?,
            layout: self.config.rope.layout,
        })
    }
}

impl Rotation {
    /// `[tokens, heads, head_dim]`: each token is a batch of one position.
    fn apply(&self, x: &Tensor) -> Result<Tensor> {
        let x = x.unsqueeze(2)?.contiguous()?;
        let turned = match self.layout {
            RopeLayout::HalfSplit => rope(&x, &self.cos, &self.sin)?,
            RopeLayout::Interleaved => rope_i(&x, &self.cos, &self.sin)?,
        };
        Ok(turned.squeeze(2)?)
    }
}

impl Block {
    fn load(layer: usize, config: &Config, weights: &mut Weights) -> Result<Self> {
        let Config { hidden, ffn, q_heads, kv_heads, head_dim, qkv_bias, o_bias, mlp_bias, .. } = *config;
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        let head_norm = |part: &str, weights: &mut Weights| match config.arch {
            Arch::Qwen3 => weights.tensor(&name(&format!("self_attn.{part}.weight")), &[head_dim]).map(Some),
            Arch::Llama | Arch::Qwen2 => Ok(None),
        };
        Ok(Self {
            attention_norm: weights.tensor(&name("input_layernorm.weight"), &[hidden])?,
            q: weights.linear(&name("self_attn.q_proj"), hidden, q_heads * head_dim, qkv_bias)?,
            k: weights.linear(&name("self_attn.k_proj"), hidden, kv_heads * head_dim, qkv_bias)?,
            v: weights.linear(&name("self_attn.v_proj"), hidden, kv_heads * head_dim, qkv_bias)?,
            o: weights.linear(&name("self_attn.o_proj"), q_heads * head_dim, hidden, o_bias)?,
            q_norm: head_norm("q_norm", weights)?,
            k_norm: head_norm("k_norm", weights)?,
            mlp_norm: weights.tensor(&name("post_attention_layernorm.weight"), &[hidden])?,
            gate: weights.linear(&name("mlp.gate_proj"), hidden, ffn, mlp_bias)?,
            up: weights.linear(&name("mlp.up_proj"), hidden, ffn, mlp_bias)?,
            down: weights.linear(&name("mlp.down_proj"), ffn, hidden, mlp_bias)?,
        })
    }

    #[allow(clippy::too_many_arguments)]
    fn attend(
        &self,
        layer: usize,
        config: &Config,
        x: &Tensor, // [tokens, hidden]
        rotation: &Rotation,
        step: &Step,
        cache: &mut KvCache,
        gates: Option<&Gates>,
    ) -> Result<Tensor> {
        let eps = config.rms_eps as f32;
        let normed = candle_nn::ops::rms_norm(x, &self.attention_norm, eps)?;
        let heads = |projection: &Linear, heads: usize, norm: &Option<Tensor>| -> Result<Tensor> {
            let y = projection.forward(&normed)?.reshape((step.len(), heads, config.head_dim))?;
            match norm {
                Some(weight) => Ok(candle_nn::ops::rms_norm(&y, weight, eps)?),
                None => Ok(y),
            }
        };
        let q = heads(&self.q, config.q_heads, &self.q_norm)?;
        let k = heads(&self.k, config.kv_heads, &self.k_norm)?;
        let v = heads(&self.v, config.kv_heads, &None)?;
        let (q, logits) = match gates {
            Some(gates) => {
                let (logits, q) = gates.decide(layer, config, x, q)?;
                (gates.after_rope(rotation.apply(&q)?)?, Some(logits))
            }
            None => (rotation.apply(&q)?, None),
        };
        let y = cache.attend(layer, step, &step.tokens(q, rotation.apply(&k)?, v, logits))?;
        self.o.forward(&y.flatten_from(1)?)
    }

    fn feed_forward(&self, config: &Config, x: &Tensor) -> Result<Tensor> {
        let x = candle_nn::ops::rms_norm(x, &self.mlp_norm, config.rms_eps as f32)?;
        let gated = (candle_nn::ops::silu(&self.gate.forward(&x)?)? * self.up.forward(&x)?)?;
        self.down.forward(&gated)
    }
}
