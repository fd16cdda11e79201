//! Files: gates to use, and checkpoints to go on from.

use super::{
    student::{LORA_SCALE, Trains, factors},
    trainee::{Trainee, is_adapter},
};
use crate::{
    config::{Config, Projection},
    error::{Error, Result},
    gates,
};
use candle_core::{DType, Device};
use kvpolicy::{PerGate, retrofit::Named};
use safetensors::SafeTensors;
use serde_json::{Map, Value, json};
use std::{
    borrow::Cow,
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
};

/// The key of the settings in a checkpoint's header.
const SETTINGS: &str = "kvpolicy.settings";

/// Writes gates as `dms:weights=DIR/gates.safetensors` reads them: bf16 tensors by the names of NVIDIA's layout, and
/// beside them a `config.json` with the `dms_*` fields and `about`, whatever else is to be known of them. Borrowed neurons
/// have no tensors of their own: the file is there without any, and [`save_weights`] writes what they are part of.
///
/// # Errors
/// [`Error::File`] naming the file that cannot be written.
pub fn save_gates(dir: &Path, trainee: &Trainee, params: &Named, about: Map<String, Value>) -> Result<PathBuf> {
    create(dir)?;
    let path = dir.join(gates::FILE);
    let gates = params.iter().filter(|(name, _)| is_adapter(name)).map(|(name, gate)| (name.clone(), gate.clone()));
    write(&path, &rounded(&gates.collect())?, None)?;
    let mut config = dms_fields(trainee);
    config.extend(about);
    let text = serde_json::to_string_pretty(&config).map_err(|e| Error::file(dir, e))?;
    replace(&dir.join("config.json"), |temporary| fs::write(temporary, text + "\n"))?;
    Ok(path)
}

/// Writes what learned beside the gates, in place of what an earlier training left there: the weights of the blocks, or
/// those of the queries where only borrowed neurons learned, as `weights.safetensors`, bf16, by the names of Hugging Face;
/// or a LoRA as the library PEFT reads it, `adapter_model.safetensors` and `adapter_config.json`.
///
/// # Errors
/// [`Error::File`] naming the file that cannot be written.
pub fn save_weights(dir: &Path, trainee: &Trainee, params: &Named) -> Result<()> {
    let [weights_file, adapter_file] = gates::WITH_GATES.map(|name| dir.join(name));
    for file in [&weights_file, &adapter_file].into_iter().filter(|file| file.is_file()) {
        fs::remove_file(file).map_err(|e| Error::file(file, e))?;
    }
    let config = trainee.model().config();
    let whole = |is_wanted: &dyn Fn(&str) -> bool| {
        let mut weights = trainee.student(params)?.hf_tensors()?;
        weights.retain(|name, _| name.starts_with("model.layers.") && is_wanted(name));
        write(&weights_file, &rounded(&weights)?, None)
    };
    match (trainee.trains(), trainee.borrows()) {
        (Trains::Gates, false) => Ok(()),
        (Trains::Gates, true) => {
            let [Projection { parts, .. }, ..] = config.projections();
            whole(&|name| name.contains(&format!(".{}.", parts[0].0)))
        }
        // A LoRA has no words for neurons that were set to zero first.
        (Trains::Full, _) | (Trains::Lora { .. }, true) => whole(&|_| true),
        (Trains::Lora { rank }, false) => {
            write(&adapter_file, &peft_tensors(config, params)?, None)?;
            let parts = config.projections().into_iter().flat_map(|projection| projection.parts);
            let modules: Vec<&str> = parts.filter_map(|(part, _)| part.rsplit('.').next()).collect();
            let config = json!({
                "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": LORA_SCALE * rank as f64,
                "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": false, "inference_mode": true,
                "target_modules": modules,
            });
            replace(&dir.join("adapter_config.json"), |temporary| fs::write(temporary, format!("{config:#}\n")))
        }
    }
}

/// A LoRA by the names of PEFT and in Hugging Face's order, f32. Projections of the same input share A in training; each
/// gets a copy.
fn peft_tensors(config: &Config, params: &Named) -> Result<Named> {
    let mut all = Named::new();
    for layer in 0..config.layers {
        for Projection { name: joined, parts } in config.projections() {
            let (a, b) = factors(params, &format!("layers.{layer}.{joined}"))?;
            let b = if joined == "qkv" { &config.half_split(b)? } else { b };
            let mut from = 0;
            for (part, rows) in parts {
                let name = |factor: &str| format!("base_model.model.model.layers.{layer}.{part}.{factor}.weight");
                all.insert(name("lora_A"), a.clone());
                all.insert(name("lora_B"), b.narrow(0, from, rows)?.contiguous()?);
                from += rows;
            }
        }
    }
    Ok(all)
}

