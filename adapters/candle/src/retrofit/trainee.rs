//! A model with gates that learn: the losses of a batch and their gradients.

use super::{
    donors::Donors,
    pass::{BlockGrads, Pass},
    student::{Trains, is_neuron},
};
use crate::{
    error::{Error, Result},
    model::Model,
    ops::{self, GateWeights},
};
use candle_core::{DType, Tensor};
use kvpolicy::{
    GateSpec,
    retrofit::{Named, SoftGates, compression_loss, losses},
};

/// Which way the divergence between the model with gates and itself without is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Divergence {
    /// KL(with || without), NVIDIA's: the gates' model must not say what the dense one would not.
    Student,
    /// KL(without || with), which comparisons report: it must say all that the dense one would.
    Teacher,
}

/// What gates are trained for.
#[derive(Debug, Clone, Copy)]
pub struct Objective {
    /// Temperature of soft decisions.
    pub tau: f64,
    /// The share of decisions that are to evict.
    pub evicted: f64,
    /// Weight of the compression loss; the divergence has 1.
    pub compression: f64,
    /// Direction of the divergence.
    pub divergence: Divergence,
    /// Bytes of activations to keep for the backward pass; blocks beyond them are computed once more.
    pub activations: usize,
}

/// Sequences of equal length, end to end, where the model is.
#[derive(Debug, Clone)]
pub struct Batch {
    /// u32 `[sequences * length]`.
    pub tokens: Tensor,
    /// Of each position in the divergence, f32 `[sequences * length]`; they sum up to 1.
    pub weights: Tensor,
    /// How many.
    pub sequences: usize,
    /// Tokens of each.
    pub length: usize,
}

impl Batch {
    /// What follows each token, u32 `[sequences * length]`. After a sequence's last one comes another's first.
    pub(super) fn next_tokens(&self) -> Result<Tensor> {
        let tokens = self.sequences * self.length;
        Ok(Tensor::cat(&[self.tokens.narrow(0, 1, tokens - 1)?, self.tokens.narrow(0, 0, 1)?], 0)?)
    }
}

/// What a batch cost: f32 scalars where the model is, so that nothing waits for them.
#[derive(Debug, Clone)]
pub struct Losses {
    /// Divergence from the dense model, nats per token.
    pub divergence: Tensor,
    /// `max(target - evicted, 0)`.
    pub compression: Tensor,
    /// Share of hard decisions to evict.
    pub evicted: Tensor,
    /// The same of soft ones.
    pub soft: Tensor,
}

/// A dense model with gates: adapters, or neurons borrowed of its queries.
#[derive(Debug)]
pub struct Trainee<'a> {
    model: &'a Model,
    trains: Trains,
    donors: Option<Donors>,
    /// Window, lag and whether heads decide for themselves.
    pub gates: GateSpec,
    /// Factor of decision logits.
    pub scale: f64,
    /// Taken from them: where gates start.
    pub offset: f64,
}

/// Tokens whose logits exist at a time: as many as 2^28 of them allow.
pub(super) fn rows_at_a_time(vocab: usize) -> usize {
    ((1 << 28) / vocab).max(1)
}

impl<'a> Trainee<'a> {
    /// `model`: with dense weights, which stay.
    pub fn new(model: &'a Model, gates: GateSpec, scale: f64, offset: f64) -> Self {
        Self { model, trains: Trains::Gates, donors: None, gates, scale, offset }
    }

    /// More learns than the gates.
    pub fn training(self, trains: Trains) -> Self {
        Self { trains, ..self }
    }

    /// A neuron of the queries decides instead of an adapter (NVIDIA's `dms_separate_alpha` false), and starts at zero. The
    /// dense model that it is measured by does without these neurons, too.
    ///
    /// # Errors
    /// Those of the tensor library.
    pub fn borrowing(self) -> Result<Self> {
        let donors = Some(Donors::new(self.model.config(), &self.model.embedding)?);
        Ok(Self { donors, ..self })
    }

    /// Whether a neuron decides.
    pub fn borrows(&self) -> bool {
        self.donors.is_some()
    }

    pub(super) fn donors(&self) -> Option<&Donors> {
        self.donors.as_ref()
    }

    /// What learns.
    pub fn trains(&self) -> Trains {
        self.trains
    }

    /// The dense model.
    pub fn model(&self) -> &Model {
        self.model
    }

