//! The models of this process that run under a policy.

use crate::{
    error::Result,
    hosted::{Hosted, Passes, Pool, Served},
    spec::{config_of, device_of, gates_of},
};
use candle_core::{DType, Device};
#[cfg(feature = "cuda")]
use kvpolicy::CudaConfig;
use kvpolicy::{CpuConfig, KvCache, ModelSpec, Policy, Stats, Usage, backend::Backend, cpu};
use kvpolicy_candle::{Config, Gates};
use mistralrs_core::kv_policy::{self, Factory, KvPolicy, Model};
use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError, Weak},
};

/// How keys and values are kept, on the device that a model is on.
#[derive(Debug, Clone)]
pub struct CacheOptions {
    /// Type of stored keys and values: f32, f16 or bf16; `None` for f32 in main memory and bf16 on a GPU.
    pub kv_dtype: Option<DType>,
    /// The most bytes that all sequences of a model may take. `None` for no limit in main memory; a GPU reserves them at once,
    /// half of what is free when the model has been loaded if they are not given.
    pub kv_bytes: Option<u64>,
    /// The most sequences that hold keys and values at a time, 2,048 at most on a GPU. More wait.
    pub max_sequences: usize,
}

impl Default for CacheOptions {
    fn default() -> Self {
        Self { kv_dtype: None, kv_bytes: None, max_sequences: 64 }
    }
}

impl CacheOptions {
    /// Type of stored keys and values on a device.
    pub fn kv_dtype_on(&self, device: &Device) -> DType {
        self.kv_dtype.unwrap_or(if device.is_cpu() { DType::F32 } else { DType::BF16 })
    }

    /// A store on a device. `max_entries`: tokens that a sequence may have.
    fn store(
        &self,
        spec: &ModelSpec,
        #[cfg_attr(not(feature = "cuda"), allow(unused_variables))] max_entries: usize,
        device: &Device,
    ) -> kvpolicy::Result<Box<dyn Backend>> {
        let (dtype, limit_bytes) = (self.kv_dtype_on(device), self.kv_bytes);
        match device {
            #[cfg(feature = "cuda")]
            Device::Cuda(_) => {
                let max_sequences = self.max_sequences;
                let layout = CudaConfig { dtype, limit_bytes, max_sequences, max_entries, ..CudaConfig::default() };
                kvpolicy::cuda(spec, &layout, device)
            }
            _ => cpu(spec, &CpuConfig { dtype, limit_bytes, ..CpuConfig::default() }),
        }
    }
}

/// The models that were loaded under one [`register`], as long as they live.
pub struct Hosting {
    policy: Arc<dyn Policy>,
    options: CacheOptions,
    models: Mutex<Vec<Loaded>>,
}

/// A model that may be gone.
#[derive(Clone)]
struct Loaded {
    model: Model,
    config: Config,
    pool: Weak<Pool>,
}

impl fmt::Debug for Hosting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Hosting({})", self.policy)
    }
}

/// Puts every text model that mistral.rs loads from now on under a policy, in place of any earlier one. A model keeps the
/// policy it was loaded with, so two models can run under two. mistral.rs fails to load a model that cannot run under it.
pub fn register(policy: Arc<dyn Policy>, options: &CacheOptions) -> Arc<Hosting> {
    let hosting = Arc::new(Hosting { policy, options: options.clone(), models: Mutex::default() });
    kv_policy::register(Arc::new(Registered(hosting.clone())));
    hosting
}

/// How a model under a policy fares.
#[derive(Debug, Clone)]
pub struct Figures {
    /// The name it was loaded with.
    pub id: String,
    /// Its policy.
    pub policy: Arc<dyn Policy>,
    /// What its store holds now.
    pub usage: Usage,
    /// Figures over all of its steps so far.
    pub stats: Stats,
    /// What it has served so far.
    pub served: Served,
    /// Entries of one token: its KV heads over all layers.
    pub entries_per_token: u64,
}

