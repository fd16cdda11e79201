//! DMS decision gates: where the logits come from, and the published layouts.
//!
//! * NVIDIA, adapter: tensors `self_attn.dms_proj_alpha_norm.weight` `[hidden]` and `self_attn.dms_proj_alpha.weight`
//!   `[kv_heads, hidden]` (and `.bias`), fields `dms_*` in `config.json`. The adapter reads the residual stream as it
//!   enters the layer, before the layer's own norm.
//! * NVIDIA, borrowed neuron (`dms_separate_alpha` false): the last component of the first query head of each group,
//!   after the q norm and before RoPE, is the logit; it is set to zero before RoPE and again after it. A bit judges the
//!   token before its own.
//! * Shisa (`dms_metadata.json`): borrowed neuron, set to zero before RoPE only. A bit judges its own token.

use crate::{
    config::Config,
    error::{Error, Result},
    folder::{Blob, Folder},
    loader::hexadecimal,
    ops::{self, GateWeights},
    weights::Weights,
};
use candle_core::{DType, Device, Tensor};
use kvpolicy::{GateSpec, Lag, PerGate, retrofit::Named};
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};
use std::path::Path;

/// Gates of all layers of a model.
#[derive(Debug, Clone)]
pub struct Gates {
    spec: GateSpec,
    scale: f64,
    offset: f64,
    source: Source,
}

#[derive(Debug, Clone)]
enum Source {
    Adapter(Vec<GateWeights>),
    Borrowed {
        /// 1, and 0 where a neuron was borrowed: `[q_heads, head_dim]`.
        others: Tensor,
        zero_after_rope: bool,
    },
}

/// What a folder says of its gates.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Description {
    /// The fields `dms_*` of `config.json`, and what else this project writes there.
    Nvidia(Map<String, Value>),
    /// `dms_metadata.json`.
    Shisa(Map<String, Value>),
}

/// The tensors that a training writes.
pub(crate) const FILE: &str = "gates.safetensors";
/// Weights of the model that learned with gates, beside them: whole tensors by their Hugging Face names, or a LoRA as PEFT
/// has it.
pub(crate) const WITH_GATES: [&str; 2] = ["weights.safetensors", "adapter_model.safetensors"];

/// What the names of an adapter's tensors have in common.
pub(crate) const ADAPTER: &str = "self_attn.dms_proj_alpha";

/// Where gates are described for Shisa's programs.
pub(crate) const SHISA_FILE: &str = "dms_metadata.json";

/// Whether a field of `config.json` speaks of gates.
pub(crate) fn is_field(name: &str) -> bool {
    name.starts_with("dms_") || name.starts_with("kvpolicy_")
}

impl Description {
    /// That of a folder, if it has gates.
    ///
    /// # Errors
    /// [`Error::File`] for files that are no JSON objects.
    pub(crate) fn of(folder: Folder) -> Result<Option<Self>> {
        let read = |name: &str| -> Result<Option<Map<String, Value>>> {
            let parsed = folder.text(name)?.map(|text| serde_json::from_str(&text)).transpose();
            parsed.map_err(|e| Error::file(folder.path(name), e))
        };
        if let Some(shisa) = read(SHISA_FILE)? {
            return Ok(Some(Self::Shisa(shisa)));
        }
        let Some(config) = read("config.json")?.filter(|config| config.keys().any(|key| key.starts_with("dms_")))
        else {
            return Ok(None);
        };
        Ok(Some(Self::Nvidia(config.into_iter().filter(|(key, _)| is_field(key)).collect())))
    }
}

/// The description of gates, before their tensors are read.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Layout {
    pub(crate) spec: GateSpec,
    pub(crate) scale: f64,
    pub(crate) offset: f64,
    pub(crate) adapter: bool,
    pub(crate) zero_after_rope: bool,
}

impl Gates {
    /// What a cache must know of them.
    pub fn spec(&self) -> GateSpec {
        self.spec
    }