    /// Gates that evict nothing yet, f32 (adapters by the names of NVIDIA's layout), and what else learns.
    ///
    /// # Errors
    /// Those of the tensor library; quantized weights that are to learn.
    pub fn fresh(&self, seed: u64) -> Result<Named> {
        let (config, device) = (self.model.config(), self.model.device());
        let mut named = self.trains.fresh(self.model, self.donors(), seed)?;
        if self.borrows() {
            return Ok(named);
        }
        for layer in 0..config.layers {
            let [norm, weight] = names(layer);
            named.insert(norm, Tensor::ones(config.hidden, DType::F32, device)?);
            named.insert(weight, Tensor::zeros((config.kv_heads, config.hidden), DType::F32, device)?);
        }
        Ok(named)
    }

    /// Logistic noise for the decisions of a layer, f32 `[tokens, kv_heads]`, the same for a seed on every device.
    ///
    /// # Errors
    /// Those of the tensor library.
    pub fn noise(&self, batch: &Batch, seed: u64) -> Result<Tensor> {
        let dims = [batch.sequences * batch.length, self.model.config().kv_heads];
        // Of width 1 around 0; the ends, of probability 2^-24, are moved inside.
        let centred = ops::random(&dims, 1.0 / 12f64.sqrt(), seed, DType::F32, self.model.device())?;
        let u = (centred + 0.5)?.clamp(1e-7, 1.0 - 1e-7)?;
        Ok((u.log()? - u.affine(-1.0, 1.0)?.log()?)?)
    }

    /// The losses of a batch and their gradients with respect to `params`. `noise`: of each layer.
    ///
    /// # Errors
    /// [`Error::Model`] for quantized weights or a parameter that is missing, and those of the tensor library.
    pub fn gradients(
        &self,
        params: &Named,
        batch: &Batch,
        objective: &Objective,
        noise: impl Fn(usize) -> Result<Tensor>,
    ) -> Result<(Named, Losses)> {
        let layers = self.model.config().layers;
        let teacher = self.dense(batch)?;
        let student = self.student(params)?;
        let window = self.gates.window as usize;
        let pass = Pass::new(&student, batch.sequences, batch.length, window, self.donors())?;

        let decide = |layer: usize, x: &Tensor| -> Result<SoftGates> {
            let logits = self.logits(&student, params, layer, x)?;
            let GateSpec { lag, per, .. } = self.gates;
            Ok(SoftGates::new(&logits, &noise(layer)?, batch.sequences, objective.tau, lag, per)?)
        };
        let mut x = pass.embed(&batch.tokens)?;
        let (mut inputs, mut evicted, mut soft) = (Vec::with_capacity(layers), vec![], vec![]);
        let mut room = objective.activations;
        for layer in 0..layers {
            let gates = decide(layer, &x)?;
            evicted.push(gates.evicted()?);
            soft.push(gates.soft()?);
            let (after, on_the_way) = pass.forward(layer, &x, Some(&gates.keep()?))?;
            let kept = on_the_way.bytes() <= room;
            room -= if kept { on_the_way.bytes() } else { 0 };
            inputs.push((std::mem::replace(&mut x, after), kept.then_some(on_the_way)));
        }
        let mean = |all: &[Tensor]| -> Result<Tensor> { Ok(Tensor::stack(all, 0)?.mean(0)?) };
        let (evicted, soft) = (mean(&evicted)?, mean(&soft)?);
        let (divergence, mut x_grad) = self.distil(&pass, &x, &teacher, batch, objective.divergence)?;
        let (compression, evicted_grad) = compression_loss(&evicted, objective.evicted)?;
        let evicted_grad = (evicted_grad * (objective.compression / layers as f64))?;

        let mut gradients = Named::new();
        for (layer, (x, on_the_way)) in inputs.into_iter().enumerate().rev() {
            let gates = decide(layer, &x)?;
            let keep = gates.keep()?;
            let on_the_way = match on_the_way {
                Some(kept) => kept,
                None => pass.forward(layer, &x, Some(&keep))?.1,
            };
            // A borrowed neuron is part of what a head norm is taken of: attention sees it after all.
            let learns = self.trains != Trains::Gates || self.borrows();
            let BlockGrads { x: through, keep, mut weights } =
                pass.backward(layer, &x, Some(&keep), &on_the_way, &x_grad, learns)?;
            let logits = (gates.backward(&keep, &evicted_grad)? * self.scale)?;
            x_grad = match self.donors() {
                Some(donors) => {
                    donors.backward((layer, &student.blocks[layer]), &x, &logits, &through, &mut weights)?
                }
                None => self.gate_backward(params, layer, &x, &logits, &through, &mut gradients)?,
            };
            self.trains.gradients(params, self.donors(), weights, &mut gradients)?;
        }
        let losses = Losses { divergence, compression, evicted: evicted.mean(0)?, soft: soft.mean(0)? };
        Ok((gradients, losses))
    }