/// The `dms_*` fields of a configuration, NVIDIA's names.
pub fn dms_fields(trainee: &Trainee) -> Map<String, Value> {
    let per = match trainee.gates.per {
        PerGate::Head => "head",
        PerGate::Layer => "layer",
    };
    let fields = [
        ("dms_window_size", json!(trainee.gates.window)),
        ("dms_alpha_scale", json!(trainee.scale)),
        ("dms_initial_alpha_offset", json!(trainee.offset)),
        ("dms_alpha_per", json!(per)),
        ("dms_separate_alpha", json!(!trainee.borrows())),
        ("dms_disable_eviction", json!(false)),
    ];
    fields.map(|(name, value)| (name.to_string(), value)).into_iter().collect()
}

/// Writes a model folder: bf16 tensors by their Hugging Face names, and other files by their names.
pub(crate) fn write_model(dir: &Path, tensors: &Named, files: &[(&str, Cow<[u8]>)]) -> Result<()> {
    create(dir)?;
    // transformers takes no file that does not say whose tensors it has.
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    write(&dir.join("model.safetensors"), &rounded(tensors)?, Some(metadata))?;
    files.iter().try_for_each(|(name, bytes)| replace(&dir.join(name), |temporary| fs::write(temporary, bytes)))
}

fn rounded(tensors: &Named) -> Result<Named> {
    tensors.iter().map(|(name, tensor)| Ok((name.clone(), tensor.to_dtype(DType::BF16)?))).collect()
}

/// The whole state of a training.
#[derive(Debug)]
pub struct Checkpoint {
    /// Of the optimizer.
    pub state: Named,
    /// What the training was told.
    pub settings: Value,
}

impl Checkpoint {
    /// The checkpoint of a folder.
    pub fn path(dir: &Path) -> PathBuf {
        dir.join("checkpoint.safetensors")
    }

    /// Steps taken when it was written.
    pub fn steps(&self) -> u64 {
        let steps = self.state.get("steps").and_then(|steps| steps.flatten_all().ok()?.to_vec1::<i64>().ok());
        steps.and_then(|steps| u64::try_from(*steps.first()?).ok()).unwrap_or(0)
    }

    /// Writes it; until the new one is whole, the one before stays.
    ///
    /// # Errors
    /// [`Error::File`] if it cannot be written.
    pub fn save(&self, dir: &Path) -> Result<PathBuf> {
        create(dir)?;
        let path = Self::path(dir);
        write(&path, &self.state, Some(HashMap::from([(SETTINGS.to_string(), self.settings.to_string())])))?;
        Ok(path)
    }

    /// Reads it.
    ///
    /// # Errors
    /// [`Error::File`] if there is none, or it is damaged.
    pub fn load(dir: &Path) -> Result<Self> {
        let path = Self::path(dir);
        let bytes = fs::read(&path).map_err(|e| Error::file(&path, e))?;
        let damaged = |what: String| Error::file(&path, format!("is no checkpoint, or damaged: {what}"));
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|e| damaged(e.to_string()))?;
        let settings =
            header.metadata().as_ref().and_then(|m| m.get(SETTINGS)).ok_or_else(|| damaged("no settings".into()))?;
        let settings = serde_json::from_str(settings).map_err(|e| damaged(e.to_string()))?;
        let state = candle_core::safetensors::load_buffer(&bytes, &Device::Cpu).map_err(|e| damaged(e.to_string()))?;
        Ok(Self { state: state.into_iter().collect(), settings })
    }
}

fn create(dir: &Path) -> Result<()> {
    fs::create_dir_all(dir).map_err(|e| Error::file(dir, e))
}

fn write(path: &Path, tensors: &Named, metadata: Option<HashMap<String, String>>) -> Result<()> {
    let here = tensors.iter().map(|(name, tensor)| Ok((name, tensor.to_device(&Device::Cpu)?.contiguous()?)));
    let here = here.collect::<Result<Vec<_>>>()?;
    replace(path, |temporary| {
        safetensors::serialize_to_file(here.iter().map(|(name, tensor)| (name, tensor)), metadata, temporary)
            .map_err(std::io::Error::other)
    })
}

/// Writes a file beside its place and puts it there when it is whole.
fn replace(path: &Path, write: impl FnOnce(&Path) -> std::io::Result<()>) -> Result<()> {
    let temporary = path.with_extension("part");
    let done = write(&temporary).and_then(|_| fs::rename(&temporary, path));
    done.map_err(|e| {
        _ = fs::remove_file(&temporary);
        Error::file(path, e)
    })
}