    /// SHA-256 of all that decides what they say, tensors as they were loaded; hexadecimal.
    ///
    /// # Errors
    /// Those of the tensor library.
    pub fn sha256(&self) -> Result<String> {
        let mut hash = Sha256::new();
        let after_rope = matches!(self.source, Source::Borrowed { zero_after_rope: true, .. });
        hash.update(format!("{:?} {} {} {after_rope}", self.spec, self.scale, self.offset));
        for (name, tensor) in self.tensors() {
            hash.update(name);
            let numbers: Vec<f32> = tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
            numbers.iter().for_each(|number| hash.update(number.to_le_bytes()));
        }
        Ok(hexadecimal(hash))
    }

    /// Whether the decisions are a neuron of the queries, which attention may not read then: such a model needs its gates
    /// under every policy.
    pub fn borrows_neurons(&self) -> bool {
        matches!(self.source, Source::Borrowed { .. })
    }

    /// Reads gates from a folder (of a model, or as a training writes it) or a safetensors file with its `config.json`
    /// beside it. Those that learned together with weights are refused: the model as it was is not the one they judge.
    ///
    /// # Errors
    /// [`Error::File`] if there is no description of gates or a tensor is missing, or naming the weights beside them.
    pub fn load(path: &Path, config: &Config, dtype: DType, device: &Device) -> Result<Self> {
        Self::check_alone(path)?;
        Self::find(path, config, dtype, device)?.ok_or_else(|| not_described(path))
    }

    /// As [`Gates::load`], whatever weights are beside them; `None` where nothing describes any.
    ///
    /// # Errors
    /// [`Error::File`] if a tensor is missing.
    pub fn find(path: &Path, config: &Config, dtype: DType, device: &Device) -> Result<Option<Self>> {
        let folder = Folder::Disk(Self::folder(path));
        let Some(layout) = Layout::of(folder)? else { return Ok(None) };
        let trained = path.join(FILE);
        let files = match path {
            _ if !layout.adapter => vec![],
            file if !file.is_dir() => vec![Blob::Disk(file.to_path_buf())],
            _ if trained.is_file() => vec![Blob::Disk(trained)],
            _ => folder.weights()?,
        };
        layout.read(&mut Weights::from_files(&files, dtype, device)?, config).map(Some)
    }

    fn check_alone(path: &Path) -> Result<()> {
        let dir = Self::folder(path);
        let with = WITH_GATES.iter().map(|name| dir.join(name)).find(|file| dir.join(FILE).is_file() && file.is_file());
        match with {
            Some(file) => Err(Error::file(
                &file,
                format!(
                    "the gates beside it belong to the model with these weights: make it with `kvpolicy export --gates {}`",
                    dir.display()
                ),
            )),
            None => Ok(()),
        }
    }

    /// The folder that describes the gates of [`Gates::load`].
    pub(crate) fn folder(path: &Path) -> &Path {
        if path.is_dir() { path } else { path.parent().unwrap_or(Path::new(".")) }
    }

    /// Those of a folder that may be inside the program.
    pub(crate) fn of_folder(folder: Folder, config: &Config, dtype: DType, device: &Device) -> Result<Self> {
        let layout = Layout::of(folder)?.ok_or_else(|| not_described(&folder.path("")))?;
        layout.read(&mut Weights::from_files(&folder.weights()?, dtype, device)?, config)
    }

    /// The tensors of an adapter by NVIDIA's names, none of a borrowed neuron.
    pub(crate) fn tensors(&self) -> Named {
        let Source::Adapter(layers) = &self.source else { return Named::new() };
        let mut all = Named::new();
        for (layer, GateWeights { norm, weight, bias, .. }) in layers.iter().enumerate() {
            let name = adapter_name(layer);
            all.insert(format!("{name}_norm.weight"), norm.clone());
            all.insert(format!("{name}.weight"), weight.clone());
            all.extend(bias.iter().map(|bias| (format!("{name}.bias"), bias.clone())));
        }
        all
    }

    /// The gates of a checkpoint folder, if it describes any.
    pub(crate) fn of_checkpoint(folder: Folder, weights: &mut Weights, config: &Config) -> Result<Option<Self>> {
        Layout::of(folder)?.map(|layout| layout.read(weights, config)).transpose()
    }

