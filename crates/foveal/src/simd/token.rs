//! Rows of tokens around a state: gathered from tensors and mapped, weighed, summed along the sequence.
//!
//! Rows are `f32`, padded with zeros to [`padded`] numbers each, one after the other.

use super::sweep::padded;
use super::{Simd, dispatch, math};
use crate::element::Element;
use crate::linear::FeatureMap;
use crate::tensor::{Patch, Rows};

dispatch! {
    /// Widens rows and maps each number; padding becomes zero.
    pub(crate) fn gather<E: Element>(from: Rows<'_, E>, map: FeatureMap, to: &mut [f32]) = gather_kernel
}

#[inline(always)]
fn gather_kernel<S: Simd, E: Element>(s: S, from: Rows<'_, E>, map: FeatureMap, to: &mut [f32]) {
    match map {
        FeatureMap::Identity => gather_mapped::<S, E, IDENTITY>(s, from, to),
        FeatureMap::EluPlusOne => gather_mapped::<S, E, ELU_PLUS_ONE>(s, from, to),
        FeatureMap::Relu => gather_mapped::<S, E, RELU>(s, from, to),
        FeatureMap::Exp => gather_mapped::<S, E, EXP>(s, from, to),
    }
}

// A map as a constant: a closure need not be inlined where the instructions are known.
const IDENTITY: u8 = 0;
const ELU_PLUS_ONE: u8 = 1;
const RELU: u8 = 2;
const EXP: u8 = 3;

#[inline(always)]
fn apply<S: Simd, const MAP: u8>(s: S, x: S::F) -> S::F {
    let zero = s.splat(0.0);
    match MAP {
        // x + 1 above 0, e^x below.
        ELU_PLUS_ONE => s.add(s.max(zero, x), math::exp(s, s.min(zero, x))),
        RELU => s.max(zero, x),
        EXP => math::exp(s, x),
        _ => x,
    }
}

/// φ′(x) of y = φ(x).
#[inline(always)]
fn slope<S: Simd, const MAP: u8>(s: S, y: S::F) -> S::F {
    let (one, huge) = (s.splat(1.0), s.splat(f32::MAX));
    match MAP {
        ELU_PLUS_ONE => s.min(one, y),
        // 1 above 0, however small y is.
        RELU => s.min(one, s.mul(s.mul(y, huge), huge)),
        EXP => y,
        _ => one,
    }
}

#[inline(always)]
fn gather_mapped<S: Simd, E: Element, const MAP: u8>(s: S, from: Rows<'_, E>, to: &mut [f32]) {
    let (width, stride) = (from.width(), padded(from.width()));
    let whole = width / S::LANES * S::LANES;
    for (i, to) in to[..from.count() * stride].chunks_exact_mut(stride).enumerate() {
        let from = from.row(i);
        // SAFETY: whole vectors of the row, then its `width - whole` last numbers; `to` has room for whole vectors.
        unsafe {
            for at in (0..whole).step_by(S::LANES) {
                let x = apply::<S, MAP>(s, E::load(s, from.as_ptr().add(at)));
                s.store(to.as_mut_ptr().add(at), x);
            }
            if whole < width {
                let n = width - whole;
                let x = apply::<S, MAP>(s, E::load_part(s, from.as_ptr().add(whole), n));
                s.store(to.as_mut_ptr().add(whole), s.select((1 << n) - 1, x, s.splat(0.0)));
            }
        }
        to[width..].fill(0.0);
    }
}

dispatch! {
    /// Multiplies gradients with respect to φ(x) by φ′(x), which is a function of φ(x).
    pub(crate) fn derive(map: FeatureMap, mapped: &[f32], gradient: &mut [f32]) = derive_kernel
}

#[inline(always)]
fn derive_kernel<S: Simd>(s: S, map: FeatureMap, mapped: &[f32], gradient: &mut [f32]) {
    match map {
        FeatureMap::Identity => {}
        FeatureMap::EluPlusOne => derive_mapped::<S, ELU_PLUS_ONE>(s, mapped, gradient),
        FeatureMap::Relu => derive_mapped::<S, RELU>(s, mapped, gradient),
        FeatureMap::Exp => derive_mapped::<S, EXP>(s, mapped, gradient),
    }
}

#[inline(always)]
fn derive_mapped<S: Simd, const MAP: u8>(s: S, mapped: &[f32], gradient: &mut [f32]) {
    assert!(mapped.len() == gradient.len() && mapped.len().is_multiple_of(16));
    for at in (0..mapped.len()).step_by(S::LANES) {
        // SAFETY: both are whole vectors of every level.
        unsafe {
            let p = gradient.as_mut_ptr().add(at);
            s.store(p, s.mul(s.load(p), slope::<S, MAP>(s, s.load(mapped.as_ptr().add(at)))));
        }
    }
}

dispatch! {
    /// `x *= factor`.
    pub(crate) fn scale(factor: f32, x: &mut [f32]) = scale_kernel
}

#[inline(always)]
fn scale_kernel<S: Simd>(s: S, factor: f32, x: &mut [f32]) {
    let factor = s.splat(factor);
    for at in (0..x.len()).step_by(S::LANES) {
        let n = (x.len() - at).min(S::LANES);
        // SAFETY: `n` numbers are left.
        unsafe {
            let p = x.as_mut_ptr().add(at);
            s.store_part(p, s.mul(s.load_part(p, n), factor), n);
        }
    }
}

dispatch! {
    /// Divides each row by its number.
    pub(crate) fn divide(by: &[f32], rows: &mut [f32]) = divide_kernel
}

#[inline(always)]
fn divide_kernel<S: Simd>(s: S, by: &[f32], rows: &mut [f32]) {
    let stride = rows.len() / by.len().max(1);
    for (row, by) in rows.chunks_exact_mut(stride.max(1)).zip(by) {
        let factor = s.splat(1.0 / by);
        for at in (0..stride).step_by(S::LANES) {
            let n = (stride - at).min(S::LANES);
            // SAFETY: `n` numbers of the row are left.
            unsafe {
                let p = row.as_mut_ptr().add(at);
                s.store_part(p, s.mul(s.load_part(p, n), factor), n);
            }
        }
    }
}

/// One row for each token, padded.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Features<'a> {
    /// Query features.
    pub(crate) q: &'a [f32],
    /// Key features.
    pub(crate) k: &'a [f32],
    /// Numbers of a row.
    pub(crate) stride: usize,
}

