//! The model, once under each policy.

use crate::error::{Error, Result};
use bytesize::ByteSize;
use candle_core::{DType, Device};
use kvpolicy::Registry;
use kvpolicy_mistralrs::{CacheOptions, Figures, Hosting, register, unregister};
use mistralrs_core::{
    AddModelConfig, DefaultSchedulerMethod, DeviceMapSetting, EngineConfig, GGUFLoaderBuilder, GGUFSpecificConfig,
    Loader, MistralRs, MistralRsBuilder, ModelDType, NormalLoaderBuilder, NormalLoaderType, NormalSpecificConfig,
    Pipeline, SchedulerConfig, TokenSource,
};
use std::{
    fmt,
    num::NonZeroUsize,
    path::{Path, PathBuf},
    sync::Arc,
};
use tokio::sync::Mutex;

/// What is served, and within which bounds.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// A folder with safetensors, or a GGUF file.
    #[arg(long)]
    pub model: PathBuf,
    /// A policy to serve the model under, such as `tova:budget=25%`; may be given several times.
    #[arg(long = "policy", default_value = "full")]
    pub policies: Vec<String>,
    /// The most bytes that keys and values may take, such as 512MiB, for each policy [default: no limit].
    #[arg(long)]
    pub kv_memory: Option<ByteSize>,
    /// Type of stored keys and values: f32, f16 or bf16.
    #[arg(long, default_value = "f32", value_parser = kv_dtype)]
    pub kv_dtype: DType,
    /// The most sequences that generate at a time, for each policy.
    #[arg(long, default_value = "64")]
    pub max_sequences: NonZeroUsize,
}

fn kv_dtype(text: &str) -> std::result::Result<DType, String> {
    match text {
        "f32" => Ok(DType::F32),
        "f16" => Ok(DType::F16),
        "bf16" => Ok(DType::BF16),
        other => Err(format!("`{other}` is none of f32, f16, bf16")),
    }
}

/// A model under its policies, ready to be served.
#[derive(Clone)]
pub struct Served {
    pub(crate) host: Arc<MistralRs>,
    hostings: Arc<[Arc<Hosting>]>,
    names: Arc<[String]>,
}

impl fmt::Debug for Served {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Served({})", self.names.join("; "))
    }
}

type Loaded = Arc<Mutex<dyn Pipeline + Send + Sync>>;

impl Served {
    /// Loads the model, once for each policy. Must be called on a runtime of several threads, and while nobody else loads
    /// a model: whom it runs under is a matter of the process.
    ///
    /// # Errors
    /// [`Error`] with what is wrong with an option, a policy or the model.
    pub async fn load(options: &Options) -> Result<Self> {
        let policies: Vec<_> =
            options.policies.iter().map(|text| Registry::standard().parse(text)).collect::<kvpolicy::Result<_>>()?;
        let names = options.policies.clone();
        if let Some(twice) = names.iter().enumerate().find_map(|(i, name)| names[..i].contains(name).then_some(name)) {
            return Err(Error::Option(format!("policy `{twice}` is named twice")));
        }
        let cache = CacheOptions { kv_dtype: options.kv_dtype, kv_bytes: options.kv_memory.map(|size| size.as_u64()) };
        let loader = loader(&options.model)?;
        let mut hostings = vec![];
        let mut under = |policy| {
            hostings.push(register(policy, &cache));
            load(&*loader)
        };
        let pipelines = policies.into_iter().map(&mut under).collect::<Result<Vec<_>>>();
        unregister();
        let (pipelines, hostings) = (pipelines?, hostings);
        let host = start(&names, pipelines, options.max_sequences).await?;
        Ok(Self { host, hostings: hostings.into(), names: names.into() })
    }

    /// What clients may ask for beside `default`, which is the first: the policies as they were given.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// How each policy fares, in the order of [`Served::names`]; without those whose engine is gone.
    pub fn figures(&self) -> Vec<Figures> {
        self.named_figures().map(|(_, figures)| figures).collect()
    }

    /// With the policy's name: a policy whose engine is gone has no figures.
    pub(crate) fn named_figures(&self) -> impl Iterator<Item = (&str, Figures)> {
        let each = self.names.iter().zip(&*self.hostings);
        each.flat_map(|(name, hosting)| hosting.figures().into_iter().map(move |figures| (name.as_str(), figures)))
    }
}

fn load(loader: &dyn Loader) -> Result<Loaded> {
    let (dtype, mapper) = (ModelDType::F32, DeviceMapSetting::dummy());
    let loaded = loader.load_model_from_hf(None, TokenSource::None, &dtype, &Device::Cpu, true, mapper, None, None);
    loaded.map_err(|error| Error::Host(error.to_string()))
}

/// One engine a policy.
async fn start(names: &[String], pipelines: Vec<Loaded>, most: NonZeroUsize) -> Result<Arc<MistralRs>> {
    let scheduler = || SchedulerConfig::DefaultScheduler { method: DefaultSchedulerMethod::Fixed(most) };
    let mut each = names.iter().zip(pipelines);
    let Some((name, pipeline)) = each.next() else {
        return Err(Error::Option("no policy is named: `full` keeps everything".into()));
    };
    let first = MistralRsBuilder::new(pipeline, scheduler(), false, None).with_model_id(name);
    let host = first.build().await;
    for (name, pipeline) in each {
        let engine = EngineConfig { throughput_logging_enabled: false, ..EngineConfig::default() };
        let added = host.add_model(name.clone(), pipeline, scheduler(), AddModelConfig::new(engine)).await;
        added.map_err(Error::Host)?;
    }
    Ok(host)
}

fn loader(model: &Path) -> Result<Box<dyn Loader>> {
    let refuse = |what: String| Error::Model { path: model.into(), what };
    // mistral.rs would look for what does not exist on the hub.
    if model.is_dir() {
        let dir = Some(model.display().to_string());
        let arch = architecture(model).map_err(refuse)?;
        let builder = NormalLoaderBuilder::new(NormalSpecificConfig::default(), None, None, dir, false, None);
        return builder.build(Some(arch)).map_err(|error| Error::Host(error.to_string()));
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
