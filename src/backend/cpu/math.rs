//! Inner loops, written so that the compiler vectorises them.

/// `a * b + c`, fused where the target has the instruction (`mul_add` is a library call where it has not).
#[inline(always)]
fn fma(a: f32, b: f32, c: f32) -> f32 {
    if cfg!(target_feature = "fma") { a.mul_add(b, c) } else { a * b + c }
}

const LANES: usize = 16;

pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0f32; LANES];
    let (a_chunks, b_chunks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let tail: f32 = a_chunks.remainder().iter().zip(b_chunks.remainder()).map(|(x, y)| x * y).sum();
    for (x, y) in a_chunks.zip(b_chunks) {
        for i in 0..LANES {
            lanes[i] = fma(x[i], y[i], lanes[i]);
        }
    }
    reduce(lanes, |a, b| a + b) + tail
}

pub(super) fn sum(x: &[f32]) -> f32 {
    over_lanes(x, 0.0, |a, b| a + b)
}

/// The largest; minus infinity for none.
pub(super) fn max(x: &[f32]) -> f32 {
    over_lanes(x, f32::NEG_INFINITY, |a, b| if a > b { a } else { b })
}

/// A reduction in lanes: in order, each step would wait for the one before.
#[inline(always)]
fn over_lanes(x: &[f32], start: f32, f: impl Fn(f32, f32) -> f32 + Copy) -> f32 {
    let mut lanes = [start; LANES];
    let chunks = x.chunks_exact(LANES);
    let tail = chunks.remainder().iter().fold(start, |a, &b| f(a, b));
    for x in chunks {
        for i in 0..LANES {
            lanes[i] = f(lanes[i], x[i]);
        }
    }
    f(reduce(lanes, f), tail)
}

#[inline(always)]
fn reduce(mut lanes: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] = f(lanes[i], lanes[i + width]);
        }
        width /= 2;
    }
    lanes[0]
}

/// `c += a b` for row-major `a` `[m, k]`, `b` `[k, n]` and `c` `[m, n]`.
pub(super) fn matmul_add(a: &[f32], b: &[f32], c: &mut [f32], k: usize, n: usize) {
    const ROWS: usize = 4;
    let mut a_blocks = a.chunks_exact(ROWS * k);
    let mut c_blocks = c.chunks_exact_mut(ROWS * n);
    for (a, c) in (&mut a_blocks).zip(&mut c_blocks) {
        block::<ROWS>(a, b, c, k, n);
    }
    let (a, c) = (a_blocks.remainder(), c_blocks.into_remainder());
    match a.len() / k.max(1) {
        0 => {}
        1 => block::<1>(a, b, c, k, n),
        2 => block::<2>(a, b, c, k, n),
        _ => block::<3>(a, b, c, k, n),
    }
}

/// `M` rows of the product, `LANES` columns at a time, the sums in registers.
fn block<const M: usize>(a: &[f32], b: &[f32], c: &mut [f32], k: usize, n: usize) {
    let whole = n / LANES * LANES;
    for column in (0..whole).step_by(LANES) {
        let mut sums = [[0f32; LANES]; M];
        for (i, b) in b.chunks_exact(n).enumerate().take(k) {
            let b = &b[column..column + LANES];
            for (m, sums) in sums.iter_mut().enumerate() {
                let x = a[m * k + i];
                for lane in 0..LANES {
                    sums[lane] = fma(x, b[lane], sums[lane]);
                }
            }
        }
        for (m, sums) in sums.iter().enumerate() {
            c[m * n + column..][..LANES].iter_mut().zip(sums).for_each(|(c, s)| *c += s);
        }
    }
    for column in whole..n {
        for m in 0..M {
            c[m * n + column] += (0..k).map(|i| a[m * k + i] * b[i * n + column]).sum::<f32>();
        }
    }
}

/// e^x for x <= 0 within 2e-7 relative; 0 below -87, NaN for NaN.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    // e^x = 2^n e^r with n = round(x / ln 2) and r in [-ln 2 / 2, ln 2 / 2], ln 2 in two parts.
    let clamped = if x < -87.0 { -87.0 } else { x }; // not `max`: a NaN stays one
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to a whole number
    let shifted = fma(clamped, std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = fma(n, -0.693_359_4, clamped);
    let r = fma(n, 2.121_944_4e-4, r);
    let mut p = 1.0 / 5040.0;
    for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = fma(p, r, c);
    }
    // The low bits of the shifted number are n: moved to the exponent they are 2^n.
    let scale = f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23));
    if x < -87.0 { 0.0 } else { p * scale }
}

/// Softmax in place; an empty slice stays empty.
pub(super) fn softmax(x: &mut [f32]) {
    let top = max(x);
    x.iter_mut().for_each(|x| *x = exp(*x - top));
    let total = sum(x);
    x.iter_mut().for_each(|x| *x /= total);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_exact_to_rounding() {
        for i in 0..870_000 {
            let x = -(i as f32) * 1e-4;
            let want = (x as f64).exp();
            let error = (exp(x) as f64 - want).abs() / want;
            assert!(error < 2e-7, "exp({x}) is off by {error}");
        }
        assert_eq!((exp(0.0), exp(-87.5), exp(f32::NEG_INFINITY)), (1.0, 0.0, 0.0));
    }

    #[test]
    fn matmul_equals_its_definition() {
        for (m, k, n) in [(1, 1, 1), (4, 16, 16), (7, 64, 33), (5, 3, 50), (9, 80, 64)] {
            let number = |i: usize| ((i * 37 % 101) as f32 - 50.0) / 25.0;
            let a: Vec<f32> = (0..m * k).map(number).collect();
            let b: Vec<f32> = (0..k * n).map(|i| number(i + 5)).collect();
            let mut c = vec![1f32; m * n];
            matmul_add(&a, &b, &mut c, k, n);
            for i in 0..m {
                for j in 0..n {
                    let want: f32 = 1.0 + (0..k).map(|x| a[i * k + x] * b[x * n + j]).sum::<f32>();
                    assert!((c[i * n + j] - want).abs() < 1e-4, "{m}x{k}x{n} at {i},{j}");
                }
            }
        }
    }
}
