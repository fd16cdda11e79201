//! What a decoder does around its cache: the structures of `cuda/model.cu` and `cuda/matvec.cu`, and their launches.
//!
//! A launch over nothing is no launch. Rows are contiguous.

use crate::{
    module::{Dtype, Kernels, Launch},
    store::Address,
};
use cudarc::driver::{CudaStream, DeviceRepr, DriverError};

/// `sum = x + y`, `normed = rms_norm(sum) * weight`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct RmsNorm {
    /// `[tokens, hidden]`; with `ids` `[rows, hidden]`, of which row `ids[t]` is token t.
    pub x: Address,
    /// `[tokens, hidden]`, or 0: nothing is added.
    pub y: Address,
    /// u32 `[tokens]`, or 0. An id of no row reads as NaN.
    pub ids: Address,
    /// `[hidden]`.
    pub weight: Address,
    /// `[tokens, hidden]`, or 0: unwanted. May be `x`.
    pub sum: Address,
    /// `[tokens, hidden]`.
    pub normed: Address,
    /// Tokens.
    pub tokens: u32,
    /// Components of a token.
    pub hidden: u32,
    /// Rows of `x`: tokens, if there are no ids.
    pub rows: u32,
    /// Added to the mean square.
    pub eps: f32,
}

/// Bias, RMS norm and RoPE of a projection to queries, keys and values, in place.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Heads {
    /// `[tokens, q_heads + 2 kv_heads, head_dim]`.
    pub qkv: Address,
    /// `[q_heads + 2 kv_heads, head_dim]`, or 0.
    pub bias: Address,
    /// `[head_dim]`, or 0.
    pub q_norm: Address,
    /// `[head_dim]`, or 0.
    pub k_norm: Address,
    /// u32 `[tokens]`.
    pub positions: Address,
    /// f32 `[head_dim / 2]`.
    pub inv_freq: Address,
    /// Tokens.
    pub tokens: u32,
    /// Query heads.
    pub q_heads: u32,
    /// KV heads.
    pub kv_heads: u32,
    /// Components of a head, even.
    pub head_dim: u32,
    /// Not 0: pair i is (2i, 2i + 1), else (i, i + head_dim / 2).
    pub interleaved: u32,
    /// Added to the mean square.
    pub eps: f32,
}

/// `out = silu(gate) * up`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct SiluMul {
    /// `[tokens, 2, columns]`.
    pub gate_up: Address,
    /// `[tokens, columns]`.
    pub out: Address,
    /// Tokens.
    pub tokens: u32,
    /// Components of the result.
    pub columns: u32,
}

/// `y += bias`, in place.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct AddBias {
    /// `[tokens, columns]`.
    pub y: Address,
    /// `[columns]`.
    pub bias: Address,
    /// Tokens.
    pub tokens: u32,
    /// Components of a token.
    pub columns: u32,
}

/// `logits = (rms_norm(x) * norm . weight + bias) * scale - offset`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Gate {
    /// `[tokens, hidden]`.
    pub x: Address,
    /// `[hidden]`.
    pub norm: Address,
    /// `[heads, hidden]`.
    pub weight: Address,
    /// `[heads]`, or 0.
    pub bias: Address,
    /// f32 `[tokens, heads]`.
    pub logits: Address,
    /// Tokens.
    pub tokens: u32,
    /// Components of a token.
    pub hidden: u32,
    /// Logits of a token.
    pub heads: u32,
    /// Added to the mean square.
    pub eps: f32,
    /// Factor of the logits.
    pub scale: f32,
    /// Taken from the logits.
    pub offset: f32,
}

/// Index of the largest of each row, the lowest of equals; NaN is never the largest.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Argmax {
    /// `[rows, columns]`.
    pub x: Address,
    /// u32 `[rows]`.
    pub best: Address,
    /// Rows.
    pub rows: u32,
    /// Components of a row, at least 1.
    pub columns: u32,
}

/// `bits = x > above`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Threshold {
    /// f32 `[rows, columns]`.
    pub x: Address,
    /// u8 `[rows, columns]`.
    pub bits: Address,
    /// The bound.
    pub above: f32,
    /// Rows.
    pub rows: u32,
    /// Components of a row.
    pub columns: u32,
    /// Not 0: column 0 speaks for its row.
    pub shared: u32,
}

/// A number in [0, 1) for each position and head: the fraction of `a p^2 + b p + c` in f64, the heads' a, b and c from
/// the stream of SplitMix64 that starts at `state`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Draw {
    /// u32 `[tokens]`.
    pub positions: Address,
    /// `[tokens, heads]`: u8 or f32.
    pub out: Address,
    /// Where the stream starts.
    pub state: u64,
    /// For bits: how many of all are 1.
    pub rate: f64,
    /// Tokens.
    pub tokens: u32,
    /// Heads.
    pub heads: u32,
}

/// Uniform numbers in [-width / 2, width / 2), the stream of SplitMix64 that starts at `state`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Fill {
    /// `[count]`.
    pub out: Address,
    /// Where the stream starts.
    pub state: u64,
    /// How many.
    pub count: u64,
    /// How wide.
    pub width: f32,
}

