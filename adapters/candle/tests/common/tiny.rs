//! Random tiny models as safetensors folders and GGUF files.
#![allow(dead_code, unreachable_pub, missing_docs, clippy::unwrap_used)] // each test crate uses its own part

use candle_core::{
    DType, Device, Tensor,
    quantized::{GgmlDType, QTensor, gguf_file},
};
use serde_json::{Value, json};
use std::{collections::HashMap, fs::File, path::Path};

pub const HIDDEN: usize = 64;
pub const FFN: usize = 96;
/// The 256 bytes, `ab`, then the two tokens of ChatML.
pub const VOCAB: usize = 259;
pub const LAYERS: usize = 2;
pub const HEADS: usize = 4;

/// A random tiny model in memory.
pub struct Tiny {
    arch: &'static str,
    kv_heads: usize,
    head_dim: usize,
    tied: bool,
    extra: Value,
    pub tensors: HashMap<String, Tensor>,
}

impl Tiny {
    pub fn new(arch: &'static str, kv_heads: usize, head_dim: usize, tied: bool, extra: Value) -> Self {
        let device = Device::Cpu;
        let mut seed = 0x9E37_79B9u32;
        let mut random = |shape: &[usize], scale: f32, shift: f32| {
            let count: usize = shape.iter().product();
            let numbers: Vec<f32> = (0..count)
                .map(|_| {
                    seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    ((seed >> 8) as f32 / (1 << 24) as f32 - 0.5) * scale + shift
                })
                .collect();
            Tensor::from_vec(numbers, shape, &device).unwrap()
        };
        let gemma = arch == "gemma3_text";
        let one = if gemma { 0.0 } else { 1.0 }; // Gemma's norms are what they are more than 1
        let mut tensors = HashMap::new();
        let mut add = |name: String, tensor: Tensor| tensors.insert(name, tensor);
        add("model.embed_tokens.weight".into(), random(&[VOCAB, HIDDEN], 2.0, 0.0));
        add("model.norm.weight".into(), random(&[HIDDEN], 0.5, one));
        if !tied {
            add("lm_head.weight".into(), random(&[VOCAB, HIDDEN], 0.5, 0.0));
        }
        for layer in 0..layers(&extra) {
            let name = |part: &str| format!("model.layers.{layer}.{part}");
            let (q, kv) = (HEADS * head_dim, kv_heads * head_dim);
            for (part, rows, columns) in [
                ("self_attn.q_proj", q, HIDDEN),
                ("self_attn.k_proj", kv, HIDDEN),
                ("self_attn.v_proj", kv, HIDDEN),
                ("self_attn.o_proj", HIDDEN, q),
                ("mlp.gate_proj", FFN, HIDDEN),
                ("mlp.up_proj", FFN, HIDDEN),
                ("mlp.down_proj", HIDDEN, FFN),
            ] {
                add(name(&format!("{part}.weight")), random(&[rows, columns], 0.6, 0.0));
            }
            for part in ["input_layernorm", "post_attention_layernorm"] {
                add(name(&format!("{part}.weight")), random(&[HIDDEN], 0.5, one));
            }
            if arch == "qwen2" {
                for (part, rows) in [("q_proj", q), ("k_proj", kv), ("v_proj", kv)] {
                    add(name(&format!("self_attn.{part}.bias")), random(&[rows], 1.0, 0.0));
                }
            }
            if gemma {
                for part in ["pre_feedforward_layernorm", "post_feedforward_layernorm"] {
                    add(name(&format!("{part}.weight")), random(&[HIDDEN], 0.5, one));
                }
            }
            if arch == "qwen3" || gemma {
                for part in ["q_norm", "k_norm"] {
                    add(name(&format!("self_attn.{part}.weight")), random(&[head_dim], 0.5, one));
                }
            }
        }
        if arch == "phi3" {
            tensors = merged(tensors);
        }
        Self { arch, kv_heads, head_dim, tied, extra, tensors }
    }

