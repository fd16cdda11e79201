//! Attention with soft gates on a GPU against the CPU. Without a GPU every test says so and passes.

#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use candle_core::{DType, Device, Tensor};
use common::{Rng, gpu};
use kvpolicy::{
    Error,
    retrofit::{SoftAttention, SoftGrads},
};

struct Inputs {
    attention: SoftAttention,
    qkv: Tensor,
    keep: Option<Tensor>,
    dy: Tensor,
}

impl Inputs {
    /// Numbers that `dtype` holds, as f32 on the CPU. `low`: gates are 0 or this; else random; none without gates.
    fn new(attention: SoftAttention, gates: bool, low: Option<f32>, dtype: DType, seed: u64) -> Self {
        let SoftAttention { sequences, length, q_heads, kv_heads, head_dim, .. } = attention;
        let (mut rng, tokens) = (Rng(seed), sequences * length);
        let mut numbers = |dims: &[usize]| {
            let numbers = rng.numbers(dims.iter().product());
            let tensor = Tensor::from_vec(numbers, dims, &Device::Cpu).unwrap();
            tensor.to_dtype(dtype).unwrap().to_dtype(DType::F32).unwrap()
        };
        let qkv = numbers(&[tokens, q_heads + 2 * kv_heads, head_dim]);
        let (dy, gate) = (numbers(&[tokens, q_heads, head_dim]), numbers(&[tokens, kv_heads]));
        let gate = match low {
            Some(low) => (gate.lt(0f32).unwrap().to_dtype(DType::F32).unwrap() * f64::from(low)).unwrap(),
            None => (gate - 2.0).unwrap(),
        };
        Self { attention, qkv, keep: gates.then_some(gate), dy }
    }

    fn on(&self, device: &Device, dtype: DType) -> Self {
        let to = |tensor: &Tensor, dtype| tensor.to_dtype(dtype).unwrap().to_device(device).unwrap();
        let keep = self.keep.as_ref().map(|keep| to(keep, DType::F32));
        Self { attention: self.attention, qkv: to(&self.qkv, dtype), keep, dy: to(&self.dy, dtype) }
    }

    /// `[y, lse, dqkv, dkeep]`, into memory that held no numbers.
    fn run(&self) -> [Tensor; 4] {
        let keep = self.keep.as_ref();
        let SoftAttention { q_heads, head_dim, .. } = self.attention;
        let tokens = self.qkv.dims()[0];
        poison(&self.qkv, &[tokens, q_heads, head_dim]);
        let (y, lse) = self.attention.forward(&self.qkv, keep).unwrap();
        poison(&self.qkv, self.qkv.dims());
        let SoftGrads { qkv, keep } = self.attention.backward(&self.qkv, keep, &y, &lse, &self.dy).unwrap();
        [y, lse, qkv, keep]
    }
}

/// Memory that was NaN all over is what the next outputs of this size are likely made of.
fn poison(like: &Tensor, dims: &[usize]) {
    let nan = || Tensor::full(f32::NAN, dims, like.device()).unwrap();
    drop((0..4).map(|_| (nan(), nan().to_dtype(like.dtype()).unwrap())).collect::<Vec<_>>());
}

