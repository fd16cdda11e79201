//! What there is to know of a model that the host has loaded: its shape and its gates.

use crate::error::{Error, Result};
use candle_core::quantized::gguf_file;
use kvpolicy::{GateSource, KvCache, Policy};
use kvpolicy_candle::{Config, Gates};
use mistralrs_core::kv_policy::Model;
use std::{fs::File, io::BufReader, path::Path};

/// The model's shape and its RoPE, from its own description, held against the shape that the host made of it.
pub(crate) fn config_of(model: &Model) -> Result<Config> {
    if let Some(device) = model.devices.iter().find(|device| !device.is_cpu()) {
        return Err(Error::Model(format!("a layer is on {:?}: policies run on the CPU only", device.location())));
    }
    let config = match (&model.config_json, model.weight_files.first()) {
        (Some(json), _) => Config::from_json(json)?,
        (None, Some(file)) => gguf_config(file)?,
        (None, None) => return Err(Error::Host("names no file of the model".into())),
    };
    let described = [config.layers, config.q_heads, config.kv_heads, config.head_dim];
    let loaded = [model.layers, model.q_heads, model.kv_heads, model.head_dim];
    if described != loaded {
        let what = "layers, query heads, KV heads and head_dim";
        return Err(Error::Model(format!("the model says {described:?} of {what}, the host {loaded:?}")));
    }
    Ok(config)
}

/// The gates that a model runs with: those that the policy names, or the model folder's own. Without a policy that asks
/// for them only those that borrow neurons, which attention must not read.
pub(crate) fn gates_of(model: &Model, config: &Config, policy: &dyn Policy) -> Result<Option<Gates>> {
    let load = |path: &Path| Gates::load(path, config, model.dtype, &DEVICE);
    let folder = model.weight_files.first().and_then(|file| file.parent()).filter(|_| model.config_json.is_some());
    let own = folder.map(|folder| Gates::find(folder, config, model.dtype, &DEVICE)).transpose()?.flatten();
    let borrows = own.as_ref().is_some_and(Gates::borrows_neurons);
    match KvCache::gate_source(policy, &config.spec())? {
        Some(GateSource::File(_)) if borrows => {
            Err(Error::Model("the model was trained with borrowed neurons: it takes no other gates".into()))
        }
        Some(GateSource::File(path)) => Ok(Some(load(&path)?)),
        Some(GateSource::Checkpoint) => Ok(own),
        None => Ok(own.filter(|_| borrows)),
    }
}

/// The metadata of a GGUF file, which the host has read before.
fn gguf_config(path: &Path) -> Result<Config> {
    let io = |error: std::io::Error| Error::Model(format!("{}: {error}", path.display()));
    let mut reader = BufReader::new(File::open(path).map_err(io)?);
    let content = gguf_file::Content::read(&mut reader)?;
    let has = |name: &str| content.tensor_infos.contains_key(name);
    let factors = has("rope_freqs.weight").then(|| content.tensor(&mut reader, "rope_freqs.weight", &DEVICE));
    let factors = factors.transpose()?.map(|factors| factors.dequantize(&DEVICE)?.flatten_all()?.to_vec1());
    Ok(Config::from_gguf(&content.metadata, has, factors.transpose()?)?)
}

const DEVICE: candle_core::Device = candle_core::Device::Cpu;
