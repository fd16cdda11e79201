//! What a model is, from `config.json` or from GGUF metadata.

mod gguf;
mod hf;
mod json;
mod windows;

use crate::error::{Error, Result};
use kvpolicy::{ModelSpec, Rope};
use std::ops::RangeInclusive;

/// The largest head.
const MOST_COMPONENTS: usize = 4096;
/// The deepest model.
const MOST_LAYERS: usize = 4096;
/// Sizes of a sliding window.
const WINDOWS: RangeInclusive<usize> = 1..=1 << 30;

/// The model families this crate defines. They share one block; see [`Config`] for what differs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arch {
    /// Llama 2 and 3, SmolLM2, and others of `model_type: llama`.
    Llama,
    /// Mistral, whose first version has a sliding window. GGUF files call it llama.
    Mistral,
    /// Phi-3 and Phi-4 of `model_type: phi3`: q, k and v are one tensor, gate and up another.
    Phi3,
    /// Qwen2 and Qwen2.5, DeepSeek-R1-Distill-Qwen: biases on q, k and v.
    Qwen2,
    /// Qwen3: RMS norms on each head of q and k.
    Qwen3,
    /// SmolLM3: some layers without RoPE.
    SmolLm3,
    /// Gemma 3, text alone: norms on both sides of attention and of the feed-forward layer, a sliding window and a RoPE of
    /// their own in most layers.
    Gemma3,
}

/// What a family is called.
struct Names {
    /// `model_type` of `config.json`.
    hf: &'static str,
    /// The class that Hugging Face's `transformers` has for it.
    class: &'static str,
    /// `general.architecture` of GGUF, where it has one of its own.
    gguf: Option<&'static str>,
}

impl Arch {
    const ALL: [Self; 7] =
        [Self::Llama, Self::Mistral, Self::Phi3, Self::Qwen2, Self::Qwen3, Self::SmolLm3, Self::Gemma3];

    fn names(self) -> Names {
        match self {
            Self::Llama => Names { hf: "llama", class: "LlamaForCausalLM", gguf: Some("llama") },
            Self::Mistral => Names { hf: "mistral", class: "MistralForCausalLM", gguf: None },
            Self::Phi3 => Names { hf: "phi3", class: "Phi3ForCausalLM", gguf: Some("phi3") },
            Self::Qwen2 => Names { hf: "qwen2", class: "Qwen2ForCausalLM", gguf: Some("qwen2") },
            Self::Qwen3 => Names { hf: "qwen3", class: "Qwen3ForCausalLM", gguf: Some("qwen3") },
            Self::SmolLm3 => Names { hf: "smollm3", class: "SmolLM3ForCausalLM", gguf: Some("smollm3") },
            Self::Gemma3 => Names { hf: "gemma3_text", class: "Gemma3ForCausalLM", gguf: Some("gemma3") },
        }
    }

    fn of_hf(name: &str) -> Result<Self> {
        let known = Self::ALL.into_iter().find(|arch| arch.names().hf == name);
        known.ok_or_else(|| unknown(name, Self::ALL.into_iter().map(|arch| arch.names().hf)))
    }

    fn of_gguf(name: &str) -> Result<Self> {
        let known = Self::ALL.into_iter().find(|arch| arch.names().gguf == Some(name));
        known.ok_or_else(|| unknown(name, Self::ALL.into_iter().filter_map(|arch| arch.names().gguf)))
    }

    /// The class that Hugging Face's `transformers` has for it.
    pub(crate) fn class(self) -> &'static str {
        self.names().class
    }
}

/// Families that are near to known ones, and why they are none of them.
const REFUSED: [(&str, &str); 3] = [
    ("gemma2", " (its attention scores are capped before the softmax, which no backend does)"),
    ("gemma3", " (a configuration with images: take one of text alone)"),
    ("mistral3", " (a configuration with images)"),
];

fn unknown(name: &str, known: impl Iterator<Item = &'static str>) -> Error {
    let why = REFUSED.iter().find(|(refused, _)| *refused == name).map_or("", |(_, why)| why);
    let known: Vec<&str> = known.collect();
    Error::Model(format!("architecture `{name}` is not supported{why}: {}", known.join(", ")))
}