impl Hosting {
    /// Figures of every model that lives, in the order they were loaded.
    pub fn figures(&self) -> Vec<Figures> {
        let ask = |(loaded, pool): (Loaded, Arc<Pool>)| {
            let mut passes = pool.lock();
            passes.settle();
            let (cache, served) = (&passes.cache, passes.served);
            let entries_per_token = (cache.spec().layers * cache.spec().kv_heads) as u64;
            let (policy, usage, stats) = (cache.policy().clone(), cache.usage(), cache.stats());
            Figures { id: loaded.model.id, policy, usage, stats, served, entries_per_token }
        };
        self.living().into_iter().map(ask).collect()
    }

    /// Sequences that hold a place now, over every model that lives.
    pub(crate) fn running(&self) -> u64 {
        self.living().iter().map(|(_, pool)| pool.lock().served.running).sum()
    }

    /// Puts every model that lives under another policy, with an empty cache. What is loaded later still gets the first one.
    ///
    /// # Errors
    /// Every reason why a model cannot run under it, and [`Error::Busy`](crate::Error::Busy) while it serves: it stays as it is
    /// then.
    pub fn put_under(&self, policy: &Arc<dyn Policy>) -> Result<()> {
        self.start_over(|loaded, _| Ok((policy.clone(), gates_of(&loaded.model, &loaded.config, &**policy)?)))
    }

    /// Empties the cache of every model that lives, and begins its figures anew.
    ///
    /// # Errors
    /// [`Error::Busy`](crate::Error::Busy) while it serves, and those of its memory.
    pub(crate) fn empty(&self) -> Result<()> {
        self.start_over(|_, passes| Ok((passes.cache.policy().clone(), passes.gates.clone())))
    }

    /// The gates that the model loaded first runs with under a policy.
    ///
    /// # Errors
    /// What is wrong with those that it asks for.
    pub(crate) fn gates(&self, policy: &dyn Policy) -> Result<Option<Arc<Gates>>> {
        let first = self.living().into_iter().next();
        first.map_or(Ok(None), |(loaded, _)| gates_of(&loaded.model, &loaded.config, policy))
    }

    fn start_over(
        &self,
        choose: impl Fn(&Loaded, &Passes) -> Result<(Arc<dyn Policy>, Option<Arc<Gates>>)>,
    ) -> Result<()> {
        self.living().into_iter().try_for_each(|(loaded, pool)| {
            let mut passes = pool.lock();
            passes.check_idle()?;
            let (policy, gates) = choose(&loaded, &passes)?;
            passes.start_over(policy, gates, |spec| self.store(&loaded, spec))
        })
    }

    fn living(&self) -> Vec<(Loaded, Arc<Pool>)> {
        let models = self.models.lock().unwrap_or_else(PoisonError::into_inner);
        models.iter().filter_map(|loaded| Some((loaded.clone(), loaded.pool.upgrade()?))).collect()
    }

    fn store(&self, loaded: &Loaded, spec: &ModelSpec) -> Result<Box<dyn Backend>> {
        Ok(self.options.store(spec, loaded.config.max_context, device_of(&loaded.model)?)?)
    }

    fn host(&self, model: &Model) -> Result<Hosted> {
        let (model, config) = (model.clone(), config_of(model)?);
        let gates = gates_of(&model, &config, &*self.policy)?;
        let spec = ModelSpec { gates: gates.as_ref().map(|gates| gates.spec()), ..config.spec() };
        let mut loaded = Loaded { model, config, pool: Weak::new() };
        let store = self.store(&loaded, &spec)?;
        let pool = Arc::new(Pool::new(KvCache::new(spec, self.policy.clone(), store)?, gates));
        loaded.pool = Arc::downgrade(&pool);
        let hosted = Hosted { pool, config: loaded.config.clone(), max_sequences: self.options.max_sequences };
        let mut models = self.models.lock().unwrap_or_else(PoisonError::into_inner);
        models.retain(|loaded| loaded.pool.strong_count() > 0);
        models.push(loaded);
        Ok(hosted)
    }
}

/// What the host knows of a [`Hosting`].
struct Registered(Arc<Hosting>);

impl Factory for Registered {
    fn selects(&self, _model_id: &str) -> bool {
        true
    }

    fn create(&self, model: &Model) -> anyhow::Result<Arc<dyn KvPolicy>> {
        Ok(Arc::new(self.0.host(model)?))
    }
}
