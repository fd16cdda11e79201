//! The types keys and values are stored in.
//!
//! 8-bit types store each head's vector of an entry with a factor of its own, so that its largest component is near the
//! largest number of the type.

use half::{bf16, f16, slice::HalfFloatSliceExt};
use std::fmt::Debug;

/// A type keys and values are stored in.
pub(super) trait Element: Copy + Default + Debug + Send + Sync + 'static {
    /// Whether a vector has a factor.
    const SCALED: bool = false;

    /// Stores a vector; returns its factor.
    fn narrow(from: &[f32], to: &mut [Self]) -> f32;
    /// Vectors of `dim` numbers, each with its factor if there are any, as f32: the slice itself where it is f32, else
    /// converted into `buffer`.
    fn widen<'a>(source: &'a [Self], factors: &[f32], dim: usize, buffer: &'a mut Vec<f32>) -> &'a [f32];
}

impl Element for f32 {
    fn narrow(from: &[f32], to: &mut [Self]) -> f32 {
        to.copy_from_slice(from);
        1.0
    }
    fn widen<'a>(source: &'a [Self], _: &[f32], _: usize, _: &'a mut Vec<f32>) -> &'a [f32] {
        source
    }
}

macro_rules! half_element {
    ($($half:ty),+) => {$(
        impl Element for $half {
            fn narrow(from: &[f32], to: &mut [Self]) -> f32 {
                to.convert_from_f32_slice(from);
                1.0
            }
            fn widen<'a>(source: &'a [Self], _: &[f32], _: usize, buffer: &'a mut Vec<f32>) -> &'a [f32] {
                buffer.resize(source.len(), 0.0);
                source.convert_to_f32_slice(buffer);
                buffer
            }
        }
    )+};
}
half_element!(f16, bf16);

/// Widens with each vector's factor.
fn widen_scaled<'a, E: Copy>(
    source: &[E],
    factors: &[f32],
    dim: usize,
    buffer: &'a mut Vec<f32>,
    number: impl Fn(E) -> f32,
) -> &'a [f32] {
    buffer.clear();
    for (vector, factor) in source.chunks(dim).zip(factors) {
        buffer.extend(vector.iter().map(|&x| number(x) * factor));
    }
    buffer
}

fn largest(vector: &[f32]) -> f32 {
    vector.iter().fold(0.0, |most, x| x.abs().max(most))
}

/// The exponent of the power of two that `largest` is divided by, so that it comes to `m * 2^e` at most and to more than half
/// of that; `mantissa`: the bits of m. A power of two, so that the division rounds nothing and a GPU gets the same bits.
fn exponent(largest: f32, mantissa: u32, e: i32) -> i32 {
    if largest == 0.0 {
        return 0;
    }
    let bits = largest.to_bits();
    let above = (bits & 0x7f_ffff) > mantissa;
    ((bits >> 23) as i32 - 127 - e + above as i32).clamp(-40, 60)
}

/// 2^exponent
fn power(exponent: i32) -> f32 {
    f32::from_bits(((exponent + 127) as u32) << 23)
}

/// An 8-bit float of 4 bits of exponent and 3 of mantissa, up to 448 (OCP's E4M3).
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Fp8(u8);

impl Fp8 {
    /// Sign, exponent and mantissa moved to where f32 has them, and the bias made up for.
    #[inline(always)]
    fn wide(self) -> f32 {
        let (sign, rest) = (self.0 as u32 & 0x80, self.0 as u32 & 0x7f);
        f32::from_bits(sign << 24 | rest << 20) * power(120)
    }
}

impl Element for Fp8 {
    const SCALED: bool = true;

    fn narrow(from: &[f32], to: &mut [Self]) -> f32 {
        let exponent = exponent(largest(from), 0x60_0000, 8); // 448 = 1.75 * 2^8
        let divide = power(-exponent);
        from.iter().zip(to).for_each(|(x, to)| *to = Self(float8::F8E4M3::from_f32(x * divide).to_bits()));
        power(exponent)
    }
    fn widen<'a>(source: &'a [Self], factors: &[f32], dim: usize, buffer: &'a mut Vec<f32>) -> &'a [f32] {
        widen_scaled(source, factors, dim, buffer, Self::wide)
    }
}