fn numbers(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// The difference against the expected, both as root mean squares; infinity for a NaN.
fn off(got: &Tensor, want: &Tensor) -> f64 {
    assert_eq!(got.dims(), want.dims());
    let (got, want) = (numbers(got), numbers(want));
    let square = |x: f32| f64::from(x) * f64::from(x);
    let error: f64 = got.iter().zip(&want).map(|(got, want)| square(got - want)).sum();
    let size: f64 = want.iter().map(|&want| square(want).max(1e-6)).sum();
    if error.is_finite() { (error / size).sqrt() } else { f64::INFINITY }
}

fn check(device: &Device, inputs: &Inputs, dtype: DType, what: &str) {
    let tolerance = match dtype {
        DType::F32 => 2e-5,
        DType::F16 => 3e-3,
        _ => 2e-2,
    };
    let there = inputs.on(device, dtype);
    let (want, got, again) = (inputs.run(), there.run(), there.run());
    for (i, name) in ["y", "lse", "dqkv", "dkeep"].into_iter().enumerate() {
        let off = off(&got[i], &want[i]);
        assert!(off <= tolerance, "{what}, {dtype:?}: {name} is off by {off:e}");
        assert_eq!(numbers(&got[i]), numbers(&again[i]), "{what}, {dtype:?}: {name} differs from run to run");
    }
}

const DTYPES: [DType; 3] = [DType::BF16, DType::F16, DType::F32];

#[test]
fn every_head_size_and_dtype_gives_what_the_cpu_gives() {
    let Some(device) = gpu() else { return };
    let mut seed = 0;
    for head_dim in [16, 32, 64, 80, 128] {
        for (length, q_heads, kv_heads, window) in
            [(1, 3, 1, 0), (17, 2, 2, 1), (65, 9, 3, 16), (129, 7, 1, 100), (200, 6, 2, 37), (130, 2, 1, 1000)]
        {
            let scale = 1.0 / (head_dim as f32).sqrt();
            let attention = SoftAttention { sequences: 2, length, q_heads, kv_heads, head_dim, window, scale };
            for (gates, low) in [(false, None), (true, None), (true, Some(-1e4)), (true, Some(f32::MIN))] {
                for dtype in DTYPES {
                    seed += 1;
                    let inputs = Inputs::new(attention, gates, low, dtype, seed);
                    check(&device, &inputs, dtype, &format!("{attention:?}, gates {gates} {low:?}"));
                }
            }
        }
    }
}

#[test]
fn a_long_sequence_gives_what_the_cpu_gives() {
    let Some(device) = gpu() else { return };
    for (head_dim, dtype) in
        [(64, DType::BF16), (64, DType::F16), (128, DType::BF16), (32, DType::F16), (64, DType::F32)]
    {
        let scale = 1.0 / (head_dim as f32).sqrt();
        let attention =
            SoftAttention { sequences: 1, length: 1111, q_heads: 3, kv_heads: 1, head_dim, window: 256, scale };
        check(&device, &Inputs::new(attention, true, None, dtype, 77), dtype, &format!("{attention:?}"));
    }
}

#[test]
fn operands_that_lie_at_no_multiple_of_16_bytes_are_served() {
    let Some(device) = gpu() else { return };
    let attention =
        SoftAttention { sequences: 1, length: 40, q_heads: 2, kv_heads: 1, head_dim: 64, window: 3, scale: 0.125 };
    let inputs = Inputs::new(attention, true, None, DType::BF16, 78).on(&device, DType::BF16);
    let (flat, zero) = (inputs.qkv.flatten_all().unwrap(), Tensor::zeros(1, DType::BF16, &device).unwrap());
    let moved = Tensor::cat(&[&zero, &flat], 0).unwrap().narrow(0, 1, flat.elem_count()).unwrap();
    let moved = Inputs {
        qkv: moved.reshape(inputs.qkv.dims()).unwrap(),
        keep: inputs.keep.clone(),
        ..inputs.on(&device, DType::BF16)
    };
    for (got, want) in moved.run().iter().zip(&inputs.run()) {
        assert!(off(got, want) < 2e-2);
    }
}

#[test]
fn what_no_kernel_serves_is_refused() {
    let Some(device) = gpu() else { return };
    let attention =
        SoftAttention { sequences: 1, length: 4, q_heads: 2, kv_heads: 1, head_dim: 16, window: 3, scale: 0.25 };
    let qkv = |dtype, device: &Device| Tensor::zeros((4, 4, 16), dtype, device).unwrap();
    let keep = |device: &Device| Tensor::zeros((4, 1), DType::F32, device).unwrap();
    let refused = |qkv: &Tensor, keep: Option<&Tensor>| {
        let result = attention.forward(qkv, keep);
        assert!(matches!(result, Err(Error::Config(_))), "{result:?}");
    };
    refused(&qkv(DType::F64, &device), None);
    refused(&qkv(DType::F32, &device), Some(&keep(&Device::Cpu)));
    refused(&qkv(DType::F32, &Device::Cpu), Some(&keep(&device)));
}
