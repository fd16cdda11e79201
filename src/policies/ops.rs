//! Tensor operations that several policies share.

use crate::{error::Result, policy::Held};
use candle_core::{D, Device, Tensor};

/// Tokens seen by each row: f32 `[rows, 1]`.
pub(crate) fn seen(held: &dyn Held, device: &Device) -> Result<Tensor> {
    let seen: Vec<f32> = held.seen().into_iter().map(|n| n as f32).collect();
    let rows = seen.len();
    Ok(Tensor::from_vec(seen, (rows, 1), device)?)
}

/// 1 for entries older than the newest `window` tokens, else 0: f32 `[rows, max_len]`.
pub(crate) fn older_than(held: &dyn Held, window: u32) -> Result<Tensor> {
    let positions = held.positions()?;
    let first_recent = (seen(held, positions.device())? - window as f64)?;
    Ok(positions.broadcast_lt(&first_recent)?.to_dtype(candle_core::DType::F32)?)
}

/// Euclidean norm over the last dimension, kept as a dimension of 1 and at least `floor`.
pub(crate) fn norm(x: &Tensor, floor: f32) -> Result<Tensor> {
    Ok(x.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?.clamp(floor, f32::MAX)?)
}

/// Mean over a window of `kernel` (odd) neighbours of the last dimension; zeros beyond the ends count.
pub(crate) fn average_pool(x: &Tensor, kernel: usize) -> Result<Tensor> {
    let shifted = neighbours(x, kernel)?;
    Ok((fold(shifted, |a, b| a + b)? / kernel as f64)?)
}

/// Largest of `kernel` (odd) neighbours of the last dimension; for values of 0 or more.
pub(crate) fn max_pool(x: &Tensor, kernel: usize) -> Result<Tensor> {
    fold(neighbours(x, kernel)?, |a, b| a.maximum(&b))
}

fn neighbours(x: &Tensor, kernel: usize) -> Result<Vec<Tensor>> {
    let (side, len) = (kernel / 2, x.dim(D::Minus1)?);
    let padded = x.pad_with_zeros(D::Minus1, side, side)?;
    (0..kernel).map(|i| Ok(padded.narrow(D::Minus1, i, len)?)).collect()
}

fn fold(parts: Vec<Tensor>, f: impl Fn(Tensor, Tensor) -> candle_core::Result<Tensor>) -> Result<Tensor> {
    let mut parts = parts.into_iter();
    let first = parts.next().ok_or_else(|| crate::Error::Config("a pooling kernel of width 0".into()))?;
    Ok(parts.try_fold(first, f)?)
}
