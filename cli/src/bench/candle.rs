//! candle-transformers' Llama with random weights: the dense baseline.

use anyhow::{Context, Result};
use candle_core::{D, DType, Device, Shape, Tensor};
use candle_nn::{Init, VarBuilder, var_builder::SimpleBackend};
use candle_transformers::models::llama::{Cache, Config, Llama, Llama3RopeConfig, Llama3RopeType};
use kvpolicy_candle::Arch;

/// Every tensor is drawn when it is asked for.
struct Random;

impl SimpleBackend for Random {
    fn get(&self, shape: Shape, name: &str, _: Init, dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
        if name.contains("norm") {
            return Tensor::ones(shape, dtype, device);
        }
        Tensor::randn(0f32, 0.02, shape, device)?.to_dtype(dtype)
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> candle_core::Result<Tensor> {
        candle_core::bail!("{name} has no shape")
    }

    fn contains_tensor(&self, _: &str) -> bool {
        true
    }
}

/// The model and one batch.
pub(crate) struct Dense {
    model: Llama,
    config: Config,
    device: Device,
    cache: Option<Cache>,
    next: Option<Tensor>, // [batch, 1]
    position: usize,
}

impl Dense {
    /// `None` for a shape that is no Llama's.
    pub(crate) fn random(shape: &kvpolicy_candle::Config, device: &Device) -> Result<Option<Self>> {
        if shape.arch != Arch::Llama || shape.q_heads * shape.head_dim != shape.hidden {
            return Ok(None);
        }
        let config = Config {
            hidden_size: shape.hidden,
            intermediate_size: shape.ffn,
            vocab_size: shape.vocab,
            num_hidden_layers: shape.layers,
            num_attention_heads: shape.q_heads,
            num_key_value_heads: shape.kv_heads,
            use_flash_attn: false,
            rms_norm_eps: shape.rms_eps,
            rope_theta: 500_000.0,
            bos_token_id: None,
            eos_token_id: None,
            rope_scaling: Some(Llama3RopeConfig {
                factor: 32.0,
                low_freq_factor: 1.0,
                high_freq_factor: 4.0,
                original_max_position_embeddings: 8192,
                rope_type: Llama3RopeType::Llama3,
            }),
            max_position_embeddings: shape.max_context,
            tie_word_embeddings: shape.tied,
        };
        let builder = VarBuilder::from_backend(Box::new(Random), DType::BF16, device.clone());
        let model = Llama::load(builder, &config)?;
        Ok(Some(Self { model, config, device: device.clone(), cache: None, next: None, position: 0 }))
    }

    pub(crate) fn prefill(&mut self, batch: usize, context: usize) -> Result<()> {
        let mut cache = Cache::new(true, DType::BF16, &self.config, &self.device)?;
        let vocabulary = self.config.vocab_size as f32 - 1.0;
        let tokens = Tensor::rand(0f32, vocabulary, (batch, context), &self.device)?.to_dtype(DType::U32)?;
        self.next = Some(self.model.forward(&tokens, 0, &mut cache)?.argmax_keepdim(D::Minus1)?);
        self.device.synchronize()?;
        (self.cache, self.position) = (Some(cache), context);
        Ok(())
    }

    pub(crate) fn step(&mut self) -> Result<()> {
        let (next, cache) = (self.next.take(), self.cache.as_mut());
        let (next, cache) = next.zip(cache).context("a step before the prefill")?;
        let logits = self.model.forward(&next, self.position, cache)?;
        self.next = Some(logits.argmax_keepdim(D::Minus1)?);
        self.position += 1;
        Ok(())
    }
}
