//! What a prompt's layer launches, one sequence.

use super::{
    Bench, Kernel, Work,
    ragged::cold_layers,
    rig::{Prefill, Rig, Size, Tokens},
};
use crate::bench::timer::time_graph_after;
use anyhow::Result;
use kvpolicy_kernels::Dtype;

/// Tokens of a chunk.
const CHUNK: usize = 1024;

impl Bench<'_> {
    pub(super) fn prompt(&mut self) -> Result<()> {
        use Kernel::{Append, Mass, Trim};
        if ![Append, Kernel::Prefill, Mass, Trim].into_iter().any(|kernel| self.wants(kernel)) {
            return Ok(());
        }
        let (heads, context, page_size) = (self.heads, self.context, self.args.page_size);
        let layers = cold_layers(heads, Dtype::Bf16, 1, context as f64);
        let size = Size { heads, batch: 1, layers, held: context, queries: context, page_size };
        let rig = Rig::new(&self.stream, size)?;
        self.append_chunk(&rig)?;
        self.attend(&rig)?;
        self.drop_most(&rig)
    }

    fn append_chunk(&mut self, rig: &Rig) -> Result<()> {
        if !self.wants(Kernel::Append) {
            return Ok(());
        }
        let chunk = Tokens::new(&self.stream, 1, 0, CHUNK.min(self.context))?;
        let bytes = (chunk.count * self.heads.kv * (8 * self.heads.dim + 8)) as f64;
        let kernel = format!("append, {} tokens", chunk.count);
        self.add(&kernel, Work::Moves(bytes), rig.layers, |layer| rig.append(layer, &chunk))
    }

    /// Attention, and the mass of every query, which takes attention's softmax sums.
    fn attend(&mut self, rig: &Rig) -> Result<()> {
        let Some(prefill) = Prefill::new(rig)? else { return Ok(()) };
        // Keys before each query: half of the square; a multiplication and an addition each.
        let product = (self.context as f64).powi(2) * (self.heads.q * self.heads.dim) as f64;
        if self.wants(Kernel::Prefill) {
            let work = Work::Computes(2.0 * product);
            self.add("prefill attention", work, rig.layers, |layer| rig.prefill(layer, &prefill))?;
        }
        if self.wants(Kernel::Mass) {
            rig.prefill(0, &prefill)?;
            let mass = |layer| rig.mass(layer, &rig.fill, false);
            self.add("mass, a prompt (h2o)", Work::Computes(product), rig.layers, mass)?;
        }
        Ok(())
    }

    /// The end of a prompt under a budget.
    fn drop_most(&mut self, rig: &Rig) -> Result<()> {
        if !self.wants(Kernel::Trim) {
            return Ok(());
        }
        let keep = self.mean() as usize;
        let budget = rig.budget(keep)?;
        let trim = || (0..rig.layers).try_for_each(|layer| rig.trim(layer, &rig.fill, &budget, self.context));
        let time = time_graph_after(&self.stream, (2, 15), rig.layers, || rig.refill(), trim)?;
        // Position and score of each entry; of those that stay, the ones beyond the new length move.
        let moved = keep as f64 * (1.0 - keep as f64 / self.context as f64);
        let bytes = self.heads.kv as f64 * (self.context as f64 * 8.0 + moved * (8 * self.heads.dim + 16) as f64);
        self.push(&format!("trim, a prompt to {keep}"), (Work::Moves(bytes), time), None);
        Ok(())
    }
}
