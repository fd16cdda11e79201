//! What training a model's gates needs beside the model: so that its heads learn which tokens to drop, with the weights
//! of the model left alone or trained along.
//!
//! While it is trained a gate is soft: each key has a probability to be kept, and where a hard gate would have evicted
//! the key, attention is weighted by that probability. [`SoftAttention`] computes this and its gradients with no tensor
//! of the size of the square of the length.

mod attention;

pub use attention::{SoftAttention, SoftGrads};
