//! What is in a checkpoint, without loading it.

use crate::{
    config::{Config, Projection},
    error::{Error, Result},
    folder::Folder,
    gates::{self, Layout},
    loader::{gguf_config, locate},
    tensor_file::TensorFile,
    weights::GgufFile,
};
use candle_core::{DType, Device, Tensor};
use serde::Serialize;
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

/// A model folder, a safetensors file or a GGUF file.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Inspection {
    /// Where it is.
    pub path: PathBuf,
    /// Files of tensors and their bytes.
    pub files: Vec<(String, u64)>,
    /// Tensors by their names.
    pub tensors: BTreeMap<String, TensorSummary>,
    /// The model, where its configuration can be read.
    pub model: Option<ModelSummary>,
    /// Why this crate cannot run it, where it is meant to be a model.
    pub refused: Option<String>,
    /// The gates it was trained with.
    pub gates: Option<GatesSummary>,
}

/// A tensor as its file has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TensorSummary {
    /// Type of its numbers, by the file's own word.
    pub dtype: String,
    /// Shape, rows first.
    pub shape: Vec<usize>,
}

/// The numbers of a configuration that matter for memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[allow(missing_docs)] // as in `Config`
pub struct ModelSummary {
    pub architecture: String,
    pub layers: usize,
    pub hidden: usize,
    pub ffn: usize,
    pub q_heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub vocab: usize,
    pub max_context: usize,
    pub tied: bool,
    /// The layers with a sliding window, and how many tokens it has.
    pub windows: Option<(usize, u32)>,
}

/// Gates: where decisions come from and what they mean.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct GatesSummary {
    /// Whose layout: `nvidia` or `shisa`.
    pub layout: String,
    /// `adapter`: tensors of their own; `borrowed neuron`: the last component of each group's first query head.
    pub source: String,
    /// A marked entry stays visible while `query - key <= window`.
    pub window: u32,
    /// Which token a decision judges: `own` or `previous`.
    pub lag: String,
    /// What a decision holds for: `head` or `layer`.
    pub per: String,
    /// What the neuron is multiplied with.
    pub scale: f64,
    /// What is then subtracted: above 0 evicts.
    pub offset: f64,
    /// The checkpoint says that nothing is evicted.
    pub disabled: bool,
    /// The policy that these gates are for, as `Registry` parses it.
    pub policy: String,
    /// By layer.
    pub layers: Vec<LayerGates>,
}

/// The gates of a layer, a number for each KV head.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LayerGates {
    /// Which layer, from 0.
    pub layer: usize,
    /// Euclidean norms of the weights that a decision is the product with: rows of the adapter, or of the queries'
    /// projection.
    pub norms: Vec<f64>,
    /// Biases, where there are any.
    pub biases: Option<Vec<f64>>,
    /// Mean of the weights of the adapter's own norm.
    pub input_norm: Option<f64>,
}

impl Inspection {
    /// Of a model folder or one of gates, a safetensors file (with its `config.json` beside it, if there is one), a GGUF
    /// file, or (with the feature `hub`) a model of the hub. Headers are read, and of the numbers those of the gates.
    ///
    /// # Errors
    /// [`Error::File`] for files that cannot be read, are damaged or lack the gates they describe. A model that this crate
    /// cannot run is none: see [`Inspection::refused`].
    pub fn of(source: &str) -> Result<Self> {
        let path = locate(source)?;
        if path.is_dir() {
            return Self::of_folder(&path, tensor_files(&path)?);
        }
        if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("safetensors")) {
            return Self::of_folder(&path, vec![path.clone()]);
        }
        Self::of_gguf(&path)
    }

    /// Parameters by the type that files have them in.
    pub fn parameters(&self) -> BTreeMap<&str, u64> {
        let mut sums = BTreeMap::new();
        for TensorSummary { dtype, shape } in self.tensors.values() {
            *sums.entry(dtype.as_str()).or_default() += shape.iter().product::<usize>() as u64;
        }
        sums
    }

    /// `path`: the folder, or the one file of `files`.
    fn of_folder(path: &Path, files: Vec<PathBuf>) -> Result<Self> {
        let mut files: Vec<_> = files.iter().map(|file| TensorFile::open(file)).collect::<Result<_>>()?;
        let folder = Folder::Disk(gates::Gates::folder(path));
        let config = folder.text("config.json")?;
        let is_model = |text: &String| {
            serde_json::from_str::<serde_json::Value>(text).map_or(true, |config| config.get("model_type").is_some())
        };
        let config = config.filter(is_model).map(|text| Config::from_json(&text));
        let mut tensors = BTreeMap::new();
        for file in &files {
            for (name, info) in file.tensors() {
                let (dtype, shape) = (format!("{:?}", info.dtype), info.shape.clone());
                tensors.insert(name, TensorSummary { dtype, shape });
            }
        }
        let (config, refused) = split(config);
        let sizes = files.iter().map(|file| (file.name(), file.size())).collect();
        let gates = Layout::of(folder)?.map(|layout| {
            let own = config.is_some() && path.is_dir();
            let policy = if own { "dms".into() } else { format!("dms:weights={}", path.display()) };
            summary(&layout, policy, config.as_ref(), &mut files)
        });
        let model = config.as_ref().map(ModelSummary::of);
        Ok(Self { path: path.to_path_buf(), files: sizes, tensors, model, refused, gates: gates.transpose()? })
    }

    fn of_gguf(path: &Path) -> Result<Self> {
        let mut file = GgufFile::open(path, &Device::Cpu, None)?;
        let summary = |(name, shape, dtype): (&String, &[usize], _)| {
            (name.clone(), TensorSummary { dtype: format!("{dtype:?}"), shape: shape.to_vec() })
        };
        let tensors = file.tensors().map(summary).collect();
        let (config, refused) = split(Some(gguf_config(&mut file)));
        let bytes = std::fs::metadata(path).map_err(|e| Error::file(path, e))?.len();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let model = config.as_ref().map(ModelSummary::of);
        Ok(Self { path: path.to_path_buf(), files: vec![(name, bytes)], tensors, model, refused, gates: None })
    }
}

