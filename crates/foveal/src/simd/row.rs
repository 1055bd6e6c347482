//! Kernels over single rows: widen, finish, weigh, look for non-finite numbers.

use super::{Simd, dispatch};
use crate::element::Element;

dispatch! {
    /// Widens a row to `f32`; both slices have the same length.
    pub(crate) fn widen<E: Element>(from: &[E], to: &mut [f32]) = widen_kernel
}

#[inline(always)]
fn widen_kernel<S: Simd, E: Element>(s: S, from: &[E], to: &mut [f32]) {
    assert_eq!(from.len(), to.len());
    let mut i = 0;
    while i < from.len() {
        let n = (from.len() - i).min(S::LANES);
        // SAFETY: n elements are left in both.
        unsafe {
            let (p, q) = (from.as_ptr().add(i), to.as_mut_ptr().add(i));
            if n == S::LANES {
                s.store(q, E::load(s, p));
            } else {
                s.store_part(q, E::load_part(s, p, n), n);
            }
        }
        i += n;
    }
}

dispatch! {
    /// `to = from * factor`, rounded to the storage type; `from` may be longer.
    pub(crate) fn scale_into<E: Element>(from: &[f32], factor: f32, to: &mut [E]) = scale_into_kernel
}

#[inline(always)]
fn scale_into_kernel<S: Simd, E: Element>(s: S, from: &[f32], factor: f32, to: &mut [E]) {
    let from = &from[..to.len()];
    let factor = s.splat(factor);
    let mut i = 0;
    while i < from.len() {
        let n = (from.len() - i).min(S::LANES);
        // SAFETY: n elements are left in both.
        unsafe {
            let x = s.mul(s.load_part(from.as_ptr().add(i), n), factor);
            E::store_part(s, to.as_mut_ptr().add(i), x, n);
        }
        i += n;
    }
}

dispatch! {
    /// `to = to * keep + from * add`.
    pub(crate) fn blend<E: Element>(to: &mut [E], keep: f32, from: &[E], add: f32) = blend_kernel
}

#[inline(always)]
fn blend_kernel<S: Simd, E: Element>(s: S, to: &mut [E], keep: f32, from: &[E], add: f32) {
    assert_eq!(from.len(), to.len());
    let (keep, add) = (s.splat(keep), s.splat(add));
    let mut i = 0;
    while i < to.len() {
        let n = (to.len() - i).min(S::LANES);
        // SAFETY: n elements are left in both.
        unsafe {
            let (p, q) = (to.as_mut_ptr().add(i), from.as_ptr().add(i));
            let (x, y) = match n == S::LANES {
                true => (E::load(s, p), E::load(s, q)),
                false => (E::load_part(s, p, n), E::load_part(s, q, n)),
            };
            E::store_part(s, p, s.fma(y, add, s.mul(x, keep)), n);
        }
        i += n;
    }
}

dispatch! {
    /// `to = to * keep + from * add`, rounded to the storage type; `from` may be longer.
    pub(crate) fn mix<E: Element>(to: &mut [E], keep: f32, from: &[f32], add: f32) = mix_kernel
}

#[inline(always)]
fn mix_kernel<S: Simd, E: Element>(s: S, to: &mut [E], keep: f32, from: &[f32], add: f32) {
    let from = &from[..to.len()];
    let (keep, add) = (s.splat(keep), s.splat(add));
    let mut i = 0;
    while i < to.len() {
        let n = (to.len() - i).min(S::LANES);
        // SAFETY: n elements are left in both.
        unsafe {
            let (p, q) = (to.as_mut_ptr().add(i), from.as_ptr().add(i));
            let (x, y) = match n == S::LANES {
                true => (E::load(s, p), s.load(q)),
                false => (E::load_part(s, p, n), s.load_part(q, n)),
            };
            E::store_part(s, p, s.fma(y, add, s.mul(x, keep)), n);
        }
        i += n;
    }
}

dispatch! {
    /// Asks for a row to be brought near. Reads nothing.
    pub(crate) fn prefetch<E: Element>(row: &[E]) = prefetch_kernel
}

#[inline(always)]
fn prefetch_kernel<S: Simd, E: Element>(s: S, row: &[E]) {
    for line in row.chunks(64 / size_of::<E>()) {
        s.prefetch(line.as_ptr().cast());
    }
}

dispatch! {
    /// Whether no number is NaN or infinite.
    pub(crate) fn all_finite<E: Element>(row: &[E]) -> bool = all_finite_kernel
}

#[inline(always)]
fn all_finite_kernel<S: Simd, E: Element>(s: S, row: &[E]) -> bool {
    // x * 0 is 0 for finite x and NaN otherwise, and NaN survives the sum.
    let mut sum = s.splat(0.0);
    let mut i = 0;
    while i < row.len() {
        let n = (row.len() - i).min(S::LANES);
        // SAFETY: n numbers are left.
        let x = unsafe {
            let p = row.as_ptr().add(i);
            if n == S::LANES { E::load(s, p) } else { E::load_part(s, p, n) }
        };
        sum = s.fma(x, s.splat(0.0), sum);
        i += n;
    }
    s.sum(sum) == 0.0
}

dispatch! {
    /// Σ a · b; both slices have the same length.
    pub(crate) fn dot<E: Element>(a: &[E], b: &[E]) -> f32 = dot_kernel
}

#[inline(always)]
fn dot_kernel<S: Simd, E: Element>(s: S, a: &[E], b: &[E]) -> f32 {
    assert_eq!(a.len(), b.len());
    let mut sum = s.splat(0.0);
    let mut i = 0;
    while i < a.len() {
        let n = (a.len() - i).min(S::LANES);
        // SAFETY: n elements are left in both.
        unsafe {
            let (p, q) = (a.as_ptr().add(i), b.as_ptr().add(i));
            let (x, y) = match n == S::LANES {
                true => (E::load(s, p), E::load(s, q)),
                false => (E::load_part(s, p, n), E::load_part(s, q, n)),
            };
            sum = s.fma(x, y, sum);
        }
        i += n;
    }
    s.sum(sum)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::Level;
    use half::{bf16, f16};

    /// Every exponent and sign, with mantissas around ties, in every lane.
    fn numbers() -> Vec<f32> {
        let mut numbers = vec![];
        for high in 0..=0x1ff_u32 {
            for mantissa in [0, 1, 0xfff, 0x1000, 0x1001, 0x3000, 0x7fff, 0x8000, 0x8001, 0x1_8000]
            {
                for top in [0, 0x7e_0000, 0x40_0000] {
                    numbers.push(f32::from_bits(high << 23 | mantissa | top));
                }
            }
        }
        numbers.push(f32::from_bits(0x7fff_ffff));
        numbers
    }

    fn check<E: Element>() {
        for level in Level::available() {
            let from = numbers();
            let mut to = vec![E::default(); from.len()];
            scale_into(level, &from, 1.0, &mut to);
            for (&x, &got) in from.iter().zip(&to) {
                let expected = E::from_f32(x).to_f32();
                let same = got.to_f32().to_bits() == expected.to_bits();
                assert!(same || got.to_f32().is_nan() && x.is_nan(), "{level} {x:e} {got:?}");
            }
        }
    }

    #[test]
    fn vectors_round_as_numbers_do() {
        assert!(!numbers().len().is_multiple_of(16));
        check::<f16>();
        check::<bf16>();
        check::<f32>();
    }
}
