//! Prepares a cargo project so that the runtime it uses can hand its KV cache to a policy.
//!
//! A runtime that offers no way in needs a patch. `kv-host` has cargo fetch the published source, checks that it is the
//! one the patch was made for, and writes a patched copy beside the project, with the `[patch.crates-io]` entry that
//! makes cargo use it:
//!
//! ```text
//! kv-host mistralrs           # .kv-host/ and .cargo/config.toml; commit both or neither
//! kv-host mistralrs --undo
//! ```
//!
//! The patch is a list of [edits by line number](edits) and a few whole files of our own: it quotes nothing upstream.

mod config;
pub mod edits;
mod error;
mod fetch;
mod hosts;
mod project;
mod tree;

pub use error::{Error, Result};
pub use fetch::{Network, source};
pub use hosts::{Host, MISTRALRS};
pub use project::{Change, install, undo};
pub use tree::digest;
