//! KV cache policies for mistral.rs: Llama, Qwen2 and Qwen3, on the CPU or, with the feature `cuda`, on a GPU.
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
//! PagedAttention and the prefix cache are off for a model under a policy. Tensor parallelism, layers on several devices,
//! X-LoRA, AnyMoE, speculative decoding, other architectures and layers with a sliding window are refused when the model is
//! loaded.
//!
//! Sequences of every length decode in one pass. The next prompt begins when the pool has room for what the policy will
//! keep of it and for every sequence to grow by a page a row. Where room runs out all the same, the youngest sequence gives
//! its memory up and starts over later, from its prompt and what it has generated: under a policy that ranks, what it then
//! holds may differ from before. A sequence that does not fit into an empty pool ends with an error that says so. Sequences
//! whose client has left end at the next step.
//!
//! # On a GPU
//!
//! The pool is on the device of the layers, and uses the stream that the host gives it: [`CacheOptions`] says how much it
//! reserves, and for how many sequences. Admission needs exact counts and a sequence without memory must not be sampled, so each
//! pass waits for the device after its last layer, as the host does for the logits a moment later.
//!
//! # Several GPUs
//!
//! Under NCCL or ring mistral.rs 0.8.1 starts a process a rank, each with an engine and a scheduler of its own, and copies every
//! request to them over a socket; a rank answers one copy before it reads the next. Ranks agree on who is in a step because
//! each would decide the same, not because they say so. Under a policy they would not: rows hold other amounts in each
//! rank's KV heads, so that ranks would admit, lose and set aside other sequences, and wait for each other in the next
//! all-reduce for ever. That takes a host in which one rank decides and tells the others, so models are refused there.
//! A model that is mapped onto several GPUs by layers is refused as well: its pool is one.
//!
//! # Other runtimes
//!
//! [`MistralRuntime`] is a [`kvpolicy::runtime::Runtime`]: what is written against that trait runs over mistral.rs and over
//! candle alike.
//!
//! # Gates
//!
//! `dms` takes the gates of the model's folder, as NVIDIA's and Shisa's checkpoints and `kvpolicy export` have them, or those
//! that `dms:weights=` names, as a training writes them. For a model without any, such as a GGUF file, it takes those inside
//! kvpolicy-candle that were trained for its weights ([`kvpolicy_candle::GateChoice`]).

mod error;
mod hosted;
mod hosting;
mod loading;
mod room;
mod runtime;
mod spec;
mod text;

pub use error::{Error, Result};
pub use hosted::Served;
pub use hosting::{CacheOptions, Figures, Hosting, register};
pub use loading::{Loaded, load};
pub use mistralrs_core::kv_policy::unregister;
pub use runtime::MistralRuntime;