fn split(config: Option<Result<Config>>) -> (Option<Config>, Option<String>) {
    match config {
        None => (None, None),
        Some(Ok(config)) => (Some(config), None),
        Some(Err(error)) => (None, Some(error.to_string())),
    }
}

/// The safetensors of a model folder, or of one of gates.
fn tensor_files(dir: &Path) -> Result<Vec<PathBuf>> {
    let trained = dir.join(gates::FILE);
    if trained.is_file() {
        return Ok(vec![trained]);
    }
    Ok(Folder::Disk(dir).weights()?.iter().map(|blob| blob.path()).collect())
}

impl ModelSummary {
    fn of(config: &Config) -> Self {
        let Config { layers, hidden, ffn, q_heads, kv_heads, head_dim, vocab, max_context, tied, arch, .. } = *config;
        let architecture = arch.class().to_string();
        let windows = config.windows();
        Self { architecture, layers, hidden, ffn, q_heads, kv_heads, head_dim, vocab, max_context, tied, windows }
    }

    /// Bytes of one token's keys and values where a component takes so many.
    pub fn kv_bytes(&self, component: usize) -> u64 {
        (self.layers * self.kv_heads * 2 * self.head_dim * component) as u64
    }
}

fn summary(layout: &Layout, policy: String, config: Option<&Config>, files: &mut [TensorFile]) -> Result<GatesSummary> {
    let layers = match (layout.adapter, config) {
        (true, _) => adapters(files)?,
        (false, Some(config)) => neurons(config, files)?,
        (false, None) => vec![], // of weights that are elsewhere
    };
    Ok(GatesSummary {
        layout: if layout.zero_after_rope { "nvidia" } else { "shisa" }.into(),
        source: if layout.adapter { "adapter" } else { "borrowed neuron" }.into(),
        window: layout.spec.window,
        lag: layout.spec.lag.to_string(),
        per: layout.spec.per.to_string(),
        scale: layout.scale,
        offset: layout.offset,
        disabled: layout.spec.disable,
        policy,
        layers,
    })
}

/// The gates of every layer whose adapter is in the files.
fn adapters(files: &mut [TensorFile]) -> Result<Vec<LayerGates>> {
    let names: Vec<String> = files.iter().flat_map(TensorFile::tensors).map(|(name, _)| name).collect();
    let layer_of = |name: &String| name.strip_prefix("model.layers.")?.split_once('.')?.0.parse::<usize>().ok();
    let mut layers: Vec<usize> =
        names.iter().filter(|name| name.ends_with(".dms_proj_alpha.weight")).filter_map(layer_of).collect();
    layers.sort_unstable();
    let layer = |layer| {
        let name = gates::adapter_name(layer);
        let norm = find(files, &format!("{name}_norm.weight"))?;
        let Some(weight) = find(files, &format!("{name}.weight"))? else { return Ok(None) };
        Ok(Some(LayerGates {
            layer,
            norms: rows(&weight)?.iter().map(|row| euclidean(row)).collect(),
            biases: find(files, &format!("{name}.bias"))?.map(|bias| numbers(&bias)).transpose()?,
            input_norm: norm.map(|norm| numbers(&norm)).transpose()?.map(|norm| mean(&norm)),
        }))
    };
    layers.into_iter().map(layer).filter_map(Result::transpose).collect()
}

/// The rows of the queries' projections that make the borrowed neurons, of every layer in the files.
fn neurons(config: &Config, files: &mut [TensorFile]) -> Result<Vec<LayerGates>> {
    let (d, group) = (config.head_dim, config.q_heads / config.kv_heads);
    let [Projection { parts, .. }, ..] = config.projections();
    fn every<T>(all: Vec<T>, first: usize, step: usize, count: usize) -> impl Iterator<Item = T> {
        all.into_iter().skip(first).step_by(step).take(count)
    }
    let layer = |layer| {
        let name = format!("model.layers.{layer}.{}", parts[0].0); // queries are its first rows
        let Some(weight) = find(files, &format!("{name}.weight"))? else { return Ok(None) };
        let bias = find(files, &format!("{name}.bias"))?.map(|bias| numbers(&bias)).transpose()?;
        Ok(Some(LayerGates {
            layer,
            norms: every(rows(&weight)?, d - 1, group * d, config.kv_heads).map(|row| euclidean(&row)).collect(),
            biases: bias.map(|bias| every(bias, d - 1, group * d, config.kv_heads).collect()),
            input_norm: None,
        }))
    };
    (0..config.layers).map(layer).filter_map(Result::transpose).collect()
}

/// A tensor of one of the files.
fn find(files: &mut [TensorFile], name: &str) -> Result<Option<Tensor>> {
    let file = files.iter_mut().find(|file| file.has(name));
    file.map(|file| file.tensor(name)).transpose()
}

fn numbers(tensor: &Tensor) -> Result<Vec<f64>> {
    Ok(tensor.flatten_all()?.to_dtype(DType::F64)?.to_vec1()?)
}

fn rows(tensor: &Tensor) -> Result<Vec<Vec<f64>>> {
    Ok(tensor.to_dtype(DType::F64)?.to_vec2()?)
}

fn euclidean(row: &[f64]) -> f64 {
    row.iter().map(|x| x * x).sum::<f64>().sqrt()
}

fn mean(numbers: &[f64]) -> f64 {
    numbers.iter().sum::<f64>() / numbers.len() as f64
}
