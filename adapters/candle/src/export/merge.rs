//! Weights that a training wrote beside gates: whole tensors, or a LoRA adapter in PEFT's layout.

use crate::{
    error::{Error, Result},
    gates::WITH_GATES,
};
use candle_core::{DType, Device, Tensor};
use kvpolicy::retrofit::Named;
use serde::Deserialize;
use serde_json::{Map, Value};
use std::{collections::HashMap, fs, path::Path};

const WEIGHTS: &str = WITH_GATES[0];
const ADAPTER: &str = WITH_GATES[1];
const ADAPTER_CONFIG: &str = "adapter_config.json";

/// What a training changed beside gates, and in how many tensors of the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Merged {
    /// Nothing.
    Nothing,
    /// Whole tensors.
    Weights(usize),
    /// Those an adapter is added to.
    Adapter(usize),
}

/// What matters of `adapter_config.json`; the rest of PEFT's switches must be off.
#[derive(Debug, Deserialize)]
struct AdapterConfig {
    r: usize,
    lora_alpha: f64,
    #[serde(flatten)]
    others: Map<String, Value>,
}

/// Takes into `tensors`, which have their Hugging Face names and order, what a folder of gates has for them.
///
/// # Errors
/// [`Error::File`] naming the file and the tensor that is not one of the model's or is of another shape.
pub(super) fn merge(tensors: &mut Named, dir: &Path) -> Result<Merged> {
    let (weights, adapter) = (dir.join(WEIGHTS), dir.join(ADAPTER));
    match (weights.is_file(), adapter.is_file()) {
        (true, true) => {
            Err(Error::file(dir, format!("has both {WEIGHTS} and {ADAPTER}: which of them belongs to the gates?")))
        }
        (true, false) => replace(tensors, &weights).map(Merged::Weights),
        (false, true) => add(tensors, &adapter, &dir.join(ADAPTER_CONFIG)).map(Merged::Adapter),
        (false, false) => Ok(Merged::Nothing),
    }
}

fn replace(tensors: &mut Named, path: &Path) -> Result<usize> {
    let new = read(path)?;
    let count = new.len();
    for (name, new) in new {
        let old = tensors.get_mut(&name).ok_or_else(|| unknown(path, &name))?;
        check(path, &name, new.dims(), old.dims())?;
        *old = new;
    }
    Ok(count)
}

/// `W + lora_alpha / r * B A`.
fn add(tensors: &mut Named, path: &Path, config: &Path) -> Result<usize> {
    let AdapterConfig { r, lora_alpha, .. } = adapter_config(config)?;
    let mut parts = read(path)?;
    let stem = |name: &String| name.strip_suffix(".lora_A.weight").map(str::to_string);
    let stems: Vec<String> = parts.keys().filter_map(stem).collect();
    for stem in &stems {
        let mut part = |which: &str| {
            let name = format!("{stem}.lora_{which}.weight");
            parts.remove(&name).ok_or_else(|| Error::file(path, format!("has no tensor `{name}`")))
        };
        let (a, b) = (part("A")?, part("B")?);
        let name = format!("{}.weight", stem.strip_prefix("base_model.model.").unwrap_or(stem));
        let weight = tensors.get_mut(&name).ok_or_else(|| unknown(path, stem))?;
        let (output, input) = weight.dims2()?;
        check(path, &format!("{stem}.lora_A.weight"), a.dims(), &[r, input])?;
        check(path, &format!("{stem}.lora_B.weight"), b.dims(), &[output, r])?;
        let change = (b.to_dtype(DType::F32)?.matmul(&a.to_dtype(DType::F32)?)? * (lora_alpha / r as f64))?;
        let sum = weight.to_dtype(DType::F32)?.to_device(&Device::Cpu)?.add(&change)?;
        *weight = sum;
    }
    match parts.keys().min() {
        None => Ok(stems.len()),
        Some(name) => Err(unknown(path, name)),
    }
}

fn adapter_config(path: &Path) -> Result<AdapterConfig> {
    let text = fs::read_to_string(path).map_err(|e| Error::file(path, e))?;
    let config: AdapterConfig = serde_json::from_str(&text).map_err(|e| Error::file(path, e))?;
    if config.r == 0 || !config.lora_alpha.is_finite() {
        let AdapterConfig { r, lora_alpha, .. } = config;
        return Err(Error::file(path, format!("r={r}, lora_alpha={lora_alpha}: r is 1 or more, alpha a number")));
    }
    let changes = |name: &str| match config.others.get(name) {
        None | Some(Value::Null | Value::Bool(false)) => false,
        Some(Value::Object(fields)) => !fields.is_empty(),
        Some(Value::Array(items)) => !items.is_empty(),
        Some(Value::String(text)) => text != "none",
        Some(_) => true,
    };
    let switches =
        ["use_rslora", "use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "bias", "modules_to_save"];
    let on: Vec<&str> = switches.into_iter().filter(|name| changes(name)).collect();
    match on.as_slice() {
        [] => Ok(config),
        on => Err(Error::file(path, format!("{} of PEFT is not supported: plain LoRA", on.join(", ")))),
    }
}

fn read(path: &Path) -> Result<HashMap<String, Tensor>> {
    let bytes = fs::read(path).map_err(|e| Error::file(path, e))?;
    candle_core::safetensors::load_buffer(&bytes, &Device::Cpu).map_err(|e| Error::file(path, e))
}

fn unknown(path: &Path, name: &str) -> Error {
    Error::file(path, format!("`{name}` is for no tensor of the model"))
}

fn check(path: &Path, name: &str, got: &[usize], expected: &[usize]) -> Result<()> {
    if got == expected {
        return Ok(());
    }
    Err(Error::file(path, format!("tensor `{name}` has shape {got:?}, the model and its adapter ask for {expected:?}")))
}