/// `y = x W^T` for up to [`Matvec::TOKENS`] tokens.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Matvec {
    /// `[tokens, in]`, 16-byte aligned.
    pub x: Address,
    /// `[out, in]`, 16-byte aligned; gated `[2 out, in]`, the gate's rows first.
    pub w: Address,
    /// `[tokens, out]`.
    pub y: Address,
    /// Tokens, at least 1.
    pub tokens: u32,
    /// Components of `x`, a multiple of 8.
    pub input: u32,
    /// Components of `y`.
    pub out: u32,
}

impl Matvec {
    /// The most tokens.
    pub const TOKENS: usize = 32;
}

macro_rules! plain {
    ($($type:ty),*) => { $(
        // SAFETY: plain numbers laid out as C lays out the structure of the same name.
        unsafe impl DeviceRepr for $type {}
    )* };
}
plain!(RmsNorm, Heads, SiluMul, AddBias, Gate, Argmax, Threshold, Draw, Fill, Matvec);

const MODULE: &str = "model";

/// A thread each.
pub(crate) fn flat(items: u64) -> Launch {
    Launch { grid: (items.div_ceil(256) as u32, 1, 1), threads: 256, shared: 0 }
}

/// Whether rows of `columns` elements can be read 16 bytes at a time, and how many elements that is.
pub(crate) fn width(dtype: Dtype, columns: u32, addresses: &[Address]) -> (bool, u32) {
    let wide = 16 / dtype.bytes();
    let fits = columns.is_multiple_of(wide) && addresses.iter().all(|address| address.is_multiple_of(16));
    (fits, if fits { wide } else { 1 })
}

pub(crate) fn name(kernel: &str, wide: bool, dtype: Dtype) -> String {
    format!("{kernel}{}_{}", if wide { "" } else { "_narrow" }, dtype.suffix())
}

impl Kernels {
    /// Adds, keeps the sum, norms.
    ///
    /// # Safety
    /// Addresses are good until the stream has passed the kernel, of the type `dtype` and of the shapes [`RmsNorm`] gives.
    ///
    /// # Errors
    /// The driver's.
    pub unsafe fn rms_norm(&self, stream: &CudaStream, dtype: Dtype, p: &RmsNorm) -> Result<(), DriverError> {
        if p.tokens == 0 {
            return Ok(());
        }
        let (wide, elements) = width(dtype, p.hidden, &[p.x, p.y, p.weight, p.sum, p.normed]);
        let threads = p.hidden.div_ceil(elements).next_multiple_of(32).min(1024);
        let launch = Launch { grid: (p.tokens, 1, 1), threads, shared: p.hidden * dtype.bytes() };
        // SAFETY: the caller's.
        unsafe { self.launch(stream, (MODULE, &name("rms_norm", wide, dtype)), launch, p) }
    }

    /// Finishes queries, keys and values.
    ///
    /// # Safety
    /// As [`Kernels::rms_norm`], of [`Heads`].
    ///
    /// # Errors
    /// The driver's.
    pub unsafe fn heads(&self, stream: &CudaStream, dtype: Dtype, p: &Heads) -> Result<(), DriverError> {
        let values = if p.bias == 0 { 0 } else { p.kv_heads };
        let warps = u64::from(p.tokens) * u64::from(p.q_heads + p.kv_heads + values);
        if warps == 0 {
            return Ok(());
        }
        let launch = Launch { grid: (warps.div_ceil(4) as u32, 1, 1), threads: 128, shared: 0 };
        // SAFETY: the caller's.
        unsafe { self.launch(stream, (MODULE, &format!("heads_{}", dtype.suffix())), launch, p) }
    }

    /// Multiplies by the gate.
    ///
    /// # Safety
    /// As [`Kernels::rms_norm`], of [`SiluMul`].
    ///
    /// # Errors
    /// The driver's.
    pub unsafe fn silu_mul(&self, stream: &CudaStream, dtype: Dtype, p: &SiluMul) -> Result<(), DriverError> {
        let items = u64::from(p.tokens) * u64::from(p.columns);
        if items == 0 {
            return Ok(());
        }
        let (wide, elements) = width(dtype, p.columns, &[p.gate_up, p.out]);
        let launch = flat(items / u64::from(elements));
        // SAFETY: the caller's.
        unsafe { self.launch(stream, (MODULE, &name("silu_mul", wide, dtype)), launch, p) }
    }

    /// Adds a bias.
    ///
    /// # Safety
    /// As [`Kernels::rms_norm`], of [`AddBias`].
    ///
    /// # Errors
    /// The driver's.
    pub unsafe fn add_bias(&self, stream: &CudaStream, dtype: Dtype, p: &AddBias) -> Result<(), DriverError> {
        let items = u64::from(p.tokens) * u64::from(p.columns);
        if items == 0 {
            return Ok(());
        }
        let (wide, elements) = width(dtype, p.columns, &[p.y, p.bias]);
        let launch = flat(items / u64::from(elements));
        // SAFETY: the caller's.
        unsafe { self.launch(stream, (MODULE, &name("add_bias", wide, dtype)), launch, p) }
    }

