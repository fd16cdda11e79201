//! What a decoder computes around its cache: candle's operations on the CPU, and on a GPU one kernel each, none of which
//! touches the host, so that a captured CUDA graph can hold them.
//!
//! Kernels take f32, f16 and bf16 and compute in f32; other types, and quantized weights, go through candle.

#[cfg(feature = "cuda")]
mod cuda;

use crate::error::{Error, Result};
use candle_core::{D, DType, Device, Tensor};
use candle_nn::rotary_emb::{rope, rope_i};
#[cfg(feature = "cuda")]
use cuda::{Gpu, Norm};
use kvpolicy::RopeLayout;
use std::cell::OnceCell;

/// `x`, `[tokens, hidden]`, over its root mean square, times `weight`, `[hidden]`.
///
/// # Errors
/// Those of the tensor library: shapes or types that do not fit.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Some(gpu) = Gpu::of(x)? {
        return Ok(gpu.rms_norm(&Norm { x, y: None, ids: None, weight, eps })?.1);
    }
    Ok(candle_nn::ops::rms_norm(x, weight, eps as f32)?)
}

/// `x + y` and its [`rms_norm`]. `x`, `y` and both results: `[tokens, hidden]`.
///
/// # Errors
/// As [`rms_norm`].
pub fn add_rms_norm(x: &Tensor, y: &Tensor, weight: &Tensor, eps: f64) -> Result<(Tensor, Tensor)> {
    #[cfg(feature = "cuda")]
    if let Some(gpu) = Gpu::of(x)? {
        return gpu.rms_norm(&Norm { x, y: Some(y), ids: None, weight, eps });
    }
    let sum = (x + y)?;
    let normed = rms_norm(&sum, weight, eps)?;
    Ok((sum, normed))
}

/// Rows `ids`, u32 `[tokens]`, of an embedding `[vocab, hidden]`, and their [`rms_norm`]: `[tokens, hidden]` both. On a
/// GPU an id outside the vocabulary reads as NaN, elsewhere it is an error.
///
/// # Errors
/// As [`rms_norm`].
pub fn embed_rms_norm(embedding: &Tensor, ids: &Tensor, weight: &Tensor, eps: f64) -> Result<(Tensor, Tensor)> {
    #[cfg(feature = "cuda")]
    if let Some(gpu) = Gpu::of(embedding)? {
        return gpu.rms_norm(&Norm { x: embedding, y: None, ids: Some(ids), weight, eps });
    }
    let x = embedding.index_select(ids, 0)?;
    let normed = rms_norm(&x, weight, eps)?;
    Ok((x, normed))
}

/// `x W^T`: `x` `[tokens, in]`, `weight` `[out, in]`, the result `[tokens, out]`.
///
/// # Errors
/// As [`rms_norm`].
pub fn linear(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Some(gpu) = Gpu::of(x)?
        && let Some(y) = gpu.matvec(x, weight)?
    {
        return Ok(y);
    }
    Ok(x.matmul(&weight.t()?)?)
}

/// [`linear`], then [`silu_mul`]: `weight` `[2 out, in]`, the gate's rows first.
///
/// # Errors
/// As [`rms_norm`].
pub fn linear_silu_mul(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Some(gpu) = Gpu::of(x)?
        && let Some(y) = gpu.matvec_silu_mul(x, weight)?
    {
        return Ok(y);
    }
    silu_mul(&linear(x, weight)?)
}

/// [`linear`], then [`gelu_mul`]: `weight` `[2 out, in]`, the gate's rows first. A product for each half: its result lies in
/// one piece, as candle's operations on a GPU need it to copy nothing from the host.
///
/// # Errors
/// As [`rms_norm`].
pub fn linear_gelu_mul(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let [gate, up] = halves(weight, 0)?;
    gelu_mul(&linear(x, &gate)?, &linear(x, &up)?)
}

/// `gelu(gate) * up`, the approximation with a tanh: `[tokens, ffn]` all.
///
/// # Errors
/// As [`rms_norm`].
pub fn gelu_mul(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    Ok((gate.gelu()? * up)?)
}

/// The first and the second half along a dimension.
pub(crate) fn halves(x: &Tensor, dim: usize) -> Result<[Tensor; 2]> {
    let half = x.dim(dim)? / 2;
    Ok([x.narrow(dim, 0, half)?, x.narrow(dim, half, half)?])
}

/// `y + bias`: `[tokens, out]` and `[out]`. A GPU overwrites `y`.
///
/// # Errors
/// As [`rms_norm`].
pub fn add_bias(y: Tensor, bias: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Some(gpu) = Gpu::of(&y)? {
        return gpu.add_bias(y, bias);
    }
    Ok(y.broadcast_add(bias)?)
}

