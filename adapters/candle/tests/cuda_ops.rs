//! Every operation of `ops` on a GPU against the CPU, on ragged random shapes; those of the policies; whole models; and
//! that a CUDA graph can hold them. Skips, and says so, where there is no GPU.
#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used)]

use candle_core::{
    DType, Device, Tensor,
    cuda_backend::cudarc::driver::sys::{CUgraphInstantiate_flags_enum, CUstreamCaptureMode_enum},
};
use kvpolicy::{
    CpuConfig, Evict, GateSpec, KvCache, Lag, LayerCx, ModelSpec, NewTokens, PerGate, Phase, Registry, RopeLayout, cpu,
};
use kvpolicy_candle::{
    Config, Model,
    ops::{self, GateWeights, Heads, Rotation},
};
use rand::{Rng, SeedableRng, rngs::StdRng};

const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

fn gpu() -> Option<Device> {
    match Device::new_cuda(0) {
        Ok(device) => Some(device),
        Err(error) => {
            println!("skipped: no GPU here ({})", error.to_string().lines().next().unwrap_or_default());
            None
        }
    }
}

/// How far two of a kind may be apart, as a share of their norm: a few roundings.
fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F32 => 1e-5,
        DType::F16 => 1e-3,
        _ => 8e-3,
    }
}

fn numbers(x: &Tensor) -> Vec<f32> {
    x.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// ‖got − expected‖ against ‖expected‖; NaN never passes.
#[track_caller]
fn close(got: &Tensor, expected: &Tensor, tolerance: f64, what: &str) {
    assert_eq!(got.dims(), expected.dims(), "{what}");
    let (got, expected) = (numbers(got), numbers(expected));
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|e| e * e).sum::<f64>().sqrt();
    let error = norm(&mut got.iter().zip(&expected).map(|(&a, &b)| f64::from(a) - f64::from(b)));
    let size = norm(&mut expected.iter().map(|&e| f64::from(e)));
    assert!(error <= tolerance * size.max(1e-20), "{what}: off by {error:.3e} of {size:.3e}");
}

/// Random inputs, the same on the CPU in f32 and on the GPU in a type.
struct Inputs {
    rng: StdRng,
    device: Device,
    dtype: DType,
}

impl Inputs {
    fn new(device: &Device, dtype: DType) -> Self {
        Self { rng: StdRng::seed_from_u64(7), device: device.clone(), dtype }
    }

    /// In f32 on the CPU, rounded as the type rounds; and on the GPU.
    fn pair(&mut self, dims: &[usize], scale: f32) -> (Tensor, Tensor) {
        let count = dims.iter().product();
        let numbers: Vec<f32> = (0..count).map(|_| (self.rng.random::<f32>() * 2.0 - 1.0) * scale).collect();
        let rounded = Tensor::from_vec(numbers, dims, &Device::Cpu).unwrap().to_dtype(self.dtype).unwrap();
        (rounded.to_dtype(DType::F32).unwrap(), rounded.to_device(&self.device).unwrap())
    }

    /// Weights around 1.
    fn norm(&mut self, dims: &[usize]) -> (Tensor, Tensor) {
        let (_, y) = self.pair(dims, 0.5);
        let rounded = (y + 1.0).unwrap().to_device(&Device::Cpu).unwrap();
        (rounded.to_dtype(DType::F32).unwrap(), rounded.to_device(&self.device).unwrap())
    }

    /// Memory that was NaN all over is what the next outputs of this size are likely made of.
    fn poison(&self, dims: &[usize]) {
        let spoilt: Vec<Tensor> =
            (0..4).map(|_| Tensor::full(f32::NAN, dims, &self.device).unwrap().to_dtype(self.dtype).unwrap()).collect();
        drop(spoilt);
    }
}

fn ids(n: &[u32], device: &Device) -> Tensor {
    Tensor::new(n, device).unwrap()
}

/// The same inputs for each type.
fn for_each_dtype(test: impl Fn(&mut Inputs)) {
    let Some(device) = gpu() else { return };
    DTYPES.iter().for_each(|&dtype| test(&mut Inputs::new(&device, dtype)));
}