/// What the gate of a feed-forward layer goes through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x * sigmoid(x)`.
    Silu,
    /// GELU by its approximation with a tanh.
    GeluTanh,
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
    /// Rotary position embedding of all layers but [`Config::others`].
    pub rope: Rope,
    /// Layers that attend in another way than the rest.
    pub others: Option<OtherLayers>,
    /// What the gate of a feed-forward layer goes through.
    pub activation: Activation,
    /// What a token's embedding is multiplied with.
    pub embedding_scale: f64,
    /// What queries are multiplied with beside `head_dim^-0.5`. It is part of their norm's weight, once that is loaded.
    pub query_scale: f64,
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

/// Layers that attend in another way than the rest.
#[derive(Debug, Clone, PartialEq)]
pub struct OtherLayers {
    /// Which of all layers are such.
    pub which: Vec<bool>,
    /// Their RoPE, in the layout of [`Config::rope`]: angle per position of each pair.
    pub inv_freq: Vec<f32>,
    /// Newest tokens that a query sees, its own included; `None`: all.
    pub window: Option<u32>,
}

impl OtherLayers {
    /// Gemma's: `which` have a RoPE of their own, and a window if it ends before the context does.
    fn local(which: Vec<bool>, window: usize, max_context: usize, inv_freq: Vec<f32>) -> Result<Option<Self>> {
        let window = checked_window(window, max_context)?;
        Ok(which.contains(&true).then_some(Self { which, inv_freq, window }))
    }

    /// Those that have no RoPE, if there are any: nothing turns.
    fn without_rope(which: Vec<bool>, inv_freq: &[f32]) -> Option<Self> {
        let any = which.contains(&true);
        any.then(|| Self { which, inv_freq: vec![0.0; inv_freq.len()], window: None })
    }

    /// All layers, if the window ends before the context does.
    fn with_window(window: Option<usize>, max_context: usize, layers: usize, inv_freq: &[f32]) -> Result<Option<Self>> {
        let Some(window) = window else { return Ok(None) };
        let window = checked_window(window, max_context)?;
        Ok(window.map(|_| Self { which: vec![true; layers], inv_freq: inv_freq.to_vec(), window }))
    }
}

/// A window, unless the context ends before it does.
fn checked_window(window: usize, max_context: usize) -> Result<Option<u32>> {
    if window >= max_context {
        return Ok(None);
    }
    if !WINDOWS.contains(&window) {
        let (least, most) = (WINDOWS.start(), WINDOWS.end());
        return Err(Error::Model(format!("sliding_window={window} is not accepted: {least}..={most}")));
    }
    Ok(Some(window as u32))
}

/// The norms of a block, by Hugging Face's names.
pub(crate) struct Norms {
    pub(crate) attention: &'static str,
    /// Of what attention adds to the residual stream.
    pub(crate) after_attention: Option<&'static str>,
    pub(crate) mlp: &'static str,
    /// Of what the feed-forward layer adds to it.
    pub(crate) after_mlp: Option<&'static str>,
}

/// A projection of a block as it is computed here.
pub(crate) struct Projection {
    pub(crate) name: &'static str,
    /// Those of the files, one after the other: Hugging Face's names, and the rows of each.
    pub(crate) parts: Vec<(&'static str, usize)>,
}

impl Config {
    /// q, k and v; the attention output; gate and up; down.
    pub(crate) fn projections(&self) -> [Projection; 4] {
        let (q, kv, ffn) = (self.q_heads * self.head_dim, self.kv_heads * self.head_dim, self.ffn);
        let (qkv, gate_up) = match self.arch {
            Arch::Phi3 => (vec![("self_attn.qkv_proj", q + 2 * kv)], vec![("mlp.gate_up_proj", 2 * ffn)]),
            _ => (
                vec![("self_attn.q_proj", q), ("self_attn.k_proj", kv), ("self_attn.v_proj", kv)],
                vec![("mlp.gate_proj", ffn), ("mlp.up_proj", ffn)],
            ),
        };
        [
            Projection { name: "qkv", parts: qkv },
            Projection { name: "o", parts: vec![("self_attn.o_proj", self.hidden)] },
            Projection { name: "gate_up", parts: gate_up },
            Projection { name: "down", parts: vec![("mlp.down_proj", self.hidden)] },
        ]
    }

