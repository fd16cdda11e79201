//! The kernels on candle's tensors.
//!
//! A launch goes to the stream of candle's device, on which all its tensors are made, used and freed in order: so a
//! tensor may be dropped, or its memory given to another, as soon as the launch is enqueued. Operands are checked here,
//! since kernels check nothing.

use super::{GateWeights, Heads, Rotation};
use crate::error::{Error, Result};
use candle_core::{
    DType, Device, Storage, Tensor,
    cuda_backend::cudarc::driver::{CudaStream, DevicePtr, DriverError},
};
use half::{bf16, f16};
use kvpolicy::RopeLayout;
use kvpolicy_kernels::{self as kernels, Address, Dtype, Kernels, Matvec};
use std::sync::Arc;

/// Up to here a product is [`Kernels::matvec`]'s, beyond it cuBLAS's.
const FEW_TOKENS: usize = 8;

/// What is normed.
pub(super) struct Norm<'a> {
    /// `[rows, hidden]`.
    pub(super) x: &'a Tensor,
    /// Added to `x`.
    pub(super) y: Option<&'a Tensor>,
    /// Rows of `x` to take, u32 `[tokens]`; all in order, if there is none.
    pub(super) ids: Option<&'a Tensor>,
    /// `[hidden]`.
    pub(super) weight: &'a Tensor,
    pub(super) eps: f64,
}

/// A GPU's stream and kernels for one element type.
pub(super) struct Gpu {
    device: Device,
    stream: Arc<CudaStream>,
    kernels: Arc<Kernels>,
    /// As candle and as kernels call the type.
    dtype: (DType, Dtype),
}

impl Gpu {
    /// Where a tensor is, if that is a GPU and kernels know its type.
    pub(super) fn of(x: &Tensor) -> Result<Option<Self>> {
        Self::on(x.device(), x.dtype())
    }

    pub(super) fn on(device: &Device, dtype: DType) -> Result<Option<Self>> {
        let kernel = match dtype {
            DType::F32 => Dtype::F32,
            DType::F16 => Dtype::F16,
            DType::BF16 => Dtype::Bf16,
            _ => return Ok(None),
        };
        let Device::Cuda(cuda) = device else { return Ok(None) };
        let stream = cuda.cuda_stream();
        let kernels = Kernels::of(stream.context()).map_err(failed)?;
        Ok(Some(Self { device: device.clone(), stream, kernels, dtype: (dtype, kernel) }))
    }

    /// A tensor that the caller's kernel writes, every element.
    fn output(&self, dims: &[usize], dtype: DType) -> Result<Tensor> {
        // SAFETY: nobody reads it before the kernel, which comes next on the stream, has written it.
        Ok(unsafe { Tensor::empty(dims, dtype, &self.device) }?)
    }

    /// Address of an operand of the kernels' type.
    fn at(&self, what: &str, x: &Tensor, dims: &[usize]) -> Result<Address> {
        self.address(what, x, self.dtype.0, dims)
    }

    /// As [`Gpu::at`]; 0 for an operand that is not there.
    fn at_if(&self, what: &str, x: &Option<Tensor>, dims: &[usize]) -> Result<Address> {
        x.as_ref().map_or(Ok(0), |x| self.at(what, x, dims))
    }

    /// Address of a contiguous operand on this GPU.
    fn address(&self, what: &str, x: &Tensor, dtype: DType, dims: &[usize]) -> Result<Address> {
        if x.dims() != dims || x.dtype() != dtype || !x.is_contiguous() || !x.device().same_device(&self.device) {
            return Err(Error::Model(format!(
                "{what}: expected contiguous {dtype:?} {dims:?} on {:?}, got {:?} {:?} of strides {:?} on {:?}",
                self.device.location(),
                x.dtype(),
                x.dims(),
                x.stride(),
                x.device().location()
            )));
        }
        let (storage, layout) = x.storage_and_layout();
        let Storage::Cuda(storage) = &*storage else {
            return Err(Error::Model(format!("{what}: a tensor on a GPU has its storage elsewhere")));
        };
        let first = match dtype {
            DType::U32 => self.first(storage.as_cuda_slice::<u32>()?),
            DType::F32 => self.first(storage.as_cuda_slice::<f32>()?),
            DType::F16 => self.first(storage.as_cuda_slice::<f16>()?),
            DType::BF16 => self.first(storage.as_cuda_slice::<bf16>()?),
            other => return Err(Error::Model(format!("{what}: no kernel takes {other:?}"))),
        };
        Ok(first + (layout.start_offset() * dtype.size_in_bytes()) as u64)
    }

