//! Losses of rows of logits, in nats, and their gradients, made together and by hand.
//!
//! Logits are f32, f16 or bf16 and arithmetic is wider: f64 on the CPU, f32 on a GPU, where one kernel reads each logit
//! twice and writes the gradient in place of the logits. Each row has a weight, the factor of its gradient and not of
//! its loss: a mean over some of the rows gives those `1 / count` and the others 0. A row of weight 0 has a gradient of
//! exactly 0, whatever its logits are.

#[cfg(feature = "cuda")]
mod cuda;

use crate::error::{Error, Result};
use candle_core::{DType, Tensor};
use rayon::prelude::*;

/// KL(student || teacher) of logits `[rows, vocab]`, of one type both; `weights`: f32 `[rows]`. Gives
/// `sum_v ps (log ps - log pt)`, f32 `[rows]`, and the gradient of the student's logits, weighted,
/// `w ps (log ps - log pt - kl)`, `[rows, vocab]` in their type. A GPU overwrites `student` with it.
///
/// # Errors
/// [`Error::Shape`] for tensors that do not fit each other, [`Error::Config`] for types or devices that do not;
/// [`Error::Candle`] and `Error::Cuda` if there is no memory.
pub fn distil(student: Tensor, teacher: &Tensor, weights: &Tensor) -> Result<(Tensor, Tensor)> {
    divergence(&student, teacher, weights, Direction::FromStudent)
}

/// KL(teacher || student), `sum_v pt (log pt - log ps)`, and its gradient, `w (ps - pt)`; otherwise as [`distil`].
///
/// # Errors
/// As [`distil`].
pub fn distil_teacher(student: Tensor, teacher: &Tensor, weights: &Tensor) -> Result<(Tensor, Tensor)> {
    divergence(&student, teacher, weights, Direction::FromTeacher)
}

/// `-log p` of each row's target: logits `[rows, vocab]`, `targets` u32 `[rows]`, `weights` f32 `[rows]`. Gives the loss,
/// f32 `[rows]`, and the gradient of the logits, weighted, `w (p - [v = target])`, `[rows, vocab]` in their type. A GPU
/// overwrites `logits` with it.
///
/// A target outside the vocabulary is an error on the CPU and makes NaN of its row on a GPU. Where the weight is 0 it is
/// neither, and the loss is 0.
///
/// # Errors
/// As [`distil`], and [`Error::Config`] for a target outside the vocabulary.
pub fn cross_entropy(logits: Tensor, targets: &Tensor, weights: &Tensor) -> Result<(Tensor, Tensor)> {
    let (rows, vocab) = logits_dims("logits", &logits)?;
    fits("targets", targets, &logits, DType::U32, &[rows])?;
    fits("weights", weights, &logits, DType::F32, &[rows])?;
    #[cfg(feature = "cuda")]
    if logits.device().is_cuda() {
        return cuda::cross_entropy(&logits, targets, weights);
    }
    let (targets, weights) = (targets.to_vec1::<u32>()?, weights.to_vec1::<f32>()?);
    let outside = |(target, weight): (&u32, &f32)| *target as usize >= vocab && *weight != 0.0;
    if let Some(row) = targets.iter().zip(&weights).position(outside) {
        let target = targets[row];
        return Err(Error::Config(format!("row {row}: target {target} is outside the vocabulary of {vocab}")));
    }
    each_row(&logits, |row, x| {
        let (target, weight) = (targets[row] as usize, weights[row]);
        let p = Softmax::of(x);
        let loss = x.get(target).map_or(0.0, |&chosen| -p.log(chosen));
        overwrite(x, weight, |v, x| p.log(x).exp() - f64::from(u8::from(v == target)));
        loss
    })
}

/// Whose probabilities weigh the difference.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Direction {
    FromStudent,
    FromTeacher,
}

