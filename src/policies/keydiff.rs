use crate::{error::Result, params::Amount, policies::ops, policy::*};

crate::policy_params! {
    /// KeyDiff: drops the keys that look most like the average key. Ranked once over the whole prompt at the end of
    /// a prefill (the paper works block by block); `every(n, keydiff:..)` repeats it in decode.
    pub struct KeyDiff = "keydiff", paper "arXiv 2504.15364" {
        /// Entries each KV head keeps.
        budget: Amount, in ..;
        /// Newest entries that are never dropped.
        recent: u32 = 0, in 0..=1 << 30;
    }
}

impl Policy for KeyDiff {
    fn faults(&self) -> Vec<String> {
        self.budget.too_small_for("recent", self.recent as usize).into_iter().collect()
    }

    fn protect(&self, _: &LayerCx) -> Protect {
        Protect { recent: self.recent, ..Protect::default() }
    }

    fn budget(&self, _: &LayerCx, seen: usize) -> Budget {
        Budget::PerHead(self.budget.of(seen))
    }

    fn when(&self, _: &LayerCx) -> When {
        When::PREFILL_END
    }

    /// Minus the cosine with the mean of the unit keys.
    fn score(&self, _: &LayerCx, held: &dyn Held) -> Result<Score> {
        let keys = held.keys()?;
        let unit = keys.broadcast_div(&ops::norm(&keys, 1e-12)?)?; // padding stays zero
        let sum = unit.sum_keepdim(1)?; // the cosine does not see the mean's length
        let anchor = sum.broadcast_div(&ops::norm(&sum, 1e-12)?)?;
        Ok(Score::Dense(unit.broadcast_mul(&anchor)?.sum(2)?.neg()?))
    }
}
