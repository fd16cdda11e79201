//! Attention with soft gates on the CPU, against its formula differentiated by candle and against finite differences.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use candle_core::{D, DType, Device, Tensor, Var};
use common::Rng;
use kvpolicy::{
    Error,
    retrofit::{SoftAttention, SoftGrads},
};

#[derive(Debug, Clone, Copy)]
enum Gates {
    None,
    Random,
    /// Some keys kept for sure, some as good as never.
    Hard(f64),
}

const GATES: [Gates; 4] = [Gates::None, Gates::Random, Gates::Hard(-1e4), Gates::Hard(-1e30)];

/// What attention is given, in f64.
struct Inputs {
    attention: SoftAttention,
    qkv: Tensor,
    keep: Option<Tensor>,
    dy: Tensor,
}

impl Inputs {
    fn new(attention: SoftAttention, gates: Gates, seed: u64) -> Self {
        let SoftAttention { sequences, length, q_heads, kv_heads, head_dim, .. } = attention;
        let (mut rng, tokens) = (Rng(seed), sequences * length);
        let mut numbers = |dims: &[usize]| -> Tensor {
            let numbers: Vec<f64> = (0..dims.iter().product()).map(|_| rng.number().into()).collect();
            Tensor::from_vec(numbers, dims, &Device::Cpu).unwrap()
        };
        let qkv = numbers(&[tokens, q_heads + 2 * kv_heads, head_dim]);
        let (dy, gate) = (numbers(&[tokens, q_heads, head_dim]), numbers(&[tokens, kv_heads]));
        let keep = match gates {
            Gates::None => None,
            Gates::Random => Some(((gate - 2.0).unwrap() * 1.5).unwrap()), // in (-6, 0)
            Gates::Hard(low) => Some((gate.lt(0.0).unwrap().to_dtype(DType::F64).unwrap() * low).unwrap()),
        };
        Self { attention, qkv, keep, dy }
    }

    /// In another dtype.
    fn to(&self, dtype: DType) -> Self {
        let to = |tensor: &Tensor| tensor.to_dtype(dtype).unwrap();
        Self { qkv: to(&self.qkv), keep: self.keep.as_ref().map(to), dy: to(&self.dy), ..*self }
    }

    fn run(&self) -> Results {
        let keep = self.keep.as_ref();
        let (y, lse) = self.attention.forward(&self.qkv, keep).unwrap();
        let SoftGrads { qkv, keep } = self.attention.backward(&self.qkv, keep, &y, &lse, &self.dy).unwrap();
        Results { y, lse, qkv, keep }
    }

    /// The sum of `y * dy`.
    fn loss(&self) -> f64 {
        let (y, _) = self.attention.forward(&self.qkv, self.keep.as_ref()).unwrap();
        (y * &self.dy).unwrap().sum_all().unwrap().to_scalar().unwrap()
    }

    /// The formula on whole matrices, and what candle makes of it.
    fn dense(&self) -> Results {
        let SoftAttention { sequences, length, q_heads, kv_heads, head_dim, .. } = self.attention;
        let zeros = || Tensor::zeros((sequences * length, kv_heads), DType::F64, &Device::Cpu).unwrap();
        let qkv = Var::from_tensor(&self.qkv).unwrap();
        let keep = Var::from_tensor(&self.keep.clone().unwrap_or_else(zeros)).unwrap();
        let heads = qkv.reshape((sequences, length, (), head_dim)).unwrap().transpose(1, 2).unwrap();
        let part = |first, count| heads.narrow(1, first, count).unwrap().contiguous().unwrap();
        let shared = |x: Tensor| {
            let shape = (sequences, kv_heads, q_heads / kv_heads, length, x.dim(3).unwrap());
            let x = x.unsqueeze(2).unwrap().broadcast_as(shape).unwrap();
            x.reshape((sequences, q_heads, length, shape.4)).unwrap()
        };
        let (q, k, v) = (part(0, q_heads), shared(part(q_heads, kv_heads)), shared(part(q_heads + kv_heads, kv_heads)));
        let gates = shared(keep.reshape((sequences, length, kv_heads, 1)).unwrap().transpose(1, 2).unwrap());
        let gates = gates.transpose(2, 3).unwrap().broadcast_mul(&self.mask(|i, j| (i > j + self.window()).into()));
        let scores = (q.matmul(&k.t().unwrap()).unwrap() * f64::from(self.attention.scale)).unwrap();
        let scores = (scores + gates.unwrap()).unwrap();
        let hidden = self.mask(|i, j| if i < j { f64::NEG_INFINITY } else { 0.0 });
        let scores = scores.broadcast_add(&hidden).unwrap();
        let top = scores.max_keepdim(D::Minus1).unwrap().detach();
        let weights = scores.broadcast_sub(&top).unwrap().exp().unwrap();
        let sum = weights.sum_keepdim(D::Minus1).unwrap();
        let y = weights.broadcast_div(&sum).unwrap().matmul(&v).unwrap();
        let y = y.transpose(1, 2).unwrap().reshape((sequences * length, q_heads, head_dim)).unwrap();
        let lse = (top + sum.log().unwrap()).unwrap().transpose(1, 2).unwrap();
        let grads = (&y * &self.dy).unwrap().sum_all().unwrap().backward().unwrap();
        let of = |var: &Var| grads.get(var).unwrap().clone();
        Results { y, lse: lse.reshape((sequences * length, q_heads)).unwrap(), qkv: of(&qkv), keep: of(&keep) }
    }

