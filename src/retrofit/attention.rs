//! Attention with soft gates, forward and backward.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

use crate::error::{Error, Result};
use candle_core::{DType, Device, Tensor};

/// Gates below this are taken for it, so that sums stay finite: the weight is zero either way.
const LEAST_KEEP: f32 = -65536.0;

/// Attention of a training step, its gates soft.
///
/// Sequences of equal length lie end to end: `tokens = sequences * length`. Queries, keys and values are one tensor
/// `qkv` `[tokens, q_heads + 2 kv_heads, head_dim]`, in this order of heads. Query head `j` belongs to KV head
/// `j / group`. Query `i` of a sequence attends to its keys `j <= i` with the scores
///
/// ```text
/// scale * q_i . k_j                 for i - j <= window
/// scale * q_i . k_j + keep[j]       beyond the window
/// ```
///
/// where `keep` `[tokens, kv_heads]` is the log-probability, at most 0, that a key is kept; where it is absent, zeros.
///
/// On the CPU tensors are f32 or, for comparisons, f64; on a GPU bf16, f16 or f32. `keep`, its gradient and `lse` are
/// f32 (f64 with f64). All sums are in f32 (f64), in the same order in every run.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use kvpolicy::retrofit::SoftAttention;
///
/// # fn main() -> kvpolicy::Result<()> {
/// let attention =
///     SoftAttention { sequences: 2, length: 20, q_heads: 4, kv_heads: 2, head_dim: 16, window: 8, scale: 0.25 };
/// let qkv = Tensor::randn(0f32, 1.0, (40, 8, 16), &Device::Cpu)?;
/// let keep = Tensor::full(-0.5f32, (40, 2), &Device::Cpu)?;
/// let (y, lse) = attention.forward(&qkv, Some(&keep))?;
/// let grads = attention.backward(&qkv, Some(&keep), &y, &lse, &y.ones_like()?)?;
/// assert_eq!((y.dims(), grads.qkv.dims(), grads.keep.dims()), (&[40, 4, 16][..], qkv.dims(), keep.dims()));
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SoftAttention {
    /// Number of sequences.
    pub sequences: usize,
    /// Tokens of each.
    pub length: usize,
    /// Query heads.
    pub q_heads: usize,
    /// KV heads, of which the query heads are a multiple.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// A key's gate counts for queries further than this behind it.
    pub window: usize,
    /// Of the scores; positive and finite.
    pub scale: f32,
}

/// Gradients of [`SoftAttention::forward`].
#[derive(Debug, Clone)]
pub struct SoftGrads {
    /// Of `qkv`, of its shape and dtype.
    pub qkv: Tensor,
    /// Of `keep`, `[tokens, kv_heads]`; also where it was absent, as for zeros.
    pub keep: Tensor,
}

impl SoftAttention {
    /// The output `[tokens, q_heads, head_dim]`, in the dtype of `qkv`, and the natural logarithm of each query's
    /// softmax sum `[tokens, q_heads]`, which the backward pass needs.
    ///
    /// # Errors
    /// [`Error::Config`] for numbers that make no sense or a dtype or device that is not served, [`Error::Shape`] for
    /// tensors of another shape, and those of the tensor library and the driver.
    pub fn forward(&self, qkv: &Tensor, keep: Option<&Tensor>) -> Result<(Tensor, Tensor)> {
        self.check(qkv, keep)?;
        match qkv.device() {
            Device::Cpu => cpu::forward(self, qkv, keep),
            #[cfg(feature = "cuda")]
            Device::Cuda(_) => cuda::forward(self, qkv, keep),
            other => Err(unserved(other)),
        }
    }

    /// The gradients, given that of `y`; `y` and `lse` are what [`SoftAttention::forward`] gave for `qkv` and `keep`.
    ///
    /// # Errors
    /// As for [`SoftAttention::forward`].
    pub fn backward(
        &self,
        qkv: &Tensor,
        keep: Option<&Tensor>,
        y: &Tensor,
        lse: &Tensor,
        dy: &Tensor,
    ) -> Result<SoftGrads> {
        self.check(qkv, keep)?;
        let heads = [self.tokens(), self.q_heads, self.head_dim];
        like("y", y, &heads, qkv, qkv.dtype())?;
        like("dy", dy, &heads, qkv, qkv.dtype())?;
        like("lse", lse, &heads[..2], qkv, number(qkv.dtype()))?;
        match qkv.device() {
            Device::Cpu => cpu::backward(self, qkv, keep, y, lse, dy),
            #[cfg(feature = "cuda")]
            Device::Cuda(_) => cuda::backward(self, qkv, keep, y, lse, dy),
            other => Err(unserved(other)),
        }
    }

    fn tokens(&self) -> usize {
        self.sequences * self.length
    }

    /// Of `qkv`.
    fn heads(&self) -> usize {
        self.q_heads + 2 * self.kv_heads
    }

    fn group(&self) -> usize {
        self.q_heads / self.kv_heads
    }

    fn check(&self, qkv: &Tensor, keep: Option<&Tensor>) -> Result<()> {
        let &Self { sequences, length, q_heads, kv_heads, head_dim, scale, .. } = self;
        let config = |what: String| Err(Error::Config(format!("soft attention: {what}")));
        if [sequences, length, q_heads, kv_heads, head_dim].contains(&0) {
            return config(format!("every size must be at least 1, got {self:?}"));
        }
        if !q_heads.is_multiple_of(kv_heads) {
            return config(format!("{q_heads} query heads are no multiple of {kv_heads} KV heads"));
        }
        if !(scale.is_finite() && scale > 0.0) {
            return config(format!("the scale must be positive and finite, got {scale}"));
        }
        // Kernels count heads of tokens in 31 bits.
        let heads = kv_heads.checked_mul(2).and_then(|heads| heads.checked_add(q_heads));
        let count = heads.and_then(|n| n.checked_mul(sequences)).and_then(|n| n.checked_mul(length));
        if count.is_none_or(|count| count > i32::MAX as usize) || head_dim > u16::MAX as usize {
            return config(format!("more than fits into a step: {self:?}"));
        }
        like("qkv", qkv, &[self.tokens(), self.heads(), head_dim], qkv, qkv.dtype())?;
        keep.map_or(Ok(()), |keep| like("keep", keep, &[self.tokens(), kv_heads], qkv, number(qkv.dtype())))
    }
}

/// The dtype of numbers that belong to vectors of a dtype.
fn number(dtype: DType) -> DType {
    if dtype == DType::F64 { DType::F64 } else { DType::F32 }
}

/// Whether a tensor has this shape and dtype and is where `other` is.
fn like(what: &'static str, tensor: &Tensor, shape: &[usize], other: &Tensor, dtype: DType) -> Result<()> {
    if tensor.dims() != shape {
        return Err(Error::Shape { what, expected: shape.to_vec(), got: tensor.dims().to_vec() });
    }
    if tensor.dtype() != dtype {
        return Err(Error::Config(format!("{what}: expected {dtype:?}, got {:?}", tensor.dtype())));
    }
    if !tensor.device().same_device(other.device()) {
        let (here, there) = (tensor.device().location(), other.device().location());
        return Err(Error::Config(format!("{what} is on {here:?}, qkv on {there:?}")));
    }
    Ok(())
}

fn unserved(device: &Device) -> Error {
    Error::Config(format!("soft attention is not made for {:?}", device.location()))
}
