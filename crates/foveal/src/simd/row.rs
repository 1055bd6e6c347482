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
    pub(crate) fn blend(to: &mut [f32], keep: f32, from: &[f32], add: f32) = blend_kernel
}

#[inline(always)]
fn blend_kernel<S: Simd>(s: S, to: &mut [f32], keep: f32, from: &[f32], add: f32) {
    assert_eq!(from.len(), to.len());
    let (keep, add) = (s.splat(keep), s.splat(add));
    let mut i = 0;
    while i < to.len() {
        let n = (to.len() - i).min(S::LANES);
        // SAFETY: n elements are left in both.
        unsafe {
            let (p, q) = (to.as_mut_ptr().add(i), from.as_ptr().add(i));
            if n == S::LANES {
                s.store(p, s.fma(s.load(q), add, s.mul(s.load(p), keep)));
            } else {
                let x = s.fma(s.load_part(q, n), add, s.mul(s.load_part(p, n), keep));
                s.store_part(p, x, n);
            }
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
