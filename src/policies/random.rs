use crate::{error::Result, ops, params::Amount, policy::*, spec::Lag};

crate::policy_params! {
    /// Keeps a random choice: what a policy must beat. The same seed keeps the same positions.
    pub struct Random = "random", paper "baseline" {
        /// Entries each KV head keeps.
        budget: Amount, in ..;
        /// Newest entries that are never dropped.
        recent: u32 = 0, in 0..=1 << 30;
        /// Chooses the choice.
        seed: u64 = 0, in ..;
    }
}

impl Policy for Random {
    fn faults(&self) -> Vec<String> {
        self.budget.too_small_for("recent", self.recent as usize).into_iter().collect()
    }

    fn protect(&self, _: &LayerCx) -> Protect {
        Protect { recent: self.recent, ..Protect::default() }
    }

    fn on_write(&self, cx: &LayerCx, new: &NewTokens) -> Result<Verdict> {
        let score = ops::random_scores(&new.positions, cx.spec.kv_heads, stream(self.seed, cx))?;
        Ok(Verdict { evict: Evict::Never, score: Some(score) })
    }

    fn budget(&self, _: &LayerCx, seen: usize) -> Budget {
        Budget::PerHead(self.budget.of(seen))
    }

    fn when(&self, _: &LayerCx) -> When {
        When::ALWAYS
    }
}

crate::policy_params! {
    /// Random decisions with delayed eviction: the load of a learned gate without a model that has one, for
    /// benchmarks. A share `rate` of the tokens dies `window` tokens after it was written, per KV head.
    pub struct RandomGate = "random-gate", paper "synthetic" {
        /// Share of the tokens that are marked.
        rate: f64, in 0.0..=1.0;
        /// A marked entry stays visible while `query - key <= window`.
        window: u32 = 256, in 0..=1 << 30;
        /// Chooses the decisions.
        seed: u64 = 0, in ..;
    }
}

impl Policy for RandomGate {
    fn protect(&self, _: &LayerCx) -> Protect {
        Protect { recent: self.window + 1, ..Protect::default() }
    }

    fn on_write(&self, cx: &LayerCx, new: &NewTokens) -> Result<Verdict> {
        let bits = ops::random_bits(&new.positions, cx.spec.kv_heads, stream(self.seed, cx), self.rate)?;
        Ok(Verdict { evict: Evict::Bits { bits, lag: Lag::Own }, score: None })
    }
}

/// Mixed, so that a layer's stream is not its neighbour's, shifted.
fn stream(seed: u64, cx: &LayerCx) -> u64 {
    ops::splitmix(&mut (seed ^ ops::splitmix(&mut (cx.layer as u64))))
}