/// A whole number from -127 to 127.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Int8(i8);

impl Element for Int8 {
    const SCALED: bool = true;

    fn narrow(from: &[f32], to: &mut [Self]) -> f32 {
        let exponent = exponent(largest(from), 0x7e_0000, 6); // 127 = 1.984375 * 2^6
        let divide = power(-exponent);
        let code = |x: f32| (x * divide).round_ties_even().clamp(-127.0, 127.0) as i8;
        from.iter().zip(to).for_each(|(x, to)| *to = Self(code(*x)));
        power(exponent)
    }
    fn widen<'a>(source: &'a [Self], factors: &[f32], dim: usize, buffer: &'a mut Vec<f32>) -> &'a [f32] {
        widen_scaled(source, factors, dim, buffer, |x| x.0 as f32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stored<E: Element>(vector: &[f32]) -> (Vec<f32>, f32) {
        let mut to = vec![E::default(); vector.len()];
        let factor = E::narrow(vector, &mut to);
        (E::widen(&to, &[factor], vector.len(), &mut vec![]).to_vec(), factor)
    }

    /// Every number of E4M3 that is not negative, from its definition.
    fn e4m3() -> Vec<f32> {
        let normal = (1..16).flat_map(|e| (0..8).map(move |m| (1.0 + m as f32 / 8.0) * 2f32.powi(e - 7)));
        let all = (0..8).map(|m| m as f32 / 8.0 * 2f32.powi(-6)).chain(normal);
        all.take(127).collect() // the last code is no number
    }

    #[test]
    fn fp8_codes_are_those_of_the_standard() {
        for (code, want) in e4m3().into_iter().enumerate() {
            assert_eq!(Fp8(code as u8).wide(), want);
            assert_eq!(Fp8(code as u8 | 0x80).wide(), -want);
        }
        assert_eq!(e4m3().last(), Some(&448.0));
    }

    #[test]
    fn fp8_stores_the_nearest_number() {
        let all = e4m3();
        for i in 0..20_000 {
            let x = 448.0 * (-(i as f32) * 1e-3).exp(); // down to 0
            let got = stored::<Fp8>(&[x, 448.0]).0[0];
            let best = all.iter().map(|c| (c - x).abs()).fold(f32::INFINITY, f32::min);
            assert!((got - x).abs() <= best, "{x} became {got}");
        }
    }

    #[test]
    fn factors_bring_the_largest_component_near_the_end_of_the_range() {
        for i in -200..300 {
            let x = 1.5f32.powf(i as f32 / 4.0);
            let (got, factor) = stored::<Fp8>(&[-x, x / 3.0, 0.0]);
            assert!((224.0..=448.0).contains(&(x / factor)), "{x} has factor {factor}");
            assert!((got[0] + x).abs() <= x / 16.0 && (got[1] - x / 3.0).abs() <= x / 48.0 && got[2] == 0.0);
            let (got, factor) = stored::<Int8>(&[-x, x / 3.0, 0.0]);
            assert!((63.0..=127.0).contains(&(x / factor)), "{x} has factor {factor}");
            assert!((got[0] + x).abs() <= factor / 2.0 && (got[1] - x / 3.0).abs() <= factor / 2.0 && got[2] == 0.0);
        }
        assert_eq!(stored::<Fp8>(&[0.0, 0.0]), (vec![0.0, 0.0], 1.0));
        assert_eq!(stored::<Int8>(&[0.0, 0.0]), (vec![0.0, 0.0], 1.0));
    }

    #[test]
    fn what_is_no_number_or_too_large_panics_nowhere() {
        for x in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN, f32::MAX, f32::MIN_POSITIVE, 1e-45] {
            let (fp8, int8) = (stored::<Fp8>(&[x, 1.0]).0, stored::<Int8>(&[x, 1.0]).0);
            assert_eq!((fp8.len(), int8.len()), (2, 2));
        }
    }
}
