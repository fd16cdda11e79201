//! Weights by their Hugging Face name, from safetensors or from GGUF.

use crate::{
    config::Activation,
    error::{Error, Result},
    folder::Blob,
    gguf_header, ops,
};
use candle_core::{
    DType, Device, Module, Tensor,
    quantized::{GgmlDType, QMatMul, QTensor, gguf_file},
};
use std::{
    collections::HashMap,
    fs::File,
    io::{BufReader, Seek},
    path::{Path, PathBuf},
};

/// `x W^T + b`.
#[derive(Debug, Clone)]
pub(crate) struct Linear {
    pub(crate) matrix: Matrix,
    pub(crate) bias: Option<Tensor>, // [out]
}

/// The W of one projection, or of several of the same input, one after the other.
#[derive(Debug, Clone)]
pub(crate) enum Matrix {
    Dense(Tensor),           // [out, in]
    Quantized(Vec<QMatMul>), // [part of out, in] each
}

impl Linear {
    /// `[tokens, in]` to `[tokens, out]`.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = self.matrix.product(x)?;
        match &self.bias {
            Some(bias) => ops::add_bias(y, bias),
            None => Ok(y),
        }
    }

    /// [`Linear::forward`] of a gate and the values it lets through, then `activation(gate) * up`: `[tokens, out / 2]`.
    pub(crate) fn gated(&self, x: &Tensor, activation: Activation) -> Result<Tensor> {
        match (self, activation) {
            (Self { matrix: Matrix::Dense(weight), bias: None }, Activation::Silu) => ops::linear_silu_mul(x, weight),
            (Self { matrix: Matrix::Dense(weight), bias: None }, Activation::GeluTanh) => {
                ops::linear_gelu_mul(x, weight)
            }
            (_, Activation::Silu) => ops::silu_mul(&self.forward(x)?),
            (_, Activation::GeluTanh) => {
                let [gate, up] = ops::halves(&self.forward(x)?, 1)?;
                ops::gelu_mul(&gate, &up)
            }
        }
    }
}

impl Matrix {
    /// `[tokens, in]` to `[tokens, out]`.
    pub(crate) fn product(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Dense(weight) => ops::linear(x, weight),
            Self::Quantized(parts) => {
                let products = parts.iter().map(|part| part.forward(x)).collect::<candle_core::Result<Vec<_>>>()?;
                Ok(Tensor::cat(&products, 1)?)
            }
        }
    }
}

/// Where weights come from.
pub(crate) enum Weights {
    SafeTensors(SafeTensors),
    Gguf(GgufFile),
    Random(Random),
}

/// The tensors of safetensors files, and the type they are wanted in.
pub(crate) struct SafeTensors {
    tensors: HashMap<String, Tensor>,
    pub(crate) dtype: DType,
    pub(crate) device: Device,
}

/// Random numbers of the scale of trained weights, from one stream: norms are 1.
pub(crate) struct Random {
    state: u64,
    dtype: DType,
    device: Device,
}

/// A GGUF file. Tensors are read one by one as they are asked for.
pub(crate) struct GgufFile {
    path: PathBuf,
    content: gguf_file::Content,
    reader: BufReader<File>,
    pub(crate) device: Device,
    /// What projections and activations become; `None`: projections stay quantized, with f32 activations.
    dense: Option<DType>,
}

impl Weights {
    /// Every tensor of safetensors files.
    pub(crate) fn from_files(files: &[Blob], dtype: DType, device: &Device) -> Result<Self> {
        let mut tensors = HashMap::new();
        for file in files {
            let bytes = file.read()?.ok_or_else(|| Error::file(file.path(), "no such file"))?;
            let part = candle_core::safetensors::load_buffer(&bytes, device);
            tensors.extend(part.map_err(|e| Error::file(file.path(), without_backtrace(&e)))?);
        }
        Ok(Self::SafeTensors(SafeTensors { tensors, dtype, device: device.clone() }))
    }

    pub(crate) fn random(seed: u64, dtype: DType, device: &Device) -> Self {
        Self::Random(Random { state: seed, dtype, device: device.clone() })
    }

    /// Whether projections stay as a file has them, quantized.
    pub(crate) fn quantized(&self) -> bool {
        matches!(self, Self::Gguf(GgufFile { dense: None, .. }))
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        match self {
            Self::SafeTensors(source) => source.tensors.contains_key(name),
            Self::Gguf(source) => source.has(&source.name(name)),
            Self::Random(_) => true,
        }
    }

    pub(crate) fn device(&self) -> &Device {
        match self {
            Self::SafeTensors(source) => &source.device,
            Self::Gguf(source) => &source.device,
            Self::Random(source) => &source.device,
        }
    }

