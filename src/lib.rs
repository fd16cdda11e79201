//! Which tokens stay in the KV cache.
//!
//! A *policy* says what stays, a *store* knows where it is, *attention* knows how it is computed, and
//! [`KvCache`] fixes the order of the calls between them. A model calls one method per layer:
//!
//! ```
//! use candle_core::{Device, Tensor};
//! use kvpolicy::{CpuConfig, KvCache, ModelSpec, Phase, Registry, cpu};
//!
//! # fn main() -> kvpolicy::Result<()> {
//! let spec = ModelSpec::new(1, 4, 2, 16); // layers, query heads, KV heads, head_dim
//! let policy = Registry::standard().parse("window:size=8,sinks=2")?;
//! let mut cache = KvCache::new(spec.clone(), policy, cpu(&spec, &CpuConfig::default())?)?;
//!
//! let seq = cache.open();
//! let step = cache.begin(&[(seq, 32, Phase::Prefill { last: true })])?;
//! let random = |heads| Tensor::randn(0f32, 1.0, (32, heads, 16), &Device::Cpu);
//! let new = step.tokens(random(4)?, random(2)?, random(2)?, None);
//! let y = cache.attend(0, &step, &new)?; // [tokens, q_heads, head_dim]
//! assert!(cache.end(step).is_empty()); // no sequence was dropped for want of memory
//!
//! assert_eq!(y.dims(), [32, 4, 16]);
//! assert_eq!(cache.held_positions(0, seq, 0), [0, 1, 24, 25, 26, 27, 28, 29, 30, 31]);
//! # Ok(())
//! # }
//! ```
//!
//! # The rule of the house
//!
//! A **row** is one (layer, sequence, KV head). It holds an unordered bag of entries: a key (RoPE applied at
//! its true position), a value, the position, a mark and a score. Physical order means nothing.
//!
//! 1. [`Protect`] shields the first `sinks` positions and the newest `recent` ones from every rule.
//! 2. A *marked* entry that is no longer protected is dead and invisible at once, for every query. When its
//!    bytes are reclaimed never changes an output.
//! 3. A row over its budget when a trim is due loses its lowest-scored unprotected entries; ties drop the older.
//!
//! `full` marks nothing; `window` marks everything and protects sinks and recents; DMS marks by a learned bit
//! and protects its window (delayed eviction); H2O, TOVA, SnapKV and the like rank by a score and have a budget.
//!
//! Tokens of one step are laid end to end: `[tokens, heads, head_dim]`, so sequences of different length share a
//! batch without padding. Query head `j` belongs to KV head `j / group` (GQA).
//!
//! # A first policy
//!
//! A policy is configuration and a formula, written in tensor operations. It marks tokens as they are written, or ranks
//! what is held under a budget; the store and attention do the rest. One that keeps the newest tokens, and the others at
//! random for each head:
//!
//! ```
//! use candle_core::Tensor;
//! use kvpolicy::{Evict, Lag, LayerCx, NewTokens, Policy, Protect, Registry, Result, Verdict};
//!
//! kvpolicy::policy_params! {
//!     /// Keeps the newest tokens, and a random part of the others.
//!     struct Coin = "coin", paper "none: an example" {
//!         /// Newest tokens that all stay.
//!         window: u32 = 8, in 1..=1 << 20;
//!         /// The part of the others that goes.
//!         rate: f64, in 0.0..=1.0;
//!     }
//! }
//!
//! impl Policy for Coin {
//!     fn protect(&self, _: &LayerCx) -> Protect {
//!         Protect { recent: self.window, ..Protect::default() }
//!     }
//!
//!     fn on_write(&self, cx: &LayerCx, new: &NewTokens) -> Result<Verdict> {
//!         let shape = (new.positions.dim(0)?, cx.spec.kv_heads);
//!         let bits = Tensor::rand(0f32, 1.0, shape, new.positions.device())?.lt(self.rate as f32)?;
//!         Ok(Verdict { evict: Evict::Bits { bits, lag: Lag::Own }, score: None })
//!     }
//! }
//!
//! # fn main() -> Result<()> {
//! let mut registry = Registry::standard();
//! registry.add::<Coin>();
//! assert_eq!(registry.parse("coin:rate=0.5")?.to_string(), "coin:window=8,rate=0.5");
//! assert!(registry.parse("coin:rate=2").unwrap_err().to_string().contains("rate"));
//! # Ok(())
//! # }
//! ```
//!
//! # A first model
//!
//! `kvpolicy-candle` has Llama, Qwen2 and Qwen3, and shows how a model of your own moves over: where its attention appends
//! to a cache and attends, it calls [`KvCache::attend`].
//!
//! # When scores are taken
//!
//! Prefill in one piece, in chunks of any size, decode and multi-turn give the same output for every policy that
//! only marks. A policy that ranks evicts nothing during a prefill: it trims once, after attention of the chunk
//! that ends the prompt ([`Phase::Prefill`] with `last`), and then every n decode steps ([`When`]). So the prefill
//! itself is exact and chunking does not change its scores.

pub mod backend;
mod cache;
pub mod compare;
pub mod compose;
mod error;
mod logits;
mod ops;
pub mod params;
pub mod policies;
mod policy;
mod registry;
pub mod retrofit;
#[cfg(feature = "router")]
pub mod router;
pub mod runtime;
mod spec;
mod stats;
mod step;

pub use backend::cpu::{CpuConfig, cpu};
#[cfg(feature = "cuda")]
pub use backend::cuda::{CudaConfig, cuda, cuda_device};
pub use cache::{DecodeGraph, KvCache};
pub use error::{Error, Result};
pub use policy::{
    Budget, Evict, GateSource, Held, LayerCx, Moments, Needs, NewTokens, Policy, Protect, QueryMoments, Score, Verdict,
    When,
};
pub use registry::{Entry, Registry};
pub use spec::{GateSpec, KeyRange, Lag, ModelSpec, PerGate, Rope, RopeLayout};
pub use stats::{Stats, Usage};
pub use step::{Phase, SeqId, Span, Step};
