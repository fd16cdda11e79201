use crate::{
    error::Result,
    params::{Amount, Auto, AutoOr},
    policies::ops,
    policy::*,
};

crate::policy_params! {
    /// Heavy-Hitter Oracle: keeps the entries that drew the most attention, and the newest ones.
    /// Attention is summed over every query of the prefill and of decode and over the GQA group, per KV head.
    pub struct H2o = "h2o", paper "arXiv 2306.14048" {
        /// Entries each KV head keeps, the newest included.
        budget: Amount, in ..;
        /// Newest entries that are never dropped; their sums are still noise. `auto` is half of the budget, as in the
        /// paper; 32 where the budget is a share of the tokens seen.
        recent: Auto<u32> = Auto(None), in AutoOr(0..=1 << 30);
        /// Rank by the mean over the queries that could see an entry, not by the sum (kvpress's ObservedAttention).
        normalise: bool = false, in ..;
    }
}

impl H2o {
    fn recent(&self) -> u32 {
        self.recent.0.unwrap_or(match self.budget {
            Amount::Entries(n) => u32::try_from(n / 2).unwrap_or(u32::MAX),
            Amount::Share(_) => 32,
        })
    }
}

impl Policy for H2o {
    fn faults(&self) -> Vec<String> {
        self.budget.too_small_for("recent", self.recent() as usize).into_iter().collect()
    }

    fn needs(&self, _: &LayerCx) -> Needs {
        Needs { attn_mass: Some(1.0), ..Needs::default() }
    }

    fn protect(&self, _: &LayerCx) -> Protect {
        Protect { recent: self.recent(), ..Protect::default() }
    }

    fn budget(&self, _: &LayerCx, seen: usize) -> Budget {
        Budget::PerHead(self.budget.of(seen))
    }

    fn when(&self, _: &LayerCx) -> When {
        When::ALWAYS
    }

    fn score(&self, cx: &LayerCx, held: &dyn Held) -> Result<Score> {
        if !self.normalise {
            return Ok(Score::Carried);
        }
        let scores = held.scores()?;
        let seen = ops::seen(held, scores.device())?; // [rows, 1]
        let queries = seen.broadcast_sub(&held.positions()?)?; // a query sees an entry from its own position on
        let mean = (scores / queries.clamp(1f32, f32::MAX)?)?;
        Ok(Score::Dense((mean / cx.spec.group() as f64)?))
    }
}
