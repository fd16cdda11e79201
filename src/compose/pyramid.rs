use crate::{
    ModelSpec,
    compose::{budget_misfits, forward},
    policy::*,
};

crate::policy_params! {
    /// PyramidKV: the same total over the model, more for early layers, falling linearly from layer to layer.
    /// The inner policy's newest protected entries count inside the budgets, as in kvpress (the official code keeps
    /// them on top). Where the pyramid would leave the range from those entries to the tokens seen, it is flat.
    pub struct Pyramid = "pyramid", paper "arXiv 2406.02069" {
        /// Steepness: the last layer gets 1/beta of the mean budget.
        beta: f64 = 20.0, in 1.0..=1e6;
    }
    wraps inner
}

impl Policy for Pyramid {
    forward!(inner: faults, needs, protect, on_write, when, score, same_for_all_heads);

    fn misfits(&self, spec: &ModelSpec) -> Vec<String> {
        budget_misfits(("pyramid", "to tilt"), &*self.inner, spec)
    }

    fn budget(&self, cx: &LayerCx, seen: usize) -> Budget {
        let window = self.inner.protect(cx).recent as f64;
        let tilted = |mean: f64| layer_budget(mean, window, self.beta, seen as f64, cx);
        match self.inner.budget(cx, seen) {
            Budget::PerHead(mean) => Budget::PerHead(tilted(mean)),
            Budget::Pooled { total, floor } => {
                let mean = total as f64 / cx.spec.kv_heads as f64;
                let own = tilted(mean);
                Budget::Pooled {
                    total: own as usize * cx.spec.kv_heads,
                    floor: (floor as f64 * own / mean.max(1.0)) as usize,
                }
            }
            other => other,
        }
    }
}

fn layer_budget(mean: f64, window: f64, beta: f64, seen: f64, cx: &LayerCx) -> f64 {
    let capacity = (window + mean) - window; // rounded as kvpress rounds it
    let mut low = capacity / beta;
    let mut high = capacity * 2.0 - low;
    if high >= seen - window {
        high = seen - window;
        low = capacity * 2.0 - high;
    }
    let sloped = seen >= high && high >= low && low >= window && cx.spec.layers > 1;
    if !sloped {
        return mean.round_ties_even();
    }
    let step = (high - low) / (cx.spec.layers - 1) as f64;
    (high - cx.layer as f64 * step).round_ties_even()
}
