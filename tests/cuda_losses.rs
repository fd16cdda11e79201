//! The losses on a GPU against those on the CPU, which are their specification. Without a GPU every test says so and
//! passes.
#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use candle_core::{DType, Device, Tensor};
use common::gpu;
use kvpolicy::retrofit::losses::{cross_entropy, distil, distil_teacher};
use rand::{Rng, SeedableRng, rngs::StdRng};

type Loss = fn(Tensor, &Tensor, &Tensor) -> kvpolicy::Result<(Tensor, Tensor)>;

const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];
const DISTIL: [(&str, Loss); 2] = [("student", distil), ("teacher", distil_teacher)];

/// Random numbers in [-scale, scale) as a type rounds them.
fn random(rng: &mut StdRng, dims: &[usize], scale: f32, dtype: DType) -> Tensor {
    let numbers: Vec<f32> = (0..dims.iter().product()).map(|_| (rng.random::<f32>() * 2.0 - 1.0) * scale).collect();
    Tensor::from_vec(numbers, dims, &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
}

fn targets(rng: &mut StdRng, rows: usize, vocab: usize) -> Tensor {
    let targets: Vec<u32> = (0..rows).map(|_| rng.random_range(0..vocab as u32)).collect();
    Tensor::new(targets, &Device::Cpu).unwrap()
}

fn numbers(x: &Tensor) -> Vec<f32> {
    x.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// Memory that was NaN all over is what the next losses of so many rows are likely made of.
fn poison(rows: usize, device: &Device) {
    let spoilt: Vec<Tensor> = (0..4).map(|_| Tensor::full(f32::NAN, rows, device).unwrap()).collect();
    drop(spoilt);
}

/// The largest difference against the largest of what is expected; NaN never passes.
#[track_caller]
fn close(got: &Tensor, expected: &Tensor, tolerance: f32, what: &str) {
    assert_eq!((got.dims(), got.dtype()), (expected.dims(), expected.dtype()), "{what}");
    let (got, expected) = (numbers(got), numbers(expected));
    let most = expected.iter().fold(1e-20, |most: f32, e| most.max(e.abs()));
    for (i, (g, e)) in got.iter().zip(&expected).enumerate() {
        assert!((g - e).abs() <= tolerance * most, "{what}: element {i} is {g}, not {e}");
    }
}

/// A loss of the same tensors here and there. 16 bits differ by a rounding.
fn same(loss: Loss, logits: &Tensor, beside: &Tensor, weights: &Tensor, device: &Device, what: &str) {
    let there = |x: &Tensor| x.to_device(device).unwrap();
    let (expected, expected_gradient) = loss(logits.clone(), beside, weights).unwrap();
    let (on_gpu, beside, weights) = (there(logits), there(beside), there(weights));
    poison(logits.dims()[0], device);
    let (losses, gradient) = loss(on_gpu.copy().unwrap(), &beside, &weights).unwrap();
    close(&losses, &expected, 3e-5, what);
    let rounding = match logits.dtype() {
        DType::F32 => 3e-5,
        DType::F16 => 1e-3,
        _ => 8e-3,
    };
    close(&gradient, &expected_gradient, rounding, what);
    let (again, gradient_again) = loss(on_gpu, &beside, &weights).unwrap();
    assert_eq!(numbers(&again), numbers(&losses), "{what}: the same to the bit");
    assert_eq!(numbers(&gradient_again), numbers(&gradient), "{what}: the same to the bit");
}

#[test]
fn every_loss_is_that_of_the_cpu() {
    let Some(device) = gpu() else { return };
    let mut rng = StdRng::seed_from_u64(3);
    for dtype in DTYPES {
        for (rows, vocab) in
            [(1, 1), (5, 7), (70_001, 8), (33, 513), (9, 4096), (3, 49_152), (2, 50_257), (1, 151_936), (4, 151_936)]
        {
            let dims = [rows, vocab];
            let (student, teacher) = (random(&mut rng, &dims, 10.0, dtype), random(&mut rng, &dims, 10.0, dtype));
            let weights = random(&mut rng, &[rows], 2.0, DType::F32);
            let what = format!("{dtype:?} {rows}x{vocab}");
            for (direction, loss) in DISTIL {
                same(loss, &student, &teacher, &weights, &device, &format!("{what}, from the {direction}"));
            }
            let targets = targets(&mut rng, rows, vocab);
            same(cross_entropy, &student, &targets, &weights, &device, &format!("{what}, cross-entropy"));
        }
    }
}

/// Logits far from 0, one far above the others, and in ascending order, where every step has a new maximum.
#[test]
fn sums_of_any_range_are_those_of_the_cpu() {
    let Some(device) = gpu() else { return };
    let mut rng = StdRng::seed_from_u64(4);
    let (rows, vocab) = (3, 20_000);
    let noise = random(&mut rng, &[rows, vocab], 4.0, DType::F32);
    let ramp = (Tensor::arange(0f32, vocab as f32, &Device::Cpu).unwrap() / 100.0).unwrap();
    let ascending = noise.broadcast_add(&ramp).unwrap();
    let peak =
        noise.slice_assign(&[0..rows, 777..778], &Tensor::full(14f32, (rows, 1), &Device::Cpu).unwrap()).unwrap();
    let weights = Tensor::ones(rows, DType::F32, &Device::Cpu).unwrap();
    let targets = targets(&mut rng, rows, vocab);
    for (what, student) in [("ascending", ascending), ("peak", peak), ("low", (&noise - 500.0).unwrap())] {
        let teacher = (&student + random(&mut rng, &[rows, vocab], 1.0, DType::F32)).unwrap();
        for (direction, loss) in DISTIL {
            same(loss, &student, &teacher, &weights, &device, &format!("{what}, from the {direction}"));
        }
        same(cross_entropy, &student, &targets, &weights, &device, &format!("{what}, cross-entropy"));
    }
}

/// Where a student has nearly learnt its teacher: a difference of large numbers is small.
#[test]
fn small_divergences_keep_their_digits() {
    let Some(device) = gpu() else { return };
    let mut rng = StdRng::seed_from_u64(5);
    let student = random(&mut rng, &[4, 49_152], 10.0, DType::F32);
    let teacher = (&student + random(&mut rng, &[4, 49_152], 0.02, DType::F32)).unwrap();
    let weights = Tensor::ones(4, DType::F32, &Device::Cpu).unwrap();
    let there = |x: &Tensor| x.to_device(&device).unwrap();
    for (direction, loss) in DISTIL {
        let (expected, expected_gradient) = loss(student.clone(), &teacher, &weights).unwrap();
        let (kl, gradient) = loss(there(&student), &there(&teacher), &there(&weights)).unwrap();
        for (kl, expected) in numbers(&kl).iter().zip(numbers(&expected)) {
            assert!((kl - expected).abs() < 2e-6, "from the {direction}: {kl}, not {expected}");
        }
        close(&gradient, &expected_gradient, 1e-4, direction);
    }
}

#[test]
fn rows_without_weight_or_target() {
    let Some(device) = gpu() else { return };
    let (inf, nan) = (f32::INFINITY, f32::NAN);
    for dtype in DTYPES {
        for more in [0, 5] {
            // 3 columns, and 8: narrow and wide.
            let rows = [[nan, 1.0, 2.0], [1.0, 2.0, 3.0], [inf, -inf, 0.0], [1.0, 0.0, 0.0]];
            let logits = Tensor::new(&rows, &device).unwrap().pad_with_zeros(1, 0, more).unwrap();
            let logits = logits.to_dtype(dtype).unwrap().contiguous().unwrap();
            let weights = Tensor::new(&[0f32, 1.0, 0.0, 2.0], &device).unwrap();
            let targets = Tensor::new(&[70u32, 2, u32::MAX, 3 + more as u32], &device).unwrap();
            for (loss, beside) in [(distil as Loss, &logits), (distil_teacher, &logits), (cross_entropy, &targets)] {
                let (losses, gradient) = loss(logits.copy().unwrap(), beside, &weights).unwrap();
                let gradient = gradient.to_dtype(DType::F32).unwrap().to_vec2::<f32>().unwrap();
                assert!(gradient[0].iter().chain(&gradient[2]).all(|&e| e == 0.0), "{dtype:?} {gradient:?}");
                assert!(gradient[1].iter().all(|e| e.is_finite()) && numbers(&losses)[1].is_finite());
            }
            let (nll, gradient) = cross_entropy(logits, &targets, &weights).unwrap();
            let nll = numbers(&nll);
            assert!(nll[0] == 0.0 && nll[2] == 0.0 && nll[3].is_nan(), "{nll:?}");
            assert!(numbers(&gradient.narrow(0, 3, 1).unwrap()).iter().all(|e| e.is_nan()));
        }
    }
}

/// Logits of minus infinity, on both sides, are tokens that are not there.
#[test]
fn what_has_no_probability_does_not_count() {
    let Some(device) = gpu() else { return };
    let mut rng = StdRng::seed_from_u64(6);
    let none = Tensor::full(f32::NEG_INFINITY, (3, 2000), &Device::Cpu).unwrap();
    let mut masked = || Tensor::cat(&[&none, &random(&mut rng, &[3, 104], 3.0, DType::F32), &none], 1).unwrap();
    let (student, teacher) = (masked(), masked());
    let weights = Tensor::ones(3, DType::F32, &Device::Cpu).unwrap();
    for (direction, loss) in DISTIL {
        same(loss, &student, &teacher, &weights, &device, direction);
    }
    let targets = Tensor::new(&[2000u32, 2050, 2103], &Device::Cpu).unwrap();
    same(cross_entropy, &student, &targets, &weights, &device, "cross-entropy");
}

#[test]
fn views_are_read_and_operands_that_do_not_fit_are_errors() {
    let Some(device) = gpu() else { return };
    let mut rng = StdRng::seed_from_u64(7);
    let (all, other) = (random(&mut rng, &[5, 64], 5.0, DType::F32), random(&mut rng, &[3, 80], 5.0, DType::F32));
    let there = |x: &Tensor| x.to_device(&device).unwrap();
    let weights = Tensor::ones(3, DType::F32, &Device::Cpu).unwrap();
    // Rows of a tensor, whose other rows stay as they are; columns of another.
    let base = there(&all);
    let (rows, columns) = (|x: &Tensor| x.narrow(0, 1, 3).unwrap(), |x: &Tensor| x.narrow(1, 7, 64).unwrap());
    let (kl, gradient) = distil(rows(&base), &columns(&there(&other)), &there(&weights)).unwrap();
    let (expected, expected_gradient) = distil(rows(&all), &columns(&other), &weights).unwrap();
    close(&kl, &expected, 3e-5, "views");
    close(&gradient, &expected_gradient, 3e-5, "views");
    let untouched = |x: &Tensor| [numbers(&x.get(0).unwrap()), numbers(&x.get(4).unwrap())];
    assert_eq!(untouched(&base), untouched(&all));

    let x = |dims: &[usize], dtype| Tensor::zeros(dims, dtype, &device).unwrap();
    let logits = || x(&[2, 8], DType::F32);
    let cases = [
        distil(logits(), &x(&[2, 7], DType::F32), &x(&[2], DType::F32)),
        distil(logits(), &x(&[2, 8], DType::F16), &x(&[2], DType::F32)),
        distil(logits(), &logits(), &x(&[3], DType::F32)),
        distil(logits(), &logits(), &Tensor::zeros(2, DType::F32, &Device::Cpu).unwrap()),
        cross_entropy(logits(), &x(&[2], DType::I64), &x(&[2], DType::F32)),
        cross_entropy(x(&[2, 8], DType::F64), &x(&[2], DType::U32), &x(&[2], DType::F32)),
    ];
    cases.into_iter().enumerate().for_each(|(i, case)| assert!(case.is_err(), "case {i}"));
}
