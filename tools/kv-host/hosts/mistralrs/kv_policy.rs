//! Hands the KV cache and the attention of a text model to code outside this crate.
//!
//! A [`Factory`] that is [registered](register) before a model is loaded may take the model over. The model then keeps no
//! keys and values: every layer calls [`KvPolicy::attend`], and every sequence owns a [`State`] of the policy's, dropped
//! with the sequence. Layers, sequences and their order reach the policy through [`KvCache::Policy`], which stands where
//! the layer's cache would.
//!
//! Sequences of every length decode together, in one pass; [the scheduler](scheduler) asks the policy whether memory
//! suffices before it lets a sequence run.
//!
//! Calls come from the engine's thread while it holds the model's cache: a policy must not call back into the engine.

use std::{
    any::Any,
    fmt,
    path::PathBuf,
    sync::{Arc, PoisonError, RwLock, Weak},
};

use candle_core::{DType, Device, Result, Tensor};

use crate::{
    attention::SdpaParams,
    pipeline::{CacheManagerMixin, EitherCache, KvCache, MetadataMixin, ModelPaths},
    response::Response,
    sequence::{Sequence, SequenceState},
};

pub(crate) use scheduler::scheduler;

mod scheduler;

/// What a policy holds for one sequence; dropping the last handle frees it.
pub type State = Arc<dyn Any + Send + Sync>;

/// Makes the policies of the models that are loaded.
pub trait Factory: Send + Sync {
    /// Whether this model is to run under a policy.
    fn selects(&self, model_id: &str) -> bool;
    /// The policy of a selected model, which is loaded by now. An error ends the loading.
    fn create(&self, model: &Model) -> anyhow::Result<Arc<dyn KvPolicy>>;
}

/// A loaded model.
#[derive(Debug, Clone)]
pub struct Model {
    /// Folder, or name on the hub.
    pub id: String,
    /// `config.json` of a safetensors model; `None` for GGUF.
    pub config_json: Option<String>,
    /// Where its weights were read from.
    pub weight_files: Vec<PathBuf>,
    /// Attention layers.
    pub layers: usize,
    /// Query heads a layer.
    pub q_heads: usize,
    /// KV heads a layer.
    pub kv_heads: usize,
    /// Components of one head.
    pub head_dim: usize,
    /// Type of the tensors that reach [`KvPolicy::attend`].
    pub dtype: DType,
    /// Where each layer is.
    pub devices: Vec<Device>,
}

/// One layer's new tokens, the same number for each sequence of the batch. Heads and components as in [`Model`].
#[derive(Debug)]
pub struct Attend<'a> {
    /// Which layer, from 0.
    pub layer: usize,
    /// The state of each sequence of the batch, in its order.
    pub rows: &'a [State],
    /// Position of each sequence's first new token.
    pub offsets: &'a [usize],
    /// `[rows, q_heads, tokens, head_dim]`, RoPE applied.
    pub q: &'a Tensor,
    /// `[rows, kv_heads, tokens, head_dim]`, RoPE applied.
    pub k: &'a Tensor,
    /// `[rows, kv_heads, tokens, head_dim]`.
    pub v: &'a Tensor,
    /// Factor of the products of queries and keys.
    pub softmax_scale: f32,
    /// Bound of the scaled products (tanh), if the model has one.
    pub softcap: Option<f32>,
    /// Tokens a query sees, itself included, if the model limits them.
    pub sliding_window: Option<usize>,
}