dispatch! {
    /// z ← z + k_t and den_t = q_t · z + ε, token by token. `z` holds a padded row.
    pub(crate) fn denominators(rows: Features<'_>, epsilon: f32, z: &mut [f32], den: &mut [f32]) = denominators_kernel
}

#[inline(always)]
fn denominators_kernel<S: Simd>(
    s: S,
    rows: Features<'_>,
    epsilon: f32,
    z: &mut [f32],
    den: &mut [f32],
) {
    let Features { q, k, stride } = rows;
    assert!(z.len() == stride && stride.is_multiple_of(16));
    assert!(q.len() >= den.len() * stride && k.len() >= den.len() * stride);
    for (t, den) in den.iter_mut().enumerate() {
        let mut sum = s.splat(0.0);
        for at in (0..stride).step_by(S::LANES) {
            // SAFETY: rows of `stride` numbers, whole vectors of them.
            unsafe {
                let z = z.as_mut_ptr().add(at);
                let next = s.add(s.load(z), s.load(k.as_ptr().add(t * stride + at)));
                s.store(z, next);
                sum = s.fma(next, s.load(q.as_ptr().add(t * stride + at)), sum);
            }
        }
        *den = s.sum(sum) + epsilon;
    }
}

/// What the normaliser's gradients go through, one number a token.
#[derive(Debug)]
pub(crate) struct Normaliser<'a> {
    /// In: denominators.
    pub(crate) den: &'a [f32],
    /// The gradients of denominators: out for queries, in for keys.
    pub(crate) h: &'a mut [f32],
}

dispatch! {
    /// h_t = −(q_t · dq_t) / den_t and dq_t ← dq_t + h_t z_t, where z sums up keys as in [`denominators`].
    pub(crate) fn normalise_queries(rows: Features<'_>, n: Normaliser<'_>, z: &mut [f32], dq: &mut [f32]) = normalise_queries_kernel
}

