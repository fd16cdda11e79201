//! A policy of your own in the `kvpolicy` program: declared, registered, named by its string, compared with the others.
//!
//! ```text
//! cargo run --release --example my_policy -- policies stride
//! cargo run --release --example my_policy -- compare --model model.gguf --text novel.txt \
//!     --policies "full;window:size=256;stride:window=128,every=8"
//! ```

use candle_core::Tensor;
use kvpolicy::{Evict, Lag, LayerCx, NewTokens, Policy, Protect, Registry, Result, Verdict};

kvpolicy::policy_params! {
    /// Keeps the newest tokens, and of the older ones every n-th. Each KV head starts its count at another token, so
    /// that together they miss less.
    struct Stride = "stride", paper "none: an example" {
        /// Newest tokens that all stay.
        window: u32 = 8, in 1..=1 << 20;
        /// Of the older tokens, one in so many stays.
        every: u32, in 2..=1 << 20;
    }
}

impl Policy for Stride {
    /// A marked token stays as long as it is protected.
    fn protect(&self, _: &LayerCx) -> Protect {
        Protect { recent: self.window, ..Protect::default() }
    }

    /// Marks the tokens that will go, all on the device: a policy never reads a tensor back.
    fn on_write(&self, cx: &LayerCx, new: &NewTokens) -> Result<Verdict> {
        let device = new.positions.device();
        let heads = Tensor::arange(0u32, cx.spec.kv_heads as u32, device)?;
        let count = new.positions.unsqueeze(1)?.broadcast_add(&heads)?; // [tokens, kv_heads]
        let every = Tensor::new(self.every, device)?.broadcast_as(count.shape())?;
        let bits = ((&count / &every)? * &every)?.ne(&count)?; // whole numbers: the quotient is rounded down
        Ok(Verdict { evict: Evict::Bits { bits, lag: Lag::Own }, score: None })
    }
}

fn main() -> std::process::ExitCode {
    let mut registry = Registry::standard();
    registry.add::<Stride>();
    kvpolicy_cli::run(registry)
}
