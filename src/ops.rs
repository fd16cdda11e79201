//! Operations that candle lacks or does by uploading a number: plain loops on the CPU, one kernel on a GPU, so that a
//! captured CUDA graph can hold them.

use crate::spec::PerGate;
use candle_core::{CpuStorage, CustomOp1, DType, Layout, Result, Shape, Tensor};

/// Where logits, f32 `[tokens, heads]`, are above a bound: u8. `per` layer: head 0 decides for the others.
pub(crate) fn threshold(logits: &Tensor, above: f64, per: PerGate) -> Result<Tensor> {
    let logits = logits.to_dtype(DType::F32)?.contiguous()?;
    logits.apply_op1_no_bwd(&Threshold { above: above as f32, per })
}

/// A random choice per position and head: u8 `[tokens, heads]`, 1 for a share `rate` of all. `positions`: u32 `[tokens]`;
/// `stream`: which of the 2^64 choices.
pub(crate) fn random_bits(positions: &Tensor, heads: usize, stream: u64, rate: f64) -> Result<Tensor> {
    positions.contiguous()?.apply_op1_no_bwd(&Random { stream, heads, make: Make::Bits { rate } })
}

/// Random numbers in [0, 1) per position and head, f32 `[tokens, heads]`; otherwise as [`random_bits`].
pub(crate) fn random_scores(positions: &Tensor, heads: usize, stream: u64) -> Result<Tensor> {
    positions.contiguous()?.apply_op1_no_bwd(&Random { stream, heads, make: Make::Scores })
}

