//! KV cache policies for mistral.rs: Llama, Qwen2 and Qwen3, on the CPU.
//!
//! mistral.rs keeps its scheduler, sampling, templates and weights. What its models would have put into a cache goes to a
//! [`kvpolicy::KvCache`], one for each model, and every sequence of the scheduler is a sequence of it.
//!
//! ```no_run
//! # fn main() -> kvpolicy::Result<()> {
//! let policy = kvpolicy::Registry::standard().parse("tova:budget=25%")?;
//! let hosting = kvpolicy_mistralrs::register(policy, &Default::default());
//! // ... load a model and generate as ever, with `mistralrs` or `mistralrs-core`
//! for model in hosting.figures() {
//!     println!("{}: compression {:.1}x", model.id, model.stats.compression());
//! }
//! # Ok(())
//! # }
//! ```
//!
//! The host has no such way in by itself: `kv-host mistralrs` prepares a project, once, so that the feature `kv-policy` of
//! mistralrs-core exists.
//!
//! # What changes in the host
//!
//! PagedAttention and the prefix cache are off for a model under a policy. Tensor parallelism, X-LoRA, AnyMoE, speculative
//! decoding, other architectures and layers with a sliding window are refused when the model is loaded.
//!
//! Sequences of every length decode in one pass. The next prompt begins when the pool has room for what the policy will
//! keep of it and for every sequence to grow by a page a row. Where room runs out all the same, the youngest sequence gives
//! its memory up and starts over later, from its prompt and what it has generated: under a policy that ranks, what it then
//! holds may differ from before. A sequence that does not fit into an empty pool ends with an error that says so. Sequences
//! whose client has left end at the next step.
//!
//! # Gates
//!
//! `dms` takes the gates of the model's folder, as NVIDIA's and Shisa's checkpoints and `kvpolicy export` have them, or those
//! that `dms:weights=` names, as a training writes them. A GGUF file has none of its own.

mod error;
mod hosted;
mod hosting;
mod room;
mod spec;

pub use error::{Error, Result};
pub use hosted::Served;
pub use hosting::{CacheOptions, Figures, Hosting, register};
pub use mistralrs_core::kv_policy::unregister;
