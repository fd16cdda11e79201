//! The decoder block that all families share.

use crate::{
    config::{Config, Projection},
    error::{Error, Result},
    gates::Gates,
    key_range::key_range,
    ops::{self, Heads, Rotation},
    weights::{Linear, Matrix, Weights},
};
use candle_core::{DType, Device, Tensor};
use kvpolicy::{KeyRange, KvCache, ModelSpec, Step};
use std::sync::OnceLock;

/// A decoder of one of the families of [`crate::Arch`], without any state: keys and values live in a [`KvCache`]. Clones share
/// their weights.
///
/// On a GPU with dense weights a decode step ([`Model::forward_on`], [`Model::greedy`] with one token a sequence) copies
/// nothing between host and device and waits for nothing, so a CUDA graph can capture it, after a step outside it has
/// loaded what is loaded once. Gates of a borrowed neuron are the exception.
#[derive(Debug, Clone)]
pub struct Model {
    config: Config,
    pub(crate) embedding: Tensor, // [vocab, hidden]
    pub(crate) blocks: Vec<Block>,
    pub(crate) norm: Tensor, // [hidden]
    pub(crate) output: Linear,
    inv_freq: Vec<Tensor>, // f32 [head_dim / 2]: of most layers, and of `Config::others` if there are any
    key_range: OnceLock<KeyRange>,
}

#[derive(Debug, Clone)]
pub(crate) struct Block {
    pub(crate) attention_norm: Tensor, // [hidden]
    /// Of what attention adds to the residual stream.
    pub(crate) after_attention: Option<Tensor>, // [hidden]
    pub(crate) qkv: Matrix,            // hidden -> (q_heads + 2 kv_heads) * head_dim
    pub(crate) heads: Heads,
    pub(crate) o: Linear,
    pub(crate) mlp_norm: Tensor, // [hidden]
    /// Of what the feed-forward layer adds to it.
    pub(crate) after_mlp: Option<Tensor>, // [hidden]
    pub(crate) gate_up: Linear,  // hidden -> 2 ffn
    pub(crate) down: Linear,
}

/// RoPE of the layers at the same positions.
#[derive(Debug)]
pub(crate) struct Rotations<'a> {
    config: &'a Config,
    kinds: Vec<Rotation>, // of most layers, and of `Config::others`
}

impl Rotations<'_> {
    pub(crate) fn of(&self, layer: usize) -> &Rotation {
        &self.kinds[self.config.is_other(layer) as usize]
    }
}

/// What the blocks of one forward pass share.
struct Pass<'a> {
    config: &'a Config,
    rotations: Rotations<'a>,
    step: &'a Step,
    cache: &'a mut KvCache,
    gates: Option<&'a Gates>,
}

impl Model {
    /// A model of random weights, the same for a seed on every device: for benchmarks and tests.
    ///
    /// # Errors
    /// [`Error::Candle`] if there is not enough memory.
    pub fn random(config: Config, dtype: DType, device: &Device, seed: u64) -> Result<Self> {
        Self::load(config, &mut Weights::random(seed, dtype, device), device)
    }

    pub(crate) fn load(config: Config, weights: &mut Weights, device: &Device) -> Result<Self> {
        let embedding = weights.tensor("model.embed_tokens.weight", &[config.vocab, config.hidden])?;
        let norm = weights.norm("model.norm.weight", config.hidden, config.norms_from_one())?;
        let output = if !config.tied {
            weights.linear("lm_head", config.hidden, config.vocab, false)?
        } else if weights.quantized() {
            weights.linear("model.embed_tokens", config.hidden, config.vocab, false)?
        } else {
            Linear { matrix: Matrix::Dense(embedding.clone()), bias: None }
        };
        let blocks = (0..config.layers).map(|layer| Block::load(layer, &config, weights)).collect::<Result<_>>()?;
        let others = config.others.iter().map(|others| &others.inv_freq);
        let inv_freq = std::iter::once(&config.rope.inv_freq).chain(others);
        let inv_freq = inv_freq.map(|freq| Ok(Tensor::new(freq.as_slice(), device)?)).collect::<Result<_>>()?;
        Ok(Self { config, embedding, blocks, norm, output, inv_freq, key_range: OnceLock::new() })
    }

    /// Shape and constants.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Whether its matrices are quantized.
    pub fn is_quantized(&self) -> bool {
        self.blocks.iter().any(|block| matches!(block.qkv, Matrix::Quantized(_)))
    }

    /// How large the components of its keys become, for a store of 8 bits. The first call reads some tokens.
    ///
    /// # Errors
    /// As [`Model::hidden`].
    pub fn key_range(&self) -> Result<KeyRange> {
        if let Some(known) = self.key_range.get() {
            return Ok(known.clone());
        }
        let range = key_range(self)?;
        Ok(self.key_range.get_or_init(|| range).clone())
    }