#[test]
fn norms() {
    for_each_dtype(|inputs| {
        for hidden in [1, 7, 64, 576, 896, 2048, 4097, 8192, 20_000] {
            for tokens in [1, 3, 33] {
                let what = format!("{:?} {tokens}x{hidden}", inputs.dtype);
                let (x, xg) = inputs.pair(&[tokens, hidden], 3.0);
                let (y, yg) = inputs.pair(&[tokens, hidden], 1.0);
                let (w, wg) = inputs.norm(&[hidden]);
                inputs.poison(&[tokens, hidden]);
                let (sum, normed) = ops::add_rms_norm(&xg, &yg, &wg, 1e-5).unwrap();
                let expected = (&x + &y).unwrap().to_dtype(inputs.dtype).unwrap();
                assert_eq!(numbers(&sum), numbers(&expected), "{what}: the sum is that of the type, to the bit");
                let expected = ops::rms_norm(&expected.to_dtype(DType::F32).unwrap(), &w, 1e-5).unwrap();
                close(&normed, &expected, tolerance(inputs.dtype), &what);
                let normed = ops::rms_norm(&xg, &wg, 1e-5).unwrap();
                close(&normed, &ops::rms_norm(&x, &w, 1e-5).unwrap(), tolerance(inputs.dtype), &what);
            }
        }
    });
}

#[test]
fn embeddings() {
    for_each_dtype(|inputs| {
        for hidden in [5, 576] {
            let (table, table_gpu) = inputs.pair(&[50, hidden], 1.0);
            let (w, wg) = inputs.norm(&[hidden]);
            let tokens = [49, 0, 7, 7, 12];
            let (x, normed) = ops::embed_rms_norm(&table_gpu, &ids(&tokens, &inputs.device), &wg, 1e-6).unwrap();
            let (expected, expected_normed) =
                ops::embed_rms_norm(&table, &ids(&tokens, &Device::Cpu), &w, 1e-6).unwrap();
            assert_eq!(numbers(&x), numbers(&expected));
            close(&normed, &expected_normed, tolerance(inputs.dtype), "normed rows");
            let (x, _) = ops::embed_rms_norm(&table_gpu, &ids(&[3, 50], &inputs.device), &wg, 1e-6).unwrap();
            let rows = numbers(&x);
            assert!(rows[..hidden].iter().all(|e| e.is_finite()) && rows[hidden..].iter().all(|e| e.is_nan()));
        }
    });
}

#[test]
fn heads() {
    for_each_dtype(|inputs| {
        let mut positions = StdRng::seed_from_u64(3);
        for (q_heads, kv_heads, head_dim) in [(32, 8, 64), (9, 3, 64), (4, 1, 128), (6, 2, 80), (2, 2, 256), (3, 1, 6)]
        {
            for (layout, bias, norm, tokens) in [
                (RopeLayout::HalfSplit, false, false, 1),
                (RopeLayout::Interleaved, false, false, 17),
                (RopeLayout::HalfSplit, true, false, 5),
                (RopeLayout::HalfSplit, false, true, 33),
                (RopeLayout::Interleaved, true, true, 3),
            ] {
                let what = format!("{:?} {q_heads}/{kv_heads}x{head_dim} {layout:?} {bias} {norm}", inputs.dtype);
                let width = (q_heads + 2 * kv_heads) * head_dim;
                let (qkv, qkv_gpu) = inputs.pair(&[tokens, width], 2.0);
                let mut pair = |given: bool, dims: &[usize]| given.then(|| inputs.norm(dims)).unzip();
                let (b, bg) = pair(bias, &[width]);
                let (qn, qng) = pair(norm, &[head_dim]);
                let (kn, kng) = pair(norm, &[head_dim]);
                let make =
                    |bias, q_norm, k_norm| Heads { q_heads, kv_heads, head_dim, bias, q_norm, k_norm, eps: 1e-6 };
                let at: Vec<u32> = (0..tokens).map(|_| positions.random_range(0..200_000)).collect();
                let freq: Vec<f32> =
                    (0..head_dim / 2).map(|i| 1e4f32.powf(-2.0 * i as f32 / head_dim as f32)).collect();
                let rotation = |device: &Device, dtype| {
                    Rotation::new(ids(&at, device), Tensor::new(freq.as_slice(), device).unwrap(), layout, dtype)
                };
                let got = make(bg, qng, kng).finish(qkv_gpu.clone(), &rotation(&inputs.device, inputs.dtype)).unwrap();
                // The CPU in f32, and the CPU in the type itself.
                let cast = |x: &Option<Tensor>| x.as_ref().map(|x| x.to_dtype(inputs.dtype).unwrap());
                let same = make(cast(&b), cast(&qn), cast(&kn))
                    .finish(qkv.to_dtype(inputs.dtype).unwrap(), &rotation(&Device::Cpu, inputs.dtype))
                    .unwrap();
                let exact = make(b, qn, kn).finish(qkv, &rotation(&Device::Cpu, DType::F32)).unwrap();
                for ((got, exact), same) in got.iter().zip(&exact).zip(&same) {
                    close(got, exact, 2.0 * tolerance(inputs.dtype), &what);
                    close(got, same, 2.0 * tolerance(inputs.dtype), &what);
                }
                assert_eq!(numbers(&got[2]), numbers(&same[2]), "{what}: values are only biased");
            }
        }
    });
}