    /// Type of activations: what was asked for, f32 with quantized weights.
    pub(crate) fn dtype(&self) -> DType {
        match self {
            Self::SafeTensors(source) => source.dtype,
            Self::Gguf(source) => source.dense.unwrap_or(DType::F32),
            Self::Random(source) => source.dtype,
        }
    }

    /// A dense tensor of the activations' type. Each can be asked for once: what was read is given away, so that a
    /// model's weights are not held twice while it loads.
    pub(crate) fn tensor(&mut self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let tensor = match self {
            Self::SafeTensors(source) => match source.tensors.remove(name) {
                Some(tensor) => tensor.to_dtype(source.dtype)?,
                None => return Err(Error::Model(format!("the safetensors files have no tensor `{name}`"))),
            },
            Self::Gguf(source) => source.tensor(&source.name(name))?.to_dtype(source.dense.unwrap_or(DType::F32))?,
            Self::Random(source) => source.next(name, shape)?,
        };
        check_shape(name, tensor.dims(), shape)?;
        Ok(tensor)
    }

    /// The weight of a norm, `[size]`. `from_one`: safetensors have what it is more than 1, GGUF all of it.
    pub(crate) fn norm(&mut self, name: &str, size: usize, from_one: bool) -> Result<Tensor> {
        let weight = self.tensor(name, &[size])?;
        if from_one && matches!(self, Self::SafeTensors(_)) { Ok((weight + 1.0)?) } else { Ok(weight) }
    }

    /// `[out, in]` and, if `bias`, `[out]`.
    pub(crate) fn linear(&mut self, name: &str, input: usize, output: usize, bias: bool) -> Result<Linear> {
        self.joined(&[(name.to_string(), output)], input, bias)
    }

    /// Projections of the same input, each with its width, one after the other.
    pub(crate) fn joined(&mut self, parts: &[(String, usize)], input: usize, bias: bool) -> Result<Linear> {
        let biases = parts.iter().filter(|_| bias).map(|(name, out)| self.tensor(&format!("{name}.bias"), &[*out]));
        let biases = biases.collect::<Result<Vec<_>>>()?;
        let bias = if bias { Some(Tensor::cat(&biases, 0)?) } else { None };
        let weights = parts.iter().map(|(name, out)| (format!("{name}.weight"), [*out, input]));
        let matrix = if let Self::Gguf(source @ GgufFile { dense: None, .. }) = self {
            Matrix::Quantized(weights.map(|(name, shape)| source.matrix(&name, &shape)).collect::<Result<_>>()?)
        } else {
            let weights = weights.map(|(name, shape)| self.tensor(&name, &shape)).collect::<Result<Vec<_>>>()?;
            Matrix::Dense(Tensor::cat(&weights, 0)?)
        };
        Ok(Linear { matrix, bias })
    }
}

impl Random {
    fn next(&mut self, name: &str, shape: &[usize]) -> Result<Tensor> {
        if name.ends_with("norm.weight") {
            return Ok(Tensor::ones(shape, self.dtype, &self.device)?);
        }
        let numbers = ops::random(shape, 0.02, self.state, self.dtype, &self.device)?;
        self.state = ops::advance(self.state, numbers.elem_count() as u64);
        Ok(numbers)
    }
}

impl GgufFile {
    pub(crate) fn open(path: &Path, device: &Device, dense: Option<DType>) -> Result<Self> {
        let bad = |what: String| Error::file(path, what);
        let file = File::open(path).map_err(|e| bad(e.to_string()))?;
        let length = file.metadata().map_err(|e| bad(e.to_string()))?.len();
        let mut reader = BufReader::new(file);
        gguf_header::check(&mut reader, length)
            .and_then(|_| reader.rewind().map_err(|e| e.to_string()))
            .map_err(|what| bad(format!("its header is cut off or damaged: {what}")))?;
        let content = gguf_file::Content::read(&mut reader)
            .map_err(|e| bad(format!("is no GGUF file, or its header is damaged: {}", without_backtrace(&e))))?;
        for (name, info) in &content.tensor_infos {
            let bytes = info.shape.elem_count() / info.ggml_dtype.block_size() * info.ggml_dtype.type_size();
            let end = content.tensor_data_offset + info.offset + bytes as u64;
            if end > length {
                return Err(bad(format!("is cut off: tensor `{name}` ends at byte {end} of {length}")));
            }
        }
        Ok(Self { path: path.to_path_buf(), content, reader, device: device.clone(), dense })
    }

    pub(crate) fn metadata(&self) -> &HashMap<String, gguf_file::Value> {
        &self.content.metadata
    }

    /// Names, shapes and types as the file has them.
    pub(crate) fn tensors(&self) -> impl Iterator<Item = (&String, &[usize], GgmlDType)> {
        self.content.tensor_infos.iter().map(|(name, info)| (name, info.shape.dims(), info.ggml_dtype))
    }

