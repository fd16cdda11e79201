//! What a cache must know of a model that the host has loaded.

use crate::error::{Error, Result};
use candle_core::quantized::gguf_file;
use kvpolicy::ModelSpec;
use kvpolicy_candle::Config;
use mistralrs_core::kv_policy::Model;
use std::{fs::File, io::BufReader, path::Path};

/// The model's shape and its RoPE, from its own description, held against the shape that the host made of it.
pub(crate) fn spec_of(model: &Model) -> Result<ModelSpec> {
    if let Some(device) = model.devices.iter().find(|device| !device.is_cpu()) {
        return Err(Error::Model(format!("a layer is on {:?}: policies run on the CPU only", device.location())));
    }
    let spec = match (&model.config_json, model.weight_files.first()) {
        (Some(json), _) => Config::from_json(json)?.spec(),
        (None, Some(file)) => gguf_config(file)?.spec(),
        (None, None) => return Err(Error::Host("names no file of the model".into())),
    };
    let described = [spec.layers, spec.q_heads, spec.kv_heads, spec.head_dim];
    let loaded = [model.layers, model.q_heads, model.kv_heads, model.head_dim];
    if described != loaded {
        let what = "layers, query heads, KV heads and head_dim";
        return Err(Error::Model(format!("the model says {described:?} of {what}, the host {loaded:?}")));
    }
    Ok(spec)
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
