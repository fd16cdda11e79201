//! Backward passes of `ops` against candle's automatic differentiation, and against finite differences in f64.
#![allow(clippy::unwrap_used)]

use candle_core::{D, DType, Device, Tensor, Var};
use candle_nn::{
    ops::{rms_norm_slow, silu},
    rotary_emb::{rope_i_slow, rope_slow},
};
use kvpolicy::RopeLayout;
use kvpolicy_candle::ops::{self, Heads, Rotation};
use rand::{Rng, SeedableRng, rngs::StdRng};

/// Random numbers in [-scale, scale).
struct Numbers(StdRng);

impl Numbers {
    fn new() -> Self {
        Self(StdRng::seed_from_u64(11))
    }

    fn f32(&mut self, dims: &[usize], scale: f32) -> Tensor {
        let count = dims.iter().product();
        let numbers: Vec<f32> = (0..count).map(|_| (self.0.random::<f32>() * 2.0 - 1.0) * scale).collect();
        Tensor::from_vec(numbers, dims, &Device::Cpu).unwrap()
    }

    fn f64(&mut self, dims: &[usize], scale: f32) -> Tensor {
        self.f32(dims, scale).to_dtype(DType::F64).unwrap()
    }
}

fn numbers(x: &Tensor) -> Vec<f64> {
    x.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// The largest difference against the largest of what is expected; NaN never passes.
#[track_caller]
fn close(got: &Tensor, expected: &Tensor, tolerance: f64, what: &str) {
    assert_eq!(got.dims(), expected.dims(), "{what}");
    let (got, expected) = (numbers(got), numbers(expected));
    let most = expected.iter().fold(1e-20, |most: f64, e| most.max(e.abs()));
    for (i, (g, e)) in got.iter().zip(&expected).enumerate() {
        assert!((g - e).abs() <= tolerance * most, "{what}: element {i} is {g}, not {e}");
    }
}

/// The gradient of `sum(dy * y(x))` with respect to `x`, by candle.
fn automatic(x: &Tensor, dy: &Tensor, y: impl Fn(&Tensor) -> candle_core::Result<Tensor>) -> Tensor {
    let x = Var::from_tensor(x).unwrap();
    let loss = (y(&x).unwrap() * dy).unwrap().sum_all().unwrap();
    loss.backward().unwrap().get(&x).unwrap().clone()
}

/// The same by central differences, f64.
fn differences(x: &Tensor, dy: &Tensor, y: impl Fn(&Tensor) -> candle_core::Result<Tensor>) -> Tensor {
    let at = |x: &[f64], dims: &[usize]| {
        let y = y(&Tensor::from_slice(x, dims, &Device::Cpu).unwrap()).unwrap();
        (y * dy).unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap()
    };
    let (mut point, step) = (numbers(x), 1e-5);
    let slopes: Vec<f64> = (0..point.len())
        .map(|i| {
            let here = point[i];
            point[i] = here + step;
            let above = at(&point, x.dims());
            point[i] = here - step;
            let below = at(&point, x.dims());
            point[i] = here;
            (above - below) / (2.0 * step)
        })
        .collect();
    Tensor::from_vec(slopes, x.dims(), &Device::Cpu).unwrap()
}

#[test]
fn norms() {
    let mut random = Numbers::new();
    for (rows, hidden) in [(1, 1), (3, 7), (5, 64), (2, 576), (33, 130)] {
        let what = format!("{rows}x{hidden}");
        let (x, dy) = (random.f32(&[rows, hidden], 2.0), random.f32(&[rows, hidden], 1.0));
        let (weight, add) = (random.f32(&[hidden], 1.5), random.f32(&[rows, hidden], 1.0));
        let eps = 0.1; // large enough that an error in its place shows
        let expected = automatic(&x, &dy, |x| rms_norm_slow(x, &weight, eps as f32));
        close(&ops::rms_norm_backward(&x, &weight, eps, &dy, None).unwrap(), &expected, 1e-5, &what);
        let got = ops::rms_norm_backward(&x, &weight, eps, &dy, Some(&add)).unwrap();
        close(&got, &(expected + add).unwrap(), 1e-5, &what);
        let expected = automatic(&weight, &dy, |weight| rms_norm_slow(&x, weight, eps as f32));
        close(&ops::rms_norm_weight_gradient(&x, eps, &dy).unwrap(), &expected, 1e-5, &what);
    }
}

#[test]
fn norms_by_differences() {
    let mut random = Numbers::new();
    let (x, dy, weight) = (random.f64(&[3, 9], 2.0), random.f64(&[3, 9], 1.0), random.f64(&[9], 1.5));
    let norm = |x: &Tensor, weight: &Tensor| {
        let rms = ((x.sqr()?.mean_keepdim(D::Minus1)? + 0.1)?).sqrt()?;
        x.broadcast_div(&rms)?.broadcast_mul(weight)
    };
    let expected = differences(&x, &dy, |x| norm(x, &weight));
    close(&ops::rms_norm_backward(&x, &weight, 0.1, &dy, None).unwrap(), &expected, 1e-8, "x");
    let expected = differences(&weight, &dy, |weight| norm(&x, weight));
    close(&ops::rms_norm_weight_gradient(&x, 0.1, &dy).unwrap(), &expected, 1e-6, "weight");
}

#[test]
fn gates_of_a_feed_forward_layer() {
    let mut random = Numbers::new();
    for (tokens, ffn) in [(1, 1), (3, 7), (5, 96)] {
        let (x, dy) = (random.f32(&[tokens, 2 * ffn], 9.0), random.f32(&[tokens, ffn], 1.0));
        let product = |x: &Tensor| silu(&x.narrow(1, 0, ffn)?)? * x.narrow(1, ffn, ffn)?;
        let got = ops::silu_mul_backward(&x, &dy).unwrap();
        close(&got, &automatic(&x, &dy, product), 1e-5, &format!("{tokens}x{ffn}"));
        let (x, dy) = (x.to_dtype(DType::F64).unwrap(), dy.to_dtype(DType::F64).unwrap());
        close(&ops::silu_mul_backward(&x, &dy).unwrap(), &differences(&x, &dy, product), 1e-8, "differences");
    }
    // Where the sigmoid is 0 or 1 to the last bit.
    let far = Tensor::new(&[[-200f32, 200.0, 3.0, 5.0]], &Device::Cpu).unwrap();
    let got = ops::silu_mul_backward(&far, &Tensor::new(&[[2f32, 2.0]], &Device::Cpu).unwrap()).unwrap();
    close(&got, &Tensor::new(&[[0f32, 10.0, 0.0, 400.0]], &Device::Cpu).unwrap(), 1e-6, "far");
}

/// Heads of a model, without what a test does not need.
fn bare(q_heads: usize, kv_heads: usize, head_dim: usize) -> Heads {
    Heads { q_heads, kv_heads, head_dim, bias: None, q_norm: None, k_norm: None, eps: 0.1 }
}

fn rotation(tokens: usize, head_dim: usize, layout: RopeLayout, dtype: DType) -> (Tensor, Rotation) {
    let positions: Vec<u32> = (0..tokens as u32).map(|i| i * 37 + 3).collect();
    let freq: Vec<f32> = (0..head_dim / 2).map(|i| 1e4f32.powf(-2.0 * i as f32 / head_dim as f32)).collect();
    let (positions, freq) = (Tensor::new(positions, &Device::Cpu).unwrap(), Tensor::new(freq, &Device::Cpu).unwrap());
    let at = positions.to_dtype(DType::F32).unwrap().unsqueeze(1).unwrap();
    let angles = at.broadcast_mul(&freq.unsqueeze(0).unwrap()).unwrap();
    (angles, Rotation::new(positions, freq, layout, dtype))
}

#[test]
fn rotations_back() {
    let mut random = Numbers::new();
    for (q_heads, kv_heads, head_dim, tokens) in [(1, 1, 2, 1), (4, 2, 16, 5), (3, 3, 6, 4)] {
        for layout in [RopeLayout::HalfSplit, RopeLayout::Interleaved] {
            let what = format!("{q_heads}/{kv_heads}x{head_dim} {layout:?}");
            let (heads, all) = (bare(q_heads, kv_heads, head_dim), q_heads + 2 * kv_heads);
            let (angles, rotation) = rotation(tokens, head_dim, layout, DType::F32);
            let (x, dy) = (random.f32(&[tokens, all, head_dim], 2.0), random.f32(&[tokens, all, head_dim], 1.0));
            let (cos, sin) = (angles.cos().unwrap(), angles.sin().unwrap());
            let after = |x: &Tensor| {
                // [1, heads, tokens, head_dim], as candle has it
                let turned = x.narrow(1, 0, q_heads + kv_heads)?.transpose(0, 1)?.unsqueeze(0)?.contiguous()?;
                let turned = match layout {
                    RopeLayout::HalfSplit => rope_slow(&turned, &cos, &sin)?,
                    RopeLayout::Interleaved => rope_i_slow(&turned, &cos, &sin)?,
                };
                let values = x.narrow(1, q_heads + kv_heads, kv_heads)?;
                Tensor::cat(&[turned.squeeze(0)?.transpose(0, 1)?, values], 1)
            };
            let got = heads.unrotate(dy.clone(), &rotation).unwrap();
            close(&got, &automatic(&x, &dy, after), 1e-5, &what);

            // The transpose of a rotation is the way back.
            let turned = heads.finish(x.flatten_from(1).unwrap(), &rotation).unwrap();
            let back = heads.unrotate(Tensor::cat(&turned, 1).unwrap(), &rotation).unwrap();
            close(&back, &x, 1e-5, &what);
        }
    }
}

#[test]
fn norms_of_heads() {
    let mut random = Numbers::new();
    let (q_heads, kv_heads, head_dim, tokens) = (4, 2, 6, 5);
    let dims = [tokens, q_heads + 2 * kv_heads, head_dim];
    for (of_q, of_k) in [(false, false), (true, false), (false, true), (true, true)] {
        let (x, dy) = (random.f32(&dims, 2.0), random.f32(&dims, 1.0));
        let (q_norm, k_norm) = (random.f32(&[head_dim], 1.5), random.f32(&[head_dim], 1.5));
        let after = |x: &Tensor| {
            let norm = |first, count, weight: &Tensor, normed| {
                let x = x.narrow(1, first, count)?;
                if normed { rms_norm_slow(&x, weight, 0.1) } else { Ok(x) }
            };
            let (q, k) = (norm(0, q_heads, &q_norm, of_q)?, norm(q_heads, kv_heads, &k_norm, of_k)?);
            Tensor::cat(&[q, k, x.narrow(1, q_heads + kv_heads, kv_heads)?], 1)
        };
        let mut heads = bare(q_heads, kv_heads, head_dim);
        (heads.q_norm, heads.k_norm) = (of_q.then(|| q_norm.clone()), of_k.then(|| k_norm.clone()));
        let got = heads.norm_backward(&x, dy.clone()).unwrap();
        close(&got, &automatic(&x, &dy, after), 1e-5, &format!("{of_q} {of_k}"));
    }
}

/// 16 bits are rounded once, at the end.
#[test]
fn types_of_16_bits() {
    for (dtype, tolerance) in [(DType::F16, 6e-4), (DType::BF16, 5e-3)] {
        let mut random = Numbers::new();
        let mut pair = |dims: &[usize]| {
            let rounded = random.f32(dims, 2.0).to_dtype(dtype).unwrap();
            (rounded.to_dtype(DType::F32).unwrap(), rounded)
        };
        let ((x, xr), (dy, dyr), (weight, weight_r)) = (pair(&[4, 64]), pair(&[4, 64]), pair(&[64]));
        let same = |got: Tensor, expected: Tensor, what| {
            assert_eq!(got.dtype(), dtype, "{what}");
            close(&got, &expected, tolerance, what);
        };
        let got = ops::rms_norm_backward(&xr, &weight_r, 1e-5, &dyr, Some(&xr)).unwrap();
        same(got, ops::rms_norm_backward(&x, &weight, 1e-5, &dy, Some(&x)).unwrap(), "norm");
        let got = ops::silu_mul_backward(&xr, &dyr.narrow(1, 0, 32).unwrap()).unwrap();
        same(got, ops::silu_mul_backward(&x, &dy.narrow(1, 0, 32).unwrap()).unwrap(), "silu");
        let got = ops::rms_norm_weight_gradient(&xr, 1e-5, &dyr).unwrap();
        assert_eq!(got.dtype(), DType::F32);
        close(&got, &ops::rms_norm_weight_gradient(&x, 1e-5, &dy).unwrap(), 1e-6, "weight");
        let (heads, dims) = (Heads { q_norm: Some(weight_r.narrow(0, 0, 16).unwrap()), ..bare(2, 1, 16) }, (4, 4, 16));
        let got = heads.norm_backward(&xr.reshape(dims).unwrap(), dyr.reshape(dims).unwrap()).unwrap();
        let exact = Heads { q_norm: Some(weight.narrow(0, 0, 16).unwrap()), ..bare(2, 1, 16) };
        same(got, exact.norm_backward(&x.reshape(dims).unwrap(), dy.reshape(dims).unwrap()).unwrap(), "heads");
        let turn = |x: &Tensor, dtype| {
            let (_, rotation) = rotation(4, 16, RopeLayout::HalfSplit, dtype);
            heads.unrotate(x.reshape(dims).unwrap(), &rotation).unwrap()
        };
        // Its sines are rounded as well.
        close(&turn(&xr, dtype), &turn(&x, DType::F32), 2.0 * tolerance, "rotation");
    }
}

#[test]
fn operands_that_do_not_fit_are_errors() {
    let x = |dims: &[usize]| Tensor::zeros(dims, DType::F32, &Device::Cpu).unwrap();
    let cases = [
        ops::rms_norm_backward(&x(&[2, 8]), &x(&[7]), 1e-5, &x(&[2, 8]), None),
        ops::rms_norm_backward(&x(&[2, 8]), &x(&[8]), 1e-5, &x(&[3, 8]), None),
        ops::rms_norm_backward(&x(&[2, 8]), &x(&[8]), 1e-5, &x(&[2, 8]), Some(&x(&[2, 4]))),
        ops::rms_norm_weight_gradient(&x(&[2, 8]), 1e-5, &x(&[3, 8])),
        ops::silu_mul_backward(&x(&[2, 8]), &x(&[2, 8])),
        ops::silu_mul_backward(&x(&[2, 7]), &x(&[2, 3])),
    ];
    cases.into_iter().enumerate().for_each(|(i, case)| assert!(case.is_err(), "case {i}"));
}
