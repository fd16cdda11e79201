//! Options that load a model, shared by the commands.

use anyhow::Result;
use bytesize::ByteSize;
use candle_core::{DType, Device};
use clap::ValueEnum;
use kvpolicy_candle::{Hosted, Lm, LoadOptions, SessionOptions};
use std::{fmt, str::FromStr};

/// A type of numbers.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Float {
    /// 32 bits.
    F32,
    /// 16 bits, 5 of them for the exponent.
    F16,
    /// 16 bits, 8 of them for the exponent.
    Bf16,
}

impl Float {
    /// The tensor library's name for it.
    pub fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::F16 => DType::F16,
            Self::Bf16 => DType::BF16,
        }
    }
}

/// What keys and values are stored as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum KvType {
    /// 32 bits.
    F32,
    /// 16 bits, 10 of mantissa.
    F16,
    /// 16 bits, 7 of mantissa.
    Bf16,
    /// 8-bit floats, and a factor for each entry's key and value.
    Fp8,
    /// 8-bit whole numbers, and a factor for each entry's key and value.
    Int8,
}

impl KvType {
    /// As a store is told.
    pub fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::F16 => DType::F16,
            Self::Bf16 => DType::BF16,
            Self::Fp8 => DType::F8E4M3,
            Self::Int8 => DType::U8,
        }
    }

    /// Bytes of an entry's key and value of `head_dim` components on a GPU, their factors included.
    pub(crate) fn entry_bytes(self, head_dim: usize) -> usize {
        let size = self.dtype().size_in_bytes();
        2 * head_dim * size + if size == 1 { 2 } else { 0 }
    }
}

/// As `--kv-dtype` names it.
pub(crate) fn kv_name(dtype: DType) -> &'static str {
    match dtype {
        DType::F8E4M3 => "fp8",
        DType::U8 => "int8",
        other => other.as_str(),
    }
}

/// Where a model runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// The processor.
    Cpu,
    /// The GPU of this number.
    Cuda(usize),
}

impl FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let unknown = || format!("`{text}` is no device: cpu, cuda or cuda:N");
        match text.split_once(':') {
            None if text == "cpu" => Ok(Self::Cpu),
            None if text == "cuda" => Ok(Self::Cuda(0)),
            Some(("cuda", ordinal)) => ordinal.parse().map(Self::Cuda).map_err(|_| unknown()),
            _ => Err(unknown()),
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => write!(f, "cpu"),
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

impl Place {
    pub(crate) fn device(self) -> Result<Device> {
        match self {
            Self::Cpu => Ok(Device::Cpu),
            #[cfg(feature = "cuda")]
            Self::Cuda(ordinal) => {
                use anyhow::Context;
                kvpolicy::cuda_device(ordinal).with_context(|| format!("device {self}"))
            }
            #[cfg(not(feature = "cuda"))]
            Self::Cuda(_) => anyhow::bail!(
                "device {self}: this program was built without CUDA; with a CUDA toolkit at hand, build it by \
                 `cargo build --release -p kvpolicy-cli --features cuda`"
            ),
        }
    }
}

/// `cpu`, or the GPU's own name.
///
/// # Errors
/// If the GPU does not tell it.
pub fn device_name(device: &Device) -> Result<String> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(cuda) => Ok(cuda.cuda_stream().context().name()?),
        _ => Ok("cpu".into()),
    }
}

/// Which model, and where and how it runs.
#[derive(Debug, clap::Args)]
pub struct ModelArgs {
    /// A folder of safetensors, a GGUF file, or a hub id (org/name, org/name/file.gguf) [default: `demo`, a small model
    /// inside the program that recalls facts and walks along maps].
    #[arg(long)]
    pub model: Option<String>,
    /// Where the model runs and keeps its cache: cpu, cuda, or cuda:N for a GPU of several.
    #[arg(long, default_value = "cpu")]
    pub device: Place,
    /// Type of weights and activations, unless they are quantized [default: f32, on a GPU bf16].
    #[arg(long, value_enum)]
    pub dtype: Option<Float>,
    /// Make the weights of a GGUF file dense, in the type of --dtype.
    #[arg(long)]
    pub dequantize: bool,
    /// Type of stored keys and values [default: f32, on a GPU bf16].
    #[arg(long, value_enum)]
    pub kv_dtype: Option<KvType>,
    /// The most bytes a cache may take, such as 64MiB or 2GB [default: no limit; on a GPU what its longest context takes].
    #[arg(long, value_parser = bytes)]
    pub kv_memory: Option<u64>,
    /// Allow contexts longer than the model was made for.
    #[arg(long)]
    pub allow_long: bool,
}

impl ModelArgs {
    pub(crate) fn load(&self) -> Result<Hosted> {
        let kv_dtype = self.kv_dtype.map(KvType::dtype);
        let options = SessionOptions { kv_dtype, kv_bytes: self.kv_memory, ..SessionOptions::default() };
        Ok(Hosted { lm: self.lm(self.dequantize)?, options })
    }

    /// With dense weights, as training needs them.
    pub(crate) fn load_dense(&self) -> Result<Lm> {
        self.lm(true)
    }

    fn lm(&self, dequantize: bool) -> Result<Lm> {
        let mut options = LoadOptions { dequantize, ..LoadOptions::on(self.device.device()?) };
        if let Some(dtype) = self.dtype {
            options.dtype = dtype.dtype();
        }
        Ok(match &self.model {
            Some(model) => Lm::load(model, &options)?,
            None => Lm::embedded(&options)?,
        })
    }

    /// Sessions of up to this many tokens, or as many as the model was made for if that is less and more are not allowed.
    /// A GPU reserves no more than they may take.
    pub(crate) fn reach(&self, hosted: &mut Hosted, tokens: usize) {
        let made_for = hosted.lm.model().config().max_context;
        hosted.options.max_tokens = Some(if self.allow_long { tokens } else { tokens.min(made_for) });
    }
}

/// A number of bytes with an optional unit, such as 64MiB or 2GB, for an option of a command line.
///
/// # Errors
/// Why it is none.
pub fn bytes(text: &str) -> std::result::Result<u64, String> {
    text.parse::<ByteSize>().map(|size| size.as_u64())
}

#[cfg(test)]
mod tests {
    use super::{Place, bytes};

    #[test]
    fn places_have_names() {
        for (text, place) in [("cpu", Place::Cpu), ("cuda", Place::Cuda(0)), ("cuda:3", Place::Cuda(3))] {
            assert_eq!(text.parse(), Ok(place));
        }
        assert_eq!(Place::Cuda(3).to_string(), "cuda:3");
        for text in ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "cpu:0", "CUDA"] {
            assert!(text.parse::<Place>().is_err(), "{text}");
        }
    }

    #[test]
    fn bytes_have_units() {
        assert_eq!((bytes("12"), bytes("1.5KiB"), bytes("2 GB")), (Ok(12), Ok(1536), Ok(2_000_000_000)));
        assert!(bytes("12 apples").is_err() && bytes("MB").is_err() && bytes("").is_err());
    }
}
