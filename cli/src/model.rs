//! Options that load a model, shared by the commands.

use anyhow::Result;
use candle_core::DType;
use clap::ValueEnum;
use kvpolicy::CpuConfig;
use kvpolicy_candle::{Hosted, Lm, LoadOptions};

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum Float {
    F32,
    F16,
    Bf16,
}

impl Float {
    pub(crate) fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::F16 => DType::F16,
            Self::Bf16 => DType::BF16,
        }
    }
}

#[derive(Debug, clap::Args)]
pub(crate) struct ModelArgs {
    /// A folder of safetensors, a GGUF file, or a hub id (org/name, org/name/file.gguf).
    #[arg(long)]
    pub(crate) model: String,
    /// Type of weights and activations of a safetensors model.
    #[arg(long, value_enum, default_value = "f32")]
    dtype: Float,
    /// Type of stored keys and values.
    #[arg(long, value_enum, default_value = "f32")]
    pub(crate) kv_dtype: Float,
    /// The most bytes a cache may take, such as 64MiB or 2GB.
    #[arg(long, value_parser = bytes)]
    kv_memory: Option<u64>,
    /// Allow contexts longer than the model was made for.
    #[arg(long)]
    pub(crate) allow_long: bool,
}

impl ModelArgs {
    pub(crate) fn load(&self) -> Result<Hosted> {
        let lm = Lm::load(&self.model, &LoadOptions { dtype: self.dtype.dtype(), ..LoadOptions::default() })?;
        let store = CpuConfig { dtype: self.kv_dtype.dtype(), limit_bytes: self.kv_memory, ..CpuConfig::default() };
        Ok(Hosted { lm, store, allow_long: self.allow_long })
    }
}

/// A number of bytes with an optional unit.
pub(crate) fn bytes(text: &str) -> std::result::Result<u64, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let unit = match text[digits..].trim() {
        "" | "B" => 1.0,
        "kB" | "KB" => 1e3,
        "MB" => 1e6,
        "GB" => 1e9,
        "KiB" => 1024.0,
        "MiB" => 1024.0 * 1024.0,
        "GiB" => 1024.0 * 1024.0 * 1024.0,
        other => return Err(format!("unit `{other}` is not one of B, KB, MB, GB, KiB, MiB, GiB")),
    };
    let number: f64 = text[..digits].parse().map_err(|_| format!("`{text}` is no number of bytes"))?;
    Ok((number * unit) as u64)
}

#[cfg(test)]
mod tests {
    use super::bytes;

    #[test]
    fn bytes_have_units() {
        assert_eq!((bytes("12"), bytes("1.5KiB"), bytes("2 GB")), (Ok(12), Ok(1536), Ok(2_000_000_000)));
        assert!(bytes("12 apples").is_err() && bytes("MB").is_err() && bytes("").is_err());
    }
}
