//! What a model is, from `config.json` or from GGUF metadata.

mod json;

use crate::error::{Error, Result};
use candle_core::quantized::gguf_file::Value;
use kvpolicy::{ModelSpec, Rope, RopeLayout};
use serde::Deserialize;
use std::{collections::HashMap, f32::consts::PI};

/// The largest head.
const MOST_COMPONENTS: usize = 4096;

/// The model families this crate defines. They share one block; see [`Config`] for what differs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arch {
    /// Llama 2 and 3, SmolLM2, and others of `model_type: llama`.
    Llama,
    /// Qwen2 and Qwen2.5, DeepSeek-R1-Distill-Qwen: biases on q, k and v.
    Qwen2,
    /// Qwen3: RMS norms on each head of q and k.
    Qwen3,
}

impl Arch {
    fn read(name: &str) -> Result<Self> {
        match name {
            "llama" => Ok(Self::Llama),
            "qwen2" => Ok(Self::Qwen2),
            "qwen3" => Ok(Self::Qwen3),
            other => Err(Error::Model(format!("architecture `{other}` is not supported: llama, qwen2 or qwen3"))),
        }
    }
}

/// Shape and constants of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Model family.
    pub arch: Arch,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of the feed-forward layer.
    pub ffn: usize,
    /// Number of blocks.
    pub layers: usize,
    /// Query heads.
    pub q_heads: usize,
    /// KV heads.
    pub kv_heads: usize,
    /// Components of a head.
    pub head_dim: usize,
    /// Vocabulary entries.
    pub vocab: usize,
    /// Added to the mean square in every RMS norm.
    pub rms_eps: f64,
    /// Rotary position embedding.
    pub rope: Rope,
    /// The longest context the model was made for, in tokens.
    pub max_context: usize,
    /// The output layer is the embedding.
    pub tied: bool,
    /// Biases on q, k and v.
    pub qkv_bias: bool,
    /// Bias on the attention output.
    pub o_bias: bool,
    /// Biases in the feed-forward layer.
    pub mlp_bias: bool,
    /// Tokens that end a text.
    pub eos: Vec<u32>,
}

impl Config {
    /// What a cache must know.
    pub fn spec(&self) -> ModelSpec {
        let mut spec = ModelSpec::new(self.layers, self.q_heads, self.kv_heads, self.head_dim);
        spec.rope = Some(self.rope.clone());
        spec
    }

    /// Parameters, but for norms and biases.
    pub fn parameters(&self) -> usize {
        let Self { hidden, ffn, layers, q_heads, kv_heads, head_dim, vocab, tied, .. } = *self;
        let block = hidden * (2 * q_heads + 2 * kv_heads) * head_dim + 3 * hidden * ffn;
        layers * block + vocab * hidden * if tied { 1 } else { 2 }
    }

    /// Reads a Hugging Face `config.json`.
    ///
    /// # Errors
    /// [`Error::Model`] naming the field that is missing, wrong or not supported.
    pub fn from_json(text: &str) -> Result<Self> {
        let raw: HfConfig = serde_json::from_str(text).map_err(|e| Error::Model(format!("config.json: {e}")))?;
        raw.config()
    }

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
        let arch = Arch::read(&name)?;
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
        let vocab = match metadata.get("tokenizer.ggml.tokens") {
            Some(tokens) => tokens.to_vec()?.len(),
            None => number("vocab_size")?,
        };
        let config = Self {
            arch,
            hidden,
            ffn: number("feed_forward_length")?,
            layers: number("block_count")?,
            q_heads,
            kv_heads: number("attention.head_count_kv").unwrap_or(q_heads),
            head_dim,
            vocab,
            rms_eps: real(metadata, &key("attention.layer_norm_rms_epsilon"))?,
            rope: Rope {
                inv_freq,
                layout: if arch == Arch::Llama { RopeLayout::Interleaved } else { RopeLayout::HalfSplit },
            },
            max_context: number("context_length")?,
            tied: !has("output.weight"),
            qkv_bias: arch == Arch::Qwen2 || has("blk.0.attn_q.bias"),
            o_bias: has("blk.0.attn_output.bias"),
            mlp_bias: has("blk.0.ffn_up.bias"),
            eos: whole(metadata, "tokenizer.ggml.eos_token_id").map(|id| id as u32).into_iter().collect(),
        };
        config.checked()
    }

    fn checked(self) -> Result<Self> {
        let mut faults = self.spec().faults();
        for (name, n) in [("hidden_size", self.hidden), ("vocab_size", self.vocab), ("layers", self.layers)] {
            if !(1..=u32::MAX as usize).contains(&n) {
                faults.push(format!("{name}={n} is not accepted: 1 or more, below 2^32"));
            }
        }
        if self.rope.inv_freq.iter().any(|freq| !freq.is_finite()) {
            faults.push("the RoPE frequencies are no finite numbers".into());
        }
        if faults.is_empty() { Ok(self) } else { Err(Error::Model(faults.join("; "))) }
    }
}