    pub(crate) fn norms(&self) -> Norms {
        let attention = "input_layernorm";
        match self.arch {
            Arch::Gemma3 => Norms {
                attention,
                after_attention: Some("post_attention_layernorm"),
                mlp: "pre_feedforward_layernorm",
                after_mlp: Some("post_feedforward_layernorm"),
            },
            _ => Norms { attention, after_attention: None, mlp: "post_attention_layernorm", after_mlp: None },
        }
    }

    /// Whether each head of q and k is normed.
    pub(crate) fn norms_heads(&self) -> bool {
        matches!(self.arch, Arch::Qwen3 | Arch::Gemma3)
    }

    /// Whether weights of norms are what they are more than 1, in safetensors.
    pub(crate) fn norms_from_one(&self) -> bool {
        self.arch == Arch::Gemma3
    }

    /// What a cache must know. Its `rope` is `None` where layers differ in theirs.
    pub fn spec(&self) -> ModelSpec {
        let mut spec = ModelSpec::new(self.layers, self.q_heads, self.kv_heads, self.head_dim);
        let same = self.others.as_ref().is_none_or(|others| others.inv_freq == self.rope.inv_freq);
        spec.rope = same.then(|| self.rope.clone());
        spec
    }

    /// Whether a layer is one of [`Config::others`].
    pub(crate) fn is_other(&self, layer: usize) -> bool {
        self.others.as_ref().is_some_and(|others| others.which.get(layer) == Some(&true))
    }

    /// Parameters, but for norms and biases.
    pub fn parameters(&self) -> usize {
        let Self { hidden, ffn, layers, q_heads, kv_heads, head_dim, vocab, tied, .. } = *self;
        let block = hidden * (2 * q_heads + 2 * kv_heads) * head_dim + 3 * hidden * ffn;
        layers * block + vocab * hidden * if tied { 1 } else { 2 }
    }

