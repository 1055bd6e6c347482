//! Kernels of Efficient Attention: softmax over the channels of a query, and in each channel over the keys so far.
//!
//! A channel's sums are kept in units of 2^(24 e) with a whole number e that only rises, so that changing the unit is exact:
//!
//! ```text
//! e_t = max(e_{t−1}, ⌊k_t / u⌉)      u = 24 ln 2      a_t = 2^(24 (e_{t−1} − e_t))
//! w_t = exp(k_t − u e_t)             z_t = a_t z_{t−1} + w_t
//! ```
//!
//! A channel with z = 0 has seen nothing; its e means nothing then.

use super::nn::{load, store};
use super::sweep::{TokenRows, padded};
use super::{Simd, dispatch, math};

/// Powers of two in a unit.
const POWER: f32 = 24.0;
/// 24 ln 2 in two parts; the first has 11 bits, so that its product with small whole numbers is exact.
const UNIT_HIGH: f32 = 16.640_625;
const UNIT_LOW: f32 = -5.092_666_6e-3;
/// 1 / (24 ln 2).
const PER_UNIT: f32 = 0.060_112_29;
/// Sums below this are none: what has seen a key has at least 2⁻¹².
const NOTHING: f32 = 7.888_609e-31;
/// An exponent below all that keys have.
const LOWEST: f32 = 1e30;

dispatch! {
    /// Softmax over the first `width` numbers of each row; padding becomes zero.
    pub(crate) fn softmax_rows(from: TokenRows<'_>, width: usize, to: &mut [f32]) = softmax_rows_kernel
}

#[inline(always)]
fn softmax_rows_kernel<S: Simd>(s: S, from: TokenRows<'_>, width: usize, to: &mut [f32]) {
    let stride = padded(width);
    let lowest = s.splat(f32::NEG_INFINITY);
    for (t, to) in to.chunks_exact_mut(stride).enumerate() {
        let from = &from.data[t * from.stride..][..width];
        let present = |at: usize| ((1u64 << (width - at).min(S::LANES)) - 1) as u32;
        let mut most = lowest;
        for at in (0..width).step_by(S::LANES) {
            most = s.max(s.select(present(at), load(s, from, at), lowest), most);
        }
        let shift = s.splat(s.reduce_max(most));
        let mut sum = s.splat(0.0);
        for at in (0..width).step_by(S::LANES) {
            let e = math::exp(s, s.sub(load(s, from, at), shift));
            let e = s.select(present(at), e, s.splat(0.0));
            sum = s.add(sum, e);
            store(s, to, at, e);
        }
        let factor = s.splat(1.0 / s.sum(sum));
        for at in (0..width).step_by(S::LANES) {
            store(s, to, at, s.mul(load(s, to, at), factor));
        }
        to[width..].fill(0.0);
    }
}

/// Keys of some tokens and what becomes of them, in padded rows.
#[derive(Debug)]
pub(crate) struct Weigh<'a> {
    /// In: keys, of `width` numbers.
    pub(crate) k: TokenRows<'a>,
    pub(crate) width: usize,
    /// In and out: z, then e, each a padded row.
    pub(crate) sums: &'a mut [f32],
    /// Out: w.
    pub(crate) weights: &'a mut [f32],
    /// Out: a.
    pub(crate) keep: &'a mut [f32],
    /// In: query features p; out: p / z.
    pub(crate) queries: &'a mut [f32],
    /// Out, if there is room: 1 / z.
    pub(crate) inverses: &'a mut [f32],
}