fn divide(hidden: usize, heads: usize) -> Result<usize> {
    match heads {
        0 => Err(Error::Model("the model has 0 attention heads".into())),
        heads => Ok(hidden / heads),
    }
}

fn missing(key: &str) -> Error {
    Error::Model(format!("GGUF metadata has no `{key}`, or of the wrong type"))
}

fn text(metadata: &HashMap<String, Value>, key: &str) -> Result<String> {
    metadata.get(key).and_then(|v| v.to_string().ok()).cloned().ok_or_else(|| missing(key))
}

fn whole(metadata: &HashMap<String, Value>, key: &str) -> Result<usize> {
    let value = metadata.get(key).ok_or_else(|| missing(key))?;
    value.to_u32().map(|n| n as usize).or_else(|_| value.to_u64().map(|n| n as usize)).map_err(|_| missing(key))
}

fn real(metadata: &HashMap<String, Value>, key: &str) -> Result<f64> {
    metadata.get(key).and_then(|v| v.to_f32().ok()).map(f64::from).ok_or_else(|| missing(key))
}

fn inverse_frequencies(theta: f64, head_dim: usize) -> Result<Vec<f32>> {
    if !(1..=MOST_COMPONENTS).contains(&head_dim) {
        return Err(Error::Model(format!("head_dim={head_dim} is not accepted: 1..={MOST_COMPONENTS}")));
    }
    if !(theta.is_finite() && theta > 0.0) {
        return Err(Error::Model(format!("rope_theta={theta} is not accepted: above 0")));
    }
    Ok((0..head_dim / 2).map(|i| (1.0 / theta.powf((2 * i) as f64 / head_dim as f64)) as f32).collect())
}

/// The fields of `config.json` that matter here.
#[derive(Debug, Deserialize)]
struct HfConfig {
    model_type: String,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    vocab_size: usize,
    rms_norm_eps: f64,
    rope_theta: Option<f64>,
    rope_scaling: Option<HfRope>,
    /// The newer place of both.
    rope_parameters: Option<HfRope>,
    max_position_embeddings: usize,
    #[serde(default)]
    tie_word_embeddings: bool,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    use_sliding_window: Option<bool>,
    hidden_act: Option<String>,
    eos_token_id: Option<OneOrMany>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(u32),
    Many(Vec<u32>),
}

#[derive(Debug, Deserialize)]
struct HfRope {
    rope_type: Option<String>,
    /// The older name; some files have both.
    r#type: Option<String>,
    rope_theta: Option<f64>,
    factor: Option<f32>,
    low_freq_factor: Option<f32>,
    high_freq_factor: Option<f32>,
    original_max_position_embeddings: Option<f32>,
}

impl HfConfig {
    fn config(self) -> Result<Config> {
        let arch = Arch::read(&self.model_type)?;
        if self.use_sliding_window == Some(true) {
            return Err(Error::Model(
                "use_sliding_window=true is not supported: use the policy `window` instead".into(),
            ));
        }
        if let Some(act) = self.hidden_act.as_deref().filter(|act| *act != "silu") {
            return Err(Error::Model(format!("hidden_act={act} is not supported: silu")));
        }
        let head_dim = self.head_dim.map_or_else(|| divide(self.hidden_size, self.num_attention_heads), Ok)?;
        let rope = self.rope_parameters.as_ref().or(self.rope_scaling.as_ref());
        let theta = self.rope_theta.or(rope.and_then(|r| r.rope_theta)).unwrap_or(10_000.0);
        let inv_freq = match rope {
            Some(rope) => rope.scale(inverse_frequencies(theta, head_dim)?)?,
            None => inverse_frequencies(theta, head_dim)?,
        };
        let bias = self.attention_bias.unwrap_or(false);
        let config = Config {
            arch,
            hidden: self.hidden_size,
            ffn: self.intermediate_size,
            layers: self.num_hidden_layers,
            q_heads: self.num_attention_heads,
            kv_heads: self.num_key_value_heads.unwrap_or(self.num_attention_heads),
            head_dim,
            vocab: self.vocab_size,
            rms_eps: self.rms_norm_eps,
            rope: Rope { inv_freq, layout: RopeLayout::HalfSplit },
            max_context: self.max_position_embeddings,
            tied: self.tie_word_embeddings,
            qkv_bias: bias || arch == Arch::Qwen2,
            o_bias: bias && arch != Arch::Qwen2,
            mlp_bias: self.mlp_bias.unwrap_or(false),
            eos: match self.eos_token_id {
                None => vec![],
                Some(OneOrMany::One(id)) => vec![id],
                Some(OneOrMany::Many(ids)) => ids,
            },
        };
        config.checked()
    }
}