/// `silu(gate) * up` of `[tokens, 2 ffn]`, the gate in front: `[tokens, ffn]`.
///
/// # Errors
/// As [`rms_norm`].
pub fn silu_mul(gate_up: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Some(gpu) = Gpu::of(gate_up)? {
        return gpu.silu_mul(gate_up);
    }
    let ffn = gate_up.dim(1)? / 2;
    Ok((candle_nn::ops::silu(&gate_up.narrow(1, 0, ffn)?)? * gate_up.narrow(1, ffn, ffn)?)?)
}

/// The gradient of [`rms_norm`] with respect to its input: `x` as it was normed, `dy` the gradient of the result, and the
/// result all `[rows, hidden]`. `add` of the same shape, the gradient that came past the norm, is added.
///
/// # Errors
/// As [`rms_norm`].
pub fn rms_norm_backward(x: &Tensor, weight: &Tensor, eps: f64, dy: &Tensor, add: Option<&Tensor>) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Some(gpu) = Gpu::of(x)? {
        return gpu.rms_norm_backward(x, weight, eps, dy, add);
    }
    let (x_wide, dy) = (wide(x)?, wide(dy)?.broadcast_mul(&wide(weight)?)?);
    let scale = inverse_rms(&x_wide, eps)?;
    let normed = x_wide.broadcast_mul(&scale)?;
    let along = (&dy * &normed)?.mean_keepdim(D::Minus1)?; // the part of the gradient that the norm takes away
    let dx = (dy - normed.broadcast_mul(&along)?)?.broadcast_mul(&scale)?;
    let dx = match add {
        Some(add) => (dx + wide(add)?)?,
        None => dx,
    };
    Ok(dx.to_dtype(x.dtype())?)
}

/// The gradient of [`rms_norm`] with respect to its weight: f32 `[hidden]`, summed over the rows of `x` and `dy`,
/// `[rows, hidden]` both. A GPU sums in the same order every time.
///
/// # Errors
/// As [`rms_norm`].
pub fn rms_norm_weight_gradient(x: &Tensor, eps: f64, dy: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Some(gpu) = Gpu::of(x)? {
        return gpu.rms_norm_weight_gradient(x, eps, dy);
    }
    let x = wide(x)?;
    let normed = x.broadcast_mul(&inverse_rms(&x, eps)?)?;
    Ok((normed * wide(dy)?)?.sum(0)?.to_dtype(DType::F32)?)
}

/// The gradient of [`silu_mul`]: `[tokens, 2 ffn]` of `gate_up`, `[tokens, 2 ffn]`, and the gradient of the product,
/// `[tokens, ffn]`.
///
/// # Errors
/// As [`rms_norm`].
pub fn silu_mul_backward(gate_up: &Tensor, dy: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Some(gpu) = Gpu::of(gate_up)? {
        return gpu.silu_mul_backward(gate_up, dy);
    }
    let (columns, dy) = (gate_up.dim(1)?, wide(dy)?);
    let ffn = columns / 2;
    let (gate, up) = (wide(&gate_up.narrow(1, 0, ffn)?)?, wide(&gate_up.narrow(1, ffn, columns - ffn)?)?);
    let sigmoid = ((gate.neg()?.exp()? + 1.0)?).recip()?;
    let slope = (&sigmoid * ((&gate * (1.0 - &sigmoid)?)? + 1.0)?)?;
    let dgate = ((&dy * up)? * slope)?;
    let dup = (dy * (gate * sigmoid)?)?;
    Ok(Tensor::cat(&[dgate, dup], 1)?.to_dtype(gate_up.dtype())?)
}

/// Types of 16 bits in f32, for arithmetic.
fn wide(x: &Tensor) -> Result<Tensor> {
    Ok(match x.dtype() {
        DType::F16 | DType::BF16 => x.to_dtype(DType::F32)?,
        _ => x.clone(),
    })
}

/// One over the root mean square of each row: `[rows, 1]` of `[rows, hidden]`.
fn inverse_rms(x: &Tensor, eps: f64) -> Result<Tensor> {
    Ok((x.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?.recip()?)
}

/// Index of the largest of each row of `[rows, columns]`, the lowest of equals: u32 `[rows]`.
///
/// # Errors
/// As [`rms_norm`].
pub fn argmax(x: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Some(gpu) = Gpu::of(x)? {
        return gpu.argmax(x);
    }
    Ok(x.argmax(D::Minus1)?)
}

/// A norm and a projection to one decision logit per KV head.
#[derive(Debug, Clone)]
pub struct GateWeights {
    /// `[hidden]`.
    pub norm: Tensor,
    /// Added to the mean square.
    pub eps: f64,
    /// `[kv_heads, hidden]`.
    pub weight: Tensor,
    /// `[kv_heads]`.
    pub bias: Option<Tensor>,
}

/// `(rms_norm(x) W^T + b) * scale - offset` of `x` `[tokens, hidden]`: f32 `[tokens, kv_heads]`.
///
/// # Errors
/// As [`rms_norm`].
pub fn gate(x: &Tensor, weights: &GateWeights, scale: f64, offset: f64) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Some(gpu) = Gpu::of(x)? {
        return gpu.gate(x, weights, scale, offset);
    }
    let y = linear(&rms_norm(x, &weights.norm, weights.eps)?, &weights.weight)?;
    let y = match &weights.bias {
        Some(bias) => add_bias(y, bias)?,
        None => y,
    };
    Ok(y.to_dtype(DType::F32)?.affine(scale, -offset)?)
}