#[test]
fn products_of_few_and_many_tokens() {
    for_each_dtype(|inputs| {
        for (input, out) in [
            (8, 1),
            (64, 5),
            (72, 17),
            (63, 10),
            (576, 960),
            (1000, 33),
            (1536, 2048),
            (8960, 1536),
            (2048, 3072),
            (2048, 4096),
        ] {
            let (w, wg) = inputs.pair(&[2 * out, input], 0.1);
            for tokens in [1, 2, 3, 5, 8, 9, 33] {
                let what = format!("{:?} {tokens} tokens, {input} to {out}", inputs.dtype);
                let (x, xg) = inputs.pair(&[tokens, input], 1.0);
                inputs.poison(&[tokens, 2 * out]);
                let y = ops::linear(&x, &w).unwrap();
                close(&ops::linear(&xg, &wg).unwrap(), &y, 2.0 * tolerance(inputs.dtype), &what);
                inputs.poison(&[tokens, out]);
                let gated = ops::silu_mul(&y).unwrap();
                close(&ops::linear_silu_mul(&xg, &wg).unwrap(), &gated, 4.0 * tolerance(inputs.dtype), &what);
            }
        }
    });
}

#[test]
fn products_read_views() {
    for_each_dtype(|inputs| {
        let ((x, xg), (w, wg)) = (inputs.pair(&[5, 64], 1.0), inputs.pair(&[20, 64], 1.0));
        for (row, rows) in [(1, 3), (4, 1)] {
            let view = |x: &Tensor, w: &Tensor| {
                ops::linear(&x.narrow(0, row, rows).unwrap(), &w.narrow(0, row, 9).unwrap()).unwrap()
            };
            close(&view(&xg, &wg), &view(&x, &w), 2.0 * tolerance(inputs.dtype), "rows of both");
        }
        let half = |x: &Tensor| ops::silu_mul(&x.narrow(1, 0, 32).unwrap()).unwrap();
        close(&half(&xg), &half(&x), tolerance(inputs.dtype), "columns");
    });
}

#[test]
fn between_products() {
    for_each_dtype(|inputs| {
        for columns in [1, 7, 96, 1536, 8192] {
            for tokens in [1, 5, 40] {
                let what = format!("{:?} {tokens}x{columns}", inputs.dtype);
                let (x, xg) = inputs.pair(&[tokens, 2 * columns], 12.0);
                let (b, bg) = inputs.pair(&[2 * columns], 1.0);
                inputs.poison(&[tokens, columns]);
                let got = ops::silu_mul(&xg).unwrap();
                close(&got, &ops::silu_mul(&x).unwrap(), tolerance(inputs.dtype), &what);
                let expected = ops::add_bias(x, &b).unwrap().to_dtype(inputs.dtype).unwrap();
                assert_eq!(numbers(&ops::add_bias(xg, &bg).unwrap()), numbers(&expected), "{what}");
            }
        }
    });
}

#[test]
fn gates() {
    for_each_dtype(|inputs| {
        for (hidden, heads) in [(2048, 8), (576, 3), (65, 1), (4096, 8)] {
            for (tokens, bias) in [(1, false), (19, true)] {
                let what = format!("{:?} {tokens}x{hidden} to {heads}", inputs.dtype);
                let (x, xg) = inputs.pair(&[tokens, hidden], 3.0);
                let ((norm, ng), (weight, wg)) = (inputs.norm(&[hidden]), inputs.pair(&[heads, hidden], 0.1));
                let (bias, bg) = bias.then(|| inputs.pair(&[heads], 1.0)).unzip();
                let cpu = GateWeights { norm, eps: 1e-5, weight, bias };
                let gpu = GateWeights { norm: ng, eps: 1e-5, weight: wg, bias: bg };
                let (got, expected) = (ops::gate(&xg, &gpu, 100.0, 5.0), ops::gate(&x, &cpu, 100.0, 5.0));
                let (got, expected) = (got.unwrap(), expected.unwrap());
                assert_eq!(got.dtype(), DType::F32);
                close(&got, &expected, 1e-5, &what); // inputs agree to the bit, and all of it is f32
            }
        }
    });
}