    pub fn config(&self) -> Value {
        let mut config = json!({
            "model_type": self.arch, "hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": layers(&self.extra),
            "num_attention_heads": HEADS, "num_key_value_heads": self.kv_heads, "head_dim": self.head_dim,
            "vocab_size": VOCAB, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 512,
            "tie_word_embeddings": self.tied, "attention_bias": false, "hidden_act": "silu",
            "sliding_window": 512, "max_window_layers": LAYERS, "use_sliding_window": false,
        });
        if self.arch == "gemma3_text" {
            let more = json!({
                "hidden_activation": "gelu_pytorch_tanh", "rope_local_base_freq": 100.0,
                "query_pre_attn_scalar": self.head_dim, "attn_logit_softcapping": null, "final_logit_softcapping": null,
            });
            config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        }
        let extra = self.extra.as_object().unwrap().clone();
        config.as_object_mut().unwrap().extend(extra);
        config
    }

    pub fn write_dir(&self, dir: &Path) {
        std::fs::write(dir.join("config.json"), self.config().to_string()).unwrap();
        candle_core::safetensors::save(&self.tensors, dir.join("model.safetensors")).unwrap();
    }

    /// The model with tensors that bf16 has without loss.
    pub fn in_bf16(mut self) -> Self {
        for tensor in self.tensors.values_mut() {
            *tensor = tensor.to_dtype(DType::BF16).unwrap().to_dtype(DType::F32).unwrap();
        }
        self
    }

    /// Gates as a training writes them: an adapter that evicts about a half, window 8.
    pub fn write_gates(&self, dir: &Path) {
        let mut seed = 77u32;
        let mut random = |shape: &[usize], shift: f32| {
            let count: usize = shape.iter().product();
            let next = |_| {
                seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                ((seed >> 8) as f32 / (1 << 24) as f32 - 0.5) * 0.2 + shift
            };
            let numbers: Vec<f32> = (0..count).map(next).collect();
            Tensor::from_vec(numbers, shape, &Device::Cpu).unwrap().to_dtype(DType::BF16).unwrap()
        };
        let mut tensors = HashMap::new();
        for layer in 0..layers(&self.extra) {
            let name = format!("model.layers.{layer}.self_attn.dms_proj_alpha");
            tensors.insert(format!("{name}_norm.weight"), random(&[HIDDEN], 1.0));
            tensors.insert(format!("{name}.weight"), random(&[self.kv_heads, HIDDEN], 0.0));
        }
        std::fs::create_dir_all(dir).unwrap();
        candle_core::safetensors::save(&tensors, dir.join("gates.safetensors")).unwrap();
        let config = json!({
            "dms_window_size": 8, "dms_separate_alpha": true, "dms_alpha_scale": 50.0, "dms_initial_alpha_offset": 1.0,
            "dms_tau": 0.1, "kvpolicy_model": "tiny", "kvpolicy_evaluation": {"kl": 1.0}, "kvpolicy_command": ["a"],
        });
        std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    }

    /// Rows of q or k, half a head apart, as a converter puts them side by side.
    fn interleaved(&self, rows: &Tensor) -> Tensor {
        let pairs = rows.reshape(((), 2, self.head_dim / 2, HIDDEN)).unwrap().transpose(1, 2).unwrap();
        pairs.contiguous().unwrap().reshape(rows.shape()).unwrap()
    }

