//! On a GPU: the kernels of `kvpolicy-kernels`, on the stream of candle's device.

use super::{SoftAttention, SoftGrads};
use crate::{
    backend::cuda::{driver, output, tensor_address},
    error::{Error, Result},
};
use candle_core::{DType, Tensor};
use cudarc::driver::CudaStream;
use kvpolicy_kernels::{Dtype, Kernels, Soft, SoftBackward, SoftForward};
use std::sync::Arc;

pub(super) fn forward(of: &SoftAttention, qkv: &Tensor, keep: Option<&Tensor>) -> Result<(Tensor, Tensor)> {
    let gpu = Gpu::of(qkv)?;
    let (qkv, keep) = (qkv.contiguous()?, keep.map(Tensor::contiguous).transpose()?);
    let (heads, device) = ([of.tokens(), of.q_heads, of.head_dim], qkv.device());
    let (y, lse) = (output(&heads, qkv.dtype(), device)?, output(&heads[..2], DType::F32, device)?);
    let params =
        SoftForward { soft: operands(of, &qkv, keep.as_ref())?, y: tensor_address(&y)?, lse: tensor_address(&lse)? };
    // SAFETY: shapes and dtypes were checked, and the outputs are made to them; memory that is freed meanwhile goes to
    // later work of the same stream.
    unsafe { gpu.kernels.soft_forward(&gpu.stream, gpu.dtype, &params) }.map_err(driver("soft attention"))?;
    Ok((y, lse))
}

pub(super) fn backward(
    of: &SoftAttention,
    qkv: &Tensor,
    keep: Option<&Tensor>,
    y: &Tensor,
    lse: &Tensor,
    dy: &Tensor,
) -> Result<SoftGrads> {
    let gpu = Gpu::of(qkv)?;
    let (qkv, keep) = (qkv.contiguous()?, keep.map(Tensor::contiguous).transpose()?);
    let (y, lse, dy) = (y.contiguous()?, lse.contiguous()?, dy.contiguous()?);
    let rows = output(&[of.q_heads, of.tokens(), 2], DType::F32, qkv.device())?;
    let grads = SoftGrads {
        qkv: output(qkv.dims(), qkv.dtype(), qkv.device())?,
        keep: output(&[of.tokens(), of.kv_heads], DType::F32, qkv.device())?,
    };
    let params = SoftBackward {
        soft: operands(of, &qkv, keep.as_ref())?,
        y: tensor_address(&y)?,
        dy: tensor_address(&dy)?,
        lse: tensor_address(&lse)?,
        rows: tensor_address(&rows)?,
        dqkv: tensor_address(&grads.qkv)?,
        dkeep: tensor_address(&grads.keep)?,
    };
    // SAFETY: as for forward.
    unsafe { gpu.kernels.soft_backward(&gpu.stream, gpu.dtype, &params) }
        .map_err(driver("gradients of soft attention"))?;
    Ok(grads)
}

/// Where a tensor is, and its dtype as kernels call it.
struct Gpu {
    stream: Arc<CudaStream>,
    kernels: Arc<Kernels>,
    dtype: Dtype,
}

impl Gpu {
    fn of(tensor: &Tensor) -> Result<Self> {
        let dtype = match tensor.dtype() {
            DType::F32 => Dtype::F32,
            DType::F16 => Dtype::F16,
            DType::BF16 => Dtype::Bf16,
            other => {
                return Err(Error::Config(format!("soft attention on a GPU is in bf16, f16 or f32, not {other:?}")));
            }
        };
        let stream = tensor.device().as_cuda_device()?.cuda_stream();
        let kernels = Kernels::of(stream.context()).map_err(driver("loading kernels"))?;
        Ok(Self { stream, kernels, dtype })
    }
}

fn operands(of: &SoftAttention, qkv: &Tensor, keep: Option<&Tensor>) -> Result<Soft> {
    Ok(Soft {
        qkv: tensor_address(qkv)?,
        keep: keep.map_or(Ok(0), tensor_address)?,
        sequences: of.sequences as u32,
        length: of.length as u32,
        q_heads: of.q_heads as u32,
        kv_heads: of.kv_heads as u32,
        head_dim: of.head_dim as u32,
        window: of.window.min(i32::MAX as usize) as i32,
        scale: of.scale,
    })
}
