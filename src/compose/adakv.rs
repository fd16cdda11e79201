use crate::{
    ModelSpec,
    compose::{budget_misfits, forward},
    policy::*,
};

crate::policy_params! {
    /// AdaKV: the KV heads of a layer share the inner policy's budget; its scores compete across heads.
    /// Each head is sure of a `floor` of its own budget, as in kvpress (the official code blends the shared with the
    /// even budget instead).
    pub struct AdaKv = "adakv", paper "arXiv 2407.11550" {
        /// Share of its own budget that each head is sure of.
        floor: f64 = 0.2, in 0.0..=1.0;
    }
    wraps inner
}

impl Policy for AdaKv {
    forward!(inner: needs, protect, on_write, when, score, same_for_all_heads);

    fn faults(&self) -> Vec<String> {
        let mut why = self.inner.faults();
        if self.inner.same_for_all_heads() {
            why.push(format!(
                "adakv: `{}` keeps the same positions in every KV head, there is nothing to share",
                self.inner
            ));
        }
        why
    }

    fn misfits(&self, spec: &ModelSpec) -> Vec<String> {
        budget_misfits(("adakv", "per head to share"), &*self.inner, spec)
    }

    fn budget(&self, cx: &LayerCx, seen: usize) -> Budget {
        match self.inner.budget(cx, seen) {
            Budget::PerHead(n) => {
                let own = n as usize;
                Budget::Pooled { total: own * cx.spec.kv_heads, floor: (own as f64 * self.floor) as usize }
            }
            other => other,
        }
    }
}