    /// The model that parameters make.
    ///
    /// # Errors
    /// [`Error::Model`] if one is missing or of another shape.
    pub fn student(&self, params: &Named) -> Result<Model> {
        self.trains.student(self.model, self.donors(), params)
    }

    /// The normed states of the model without gates.
    pub(super) fn dense(&self, batch: &Batch) -> Result<Tensor> {
        let pass = Pass::new(self.model, batch.sequences, batch.length, batch.length, self.donors())?;
        let mut x = pass.embed(&batch.tokens)?;
        for layer in 0..self.model.config().layers {
            x = pass.forward(layer, &x, None)?.0;
        }
        pass.finish(&x)
    }

    /// Decision logits of a layer, f32 `[tokens, kv_heads]`.
    pub(super) fn logits(&self, student: &Model, params: &Named, layer: usize, x: &Tensor) -> Result<Tensor> {
        if let Some(donors) = self.donors() {
            return Ok(donors.logits(&student.blocks[layer], x)?.affine(self.scale, -self.offset)?);
        }
        ops::gate(x, &self.weights(params, layer)?, self.scale, self.offset)
    }

    /// In the model's type: as they will be used.
    fn weights(&self, params: &Named, layer: usize) -> Result<GateWeights> {
        let dtype = self.model.embedding.dtype();
        let [norm, weight] = names(layer);
        let named = |name: String| match params.get(&name) {
            Some(tensor) => Ok(tensor.to_dtype(dtype)?),
            None => Err(Error::Model(format!("the gates have no tensor `{name}`"))),
        };
        Ok(GateWeights { norm: named(norm)?, eps: self.model.config().rms_eps, weight: named(weight)?, bias: None })
    }

    /// Adds the gradients of a layer's adapter, given that with respect to its logits before their factor; returns that
    /// with respect to the residual stream, `x_grad` included.
    fn gate_backward(
        &self,
        params: &Named,
        layer: usize,
        x: &Tensor,
        logits: &Tensor,
        x_grad: &Tensor,
        gradients: &mut Named,
    ) -> Result<Tensor> {
        let weights = self.weights(params, layer)?;
        let normed = ops::rms_norm(x, &weights.norm, weights.eps)?;
        let weight = logits.t()?.matmul(&normed.to_dtype(DType::F32)?)?;
        let normed = logits.matmul(&weights.weight.to_dtype(DType::F32)?)?.to_dtype(x.dtype())?;
        let [norm_name, weight_name] = names(layer);
        gradients.insert(norm_name, ops::rms_norm_weight_gradient(x, weights.eps, &normed)?);
        gradients.insert(weight_name, weight);
        ops::rms_norm_backward(x, &weights.norm, weights.eps, &normed, Some(x_grad))
    }

    /// Divergence from the teacher's normed states, and its gradient with respect to the residual stream.
    fn distil(
        &self,
        pass: &Pass,
        x: &Tensor,
        teacher: &Tensor,
        batch: &Batch,
        divergence: Divergence,
    ) -> Result<(Tensor, Tensor)> {
        let normed = pass.finish(x)?;
        let rows = rows_at_a_time(self.model.config().vocab);
        let (mut sum, mut grads) = (vec![], vec![]);
        for start in (0..normed.dim(0)?).step_by(rows) {
            let part = |x: &Tensor| -> Result<Tensor> { Ok(x.narrow(0, start, rows.min(x.dim(0)? - start))?) };
            let (student, teacher) = (pass.logits(&part(&normed)?)?, pass.logits(&part(teacher)?)?);
            let weights = part(&batch.weights)?;
            let (kl, logits) = match divergence {
                Divergence::Student => losses::distil(student, &teacher, &weights)?,
                Divergence::Teacher => losses::distil_teacher(student, &teacher, &weights)?,
            };
            sum.push((kl * weights)?.sum_all()?);
            grads.push(pass.logits_backward(&logits)?);
        }
        Ok((Tensor::stack(&sum, 0)?.sum_all()?, pass.finish_backward(x, &Tensor::cat(&grads, 0)?)?))
    }
}

/// A layer's norm and weight.
pub(super) fn names(layer: usize) -> [String; 2] {
    ["dms_proj_alpha_norm.weight", "dms_proj_alpha.weight"].map(|part| format!("model.layers.{layer}.self_attn.{part}"))
}

/// Whether a parameter is a gate's: one of [`names`], or a borrowed neuron.
pub(super) fn is_gate(name: &str) -> bool {
    is_adapter(name) || is_neuron(name)
}

/// Whether a parameter is one of [`names`].
pub(super) fn is_adapter(name: &str) -> bool {
    name.contains(".dms_proj_alpha")
}
