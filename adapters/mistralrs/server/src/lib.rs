//! An OpenAI-compatible server on mistral.rs whose models run under KV cache policies.
//!
//! ```text
//! kvpolicy-serve --model DIR --policy tova:budget=25% --policy full --kv-memory 2GiB
//! ```
//!
//! `kvpolicy-serve compare --model DIR --tasks word-key-aware --policies "full;tova:budget=25%"` compares policies as `kvpolicy
//! compare` does, with the same options, table and results: see [`compare`].
//!
//! Every policy is a model of its own to clients: its name is the policy's text as it was given, and `default` is the first. So a client
//! chooses a policy with each request, and comparing two is a matter of two names. Each has its own copy of the weights and
//! its own pool of `--kv-memory`.
//!
//! | route | |
//! |---|---|
//! | `POST /v1/chat/completions`, `POST /v1/completions` | as OpenAI's, streamed or not |
//! | `GET /v1/models` | the policies |
//! | `GET /metrics` | for Prometheus: what each policy holds, dropped and served |
//! | `GET /health` | |
//!
//! A request that cannot be served as it is gets 400 with the reason, also where only the engine finds it, as for a grammar
//! that is none or a prompt that no memory suffices for: the status of a stream too comes with its first token. An error
//! after that is told within the stream. A client that leaves gives its memory back, and so does one that reads too slowly.

mod answers;
pub mod compare;
mod error;
mod metrics;
mod models;
mod request;
mod routes;

pub use error::{Error, Result};
pub use kvpolicy_cli::{KvType, Place};
pub use models::{Options, Served};
pub use routes::router;
