//! The model, once under each policy.

use crate::error::{Error, Result};
use candle_core::Device;
use kvpolicy::Registry;
use kvpolicy_cli::{KvType, Place, bytes};
use kvpolicy_mistralrs::{CacheOptions, Figures, Hosting, Loaded, load, register, unregister};
use mistralrs_core::{
    AddModelConfig, DefaultSchedulerMethod, EngineConfig, MistralRs, MistralRsBuilder, SchedulerConfig,
};
use std::{fmt, num::NonZeroUsize, path::PathBuf, sync::Arc};

/// What is served, and within which bounds.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// A folder with safetensors, or a GGUF file.
    #[arg(long)]
    pub model: PathBuf,
    /// A policy to serve the model under, such as `tova:budget=25%`; may be given several times.
    #[arg(long = "policy", default_value = "full")]
    pub policies: Vec<String>,
    /// The most bytes that keys and values may take, such as 512MiB, for each policy [default: no limit; on a GPU half of what
    /// is free].
    #[arg(long, value_parser = bytes)]
    pub kv_memory: Option<u64>,
    /// Type of stored keys and values [default: f32 on the CPU, bf16 on a GPU].
    #[arg(long, value_enum)]
    pub kv_dtype: Option<KvType>,
    /// Where the model runs: cpu, cuda or cuda:N. In f32 on the CPU, in bf16 on a GPU.
    #[arg(long, default_value = "cpu")]
    pub device: Place,
    /// The most sequences that generate at a time, for each policy.
    #[arg(long, default_value = "64")]
    pub max_sequences: NonZeroUsize,
}

/// Where the host runs a model.
pub(crate) fn device(place: Place) -> Result<Device> {
    match place {
        Place::Cpu => Ok(Device::Cpu),
        Place::Cuda(_) if cfg!(not(feature = "cuda")) => Err(Error::Option(
            "this program was built without CUDA: build it with the feature `cuda`, which needs a toolkit".into(),
        )),
        Place::Cuda(ordinal) => Ok(Device::new_cuda(ordinal).map_err(kvpolicy_mistralrs::Error::from)?),
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
        let cache = CacheOptions {
            kv_dtype: options.kv_dtype.map(KvType::dtype),
            kv_bytes: options.kv_memory,
            max_sequences: options.max_sequences.get(),
        };
        let device = device(options.device)?;
        let mut hostings = vec![];
        let mut under = |policy| {
            hostings.push(register(policy, &cache));
            Ok(load(&options.model, &device)?)
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
