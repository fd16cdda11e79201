//! What may learn beside the gates: nothing, low-rank additions to the weights, or the weights of all blocks.

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
    /// Parameters beside the gates as training begins, f32: `NAME.lora_a` `[rank, in]` and `NAME.lora_b` `[out, rank]`, or
    /// weights, by the names of [`Model::parameters`]. The model they make is `model` itself.
    pub(super) fn fresh(self, model: &Model, seed: u64) -> Result<Named> {
        if self == Self::Gates {
            return Ok(Named::new());
        }
        let blocks = model.clone().parameters()?.into_iter().filter(|(name, _)| name.starts_with("layers."));
        let Self::Lora { rank } = self else { return Ok(blocks.collect()) };
        if rank == 0 {
            return Err(Error::Model("a LoRA of rank 0 adds nothing: 1 or more".into()));
        }
        let mut all = Named::new();
        for (number, (name, weight)) in blocks.filter(|(name, _)| is_projection(name)).enumerate() {
            let (out, input) = weight.dims2()?;
            let (seed, std) = (seed.wrapping_add(number as u64), (input as f64).sqrt().recip());
            all.insert(format!("{name}.lora_a"), ops::random(&[rank, input], std, seed, DType::F32, model.device())?);
            all.insert(format!("{name}.lora_b"), Tensor::zeros((out, rank), DType::F32, model.device())?);
        }
        Ok(all)
    }

    /// The model that parameters make of another.
    pub(super) fn student(self, model: &Model, params: &Named) -> Result<Model> {
        let mut student = model.clone();
        match self {
            Self::Gates => {}
            Self::Full => student.set_parameters(params)?,
            Self::Lora { .. } => {
                let weights = student.parameters()?.into_iter().filter(|(name, _)| is_projection(name));
                let merged = weights.map(|(name, weight)| {
                    let (a, b) = factors(params, &name)?;
                    Ok((name, (weight + (b.matmul(a)? * LORA_SCALE)?)?))
                });
                student.set_parameters(&merged.collect::<Result<_>>()?)?;
            }
        }
        Ok(student)
    }

    /// Adds gradients of the parameters, given those of a block's weights, f32 both.
    pub(super) fn gradients(self, params: &Named, weights: Named, gradients: &mut Named) -> Result<()> {
        match self {
            Self::Gates => {}
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

/// A and B of a projection.
pub(super) fn factors<'a>(params: &'a Named, name: &str) -> Result<(&'a Tensor, &'a Tensor)> {
    let part = |part: &str| {
        let name = format!("{name}.{part}");
        params.get(&name).ok_or_else(|| Error::Model(format!("the parameters have no tensor `{name}`")))
    };
    Ok((part("lora_a")?, part("lora_b")?))
}