/// Keeps and reads the keys and values of one model.
pub trait KvPolicy: Send + Sync {
    /// A state that holds nothing, for a sequence whose prompt of `prompt_tokens` comes next. A sequence that the
    /// scheduler set aside starts over: its prompt is then all of its tokens.
    fn open(&self, prompt_tokens: usize) -> Result<State>;
    /// What enters a layer, before its norm: `[rows, tokens, hidden]`; comes first.
    fn observe_hidden(&self, _layer: usize, _hidden: &Tensor) -> Result<()> {
        Ok(())
    }
    /// The queries to go on with, `[rows, q_heads, tokens, head_dim]`, after any norm of heads; comes second. RoPE may
    /// then rotate them in place: copy what is to be kept.
    fn prepare_queries(&self, _layer: usize, q: Tensor) -> Result<Tensor> {
        Ok(q)
    }
    /// Keeps the new keys and values and attends causally: `[rows, q_heads, tokens, head_dim]`. An error ends the
    /// sequences of the batch, not the engine.
    fn attend(&self, call: Attend<'_>) -> Result<Tensor>;
    /// Whether the last pass over this sequence came to nothing for want of memory, while others went on: it starts over
    /// when there is room.
    fn lost(&self, _state: &State) -> bool {
        false
    }
    /// Whether memory suffices for one more token of each of these sequences, oldest first. Where it does not, the last of
    /// them is dropped and starts over later.
    fn can_decode(&self, _running: &[State]) -> bool {
        true
    }
    /// Whether `prompts` sequences of `tokens` each may begin beside those that run. Not asked where none does.
    fn can_begin(&self, _running: &[State], _prompts: usize, _tokens: usize) -> bool {
        true
    }
}

static FACTORY: RwLock<Option<Arc<dyn Factory>>> = RwLock::new(None);

/// For the models that this process loads from now on, in place of any earlier factory.
pub fn register(factory: Arc<dyn Factory>) {
    *FACTORY.write().unwrap_or_else(PoisonError::into_inner) = Some(factory);
}

/// Models that are loaded from now on keep their own caches.
pub fn unregister() {
    *FACTORY.write().unwrap_or_else(PoisonError::into_inner) = None;
}

fn factory_of(model_id: &str) -> Option<Arc<dyn Factory>> {
    let factory = FACTORY.read().unwrap_or_else(PoisonError::into_inner).clone();
    factory.filter(|factory| factory.selects(model_id))
}

/// Stands where a cache would: for each layer in the model's cache, and once in a sequence's.
#[derive(Clone)]
pub struct PolicyLayer {
    policy: Arc<dyn KvPolicy>,
    layer: usize,
    batch: Batch,
}

/// Whose tokens come.
#[derive(Clone)]
enum Batch {
    /// In the model: the sequences of the next passes. Weak, so that a batch does not outlive its sequences.
    Rows(Arc<[Weak<dyn Any + Send + Sync>]>),
    /// In a sequence: itself.
    Own(State),
}

/// The state of a sequence for which there is none; a pass over it fails with the reason.
struct Failed(String);

impl fmt::Debug for PolicyLayer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PolicyLayer({})", self.layer)
    }
}

impl PolicyLayer {
    pub(crate) fn attend(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        offsets: &[usize],
        params: &SdpaParams,
    ) -> Result<Tensor> {
        let rows = self.rows()?;
        if rows.len() != q.dim(0)? || rows.len() != offsets.len() {
            let (got, due) = (q.dim(0)?, rows.len());
            candle_core::bail!("kv policy: a pass over {got} sequences outside the scheduled step of {due}");
        }
        if params.sinks.is_some() {
            candle_core::bail!("kv policy: attention sinks of the model are not supported");
        }
        self.policy.attend(Attend {
            layer: self.layer,
            rows: &rows,
            offsets,
            q,
            k,
            v,
            softmax_scale: params.softmax_scale,
            softcap: params.softcap,
            sliding_window: params.sliding_window,
        })
    }

    pub(crate) fn observe_hidden(&self, hidden: &Tensor) -> Result<()> {
        self.policy.observe_hidden(self.layer, hidden)
    }

    pub(crate) fn prepare_queries(&self, q: Tensor) -> Result<Tensor> {
        self.policy.prepare_queries(self.layer, q)
    }

    fn rows(&self) -> Result<Vec<State>> {
        let Batch::Rows(rows) = &self.batch else {
            candle_core::bail!("kv policy: a sequence's own state took part in a pass");
        };
        let Some(rows) = rows.iter().map(Weak::upgrade).collect::<Option<Vec<State>>>() else {
            candle_core::bail!("kv policy: a sequence of this batch has ended");
        };
        match rows.iter().find_map(|row| row.downcast_ref::<Failed>()) {
            Some(Failed(why)) => candle_core::bail!("kv policy: {why}"),
            None => Ok(rows),
        }
    }
}

fn first(layers: &[KvCache]) -> Option<&PolicyLayer> {
    match layers.first() {
        Some(KvCache::Policy(layer)) => Some(layer),
        _ => None,
    }
}

fn policy_of(cache: &EitherCache) -> Option<Arc<dyn KvPolicy>> {
    match cache {
        EitherCache::Normal(normal) => {
            first(&normal.lock().unwrap_or_else(PoisonError::into_inner).0).map(|layer| layer.policy.clone())
        }
        _ => None,
    }
}

