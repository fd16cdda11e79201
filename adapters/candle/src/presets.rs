//! The published shapes of some models, for benchmarks with random weights.

use crate::{
    config::Config,
    error::{Error, Result},
};

/// Names and the fields of `config.json` that matter here.
const PRESETS: [(&str, &str); 11] = [
    (
        "gemma-3-1b",
        r#"{"model_type": "gemma3_text", "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 262144, "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0, "query_pre_attn_scalar": 256, "sliding_window": 512,
        "sliding_window_pattern": 6, "max_position_embeddings": 32768, "eos_token_id": [1, 106]}"#,
    ),
    (
        "llama-3.2-1b",
        r#"{"model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}, "max_position_embeddings": 131072,
        "tie_word_embeddings": true, "eos_token_id": 128001}"#,
    ),
    (
        "llama-3.2-3b",
        r#"{"model_type": "llama", "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
        "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}, "max_position_embeddings": 131072,
        "tie_word_embeddings": true, "eos_token_id": 128001}"#,
    ),
    (
        "llama-3.1-8b",
        r#"{"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}, "max_position_embeddings": 131072,
        "tie_word_embeddings": false, "eos_token_id": 128001}"#,
    ),
    (
        "mistral-7b", // v0.3
        r#"{"model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 32768, "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0, "sliding_window": null, "max_position_embeddings": 32768, "tie_word_embeddings": false,
        "eos_token_id": 2}"#,
    ),
    (
        "phi-4",
        r#"{"model_type": "phi3", "hidden_size": 5120, "intermediate_size": 17920, "num_hidden_layers": 40,
        "num_attention_heads": 40, "num_key_value_heads": 10, "vocab_size": 100352, "rms_norm_eps": 1e-5,
        "rope_theta": 250000.0, "sliding_window": null, "max_position_embeddings": 16384, "tie_word_embeddings": false,
        "eos_token_id": 100265}"#,
    ),
    (
        "qwen-r1-1.5b", // DeepSeek-R1-Distill-Qwen-1.5B
        r#"{"model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
        "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936, "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0, "max_position_embeddings": 131072, "tie_word_embeddings": false, "eos_token_id": 151643}"#,
    ),
    (
        "qwen3-0.6b",
        r#"{"model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0, "max_position_embeddings": 40960, "tie_word_embeddings": true, "eos_token_id": 151645}"#,
    ),
    (
        "qwen3-8b",
        r#"{"model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0, "max_position_embeddings": 40960, "tie_word_embeddings": false,
        "eos_token_id": 151645}"#,
    ),
    (
        "smollm2-135m",
        r#"{"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0, "max_position_embeddings": 8192, "tie_word_embeddings": true, "eos_token_id": 0}"#,
    ),
    (
        "smollm3-3b",
        r#"{"model_type": "smollm3", "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
        "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 128256, "rms_norm_eps": 1e-6,
        "rope_theta": 5000000.0, "no_rope_layer_interval": 4, "max_position_embeddings": 65536,
        "tie_word_embeddings": true, "eos_token_id": 128012}"#,
    ),
];

impl Config {
    /// The published shape of a model: `gemma-3-1b`, `llama-3.2-1b`, `llama-3.2-3b`, `llama-3.1-8b`, `mistral-7b`,
    /// `phi-4`, `qwen-r1-1.5b` (DeepSeek-R1-Distill-Qwen-1.5B), `qwen3-0.6b`, `qwen3-8b`, `smollm2-135m`, `smollm3-3b`.
    ///
    /// # Errors
    /// [`Error::Model`] with the names that are known, if this is none of them.
    pub fn preset(name: &str) -> Result<Self> {
        match PRESETS.iter().find(|(known, _)| *known == name) {
            Some((_, json)) => Self::from_json(json),
            None => {
                let known: Vec<&str> = PRESETS.iter().map(|(known, _)| *known).collect();
                Err(Error::Model(format!("`{name}` is no known shape: {}", known.join(", "))))
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn shapes_have_the_published_number_of_parameters() {
        for (name, millions) in [
            ("gemma-3-1b", 999),
            ("llama-3.2-1b", 1235),
            ("llama-3.2-3b", 3212),
            ("llama-3.1-8b", 8029),
            ("mistral-7b", 7247),
            ("phi-4", 14_659),
            ("qwen-r1-1.5b", 1776),
            ("qwen3-0.6b", 595),
            ("qwen3-8b", 8190),
            ("smollm2-135m", 134),
            ("smollm3-3b", 3074),
        ] {
            assert_eq!(Config::preset(name).unwrap().parameters() / 1_000_000, millions, "{name}");
        }
    }

    #[test]
    fn an_unknown_name_is_told_the_known_ones() {
        let error = Config::preset("gpt-2").unwrap_err().to_string();
        assert!(PRESETS.iter().all(|(name, _)| error.contains(name)), "{error}");
    }

    #[test]
    fn llama_stretches_its_long_wavelengths() {
        let freq = Config::preset("llama-3.2-1b").unwrap().rope.inv_freq;
        let plain = |i: i32| 500_000f32.powf(-(2 * i) as f32 / 64.0);
        assert!((freq[0] - 1.0).abs() < 1e-6 && (plain(31) / freq[31] - 32.0).abs() < 1e-3);
    }
}
