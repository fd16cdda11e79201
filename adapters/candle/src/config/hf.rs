//! A configuration from Hugging Face's `config.json`.

use super::{
    Activation, Arch, Config, GLOBAL, LOCAL_THETA, OtherLayers, WITHOUT_ROPE, checked_layers, divide, every_nth,
    inverse_frequencies,
};
use crate::error::{Error, Result};
use kvpolicy::{Rope, RopeLayout};
use serde::Deserialize;
use std::f32::consts::PI;

impl Config {
    /// Reads a Hugging Face `config.json`.
    ///
    /// # Errors
    /// [`Error::Model`] naming the field that is missing, wrong or not supported.
    pub fn from_json(text: &str) -> Result<Self> {
        let broken = |e: serde_json::Error| Error::Model(format!("config.json: {e}"));
        // The family first: another one's fields are others.
        let Named { model_type } = serde_json::from_str(text).map_err(broken)?;
        let arch = Arch::of_hf(&model_type)?;
        let raw: HfConfig = serde_json::from_str(text).map_err(broken)?;
        raw.config(arch)
    }
}

#[derive(Debug, Deserialize)]
struct Named {
    model_type: String,
}

/// The fields of `config.json` that matter here.
#[derive(Debug, Deserialize)]
struct HfConfig {
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
    rope_parameters: Option<HfRopes>,
    max_position_embeddings: usize,
    tie_word_embeddings: Option<bool>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    use_sliding_window: Option<bool>,
    sliding_window: Option<usize>,
    partial_rotary_factor: Option<f64>,
    /// 0 for a layer without RoPE, 1 for one with it.
    no_rope_layers: Option<Vec<u8>>,
    no_rope_layer_interval: Option<usize>,
    /// `sliding_attention` or `full_attention`.
    layer_types: Option<Vec<String>>,
    sliding_window_pattern: Option<usize>,
    rope_local_base_freq: Option<f64>,
    query_pre_attn_scalar: Option<f64>,
    attn_logit_softcapping: Option<f64>,
    final_logit_softcapping: Option<f64>,
    use_bidirectional_attention: Option<bool>,
    hidden_activation: Option<String>,
    hidden_act: Option<String>,
    eos_token_id: Option<OneOrMany>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(u32),
    Many(Vec<u32>),
}

/// One for all layers, or one for each kind of them.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum HfRopes {
    Two { full_attention: HfRope, sliding_attention: HfRope },
    One(HfRope),
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

/// What a family takes for granted where a file does not say.
impl Arch {
    fn theta(self) -> f64 {
        match self {
            Self::SmolLm3 => 2e6,
            Self::Gemma3 => 1e6,
            _ => 1e4,
        }
    }

    fn is_tied(self) -> bool {
        matches!(self, Self::SmolLm3 | Self::Gemma3)
    }

    /// And its name.
    pub(super) fn activation(self) -> (&'static str, Activation) {
        match self {
            Self::Gemma3 => ("gelu_pytorch_tanh", Activation::GeluTanh),
            _ => ("silu", Activation::Silu),
        }
    }

    /// What embeddings are multiplied by.
    pub(super) fn embedding_scale(self, hidden: usize) -> f64 {
        if self == Self::Gemma3 { (hidden as f64).sqrt() } else { 1.0 }
    }
}

