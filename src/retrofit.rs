//! Training a model to evict: what the losses are, and their gradients.

pub mod losses;
