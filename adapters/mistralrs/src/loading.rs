//! Models of mistral.rs from folders and files.

use crate::error::{Error, Result};
use candle_core::Device;
use mistralrs_core::{
    DeviceMapSetting, GGUFLoaderBuilder, GGUFSpecificConfig, Loader, ModelDType, NormalLoaderBuilder, NormalLoaderType,
    NormalSpecificConfig, Pipeline, TokenSource,
};
use std::{path::Path, sync::Arc};
use tokio::sync::Mutex;

/// A model that mistral.rs has loaded.
pub type Loaded = Arc<Mutex<dyn Pipeline + Send + Sync>>;

/// Loads a folder with safetensors or a GGUF file onto a device: in f32 on the CPU, in bf16 on a GPU.
///
/// # Errors
/// [`Error::Path`] for what is no model, [`Error::Loading`] with mistral.rs's reason.
pub fn load(model: &Path, device: &Device) -> Result<Loaded> {
    let dtype = if device.is_cpu() { ModelDType::F32 } else { ModelDType::BF16 };
    let mapper = DeviceMapSetting::dummy();
    let loaded = loader(model)?.load_model_from_hf(None, TokenSource::None, &dtype, device, true, mapper, None, None);
    loaded.map_err(|error| Error::Loading(error.to_string()))
}

fn loader(model: &Path) -> Result<Box<dyn Loader>> {
    let refuse = |what: String| Error::Path { path: model.into(), what };
    // mistral.rs would look for what does not exist on the hub.
    if model.is_dir() {
        let dir = Some(model.display().to_string());
        let arch = architecture(model).map_err(refuse)?;
        let builder = NormalLoaderBuilder::new(NormalSpecificConfig::default(), None, None, dir, false, None);
        return builder.build(Some(arch)).map_err(|error| Error::Loading(error.to_string()));
    }
    let file = model.file_name().filter(|_| model.is_file());
    let file = file.ok_or_else(|| refuse("there is no such file or folder".into()))?;
    let dir = model.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let (dir, files) = (dir.display().to_string(), vec![file.to_string_lossy().into_owned()]);
    Ok(GGUFLoaderBuilder::new(None, None, dir, files, GGUFSpecificConfig::default(), false, None).build())
}

/// By `model_type`: folders that NVIDIA's exporter wrote have no `architectures`, by which mistral.rs would go.
fn architecture(dir: &Path) -> std::result::Result<NormalLoaderType, String> {
    let config = std::fs::read(dir.join("config.json")).map_err(|error| format!("config.json: {error}"))?;
    let config: serde_json::Value = serde_json::from_slice(&config).map_err(|error| format!("config.json: {error}"))?;
    match config["model_type"].as_str() {
        Some("llama") => Ok(NormalLoaderType::Llama),
        Some("qwen2") => Ok(NormalLoaderType::Qwen2),
        Some("qwen3") => Ok(NormalLoaderType::Qwen3),
        other => Err(format!("its model_type {} is none of llama, qwen2, qwen3", other.unwrap_or("is missing and"))),
    }
}
