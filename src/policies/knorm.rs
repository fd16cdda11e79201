use crate::{error::Result, params::Amount, policy::*};

crate::policy_params! {
    /// Key norm: keys of small norm draw attention, so they stay. The score never changes; it is taken at write.
    pub struct Knorm = "knorm", paper "arXiv 2406.11430" {
        /// Entries each KV head keeps.
        budget: Amount, in ..;
        /// Newest entries that are never dropped.
        recent: u32 = 0, in 0..=1 << 30;
    }
}

impl Policy for Knorm {
    fn faults(&self) -> Vec<String> {
        self.budget.too_small_for("recent", self.recent as usize).into_iter().collect()
    }

    fn protect(&self, _: &LayerCx) -> Protect {
        Protect { recent: self.recent, ..Protect::default() }
    }

    fn on_write(&self, _: &LayerCx, new: &NewTokens) -> Result<Verdict> {
        let norm = new.k.to_dtype(candle_core::DType::F32)?.sqr()?.sum(2)?.sqrt()?;
        Ok(Verdict { evict: Evict::Never, score: Some(norm.neg()?) })
    }

    fn budget(&self, _: &LayerCx, seen: usize) -> Budget {
        Budget::PerHead(self.budget.of(seen))
    }

    fn when(&self, _: &LayerCx) -> When {
        When::PREFILL_END
    }
}
