//! CUDA kernels of kvpolicy and their launchers. Without the feature `cuda` this crate is empty.
//!
//! A launcher takes addresses and numbers and enqueues one kernel on a stream; it checks nothing. Shapes, dtypes and
//! lifetimes are the caller's: the CUDA backend of `kvpolicy` and the model code of `kvpolicy-candle`. Every kernel takes
//! one `#[repr(C)]` structure by value, declared beside it in `cuda/`.
#![cfg(feature = "cuda")]

mod model;
mod module;
mod store;

pub use model::{AddBias, Argmax, Draw, Fill, Gate, Heads, Matvec, RmsNorm, SiluMul, Threshold};
pub use module::{Dtype, Kernels};
pub use store::{Address, Counters, Protect, Ring, Span, Store};
