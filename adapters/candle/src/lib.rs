//! Llama, Qwen2 and Qwen3 on candle, their keys and values in a [`kvpolicy::KvCache`].
//!
//! ```no_run
//! use kvpolicy_candle::{LoadOptions, Lm};
//!
//! # fn main() -> kvpolicy_candle::Result<()> {
//! let lm = Lm::load("model.gguf", &LoadOptions::default())?;
//! let policy = kvpolicy::Registry::standard().parse("window:size=512,sinks=4")?;
//! let mut session = lm.session(policy, &Default::default())?;
//! let mut logits = session.prefill(&lm.tokenizer().encode(&lm.chat("Why is the sky blue?")?)?, true)?;
//! for _ in 0..100 {
//!     let token = logits.argmax(0)?.to_scalar::<u32>()?;
//!     if lm.tokenizer().is_eos(token) {
//!         break;
//!     }
//!     logits = session.decode(token)?;
//! }
//! println!("compression {:.1}x", session.stats().compression());
//! # Ok(())
//! # }
//! ```
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
mod gates;
mod gguf_header;
#[cfg(feature = "hub")]
mod hub;
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
mod tokenizer;
mod weights;

pub use chat::{ChatTemplate, Message};
pub use config::{Arch, Config};
pub use error::{Error, Result};
pub use export::{Export, Exported, GateLayout, Merged};
pub use gates::Gates;
pub use loader::{Lm, LoadOptions, weights_sha256};
pub use model::Model;
pub use runtime::CandleRuntime;
pub use session::{Session, SessionOptions};
pub use shape::Shape;
pub use subject::Hosted;
pub use tokenizer::{TextStream, Tokenizer};