    fn first<T>(&self, slice: &impl DevicePtr<T>) -> Address {
        slice.device_ptr(&self.stream).0
    }

    /// The sum that is normed (`x` itself, if nothing else is given) and the result.
    pub(super) fn rms_norm(&self, norm: &Norm) -> Result<(Tensor, Tensor)> {
        let (rows, hidden) = norm.x.dims2()?;
        let tokens = norm.ids.map_or(Ok(rows), Tensor::dims1)?;
        let (x, y) = (norm.x.contiguous()?, norm.y.map(Tensor::contiguous).transpose()?);
        let (dims, bare) = ([tokens, hidden], norm.y.is_none() && norm.ids.is_none());
        let sum = if bare { None } else { Some(self.output(&dims, x.dtype())?) };
        let normed = self.output(&dims, x.dtype())?;
        let params = kernels::RmsNorm {
            x: self.at("x", &x, &[rows, hidden])?,
            y: self.at_if("y", &y, &dims)?,
            ids: norm.ids.map_or(Ok(0), |ids| self.address("ids", ids, DType::U32, &[tokens]))?,
            weight: self.at("weight", norm.weight, &[hidden])?,
            sum: self.at_if("sum", &sum, &dims)?,
            normed: self.at("normed", &normed, &dims)?,
            tokens: tokens as u32,
            hidden: hidden as u32,
            rows: rows as u32,
            eps: norm.eps as f32,
        };
        // SAFETY: `at` and `address` have checked every operand; the kernel reads no row beyond `rows`.
        unsafe { self.kernels.rms_norm(&self.stream, self.dtype.1, &params) }.map_err(failed)?;
        Ok((sum.unwrap_or(x), normed))
    }

    /// `None` if the product is not the kernel's.
    pub(super) fn matvec(&self, x: &Tensor, weight: &Tensor) -> Result<Option<Tensor>> {
        self.few(x, weight, false)
    }

    /// `None` if the product is not the kernel's.
    pub(super) fn matvec_silu_mul(&self, x: &Tensor, weight: &Tensor) -> Result<Option<Tensor>> {
        self.few(x, weight, true)
    }

    fn few(&self, x: &Tensor, weight: &Tensor, gated: bool) -> Result<Option<Tensor>> {
        let ((tokens, input), (rows, _)) = (x.dims2()?, weight.dims2()?);
        let contiguous = x.is_contiguous() && weight.is_contiguous();
        if self.dtype.1 == Dtype::F32 || !(1..=FEW_TOKENS).contains(&tokens) || !input.is_multiple_of(8) || !contiguous
        {
            return Ok(None);
        }
        let out = if gated { rows / 2 } else { rows };
        let y = self.output(&[tokens, out], x.dtype())?;
        let params = Matvec {
            x: self.at("x", x, &[tokens, input])?,
            w: self.at("weight", weight, &[if gated { 2 * out } else { out }, input])?,
            y: self.at("y", &y, &[tokens, out])?,
            tokens: tokens as u32,
            input: input as u32,
            out: out as u32,
        };
        if !(params.x.is_multiple_of(16) && params.w.is_multiple_of(16)) {
            return Ok(None);
        }
        // SAFETY: `at` has checked every operand, and their alignment was just looked at.
        unsafe { self.kernels.matvec(&self.stream, self.dtype.1, gated, &params) }.map_err(failed)?;
        Ok(Some(y))
    }

    pub(super) fn add_bias(&self, y: Tensor, bias: &Tensor) -> Result<Tensor> {
        let (tokens, columns) = y.dims2()?;
        let y = y.contiguous()?;
        let params = kernels::AddBias {
            y: self.at("y", &y, &[tokens, columns])?,
            bias: self.at("bias", bias, &[columns])?,
            tokens: tokens as u32,
            columns: columns as u32,
        };
        // SAFETY: `at` has checked every operand.
        unsafe { self.kernels.add_bias(&self.stream, self.dtype.1, &params) }.map_err(failed)?;
        Ok(y)
    }

    pub(super) fn silu_mul(&self, gate_up: &Tensor) -> Result<Tensor> {
        let (tokens, columns) = (gate_up.dim(0)?, gate_up.dim(1)? / 2);
        let gate_up = &gate_up.contiguous()?;
        let out = self.output(&[tokens, columns], gate_up.dtype())?;
        let params = kernels::SiluMul {
            gate_up: self.at("gate_up", gate_up, &[tokens, 2 * columns])?,
            out: self.at("out", &out, &[tokens, columns])?,
            tokens: tokens as u32,
            columns: columns as u32,
        };
        // SAFETY: `at` has checked every operand.
        unsafe { self.kernels.silu_mul(&self.stream, self.dtype.1, &params) }.map_err(failed)?;
        Ok(out)
    }