fn divergence(student: &Tensor, teacher: &Tensor, weights: &Tensor, direction: Direction) -> Result<(Tensor, Tensor)> {
    let (rows, vocab) = logits_dims("student", student)?;
    fits("teacher", teacher, student, student.dtype(), &[rows, vocab])?;
    fits("weights", weights, student, DType::F32, &[rows])?;
    #[cfg(feature = "cuda")]
    if student.device().is_cuda() {
        return cuda::divergence(student, teacher, weights, direction);
    }
    let (teacher, weights) = (floats(teacher)?, weights.to_vec1::<f32>()?);
    each_row(student, |row, s| {
        let (t, weight) = (&teacher[row * vocab..][..vocab], weights[row]);
        let (ps, pt) = (Softmax::of(s), Softmax::of(t));
        // What has no probability counts for nothing, even where a logarithm is infinite.
        let part = |p: f64, difference: f64| if p == 0.0 { 0.0 } else { p * difference };
        let logs = s.iter().zip(t).map(|(&s, &t)| (ps.log(s), pt.log(t)));
        match direction {
            Direction::FromStudent => {
                let kl: f64 = logs.map(|(s, t)| part(s.exp(), s - t)).sum();
                overwrite(s, weight, |v, s| part(ps.log(s).exp(), ps.log(s) - pt.log(t[v]) - kl));
                kl
            }
            Direction::FromTeacher => {
                let kl: f64 = logs.map(|(s, t)| part(t.exp(), t - s)).sum();
                overwrite(s, weight, |v, s| ps.log(s).exp() - pt.log(t[v]).exp());
                kl
            }
        }
    })
}

/// What turns a row's logits into logarithms of probabilities.
#[derive(Debug, Clone, Copy)]
struct Softmax {
    log_sum: f64,
}

impl Softmax {
    fn of(x: &[f32]) -> Self {
        let max = f64::from(x.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        let sum: f64 = x.iter().map(|&x| (f64::from(x) - max).exp()).sum();
        Self { log_sum: max + sum.ln() }
    }

    fn log(self, x: f32) -> f64 {
        f64::from(x) - self.log_sum
    }
}

/// A row's logits become their gradient: `slope` of an index and a logit, weighted.
fn overwrite(row: &mut [f32], weight: f32, slope: impl Fn(usize, f32) -> f64) {
    if weight == 0.0 {
        return row.fill(0.0);
    }
    row.iter_mut().enumerate().for_each(|(v, x)| *x = (f64::from(weight) * slope(v, *x)) as f32);
}

/// A loss of each row of logits, and their gradient. `loss` leaves the gradient where it found the logits.
fn each_row(logits: &Tensor, loss: impl Fn(usize, &mut [f32]) -> f64 + Sync) -> Result<(Tensor, Tensor)> {
    let (rows, vocab) = logits.dims2()?;
    let mut numbers = floats(logits)?;
    let losses: Vec<f32> =
        numbers.par_chunks_mut(vocab).enumerate().map(|(row, numbers)| loss(row, numbers) as f32).collect();
    let gradient = Tensor::from_vec(numbers, (rows, vocab), logits.device())?.to_dtype(logits.dtype())?;
    Ok((Tensor::from_vec(losses, rows, logits.device())?, gradient))
}

fn floats(x: &Tensor) -> Result<Vec<f32>> {
    Ok(x.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
}

/// Rows and columns of logits that a loss takes.
fn logits_dims(what: &'static str, logits: &Tensor) -> Result<(usize, usize)> {
    if !matches!(logits.dtype(), DType::F32 | DType::F16 | DType::BF16) {
        return Err(Error::Config(format!("{what}: expected f32, f16 or bf16, got {:?}", logits.dtype())));
    }
    match *logits.dims() {
        [rows, vocab] if vocab > 0 => Ok((rows, vocab)),
        _ => Err(Error::Config(format!("{what}: expected [rows, vocab], got {:?}", logits.dims()))),
    }
}

/// What stands beside logits, checked.
fn fits(what: &'static str, x: &Tensor, logits: &Tensor, dtype: DType, dims: &[usize]) -> Result<()> {
    if x.dims() != dims {
        return Err(Error::Shape { what, expected: dims.to_vec(), got: x.dims().to_vec() });
    }
    if x.dtype() != dtype || !x.device().same_device(logits.device()) {
        let (wanted, got) = (logits.device().location(), x.device().location());
        return Err(Error::Config(format!("{what}: expected {dtype:?} on {wanted:?}, got {:?} on {got:?}", x.dtype())));
    }
    Ok(())
}
