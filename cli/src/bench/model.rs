//! What the benchmarks of whole models share: a model of random weights, a cache on the GPU, prompts of random tokens.

use crate::model::KvType;
use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use kvpolicy::{CudaConfig, KvCache, Phase, Policy, SeqId, cuda};
use kvpolicy_candle::{Config, Model};
use std::sync::Arc;

/// Options of a model and its cache.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct ModelArgs {
    /// The published shape: llama-3.2-1b, llama-3.2-3b, llama-3.1-8b, qwen-r1-1.5b, qwen3-0.6b, qwen3-8b, smollm2-135m.
    #[arg(long, default_value = "llama-3.2-1b")]
    pub(crate) preset: String,
    /// Sequences.
    #[arg(long, value_delimiter = ',', default_value = "1,8")]
    pub(crate) batch: Vec<usize>,
    /// Tokens of each prompt.
    #[arg(long, value_delimiter = ',', default_value = "8192")]
    pub(crate) context: Vec<usize>,
    /// Policies, separated by `;`.
    #[arg(long, default_value = "full;random-gate:rate=0.875,window=256")]
    pub(crate) policies: String,
    /// Tokens of a prompt that go through the model at a time.
    #[arg(long, default_value_t = 1024)]
    pub(crate) chunk: usize,
    /// Entries of a page.
    #[arg(long, default_value_t = CudaConfig::default().page_size)]
    pub(crate) page_size: usize,
    /// Type of stored keys and values: bf16, f16, f32, fp8 or int8.
    #[arg(long, value_enum, default_value = "bf16")]
    pub(crate) kv_dtype: KvType,
    /// Bytes of the pool, such as 8GiB; half of what is free by default.
    #[arg(long, value_parser = crate::model::bytes)]
    pub(crate) kv_memory: Option<u64>,
    /// Print JSON instead of a table.
    #[arg(long)]
    pub(crate) json: bool,
}

impl ModelArgs {
    pub(crate) fn load(&self, device: &Device) -> Result<Model> {
        ensure!(self.chunk > 0, "chunk=0: a prompt goes through the model in pieces of at least one token");
        Ok(Model::random(Config::preset(&self.preset)?, DType::BF16, device, 1)?)
    }

    /// An empty cache for `batch` sequences of up to `tokens` tokens.
    pub(crate) fn cache(&self, model: &Model, policy: Arc<dyn Policy>, batch: usize, tokens: usize) -> Result<KvCache> {
        let config = CudaConfig {
            page_size: self.page_size,
            limit_bytes: self.kv_memory,
            dtype: self.kv_dtype.dtype(),
            max_sequences: batch,
            max_entries: tokens,
        };
        let (spec, policy) = (model.spec(config.dtype)?, model.config().policy(policy, tokens)?);
        Ok(KvCache::new(spec.clone(), policy, cuda(&spec, &config, model.device())?)?)
    }

    /// Reads a prompt of random tokens, the next token of the sequence last.
    pub(crate) fn prefill(&self, model: &Model, cache: &mut KvCache, seq: SeqId, tokens: usize) -> Result<Tensor> {
        let vocabulary = model.config().vocab as f32;
        let mut next = None;
        for from in (0..tokens).step_by(self.chunk) {
            let len = self.chunk.min(tokens - from);
            let ids = Tensor::rand(0f32, vocabulary - 1.0, len, model.device())?.to_dtype(DType::U32)?;
            let step = cache.begin(&[(seq, len, Phase::Prefill { last: from + len == tokens })])?;
            next = Some(model.greedy(&ids, &step, cache, None)?);
            ensure!(cache.end(step).is_empty(), "the pool is too small for a prompt of {tokens} tokens");
        }
        next.context("a context of 0 tokens")
    }
}

/// Bytes of a model's weights that a decode step reads, bf16: all but the rows of an embedding that is not the output.
pub(crate) fn weight_bytes(config: &Config) -> f64 {
    let Config { hidden, ffn, layers, q_heads, kv_heads, head_dim, vocab, .. } = *config;
    let block = hidden * (2 * q_heads + 2 * kv_heads) * head_dim + 3 * hidden * ffn;
    2.0 * (layers * block + vocab * hidden) as f64
}