impl HfConfig {
    fn config(self, arch: Arch) -> Result<Config> {
        if self.use_sliding_window == Some(true) {
            return Err(Error::Model(
                "use_sliding_window=true is not supported: use the policy `window` instead".into(),
            ));
        }
        let (name, activation) = arch.activation();
        let named = self.hidden_activation.as_deref().or(self.hidden_act.as_deref());
        if let Some(act) = named.filter(|act| *act != name) {
            return Err(Error::Model(format!("hidden_act={act} is not supported: {name}")));
        }
        for (name, cap) in [
            ("attn_logit_softcapping", self.attn_logit_softcapping),
            ("final_logit_softcapping", self.final_logit_softcapping),
        ] {
            if let Some(cap) = cap {
                return Err(Error::Model(format!("{name}={cap} is not supported: null")));
            }
        }
        if self.use_bidirectional_attention == Some(true) {
            return Err(Error::Model("use_bidirectional_attention=true is not supported: false".into()));
        }
        if let Some(factor) = self.partial_rotary_factor.filter(|factor| *factor != 1.0) {
            return Err(Error::Model(format!(
                "partial_rotary_factor={factor} is not supported: RoPE over the whole head"
            )));
        }
        let default = if arch == Arch::Gemma3 { Some(256) } else { None };
        let head_dim =
            self.head_dim.or(default).map_or_else(|| divide(self.hidden_size, self.num_attention_heads), Ok)?;
        let (rope, local) = match &self.rope_parameters {
            Some(HfRopes::Two { full_attention, sliding_attention }) => (Some(full_attention), Some(sliding_attention)),
            Some(HfRopes::One(rope)) => (Some(rope), None),
            None => (self.rope_scaling.as_ref(), None),
        };
        let theta = self.rope_theta.or(rope.and_then(|r| r.rope_theta)).unwrap_or(arch.theta());
        let inv_freq = match rope {
            Some(rope) => rope.scale(inverse_frequencies(theta, head_dim)?)?,
            None => inverse_frequencies(theta, head_dim)?,
        };
        let layers = checked_layers(self.num_hidden_layers)?;
        let local = match local {
            Some(rope) => rope.scale(inverse_frequencies(rope.rope_theta.unwrap_or(LOCAL_THETA), head_dim)?)?,
            None => inverse_frequencies(self.rope_local_base_freq.unwrap_or(LOCAL_THETA), head_dim)?,
        };
        let others = self.others(arch, layers, &inv_freq, local)?;
        let bias = self.attention_bias.unwrap_or(false);
        let config = Config {
            arch,
            hidden: self.hidden_size,
            ffn: self.intermediate_size,
            layers,
            q_heads: self.num_attention_heads,
            kv_heads: self.num_key_value_heads.unwrap_or(self.num_attention_heads),
            head_dim,
            vocab: self.vocab_size,
            rms_eps: self.rms_norm_eps,
            rope: Rope { inv_freq, layout: RopeLayout::HalfSplit },
            others,
            activation,
            embedding_scale: arch.embedding_scale(self.hidden_size),
            query_scale: match arch {
                Arch::Gemma3 => (head_dim as f64 / self.query_pre_attn_scalar.unwrap_or(256.0)).sqrt(),
                _ => 1.0,
            },
            max_context: self.max_position_embeddings,
            tied: self.tie_word_embeddings.unwrap_or(arch.is_tied()),
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

    /// `inv_freq`: of the rest; `local`: of Gemma's layers with a window.
    fn others(&self, arch: Arch, layers: usize, inv_freq: &[f32], local: Vec<f32>) -> Result<Option<OtherLayers>> {
        match arch {
            Arch::Gemma3 => {
                let which = match &self.layer_types {
                    None => {
                        every_nth(layers, self.sliding_window_pattern.unwrap_or(GLOBAL)).iter().map(|g| !g).collect()
                    }
                    Some(types) if types.len() >= layers => {
                        types[..layers].iter().map(|kind| kind == "sliding_attention").collect()
                    }
                    Some(types) => {
                        return Err(Error::Model(format!("layer_types names {} layers of {layers}", types.len())));
                    }
                };
                OtherLayers::local(which, self.sliding_window.unwrap_or(4096), self.max_position_embeddings, local)
            }
            // The Qwen files name a window that `use_sliding_window` switches off.
            Arch::Llama | Arch::Qwen2 | Arch::Qwen3 => Ok(None),
            Arch::SmolLm3 => {
                let which = match &self.no_rope_layers {
                    None => every_nth(layers, self.no_rope_layer_interval.unwrap_or(WITHOUT_ROPE)),
                    Some(rope) if rope.len() >= layers => rope[..layers].iter().map(|rope| *rope == 0).collect(),
                    Some(rope) => {
                        let got = rope.len();
                        return Err(Error::Model(format!("no_rope_layers names {got} layers of {layers}")));
                    }
                };
                Ok(OtherLayers::without_rope(which, inv_freq))
            }
            Arch::Mistral | Arch::Phi3 => {
                OtherLayers::with_window(self.sliding_window, self.max_position_embeddings, layers, inv_freq)
            }
        }
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
            // A cache holds keys as they were turned when they came.
            "longrope" | "su" => Err(Error::Model(
                "rope_type=longrope is not supported: all keys turn otherwise once the context is longer than \
                 original_max_position_embeddings"
                    .into(),
            )),
            other => Err(Error::Model(format!("rope_type={other} is not supported: default, linear or llama3"))),
        }
    }
}