#[test]
fn norms_backward() {
    for_each_dtype(|inputs| {
        for hidden in [1, 7, 64, 576, 896, 2048, 4097, 8192, 20_000] {
            for rows in [1, 3, 33] {
                let what = format!("{:?} {rows}x{hidden}", inputs.dtype);
                let (dims, eps) = ([rows, hidden], 0.1);
                let ((x, xg), (dy, dyg)) = (inputs.pair(&dims, 3.0), inputs.pair(&dims, 1.0));
                let ((add, addg), (w, wg)) = (inputs.pair(&dims, 1.0), inputs.norm(&[hidden]));
                inputs.poison(&dims);
                for (add, addg) in [(None, None), (Some(&add), Some(&addg))] {
                    let got = ops::rms_norm_backward(&xg, &wg, eps, &dyg, addg).unwrap();
                    assert_eq!(got.dtype(), inputs.dtype);
                    let expected = ops::rms_norm_backward(&x, &w, eps, &dy, add).unwrap();
                    close(&got, &expected, tolerance(inputs.dtype), &what);
                }
                assert_eq!(numbers(&dyg), numbers(&dy), "{what}: a gradient is not overwritten");
            }
        }
    });
}

#[test]
fn gradients_of_norm_weights() {
    for_each_dtype(|inputs| {
        // From no more than one row of a block to more parts than a block of the sum has warps.
        for (rows, hidden) in
            [(1, 1), (9, 7), (300, 64), (2000, 128), (700, 576), (65, 896), (40, 4097), (90, 8192), (20, 20_000)]
        {
            let what = format!("{:?} {rows}x{hidden}", inputs.dtype);
            let ((x, xg), (dy, dyg)) = (inputs.pair(&[rows, hidden], 3.0), inputs.pair(&[rows, hidden], 1.0));
            let sums = Tensor::full(f32::NAN, (rows.div_ceil(8), hidden), &inputs.device).unwrap();
            drop((sums, Tensor::full(f32::NAN, hidden, &inputs.device).unwrap()));
            let got = ops::rms_norm_weight_gradient(&xg, 0.1, &dyg).unwrap();
            assert_eq!(got.dtype(), DType::F32);
            close(&got, &ops::rms_norm_weight_gradient(&x, 0.1, &dy).unwrap(), 1e-5, &what);
            let again = ops::rms_norm_weight_gradient(&xg, 0.1, &dyg).unwrap();
            assert_eq!(numbers(&again), numbers(&got), "{what}: the same sum to the bit");
        }
    });
}

#[test]
fn gates_of_a_feed_forward_layer_backward() {
    for_each_dtype(|inputs| {
        for columns in [1, 7, 96, 1536, 8192] {
            for tokens in [1, 5, 40] {
                let what = format!("{:?} {tokens}x{columns}", inputs.dtype);
                let (x, xg) = inputs.pair(&[tokens, 2 * columns], 12.0);
                let (dy, dyg) = inputs.pair(&[tokens, columns], 1.0);
                inputs.poison(&[tokens, 2 * columns]);
                let got = ops::silu_mul_backward(&xg, &dyg).unwrap();
                close(&got, &ops::silu_mul_backward(&x, &dy).unwrap(), tolerance(inputs.dtype), &what);
            }
        }
    });
}

