//! A GGUF file's configuration as `config.json` says it.

use super::{
    Activation, Arch, Config, LOCAL_THETA,
    gguf::{real, text},
    inverse_frequencies,
};
use crate::error::{Error, Result};
use candle_core::quantized::gguf_file;
use serde_json::{Map, Value, json};
use std::collections::HashMap;

impl Config {
    /// The fields of a Hugging Face `config.json` for this configuration of a GGUF file with this metadata. Rows of q and k
    /// are then in the order of Hugging Face. `eos`: the tokens that end a text.
    ///
    /// # Errors
    /// [`Error::Model`] for what `config.json` has no words for.
    pub(crate) fn to_json(
        &self,
        metadata: &HashMap<String, gguf_file::Value>,
        eos: &[u32],
    ) -> Result<Map<String, Value>> {
        let mut fields = self.shape();
        fields.extend(self.rope_fields(metadata)?);
        let id = |name: &str| metadata.get(&format!("tokenizer.ggml.{name}_token_id"))?.to_u32().ok();
        fields.extend(id("bos").map(|id| ("bos_token_id".into(), json!(id))));
        match eos {
            [] => {}
            [one] => _ = fields.insert("eos_token_id".into(), json!(one)),
            several => _ = fields.insert("eos_token_id".into(), json!(several)),
        }
        self.same(&Self::from_json(&Value::Object(fields.clone()).to_string())?)?;
        Ok(fields)
    }

    fn shape(&self) -> Map<String, Value> {
        let mut fields = object(json!({
            "architectures": [self.arch.class()],
            "model_type": self.arch.names().hf,
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.q_heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "rms_norm_eps": shortest(self.rms_eps),
            "max_position_embeddings": self.max_context,
            "tie_word_embeddings": self.tied,
            "attention_bias": self.qkv_bias && self.arch != Arch::Qwen2,
            "torch_dtype": "bfloat16",
        }));
        if self.activation == Activation::Silu {
            fields.insert("hidden_act".into(), json!("silu"));
        }
        fields.extend(object(match self.arch {
            Arch::Phi3 => {
                json!({ "sliding_window": self.window(0), "original_max_position_embeddings": self.max_context })
            }
            Arch::Gemma3 => json!({
                "hidden_activation": "gelu_pytorch_tanh",
                "query_pre_attn_scalar": self.head_dim as f64 / self.query_scale.powi(2),
                "layer_types": (0..self.layers).map(|layer| self.layer_type(layer)).collect::<Vec<_>>(),
                "sliding_window": self.windows().map_or(self.max_context as u32, |(_, window)| window),
                "rope_local_base_freq": LOCAL_THETA,
            }),
            Arch::SmolLm3 => json!({
                "mlp_bias": self.mlp_bias,
                "no_rope_layers": (0..self.layers).map(|layer| !self.is_other(layer) as u8).collect::<Vec<_>>(),
            }),
            Arch::Llama | Arch::Mistral => json!({ "mlp_bias": self.mlp_bias }),
            // Their loaders ask for these.
            Arch::Qwen2 | Arch::Qwen3 => {
                json!({ "use_sliding_window": false, "sliding_window": null, "max_window_layers": self.layers })
            }
        }));
        fields
    }

    /// Gemma's word for a layer.
    fn layer_type(&self, layer: usize) -> &'static str {
        if self.is_other(layer) { "sliding_attention" } else { "full_attention" }
    }

    fn rope_fields(&self, metadata: &HashMap<String, gguf_file::Value>) -> Result<Map<String, Value>> {
        let name = text(metadata, "general.architecture")?;
        let number = |suffix: &str| real(metadata, &format!("{name}.{suffix}"));
        let theta = number("rope.freq_base").unwrap_or(10_000.0);
        let plain = inverse_frequencies(theta, self.head_dim)?;
        // Of the slowest turns, which every scaling slows down the most.
        let factor = plain.iter().zip(&self.rope.inv_freq).map(|(plain, ours)| plain / ours).fold(1.0, f32::max);
        let linear = text(metadata, &format!("{name}.rope.scaling.type")).is_ok_and(|kind| kind == "linear");
        let scaling = match factor {
            none if (none - 1.0).abs() < 1e-5 => Value::Null,
            _ if linear => json!({ "rope_type": "linear", "factor": number("rope.scaling.factor")? }),
            // GGUF has the factors that came of these, which all models of Llama 3 share but for the first.
            _ => json!({
                "rope_type": "llama3",
                "factor": factor.round(),
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            }),
        };
        Ok(object(json!({ "rope_theta": theta, "rope_scaling": scaling })))
    }

    /// Whether the fields, read again, are this configuration.
    fn same(&self, read: &Self) -> Result<()> {
        let near = |(a, b): (&f32, &f32)| (a - b).abs() <= 1e-5 * a.abs();
        if !self.rope.inv_freq.iter().zip(&read.rope.inv_freq).all(near) {
            return Err(Error::Model(
                "the factors of the file's RoPE frequencies are none that config.json has".into(),
            ));
        }
        let Self { rms_eps, rope, eos, .. } = read.clone();
        if *read == (Self { rms_eps, rope, eos, ..self.clone() }) {
            return Ok(());
        }
        Err(Error::Model(format!(
            "config.json has no words for this model: biases on q, k and v: {}, on the attention output: {}, in the \
             feed-forward layer: {}",
            self.qkv_bias, self.o_bias, self.mlp_bias
        )))
    }
}

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(fields) => fields,
        _ => Map::new(),
    }
}

/// The shortest number that is the same f32: GGUF has f32, and 1e-5 is not meant to be 9.999999747378752e-6.
fn shortest(number: f64) -> f64 {
    (number as f32).to_string().parse().unwrap_or(number)
}
