//! Llama, Mistral, Phi-3, Qwen2, Qwen3, SmolLM3 and Gemma 3 on candle, their keys and values in a [`kvpolicy::KvCache`].
//!
//! # A first model
//!
//! [`Lm`] is a model with what belongs to it: tokenizer, chat template, gates. [`Lm::load`] takes a folder of
//! safetensors, a GGUF file or a hub id; [`Lm::embedded`] the small model inside this crate. A policy is named by a
//! string, and a [`Session`] is one sequence under it:
//!
//! ```
//! use kvpolicy_candle::{Lm, LoadOptions};
//!
//! # fn main() -> kvpolicy_candle::Result<()> {
//! let lm = Lm::embedded(&LoadOptions::default())?;
//! let policy = kvpolicy::Registry::standard().parse("window:size=32,sinks=4")?;
//! let mut session = lm.session(policy, &Default::default())?;
//! let mut logits = session.prefill(&lm.tokenizer().encode(&lm.chat("ba-ke ke-di di-ba\n")?)?, true)?;
//! for _ in 0..100 {
//!     let token = logits.argmax(0)?.to_scalar::<u32>()?;
//!     if lm.tokenizer().is_eos(token) {
//!         break;
//!     }
//!     logits = session.decode(token)?;
//! }
//! let held = session.cache().held_positions(0, session.seq(), 0); // of layer 0, KV head 0
//! assert!(held.len() <= 36 && session.stats().peak_bytes > 0);
//! # Ok(())
//! # }
//! ```
//!
//! # DMS
//!
//! `dms` asks the model which tokens to keep. The decisions come from [`Gates`]: of the checkpoint, where it was
//! trained with some (NVIDIA's and Shisa's published layouts load as they are), of a file (`dms:weights=FILE`), or
//! those that this crate brings for a model it knows by the hash of its weights. The small model has its own:
//!
//! ```
//! # use kvpolicy_candle::{Lm, LoadOptions};
//! # fn main() -> kvpolicy_candle::Result<()> {
//! let lm = Lm::embedded(&LoadOptions::default())?;
//! let mut session = lm.session(kvpolicy::Registry::standard().parse("dms")?, &Default::default())?;
//! session.prefill(&lm.tokenizer().encode(&"the boat waits near the mill. ".repeat(20))?, true)?;
//! assert!(session.stats().evicted > 0 && session.stats().compression() > 1.0);
//! # Ok(())
//! # }
//! ```
//!
//! [`retrofit`] trains gates, [`Export`] writes them with their model, [`extract_gates`] takes them out again,
//! [`Inspection`] says what is in a file.
//!
//! # Moving a candle program over
//!
//! A program with a model of its own keeps it. Where its attention appends to a cache and attends,
//!
//! ```text
//! let (k, v) = self.kv_cache.append(&k, &v)?;                     // [batch, kv_heads, tokens, head_dim]
//! let k = repeat_kv(k, self.group)?;
//! let v = repeat_kv(v, self.group)?;
//! let scores = (q.matmul(&k.t()?)? * scale)?;
//! let scores = scores.broadcast_add(mask)?;
//! let y = softmax_last_dim(&scores)?.matmul(&v)?;
//! ```
//!
//! it asks the cache instead, with tokens in front of heads (no transpose, no mask, no repetition of keys):
//!
//! ```text
//! let y = cache.attend(layer, step, &step.tokens(q, k, v, None))?; // [tokens, heads, head_dim]
//! ```
//!
//! and around the forward pass a step begins and ends:
//!
//! ```text
//! let step = cache.begin(&[(seq, tokens.len(), Phase::Prefill { last: true })])?;
//! let logits = model.forward(&tokens, &step, &mut cache)?;
//! cache.end(step);
//! ```

mod chat;
mod config;
pub mod demo;
mod error;
mod export;
mod folder;
mod gate_choice;
mod gates;
mod gguf_header;
#[cfg(feature = "hub")]
mod hub;
mod inspect;
mod key_range;
mod loader;
mod model;
pub mod ops;
mod presets;
pub mod retrofit;
mod runtime;
mod session;
mod shape;
mod shipped;
mod subject;
mod tensor_file;
mod tokenizer;
mod weights;

pub use chat::{ChatTemplate, Message};
pub use config::{Activation, Arch, Config, OtherLayers};
pub use error::{Error, Result};
pub use export::{Export, Exported, GateLayout, Merged, extract_gates};
pub use gate_choice::GateChoice;
pub use gates::Gates;
pub use inspect::{GatesSummary, Inspection, LayerGates, ModelSummary, TensorSummary};
pub use loader::{Lm, LoadOptions, weights_sha256};
pub use model::Model;
pub use runtime::CandleRuntime;
pub use session::{Chains, Session, SessionOptions};
pub use shape::{Page, Shape};
pub use subject::Hosted;
pub use tokenizer::{TextStream, Tokenizer};