#[inline(always)]
fn normalise_queries_kernel<S: Simd>(
    s: S,
    rows: Features<'_>,
    n: Normaliser<'_>,
    z: &mut [f32],
    dq: &mut [f32],
) {
    let Features { q, k, stride } = rows;
    let tokens = n.den.len();
    assert!(z.len() == stride && stride.is_multiple_of(16) && n.h.len() == tokens);
    assert!([q.len(), k.len(), dq.len()].iter().all(|&len| len >= tokens * stride));
    for t in 0..tokens {
        let at = |at: usize| t * stride + at;
        let mut sum = s.splat(0.0);
        for i in (0..stride).step_by(S::LANES) {
            // SAFETY: rows of `stride` numbers, whole vectors of them.
            unsafe {
                sum = s.fma(s.load(q.as_ptr().add(at(i))), s.load(dq.as_ptr().add(at(i))), sum);
            }
        }
        n.h[t] = -s.sum(sum) / n.den[t];
        let h = s.splat(n.h[t]);
        for i in (0..stride).step_by(S::LANES) {
            // SAFETY: as above.
            unsafe {
                let z = z.as_mut_ptr().add(i);
                let next = s.add(s.load(z), s.load(k.as_ptr().add(at(i))));
                s.store(z, next);
                let p = dq.as_mut_ptr().add(at(i));
                s.store(p, s.fma(h, next, s.load(p)));
            }
        }
    }
}

dispatch! {
    /// c ← c + h_t q_t and dk_t ← dk_t + c, from the last token to the first. `c` holds a padded row.
    pub(crate) fn normalise_keys(q: &[f32], h: &[f32], c: &mut [f32], dk: &mut [f32]) = normalise_keys_kernel
}

#[inline(always)]
fn normalise_keys_kernel<S: Simd>(s: S, q: &[f32], h: &[f32], c: &mut [f32], dk: &mut [f32]) {
    let stride = c.len();
    assert!(stride.is_multiple_of(16));
    assert!(q.len() >= h.len() * stride && dk.len() >= h.len() * stride);
    for (t, &h) in h.iter().enumerate().rev() {
        let h = s.splat(h);
        for i in (0..stride).step_by(S::LANES) {
            // SAFETY: rows of `stride` numbers, whole vectors of them.
            unsafe {
                let c = c.as_mut_ptr().add(i);
                let next = s.fma(h, s.load(q.as_ptr().add(t * stride + i)), s.load(c));
                s.store(c, next);
                let p = dk.as_mut_ptr().add(t * stride + i);
                s.store(p, s.add(s.load(p), next));
            }
        }
    }
}

dispatch! {
    /// Dot products of neighbouring rows, one for each number of `out`.
    pub(crate) fn dots(a: &[f32], b: &[f32], out: &mut [f32]) = dots_kernel
}

#[inline(always)]
fn dots_kernel<S: Simd>(s: S, a: &[f32], b: &[f32], out: &mut [f32]) {
    assert!(a.len() == b.len() && a.len().is_multiple_of(16 * out.len().max(1)));
    let stride = a.len() / out.len().max(1);
    for (t, out) in out.iter_mut().enumerate() {
        let mut sum = s.splat(0.0);
        for at in (t * stride..(t + 1) * stride).step_by(S::LANES) {
            // SAFETY: both are whole vectors of every level.
            unsafe {
                sum = s.fma(s.load(a.as_ptr().add(at)), s.load(b.as_ptr().add(at)), sum);
            }
        }
        *out = s.sum(sum);
    }
}

dispatch! {
    /// out = a ∘ b; all of the same length, whole padded rows.
    pub(crate) fn products(a: &[f32], b: &[f32], out: &mut [f32]) = products_kernel
}

#[inline(always)]
fn products_kernel<S: Simd>(s: S, a: &[f32], b: &[f32], out: &mut [f32]) {
    assert!(a.len() == out.len() && b.len() == out.len() && out.len().is_multiple_of(16));
    for at in (0..out.len()).step_by(S::LANES) {
        // SAFETY: all are whole vectors of every level.
        unsafe {
            let product = s.mul(s.load(a.as_ptr().add(at)), s.load(b.as_ptr().add(at)));
            s.store(out.as_mut_ptr().add(at), product);
        }
    }
}

dispatch! {
    /// out ← out − a ∘ b; all of the same length, whole padded rows.
    pub(crate) fn less_products(a: &[f32], b: &[f32], out: &mut [f32]) = less_products_kernel
}

#[inline(always)]
fn less_products_kernel<S: Simd>(s: S, a: &[f32], b: &[f32], out: &mut [f32]) {
    assert!(a.len() == out.len() && b.len() == out.len() && out.len().is_multiple_of(16));
    for at in (0..out.len()).step_by(S::LANES) {
        // SAFETY: all are whole vectors of every level.
        unsafe {
            let p = out.as_mut_ptr().add(at);
            let product = s.mul(s.load(a.as_ptr().add(at)), s.load(b.as_ptr().add(at)));
            s.store(p, s.sub(s.load(p), product));
        }
    }
}

