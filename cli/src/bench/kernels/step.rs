//! What a decode step launches beside attention, over rows of one length, as a budget leaves them.

use super::{
    Bench, Kernel, Work,
    ragged::{cold_layers, random},
    rig::{Rig, SLACK, Size, Tokens},
};
use crate::bench::timer::{time_graph, time_graph_after};
use anyhow::Result;
use cudarc::driver::DevicePtr;
use half::bf16;
use kvpolicy_kernels::{Dtype, Gate, Kernels};

/// Layers of a plan: a small model's.
const PLANNED: usize = 16;

impl Bench<'_> {
    pub(super) fn step(&mut self) -> Result<()> {
        use Kernel::{Append, Held, Mass, Observe, Trim};
        if [Append, Held, Mass, Observe, Trim].into_iter().any(|kernel| self.wants(kernel)) {
            let held = self.mean() as usize;
            let layers = cold_layers(self.heads, Dtype::Bf16, self.batch, held as f64);
            let rig = self.rig(layers, held)?;
            let step = Tokens::new(&self.stream, self.batch, held, 1)?;
            rig.plan(&step)?;
            (0..layers).try_for_each(|layer| rig.append(layer, &step))?;
            self.write(&rig, &step)?;
            self.score(&rig, &step)?;
            self.view(&rig, &step)?;
            self.drop_one(&rig, &step)?;
        }
        self.plan()?;
        self.gate()
    }

    fn rig(&self, layers: usize, held: usize) -> Result<Rig> {
        let (heads, batch, page_size) = (self.heads, self.batch, self.args.page_size);
        Rig::new(&self.stream, Size { heads, batch, layers, held, queries: batch, page_size })
    }

    /// Rows of a layer.
    fn rows(&self) -> f64 {
        (self.batch * self.heads.kv) as f64
    }

    /// Entries of a layer with the step's.
    fn entries(&self, rig: &Rig) -> f64 {
        self.rows() * (rig.held + 1) as f64
    }

    fn write(&mut self, rig: &Rig, step: &Tokens) -> Result<()> {
        let (heads, tokens) = (self.heads, step.count as f64);
        if self.wants(Kernel::Append) {
            let bytes = self.rows() * (8 * heads.dim + 8) as f64; // key and value in and out, position and score
            self.add("append, a step", Work::Moves(bytes), rig.layers, |layer| rig.append(layer, step))?;
        }
        if self.wants(Kernel::Observe) {
            let bytes = tokens * (heads.q * heads.dim * 6) as f64; // bf16 in, f32 out
            self.add("observe, a step", Work::Moves(bytes), 1, |_| rig.observe(step))?;
        }
        Ok(())
    }

    fn score(&mut self, rig: &Rig, step: &Tokens) -> Result<()> {
        if !self.wants(Kernel::Mass) {
            return Ok(());
        }
        let entries = self.entries(rig);
        let mass = entries * (2 * self.heads.dim + 12) as f64; // a key, position and score in, score out
        self.add("mass, a step (h2o)", Work::Reads(mass), rig.layers, |layer| rig.mass(layer, step, false))?;
        let tova = mass + entries * 8.0; // the score in and out once more
        self.add("mass, a step (tova)", Work::Reads(tova), rig.layers, |layer| rig.mass(layer, step, true))
    }

    fn view(&mut self, rig: &Rig, step: &Tokens) -> Result<()> {
        if !self.wants(Kernel::Held) {
            return Ok(());
        }
        let entries = self.entries(rig);
        let order = Work::Moves(entries * 12.0); // positions in twice, slots out
        self.add("held: order", order, rig.layers, |layer| rig.order(layer, step))?;
        let gather = Work::Moves(entries * (4 + 6 * self.heads.dim) as f64); // slot and key in, f32 out
        self.add("held: gather keys", gather, rig.layers, |layer| rig.gather(layer, step))
    }

    fn drop_one(&mut self, rig: &Rig, step: &Tokens) -> Result<()> {
        if !self.wants(Kernel::Trim) {
            return Ok(());
        }
        let (budget, longest) = (rig.budget(rig.held + 1)?, rig.held + 2);
        let grow = || {
            rig.plan(step)?;
            (0..rig.layers).try_for_each(|layer| rig.append(layer, step))
        };
        let trim = || (0..rig.layers).try_for_each(|layer| rig.trim(layer, step, &budget, longest));
        let time = time_graph_after(&self.stream, (3, 30), rig.layers, grow, trim)?;
        // Position and score of each entry, and one that moves.
        let bytes = self.rows() * (longest * 8 + 8 * self.heads.dim + 16) as f64;
        self.push("trim, one of each row", (Work::Reads(bytes), time), None);
        Ok(())
    }

    fn plan(&mut self) -> Result<()> {
        if !self.wants(Kernel::Plan) {
            return Ok(());
        }
        let rig = self.rig(PLANNED, 64)?;
        let step = Tokens::new(&self.stream, self.batch, 64, 1)?;
        // Each makes the rows longer.
        let (plans, repetitions) = (8, (2, 20));
        debug_assert!(plans * (repetitions.0 + repetitions.1) < SLACK);
        let time = time_graph(&self.stream, repetitions, plans, || (0..plans).try_for_each(|_| rig.plan(&step)))?;
        // Length and owned pages in and out, target out and in.
        let bytes = PLANNED as f64 * self.rows() * 24.0;
        self.push(&format!("plan, {PLANNED} layers"), (Work::Moves(bytes), time), None);
        Ok(())
    }

    fn gate(&mut self) -> Result<()> {
        if !self.wants(Kernel::Gate) {
            return Ok(());
        }
        let (tokens, hidden, heads) = (self.batch, self.heads.q * self.heads.dim, self.heads.kv);
        let kernels = Kernels::of(self.stream.context())?;
        let (x, norm) = (random(&self.stream, tokens * hidden)?, random(&self.stream, hidden)?);
        let layers = 64;
        let weight = random(&self.stream, layers * heads * hidden)?;
        let logits = self.stream.alloc_zeros::<f32>(tokens * heads)?;
        let params = Gate {
            x: x.device_ptr(&self.stream).0,
            norm: norm.device_ptr(&self.stream).0,
            weight: weight.device_ptr(&self.stream).0,
            bias: 0,
            logits: logits.device_ptr(&self.stream).0,
            tokens: tokens as u32,
            hidden: hidden as u32,
            heads: heads as u32,
            eps: 1e-5,
            scale: 1.0,
            offset: 0.0,
        };
        let stream = self.stream.clone();
        let launch = |layer: usize| {
            let weight = params.weight + (layer * heads * hidden * size_of::<bf16>()) as u64;
            // SAFETY: every buffer was made for this shape.
            Ok(unsafe { kernels.gate(&stream, Dtype::Bf16, &Gate { weight, ..params }) }?)
        };
        let bytes = ((tokens + 1 + heads) * hidden * size_of::<bf16>() + tokens * heads * size_of::<f32>()) as f64;
        self.add("gate, a step", Work::Reads(bytes), layers, launch)
    }
}
