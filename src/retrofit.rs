//! Training a model to decide what it will not need: the parts of a DMS retrofit (arXiv 2506.05345) that depend on no
//! model. A host brings the model's own forward and backward pass.
//!
//! Gates are soft while they learn: a decision, with noise, adds the log-probability of keeping a token to its attention
//! scores once the token has left the window ([`SoftGates`], [`SoftAttention`]). A distillation loss holds the model to its
//! own dense answers, and a one-sided loss asks for the compression of the [`Schedule`].
//!
//! Gradients are written out by hand: nothing records a graph, and no `[heads, tokens, tokens]` tensor exists.

mod adamw;
mod attention;
pub mod facts;
mod gating;
pub mod losses;
mod schedule;

pub use adamw::{AdamW, AdamWConfig, Named, accumulate};
pub use attention::{SoftAttention, SoftGrads};
pub use gating::{HIDDEN, SoftGates, compression_loss, hard_keep};
pub use schedule::{Rate, Schedule};
