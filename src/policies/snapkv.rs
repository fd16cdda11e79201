use crate::{error::Result, params::Amount, policies::ops, policy::*, spec::keyword_param};
use std::fmt;

/// How neighbouring entries share their scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pooling {
    /// Mean of the neighbours.
    Avg,
    /// Largest of the neighbours.
    Max,
}
keyword_param!(Pooling: Avg = "avg", Max = "max");
use crate::params::Param;

crate::policy_params! {
    /// SnapKV: at the end of a prefill, keeps what the newest `window` queries look at, smoothed over neighbours.
    /// Weights are averaged over the queries and over the GQA group (the official code ranks per query head, over
    /// repeated keys). Write `every(n, snapkv:..)` to repeat it every n decode steps.
    pub struct SnapKv = "snapkv", paper "arXiv 2404.14469" {
        /// Entries each KV head keeps, the window included.
        budget: Amount, in ..;
        /// Queries at the end of the prompt that vote; their own entries always stay.
        window: u32 = 32, in 1..=4096;
        /// Width of the smoothing, odd.
        kernel: u32 = 5, in 1..=255;
        /// Smoothing by mean or by maximum.
        pool: Pooling = Pooling::Avg, in ..;
    }
}

impl Policy for SnapKv {
    fn faults(&self) -> Vec<String> {
        let even = self.kernel.is_multiple_of(2).then(|| format!("kernel={} is even: take an odd width", self.kernel));
        even.into_iter().chain(self.budget.too_small_for("window", self.window as usize)).collect()
    }

    fn needs(&self, _: &LayerCx) -> Needs {
        Needs { last_queries: self.window as usize, ..Needs::default() }
    }

    fn protect(&self, _: &LayerCx) -> Protect {
        Protect { recent: self.window, ..Protect::default() }
    }

    fn budget(&self, _: &LayerCx, seen: usize) -> Budget {
        Budget::PerHead(self.budget.of(seen))
    }

    fn when(&self, _: &LayerCx) -> When {
        When::PREFILL_END
    }

    fn score(&self, _: &LayerCx, held: &dyn Held) -> Result<Score> {
        let votes = held.attention_of_last_queries()?.mean(2)?; // [rows, group, len]
        let votes = votes.broadcast_mul(&ops::older_than(held, self.window)?.unsqueeze(1)?)?;
        let pooled = match self.pool {
            Pooling::Avg => ops::average_pool(&votes, self.kernel as usize)?,
            Pooling::Max => ops::max_pool(&votes, self.kernel as usize)?,
        };
        Ok(Score::Dense(pooled.mean(1)?))
    }
}