#[test]
fn heads_backward() {
    for_each_dtype(|inputs| {
        for (q_heads, kv_heads, head_dim) in [(32, 8, 64), (9, 3, 64), (4, 1, 128), (6, 2, 80), (2, 2, 256), (3, 1, 6)]
        {
            for (layout, of_q, of_k, tokens) in [
                (RopeLayout::HalfSplit, false, false, 1),
                (RopeLayout::Interleaved, true, true, 17),
                (RopeLayout::HalfSplit, true, false, 5),
                (RopeLayout::HalfSplit, false, true, 33),
            ] {
                let what = format!("{:?} {q_heads}/{kv_heads}x{head_dim} {layout:?} {of_q} {of_k}", inputs.dtype);
                let dims = [tokens, q_heads + 2 * kv_heads, head_dim];
                let ((x, xg), (dy, dyg)) = (inputs.pair(&dims, 2.0), inputs.pair(&dims, 1.0));
                let mut norm = |given: bool| given.then(|| inputs.norm(&[head_dim])).unzip();
                let ((qn, qng), (kn, kng)) = (norm(of_q), norm(of_k));
                // A bias plays no part in what comes before it.
                let (bias, bias_gpu) = inputs.pair(&[dims[1] * head_dim], 1.0);
                let make = |bias, q_norm, k_norm| Heads {
                    q_heads,
                    kv_heads,
                    head_dim,
                    bias: Some(bias),
                    q_norm,
                    k_norm,
                    eps: 0.1,
                };
                let (cpu, gpu) = (make(bias, qn, kn), make(bias_gpu, qng, kng));
                let at: Vec<u32> = (0..tokens as u32).map(|i| i * 4099 + 17).collect();
                let freq: Vec<f32> =
                    (0..head_dim / 2).map(|i| 1e4f32.powf(-2.0 * i as f32 / head_dim as f32)).collect();
                let rotation = |device: &Device, dtype| {
                    Rotation::new(ids(&at, device), Tensor::new(freq.as_slice(), device).unwrap(), layout, dtype)
                };
                let got = gpu.norm_backward(&xg, dyg.copy().unwrap()).unwrap();
                close(&got, &cpu.norm_backward(&x, dy.clone()).unwrap(), tolerance(inputs.dtype), &what);
                let got = gpu.unrotate(dyg, &rotation(&inputs.device, inputs.dtype)).unwrap();
                let expected = cpu.unrotate(dy.clone(), &rotation(&Device::Cpu, DType::F32)).unwrap();
                close(&got, &expected, 2.0 * tolerance(inputs.dtype), &what);
                let values = |x: &Tensor| numbers(&x.narrow(1, q_heads + kv_heads, kv_heads).unwrap());
                assert_eq!(values(&got), values(&dy), "{what}: values are not rotated");
            }
        }
    });
}

/// More than any other dimension of a grid takes.
#[test]
fn gradients_of_many_rows() {
    let Some(device) = gpu() else { return };
    let mut inputs = Inputs::new(&device, DType::BF16);
    let ((x, xg), (dy, dyg)) = (inputs.pair(&[70_001, 64], 3.0), inputs.pair(&[70_001, 64], 1.0));
    let (w, wg) = inputs.norm(&[64]);
    let got = ops::rms_norm_backward(&xg, &wg, 1e-5, &dyg, None).unwrap();
    close(&got, &ops::rms_norm_backward(&x, &w, 1e-5, &dy, None).unwrap(), 8e-3, "norm");
    let got = ops::rms_norm_weight_gradient(&xg, 1e-5, &dyg).unwrap();
    close(&got, &ops::rms_norm_weight_gradient(&x, 1e-5, &dy).unwrap(), 1e-5, "weight");
    let half = |x: &Tensor| x.narrow(1, 16, 32).unwrap();
    let got = ops::silu_mul_backward(&xg, &half(&dyg)).unwrap();
    close(&got, &ops::silu_mul_backward(&x, &half(&dy)).unwrap(), 8e-3, "silu");
}

#[test]
fn the_largest_and_the_first_of_equals() {
    for_each_dtype(|inputs| {
        for columns in [1, 31, 1000, 4096, 49_152, 128_256, 151_936] {
            for rows in if columns > 4096 { [1, 2, 5] } else { [1, 3, 64] } {
                let (x, _) = inputs.pair(&[rows, columns], 40.0);
                let tied = x.round().unwrap(); // a few dozen values: the largest comes up again and again
                let got =
                    ops::argmax(&tied.to_dtype(inputs.dtype).unwrap().to_device(&inputs.device).unwrap()).unwrap();
                let expected = ops::argmax(&tied).unwrap();
                assert_eq!(got.to_vec1::<u32>().unwrap(), expected.to_vec1::<u32>().unwrap(), "{rows}x{columns}");
            }
        }
        let (low, nan) = (f32::NEG_INFINITY, f32::NAN);
        let odd = Tensor::new(&[[low, low, low], [nan, 1.0, nan], [nan, nan, nan], [low, nan, -2.0]], &inputs.device);
        let odd = odd.unwrap().to_dtype(inputs.dtype).unwrap();
        assert_eq!(ops::argmax(&odd).unwrap().to_vec1::<u32>().unwrap(), [0, 1, 0, 2]);
    });
}