/// Uniform random numbers of mean 0 and deviation `std`, the same on every device.
///
/// # Errors
/// Those of the tensor library: no memory.
pub fn random(dims: &[usize], std: f64, seed: u64, dtype: DType, device: &Device) -> Result<Tensor> {
    let width = (std * 12f64.sqrt()) as f32;
    #[cfg(feature = "cuda")]
    if let Some(gpu) = Gpu::on(device, dtype)? {
        return gpu.random(dims, width, seed);
    }
    let number = |i: u64| ((splitmix(seed, i) >> 40) as f32 / (1u32 << 24) as f32 - 0.5) * width;
    let numbers: Vec<f32> = (0..dims.iter().product::<usize>() as u64).map(number).collect();
    Ok(Tensor::from_vec(numbers, dims, device)?.to_dtype(dtype)?)
}

/// Where a stream of SplitMix64 is after n numbers.
pub(crate) fn advance(state: u64, n: u64) -> u64 {
    state.wrapping_add(n.wrapping_mul(0x9E37_79B9_7F4A_7C15))
}

/// Number n of the stream of SplitMix64 that starts at `state`.
fn splitmix(state: u64, n: u64) -> u64 {
    let z = advance(state, n.wrapping_add(1));
    let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// Rotary positions of a step's tokens.
#[derive(Debug)]
pub struct Rotation {
    positions: Tensor, // u32 [tokens]
    inv_freq: Tensor,  // f32 [head_dim / 2]
    layout: RopeLayout,
    dtype: DType,
    /// Cosines and sines, `[tokens, 1, head_dim / 2]`, made if asked for: kernels compute their own.
    tables: OnceCell<(Tensor, Tensor)>,
}

impl Rotation {
    /// `positions`: u32 `[tokens]`; `inv_freq`: f32 `[head_dim / 2]`; `dtype`: of what will be rotated.
    pub fn new(positions: Tensor, inv_freq: Tensor, layout: RopeLayout, dtype: DType) -> Self {
        Self { positions, inv_freq, layout, dtype, tables: OnceCell::new() }
    }

    /// The way back, by negative angles: a rotation's inverse, and so its transpose.
    ///
    /// # Errors
    /// As [`rms_norm`].
    pub fn inverse(&self) -> Result<Self> {
        Ok(Self::new(self.positions.clone(), self.inv_freq.neg()?, self.layout, self.dtype))
    }

    /// Angles are computed per step, so no table limits the context.
    fn tables(&self) -> Result<&(Tensor, Tensor)> {
        if let Some(known) = self.tables.get() {
            return Ok(known);
        }
        let positions = self.positions.to_dtype(DType::F32)?.unsqueeze(1)?;
        let angles = positions.broadcast_mul(&self.inv_freq.unsqueeze(0)?)?.unsqueeze(1)?;
        let made = (angles.cos()?.to_dtype(self.dtype)?, angles.sin()?.to_dtype(self.dtype)?);
        Ok(self.tables.get_or_init(|| made))
    }

    /// Rotates `[tokens, heads, head_dim]`: each token is a batch of one position.
    ///
    /// # Errors
    /// As [`rms_norm`].
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        let (cos, sin) = self.tables()?;
        let x = x.unsqueeze(2)?.contiguous()?;
        let turned = match self.layout {
            RopeLayout::HalfSplit => rope(&x, cos, sin)?,
            RopeLayout::Interleaved => rope_i(&x, cos, sin)?,
        };
        Ok(turned.squeeze(2)?)
    }
}

/// What makes queries, keys and values of a projection.
#[derive(Debug, Clone)]
pub struct Heads {
    /// Query heads.
    pub q_heads: usize,
    /// KV heads.
    pub kv_heads: usize,
    /// Components of a head.
    pub head_dim: usize,
    /// `[(q_heads + 2 kv_heads) * head_dim]`.
    pub bias: Option<Tensor>,
    /// RMS norm of each query head, `[head_dim]`.
    pub q_norm: Option<Tensor>,
    /// RMS norm of each key head, `[head_dim]`.
    pub k_norm: Option<Tensor>,
    /// Added to the mean square.
    pub eps: f64,
}

