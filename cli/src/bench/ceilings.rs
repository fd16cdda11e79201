//! What the device can do at most: the measure of everything else.

use super::{Time, timer::time};
use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use cudarc::driver::{DevicePtr, result};
use kvpolicy_kernels::Kernels;
use serde::Serialize;

#[derive(Debug, Clone, Serialize)]
pub(crate) struct Ceilings {
    pub(crate) gpu: String,
    /// Device to device, bytes read and written, GB/s.
    pub(crate) copy_gb_s: f64,
    /// Reading alone, GB/s.
    pub(crate) read_gb_s: f64,
    /// bf16, 8192 x 8192 x 8192, TFLOP/s.
    pub(crate) matmul_tflop_s: f64,
}

const BYTES: usize = 1 << 30;

impl Ceilings {
    pub(crate) fn measure(device: &Device) -> Result<Self> {
        let stream = device.as_cuda_device()?.cuda_stream();
        let kernels = Kernels::of(stream.context())?;
        let (from, to) = (stream.alloc_zeros::<u8>(BYTES)?, stream.alloc_zeros::<u8>(BYTES)?);
        let word = stream.alloc_zeros::<u8>(16)?;
        let (source, target, out) = (from.device_ptr(&stream).0, to.device_ptr(&stream).0, word.device_ptr(&stream).0);
        let copy = time(&stream, (3, 20), 1, || {
            // SAFETY: both are `BYTES` long.
            Ok(unsafe { result::memcpy_dtod_async(target, source, BYTES, stream.cu_stream()) }?)
        })?;
        let read = time(&stream, (3, 20), 1, || {
            // SAFETY: `from` is `BYTES` long, `word` holds a word.
            Ok(unsafe { kernels.read_memory(&stream, source, BYTES, out) }?)
        })?;
        let n = 8192;
        let a = Tensor::randn(0f32, 1.0, (n, n), device)?.to_dtype(DType::BF16)?;
        let matmul = time(&stream, (3, 10), 1, || a.matmul(&a).map(|_| ()).map_err(Into::into))?;
        let per_second = |amount: f64, time: Time| amount / time.median_us * 1e6;
        Ok(Self {
            gpu: stream.context().name()?,
            copy_gb_s: per_second(2.0 * BYTES as f64, copy) / 1e9,
            read_gb_s: per_second(BYTES as f64, read) / 1e9,
            matmul_tflop_s: per_second(2.0 * (n as f64).powi(3), matmul) / 1e12,
        })
    }
}

impl std::fmt::Display for Ceilings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{}: copy {:.0} GB/s (read and write), read {:.0} GB/s, bf16 matmul {:.0} TFLOP/s",
            self.gpu, self.copy_gb_s, self.read_gb_s, self.matmul_tflop_s
        )
    }
}