    /// Decision logits.
    ///
    /// # Safety
    /// As [`Kernels::rms_norm`], of [`Gate`].
    ///
    /// # Errors
    /// The driver's.
    pub unsafe fn gate(&self, stream: &CudaStream, dtype: Dtype, p: &Gate) -> Result<(), DriverError> {
        let warps = u64::from(p.tokens) * u64::from(p.heads);
        if warps == 0 {
            return Ok(());
        }
        let (wide, _) = width(dtype, p.hidden, &[p.x, p.norm, p.weight]);
        let launch = Launch { grid: (warps.div_ceil(4) as u32, 1, 1), threads: 128, shared: 0 };
        // SAFETY: the caller's.
        unsafe { self.launch(stream, (MODULE, &name("gate", wide, dtype)), launch, p) }
    }

    /// The most likely of each row.
    ///
    /// # Safety
    /// As [`Kernels::rms_norm`], of [`Argmax`].
    ///
    /// # Errors
    /// The driver's.
    pub unsafe fn argmax(&self, stream: &CudaStream, dtype: Dtype, p: &Argmax) -> Result<(), DriverError> {
        if p.rows == 0 {
            return Ok(());
        }
        let (wide, _) = width(dtype, p.columns, &[p.x]);
        let launch = Launch { grid: (p.rows, 1, 1), threads: 1024, shared: 0 };
        // SAFETY: the caller's.
        unsafe { self.launch(stream, (MODULE, &name("argmax", wide, dtype)), launch, p) }
    }

    /// Bits of logits.
    ///
    /// # Safety
    /// As [`Kernels::rms_norm`], of [`Threshold`].
    ///
    /// # Errors
    /// The driver's.
    pub unsafe fn threshold(&self, stream: &CudaStream, p: &Threshold) -> Result<(), DriverError> {
        let items = u64::from(p.rows) * u64::from(p.columns);
        if items == 0 {
            return Ok(());
        }
        // SAFETY: the caller's.
        unsafe { self.launch(stream, (MODULE, "threshold"), flat(items), p) }
    }

    /// Random bits, u8: 1 where the number is below the rate.
    ///
    /// # Safety
    /// As [`Kernels::rms_norm`], of [`Draw`].
    ///
    /// # Errors
    /// The driver's.
    pub unsafe fn draw_bits(&self, stream: &CudaStream, p: &Draw) -> Result<(), DriverError> {
        // SAFETY: the caller's.
        unsafe { self.draw(stream, "draw_bits", p) }
    }

    /// Random numbers, f32.
    ///
    /// # Safety
    /// As [`Kernels::rms_norm`], of [`Draw`].
    ///
    /// # Errors
    /// The driver's.
    pub unsafe fn draw_scores(&self, stream: &CudaStream, p: &Draw) -> Result<(), DriverError> {
        // SAFETY: the caller's.
        unsafe { self.draw(stream, "draw_scores", p) }
    }

    unsafe fn draw(&self, stream: &CudaStream, kernel: &str, p: &Draw) -> Result<(), DriverError> {
        let items = u64::from(p.tokens) * u64::from(p.heads);
        if items == 0 {
            return Ok(());
        }
        // SAFETY: the caller's.
        unsafe { self.launch(stream, (MODULE, kernel), flat(items), p) }
    }

    /// Random weights.
    ///
    /// # Safety
    /// As [`Kernels::rms_norm`], of [`Fill`].
    ///
    /// # Errors
    /// The driver's.
    pub unsafe fn fill(&self, stream: &CudaStream, dtype: Dtype, p: &Fill) -> Result<(), DriverError> {
        if p.count == 0 {
            return Ok(());
        }
        let launch = flat(p.count.min(1 << 22)); // each thread takes many
        // SAFETY: the caller's.
        unsafe { self.launch(stream, (MODULE, &format!("fill_{}", dtype.suffix())), launch, p) }
    }

    /// A product of few tokens; `gated` with the gate's silu times up as its result. f16 and bf16.
    ///
    /// # Safety
    /// As [`Kernels::rms_norm`], of [`Matvec`].
    ///
    /// # Errors
    /// The driver's.
    pub unsafe fn matvec(&self, stream: &CudaStream, dtype: Dtype, gated: bool, p: &Matvec) -> Result<(), DriverError> {
        if p.out == 0 {
            return Ok(());
        }
        let tiles = match p.tokens {
            0..=8 => 1,
            9..=16 => 2,
            _ => 4,
        };
        let (kernel, rows) = if gated { ("matvec_silu", 8) } else { ("matvec", 16) };
        let launch = Launch { grid: (p.out.div_ceil(rows), 1, 1), threads: 256, shared: 0 };
        // SAFETY: the caller's.
        unsafe { self.launch(stream, ("matvec", &format!("{kernel}_{tiles}_{}", dtype.suffix())), launch, p) }
    }
}