impl Heads {
    /// Queries `[tokens, q_heads, head_dim]`, keys and values `[tokens, kv_heads, head_dim]`, as a cache takes them, of
    /// `qkv`, `[tokens, (q_heads + 2 kv_heads) * head_dim]`. A GPU overwrites `qkv` and gives views of it.
    ///
    /// # Errors
    /// As [`rms_norm`].
    pub fn finish(&self, qkv: Tensor, rotation: &Rotation) -> Result<[Tensor; 3]> {
        #[cfg(feature = "cuda")]
        if let Some(gpu) = Gpu::of(&qkv)? {
            return self.split(&gpu.heads(self, qkv, rotation)?);
        }
        let [q, k, v] = self.before_rope(&qkv)?;
        Ok([rotation.apply(&q)?, rotation.apply(&k)?, v])
    }

    /// The same before RoPE.
    ///
    /// # Errors
    /// As [`rms_norm`].
    pub fn before_rope(&self, qkv: &Tensor) -> Result<[Tensor; 3]> {
        let [q, k, v] = match &self.bias {
            Some(bias) => self.split(&qkv.broadcast_add(bias)?)?,
            None => self.split(qkv)?,
        };
        let norm = |x: Tensor, weight: &Option<Tensor>| match weight {
            Some(weight) => Ok(candle_nn::ops::rms_norm(&x.contiguous()?, weight, self.eps as f32)?),
            None => Ok::<_, Error>(x),
        };
        Ok([norm(q, &self.q_norm)?, norm(k, &self.k_norm)?, v])
    }

    /// The gradient before RoPE given that after it, `[tokens, q_heads + 2 kv_heads, head_dim]` both; that of values is the
    /// same. `rotation`: the one of [`Heads::finish`]. A GPU overwrites `dqkv`.
    ///
    /// # Errors
    /// As [`rms_norm`].
    pub fn unrotate(&self, dqkv: Tensor, rotation: &Rotation) -> Result<Tensor> {
        let back = rotation.inverse()?;
        #[cfg(feature = "cuda")]
        if let Some(gpu) = Gpu::of(&dqkv)? {
            let bare = Self { bias: None, q_norm: None, k_norm: None, ..self.clone() };
            let dims = dqkv.dims3()?;
            return Ok(gpu.heads(&bare, dqkv.flatten_from(1)?, &back)?.reshape(dims)?);
        }
        let [q, k, v] = self.split(&dqkv)?;
        Ok(Tensor::cat(&[back.apply(&q)?, back.apply(&k)?, v], 1)?)
    }

    /// The gradient before the norms of query and key heads given that after them (after [`Heads::unrotate`]), and
    /// `qkv` as they were normed, with their bias: `[tokens, q_heads + 2 kv_heads, head_dim]` all. That of values, and of
    /// heads without a norm, is the same. A GPU overwrites `dqkv`.
    ///
    /// # Errors
    /// As [`rms_norm`].
    pub fn norm_backward(&self, qkv: &Tensor, dqkv: Tensor) -> Result<Tensor> {
        if self.q_norm.is_none() && self.k_norm.is_none() {
            return Ok(dqkv);
        }
        #[cfg(feature = "cuda")]
        if let Some(gpu) = Gpu::of(&dqkv)? {
            return gpu.heads_norm_backward(self, qkv, dqkv);
        }
        let ([q, k, _], [dq, dk, dv]) = (self.split(qkv)?, self.split(&dqkv)?);
        let back = |x: Tensor, dy: Tensor, weight: &Option<Tensor>| match weight {
            Some(weight) => {
                let (dims, rows) = (x.dims3()?, |x: Tensor| x.contiguous()?.reshape(((), self.head_dim)));
                Ok(rms_norm_backward(&rows(x)?, weight, self.eps, &rows(dy)?, None)?.reshape(dims)?)
            }
            None => Ok::<_, Error>(dy),
        };
        Ok(Tensor::cat(&[back(q, dq, &self.q_norm)?, back(k, dk, &self.k_norm)?, dv], 1)?)
    }

    /// Views: a token's next head is `head_dim` further, its next token a row of the projection.
    fn split(&self, qkv: &Tensor) -> Result<[Tensor; 3]> {
        let (q, kv) = (self.q_heads, self.kv_heads);
        let qkv = qkv.reshape((qkv.dim(0)?, q + 2 * kv, self.head_dim))?;
        Ok([qkv.narrow(1, 0, q)?, qkv.narrow(1, q, kv)?, qkv.narrow(1, q + kv, kv)?])
    }
}