dispatch! {
    /// Takes each channel's sums through the tokens; tells whether a unit has changed.
    pub(crate) fn weigh(args: Weigh<'_>) -> bool = weigh_kernel
}

#[inline(always)]
fn round<S: Simd>(s: S, x: S::F) -> S::F {
    const ROUND: f32 = 1.5 * (1u32 << 23) as f32;
    s.sub(s.add(x, s.splat(ROUND)), s.splat(ROUND))
}

/// 1 where a sum has seen something, 0 elsewhere; NaN stays.
#[inline(always)]
fn seen<S: Simd>(s: S, z: S::F) -> S::F {
    s.min(s.splat(1.0), s.mul(z, s.splat(1.0 / NOTHING)))
}

#[inline(always)]
fn weigh_kernel<S: Simd>(s: S, args: Weigh<'_>) -> bool {
    let Weigh { k, width, sums, weights, keep, queries, inverses } = args;
    let stride = padded(width);
    let tokens = weights.len() / stride;
    assert!(sums.len() == 2 * stride && keep.len() == weights.len());
    assert!(queries.len() == weights.len());
    assert!(inverses.is_empty() || inverses.len() == weights.len());
    let (z_row, e_row) = sums.split_at_mut(stride);
    let (one, mut changed) = (s.splat(1.0), s.splat(0.0));
    for at in (0..stride).step_by(S::LANES) {
        let (mut z, mut e) = (load(s, z_row, at), round(s, load(s, e_row, at)));
        let present = ((1u64 << width.saturating_sub(at).min(S::LANES)) - 1) as u32;
        for t in 0..tokens {
            let key = load(s, &k.data[t * k.stride..][..width], at.min(width));
            let before = seen(s, z);
            let held = s.fma(s.sub(before, one), s.splat(LOWEST), e);
            let next = s.max(held, round(s, s.mul(key, s.splat(PER_UNIT))));
            let fall = s.mul(s.mul(s.sub(e, next), before), s.splat(POWER));
            let a = s.scale_exponent(one, s.add(fall, s.splat(1.5 * (1u32 << 23) as f32)), fall);
            let rest = s.fma(next, s.splat(-UNIT_HIGH), key);
            let w = math::exp(s, s.fma(next, s.splat(-UNIT_LOW), rest));
            let w = s.select(present, w, s.splat(0.0));
            z = s.fma(z, a, w);
            e = s.mul(next, seen(s, z));
            changed = s.max(changed, s.sub(one, a));
            let (row, inverse) = (t * stride + at, s.div(one, s.max(s.splat(NOTHING), z)));
            store(s, weights, row, w);
            store(s, keep, row, a);
            store(s, queries, row, s.mul(load(s, queries, row), inverse));
            if !inverses.is_empty() {
                store(s, inverses, row, inverse);
            }
        }
        store(s, z_row, at, z);
        store(s, e_row, at, e);
    }
    s.reduce_max(changed) > 0.0
}

/// What gradients of queries are made from, in padded rows.
#[derive(Debug)]
pub(crate) struct QueryGradients<'a> {
    /// Numbers of a row.
    pub(crate) stride: usize,
    /// p.
    pub(crate) softmax: &'a [f32],
    /// p / z.
    pub(crate) queries: &'a [f32],
    /// In: 1 / z; out: the gradient of each z from its own query.
    pub(crate) inverses: &'a mut [f32],
    /// In: the gradient of p / z; out: that of the query.
    pub(crate) d_q: &'a mut [f32],
}

dispatch! {
    /// dp = d(p/z) / z, dq = p ∘ (dp − ⟨p, dp⟩), dz = −(p/z) ∘ dp.
    pub(crate) fn query_gradients(args: QueryGradients<'_>) = query_gradients_kernel
}

#[inline(always)]
fn query_gradients_kernel<S: Simd>(s: S, args: QueryGradients<'_>) {
    let QueryGradients { stride, softmax, queries, inverses, d_q } = args;
    let len = d_q.len();
    assert!(stride.is_multiple_of(16) && len.is_multiple_of(stride));
    assert!([softmax.len(), queries.len(), inverses.len()] == [len; 3]);
    for first in (0..len).step_by(stride) {
        let row = (first..first + stride).step_by(S::LANES);
        let mut sum = s.splat(0.0);
        for at in row.clone() {
            let d_p = s.mul(load(s, d_q, at), load(s, inverses, at));
            store(s, d_q, at, d_p);
            sum = s.fma(load(s, softmax, at), d_p, sum);
        }
        let sum = s.splat(s.sum(sum));
        for at in row {
            let d_p = load(s, d_q, at);
            let d_z = s.mul(load(s, queries, at), d_p);
            store(s, inverses, at, s.sub(s.splat(0.0), d_z));
            store(s, d_q, at, s.mul(load(s, softmax, at), s.sub(d_p, sum)));
        }
    }
}

/// What gradients of keys are made from, in padded rows.
#[derive(Debug)]
pub(crate) struct KeyGradients<'a> {
    /// w.
    pub(crate) weights: &'a [f32],
    /// a.
    pub(crate) keep: &'a [f32],
    /// The gradient of each z from its own query.
    pub(crate) d_own: &'a [f32],
    /// In and out: the gradient of z, one padded row.
    pub(crate) d_z: &'a mut [f32],
    /// In: the gradient of w but for z; out: that of the key.
    pub(crate) d_k: &'a mut [f32],
}

dispatch! {
    /// From the last token to the first: dz ← dz + own, dk = w (dw + dz), dz ← a dz.
    pub(crate) fn key_gradients(args: KeyGradients<'_>) = key_gradients_kernel
}

#[inline(always)]
fn key_gradients_kernel<S: Simd>(s: S, args: KeyGradients<'_>) {
    let KeyGradients { weights, keep, d_own, d_z, d_k } = args;
    let (len, stride) = (d_k.len(), d_z.len());
    assert!(stride.is_multiple_of(16) && len.is_multiple_of(stride));
    assert!([weights.len(), keep.len(), d_own.len()] == [len; 3]);
    for at in (0..stride).step_by(S::LANES) {
        let mut sum = load(s, d_z, at);
        for row in (at..len).step_by(stride).rev() {
            sum = s.add(sum, load(s, d_own, row));
            let d_w = s.add(load(s, d_k, row), sum);
            store(s, d_k, row, s.mul(load(s, weights, row), d_w));
            sum = s.mul(sum, load(s, keep, row));
        }
        store(s, d_z, at, sum);
    }
}