#[test]
fn random_weights_are_the_same_everywhere() {
    for_each_dtype(|inputs| {
        for dims in [&[1][..], &[33, 7], &[1000, 2048]] {
            let of = |device: &Device| ops::random(dims, 0.02, 11, inputs.dtype, device).unwrap();
            let (got, expected) = (numbers(&of(&inputs.device)), numbers(&of(&Device::Cpu)));
            assert_eq!(got, expected);
        }
        let drawn = numbers(&ops::random(&[1 << 16], 0.02, 5, inputs.dtype, &inputs.device).unwrap());
        let (mean, square) = drawn.iter().fold((0.0, 0.0), |(m, s), &e| (m + f64::from(e), s + f64::from(e).powi(2)));
        let count = drawn.len() as f64;
        assert!((mean / count).abs() < 5e-4 && ((square / count).sqrt() - 0.02).abs() < 2e-4);
    });
}

#[test]
fn operands_that_do_not_fit_are_errors() {
    let Some(device) = gpu() else { return };
    let x = |dims: &[usize]| Tensor::zeros(dims, DType::F32, &device).unwrap();
    let cases = [
        ops::rms_norm(&x(&[2, 8]), &x(&[7]), 1e-5),
        ops::rms_norm(&x(&[2, 8]), &Tensor::zeros(8, DType::F32, &Device::Cpu).unwrap(), 1e-5),
        ops::rms_norm(&x(&[2, 8]), &x(&[8]).to_dtype(DType::F16).unwrap(), 1e-5),
        ops::add_rms_norm(&x(&[2, 8]), &x(&[3, 8]), &x(&[8]), 1e-5).map(|(sum, _)| sum),
        ops::add_bias(x(&[2, 8]), &x(&[4])),
        ops::silu_mul(&x(&[2, 7])),
        ops::rms_norm_backward(&x(&[2, 8]), &x(&[7]), 1e-5, &x(&[2, 8]), None),
        ops::rms_norm_backward(&x(&[2, 8]), &x(&[8]), 1e-5, &x(&[3, 8]), None),
        ops::rms_norm_backward(&x(&[2, 8]), &x(&[8]), 1e-5, &x(&[2, 8]), Some(&x(&[2, 4]))),
        ops::rms_norm_weight_gradient(&x(&[2, 8]), 1e-5, &x(&[3, 8])),
        ops::silu_mul_backward(&x(&[2, 8]), &x(&[2, 8])),
        ops::silu_mul_backward(&x(&[2, 7]), &x(&[2, 3])),
        ops::linear(&x(&[2, 8]), &x(&[4, 9])),
    ];
    cases.into_iter().enumerate().for_each(|(i, case)| assert!(case.is_err(), "case {i}"));
}

/// What a policy says of tokens whose positions and logits are on a device.
fn verdict(
    policy: &str,
    spec: &ModelSpec,
    positions: &[u32],
    logits: &Tensor,
    device: &Device,
) -> (Vec<f32>, Vec<f32>) {
    let policy = Registry::standard().parse(policy).unwrap();
    let none = Tensor::zeros((positions.len(), spec.kv_heads, spec.head_dim), DType::F32, device).unwrap();
    let new = NewTokens {
        q: none.clone(),
        k: none.clone(),
        v: none,
        evict_logits: Some(logits.to_device(device).unwrap()),
        positions: ids(positions, device),
    };
    let verdict = policy.on_write(&LayerCx { layer: 5, spec }, &new).unwrap();
    let bits = match verdict.evict {
        Evict::Bits { bits, .. } => numbers(&bits),
        _ => vec![],
    };
    (bits, verdict.score.map(|score| numbers(&score)).unwrap_or_default())
}

#[test]
fn policies_decide_alike() {
    let Some(device) = gpu() else { return };
    let mut rng = StdRng::seed_from_u64(1);
    for heads in [1, 3, 8, 200] {
        let mut spec = ModelSpec::new(6, heads, heads, 4);
        spec.gates = Some(GateSpec { window: 4, lag: Lag::Own, per: PerGate::Head, disable: false });
        let positions: Vec<u32> = (0..300).map(|_| rng.random_range(0..1u32 << 31)).collect();
        let logits: Vec<f32> = (0..300 * heads).map(|_| rng.random_range(-3..=3) as f32).collect();
        let logits = Tensor::from_vec(logits, (300, heads), &Device::Cpu).unwrap();
        for policy in [
            "dms:bias=-1",
            "dms:per=layer,bias=0.5",
            "random-gate:rate=0.37,seed=9",
            "random-gate:rate=1",
            "random:budget=8,seed=3",
        ] {
            let of = |device: &Device| verdict(policy, &spec, &positions, &logits, device);
            let (got, expected) = (of(&device), of(&Device::Cpu));
            assert_eq!(got, expected, "{policy}, {heads} heads");
            assert_eq!(got.0.len() + got.1.len(), 300 * heads);
        }
    }
}

