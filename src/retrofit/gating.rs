//! Soft gates: decision logits with noise, what attention and the compression loss make of them, and their gradients.

use crate::{
    error::Result,
    spec::{Lag, PerGate},
};
use candle_core::{DType, Tensor};

/// Decisions of one layer with noise, for sequences of equal length end to end (arXiv 2506.05345; NVIDIA's reference).
///
/// `e = (logit + noise) / tau`; attention sees the log-probability of keeping, `logsigmoid(-e)`; the compression loss
/// counts the hard decisions `e > 0` and takes the gradient of `sigmoid(e)` for theirs (straight-through).
#[derive(Debug)]
pub struct SoftGates {
    /// f32 `[sequences, length, kv_heads]`.
    e: Tensor,
    dims: (usize, usize, usize),
    tau: f64,
    lag: Lag,
    per: PerGate,
}

impl SoftGates {
    /// `logits` and `noise`: f32 `[tokens, kv_heads]`, `sequences` of equal length end to end.
    ///
    /// # Errors
    /// Those of the tensor library: shapes that do not fit.
    pub fn new(logits: &Tensor, noise: &Tensor, sequences: usize, tau: f64, lag: Lag, per: PerGate) -> Result<Self> {
        let e = by_sequence(&((logits + noise)? / tau)?, sequences, per)?;
        Ok(Self { dims: e.dims3()?, e, tau, lag, per })
    }

    /// The log-probability that attention keeps each token once it has left the window: f32 `[tokens, kv_heads]`. Where a
    /// decision judges the token before its own, the last token has none and stays.
    ///
    /// # Errors
    /// Those of the tensor library.
    pub fn keep(&self) -> Result<Tensor> {
        judged(log_sigmoid(&self.e.neg()?)?, self.lag)
    }

    /// Share of decisions to evict in each sequence, hard: f32 `[sequences]`.
    ///
    /// # Errors
    /// Those of the tensor library.
    pub fn evicted(&self) -> Result<Tensor> {
        let hard = self.e.gt(0f64)?.to_dtype(DType::F32)?;
        Ok(hard.mean((1, 2))?)
    }

    /// The same of the soft decisions.
    ///
    /// # Errors
    /// Those of the tensor library.
    pub fn soft(&self) -> Result<Tensor> {
        Ok(sigmoid(&self.e)?.mean((1, 2))?)
    }

    /// Gradient of a loss with respect to the logits, f32 `[tokens, kv_heads]`, given that with respect to [`keep`],
    /// f32 `[tokens, kv_heads]`, and to [`evicted`], f32 `[sequences]`.
    ///
    /// [`keep`]: SoftGates::keep
    /// [`evicted`]: SoftGates::evicted
    ///
    /// # Errors
    /// Those of the tensor library.
    pub fn backward(&self, keep: &Tensor, evicted: &Tensor) -> Result<Tensor> {
        let (sequences, length, heads) = self.dims;
        let p = sigmoid(&self.e)?;
        let keep = keep.reshape(self.dims)?;
        let keep = match self.lag {
            Lag::Own => keep,
            Lag::Previous => keep.narrow(1, 0, length.saturating_sub(1))?.pad_with_zeros(1, 1, 0)?,
        };
        let evicted = (evicted.reshape((sequences, 1, 1))? / (length * heads) as f64)?;
        // d logsigmoid(-e) = -p de; d sigmoid(e) = p (1 - p) de.
        let slope = (&p * (1.0 - &p)?)?.broadcast_mul(&evicted)?;
        let mut e = (slope - (p * keep)?)?;
        if self.per == PerGate::Layer {
            // Head 0 decided for all of them.
            e = e.sum_keepdim(2)?.pad_with_zeros(2, 0, heads - 1)?;
        }
        Ok((e / self.tau)?.reshape((sequences * length, heads))?)
    }
}

/// What attention must see of hard decisions: 0 to keep and `HIDDEN` to evict, f32 `[tokens, kv_heads]` as
/// [`SoftGates::keep`].
///
/// # Errors
/// Those of the tensor library.
pub fn hard_keep(logits: &Tensor, sequences: usize, lag: Lag, per: PerGate) -> Result<Tensor> {
    let evict = logits.gt(0f64)?.to_dtype(DType::F32)?;
    judged((by_sequence(&evict, sequences, per)? * HIDDEN)?, lag)
}

/// Numbers of decisions, `[tokens, kv_heads]`, as `[sequences, length, kv_heads]`; those of head 0 for all heads where it
/// decides for its layer.
fn by_sequence(x: &Tensor, sequences: usize, per: PerGate) -> Result<Tensor> {
    let (tokens, heads) = x.dims2()?;
    let dims = (sequences, tokens / sequences.max(1), heads);
    let x = x.reshape(dims)?;
    match per {
        PerGate::Head => Ok(x),
        PerGate::Layer => Ok(x.narrow(2, 0, 1)?.broadcast_as(dims)?.contiguous()?),
    }
}