    pub(super) fn rms_norm_backward(
        &self,
        x: &Tensor,
        weight: &Tensor,
        eps: f64,
        dy: &Tensor,
        add: Option<&Tensor>,
    ) -> Result<Tensor> {
        let (rows, hidden) = x.dims2()?;
        let (x, dy, add) = (x.contiguous()?, dy.contiguous()?, add.map(Tensor::contiguous).transpose()?);
        let (dims, dx) = ([rows, hidden], self.output(&[rows, hidden], x.dtype())?);
        let params = kernels::RmsNormBackward {
            x: self.at("x", &x, &dims)?,
            weight: self.at("weight", weight, &[hidden])?,
            dy: self.at("dy", &dy, &dims)?,
            add: self.at_if("add", &add, &dims)?,
            dx: self.at("dx", &dx, &dims)?,
            pitch: hidden as u64,
            rows: rows as u32,
            group: 1,
            hidden: hidden as u32,
            eps: eps as f32,
        };
        // SAFETY: `at` has checked every operand.
        unsafe { self.kernels.rms_norm_backward(&self.stream, self.dtype.1, &params) }.map_err(failed)?;
        Ok(dx)
    }

    pub(super) fn rms_norm_weight_gradient(&self, x: &Tensor, eps: f64, dy: &Tensor) -> Result<Tensor> {
        let (rows, hidden) = x.dims2()?;
        let (x, dy) = (x.contiguous()?, dy.contiguous()?);
        let blocks = kernels::RmsNormWeight::blocks(rows as u32, hidden as u32);
        let dims = [blocks as usize, hidden];
        let (parts, dweight) = (self.output(&dims, DType::F32)?, self.output(&[hidden], DType::F32)?);
        let params = kernels::RmsNormWeight {
            x: self.at("x", &x, &[rows, hidden])?,
            dy: self.at("dy", &dy, &[rows, hidden])?,
            parts: self.address("parts", &parts, DType::F32, &dims)?,
            dweight: self.address("dweight", &dweight, DType::F32, &[hidden])?,
            rows: rows as u32,
            hidden: hidden as u32,
            blocks,
            eps: eps as f32,
        };
        // SAFETY: `at` and `address` have checked every operand; there are as many parts as blocks.
        unsafe { self.kernels.rms_norm_weight(&self.stream, self.dtype.1, &params) }.map_err(failed)?;
        Ok(dweight)
    }

    pub(super) fn silu_mul_backward(&self, gate_up: &Tensor, dy: &Tensor) -> Result<Tensor> {
        let (tokens, columns) = (gate_up.dim(0)?, gate_up.dim(1)? / 2);
        let (gate_up, dy) = (gate_up.contiguous()?, dy.contiguous()?);
        let (dims, dgate_up) = ([tokens, 2 * columns], self.output(&[tokens, 2 * columns], gate_up.dtype())?);
        let params = kernels::SiluMulBackward {
            gate_up: self.at("gate_up", &gate_up, &dims)?,
            dy: self.at("dy", &dy, &[tokens, columns])?,
            dgate_up: self.at("dgate_up", &dgate_up, &dims)?,
            tokens: tokens as u32,
            columns: columns as u32,
        };
        // SAFETY: `at` has checked every operand.
        unsafe { self.kernels.silu_mul_backward(&self.stream, self.dtype.1, &params) }.map_err(failed)?;
        Ok(dgate_up)
    }

    pub(super) fn argmax(&self, x: &Tensor) -> Result<Tensor> {
        let (rows, columns) = x.dims2()?;
        let x = &x.contiguous()?;
        let best = self.output(&[rows], DType::U32)?;
        let params = kernels::Argmax {
            x: self.at("x", x, &[rows, columns])?,
            best: self.address("best", &best, DType::U32, &[rows])?,
            rows: rows as u32,
            columns: columns as u32,
        };
        // SAFETY: `at` and `address` have checked every operand.
        unsafe { self.kernels.argmax(&self.stream, self.dtype.1, &params) }.map_err(failed)?;
        Ok(best)
    }