    /// Names here are the file's own.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.content.tensor_infos.contains_key(name)
    }

    /// The file's name of what Hugging Face calls `name`.
    fn name(&self, name: &str) -> String {
        let architecture = self.content.metadata.get("general.architecture").and_then(|name| name.to_string().ok());
        gguf_name(name, architecture.is_some_and(|name| name == "gemma3"))
    }

    /// Dequantized, f32.
    pub(crate) fn tensor(&mut self, name: &str) -> Result<Tensor> {
        let device = self.device.clone();
        Ok(self.quantized(name)?.dequantize(&device)?)
    }

    /// By the name Hugging Face gives it.
    fn matrix(&mut self, name: &str, shape: &[usize]) -> Result<QMatMul> {
        let tensor = self.quantized(&self.name(name))?;
        check_shape(name, tensor.shape().dims(), shape)?;
        Ok(QMatMul::from_qtensor(tensor)?)
    }

    fn quantized(&mut self, name: &str) -> Result<QTensor> {
        if !self.has(name) {
            return Err(Error::file(&self.path, format!("has no tensor `{name}`")));
        }
        let tensor = self.content.tensor(&mut self.reader, name, &self.device);
        tensor.map_err(|e| Error::file(&self.path, format!("tensor `{name}`: {}", without_backtrace(&e))))
    }
}

fn check_shape(name: &str, got: &[usize], expected: &[usize]) -> Result<()> {
    if got == expected {
        return Ok(());
    }
    Err(Error::Model(format!("tensor `{name}` has shape {got:?}, the configuration asks for {expected:?}")))
}

/// candle prints the backtrace with the error where backtraces are on.
fn without_backtrace(error: &candle_core::Error) -> String {
    error.to_string().lines().next().unwrap_or_default().to_string()
}

/// Norms before the feed-forward layer and, where `sandwiched`, around it and after attention.
fn norm_names(sandwiched: bool) -> &'static [(&'static str, &'static str)] {
    if sandwiched {
        &[
            ("post_attention_layernorm", "post_attention_norm"),
            ("pre_feedforward_layernorm", "ffn_norm"),
            ("post_feedforward_layernorm", "post_ffw_norm"),
        ]
    } else {
        &[("post_attention_layernorm", "ffn_norm")]
    }
}

/// The name GGUF gives a tensor. `sandwiched`: of a model with norms on both sides of attention and feed-forward layer.
fn gguf_name(name: &str, sandwiched: bool) -> String {
    let name = name.strip_prefix("model.").unwrap_or(name);
    let Some((layer, rest)) = name.strip_prefix("layers.").and_then(|n| n.split_once('.')) else {
        return name.replace("embed_tokens", "token_embd").replace("lm_head", "output").replacen(
            "norm",
            "output_norm",
            1,
        );
    };
    let rest = [
        ("self_attn.qkv_proj", "attn_qkv"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.q_norm", "attn_q_norm"),
        ("self_attn.k_norm", "attn_k_norm"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.gate_up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
        ("input_layernorm", "attn_norm"),
    ]
    .iter()
    .chain(norm_names(sandwiched))
    .fold(rest.to_string(), |rest, (ours, theirs)| rest.replace(ours, theirs));
    format!("blk.{layer}.{rest}")
}

#[cfg(test)]
mod tests {
    use super::gguf_name;

    #[test]
    fn names_map_to_gguf() {
        for (ours, theirs) in [
            ("model.embed_tokens.weight", "token_embd.weight"),
            ("lm_head.weight", "output.weight"),
            ("model.norm.weight", "output_norm.weight"),
            ("model.layers.3.self_attn.q_proj.bias", "blk.3.attn_q.bias"),
            ("model.layers.12.self_attn.k_norm.weight", "blk.12.attn_k_norm.weight"),
            ("model.layers.0.input_layernorm.weight", "blk.0.attn_norm.weight"),
            ("model.layers.0.post_attention_layernorm.weight", "blk.0.ffn_norm.weight"),
            ("model.layers.0.mlp.down_proj.weight", "blk.0.ffn_down.weight"),
            ("model.layers.1.self_attn.qkv_proj.weight", "blk.1.attn_qkv.weight"),
            ("model.layers.1.mlp.gate_up_proj.weight", "blk.1.ffn_up.weight"),
        ] {
            assert_eq!(gguf_name(ours, false), theirs);
        }
        for (ours, theirs) in [
            ("model.layers.0.input_layernorm.weight", "blk.0.attn_norm.weight"),
            ("model.layers.0.post_attention_layernorm.weight", "blk.0.post_attention_norm.weight"),
            ("model.layers.0.pre_feedforward_layernorm.weight", "blk.0.ffn_norm.weight"),
            ("model.layers.0.post_feedforward_layernorm.weight", "blk.0.post_ffw_norm.weight"),
        ] {
            assert_eq!(gguf_name(ours, true), theirs);
        }
    }
}