impl HfRope {
    fn scale(&self, inv_freq: Vec<f32>) -> Result<Vec<f32>> {
        let need = |field: Option<f32>, name: &str| {
            field.ok_or_else(|| Error::Model(format!("rope_scaling of config.json has no `{name}`")))
        };
        match self.rope_type.as_deref().or(self.r#type.as_deref()).unwrap_or("default") {
            "default" => Ok(inv_freq),
            "linear" => {
                let factor = need(self.factor, "factor")?;
                Ok(inv_freq.into_iter().map(|freq| freq / factor).collect())
            }
            "llama3" => {
                let (factor, low, high) = (
                    need(self.factor, "factor")?,
                    need(self.low_freq_factor, "low_freq_factor")?,
                    need(self.high_freq_factor, "high_freq_factor")?,
                );
                let original = need(self.original_max_position_embeddings, "original_max_position_embeddings")?;
                // Short wavelengths stay, long ones stretch by the factor, those between are blended.
                let scaled = inv_freq.into_iter().map(|freq| {
                    let turns = original * freq / (2.0 * PI);
                    let keep = ((turns - low) / (high - low)).clamp(0.0, 1.0);
                    (1.0 - keep) * freq / factor + keep * freq
                });
                Ok(scaled.collect())
            }
            other => Err(Error::Model(format!("rope_type={other} is not supported: default, linear or llama3"))),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const QWEN3: &str = r#"{"model_type":"qwen3","hidden_size":64,"intermediate_size":96,"num_hidden_layers":2,
        "num_attention_heads":4,"num_key_value_heads":2,"head_dim":16,"vocab_size":128,"rms_norm_eps":1e-6,
        "rope_theta":1000000.0,"max_position_embeddings":512,"eos_token_id":[1,2]}"#;

    #[test]
    fn reads_what_differs_between_families() {
        let config = Config::from_json(QWEN3).unwrap();
        assert_eq!((config.arch, config.qkv_bias, config.eos.len(), config.head_dim), (Arch::Qwen3, false, 2, 16));
        let qwen2 = Config::from_json(&QWEN3.replace("qwen3", "qwen2")).unwrap();
        assert!(qwen2.qkv_bias && !qwen2.o_bias);
    }

    #[test]
    fn rope_is_scaled_wherever_the_file_says_so() {
        let plain = Config::from_json(QWEN3).unwrap().rope.inv_freq;
        for scaling in [
            r#""rope_scaling":{"type":"linear","factor":4.0},"rope_theta""#,
            r#""rope_scaling":{"type":"linear","rope_type":"linear","factor":4.0},"rope_theta""#,
            r#""rope_parameters":{"rope_type":"linear","factor":4.0,"rope_theta":1000000.0},"unused""#,
        ] {
            let scaled = Config::from_json(&QWEN3.replace("\"rope_theta\"", scaling)).unwrap().rope.inv_freq;
            assert!(plain.iter().zip(&scaled).all(|(a, b)| (a / b - 4.0).abs() < 1e-5), "{scaling}");
        }
    }

    #[test]
    fn names_what_it_cannot_use() {
        for (from, to, word) in [
            ("qwen3", "mamba", "mamba"),
            ("\"hidden_size\":64,", "", "hidden_size"),
            ("\"num_key_value_heads\":2", "\"num_key_value_heads\":3", "kv_heads=3"),
            ("\"num_attention_heads\":4", "\"num_attention_heads\":0", "q_heads=0"),
            ("\"rope_theta\"", "\"rope_scaling\":{\"rope_type\":\"yarn\"},\"rope_theta\"", "yarn"),
            ("\"rope_theta\"", "\"rope_scaling\":{\"rope_type\":\"llama3\"},\"rope_theta\"", "factor"),
            ("\"rope_theta\"", "\"use_sliding_window\":true,\"rope_theta\"", "use_sliding_window"),
            ("\"head_dim\":16", "\"head_dim\":1152921504606846976", "head_dim=1152921504606846976"),
            ("\"vocab_size\":128", "\"vocab_size\":0", "vocab_size=0"),
            ("1000000.0", "0.0", "rope_theta=0"),
            ("{", "", "config.json"),
        ] {
            let error = Config::from_json(&QWEN3.replacen(from, to, 1)).unwrap_err().to_string();
            assert!(error.contains(word), "{error} does not name {word}");
        }
    }
}