    fn window(&self) -> usize {
        self.attention.window
    }

    /// `[length, length]`
    fn mask(&self, of: impl Fn(usize, usize) -> f64) -> Tensor {
        let length = self.attention.length;
        let numbers = (0..length * length).map(|i| of(i / length, i % length)).collect();
        Tensor::from_vec(numbers, (length, length), &Device::Cpu).unwrap()
    }
}

struct Results {
    y: Tensor,
    lse: Tensor,
    qkv: Tensor,
    keep: Tensor,
}

impl Results {
    fn assert_near(&self, want: &Self, tolerance: f64, what: &str) {
        let parts = [
            ("y", &self.y, &want.y),
            ("lse", &self.lse, &want.lse),
            ("dqkv", &self.qkv, &want.qkv),
            ("dkeep", &self.keep, &want.keep),
        ];
        for (name, got, want) in parts {
            assert_eq!(got.dims(), want.dims(), "{what}: {name}");
            let (got, want) = (numbers(got), numbers(want));
            let size = want.iter().fold(1.0, |size: f64, x| size.max(x.abs()));
            let off = got.iter().zip(&want).map(|(got, want)| (got - want).abs());
            assert!(
                off.clone().all(|off| off <= tolerance * size),
                "{what}: {name} is off by {:?}",
                off.max_by(f64::total_cmp)
            );
        }
    }
}

