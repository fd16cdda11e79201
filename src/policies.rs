//! The policies, one file each.

mod dms;
mod expected_attention;
mod full;
mod h2o;
mod keydiff;
mod knorm;
mod ops;
mod random;
mod rkv;
mod snapkv;
mod tova;
mod window;

pub use dms::Dms;
pub use expected_attention::ExpectedAttention;
pub use full::Full;
pub use h2o::H2o;
pub use keydiff::KeyDiff;
pub use knorm::Knorm;
pub use random::{Random, RandomGate};
pub use rkv::Rkv;
pub use snapkv::{Pooling, SnapKv};
pub use tova::Tova;
pub use window::Window;