    /// Decision logits of one layer's new tokens by its adapter, f32 `[tokens, kv_heads]`; `None` if the gates have
    /// none. `x`: residual stream `[tokens, hidden]`.
    ///
    /// # Errors
    /// [`Error::Model`] for a layer without gates, and those of the tensor library.
    pub fn adapt(&self, layer: usize, x: &Tensor) -> Result<Option<Tensor>> {
        match &self.source {
            Source::Adapter(layers) => {
                let gate = layers.get(layer).ok_or_else(|| Error::Model(format!("layer {layer} has no gates")))?;
                ops::gate(x, gate, self.scale, self.offset).map(Some)
            }
            Source::Borrowed { .. } => Ok(None),
        }
    }

    /// Decision logits by a borrowed neuron, f32 `[tokens, kv_heads]`, and the queries to go on with. `q`:
    /// `[tokens, q_heads, head_dim]` after any q norm, before RoPE.
    ///
    /// # Errors
    /// Those of the tensor library, for a `config` of another model too.
    pub fn borrow(&self, config: &Config, q: Tensor) -> Result<(Tensor, Tensor)> {
        let (tokens, d) = (q.dim(0)?, config.head_dim);
        let groups = q.reshape((tokens, config.kv_heads, config.q_heads / config.kv_heads, d))?;
        let alpha = groups.narrow(2, 0, 1)?.narrow(3, d - 1, 1)?.reshape((tokens, config.kv_heads))?;
        let q = match &self.source {
            Source::Borrowed { others, .. } => q.broadcast_mul(others)?,
            Source::Adapter(_) => q,
        };
        Ok((alpha.to_dtype(DType::F32)?.affine(self.scale, -self.offset)?, q))
    }

    /// The queries after RoPE, `[tokens, q_heads, head_dim]`.
    ///
    /// # Errors
    /// Those of the tensor library.
    pub fn after_rope(&self, q: Tensor) -> Result<Tensor> {
        match &self.source {
            Source::Borrowed { others, zero_after_rope: true } => Ok(q.broadcast_mul(others)?),
            _ => Ok(q),
        }
    }
}

impl Layout {
    pub(crate) fn of(folder: Folder) -> Result<Option<Self>> {
        let (layout, file) = match Description::of(folder)? {
            None => return Ok(None),
            Some(Description::Shisa(metadata)) => (Self::shisa(&metadata), SHISA_FILE),
            Some(Description::Nvidia(fields)) => (Self::nvidia(&fields), "config.json"),
        };
        layout.map(Some).map_err(|what| Error::file(folder.path(file), what))
    }

    /// The fields may be one level down, as the training's log has them.
    fn shisa(metadata: &Map<String, Value>) -> Read<Self> {
        if metadata.contains_key("sidecar") {
            return Err("gates in a sidecar of their own are not supported: a neuron of the queries must decide".into());
        }
        let inner = ["dms", "config"].iter().find_map(|name| metadata.get(*name)?.as_object());
        let fields = Fields { all: [Some(metadata), inner].into_iter().flatten().collect() };
        Ok(Self {
            spec: GateSpec {
                window: fields.window(&["window_size", "dms_window_size"])?.unwrap_or(256),
                lag: Lag::Own,
                per: PerGate::Head,
                disable: false,
            },
            scale: fields.number(&["alpha_scale", "dms_alpha_scale"], 100.0)?,
            offset: fields.number(&["alpha_offset", "dms_alpha_offset", "dms_initial_alpha_offset"], 5.0)?,
            adapter: false,
            zero_after_rope: false,
        })
    }

