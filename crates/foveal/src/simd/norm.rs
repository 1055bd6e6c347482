//! Kernels of normalisation over rows, forward and backward.
//!
//! With x̂ = (x − mean) · factor, g = d_y · w and averages over the row,
//!
//! ```text
//! y = x̂ w + b      d_x = factor · (g − ⟨g⟩ − x̂ ⟨g x̂⟩)      d_w = Σ_rows d_y x̂      d_b = Σ_rows d_y
//! ```
//!
//! RMSNorm has mean = 0 and no ⟨g⟩. Sums over a row run in four sums of lanes; sums over rows start at zero
//! for each block and are then added to what is there.

use super::nn::{load, store};
use super::{Simd, dispatch};
use crate::tensor::Rows;

/// What a row is normalised by: x̂ = (x − mean) · factor.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Moments {
    pub(crate) mean: f32,
    pub(crate) factor: f32,
}

impl Moments {
    #[inline(always)]
    fn apply<S: Simd>(self, s: S, x: S::F) -> S::F {
        s.mul(s.sub(x, s.splat(self.mean)), s.splat(self.factor))
    }
}

/// Σ over a row of vectors of terms; `term(at)` has zeros beyond the end.
#[inline(always)]
fn sum_of<S: Simd>(s: S, len: usize, term: impl Fn(usize) -> S::F) -> f32 {
    let mut sums = [s.splat(0.0); 4];
    for block in (0..len).step_by(4 * S::LANES) {
        for (u, sum) in sums.iter_mut().enumerate() {
            let at = block + u * S::LANES;
            if at < len {
                *sum = s.add(*sum, term(at));
            }
        }
    }
    let [a, b, c, d] = sums;
    s.sum(s.add(s.add(a, b), s.add(c, d)))
}

/// One bit for each number that is left from `at` on.
#[inline(always)]
fn present<S: Simd>(len: usize, at: usize) -> u32 {
    ((1u64 << (len - at).min(S::LANES)) - 1) as u32
}

dispatch! {
    /// Σ x.
    pub(crate) fn sum(x: &[f32]) -> f32 = sum_kernel
}

#[inline(always)]
fn sum_kernel<S: Simd>(s: S, x: &[f32]) -> f32 {
    sum_of(s, x.len(), |at| load(s, x, at))
}

dispatch! {
    /// Σ (x − mean)².
    pub(crate) fn sum_squares_around(x: &[f32], mean: f32) -> f32 = sum_squares_around_kernel
}

#[inline(always)]
fn sum_squares_around_kernel<S: Simd>(s: S, x: &[f32], mean: f32) -> f32 {
    sum_of(s, x.len(), |at| {
        let off = s.sub(load(s, x, at), s.splat(mean));
        s.select(present::<S>(x.len(), at), s.mul(off, off), s.splat(0.0))
    })
}

dispatch! {
    /// `x = x̂ * weight + bias`; all have the same length.
    pub(crate) fn normalize(x: &mut [f32], by: Moments, weight: &[f32], bias: Option<&[f32]>) = normalize_kernel
}

#[inline(always)]
fn normalize_kernel<S: Simd>(
    s: S,
    x: &mut [f32],
    by: Moments,
    weight: &[f32],
    bias: Option<&[f32]>,
) {
    assert!(x.len() == weight.len() && bias.is_none_or(|bias| bias.len() == x.len()));
    for at in (0..x.len()).step_by(S::LANES) {
        let normalized = by.apply(s, load(s, x, at));
        let weight = load(s, weight, at);
        let y = match bias {
            Some(bias) => s.fma(normalized, weight, load(s, bias, at)),
            None => s.mul(normalized, weight),
        };
        store(s, x, at, y);
    }
}

/// A row, its gradient from behind, and the norm's weights; all of one length.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RowGradient<'a> {
    pub(crate) x: &'a [f32],
    pub(crate) d_y: &'a [f32],
    pub(crate) weight: &'a [f32],
    pub(crate) by: Moments,
}

dispatch! {
    /// `d_x`, written or added; with `centred` for a norm that subtracts the mean.
    pub(crate) fn input_gradient(row: RowGradient<'_>, centred: bool, d_x: &mut [f32], add: bool) = input_gradient_kernel
}

#[inline(always)]
fn input_gradient_kernel<S: Simd>(
    s: S,
    row: RowGradient<'_>,
    centred: bool,
    d_x: &mut [f32],
    add: bool,
) {
    let RowGradient { x, d_y, weight, by } = row;
    let width = x.len();
    assert!(d_y.len() == width && weight.len() == width && d_x.len() == width);
    let gradient = |at| s.mul(load(s, d_y, at), load(s, weight, at));
    let along = sum_of(s, width, |at| s.mul(gradient(at), by.apply(s, load(s, x, at))));
    let mean = if centred { sum_of(s, width, gradient) / width as f32 } else { 0.0 };
    let (along, mean) = (s.splat(-along / width as f32), s.splat(mean));
    for at in (0..width).step_by(S::LANES) {
        let across = s.sub(gradient(at), mean);
        let rest = s.fma(by.apply(s, load(s, x, at)), along, across);
        let change = s.mul(rest, s.splat(by.factor));
        store(s, d_x, at, if add { s.add(load(s, d_x, at), change) } else { change });
    }
}

dispatch! {
    /// `d_weight += Σ_rows d_y * x̂`; rows are those of `moments`.
    pub(crate) fn add_weight_gradient(x: Rows<'_, f32>, d_y: Rows<'_, f32>, moments: &[Moments], d_weight: &mut [f32]) = add_weight_gradient_kernel
}

#[inline(always)]
fn add_weight_gradient_kernel<S: Simd>(
    s: S,
    x: Rows<'_, f32>,
    d_y: Rows<'_, f32>,
    moments: &[Moments],
    d_weight: &mut [f32],
) {
    for at in (0..d_weight.len()).step_by(S::LANES) {
        let mut sum = s.splat(0.0);
        for (r, by) in moments.iter().enumerate() {
            sum = s.fma(load(s, d_y.row(r), at), by.apply(s, load(s, x.row(r), at)), sum);
        }
        store(s, d_weight, at, s.add(load(s, d_weight, at), sum));
    }
}

/// Rows whose sum is computed before it is added to earlier ones.
const SUMMED_ROWS: usize = 256;

dispatch! {
    /// `sums += Σ_rows row`.
    pub(crate) fn add_column_sums(rows: Rows<'_, f32>, sums: &mut [f32]) = add_column_sums_kernel
}

#[inline(always)]
fn add_column_sums_kernel<S: Simd>(s: S, rows: Rows<'_, f32>, sums: &mut [f32]) {
    for start in (0..rows.count()).step_by(SUMMED_ROWS) {
        let block = start..rows.count().min(start + SUMMED_ROWS);
        for at in (0..sums.len()).step_by(S::LANES) {
            let mut sum = s.splat(0.0);
            for r in block.clone() {
                sum = s.add(sum, load(s, rows.row(r), at));
            }
            store(s, sums, at, s.add(load(s, sums, at), sum));
        }
    }
}