dispatch! {
    /// out_t = Σ of rows from t on and of what is carried in `later`, which goes on; rows of `width` numbers. Sums run in
    /// f64 and are carried as two f32.
    pub(crate) fn sum_later(rows: &[f32], width: usize, later: [&mut [f32]; 2], out: &mut [f32]) = sum_later_kernel
}

#[inline(always)]
fn sum_later_kernel<S: Simd>(
    _: S,
    rows: &[f32],
    width: usize,
    later: [&mut [f32]; 2],
    out: &mut [f32],
) {
    const LANES: usize = 16;
    let [high, low] = later;
    let out_stride = padded(width);
    for first in (0..width).step_by(LANES) {
        let n = LANES.min(width - first);
        let mut sums = [0.0f64; LANES];
        for i in 0..n {
            sums[i] = f64::from(high[first + i]) + f64::from(low[first + i]);
        }
        for (row, out) in rows.chunks_exact(width).zip(out.chunks_exact_mut(out_stride)).rev() {
            for i in 0..n {
                sums[i] += f64::from(row[first + i]);
                out[first + i] = sums[i] as f32;
            }
        }
        for i in 0..n {
            high[first + i] = sums[i] as f32;
            low[first + i] = (sums[i] - f64::from(high[first + i])) as f32;
        }
    }
}

dispatch! {
    /// `to += from`; `from` may be longer.
    pub(crate) fn accumulate(from: &[f32], to: &mut [f32]) = accumulate_kernel
}

#[inline(always)]
fn accumulate_kernel<S: Simd>(s: S, from: &[f32], to: &mut [f32]) {
    let from = &from[..to.len()];
    for at in (0..to.len()).step_by(S::LANES) {
        let n = (to.len() - at).min(S::LANES);
        // SAFETY: `n` numbers are left in both.
        unsafe {
            let (p, q) = (to.as_mut_ptr().add(at), from.as_ptr().add(at));
            if n == S::LANES {
                s.store(p, s.add(s.load(p), s.load(q)));
            } else {
                s.store_part(p, s.add(s.load_part(p, n), s.load_part(q, n)), n);
            }
        }
    }
}

/// Rows of some neighbouring tokens of one head of a patch.
#[derive(Debug)]
pub(crate) struct Target<'a, 'b, E> {
    pub(crate) patch: &'a mut Patch<'b, E>,
    /// The first token and the head, counted from the patch's beginning.
    pub(crate) first: usize,
    pub(crate) head: usize,
}

dispatch! {
    /// Rows times a factor each and one for all, rounded to the storage type.
    pub(crate) fn scatter<E: Element>(from: &[f32], factors: &[f32], scale: f32, to: Target<'_, '_, E>) = scatter_kernel
}

#[inline(always)]
fn scatter_kernel<S: Simd, E: Element>(
    s: S,
    from: &[f32],
    factors: &[f32],
    scale: f32,
    to: Target<'_, '_, E>,
) {
    let stride = from.len() / factors.len().max(1);
    for (t, factor) in factors.iter().enumerate() {
        let factor = s.splat(factor * scale);
        let to = to.patch.row(to.first + t, to.head);
        let from = &from[t * stride..][..to.len()];
        for at in (0..to.len()).step_by(S::LANES) {
            let n = (to.len() - at).min(S::LANES);
            // SAFETY: `n` numbers are left in both.
            unsafe {
                let (p, q) = (to.as_mut_ptr().add(at), from.as_ptr().add(at));
                if n == S::LANES {
                    E::store_part(s, p, s.mul(s.load(q), factor), S::LANES);
                } else {
                    E::store_part(s, p, s.mul(s.load_part(q, n), factor), n);
                }
            }
        }
    }
}

dispatch! {
    /// Adds rows, `stride` apart, to `count` rows.
    pub(crate) fn accumulate_rows(from: &[f32], stride: usize, count: usize, to: Target<'_, '_, f32>) = accumulate_rows_kernel
}

#[inline(always)]
fn accumulate_rows_kernel<S: Simd>(
    s: S,
    from: &[f32],
    stride: usize,
    count: usize,
    to: Target<'_, '_, f32>,
) {
    for t in 0..count {
        let to = to.patch.row(to.first + t, to.head);
        accumulate_kernel(s, &from[t * stride..], to);
    }
}

/// Writes `count` rows, `stride` apart in `from`.
pub(crate) fn copy_rows(from: &[f32], stride: usize, count: usize, to: Target<'_, '_, f32>) {
    for t in 0..count {
        let to = to.patch.row(to.first + t, to.head);
        to.copy_from_slice(&from[t * stride..][..to.len()]);
    }
}