    fn nvidia(config: &Map<String, Value>) -> Read<Self> {
        let fields = Fields { all: vec![config] };
        let per = match fields.find(&["dms_alpha_per"]) {
            None => PerGate::Head,
            Some((_, value)) if value == "head" => PerGate::Head,
            Some((_, value)) if value == "layer" => PerGate::Layer,
            Some((name, other)) => return Err(format!("{name}={other} is not supported: head or layer")),
        };
        Ok(Self {
            spec: GateSpec {
                window: fields.window(&["dms_window_size"])?.ok_or("dms_window_size is missing")?,
                lag: Lag::Previous,
                per,
                disable: fields.flag("dms_disable_eviction")?,
            },
            scale: fields.number(&["dms_alpha_scale"], 100.0)?,
            offset: fields.number(&["dms_initial_alpha_offset"], 5.0)?,
            adapter: fields.flag("dms_separate_alpha")?,
            zero_after_rope: true,
        })
    }

    fn read(self, weights: &mut Weights, config: &Config) -> Result<Gates> {
        let source = if self.adapter {
            let layers = (0..config.layers).map(|layer| {
                let name = adapter_name(layer);
                let bias = format!("{name}.bias");
                Ok(GateWeights {
                    norm: weights.tensor(&format!("{name}_norm.weight"), &[config.hidden])?,
                    eps: config.rms_eps,
                    weight: weights.tensor(&format!("{name}.weight"), &[config.kv_heads, config.hidden])?,
                    bias: weights.has(&bias).then(|| weights.tensor(&bias, &[config.kv_heads])).transpose()?,
                })
            });
            Source::Adapter(layers.collect::<Result<_>>()?)
        } else {
            Source::Borrowed {
                others: others(config, weights.dtype(), weights.device())?,
                zero_after_rope: self.zero_after_rope,
            }
        };
        // NVIDIA's word for "never": the same logit everywhere, far below any bias.
        let (scale, offset) = if self.spec.disable { (0.0, 1000.0) } else { (self.scale, self.offset) };
        Ok(Gates { spec: self.spec, scale, offset, source })
    }
}

/// What is wrong with a field, or its value.
type Read<T> = std::result::Result<T, String>;

/// Objects of JSON that say the same things, the first before the second.
struct Fields<'a> {
    all: Vec<&'a Map<String, Value>>,
}

impl<'a> Fields<'a> {
    /// The first of these names that has a value.
    fn find<'n>(&self, names: &[&'n str]) -> Option<(&'n str, &'a Value)> {
        let of = |name: &'n str| self.all.iter().find_map(|map| map.get(name).filter(|value| !value.is_null()));
        names.iter().find_map(|name| Some((*name, of(name)?)))
    }

    fn number(&self, names: &[&str], default: f64) -> Read<f64> {
        let Some((name, value)) = self.find(names) else { return Ok(default) };
        value.as_f64().ok_or_else(|| format!("{name}={value} is no number"))
    }

    fn window(&self, names: &[&str]) -> Read<Option<u32>> {
        let Some((name, value)) = self.find(names) else { return Ok(None) };
        let window = value.as_u64().and_then(|window| u32::try_from(window).ok());
        window.map(Some).ok_or_else(|| format!("{name}={value} is no whole number of tokens below 2^32"))
    }

    fn flag(&self, name: &str) -> Read<bool> {
        let Some((name, value)) = self.find(&[name]) else { return Ok(false) };
        value.as_bool().ok_or_else(|| format!("{name}={value} is neither true nor false"))
    }
}

pub(crate) fn adapter_name(layer: usize) -> String {
    format!("model.layers.{layer}.{ADAPTER}")
}

pub(crate) fn not_described(path: &Path) -> Error {
    Error::file(path, "no description of gates beside it: config.json with dms_* fields, or dms_metadata.json")
}

/// 1, and 0 where a neuron is borrowed: `[q_heads, head_dim]`.
pub(crate) fn others(config: &Config, dtype: DType, device: &Device) -> Result<Tensor> {
    let (d, group) = (config.head_dim, config.q_heads / config.kv_heads);
    let mut ones = vec![1f32; config.q_heads * d];
    for head in (0..config.q_heads).step_by(group) {
        ones[head * d + d - 1] = 0.0;
    }
    Ok(Tensor::from_vec(ones, (config.q_heads, d), device)?.to_dtype(dtype)?)
}
