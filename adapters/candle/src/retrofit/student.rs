//! What may learn beside the gates: nothing, low-rank additions to the weights, or the weights of all blocks.

use super::donors::Donors;
use crate::{
    error::{Error, Result},
    model::Model,
    ops,
};
use candle_core::{DType, Tensor};
use kvpolicy::retrofit::Named;

/// What learns. The embedding, the last norm and the output stay as they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trains {
    /// The gates alone.
    Gates,
    /// The gates, and `W + 2 B A` in place of each projection's W, projections of the same input together (LoRA,
    /// arXiv 2106.09685).
    Lora {
        /// Rows of A, columns of B.
        rank: usize,
    },
    /// The gates and every weight of the blocks.
    Full,
}

/// The factor of `B A`: LoRA's `alpha / rank`.
pub(super) const LORA_SCALE: f64 = 2.0;

/// The parts of a block that get additions.
const PROJECTIONS: [&str; 4] = ["qkv", "o", "gate_up", "down"];

impl Trains {
    /// Parameters beside adapters as training begins, f32: borrowed neurons (`layers.N.qkv.neurons` `[kv_heads, hidden]`,
    /// `layers.N.qkv_bias.neurons` `[kv_heads]`) unless weights learn that they are part of; `NAME.lora_a` `[rank, in]`
    /// and `NAME.lora_b` `[out, rank]`, or weights, by the names of [`Model::parameters`]. The model they make is `model`
    /// itself, but for the neurons.
    pub(super) fn fresh(self, model: &Model, donors: Option<&Donors>, seed: u64) -> Result<Named> {
        let rank = match (self, donors) {
            (Self::Gates, None) => return Ok(Named::new()),
            (Self::Gates, Some(donors)) => {
                let joined = base(model, Some(donors), is_joined)?.into_iter();
                return joined.map(|(name, whole)| Ok((name + NEURONS, donors.taken(&whole)?))).collect();
            }
            (Self::Full, _) => return base(model, donors, |name| name.starts_with("layers.")),
            (Self::Lora { rank }, _) => rank,
        };
        if rank == 0 {
            return Err(Error::Model("a LoRA of rank 0 adds nothing: 1 or more".into()));
        }
        let mut all = Named::new();
        for (number, (name, weight)) in base(model, donors, is_projection)?.into_iter().enumerate() {
            let (out, input) = weight.dims2()?;
            let (seed, std) = (seed.wrapping_add(number as u64), (input as f64).sqrt().recip());
            all.insert(format!("{name}.lora_a"), ops::random(&[rank, input], std, seed, DType::F32, model.device())?);
            all.insert(format!("{name}.lora_b"), Tensor::zeros((out, rank), DType::F32, model.device())?);
        }
        Ok(all)
    }

    /// The model that parameters make of another.
    pub(super) fn student(self, model: &Model, donors: Option<&Donors>, params: &Named) -> Result<Model> {
        let mut student = model.clone();
        match self {
            Self::Gates => {
                let Some(donors) = donors else { return Ok(student) };
                let joined = student.parameters_of(is_joined)?;
                let replaced = joined.into_iter().map(|(name, whole)| {
                    let neurons = named(params, &format!("{name}{NEURONS}"))?;
                    Ok((name, donors.replaced(&whole, neurons)?))
                });
                student.set_parameters(&replaced.collect::<Result<_>>()?)?;
            }
            Self::Full => student.set_parameters(params)?,
            Self::Lora { .. } => {
                let base = base(model, donors, |name| is_projection(name) || is_joined(name))?;
                let merged = base.into_iter().map(|(name, weight)| {
                    if !is_projection(&name) {
                        return Ok((name, weight));
                    }
                    let (a, b) = factors(params, &name)?;
                    Ok((name, (weight + (b.matmul(a)? * LORA_SCALE)?)?))
                });
                student.set_parameters(&merged.collect::<Result<_>>()?)?;
            }
        }
        Ok(student)
    }

    /// Adds gradients of the parameters, given those of a block's weights, f32 both.
    pub(super) fn gradients(
        self,
        params: &Named,
        donors: Option<&Donors>,
        weights: Named,
        gradients: &mut Named,
    ) -> Result<()> {
        match self {
            Self::Gates => {
                let Some(donors) = donors else { return Ok(()) };
                for (name, whole) in weights.into_iter().filter(|(name, _)| is_joined(name)) {
                    gradients.insert(name + NEURONS, donors.taken(&whole)?);
                }
            }
            Self::Full => gradients.extend(weights),
            Self::Lora { .. } => {
                for (name, gradient) in weights.into_iter().filter(|(name, _)| is_projection(name)) {
                    let (a, b) = factors(params, &name)?;
                    let gradient = (gradient * LORA_SCALE)?;
                    gradients.insert(format!("{name}.lora_a"), b.t()?.matmul(&gradient)?);
                    gradients.insert(format!("{name}.lora_b"), gradient.matmul(&a.t()?)?);
                }
            }
        }
        Ok(())
    }
}

fn is_projection(name: &str) -> bool {
    name.starts_with("layers.") && PROJECTIONS.iter().any(|part| name.ends_with(&format!(".{part}")))
}

/// What is joined of q, k and v: where borrowed neurons are.
fn is_joined(name: &str) -> bool {
    name.ends_with(".qkv") || name.ends_with(".qkv_bias")
}

/// The end of a name: the rows of a tensor that are borrowed neurons.
const NEURONS: &str = ".neurons";

/// Whether a parameter is borrowed neurons.
pub(super) fn is_neuron(name: &str) -> bool {
    name.ends_with(NEURONS)
}

/// Those of a model's weights whose names are wanted, f32, borrowed neurons zero: they evict nothing yet.
fn base(model: &Model, donors: Option<&Donors>, is_wanted: impl Fn(&str) -> bool) -> Result<Named> {
    let mut all = model.clone().parameters_of(is_wanted)?;
    if let Some(donors) = donors {
        for (_, whole) in all.iter_mut().filter(|(name, _)| is_joined(name)) {
            *whole = donors.replaced(whole, &donors.taken(whole)?.zeros_like()?)?;
        }
    }
    Ok(all)
}

/// A and B of a projection.
pub(super) fn factors<'a>(params: &'a Named, name: &str) -> Result<(&'a Tensor, &'a Tensor)> {
    Ok((named(params, &format!("{name}.lora_a"))?, named(params, &format!("{name}.lora_b"))?))
}

fn named<'a>(params: &'a Named, name: &str) -> Result<&'a Tensor> {
    params.get(name).ok_or_else(|| Error::Model(format!("the parameters have no tensor `{name}`")))
}
