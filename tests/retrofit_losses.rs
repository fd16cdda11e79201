//! The losses that train a model to evict, against candle's automatic differentiation, finite differences, and what
//! NVIDIA's reference computes (see `adapters/candle/tests/golden/README.md`).
#![allow(clippy::unwrap_used, clippy::panic)]

use candle_core::{D, DType, Device, Tensor, Var};
use kvpolicy::{
    Error,
    retrofit::losses::{cross_entropy, distil, distil_teacher},
};
use rand::{Rng, SeedableRng, rngs::StdRng};
use std::collections::HashMap;

type Loss = fn(Tensor, &Tensor, &Tensor) -> kvpolicy::Result<(Tensor, Tensor)>;

fn random(rng: &mut StdRng, dims: &[usize], scale: f32) -> Tensor {
    let numbers: Vec<f32> = (0..dims.iter().product()).map(|_| (rng.random::<f32>() * 2.0 - 1.0) * scale).collect();
    Tensor::from_vec(numbers, dims, &Device::Cpu).unwrap()
}

fn numbers(x: &Tensor) -> Vec<f32> {
    x.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// The largest difference against the largest of what is expected; NaN never passes.
#[track_caller]
fn close(got: &Tensor, expected: &Tensor, tolerance: f32, what: &str) {
    assert_eq!(got.dims(), expected.dims(), "{what}");
    let (got, expected) = (numbers(got), numbers(expected));
    let most = expected.iter().fold(1e-20, |most: f32, e| most.max(e.abs()));
    for (i, (g, e)) in got.iter().zip(&expected).enumerate() {
        assert!((g - e).abs() <= tolerance * most, "{what}: element {i} is {g}, not {e}");
    }
}

fn log_softmax(x: &Tensor) -> Tensor {
    let x = x.broadcast_sub(&x.detach().max_keepdim(D::Minus1).unwrap()).unwrap();
    x.broadcast_sub(&x.exp().unwrap().sum_keepdim(D::Minus1).unwrap().log().unwrap()).unwrap()
}

/// `sum_v p (log p - log q)` of rows, as it is written.
fn kl(p: &Tensor, q: &Tensor) -> Tensor {
    let (p, q) = (log_softmax(p), log_softmax(q));
    (p.exp().unwrap() * (p - q).unwrap()).unwrap().sum(1).unwrap()
}

fn nll(x: &Tensor, targets: &Tensor) -> Tensor {
    log_softmax(x).gather(&targets.unsqueeze(1).unwrap(), 1).unwrap().squeeze(1).unwrap().neg().unwrap()
}

/// A loss of rows and the gradient of its weighted sum, by candle.
fn automatic(x: &Tensor, weights: &Tensor, loss: impl Fn(&Tensor) -> Tensor) -> (Tensor, Tensor) {
    let x = Var::from_tensor(x).unwrap();
    let losses = loss(&x);
    let sum = (&losses * weights).unwrap().sum_all().unwrap();
    (losses.detach(), sum.backward().unwrap().get(&x).unwrap().clone())
}

fn targets(rng: &mut StdRng, rows: usize, vocab: usize) -> Tensor {
    let targets: Vec<u32> = (0..rows).map(|_| rng.random_range(0..vocab as u32)).collect();
    Tensor::new(targets, &Device::Cpu).unwrap()
}

#[test]
fn losses_and_gradients_are_those_of_candle() {
    let mut rng = StdRng::seed_from_u64(5);
    for (rows, vocab, scale) in [(1, 1, 1.0), (3, 2, 5.0), (4, 7, 3.0), (9, 130, 20.0), (2, 5000, 8.0)] {
        let what = format!("{rows}x{vocab}");
        let (student, teacher) = (random(&mut rng, &[rows, vocab], scale), random(&mut rng, &[rows, vocab], scale));
        let (weights, targets) = (random(&mut rng, &[rows], 2.0), targets(&mut rng, rows, vocab));
        for (got, (loss, gradient)) in [
            (distil(student.clone(), &teacher, &weights), automatic(&student, &weights, |s| kl(s, &teacher))),
            (distil_teacher(student.clone(), &teacher, &weights), automatic(&student, &weights, |s| kl(&teacher, s))),
            (cross_entropy(student.clone(), &targets, &weights), automatic(&student, &weights, |s| nll(s, &targets))),
        ] {
            let got = got.unwrap();
            close(&got.0, &loss, 1e-5, &what);
            close(&got.1, &gradient, 1e-5, &what);
        }
    }
}

#[test]
fn gradients_are_differences_of_the_loss() {
    let mut rng = StdRng::seed_from_u64(6);
    let (rows, vocab, step) = (2, 6, 1e-2);
    let (student, teacher) = (random(&mut rng, &[rows, vocab], 2.0), random(&mut rng, &[rows, vocab], 2.0));
    let (weights, targets) = (random(&mut rng, &[rows], 2.0), targets(&mut rng, rows, vocab));
    for (loss, beside) in [(distil as Loss, &teacher), (distil_teacher, &teacher), (cross_entropy, &targets)] {
        let at = |x: &[f32]| {
            let x = Tensor::from_slice(x, (rows, vocab), &Device::Cpu).unwrap();
            let (losses, _) = loss(x, beside, &weights).unwrap();
            (losses * &weights).unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap()
        };
        let mut point = numbers(&student);
        let slopes: Vec<f32> = (0..point.len())
            .map(|i| {
                let here = point[i];
                point[i] = here + step;
                let above = at(&point);
                point[i] = here - step;
                let below = at(&point);
                point[i] = here;
                (above - below) / (2.0 * step)
            })
            .collect();
        let expected = Tensor::from_vec(slopes, (rows, vocab), &Device::Cpu).unwrap();
        close(&loss(student.clone(), beside, &weights).unwrap().1, &expected, 1e-3, "slopes");
    }
}

#[test]
fn types_of_16_bits_are_rounded_at_the_end() {
    for (dtype, tolerance) in [(DType::F16, 6e-4), (DType::BF16, 5e-3)] {
        let mut rng = StdRng::seed_from_u64(7);
        let mut pair = |dims: &[usize]| {
            let rounded = random(&mut rng, dims, 9.0).to_dtype(dtype).unwrap();
            (rounded.to_dtype(DType::F32).unwrap(), rounded)
        };
        let ((s, sr), (t, tr)) = (pair(&[5, 300]), pair(&[5, 300]));
        let (weights, targets) = (Tensor::ones(5, DType::F32, &Device::Cpu).unwrap(), targets(&mut rng, 5, 300));
        let same = |got: kvpolicy::Result<(Tensor, Tensor)>, expected: kvpolicy::Result<(Tensor, Tensor)>| {
            let ((loss, gradient), (expected_loss, expected)) = (got.unwrap(), expected.unwrap());
            assert_eq!((loss.dtype(), gradient.dtype()), (DType::F32, dtype));
            assert_eq!(numbers(&loss), numbers(&expected_loss));
            close(&gradient, &expected, tolerance, "gradient");
        };
        same(distil(sr.clone(), &tr, &weights), distil(s.clone(), &t, &weights));
        same(distil_teacher(sr.clone(), &tr, &weights), distil_teacher(s.clone(), &t, &weights));
        same(cross_entropy(sr, &targets, &weights), cross_entropy(s, &targets, &weights));
    }
}

#[test]
fn equal_logits_and_shifted_ones_have_no_divergence() {
    let mut rng = StdRng::seed_from_u64(8);
    let x = random(&mut rng, &[3, 50], 5.0);
    let weights = Tensor::ones(3, DType::F32, &Device::Cpu).unwrap();
    for loss in [distil as Loss, distil_teacher] {
        for teacher in [x.clone(), (&x + 100.0).unwrap()] {
            let (kl, gradient) = loss(x.clone(), &teacher, &weights).unwrap();
            assert!(numbers(&kl).iter().chain(&numbers(&gradient)).all(|e| e.abs() < 1e-5));
        }
    }
}

#[test]
fn a_row_without_weight_has_no_gradient_whatever_it_holds() {
    let (inf, nan) = (f32::INFINITY, f32::NAN);
    let student = Tensor::new(&[[nan, 1.0, 2.0], [1.0, 2.0, 3.0], [inf, -inf, 0.0]], &Device::Cpu).unwrap();
    let weights = Tensor::new(&[0f32, 1.0, 0.0], &Device::Cpu).unwrap();
    let targets = Tensor::new(&[7u32, 2, u32::MAX], &Device::Cpu).unwrap();
    for (loss, beside) in [(distil as Loss, &student), (distil_teacher, &student), (cross_entropy, &targets)] {
        let (losses, gradient) = loss(student.clone(), beside, &weights).unwrap();
        let gradient = gradient.to_vec2::<f32>().unwrap();
        assert_eq!([&gradient[0], &gradient[2]], [&[0.0; 3], &[0.0; 3]]);
        assert!(gradient[1].iter().all(|e| e.is_finite()) && numbers(&losses)[1].is_finite());
    }
    let (nll, _) = cross_entropy(student, &targets, &weights).unwrap();
    assert_eq!([numbers(&nll)[0], numbers(&nll)[2]], [0.0, 0.0], "no target, no loss");
}

/// Logits of minus infinity, on both sides, are tokens that are not there.
#[test]
fn what_has_no_probability_does_not_count() {
    let mut rng = StdRng::seed_from_u64(9);
    let (s, t) = (random(&mut rng, &[2, 5], 3.0), random(&mut rng, &[2, 5], 3.0));
    let none = Tensor::full(f32::NEG_INFINITY, (2, 2), &Device::Cpu).unwrap();
    let more = |x: &Tensor| Tensor::cat(&[x, &none], 1).unwrap();
    let weights = Tensor::ones(2, DType::F32, &Device::Cpu).unwrap();
    for loss in [distil as Loss, distil_teacher] {
        let (expected, expected_gradient) = loss(s.clone(), &t, &weights).unwrap();
        let (kl, gradient) = loss(more(&s), &more(&t), &weights).unwrap();
        assert_eq!(numbers(&kl), numbers(&expected));
        close(&gradient.narrow(1, 0, 5).unwrap(), &expected_gradient, 1e-6, "the others");
        assert_eq!(numbers(&gradient.narrow(1, 5, 2).unwrap()), [0.0; 4]);
    }
}

#[test]
fn operands_that_do_not_fit_are_errors() {
    let of = |dims: &[usize], dtype| Tensor::zeros(dims, dtype, &Device::Cpu).unwrap();
    let x = |dims: &[usize]| of(dims, DType::F32);
    let wrong = |result: kvpolicy::Result<(Tensor, Tensor)>, says: &str| match result {
        Err(error @ (Error::Shape { .. } | Error::Config(_))) => assert!(error.to_string().contains(says), "{error}"),
        other => panic!("{says}: {other:?}"),
    };
    wrong(distil(x(&[2, 3]), &x(&[2, 4]), &x(&[2])), "teacher");
    wrong(distil(x(&[2, 3]), &of(&[2, 3], DType::BF16), &x(&[2])), "teacher");
    wrong(distil_teacher(x(&[2, 3]), &x(&[2, 3]), &x(&[3])), "weights");
    wrong(distil(x(&[2, 3]), &x(&[2, 3]), &of(&[2], DType::F16)), "weights");
    wrong(distil(of(&[2, 3], DType::F64), &of(&[2, 3], DType::F64), &x(&[2])), "student");
    wrong(distil(x(&[6]), &x(&[6]), &x(&[2])), "student");
    wrong(cross_entropy(x(&[2, 0]), &of(&[2], DType::U32), &x(&[2])), "logits");
    wrong(cross_entropy(x(&[2, 3]), &of(&[2], DType::I64), &x(&[2])), "targets");
    let (targets, weights) = (Tensor::new(&[2u32, 3], &Device::Cpu).unwrap(), x(&[2]));
    assert!(cross_entropy(x(&[2, 3]), &targets, &weights).is_ok());
    wrong(cross_entropy(x(&[2, 3]), &targets, &(weights + 1.0).unwrap()), "row 1: target 3");
    let (kl, gradient) = distil(x(&[0, 3]), &x(&[0, 3]), &x(&[0])).unwrap();
    assert_eq!((kl.dims(), gradient.dims()), (&[0][..], &[0, 3][..]));
}

/// What the reference makes of the losses: two cases.
fn golden() -> [HashMap<String, Tensor>; 2] {
    ["losses_s1", "losses_s2"].map(|case| {
        let root = env!("CARGO_MANIFEST_DIR");
        let path = format!("{root}/adapters/candle/tests/golden/{case}/expected.safetensors");
        candle_core::safetensors::load(path, &Device::Cpu).unwrap()
    })
}

/// Rows `[rows, vocab]` of logits `[batch, length, vocab]`.
fn rows(logits: &Tensor) -> Tensor {
    logits.flatten(0, 1).unwrap()
}

/// The weights of a mean over rows where a mask is 1, as the reference takes it.
fn mean_over(mask: &[u8]) -> Tensor {
    let count = mask.iter().filter(|&&m| m != 0).count().max(1) as f32;
    let weights: Vec<f32> = mask.iter().map(|&m| f32::from(u8::from(m != 0)) / count).collect();
    Tensor::new(weights, &Device::Cpu).unwrap()
}

fn weighted(losses: &Tensor, weights: &Tensor) -> Tensor {
    (losses * weights).unwrap().sum_all().unwrap().reshape(1).unwrap()
}

#[test]
fn distillation_is_that_of_the_reference() {
    for case in golden() {
        let (student, teacher) = (rows(&case["student_logits"]), rows(&case["teacher_logits"]));
        let mask = case["loss_mask"].flatten_all().unwrap().to_vec1::<u8>().unwrap();
        let weights = mean_over(&mask);
        let (kl, gradient) = distil(student, &teacher, &weights).unwrap();
        close(&weighted(&kl, &weights), &case["distil_loss"], 1e-4, "loss");
        close(&gradient, &rows(&case["distil_loss_grad_student"]), 1e-3, "gradient");
        let none = mean_over(&vec![0; mask.len()]);
        close(&weighted(&kl, &none), &case["distil_loss_all_masked"], 0.0, "all masked");
    }
}

#[test]
fn the_loss_of_next_tokens_is_that_of_the_reference() {
    for case in golden() {
        let (batch, length) = case["lm.input_ids"].dims2().unwrap();
        let flat = |name: &str| case[name].flatten_all().unwrap();
        let ids: Vec<i64> = flat("lm.input_ids").to_vec1().unwrap();
        let (seen, inner) =
            (flat("lm.attention_mask").to_vec1::<u8>().unwrap(), flat("lm.eos_mask").to_vec1::<u8>().unwrap());
        // A token counts if it and its successor are seen and it is no end of a text: the mask is 0 there.
        let next = |i: usize| (i % length + 1 < length).then_some(i + 1);
        let counts = |i: usize| u8::from(next(i).is_some_and(|n| seen[i] != 0 && seen[n] != 0 && inner[i] != 0));
        let targets: Vec<u32> = (0..batch * length).map(|i| next(i).map_or(u32::MAX, |n| ids[n] as u32)).collect();
        let weights = mean_over(&(0..batch * length).map(counts).collect::<Vec<_>>());
        let targets = Tensor::new(targets, &Device::Cpu).unwrap();
        let (nll, _) = cross_entropy(rows(&case["student_logits"]), &targets, &weights).unwrap();
        close(&weighted(&nll, &weights), &case["lm_loss"], 1e-4, "loss");
    }
}