    pub(super) fn gate(&self, x: &Tensor, weights: &GateWeights, scale: f64, offset: f64) -> Result<Tensor> {
        let ((tokens, hidden), heads) = (x.dims2()?, weights.weight.dim(0)?);
        let x = &x.contiguous()?;
        let logits = self.output(&[tokens, heads], DType::F32)?;
        let params = kernels::Gate {
            x: self.at("x", x, &[tokens, hidden])?,
            norm: self.at("norm", &weights.norm, &[hidden])?,
            weight: self.at("weight", &weights.weight, &[heads, hidden])?,
            bias: self.at_if("bias", &weights.bias, &[heads])?,
            logits: self.address("logits", &logits, DType::F32, &[tokens, heads])?,
            tokens: tokens as u32,
            hidden: hidden as u32,
            heads: heads as u32,
            eps: weights.eps as f32,
            scale: scale as f32,
            offset: offset as f32,
        };
        // SAFETY: `at` and `address` have checked every operand.
        unsafe { self.kernels.gate(&self.stream, self.dtype.1, &params) }.map_err(failed)?;
        Ok(logits)
    }

    pub(super) fn heads(&self, heads: &Heads, qkv: Tensor, rotation: &Rotation) -> Result<Tensor> {
        let Heads { q_heads, kv_heads, head_dim, .. } = *heads;
        let (tokens, columns) = (qkv.dim(0)?, (q_heads + 2 * kv_heads) * head_dim);
        let qkv = qkv.contiguous()?;
        let params = kernels::Heads {
            qkv: self.at("qkv", &qkv, &[tokens, columns])?,
            bias: self.at_if("bias", &heads.bias, &[columns])?,
            q_norm: self.at_if("q_norm", &heads.q_norm, &[head_dim])?,
            k_norm: self.at_if("k_norm", &heads.k_norm, &[head_dim])?,
            positions: self.address("positions", &rotation.positions, DType::U32, &[tokens])?,
            inv_freq: self.address("inv_freq", &rotation.inv_freq, DType::F32, &[head_dim / 2])?,
            tokens: tokens as u32,
            q_heads: q_heads as u32,
            kv_heads: kv_heads as u32,
            head_dim: head_dim as u32,
            interleaved: (rotation.layout == RopeLayout::Interleaved) as u32,
            eps: heads.eps as f32,
        };
        // SAFETY: `at` and `address` have checked every operand.
        unsafe { self.kernels.heads(&self.stream, self.dtype.1, &params) }.map_err(failed)?;
        Ok(qkv)
    }

    /// Query and key heads where they lie, a launch each.
    pub(super) fn heads_norm_backward(&self, heads: &Heads, qkv: &Tensor, dqkv: Tensor) -> Result<Tensor> {
        let Heads { q_heads, kv_heads, head_dim, .. } = *heads;
        let (tokens, all) = (dqkv.dim(0)?, q_heads + 2 * kv_heads);
        let (qkv, dqkv, dims) = (qkv.contiguous()?, dqkv.contiguous()?, [tokens, all, head_dim]);
        let (x, dy) = (self.at("qkv", &qkv, &dims)?, self.at("dqkv", &dqkv, &dims)?);
        for (norm, first, group) in [(&heads.q_norm, 0, q_heads), (&heads.k_norm, q_heads, kv_heads)] {
            let Some(weight) = norm else { continue };
            let skipped = (first * head_dim * self.dtype.0.size_in_bytes()) as u64;
            let params = kernels::RmsNormBackward {
                x: x + skipped,
                weight: self.at("norm", weight, &[head_dim])?,
                dy: dy + skipped,
                add: 0,
                dx: dy + skipped,
                pitch: (all * head_dim) as u64,
                rows: (tokens * group) as u32,
                group: group as u32,
                hidden: head_dim as u32,
                eps: heads.eps as f32,
            };
            // SAFETY: `at` has checked every operand; heads `first` to `first + group` are among all of them.
            unsafe { self.kernels.rms_norm_backward(&self.stream, self.dtype.1, &params) }.map_err(failed)?;
        }
        Ok(dqkv)
    }

    pub(super) fn random(&self, dims: &[usize], width: f32, seed: u64) -> Result<Tensor> {
        let numbers = self.output(dims, self.dtype.0)?;
        let (out, count) = (self.at("numbers", &numbers, dims)?, numbers.elem_count() as u64);
        let params = kernels::Fill { out, state: seed, count, width };
        // SAFETY: `at` has checked the operand.
        unsafe { self.kernels.fill(&self.stream, self.dtype.1, &params) }.map_err(failed)?;
        Ok(numbers)
    }
}

fn failed(error: DriverError) -> Error {
    candle_core::Error::Cuda(Box::new(error)).into()
}