const TINY: &str = r#"{"hidden_size":64,"intermediate_size":96,"num_hidden_layers":2,"num_attention_heads":4,
    "num_key_value_heads":2,"head_dim":16,"vocab_size":300,"rms_norm_eps":1e-5,"rope_theta":10000.0,
    "max_position_embeddings":512,"model_type":"#;

/// A cache in main memory: slow with a model on a GPU, and right.
fn cache(model: &Model) -> KvCache {
    let spec = model.config().spec();
    let policy = Registry::standard().parse("window:size=9,sinks=2").unwrap();
    KvCache::new(spec.clone(), policy, cpu(&spec, &CpuConfig::default()).unwrap()).unwrap()
}

/// Logits of a prompt of two sequences and of two tokens after it.
fn logits(model: &Model) -> Vec<Tensor> {
    let mut cache = cache(model);
    let (a, b) = (cache.open(), cache.open());
    let prompt: Vec<u32> = (0..31).map(|i| i * 37 % 300).collect();
    let prefill = Phase::Prefill { last: true };
    let step = cache.begin(&[(a, 20, prefill), (b, 11, prefill)]).unwrap();
    let mut all = vec![model.forward(&prompt, &step, &mut cache, None).unwrap()];
    cache.end(step);
    for tokens in [[3, 299], [0, 150]] {
        let step = cache.begin(&[(a, 1, Phase::Decode), (b, 1, Phase::Decode)]).unwrap();
        all.push(model.forward_on(&ids(&tokens, model.device()), &step, &mut cache, None).unwrap());
        cache.end(step);
    }
    all
}

#[test]
fn models() {
    let Some(device) = gpu() else { return };
    for (arch, extra) in [
        ("llama", ""),
        ("llama", r#","attention_bias":true,"mlp_bias":true,"tie_word_embeddings":true"#),
        ("qwen2", ""),
        ("qwen3", ""),
    ] {
        let config = Config::from_json(&format!("{TINY}\"{arch}\"{extra}}}")).unwrap();
        let of = |dtype, device: &Device| logits(&Model::random(config.clone(), dtype, device, 1).unwrap());
        let expected = of(DType::F32, &Device::Cpu);
        for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::F16, 3e-3), (DType::BF16, 2e-2)] {
            for (got, expected) in of(dtype, &device).iter().zip(&expected) {
                close(got, expected, tolerance, &format!("{arch}{extra} {dtype:?}"));
            }
        }
    }
}

#[test]
fn greedy_is_the_largest_logit() {
    let Some(device) = gpu() else { return };
    let config = Config::from_json(&format!("{TINY}\"llama\"}}")).unwrap();
    let model = Model::random(config, DType::BF16, &device, 2).unwrap();
    let (mut one, mut other) = (cache(&model), cache(&model));
    let seqs: Vec<_> = (0..3).map(|_| (one.open(), other.open())).collect();
    for lens in [[4, 1, 7], [1, 1, 1]] {
        let tokens: Vec<u32> = (0..lens.iter().sum::<usize>() as u32).map(|i| i * 71 % 300).collect();
        let last = Phase::Prefill { last: true };
        let (ours, theirs): (Vec<_>, Vec<_>) =
            seqs.iter().zip(lens).map(|(&(a, b), len)| ((a, len, last), (b, len, last))).unzip();
        let (step, twin) = (one.begin(&ours).unwrap(), other.begin(&theirs).unwrap());
        let next = model.greedy(&ids(&tokens, &device), &step, &mut one, None).unwrap();
        let logits = model.forward(&tokens, &twin, &mut other, None).unwrap();
        assert_eq!(next.to_vec1::<u32>().unwrap(), ops::argmax(&logits).unwrap().to_vec1::<u32>().unwrap());
        one.end(step);
        other.end(twin);
    }
}