/// Whether the model of this cache runs under a policy.
pub(crate) fn active(cache: &EitherCache) -> bool {
    policy_of(cache).is_some()
}

/// The state that a sequence owns.
fn state_of(sequence: &mut Sequence) -> Option<&State> {
    match sequence.normal_cache().first() {
        Some(Some(KvCache::Policy(PolicyLayer { batch: Batch::Own(state), .. }))) => Some(state),
        _ => None,
    }
}

/// Takes a sequence's state: it waits, and starts over.
fn set_aside(sequence: &mut Sequence) {
    if let Some(slot) = sequence.normal_cache().first_mut() {
        *slot = None;
    }
    sequence.set_state(SequenceState::Waiting);
}

/// After a pass: [sets aside](set_aside) the sequences that it lost. Returns false where the model keeps its own cache.
pub(crate) fn set_aside_lost(cache: &EitherCache, sequences: &mut [&mut Sequence]) -> bool {
    let Some(policy) = policy_of(cache) else {
        return false;
    };
    for sequence in sequences {
        if state_of(sequence).is_some_and(|state| policy.lost(state)) {
            set_aside(sequence);
        }
    }
    true
}

/// The sequences of a pass that it did not lose, with their logits.
pub(crate) fn kept<'a>(
    sequences: &'a mut [&mut Sequence],
    logits: Vec<Tensor>,
) -> (Vec<&'a mut Sequence>, Vec<Tensor>) {
    let pairs = sequences.iter_mut().map(|sequence| &mut **sequence).zip(logits);
    pairs.filter(|(sequence, _)| !sequence.is_waiting()).unzip()
}

/// What was sampled for a sequence. One for which that failed is told so and ends, alone: the others of its pass have their
/// new keys and values, and must get their tokens.
pub(crate) async fn sampled<T>(sequence: &Sequence, sampled: Result<T>) -> Option<Result<T>> {
    let error = match sampled {
        Err(error) => error,
        sampled => return Some(sampled),
    };
    let told = sequence.responder().send(Response::InternalError(error.into())).await;
    told.unwrap_or_else(|_| tracing::warn!("nobody is there to hear of an error"));
    sequence.set_state(SequenceState::Error);
    None
}

/// A view on a device, without the rest of its storage: batches of logits would go once for each of their sequences.
pub(crate) fn alone_to_device(view: &Tensor, device: &Device) -> Result<Tensor> {
    if view.device().same_device(device) {
        return Ok(view.clone());
    }
    view.force_contiguous()?.to_device(device)
}

/// Where the text of `bytes` is at a position among them: what is no UTF-8 has another length as text.
pub(crate) fn place_in_text(bytes: &[u8], at: usize) -> usize {
    String::from_utf8_lossy(&bytes[..at.min(bytes.len())]).len()
}

/// Makes `sequences` the rows of the passes to come. `fresh`: their prompts come, they hold nothing. Returns false where
/// the model keeps its own cache.
pub(crate) fn bind(layers: &mut [KvCache], sequences: &mut [&mut Sequence], fresh: bool) -> bool {
    let Some(template) = first(layers).cloned() else {
        return false;
    };
    let bound = sequences.iter_mut().filter_map(|sequence| bind_one(&template, sequence, fresh));
    let rows: Arc<[_]> = bound.map(|state| Arc::downgrade(&state)).collect();
    for layer in layers {
        if let KvCache::Policy(layer) = layer {
            layer.batch = Batch::Rows(rows.clone());
        }
    }
    true
}

/// The state that a sequence goes on with, which it owns from now on; `None` for a sequence that is over, as after a step
/// that failed: it loses its state.
fn bind_one(template: &PolicyLayer, sequence: &mut Sequence, fresh: bool) -> Option<State> {
    let held = sequence.normal_cache().first_mut().and_then(Option::take);
    let state = match held {
        Some(KvCache::Policy(PolicyLayer { batch: Batch::Own(state), .. })) if !fresh => state,
        _ if !sequence.is_running() => return None,
        _ if fresh => {
            let opened = template.policy.open(sequence.get_toks().len());
            opened.unwrap_or_else(|error| Arc::new(Failed(error.to_string())))
        }
        _ => Arc::new(Failed("the sequence lost its state".to_string())),
    };
    if let Some(slot) = sequence.normal_cache().first_mut() {
        let batch = Batch::Own(state.clone());
        *slot = Some(KvCache::Policy(PolicyLayer { batch, ..template.clone() }));
    }
    Some(state)
}

