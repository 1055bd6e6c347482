//! Kernels of random features: from products with random directions to features, and back.
//!
//! With products u_r = ω_r · x, both directions and x scaled by D^(−1/4),
//!
//! ```text
//! softmax   φ_r = c (exp(u_r − n ‖x‖² − [largest] max_r u_r − shift) + ε)        ReLU   φ_r = max(u_r, 0) + ε
//! du_r = dφ_r (φ_r − c ε)                                                       du_r = dφ_r [u_r > 0]
//! ```

use super::nn::{load, store};
use super::sweep::{TokenRows, padded};
use super::{Simd, dispatch, math};

/// What products become.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct ProductMap {
    /// Exponentials, or what lies above 0.
    pub(crate) exponential: bool,
    /// What ‖x‖² is multiplied by.
    pub(crate) norm: f32,
    /// Whether the largest product of a row is subtracted.
    pub(crate) largest: bool,
    /// What is subtracted besides.
    pub(crate) shift: f32,
    /// ε.
    pub(crate) epsilon: f32,
    /// c.
    pub(crate) factor: f32,
}

/// Lanes from `at` on that hold one of `count` numbers.
#[inline(always)]
fn present<S: Simd>(count: usize, at: usize) -> u32 {
    ((1u64 << count.saturating_sub(at).min(S::LANES)) - 1) as u32
}

dispatch! {
    /// Products become features, `count` in each padded row; padding becomes zero. `x` has `width` numbers a row.
    pub(crate) fn map_products(map: ProductMap, count: usize, x: TokenRows<'_>, width: usize, rows: &mut [f32]) = map_products_kernel
}

#[inline(always)]
fn map_products_kernel<S: Simd>(
    s: S,
    map: ProductMap,
    count: usize,
    x: TokenRows<'_>,
    width: usize,
    rows: &mut [f32],
) {
    let (epsilon, factor) = (s.splat(map.epsilon), s.splat(map.factor));
    let lowest = s.splat(f32::NEG_INFINITY);
    let stride = padded(count);
    for (t, row) in rows.chunks_exact_mut(stride).enumerate() {
        let mut shift = map.shift;
        if map.norm != 0.0 {
            let x = &x.data[t * x.stride..][..width];
            let mut sum = s.splat(0.0);
            for at in (0..width).step_by(S::LANES) {
                let x = load(s, x, at);
                sum = s.fma(x, x, sum);
            }
            shift += map.norm * s.sum(sum);
        }
        if map.largest {
            let mut most = lowest;
            for at in (0..stride).step_by(S::LANES) {
                most = s.max(s.select(present::<S>(count, at), load(s, row, at), lowest), most);
            }
            shift += s.reduce_max(most);
        }
        let shift = s.splat(shift);
        for at in (0..stride).step_by(S::LANES) {
            let u = load(s, row, at);
            let y = match map.exponential {
                true => math::exp(s, s.sub(u, shift)),
                false => s.max(s.splat(0.0), u),
            };
            let y = s.mul(s.add(y, epsilon), factor);
            store(s, row, at, s.select(present::<S>(count, at), y, s.splat(0.0)));
        }
    }
}

dispatch! {
    /// Gradients of features become those of products; `sums` gets the sum of each row.
    pub(crate) fn derive_products(map: ProductMap, features: &[f32], gradient: &mut [f32], sums: &mut [f32]) = derive_products_kernel
}

#[inline(always)]
fn derive_products_kernel<S: Simd>(
    s: S,
    map: ProductMap,
    features: &[f32],
    gradient: &mut [f32],
    sums: &mut [f32],
) {
    assert!(features.len() == gradient.len());
    let stride = gradient.len() / sums.len().max(1);
    assert!(stride.is_multiple_of(16));
    let below = s.splat(map.epsilon * map.factor);
    let (one, huge) = (s.splat(1.0), s.splat(f32::MAX));
    for (t, total) in sums.iter_mut().enumerate() {
        let mut sum = s.splat(0.0);
        for at in (t * stride..(t + 1) * stride).step_by(S::LANES) {
            let above = s.sub(load(s, features, at), below);
            let slope = match map.exponential {
                true => above,
                // 1 above 0, however small it is; absent keys have features of 0.
                false => s.min(one, s.mul(s.mul(s.max(s.splat(0.0), above), huge), huge)),
            };
            let d_u = s.mul(load(s, gradient, at), slope);
            sum = s.add(sum, d_u);
            store(s, gradient, at, d_u);
        }
        *total = s.sum(sum);
    }
}

dispatch! {
    /// dx ← dx − factor · sum · x for each row of `width` numbers; rows of `d_x` are padded.
    pub(crate) fn less_rows(factor: f32, sums: &[f32], x: TokenRows<'_>, width: usize, d_x: &mut [f32]) = less_rows_kernel
}

#[inline(always)]
fn less_rows_kernel<S: Simd>(
    s: S,
    factor: f32,
    sums: &[f32],
    x: TokenRows<'_>,
    width: usize,
    d_x: &mut [f32],
) {
    for ((t, sum), d_x) in sums.iter().enumerate().zip(d_x.chunks_exact_mut(padded(width))) {
        let x = &x.data[t * x.stride..][..width];
        let by = s.splat(-factor * sum);
        for at in (0..width).step_by(S::LANES) {
            store(s, d_x, at, s.fma(by, load(s, x, at), load(s, d_x, at)));
        }
    }
}