    fn checked(self) -> Result<Self> {
        let mut faults = self.spec().faults();
        for (name, n) in [("hidden_size", self.hidden), ("vocab_size", self.vocab)] {
            if !(1..=u32::MAX as usize).contains(&n) {
                faults.push(format!("{name}={n} is not accepted: 1 or more, below 2^32"));
            }
        }
        for (name, scale) in [("embedding", self.embedding_scale), ("query", self.query_scale)] {
            if !(scale.is_finite() && scale > 0.0) {
                faults.push(format!("the {name} scale is {scale}: above 0"));
            }
        }
        let others = self.others.iter().flat_map(|others| &others.inv_freq);
        if self.rope.inv_freq.iter().chain(others).any(|freq| !freq.is_finite()) {
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

/// A number of layers, each of which will have a place in memory.
fn checked_layers(layers: usize) -> Result<usize> {
    match layers {
        0..=MOST_LAYERS => Ok(layers),
        _ => Err(Error::Model(format!("layers={layers} is not accepted: 1..={MOST_LAYERS}"))),
    }
}

/// Each n-th layer.
fn every_nth(layers: usize, n: usize) -> Vec<bool> {
    (1..=layers).map(|layer| n > 0 && layer.is_multiple_of(n)).collect()
}

/// SmolLM3: one layer of how many has no RoPE.
const WITHOUT_ROPE: usize = 4;
/// Gemma 3: one layer of how many sees the whole context.
const GLOBAL: usize = 6;
/// Gemma 3: the base of the other layers' RoPE.
const LOCAL_THETA: f64 = 1e4;

fn inverse_frequencies(theta: f64, head_dim: usize) -> Result<Vec<f32>> {
    if !(1..=MOST_COMPONENTS).contains(&head_dim) {
        return Err(Error::Model(format!("head_dim={head_dim} is not accepted: 1..={MOST_COMPONENTS}")));
    }
    if !(theta.is_finite() && theta > 0.0) {
        return Err(Error::Model(format!("rope_theta={theta} is not accepted: above 0")));
    }
    // In f32, as transformers, candle-transformers and mistral.rs do: a rounding apart moves far positions by more than that.
    let exponent = |i: usize| (2 * i) as f32 / head_dim as f32;
    Ok((0..head_dim / 2).map(|i| 1.0 / (theta as f32).powf(exponent(i))).collect())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use candle_core::quantized::gguf_file::Value;
    use std::collections::HashMap;

    const QWEN3: &str = r#"{"model_type":"qwen3","hidden_size":64,"intermediate_size":96,"num_hidden_layers":2,
        "num_attention_heads":4,"num_key_value_heads":2,"head_dim":16,"vocab_size":128,"rms_norm_eps":1e-6,
        "rope_theta":1000000.0,"max_position_embeddings":512,"eos_token_id":[1,2]}"#;

    #[test]
    fn reads_what_differs_between_families() {
        let config = Config::from_json(QWEN3).unwrap();
        assert_eq!((config.arch, config.qkv_bias, config.eos.len(), config.head_dim), (Arch::Qwen3, false, 2, 16));
        let qwen2 = Config::from_json(&QWEN3.replace("qwen3", "qwen2")).unwrap();
        assert!(qwen2.qkv_bias && !qwen2.o_bias && !qwen2.tied);
        let smollm3 = Config::from_json(&QWEN3.replace("qwen3", "smollm3")).unwrap();
        assert!(smollm3.tied && smollm3.others.is_none() && smollm3.spec().rope.is_some());
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
    fn gemma_reads_two_kinds_of_layers_in_each_of_its_spellings() {
        let gemma = |extra: &str| {
            let json = QWEN3.replace("qwen3\"", &format!("gemma3_text\",{extra}\"sliding_window\":64"));
            Config::from_json(&json.replace("\"rope_theta\":1000000.0,", "")).unwrap()
        };
        let plain = gemma("\"rope_theta\":1000000.0,");
        let others = plain.others.clone().unwrap();
        assert_eq!((others.which, others.window, plain.tied), (vec![true, true], Some(64), true), "pattern 6");
        assert_eq!((plain.embedding_scale, plain.query_scale, plain.activation), (8.0, 0.25, Activation::GeluTanh));
        assert_eq!((others.inv_freq[1], plain.rope.inv_freq[1]), (1e4f32.powf(-0.125), 1e6f32.powf(-0.125)));
        for old in [false, true] {
            let scaled = gemma(if old {
                r#""layer_types":["full_attention","sliding_attention"],"rope_theta":1e6,"rope_local_base_freq":100.0,
                "rope_scaling":{"rope_type":"linear","factor":8.0},"#
            } else {
                r#""layer_types":["full_attention","sliding_attention"],"rope_parameters":{"full_attention":
                {"rope_type":"linear","factor":8.0,"rope_theta":1e6},"sliding_attention":{"rope_theta":100.0}},"#
            });
            let others = scaled.others.unwrap();
            assert_eq!(others.which, [false, true]);
            assert_eq!((others.inv_freq[0], others.inv_freq[4], scaled.rope.inv_freq[0]), (1.0, 0.1, 0.125), "{old}");
        }
    }

    #[test]
    fn another_family_is_named_whatever_its_fields_are() {
        let error = Config::from_json(r#"{"model_type":"gpt2","n_embd":768}"#).unwrap_err().to_string();
        assert!(Arch::ALL.iter().all(|arch| error.contains(arch.names().hf)) && error.contains("`gpt2`"), "{error}");
        let metadata = HashMap::from([("general.architecture".to_string(), Value::String("gpt2".into()))]);
        let error = Config::from_gguf(&metadata, |_| true, None).unwrap_err().to_string();
        let known = Arch::ALL.iter().filter_map(|arch| arch.names().gguf);
        assert!(known.into_iter().all(|name| error.contains(name)) && error.contains("`gpt2`"), "{error}");
    }

    #[test]
    fn frequencies_that_depend_on_the_context_are_refused_in_gguf() {
        let number = |n: u32| Value::U32(n);
        let mut metadata: HashMap<String, Value> = [
            ("embedding_length", number(64)),
            ("attention.head_count", number(4)),
            ("feed_forward_length", number(96)),
            ("block_count", number(2)),
            ("attention.layer_norm_rms_epsilon", Value::F32(1e-5)),
            ("context_length", number(4096)),
            ("vocab_size", number(128)),
        ]
        .map(|(key, value)| (format!("phi3.{key}"), value))
        .into();
        metadata.insert("general.architecture".into(), Value::String("phi3".into()));
        assert!(Config::from_gguf(&metadata, |_| false, None).is_ok());
        let long = |name: &str| name == "rope_factors_long.weight";
        let error = Config::from_gguf(&metadata, long, None).unwrap_err().to_string();
        assert!(error.contains("rope_factors_long"), "{error}");
    }

    #[test]
    fn names_what_it_cannot_use() {
        for (from, to, word) in [
            ("qwen3", "mamba", "`mamba` is not supported: llama, mistral"),
            ("\"num_hidden_layers\":2", "\"num_hidden_layers\":4000000000000", "layers=4000000000000"),
            ("\"hidden_size\":64,", "", "hidden_size"),
            ("\"num_key_value_heads\":2", "\"num_key_value_heads\":3", "kv_heads=3"),
            ("\"num_attention_heads\":4", "\"num_attention_heads\":0", "q_heads=0"),
            ("\"rope_theta\"", "\"rope_scaling\":{\"rope_type\":\"yarn\"},\"rope_theta\"", "yarn"),
            ("\"rope_theta\"", "\"rope_scaling\":{\"rope_type\":\"llama3\"},\"rope_theta\"", "factor"),
            (
                "\"rope_theta\"",
                "\"rope_scaling\":{\"type\":\"longrope\"},\"rope_theta\"",
                "original_max_position_embeddings",
            ),
            ("\"rope_theta\"", "\"partial_rotary_factor\":0.75,\"rope_theta\"", "partial_rotary_factor=0.75"),
            ("\"rope_theta\"", "\"use_sliding_window\":true,\"rope_theta\"", "use_sliding_window"),
            ("\"head_dim\":16", "\"head_dim\":1152921504606846976", "head_dim=1152921504606846976"),
            ("\"vocab_size\":128", "\"vocab_size\":0", "vocab_size=0"),
            ("1000000.0", "0.0", "rope_theta=0"),
            ("\"qwen3\"", "\"smollm3\",\"no_rope_layers\":[1]", "no_rope_layers names 1 layers of 2"),
            ("qwen3", "gemma2", "`gemma2` is not supported (its attention scores are capped"),
            ("qwen3", "gemma3", "`gemma3` is not supported (a configuration with images: take one of text"),
            ("\"qwen3\"", "\"gemma3_text\",\"attn_logit_softcapping\":50.0", "attn_logit_softcapping=50"),
            ("\"qwen3\"", "\"gemma3_text\",\"final_logit_softcapping\":30.0", "final_logit_softcapping=30"),
            ("\"qwen3\"", "\"gemma3_text\",\"use_bidirectional_attention\":true", "use_bidirectional_attention"),
            ("\"qwen3\"", "\"gemma3_text\",\"hidden_activation\":\"gelu\"", "hidden_act=gelu"),
            ("\"qwen3\"", "\"gemma3_text\",\"layer_types\":[]", "layer_types names 0 layers of 2"),
            ("\"qwen3\"", "\"gemma3_text\",\"query_pre_attn_scalar\":0", "query scale is inf"),
            ("{", "", "config.json"),
        ] {
            let error = Config::from_json(&QWEN3.replacen(from, to, 1)).unwrap_err().to_string();
            assert!(error.contains(word), "{error} does not name {word}");
        }
    }
}
