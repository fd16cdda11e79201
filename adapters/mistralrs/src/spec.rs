//! What there is to know of a model that the host has loaded: its shape and its gates.

use crate::error::{Error, Result};
use candle_core::{DType, Device, DeviceLocation};
use kvpolicy::Policy;
use kvpolicy_candle::{Config, GateChoice, Gates, weights_sha256};
use mistralrs_core::kv_policy::Model;
use std::sync::Arc;

const NO_FILE: &str = "names no file of the model";

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
        (None, Some(file)) => Config::read(file)?,
        (None, None) => return Err(Error::Host(NO_FILE.into())),
    };
    let described = [config.layers, config.q_heads, config.kv_heads, config.head_dim];
    let loaded = [model.layers, model.q_heads, model.kv_heads, model.head_dim];
    if described != loaded {
        let what = "layers, query heads, KV heads and head_dim";
        return Err(Error::Model(format!("the model says {described:?} of {what}, the host {loaded:?}")));
    }
    Ok(config)
}

/// The gates that a model runs with under a policy.
pub(crate) fn gates_of(model: &Model, config: &Config, policy: &dyn Policy) -> Result<Option<Arc<Gates>>> {
    // Between quantized weights activations are f32, whatever type the host was asked for.
    let dtype = if model.config_json.is_some() { model.dtype } else { DType::F32 };
    let device = device_of(model)?;
    let file = model.weight_files.first().ok_or_else(|| Error::Host(NO_FILE.into()))?;
    let folder = file.parent().filter(|_| model.config_json.is_some());
    let own = folder.map(|folder| Gates::find(folder, config, dtype, device)).transpose()?.flatten().map(Arc::new);
    let weights_sha256 = || weights_sha256(folder.unwrap_or(file));
    let choice = GateChoice { config, own: own.as_ref(), weights_sha256: &weights_sha256, dtype, device };
    Ok(choice.gates_for(policy)?)
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