    /// What a cache of keys and values of this type must know of the model, gates aside.
    ///
    /// # Errors
    /// As [`Model::key_range`], which a store of 8 bits needs.
    pub fn spec(&self, kv_dtype: DType) -> Result<ModelSpec> {
        let key_range = if kv_dtype.size_in_bytes() == 1 { Some(self.key_range()?) } else { None };
        Ok(ModelSpec { key_range, ..self.config.spec() })
    }

    /// Where its weights are.
    pub fn device(&self) -> &Device {
        self.embedding.device()
    }

    /// Hidden states after the last norm, `[tokens, hidden]`. `tokens`: as many as the step has, sequences end to end.
    /// `gates` are needed where the cache's policy is, and where the checkpoint was trained with a borrowed neuron.
    ///
    /// # Errors
    /// [`Error::Model`] for a token outside the vocabulary or a number of tokens that does not fit the step.
    pub fn hidden(&self, tokens: &[u32], step: &Step, cache: &mut KvCache, gates: Option<&Gates>) -> Result<Tensor> {
        self.check_tokens(tokens)?;
        self.hidden_on(&Tensor::new(tokens, self.device())?, step, cache, gates)
    }

    /// [`Model::hidden`] of tokens that are where the model is: u32 `[tokens]`. On a GPU one outside the vocabulary is no
    /// error: its sequence reads NaN.
    fn hidden_on(&self, tokens: &Tensor, step: &Step, cache: &mut KvCache, gates: Option<&Gates>) -> Result<Tensor> {
        if tokens.dims() != [step.len()] {
            return Err(Error::Model(format!("tokens of shape {:?} for a step of {}", tokens.dims(), step.len())));
        }
        let config = &self.config;
        config.check_windows(step, cache)?;
        let rotations = self.rotations(&step.positions().to_device(self.device())?);
        let mut pass = Pass { config, rotations, step, cache, gates };
        let (mut x, mut normed) = self.embed(tokens)?;
        for (layer, block) in self.blocks.iter().enumerate() {
            let y = block.attend(layer, &x, &normed, &mut pass)?;
            (x, normed) = ops::add_rms_norm(&x, &y, &block.mlp_norm, config.rms_eps)?;
            let y = block.feed_forward(&normed, config)?;
            (x, normed) = ops::add_rms_norm(&x, &y, self.norm_before(layer + 1), config.rms_eps)?;
        }
        Ok(normed)
    }

    /// What enters the first layer, and its norm: `[tokens, hidden]` both.
    fn embed(&self, tokens: &Tensor) -> Result<(Tensor, Tensor)> {
        let Config { rms_eps, embedding_scale, .. } = self.config;
        let (x, normed) = ops::embed_rms_norm(&self.embedding, tokens, self.norm_before(0), rms_eps)?;
        if embedding_scale == 1.0 {
            return Ok((x, normed));
        }
        let x = (x * embedding_scale)?;
        let normed = ops::rms_norm(&x, self.norm_before(0), rms_eps)?;
        Ok((x, normed))
    }

    /// RoPE of the layers at these positions, u32 `[tokens]`.
    pub(crate) fn rotations(&self, positions: &Tensor) -> Rotations<'_> {
        let (layout, dtype) = (self.config.rope.layout, self.embedding.dtype());
        let kinds = self.inv_freq.iter().map(|freq| Rotation::new(positions.clone(), freq.clone(), layout, dtype));
        Rotations { config: &self.config, kinds: kinds.collect() }
    }

    /// The norm that a layer's attention starts with; after the last layer, that of the output.
    fn norm_before(&self, layer: usize) -> &Tensor {
        self.blocks.get(layer).map_or(&self.norm, |block| &block.attention_norm)
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
        self.logits(&last(self.hidden(tokens, step, cache, gates)?, step)?)
    }

    /// [`Model::forward`] of tokens that are where the model is: u32 `[tokens]`. On a GPU one outside the vocabulary is no
    /// error: its sequence reads NaN.
    ///
    /// # Errors
    /// [`Error::Model`] for a number of tokens that does not fit the step, or tokens that are elsewhere.
    pub fn forward_on(
        &self,
        tokens: &Tensor,
        step: &Step,
        cache: &mut KvCache,
        gates: Option<&Gates>,
    ) -> Result<Tensor> {
        self.logits(&last(self.hidden_on(tokens, step, cache, gates)?, step)?)
    }

    /// The most likely next token of each sequence, u32 `[sequences]`, where the model is. As [`Model::forward_on`].
    ///
    /// # Errors
    /// As [`Model::forward_on`].
    pub fn greedy(&self, tokens: &Tensor, step: &Step, cache: &mut KvCache, gates: Option<&Gates>) -> Result<Tensor> {
        let last = last(self.hidden_on(tokens, step, cache, gates)?, step)?;
        ops::argmax(&self.output.forward(&last)?)
    }
}

