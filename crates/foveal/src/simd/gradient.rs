//! The steps of the tile kernels that only a backward pass takes, for one tile of query rows against
//! one key tile: P and dS from scores and dP, and sums over the rows of the tile.
//!
//! ```text
//! P = exp2(c S − l)      dS = P ∘ (dP − D)      dV += Pᵀ dO      dK += dSᵀ Q
//! ```
//!
//! P and dS are numbers; sums over rows take them as cells of neighbouring rows, see [`product`](super::product).
//! Scores, dP = dO Vᵀ and dQ = dS K come from the forward's kernels in [`tile`](super::tile). Each sum runs over the
//! rows of a tile in order with one accumulator per element, started at zero for each tile.

use super::product::{Product, dispatch_form};
use super::terms::LANE;
use super::tile::{
    GROUP, KEY_TILE, PANEL, PANELS, STEP, Steps, ValueBlock, Visible, padded, value_columns,
};
use super::{Simd, dispatch, math};
use crate::tensor::Rows;

/// What [`differentiate`] reads and writes.
#[derive(Debug)]
pub(crate) struct Differentiate<'a> {
    /// In: scores; out: probabilities. `[row][KEY_TILE]`, zeros where no row of the group sees a step.
    pub(crate) scores: &'a mut [f32],
    /// In: dP, the gradients of probabilities; out: dS, those of scores. Laid out alike.
    pub(crate) gradients: &'a mut [f32],
    /// Which keys count.
    pub(crate) visible: Visible<'a>,
    /// Multiplies scores into base-2 logits.
    pub(crate) factor: f32,
    /// The log-sum-exp of each row in base 2; +∞ for a row that sees nothing.
    pub(crate) lse: &'a [f32],
    /// D of each row.
    pub(crate) delta: &'a [f32],
}

dispatch! {
    /// P = exp2(factor · S − lse) and dS = P ∘ (dP − D) for a group of rows.
    pub(crate) fn differentiate(args: Differentiate<'_>) = differentiate_kernel
}

#[inline(always)]
fn differentiate_kernel<S: Simd>(s: S, args: Differentiate<'_>) {
    let Differentiate { scores, gradients, visible, factor, lse, delta } = args;
    let rows = lse.len();
    assert!(delta.len() == rows);
    assert!(scores.len() >= rows * KEY_TILE && gradients.len() >= rows * KEY_TILE);
    let factor = s.splat(factor);
    for r in 0..rows {
        let (lse, delta) = (s.splat(-lse[r]), s.splat(delta[r]));
        let scores = scores[r * KEY_TILE..][..KEY_TILE].as_mut_ptr();
        let gradients = gradients[r * KEY_TILE..][..KEY_TILE].as_mut_ptr();
        for panel in 0..PANELS {
            let (first, end) = visible.steps(panel);
            for v in 0..PANEL / S::LANES {
                let at = panel * PANEL + v * S::LANES;
                let seen = (first * STEP..end * STEP).contains(&(v * S::LANES));
                // SAFETY: a row holds KEY_TILE numbers, of which the panel's vectors are a part.
                unsafe {
                    let (p_at, d_at) = (scores.add(at), gradients.add(at));
                    let (mut p, mut d) = (s.splat(0.0), s.splat(0.0));
                    if seen {
                        // No probability is above 1, however the two terms were rounded.
                        let x = s.min(s.splat(0.0), s.fma(s.load(p_at), factor, lse));
                        p = math::exp2(s, x);
                        d = s.mul(p, s.sub(s.load(d_at), delta));
                    }
                    s.store(p_at, p);
                    s.store(d_at, d);
                }
            }
        }
    }
}

dispatch! {
    /// dS ← dS ∘ bend for a group of rows, `[row][KEY_TILE]` both, where a step of 16 keys is computed.
    pub(crate) fn bend(gradients: &mut [f32], bend: &[f32], steps: Steps) = bend_kernel
}

#[inline(always)]
fn bend_kernel<S: Simd>(s: S, gradients: &mut [f32], bend: &[f32], steps: Steps) {
    for (gradients, bend) in gradients.chunks_exact_mut(KEY_TILE).zip(bend.chunks_exact(KEY_TILE)) {
        for (panel, (first, end)) in steps.into_iter().enumerate() {
            for v in first * STEP / S::LANES..end * STEP / S::LANES {
                let at = panel * PANEL + v * S::LANES;
                // SAFETY: steps lie inside the row's KEY_TILE numbers.
                unsafe {
                    let p = gradients.as_mut_ptr().add(at);
                    s.store(p, s.mul(s.load(p), s.load(bend.as_ptr().add(at))));
                }
            }
        }
    }
}

dispatch! {
    /// Σ x.
    pub(crate) fn sum(x: &[f32]) -> f32 = sum_kernel
}

#[inline(always)]
fn sum_kernel<S: Simd>(s: S, x: &[f32]) -> f32 {
    let mut sum = s.splat(0.0);
    for at in (0..x.len()).step_by(S::LANES) {
        // SAFETY: so many numbers are left.
        let part = unsafe { s.load_part(x.as_ptr().add(at), (x.len() - at).min(S::LANES)) };
        sum = s.add(sum, part);
    }
    s.sum(sum)
}

dispatch! {
    /// Σ x_j |first + j|.
    pub(crate) fn distance_sum(x: &[f32], first: f32) -> f32 = distance_sum_kernel
}

#[inline(always)]
fn distance_sum_kernel<S: Simd>(s: S, x: &[f32], first: f32) -> f32 {
    let mut sum = s.splat(0.0);
    for at in (0..x.len()).step_by(S::LANES) {
        // SAFETY: so many numbers are left; LANE holds 16 >= LANES numbers.
        let (part, lane) = unsafe {
            let left = (x.len() - at).min(S::LANES);
            (s.load_part(x.as_ptr().add(at), left), s.load(LANE.as_ptr()))
        };
        let ahead = s.add(lane, s.splat(first + at as f32));
        let distance = s.max(ahead, s.sub(s.splat(0.0), ahead));
        sum = s.fma(part, distance, sum);
    }
    s.sum(sum)
}

/// What [`across`] reads and writes.
#[derive(Debug)]
pub(crate) struct Across<'a> {
    /// Weights in cells across rows, `[row / CELL][KEY_TILE]`.
    pub(crate) weights: &'a [f32],
    /// What they weigh: one row of cells for each of theirs.
    pub(crate) rows: Rows<'a, f32>,
    /// For each group of 6 keys, the first row that counts and the one after the last.
    pub(crate) bounds: &'a [(usize, usize)],
    /// Keys.
    pub(crate) keys: usize,
    /// Accumulators, one row a key, of the rows' width rounded up to 16.
    pub(crate) out: &'a mut [f32],
    /// From one of them to the next.
    pub(crate) out_stride: usize,
}