/// Draws the next number of SplitMix64 (Steele, Lea, Flood 2014).
pub(crate) fn splitmix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let z = (*state ^ (*state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

struct Threshold {
    above: f32,
    per: PerGate,
}

impl CustomOp1 for Threshold {
    fn name(&self) -> &'static str {
        "threshold"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (tokens, heads) = layout.shape().dims2()?;
        let first = start(layout)?;
        let logits = &storage.as_slice::<f32>()?[first..][..tokens * heads];
        let bit = |i: usize| match self.per {
            PerGate::Head => logits[i],
            PerGate::Layer => logits[i - i % heads],
        };
        let bits = (0..logits.len()).map(|i| (bit(i) > self.above) as u8).collect();
        Ok((CpuStorage::U8(bits), layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        storage: &candle_core::CudaStorage,
        layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        let (tokens, heads) = layout.shape().dims2()?;
        let bits = cuda::map::<f32, u8>(storage, start(layout)?, tokens * heads, |kernels, stream, x, bits| {
            let (rows, columns, shared) = (tokens as u32, heads as u32, (self.per == PerGate::Layer) as u32);
            let params = kvpolicy_kernels::Threshold { x, bits, above: self.above, rows, columns, shared };
            // SAFETY: `map` gives addresses of as many elements as the shape says.
            unsafe { kernels.threshold(stream, &params) }
        })?;
        Ok((bits, layout.shape().clone()))
    }
}

/// Numbers from the stream, the head and the position alone, by plain arithmetic that rounds alike everywhere: the
/// fraction of `a p^2 + b p + c` in f64 with random a, b, c. So chunking and batch mates do not matter, and a captured
/// graph draws new numbers as its positions advance.
struct Random {
    stream: u64,
    heads: usize,
    make: Make,
}

enum Make {
    Bits { rate: f64 },
    Scores,
}

impl Random {
    /// `[tokens, heads]`
    fn uniform(&self, positions: &[u32]) -> Vec<f64> {
        let (mut stream, heads) = (self.stream, self.heads);
        let mut coefficients =
            || -> Vec<f64> { (0..heads).map(|_| (splitmix(&mut stream) >> 11) as f64 / (1u64 << 53) as f64).collect() };
        let (a, b, c) = (coefficients(), coefficients(), coefficients());
        let fraction = |p: f64, head: usize| {
            let x = (p * a[head] + b[head]) * p + c[head];
            x - x.floor()
        };
        positions
            .iter()
            .flat_map(|&p| (0..heads).map(move |head| (f64::from(p), head)))
            .map(|(p, h)| fraction(p, h))
            .collect()
    }
}

impl CustomOp1 for Random {
    fn name(&self) -> &'static str {
        "random"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (tokens, first) = (layout.shape().dims1()?, start(layout)?);
        let drawn = self.uniform(&storage.as_slice::<u32>()?[first..][..tokens]).into_iter();
        let made = match self.make {
            Make::Bits { rate } => CpuStorage::U8(drawn.map(|x| (x < rate) as u8).collect()),
            Make::Scores => CpuStorage::F32(drawn.map(|x| x as f32).collect()),
        };
        Ok((made, Shape::from((tokens, self.heads))))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        storage: &candle_core::CudaStorage,
        layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        let (tokens, first) = (layout.shape().dims1()?, start(layout)?);
        let params = |positions, out, rate| kvpolicy_kernels::Draw {
            positions,
            out,
            state: self.stream,
            rate,
            tokens: tokens as u32,
            heads: self.heads as u32,
        };
        let count = tokens * self.heads;
        // SAFETY, of both: `map` gives the address of all positions and of `count` elements for the result.
        let made = match self.make {
            Make::Bits { rate } => cuda::map::<u32, u8>(storage, first, count, |kernels, stream, x, out| unsafe {
                kernels.draw_bits(stream, &params(x, out, rate))
            })?,
            Make::Scores => cuda::map::<u32, f32>(storage, first, count, |kernels, stream, x, out| unsafe {
                kernels.draw_scores(stream, &params(x, out, 0.0))
            })?,
        };
        Ok((made, Shape::from((tokens, self.heads))))
    }
}

/// Index of a contiguous tensor's first element.
fn start(layout: &Layout) -> Result<usize> {
    match layout.contiguous_offsets() {
        Some((first, _)) => Ok(first),
        None => candle_core::bail!("{layout:?} is not contiguous"),
    }
}

#[cfg(feature = "cuda")]
mod cuda {
    use candle_core::{
        CudaStorage, Error, Result,
        backend::BackendStorage,
        cuda_backend::{
            CudaDType,
            cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut, DeviceRepr, DriverError},
        },
    };
    use kvpolicy_kernels::{Address, Kernels};

    /// A new tensor of `count` elements that `launch` writes, all of them, from the elements of `storage` from `first` on.
    pub(super) fn map<T: CudaDType + DeviceRepr, U: CudaDType + DeviceRepr>(
        storage: &CudaStorage,
        first: usize,
        count: usize,
        launch: impl FnOnce(&Kernels, &CudaStream, Address, Address) -> std::result::Result<(), DriverError>,
    ) -> Result<CudaStorage> {
        let device = storage.device();
        let stream = device.cuda_stream();
        let failed = |error: DriverError| Error::Cuda(Box::new(error));
        let kernels = Kernels::of(stream.context()).map_err(failed)?;
        // SAFETY: nothing reads the elements before `launch` has written them.
        let mut made = unsafe { device.alloc::<U>(count)? };
        {
            let (from, _reads) = storage.as_cuda_slice::<T>()?.device_ptr(&stream);
            let (to, _writes) = made.device_ptr_mut(&stream);
            launch(&kernels, &stream, from + (first * size_of::<T>()) as u64, to).map_err(failed)?;
        }
        Ok(CudaStorage::wrap_cuda_slice(made, device.clone()))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn a_threshold_is_strict_and_reads_views() {
        let logits =
            Tensor::new(&[[9f32, 9.0], [0.5, 2.0], [0.25, f32::NAN]], &Device::Cpu).unwrap().narrow(0, 1, 2).unwrap();
        let bits = |above, per| threshold(&logits, above, per).unwrap().to_vec2::<u8>().unwrap();
        assert_eq!(bits(0.25, PerGate::Head), [[1, 1], [0, 0]]);
        assert_eq!(bits(0.25, PerGate::Layer), [[1, 1], [0, 0]]);
        assert_eq!(bits(0.5, PerGate::Layer), [[0, 0], [0, 0]]);
    }

    #[test]
    fn random_numbers_are_those_of_candles_arithmetic() {
        let (positions, heads, stream) = (vec![0u32, 1, 7, 65_537, i32::MAX as u32], 3, 42);
        let tensor = Tensor::new(positions.as_slice(), &Device::Cpu).unwrap();
        let mut state = stream;
        let mut drawn = || (splitmix(&mut state) >> 11) as f64 / (1u64 << 53) as f64;
        let coefficients: Vec<f64> = (0..9).map(|_| drawn()).collect();
        let [a, b, c] = [0, 3, 6].map(|at| Tensor::new(&coefficients[at..at + 3], &Device::Cpu).unwrap());
        let p = tensor.to_dtype(DType::F64).unwrap().unsqueeze(1).unwrap();
        let x = p.broadcast_mul(&a).unwrap().broadcast_add(&b).unwrap();
        let x = x.broadcast_mul(&p).unwrap().broadcast_add(&c).unwrap();
        let x = (&x - x.floor().unwrap()).unwrap();

        let scores = random_scores(&tensor, heads, stream).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(scores, x.to_dtype(DType::F32).unwrap().to_vec2::<f32>().unwrap());
        let bits = random_bits(&tensor, heads, stream, 0.4).unwrap().to_vec2::<u8>().unwrap();
        assert_eq!(bits, x.lt(0.4).unwrap().to_vec2::<u8>().unwrap());
    }
}
