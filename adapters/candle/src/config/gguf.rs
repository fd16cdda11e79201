//! A configuration from the metadata of a GGUF file.

use super::{
    Arch, Config, GLOBAL, LOCAL_THETA, OtherLayers, WITHOUT_ROPE, checked_layers, divide, every_nth,
    inverse_frequencies,
};
use crate::error::{Error, Result};
use candle_core::quantized::gguf_file::Value;
use kvpolicy::{Rope, RopeLayout};
use std::collections::HashMap;

impl Config {
    /// Reads GGUF metadata. `has`: whether the file has a tensor; `factors`: divisors of the RoPE frequencies, if the file
    /// has them (Llama 3).
    ///
    /// # Errors
    /// [`Error::Model`] naming the key that is missing, wrong or not supported.
    pub fn from_gguf(
        metadata: &HashMap<String, Value>,
        has: impl Fn(&str) -> bool,
        factors: Option<Vec<f32>>,
    ) -> Result<Self> {
        let name = text(metadata, "general.architecture")?;
        let arch = Arch::of_gguf(&name)?;
        let key = |suffix: &str| format!("{name}.{suffix}");
        let number = |suffix: &str| whole(metadata, &key(suffix));
        let (hidden, q_heads) = (number("embedding_length")?, number("attention.head_count")?);
        let head_dim = number("attention.key_length").or_else(|_| divide(hidden, q_heads))?;
        if let Ok(rotated) = number("rope.dimension_count")
            && rotated != head_dim
        {
            return Err(Error::Model(format!("rope over {rotated} of {head_dim} components is not supported")));
        }
        let theta = real(metadata, &key("rope.freq_base")).unwrap_or(10_000.0);
        let mut inv_freq = inverse_frequencies(theta, head_dim)?;
        if let Some(factors) = factors {
            if factors.len() != inv_freq.len() {
                let (got, expected) = (factors.len(), inv_freq.len());
                return Err(Error::Model(format!("rope_freqs.weight has {got} factors, head_dim asks for {expected}")));
            }
            inv_freq.iter_mut().zip(&factors).for_each(|(freq, factor)| *freq /= factor);
        }
        match text(metadata, &key("rope.scaling.type")).as_deref() {
            Err(_) | Ok("none") => {}
            Ok("linear") => {
                let factor = real(metadata, &key("rope.scaling.factor"))? as f32;
                inv_freq.iter_mut().for_each(|freq| *freq /= factor);
            }
            Ok(other) => return Err(Error::Model(format!("rope scaling `{other}` is not supported: linear"))),
        }
        if has("rope_factors_long.weight") {
            return Err(Error::Model(
                "rope_factors_long.weight: RoPE that depends on the context is not supported".into(),
            ));
        }
        for suffix in ["attn_logit_softcapping", "final_logit_softcapping"] {
            if real(metadata, &key(suffix)).is_ok_and(|cap| cap != 0.0) {
                return Err(Error::Model(format!("{} is not supported", key(suffix))));
            }
        }
        let (layers, max_context) = (checked_layers(number("block_count")?)?, number("context_length")?);
        let others = match arch {
            Arch::Phi3 => {
                OtherLayers::with_window(number("attention.sliding_window").ok(), max_context, layers, &inv_freq)?
            }
            Arch::Gemma3 => {
                let which = every_nth(layers, GLOBAL).iter().map(|global| !global).collect();
                let local = inverse_frequencies(LOCAL_THETA, head_dim)?;
                OtherLayers::local(which, number("attention.sliding_window")?, max_context, local)?
            }
            Arch::SmolLm3 => OtherLayers::without_rope(every_nth(layers, WITHOUT_ROPE), &inv_freq),
            Arch::Llama | Arch::Mistral | Arch::Qwen2 | Arch::Qwen3 => None,
        };
        let vocab = match metadata.get("tokenizer.ggml.tokens") {
            Some(tokens) => tokens.to_vec()?.len(),
            None => number("vocab_size")?,
        };
        let config = Self {
            arch,
            hidden,
            ffn: number("feed_forward_length")?,
            layers,
            q_heads,
            kv_heads: number("attention.head_count_kv").unwrap_or(q_heads),
            head_dim,
            vocab,
            rms_eps: real(metadata, &key("attention.layer_norm_rms_epsilon"))?,
            rope: Rope {
                inv_freq,
                layout: match arch {
                    Arch::Llama | Arch::Mistral | Arch::SmolLm3 => RopeLayout::Interleaved,
                    Arch::Phi3 | Arch::Qwen2 | Arch::Qwen3 | Arch::Gemma3 => RopeLayout::HalfSplit,
                },
            },
            others,
            activation: arch.activation().1,
            embedding_scale: arch.embedding_scale(hidden),
            // The file does not say: the largest model alone, of 62 layers, divides by another number than head_dim.
            query_scale: match arch {
                Arch::Gemma3 if layers == 62 => (head_dim as f64 / divide(hidden, q_heads)? as f64).sqrt(),
                _ => 1.0,
            },
            max_context,
            tied: !has("output.weight"),
            qkv_bias: arch == Arch::Qwen2 || has("blk.0.attn_q.bias"),
            o_bias: has("blk.0.attn_output.bias"),
            mlp_bias: has("blk.0.ffn_up.bias"),
            eos: whole(metadata, "tokenizer.ggml.eos_token_id").map(|id| id as u32).into_iter().collect(),
        };
        config.checked()
    }
}

fn missing(key: &str) -> Error {
    Error::Model(format!("GGUF metadata has no `{key}`, or of the wrong type"))
}

pub(super) fn text(metadata: &HashMap<String, Value>, key: &str) -> Result<String> {
    metadata.get(key).and_then(|v| v.to_string().ok()).cloned().ok_or_else(|| missing(key))
}

fn whole(metadata: &HashMap<String, Value>, key: &str) -> Result<usize> {
    let value = metadata.get(key).ok_or_else(|| missing(key))?;
    value.to_u32().map(|n| n as usize).or_else(|_| value.to_u64().map(|n| n as usize)).map_err(|_| missing(key))
}

pub(super) fn real(metadata: &HashMap<String, Value>, key: &str) -> Result<f64> {
    metadata.get(key).and_then(|v| v.to_f32().ok()).map(f64::from).ok_or_else(|| missing(key))
}