/// The rows of each span's last token. A step of one token each needs no list of them.
fn last(hidden: Tensor, step: &Step) -> Result<Tensor> {
    if step.spans().iter().all(|span| span.len == 1) {
        return Ok(hidden);
    }
    Ok(hidden.index_select(&Tensor::new(step.last_tokens().as_slice(), hidden.device())?, 0)?)
}

impl Block {
    fn load(layer: usize, config: &Config, weights: &mut Weights) -> Result<Self> {
        let Config { hidden, ffn, q_heads, kv_heads, head_dim, qkv_bias, o_bias, mlp_bias, .. } = *config;
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        let norm = |part: &str, size: usize, weights: &mut Weights| {
            weights.norm(&name(&format!("{part}.weight")), size, config.norms_from_one())
        };
        let norm_if =
            |part: Option<&str>, weights: &mut Weights| part.map(|part| norm(part, hidden, weights)).transpose();
        let head_norm =
            |part: &str, weights: &mut Weights| config.norms_heads().then(|| norm(part, head_dim, weights)).transpose();
        let [qkv, o, gate_up, down] = config.projections();
        let project = |projection: Projection, input: usize, bias: bool, weights: &mut Weights| {
            let parts: Vec<_> = projection.parts.into_iter().map(|(part, rows)| (name(part), rows)).collect();
            weights.joined(&parts, input, bias)
        };
        let qkv = project(qkv, hidden, qkv_bias, weights)?;
        let q_norm = head_norm("self_attn.q_norm", weights)?.map(|weight| weight * config.query_scale).transpose()?;
        let k_norm = head_norm("self_attn.k_norm", weights)?;
        let norms = config.norms();
        Ok(Self {
            attention_norm: norm(norms.attention, hidden, weights)?,
            after_attention: norm_if(norms.after_attention, weights)?,
            qkv: qkv.matrix,
            heads: Heads { q_heads, kv_heads, head_dim, bias: qkv.bias, q_norm, k_norm, eps: config.rms_eps },
            o: project(o, q_heads * head_dim, o_bias, weights)?,
            mlp_norm: norm(norms.mlp, hidden, weights)?,
            after_mlp: norm_if(norms.after_mlp, weights)?,
            gate_up: project(gate_up, hidden, mlp_bias, weights)?,
            down: project(down, ffn, mlp_bias, weights)?,
        })
    }

    /// `x`: the residual stream, `normed`: what of it attention reads; both `[tokens, hidden]`.
    fn attend(&self, layer: usize, x: &Tensor, normed: &Tensor, pass: &mut Pass) -> Result<Tensor> {
        let qkv = self.qkv.product(normed)?;
        let ([q, k, v], logits) = match pass.gates {
            Some(gates) if gates.borrows_neurons() => self.borrow(layer, &qkv, gates, pass)?,
            gates => {
                let logits = gates.map(|gates| gates.adapt(layer, x)).transpose()?.flatten();
                (self.heads.finish(qkv, pass.rotations.of(layer))?, logits)
            }
        };
        let y = pass.cache.attend(layer, pass.step, &pass.step.tokens(q, k, v, logits))?;
        let y = self.o.forward(&y.to_device(x.device())?.flatten_from(1)?)?;
        normed_if(y, &self.after_attention, pass.config.rms_eps)
    }

    /// Heads of a model whose gate is a neuron of its queries.
    fn borrow(&self, layer: usize, qkv: &Tensor, gates: &Gates, pass: &Pass) -> Result<([Tensor; 3], Option<Tensor>)> {
        let [q, k, v] = self.heads.before_rope(qkv)?;
        let (logits, q) = gates.borrow(pass.config, q)?;
        let rotation = pass.rotations.of(layer);
        let q = gates.after_rope(rotation.apply(&q)?)?;
        Ok(([q, rotation.apply(&k)?, v], Some(logits)))
    }

    fn feed_forward(&self, normed: &Tensor, config: &Config) -> Result<Tensor> {
        let y = self.down.forward(&self.gate_up.gated(normed, config.activation)?)?;
        normed_if(y, &self.after_mlp, config.rms_eps)
    }
}

fn normed_if(x: Tensor, norm: &Option<Tensor>, eps: f64) -> Result<Tensor> {
    match norm {
        Some(weight) => ops::rms_norm(&x, weight, eps),
        None => Ok(x),
    }
}