/// The architectures whose models hand their attention over, as `config.json` and GGUF name them.
const WIRED: [&str; 3] = ["llama", "qwen2", "qwen3"];

/// What a loader is about to load, as far as a policy cares.
pub(crate) struct Plan<'a> {
    pub(crate) model_id: &'a str,
    pub(crate) arch: Option<&'a str>,
    pub(crate) no_kv_cache: bool,
    pub(crate) tensor_parallel: bool,
    pub(crate) xlora: bool,
}

/// Asks, before the model is built, for the factory of a model that is selected. Turns PagedAttention off for it, whose
/// blocks hold the tokens of all heads and cannot be given back head by head.
pub(crate) fn select(
    plan: &Plan<'_>,
    paged: &mut Option<crate::PagedAttentionConfig>,
) -> anyhow::Result<Option<Arc<dyn Factory>>> {
    let Some(factory) = factory_of(plan.model_id) else {
        return Ok(None);
    };
    let arch = plan.arch.unwrap_or("unknown");
    let unwired = !WIRED.contains(&arch);
    for (is, what) in [
        (unwired, format!("its architecture `{arch}` is none of {}", WIRED.join(", "))),
        (plan.no_kv_cache, "it is loaded without a KV cache".to_string()),
        (plan.tensor_parallel, "tensor parallelism (NCCL, ring) is not supported".to_string()),
        (plan.xlora, "X-LoRA is not supported".to_string()),
    ] {
        anyhow::ensure!(!is, "`{}` cannot run under a KV policy: {what}", plan.model_id);
    }
    if paged.take().is_some() {
        tracing::warn!("`{}` runs under a KV policy, so PagedAttention is off.", plan.model_id);
    }
    Ok(Some(factory))
}

/// For what cannot run under a policy at all.
pub(crate) fn refuse(model_id: &str, what: &str) -> anyhow::Result<()> {
    anyhow::ensure!(factory_of(model_id).is_none(), "`{model_id}` cannot run under a KV policy: {what}");
    Ok(())
}

/// Puts the policy in the place of a new pipeline's caches.
pub(crate) fn install<P: CacheManagerMixin + MetadataMixin>(
    factory: Option<Arc<dyn Factory>>,
    pipeline: &P,
    config_json: Option<&str>,
    paths: &dyn ModelPaths,
) -> anyhow::Result<()> {
    let Some(factory) = factory else {
        return Ok(());
    };
    let model = describe(pipeline, config_json, paths)?;
    let refused = |what: &str| anyhow::anyhow!("`{}` cannot run under a KV policy: {what}", model.id);
    let EitherCache::Normal(cache) = pipeline.cache() else {
        return Err(refused("it keeps another kind of cache"));
    };
    let mut cache = cache.lock().unwrap_or_else(PoisonError::into_inner);
    if !cache.0.iter().all(|layer| matches!(layer, KvCache::Normal { .. })) {
        return Err(refused("some of its layers have a sliding window or share a cache"));
    }
    let policy = factory.create(&model)?;
    let nobody = Batch::Rows(Arc::from(Vec::new()));
    let layer = |layer| PolicyLayer { policy: policy.clone(), layer, batch: nobody.clone() };
    cache.0 = (0..model.layers).map(|at| KvCache::Policy(layer(at))).collect();
    Ok(())
}

fn describe<P: CacheManagerMixin + MetadataMixin>(
    pipeline: &P,
    config_json: Option<&str>,
    paths: &dyn ModelPaths,
) -> anyhow::Result<Model> {
    let (id, metadata) = (pipeline.name(), pipeline.get_metadata());
    let shape = metadata.model_metadata.as_ref();
    let shape = shape.ok_or_else(|| anyhow::anyhow!("`{id}` does not tell its shape"))?;
    let layers = metadata.num_hidden_layers;
    let mapped = |layer| Some(pipeline.device_mapper()?.device_for(layer, false)?.clone());
    Ok(Model {
        config_json: config_json.map(str::to_string),
        weight_files: paths.get_weight_filenames().to_vec(),
        layers,
        q_heads: shape.num_attn_heads(),
        kv_heads: shape.num_kv_heads(),
        head_dim: shape.k_head_dim(),
        dtype: metadata.activation_dtype,
        devices: (0..layers).map(|layer| mapped(layer).unwrap_or_else(|| pipeline.device())).collect(),
        id,
    })
}