/// A block without its cache, from tokens to tokens.
struct Chain {
    table: Tensor,
    norm: Tensor,
    qkv: Tensor,
    heads: Heads,
    o: Tensor,
    gate_up: Tensor,
    down: Tensor,
    inv_freq: Tensor,
    adapter: GateWeights,
}

impl Chain {
    fn new(inputs: &mut Inputs) -> Self {
        let (hidden, ffn, vocab) = (64, 96, 300);
        let mut weight = |dims: &[usize]| inputs.pair(dims, 0.3).1;
        let adapter = GateWeights { norm: weight(&[hidden]), eps: 1e-5, weight: weight(&[2, hidden]), bias: None };
        Self {
            table: weight(&[vocab, hidden]),
            norm: weight(&[hidden]),
            qkv: weight(&[8 * 16, hidden]),
            heads: Heads {
                q_heads: 4,
                kv_heads: 2,
                head_dim: 16,
                bias: Some(weight(&[8 * 16])),
                q_norm: Some(weight(&[16])),
                k_norm: Some(weight(&[16])),
                eps: 1e-5,
            },
            o: weight(&[hidden, 8 * 16]),
            gate_up: weight(&[2 * ffn, hidden]),
            down: weight(&[hidden, ffn]),
            inv_freq: Tensor::new(&[1f32, 0.5, 0.25, 0.1, 0.05, 0.02, 0.01, 0.001], &inputs.device).unwrap(),
            adapter,
        }
    }

    /// Next tokens, and bits of the adapter.
    fn run(&self, tokens: &Tensor, positions: &Tensor) -> (Tensor, Tensor) {
        let rotation =
            Rotation::new(positions.clone(), self.inv_freq.clone(), RopeLayout::HalfSplit, self.table.dtype());
        let (x, normed) = ops::embed_rms_norm(&self.table, tokens, &self.norm, 1e-5).unwrap();
        let logits = ops::gate(&x, &self.adapter, 100.0, 5.0).unwrap();
        let qkv = ops::linear(&normed, &self.qkv).unwrap();
        self.heads.finish(qkv.clone(), &rotation).unwrap(); // in place
        let y = ops::linear(&qkv, &self.o).unwrap(); // in place of a cache, all of it
        let (x, normed) = ops::add_rms_norm(&x, &y, &self.norm, 1e-5).unwrap();
        let y = ops::linear(&ops::linear_silu_mul(&normed, &self.gate_up).unwrap(), &self.down).unwrap();
        let (_, normed) = ops::add_rms_norm(&x, &y, &self.norm, 1e-5).unwrap();
        (ops::argmax(&ops::linear(&normed, &self.table).unwrap()).unwrap(), logits)
    }
}

/// The shape of a decode loop: what a graph replays reads new tokens and positions where the old ones were.
#[test]
fn a_graph_holds_a_step() {
    if gpu().is_none() {
        return;
    }
    let device = Device::new_cuda_with_stream(0).unwrap();
    let cuda = device.as_cuda_device().unwrap();
    // SAFETY: every tensor of this device is used on its one stream.
    unsafe { cuda.disable_event_tracking() };
    for tokens in [1, 8, 20] {
        let mut inputs = Inputs::new(&device, DType::BF16);
        let chain = Chain::new(&mut inputs);
        let (now, positions) = (ids(&vec![5; tokens], &device), ids(&vec![0; tokens], &device));
        chain.run(&now, &positions); // loads what is loaded once
        device.synchronize().unwrap();

        let stream = cuda.cuda_stream();
        stream.begin_capture(CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
        let (next, logits) = chain.run(&now, &positions);
        let flags = CUgraphInstantiate_flags_enum::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        let graph = stream.end_capture(flags).unwrap().unwrap();
        for round in 0..3u32 {
            let fresh: Vec<u32> = (0..tokens as u32).map(|i| (i * 17 + round * 101) % 300).collect();
            now.slice_set(&ids(&fresh, &device), 0, 0).unwrap();
            positions.slice_set(&ids(&vec![round * 1000; tokens], &device), 0, 0).unwrap();
            graph.launch().unwrap();
            let replayed = (next.to_vec1::<u32>().unwrap(), numbers(&logits));
            let (next, logits) = chain.run(&ids(&fresh, &device), &ids(&vec![round * 1000; tokens], &device));
            assert_eq!(replayed, (next.to_vec1::<u32>().unwrap(), numbers(&logits)), "round {round}");
        }
    }
}