    pub fn write_gguf(&self, path: &Path, matrices: GgmlDType) {
        let gemma = self.arch == "gemma3_text";
        let arch = if gemma { "gemma3" } else { self.arch };
        let key = |suffix: &str| format!("{arch}.{suffix}");
        use gguf_file::Value::{Array, F32, I32, String, U32};
        let bytes = (0..256).map(|byte| (byte_token(byte as u8), 1));
        let others = [("ab", 1), ("<|im_start|>", 3), ("<|im_end|>", 3)];
        let tokens = bytes.chain(others.map(|(token, kind)| (token.to_string(), kind)));
        let (tokens, types): (Vec<_>, Vec<_>) = tokens.map(|(token, kind)| (String(token), I32(kind))).unzip();
        let template = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}\
                        {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
        let context = self.config()["max_position_embeddings"].as_u64().unwrap();
        let mut metadata = vec![
            ("tokenizer.ggml.model".to_string(), String("gpt2".to_string())),
            ("tokenizer.ggml.pre".to_string(), String("default".to_string())),
            ("tokenizer.ggml.tokens".to_string(), Array(tokens)),
            ("tokenizer.ggml.token_type".to_string(), Array(types)),
            ("tokenizer.ggml.merges".to_string(), Array(vec![String("a b".to_string())])),
            ("tokenizer.ggml.eos_token_id".to_string(), U32(258)),
            ("tokenizer.chat_template".to_string(), String(template.to_string())),
            ("general.architecture".to_string(), String(arch.to_string())),
            ("general.dtype".to_string(), U32(0)),
            (key("embedding_length"), U32(HIDDEN as u32)),
            (key("feed_forward_length"), U32(FFN as u32)),
            (key("block_count"), U32(layers(&self.extra) as u32)),
            (key("attention.head_count"), U32(HEADS as u32)),
            (key("attention.head_count_kv"), U32(self.kv_heads as u32)),
            (key("attention.key_length"), U32(self.head_dim as u32)),
            (key("attention.layer_norm_rms_epsilon"), F32(1e-5)),
            (key("rope.dimension_count"), U32(self.head_dim as u32)),
            (key("rope.freq_base"), F32(self.extra["rope_theta"].as_f64().unwrap_or(10000.0) as f32)),
            (key("context_length"), U32(context as u32)),
        ];
        if let (Some(window), true) = (self.extra["sliding_window"].as_u64(), self.arch != "llama") {
            metadata.push((key("attention.sliding_window"), U32(window as u32)));
        }
        let quantize = |name: &std::string::String, tensor: &Tensor| {
            let dtype = if tensor.dims().len() == 2 { matrices } else { GgmlDType::F32 };
            let head = |part: &str| self.arch == "smollm3" && name.contains(part);
            let tensor = if head(".q_proj.") || head(".k_proj.") { &self.interleaved(tensor) } else { tensor };
            let tensor = if gemma && name.ends_with("norm.weight") { &(tensor + 1.0).unwrap() } else { tensor };
            (gguf_name(name, gemma), QTensor::quantize(tensor, dtype).unwrap())
        };
        let tensors: Vec<(std::string::String, QTensor)> = self.tensors.iter().map(|(n, t)| quantize(n, t)).collect();
        let metadata: Vec<_> = metadata.iter().map(|(name, value)| (name.as_str(), value)).collect();
        let tensors: Vec<_> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
        gguf_file::write(&mut File::create(path).unwrap(), &metadata, &tensors).unwrap();
    }
}

/// [`LAYERS`], unless a configuration says otherwise.
fn layers(extra: &Value) -> usize {
    extra["num_hidden_layers"].as_u64().unwrap_or(LAYERS as u64) as usize
}

fn gguf_name(name: &str, gemma: bool) -> String {
    let norms: &[(&str, &str)] = if gemma {
        &[
            ("post_attention_layernorm", "post_attention_norm"),
            ("pre_feedforward_layernorm", "ffn_norm"),
            ("post_feedforward_layernorm", "post_ffw_norm"),
        ]
    } else {
        &[("post_attention_layernorm", "ffn_norm")]
    };
    let pairs = [
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("model.layers.", "blk."),
        ("input_layernorm", "attn_norm"),
        ("self_attn.q_norm", "attn_q_norm"),
        ("self_attn.k_norm", "attn_k_norm"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.qkv_proj", "attn_qkv"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.gate_up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ];
    pairs.iter().chain(norms).fold(name.to_string(), |name, (from, to)| name.replace(from, to))
}

/// Phi-3's: q, k and v in one tensor, gate and up in another.
fn merged(mut tensors: HashMap<String, Tensor>) -> HashMap<String, Tensor> {
    let joins: [(&str, &[&str]); 2] = [
        ("self_attn.qkv_proj", &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
        ("mlp.gate_up_proj", &["mlp.gate_proj", "mlp.up_proj"]),
    ];
    for layer in 0..LAYERS {
        let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
        for (whole, parts) in joins {
            let parts: Vec<Tensor> = parts.iter().map(|part| tensors.remove(&name(part)).unwrap()).collect();
            tensors.insert(name(whole), Tensor::cat(&parts, 0).unwrap());
        }
    }
    tensors
}

/// The character that stands for a byte in a byte-level vocabulary.
fn byte_token(byte: u8) -> String {
    let own = |b: u8| matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let shifted = (0..byte).filter(|&b| !own(b)).count() as u32;
    char::from_u32(if own(byte) { byte as u32 } else { 256 + shifted }).unwrap().to_string()
}
