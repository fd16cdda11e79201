//! CUDA kernels of kvpolicy and their launchers. Without the feature `cuda` this crate is empty.
//!
//! A launcher takes addresses and numbers and enqueues one kernel on a stream; it checks nothing. Shapes, dtypes and
//! lifetimes are the caller's: the CUDA backend of `kvpolicy` and the model code of `kvpolicy-candle`. Every kernel takes
//! one `#[repr(C)]` structure by value, declared beside it in `cuda/`.
#![cfg(feature = "cuda")]

mod append;
mod attend;
mod bench;
mod fork;
mod held;
mod losses;
mod mass;
mod model;
mod module;
mod observe;
mod plan;
mod prefill;
mod soft;
mod store;
mod train;
mod trim;

pub use append::{AppendParams, Marks, MultiplyParams};
pub use attend::{DecodeParams, DecodeShape, FAST_HEAD_DIMS, PlainParams};
pub use fork::{CopyPagesParams, ForkParams, UnshareParams};
pub use held::{GatherParams, LanesParams, ListedRows, OrderParams, PositionsParams, ScatterParams};
pub use losses::{CrossEntropy, Distil};
pub use mass::{MASS_TILE, MassParams};
pub use model::{AddBias, Argmax, Draw, Fill, Gate, Heads, Matvec, RmsNorm, SiluMul, Threshold};
pub use module::{Dtype, Kernels};
pub use observe::ObserveParams;
pub use plan::{BlockWork, LayerPlan, PlanParams, RowWork, ScheduleParams};
pub use prefill::{PrefillParams, PrefillShape};
pub use soft::{Soft, SoftBackward, SoftForward};
pub use store::{Address, Counters, Protect, Ring, Sharing, Span, Store};
pub use train::{RmsNormBackward, RmsNormWeight, SiluMulBackward};
pub use trim::{PooledBudget, TrimParams, UNLIMITED};