/// What decisions, `[sequences, length, kv_heads]`, say of the tokens they judge, `[tokens, kv_heads]`: 0 where none does.
fn judged(x: Tensor, lag: Lag) -> Result<Tensor> {
    let x = match lag {
        Lag::Own => x,
        Lag::Previous => x.narrow(1, 1, x.dim(1)?.saturating_sub(1))?.pad_with_zeros(1, 0, 1)?,
    };
    Ok(x.flatten(0, 1)?)
}

/// Added to a score, it leaves nothing of it in f32.
pub const HIDDEN: f64 = -1e5;

/// `max(target - evicted, 0)` of each sequence, averaged: the loss, an f32 scalar, and its gradient with respect to
/// `evicted`, f32 `[sequences]`. `evicted`: of each sequence, the mean of the layers'.
///
/// # Errors
/// Those of the tensor library.
pub fn compression_loss(evicted: &Tensor, target: f64) -> Result<(Tensor, Tensor)> {
    let short = evicted.affine(-1.0, target)?.relu()?;
    let gradient = (short.gt(0f64)?.to_dtype(DType::F32)? * (-1.0 / evicted.elem_count() as f64))?;
    Ok((short.mean_all()?, gradient))
}

fn sigmoid(x: &Tensor) -> Result<Tensor> {
    Ok((x.neg()?.exp()? + 1.0)?.recip()?)
}

/// `log(sigmoid(x)) = min(x, 0) - log(1 + exp(-|x|))`.
fn log_sigmoid(x: &Tensor) -> Result<Tensor> {
    let tail = (x.abs()?.neg()?.exp()? + 1.0)?.log()?;
    Ok((x.minimum(0f64)? - tail)?)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};

    fn random(shape: (usize, usize), scale: f32) -> Tensor {
        Tensor::randn(0f32, scale, shape, &Device::Cpu).unwrap()
    }

    fn close(a: &Tensor, b: &Tensor) {
        let worst = (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap();
        assert!(worst.to_scalar::<f32>().unwrap() < 1e-4, "{worst}");
    }

    /// Against candle's autograd of the same formula, written with its own operations.
    #[test]
    fn gradients_are_those_of_the_formula() {
        let (sequences, length, heads, tau) = (2, 5, 3, 0.7);
        for (lag, per) in [(Lag::Own, PerGate::Head), (Lag::Previous, PerGate::Head), (Lag::Previous, PerGate::Layer)] {
            let logits = Var::from_tensor(&random((sequences * length, heads), 1.0)).unwrap();
            let noise = random((sequences * length, heads), 1.0);
            let gates = SoftGates::new(logits.as_tensor(), &noise, sequences, tau, lag, per).unwrap();
            let (dkeep, devicted) =
                (random((sequences * length, heads), 1.0), Tensor::new(&[0.3f32, -0.8], &Device::Cpu).unwrap());

            let e =
                ((logits.as_tensor() + &noise).unwrap() / tau).unwrap().reshape((sequences, length, heads)).unwrap();
            let e = match per {
                PerGate::Head => e,
                PerGate::Layer => e.narrow(2, 0, 1).unwrap().repeat((1, 1, heads)).unwrap(),
            };
            let p = (e.neg().unwrap().exp().unwrap() + 1.0).unwrap().recip().unwrap();
            let keep = (1.0 - &p).unwrap().log().unwrap();
            let keep = match lag {
                Lag::Own => keep,
                Lag::Previous => {
                    let rest = keep.narrow(1, 1, length - 1).unwrap();
                    Tensor::cat(&[rest, Tensor::zeros((sequences, 1, heads), DType::F32, &Device::Cpu).unwrap()], 1)
                        .unwrap()
                }
            };
            let keep = keep.reshape((sequences * length, heads)).unwrap();
            close(&gates.keep().unwrap(), &keep);
            let loss = ((&keep * &dkeep).unwrap().sum_all().unwrap()
                + (p.mean((1, 2)).unwrap() * &devicted).unwrap().sum_all().unwrap())
            .unwrap();
            let gradients = loss.backward().unwrap();
            close(&gates.backward(&dkeep, &devicted).unwrap(), gradients.get(logits.as_tensor()).unwrap());
        }
    }

    #[test]
    fn the_compression_loss_is_one_sided() {
        let evicted = Tensor::new(&[0.2f32, 0.9], &Device::Cpu).unwrap();
        let (loss, gradient) = compression_loss(&evicted, 0.5).unwrap();
        assert!((loss.to_scalar::<f32>().unwrap() - 0.15).abs() < 1e-6);
        assert_eq!(gradient.to_vec1::<f32>().unwrap(), [-0.5, 0.0]);
    }

    #[test]
    fn extreme_logits_stay_finite() {
        let logits = Tensor::new(&[[-1000f32], [1000.0], [0.0]], &Device::Cpu).unwrap();
        let zeros = logits.zeros_like().unwrap();
        let gates = SoftGates::new(&logits, &zeros, 1, 0.1, Lag::Own, PerGate::Head).unwrap();
        let keep = gates.keep().unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!((keep[0], keep[1]), (0.0, -10000.0));
        let gradient = gates.backward(
            &Tensor::ones((3, 1), DType::F32, &Device::Cpu).unwrap(),
            &Tensor::new(&[1f32], &Device::Cpu).unwrap(),
        );
        assert!(gradient.unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().all(|x| x.is_finite()));
    }
}
