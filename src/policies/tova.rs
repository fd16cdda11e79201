use crate::{params::Amount, policy::*};

crate::policy_params! {
    /// Token Omission Via Attention: drops what the newest query looks at least.
    /// The attention is averaged over all query heads of the layer, so every KV head holds the same positions.
    pub struct Tova = "tova", paper "arXiv 2401.06104" {
        /// Entries each KV head keeps.
        budget: Amount, in ..;
        /// Newest entries that are never dropped. The paper shields none, kvpress one.
        recent: u32 = 0, in 0..=1 << 30;
    }
}

impl Policy for Tova {
    fn faults(&self) -> Vec<String> {
        self.budget.too_small_for("recent", self.recent as usize).into_iter().collect()
    }

    fn needs(&self, _: &LayerCx) -> Needs {
        Needs { attn_mass: Some(0.0), layer_mass: true, ..Needs::default() } // only the newest query counts
    }

    fn protect(&self, _: &LayerCx) -> Protect {
        Protect { recent: self.recent, ..Protect::default() }
    }

    fn budget(&self, _: &LayerCx, seen: usize) -> Budget {
        Budget::PerHead(self.budget.of(seen))
    }

    fn when(&self, _: &LayerCx) -> When {
        When::ALWAYS
    }

    fn same_for_all_heads(&self) -> bool {
        true
    }
}
