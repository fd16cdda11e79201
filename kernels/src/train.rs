//! Backward passes of what a decoder does between its matrix products: the structures of `cuda/train.cu`, and their
//! launches.
//!
//! A launch over nothing is no launch. Rows are contiguous.

use crate::{
    model::{flat, name, width},
    module::{Dtype, Kernels, Launch},
    store::Address,
};
use cudarc::driver::{CudaStream, DeviceRepr, DriverError};

/// `dx = add` + what a gradient after `rms_norm(x) * weight` is before it.
///
/// Row r of `x`, `dy`, `add` and `dx` is `hidden` elements from element `(r / group) * pitch + (r % group) * hidden` on:
/// `group` heads of tokens that are `pitch` elements apart, or all rows in order if both `group * hidden` and `pitch` are
/// one row.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct RmsNormBackward {
    /// Rows, before the norm.
    pub x: Address,
    /// `[hidden]`.
    pub weight: Address,
    /// Rows: the gradient after the norm.
    pub dy: Address,
    /// Rows, or 0: nothing is added.
    pub add: Address,
    /// Rows: the gradient before the norm. May be `dy` or `add`.
    pub dx: Address,
    /// Elements from one group of rows to the next, a multiple of `hidden`.
    pub pitch: u64,
    /// Rows.
    pub rows: u32,
    /// Rows that lie side by side, at least 1.
    pub group: u32,
    /// Components of a row.
    pub hidden: u32,
    /// Added to the mean square.
    pub eps: f32,
}

/// `dweight = sum over rows of dy * rms_norm(x)`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct RmsNormWeight {
    /// `[rows, hidden]`, before the norm.
    pub x: Address,
    /// `[rows, hidden]`: the gradient after the norm.
    pub dy: Address,
    /// f32 `[blocks, hidden]`, scratch.
    pub parts: Address,
    /// f32 `[hidden]`.
    pub dweight: Address,
    /// Rows.
    pub rows: u32,
    /// Components of a row.
    pub hidden: u32,
    /// [`RmsNormWeight::blocks`].
    pub blocks: u32,
    /// Added to the mean square.
    pub eps: f32,
}

impl RmsNormWeight {
    /// In how many parts rows are summed: enough for a large GPU, by numbers alone, so that a sum is the same everywhere.
    pub fn blocks(rows: u32, hidden: u32) -> u32 {
        rows.div_ceil(8).min((1 << 21) / hidden.max(1)).clamp(1, 1 << 13)
    }
}

/// What a gradient after `silu(gate) * up` is before it.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct SiluMulBackward {
    /// `[tokens, 2, columns]`.
    pub gate_up: Address,
    /// `[tokens, columns]`: the gradient of the product.
    pub dy: Address,
    /// `[tokens, 2, columns]`: the gradient of both. May be `gate_up`.
    pub dgate_up: Address,
    /// Tokens.
    pub tokens: u32,
    /// Components of the product.
    pub columns: u32,
}

macro_rules! plain {
    ($($type:ty),*) => { $(
        // SAFETY: plain numbers laid out as C lays out the structure of the same name.
        unsafe impl DeviceRepr for $type {}
    )* };
}
plain!(RmsNormBackward, RmsNormWeight, SiluMulBackward);

const MODULE: &str = "train";

/// Threads of a block that takes rows of `columns`, `elements` at a time.
fn threads(columns: u32, elements: u32) -> u32 {
    columns.div_ceil(elements).next_multiple_of(32).min(1024)
}

impl Kernels {
    /// The gradient before a norm.
    ///
    /// # Safety
    /// Addresses are good until the stream has passed the kernel, of the type `dtype` and of the shapes
    /// [`RmsNormBackward`] gives.
    ///
    /// # Errors
    /// The driver's, also for rows that do not fit a block's shared memory twice.
    pub unsafe fn rms_norm_backward(
        &self,
        stream: &CudaStream,
        dtype: Dtype,
        p: &RmsNormBackward,
    ) -> Result<(), DriverError> {
        if p.rows == 0 || p.hidden == 0 {
            return Ok(());
        }
        let (wide, elements) = width(dtype, p.hidden, &[p.x, p.weight, p.dy, p.add, p.dx]);
        let shared = 2 * p.hidden * dtype.bytes();
        let launch = Launch { grid: (p.rows, 1, 1), threads: threads(p.hidden, elements), shared };
        // SAFETY: the caller's.
        unsafe { self.launch(stream, (MODULE, &name("rms_norm_backward", wide, dtype)), launch, p) }
    }

    /// The gradient of a norm's weight, in two kernels.
    ///
    /// # Safety
    /// As [`Kernels::rms_norm_backward`], of [`RmsNormWeight`].
    ///
    /// # Errors
    /// The driver's, also for rows that do not fit a block's shared memory twice in f32.
    pub unsafe fn rms_norm_weight(
        &self,
        stream: &CudaStream,
        dtype: Dtype,
        p: &RmsNormWeight,
    ) -> Result<(), DriverError> {
        if p.hidden == 0 {
            return Ok(());
        }
        let (wide, elements) = width(dtype, p.hidden, &[p.x, p.dy]);
        let threads = threads(p.hidden, elements);
        let shared = 2 * p.hidden.next_multiple_of(threads * elements) * 4;
        let launch = Launch { grid: (p.blocks, 1, 1), threads, shared };
        // SAFETY: the caller's.
        unsafe { self.launch(stream, (MODULE, &name("rms_norm_weight_parts", wide, dtype)), launch, p) }?;
        let launch = Launch { grid: (p.hidden.div_ceil(32), 1, 1), threads: 1024, shared: 0 };
        // SAFETY: the caller's; the parts were just made.
        unsafe { self.launch(stream, (MODULE, "rms_norm_weight_sum"), launch, p) }
    }

    /// The gradient of gate and up.
    ///
    /// # Safety
    /// As [`Kernels::rms_norm_backward`], of [`SiluMulBackward`].
    ///
    /// # Errors
    /// The driver's.
    pub unsafe fn silu_mul_backward(
        &self,
        stream: &CudaStream,
        dtype: Dtype,
        p: &SiluMulBackward,
    ) -> Result<(), DriverError> {
        let items = u64::from(p.tokens) * u64::from(p.columns);
        if items == 0 {
            return Ok(());
        }
        let (wide, elements) = width(dtype, p.columns, &[p.gate_up, p.dy, p.dgate_up]);
        let launch = flat(items / u64::from(elements));
        // SAFETY: the caller's.
        unsafe { self.launch(stream, (MODULE, &name("silu_mul_backward", wide, dtype)), launch, p) }
    }
}