fn numbers(tensor: &Tensor) -> Vec<f64> {
    tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn attention(length: usize, group: usize, window: usize) -> SoftAttention {
    SoftAttention { sequences: 2, length, q_heads: 2 * group, kv_heads: 2, head_dim: 20, window, scale: 0.3 }
}

#[test]
fn it_is_the_formula_and_its_gradients() {
    let mut seed = 0;
    for length in [1, 2, 17, 64, 65] {
        for (group, window) in [1, 3, 7].into_iter().flat_map(|group| [0, 1, 16, 70].map(|window| (group, window))) {
            for gates in GATES {
                seed += 1;
                let inputs = Inputs::new(attention(length, group, window), gates, seed);
                let (want, what) =
                    (inputs.dense(), format!("length {length}, group {group}, window {window}, {gates:?}"));
                inputs.run().assert_near(&want, 1e-11, &format!("{what}, f64"));
                inputs.to(DType::F32).run().assert_near(&want, 1e-5, &format!("{what}, f32"));
            }
        }
    }
}

#[test]
fn gradients_are_those_of_finite_differences() {
    for (seed, (length, group, window)) in [(7, 1, 2), (19, 3, 0), (33, 2, 5)].into_iter().enumerate() {
        let inputs = Inputs::new(attention(length, group, window), Gates::Random, 100 + seed as u64);
        let grads = inputs.run();
        for direction in 0..4 {
            let along = Inputs::new(inputs.attention, Gates::Random, 200 + direction);
            let step = |by: f64| {
                let keep = (inputs.keep.as_ref().unwrap() + (along.keep.as_ref().unwrap() * by).unwrap()).unwrap();
                let qkv = (&inputs.qkv + (&along.qkv * by).unwrap()).unwrap();
                Inputs { attention: inputs.attention, qkv, keep: Some(keep), dy: inputs.dy.clone() }.loss()
            };
            let slope = (step(1e-5) - step(-1e-5)) / 2e-5;
            let dot = |a: &Tensor, b: &Tensor| (a * b).unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap();
            let want = dot(&grads.qkv, &along.qkv) + dot(&grads.keep, along.keep.as_ref().unwrap());
            assert!((slope - want).abs() < 1e-6 * (1.0 + want.abs()), "{length}, {direction}: {slope} {want}");
        }
    }
}

#[test]
fn a_gate_of_any_depth_gives_numbers() {
    for gate in [-1e3, -1e5, f64::from(f32::MIN), f64::NEG_INFINITY] {
        let mut inputs = Inputs::new(attention(40, 3, 4), Gates::Random, 5).to(DType::F32);
        let never = Inputs { keep: inputs.keep.as_ref().map(|keep| (keep * 0.0).unwrap()), ..inputs.to(DType::F32) };
        inputs.keep = Some((never.keep.unwrap() + gate).unwrap());
        let results = inputs.run();
        for tensor in [&results.y, &results.lse, &results.qkv, &results.keep] {
            assert!(numbers(tensor).iter().all(|x| x.is_finite()), "{gate}");
        }
        assert!(numbers(&results.keep).iter().all(|&x| x == 0.0), "what is never kept has no gradient: {gate}");
    }
}

#[test]
fn views_are_read_as_they_are() {
    let inputs = Inputs::new(attention(9, 1, 2), Gates::Random, 6).to(DType::F32);
    let turned = |x: &Tensor| x.t().unwrap().contiguous().unwrap().t().unwrap();
    let views = Inputs { qkv: turned(&inputs.qkv), keep: inputs.keep.as_ref().map(turned), ..inputs.to(DType::F32) };
    assert!(!views.qkv.is_contiguous());
    views.run().assert_near(&inputs.run(), 0.0, "views");
}

#[test]
fn what_makes_no_sense_is_refused() {
    let inputs = Inputs::new(attention(6, 2, 1), Gates::Random, 7).to(DType::F32);
    let (good, qkv, keep) = (inputs.attention, &inputs.qkv, inputs.keep.as_ref());
    let results = inputs.run();
    let config = |attention: SoftAttention| {
        let error = attention.forward(qkv, keep).unwrap_err();
        assert!(matches!(error, Error::Config(_)), "{attention:?}: {error}");
    };
    config(SoftAttention { sequences: 0, ..good });
    config(SoftAttention { length: 0, ..good });
    config(SoftAttention { kv_heads: 0, ..good });
    config(SoftAttention { head_dim: 0, ..good });
    config(SoftAttention { kv_heads: 3, ..good });
    config(SoftAttention { length: usize::MAX, ..good });
    config(SoftAttention { kv_heads: usize::MAX, q_heads: usize::MAX, ..good });
    for scale in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        config(SoftAttention { scale, ..good });
    }
    let shape = |result: kvpolicy::Result<SoftGrads>, name: &str| match result {
        Err(Error::Shape { what, .. }) => assert_eq!(what, name),
        other => panic!("{name}: {other:?}"),
    };
    let (y, lse, dy) = (&results.y, &results.lse, &inputs.dy);
    let short = |x: &Tensor| x.narrow(0, 1, 11).unwrap();
    shape(good.backward(&short(qkv), keep, y, lse, dy), "qkv");
    shape(good.backward(qkv, Some(&short(keep.unwrap())), y, lse, dy), "keep");
    shape(good.backward(qkv, keep, &short(y), lse, dy), "y");
    shape(good.backward(qkv, keep, y, &short(lse), dy), "lse");
    shape(good.backward(qkv, keep, y, lse, &short(dy)), "dy");
    let refused = |result: kvpolicy::Result<SoftGrads>| assert!(matches!(result, Err(Error::Config(_))), "{result:?}");
    let wide = |x: &Tensor| x.to_dtype(DType::F64).unwrap();
    refused(good.backward(qkv, Some(&wide(keep.unwrap())), y, lse, dy));
    refused(good.backward(qkv, keep, &wide(y), lse, dy));
    refused(good.backward(qkv, keep, y, &wide(lse), dy));
    refused(good.backward(qkv, keep, y, lse, &wide(dy)));
    assert!(matches!(good.forward(&qkv.to_dtype(DType::BF16).unwrap(), keep), Err(Error::Config(_))));
}
