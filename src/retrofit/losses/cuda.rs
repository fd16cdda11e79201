//! The losses' kernels on candle's tensors. A launch goes to the stream of candle's device, on which all its tensors are
//! made, used and freed in order. Operands were checked by the caller.

use super::Direction;
use crate::{
    backend::cuda::{driver, output, tensor_address},
    error::{Error, Result},
};
use candle_core::{DType, Tensor};
use cudarc::driver::CudaStream;
use kvpolicy_kernels::{self as kernels, Dtype, Kernels};
use std::sync::Arc;

pub(super) fn divergence(
    student: &Tensor,
    teacher: &Tensor,
    weights: &Tensor,
    direction: Direction,
) -> Result<(Tensor, Tensor)> {
    let (rows, vocab) = student.dims2()?;
    let (student, teacher, weights) = (student.contiguous()?, teacher.contiguous()?, weights.contiguous()?);
    let kl = output(&[rows], DType::F32, student.device())?;
    let params = kernels::Distil {
        student: tensor_address(&student)?,
        teacher: tensor_address(&teacher)?,
        weights: tensor_address(&weights)?,
        kl: tensor_address(&kl)?,
        rows: rows as u32,
        vocab: vocab as u32,
    };
    let (stream, kernels, dtype) = gpu(&student)?;
    // SAFETY, of both: the caller has checked shapes, types and device; all are contiguous; the student was given away.
    let launched = match direction {
        Direction::FromStudent => unsafe { kernels.distil(&stream, dtype, &params) },
        Direction::FromTeacher => unsafe { kernels.distil_teacher(&stream, dtype, &params) },
    };
    launched.map_err(driver("distillation loss"))?;
    Ok((kl, student))
}

pub(super) fn cross_entropy(logits: &Tensor, targets: &Tensor, weights: &Tensor) -> Result<(Tensor, Tensor)> {
    let (rows, vocab) = logits.dims2()?;
    let (logits, targets, weights) = (logits.contiguous()?, targets.contiguous()?, weights.contiguous()?);
    let nll = output(&[rows], DType::F32, logits.device())?;
    let params = kernels::CrossEntropy {
        logits: tensor_address(&logits)?,
        targets: tensor_address(&targets)?,
        weights: tensor_address(&weights)?,
        nll: tensor_address(&nll)?,
        rows: rows as u32,
        vocab: vocab as u32,
    };
    let (stream, kernels, dtype) = gpu(&logits)?;
    // SAFETY: the caller has checked shapes, types and device; all are contiguous; the logits were given away.
    unsafe { kernels.cross_entropy(&stream, dtype, &params) }.map_err(driver("cross-entropy"))?;
    Ok((nll, logits))
}

/// Where logits are and what they are.
fn gpu(logits: &Tensor) -> Result<(Arc<CudaStream>, Arc<Kernels>, Dtype)> {
    let stream = logits.device().as_cuda_device()?.cuda_stream();
    let kernels = Kernels::of(stream.context()).map_err(driver("loading kernels"))?;
    let dtype = match logits.dtype() {
        DType::F32 => Dtype::F32,
        DType::F16 => Dtype::F16,
        DType::BF16 => Dtype::Bf16,
        other => return Err(Error::Config(format!("no loss takes logits of type {other:?}"))),
    };
    Ok((stream, kernels, dtype))
}
