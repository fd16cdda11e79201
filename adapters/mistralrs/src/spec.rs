//! What there is to know of a model that the host has loaded: its shape and its gates.

use crate::error::{Error, Result};
use candle_core::{Device, DeviceLocation, quantized::gguf_file};
use kvpolicy::{GateSource, KvCache, Policy};
use kvpolicy_candle::{Config, Gates};
use mistralrs_core::kv_policy::Model;
use std::{fs::File, io::BufReader, path::Path};

/// The device that all layers are on.
pub(crate) fn device_of(model: &Model) -> Result<&Device> {
    let first = model.devices.first().ok_or_else(|| Error::Host("names no layer".into()))?;
    check_places(first.location(), model.devices.iter().map(Device::location))?;
    Ok(first)
}

/// A model has one pool, on the device of its layers.
fn check_places(first: DeviceLocation, mut all: impl Iterator<Item = DeviceLocation>) -> Result<()> {
    let refuse = |what: String| Err(Error::Model(what));
    if let Some(other) = all.find(|place| *place != first) {
        return refuse(format!("its layers are on {first:?} and {other:?}: under a policy all must be on one device"));
    }
    match first {
        DeviceLocation::Cpu => Ok(()),
        DeviceLocation::Cuda { .. } if cfg!(feature = "cuda") => Ok(()),
        DeviceLocation::Cuda { .. } => {
            refuse("it is on a GPU: build kvpolicy-mistralrs with the feature `cuda` to run it under a policy".into())
        }
        DeviceLocation::Metal { .. } => refuse("it is on Metal: policies run on the CPU and on CUDA".into()),
    }
}

/// The model's shape and its RoPE, from its own description, held against the shape that the host made of it.
pub(crate) fn config_of(model: &Model) -> Result<Config> {
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
pub(crate) fn gates_of(model: &Model, config: &Config, policy: &dyn Policy, device: &Device) -> Result<Option<Gates>> {
    let load = |path: &Path| Gates::load(path, config, model.dtype, device);
    let folder = model.weight_files.first().and_then(|file| file.parent()).filter(|_| model.config_json.is_some());
    let own = folder.map(|folder| Gates::find(folder, config, model.dtype, device)).transpose()?.flatten();
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
pub(crate) fn gguf_config(path: &Path) -> Result<Config> {
    let io = |error: std::io::Error| Error::Model(format!("{}: {error}", path.display()));
    let mut reader = BufReader::new(File::open(path).map_err(io)?);
    let content = gguf_file::Content::read(&mut reader)?;
    let has = |name: &str| content.tensor_infos.contains_key(name);
    let factors = has("rope_freqs.weight").then(|| content.tensor(&mut reader, "rope_freqs.weight", &Device::Cpu));
    let factors = factors.transpose()?.map(|factors| factors.dequantize(&Device::Cpu)?.flatten_all()?.to_vec1());
    Ok(Config::from_gguf(&content.metadata, has, factors.transpose()?)?)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn one_device() {
        let refusal =
            |places: &[DeviceLocation]| check_places(places[0], places.iter().copied()).unwrap_err().to_string();
        let gpu = |gpu_id| DeviceLocation::Cuda { gpu_id };
        assert!(check_places(DeviceLocation::Cpu, [DeviceLocation::Cpu; 2].into_iter()).is_ok());
        assert_eq!(check_places(gpu(1), [gpu(1); 2].into_iter()).is_ok(), cfg!(feature = "cuda"));
        let why = refusal(&[gpu(0), gpu(0), gpu(1)]);
        assert!(
            why.contains("on Cuda { gpu_id: 0 } and Cuda { gpu_id: 1 }: under a policy all must be on one"),
            "{why}"
        );
        assert!(refusal(&[DeviceLocation::Cpu, gpu(0)]).contains("all must be on one device"));
        assert!(refusal(&[DeviceLocation::Metal { gpu_id: 0 }]).contains("policies run on the CPU and on CUDA"));
    }
}
