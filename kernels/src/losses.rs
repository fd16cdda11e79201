//! Losses of rows of logits and their gradients: the structures of `cuda/losses.cu`, and their launches.
//!
//! A launch over no rows is no launch. Rows are contiguous. A row of weight 0 gets a gradient of 0 whatever its logits.

use crate::{
    model::{name, width},
    module::{Dtype, Kernels, Launch},
    store::Address,
};
use cudarc::driver::{CudaStream, DeviceRepr, DriverError};

/// The divergence of a student's and a teacher's probabilities.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Distil {
    /// `[rows, vocab]`: the student's logits, overwritten by their gradient.
    pub student: Address,
    /// `[rows, vocab]`: the teacher's.
    pub teacher: Address,
    /// f32 `[rows]`: factors of the gradient.
    pub weights: Address,
    /// f32 `[rows]`.
    pub kl: Address,
    /// Rows.
    pub rows: u32,
    /// Logits of a row.
    pub vocab: u32,
}

/// `nll = -log softmax(logits)[target]`. A target outside the vocabulary makes NaN of its row; with a weight of 0, 0.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct CrossEntropy {
    /// `[rows, vocab]`, overwritten by their gradient.
    pub logits: Address,
    /// u32 `[rows]`.
    pub targets: Address,
    /// f32 `[rows]`: factors of the gradient.
    pub weights: Address,
    /// f32 `[rows]`.
    pub nll: Address,
    /// Rows.
    pub rows: u32,
    /// Logits of a row.
    pub vocab: u32,
}

// SAFETY: plain numbers laid out as C lays out the structure of the same name.
unsafe impl DeviceRepr for Distil {}
// SAFETY: as above.
unsafe impl DeviceRepr for CrossEntropy {}

const MODULE: &str = "losses";

fn per_row(rows: u32) -> Launch {
    Launch { grid: (rows, 1, 1), threads: 512, shared: 0 }
}

impl Kernels {
    /// KL(student || teacher).
    ///
    /// # Safety
    /// Addresses are good until the stream has passed the kernel, of the type `dtype` and of the shapes [`Distil`] gives;
    /// nothing else uses the student's logits.
    ///
    /// # Errors
    /// The driver's.
    pub unsafe fn distil(&self, stream: &CudaStream, dtype: Dtype, p: &Distil) -> Result<(), DriverError> {
        // SAFETY: the caller's.
        unsafe { self.divergence(stream, dtype, "distil", p) }
    }

    /// KL(teacher || student).
    ///
    /// # Safety
    /// As [`Kernels::distil`].
    ///
    /// # Errors
    /// The driver's.
    pub unsafe fn distil_teacher(&self, stream: &CudaStream, dtype: Dtype, p: &Distil) -> Result<(), DriverError> {
        // SAFETY: the caller's.
        unsafe { self.divergence(stream, dtype, "distil_teacher", p) }
    }

    unsafe fn divergence(
        &self,
        stream: &CudaStream,
        dtype: Dtype,
        kernel: &str,
        p: &Distil,
    ) -> Result<(), DriverError> {
        if p.rows == 0 {
            return Ok(());
        }
        let (wide, _) = width(dtype, p.vocab, &[p.student, p.teacher]);
        // SAFETY: the caller's.
        unsafe { self.launch(stream, (MODULE, &name(kernel, wide, dtype)), per_row(p.rows), p) }
    }

    /// The loss of next tokens.
    ///
    /// # Safety
    /// As [`Kernels::distil`], of [`CrossEntropy`].
    ///
    /// # Errors
    /// The driver's.
    pub unsafe fn cross_entropy(&self, stream: &CudaStream, dtype: Dtype, p: &CrossEntropy) -> Result<(), DriverError> {
        if p.rows == 0 {
            return Ok(());
        }
        let (wide, _) = width(dtype, p.vocab, &[p.logits]);
        // SAFETY: the caller's.
        unsafe { self.launch(stream, (MODULE, &name("cross_entropy", wide, dtype)), per_row(p.rows), p) }
    }
}