dispatch_form! {
    /// out ← out + Wᵀ R: for each key the sum of the rows, weighed by its column.
    pub(crate) fn across(args: Across<'_>) = across_kernel
}

#[inline(always)]
fn across_kernel<P: Product>(product: P, args: Across<'_>) {
    let Across { weights, rows, bounds, keys, out, out_stride } = args;
    let width = rows.width();
    assert!(keys <= KEY_TILE && bounds.len() == keys.div_ceil(GROUP));
    assert!(weights.len() >= rows.count() * KEY_TILE && out_stride >= padded(width));
    assert!(keys == 0 || out.len() >= (keys - 1) * out_stride + padded(width));
    let cells = |&(first, end): &(usize, usize)| (first / P::CELL, end.div_ceil(P::CELL));
    assert!(bounds.iter().map(cells).all(|(first, end)| first >= end || end <= rows.count()));
    let mut column = 0;
    while column < width {
        let left = width - column;
        let whole = (left / P::S::LANES).min(P::S::TILE_VECTORS);
        for (group, bounds) in bounds.iter().enumerate() {
            if bounds.0 >= bounds.1 {
                continue;
            }
            let (key, span) = (group * GROUP, cells(bounds));
            let io = ValueBlock {
                probabilities: weights.as_ptr().wrapping_add(key),
                values: rows.as_ptr().wrapping_add(column),
                stride: rows.stride(),
                spans: [span, (0, 0), (0, 0), (0, 0)],
                rescale: &[1.0; GROUP],
                out: out.as_mut_ptr().wrapping_add(key * out_stride + column),
                out_stride,
                tail: left % P::S::LANES,
            };
            // SAFETY: rows below the count and columns below the width, keys below `keys`, of which
            // weights and `out` hold that many; `out` rows are padded for the last vector.
            unsafe {
                match keys - key {
                    1 => value_columns::<P, 1, true>(product, &io, whole),
                    2 => value_columns::<P, 2, true>(product, &io, whole),
                    3 => value_columns::<P, 3, true>(product, &io, whole),
                    4 => value_columns::<P, 4, true>(product, &io, whole),
                    5 => value_columns::<P, 5, true>(product, &io, whole),
                    _ => value_columns::<P, 6, true>(product, &io, whole),
                }
            }
        }
        column += whole.max(1) * P::S::LANES;
    }
}
