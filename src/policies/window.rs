use crate::{error::Result, policy::*};

crate::policy_params! {
    /// Keeps the first `sinks` tokens and the newest `size`. StreamingLLM is `sinks=4`.
    /// Keys keep the rotation of their true position; the paper rotates them to their place in the cache instead.
    pub struct Window = "window", paper "StreamingLLM, arXiv 2309.17453" {
        /// Newest tokens that stay, the current one included.
        size: u32, in 1..=1 << 30;
        /// First tokens that stay.
        sinks: u32 = 0, in 0..=1 << 30;
    }
}

impl Policy for Window {
    fn protect(&self, _: &LayerCx) -> Protect {
        Protect { sinks: self.sinks, recent: self.size }
    }

    /// Every token is marked, so each dies as the window passes it.
    fn on_write(&self, _: &LayerCx, _: &NewTokens) -> Result<Verdict> {
        Ok(Verdict { evict: Evict::Always, score: None })
    }
}
