//! The models of this process that run under a policy.

use crate::{
    error::Result,
    hosted::{Hosted, Pool, Served},
    spec::{config_of, gates_of},
};
use candle_core::DType;
use kvpolicy::{CpuConfig, KvCache, Policy, Stats, Usage, cpu};
use mistralrs_core::kv_policy::{self, Factory, KvPolicy, Model};
use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError, Weak},
};

/// How keys and values are kept.
#[derive(Debug, Clone)]
pub struct CacheOptions {
    /// Type of stored keys and values: f32, f16 or bf16.
    pub kv_dtype: DType,
    /// The most bytes that all sequences of a model may take; `None` for no limit.
    pub kv_bytes: Option<u64>,
}

impl Default for CacheOptions {
    fn default() -> Self {
        Self { kv_dtype: DType::F32, kv_bytes: None }
    }
}

/// The models that were loaded under one [`register`], as long as they live.
pub struct Hosting {
    policy: Arc<dyn Policy>,
    options: CacheOptions,
    models: Mutex<Vec<(String, Weak<Pool>)>>,
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
        let models = self.models.lock().unwrap_or_else(PoisonError::into_inner);
        let living = models.iter().filter_map(|(id, pool)| Some((id.clone(), pool.upgrade()?)));
        let ask = |(id, pool): (String, Arc<Pool>)| {
            let passes = pool.lock();
            let (cache, served) = (&passes.cache, passes.served);
            let entries_per_token = (cache.spec().layers * cache.spec().kv_heads) as u64;
            let (policy, usage, stats) = (cache.policy().clone(), cache.usage(), cache.stats());
            Figures { id, policy, usage, stats, served, entries_per_token }
        };
        living.map(ask).collect()
    }

    fn host(&self, model: &Model) -> Result<Hosted> {
        let CacheOptions { kv_dtype, kv_bytes } = self.options;
        let config = config_of(model)?;
        let gates = gates_of(model, &config, &*self.policy)?;
        let mut spec = config.spec();
        spec.gates = gates.as_ref().map(|gates| gates.spec());
        let store = cpu(&spec, &CpuConfig { dtype: kv_dtype, limit_bytes: kv_bytes, ..CpuConfig::default() })?;
        let hosted = Hosted::new(KvCache::new(spec, self.policy.clone(), store)?, gates, config);
        let mut models = self.models.lock().unwrap_or_else(PoisonError::into_inner);
        models.retain(|(_, pool)| pool.strong_count() > 0);
        models.push((model.id.clone(), Arc::downgrade(hosted.pool())));
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
