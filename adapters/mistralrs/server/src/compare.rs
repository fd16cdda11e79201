//! `kvpolicy compare` over mistral.rs: the same options, table and results.

use anyhow::{Context, Result, ensure};
use kvpolicy::{
    Policy, Registry,
    compare::{Generating, Subject},
    runtime::Runtime,
};
use kvpolicy_candle::weights_sha256;
use kvpolicy_cli::{About, Compared, KvType, ModelArgs, compare, device_name};
use kvpolicy_mistralrs::{CacheOptions, MistralRuntime};
use std::{path::PathBuf, sync::Arc};
use tokio::runtime::Handle;

pub use kvpolicy_cli::CompareArgs;

/// Compares policies. Must be called where a tokio runtime of several threads may be waited for.
///
/// # Errors
/// What is wrong with the options, and whatever stops the model.
pub fn run(args: &CompareArgs, registry: &Registry) -> Result<()> {
    compare(args, registry, |model, _| Ok(Box::new(Model::load(model)?)))
}

struct Model {
    path: PathBuf,
    runtime: Generating<MistralRuntime>,
    device: candle_core::Device,
    options: CacheOptions,
}

impl Model {
    fn load(args: &ModelArgs) -> Result<Self> {
        let path: PathBuf =
            args.model.as_ref().context("--model is missing: a folder of safetensors or a GGUF file")?.into();
        ensure!(args.dtype.is_none(), "--dtype is not accepted: mistral.rs runs in f32 on the CPU, in bf16 on a GPU");
        ensure!(
            !args.dequantize,
            "--dequantize is not accepted: mistral.rs keeps the weights of a GGUF file as they are"
        );
        ensure!(!args.allow_long, "--allow-long is not accepted: mistral.rs ends a text at the model's last position");
        let device = crate::models::device(args.device)?;
        let (kv_dtype, kv_bytes) = (args.kv_dtype.map(KvType::dtype), args.kv_memory);
        let options = CacheOptions { kv_dtype, kv_bytes, max_sequences: 1 };
        let runtime = Handle::current().block_on(MistralRuntime::start(&path, &device, &options))?;
        Ok(Self { path, runtime: Generating(runtime), device, options })
    }
}

impl Compared for Model {
    fn subject(&self) -> &dyn Subject {
        &self.runtime
    }

    fn about(&self) -> Result<About> {
        let name = self.path.file_name().unwrap_or(self.path.as_os_str());
        Ok(About {
            model: name.to_string_lossy().into_owned(),
            sha256: weights_sha256(&self.path)?,
            quantized: self.path.is_file(),
            tokenizer_sha256: self.runtime.0.tokenizer_sha256()?,
            dtype: self.runtime.0.dtype(),
            kv_dtype: self.options.kv_dtype_on(&self.device),
            device: device_name(&self.device)?,
        })
    }

    fn check(&self, policy: &Arc<dyn Policy>) -> Result<()> {
        Handle::current().block_on(self.runtime.0.load(policy)).map_err(anyhow::Error::from_boxed)
    }

    fn gates_sha256(&self, policy: &Arc<dyn Policy>) -> Result<Option<String>> {
        Ok(self.runtime.0.gates_sha256(&**policy)?)
    }
}
