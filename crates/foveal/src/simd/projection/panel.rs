//! Tiles of results: up to 6 input rows × 64 weight rows, over a run of columns of the weights.
//!
//! The weights come as a panel `[k][64]`, so that a vector of results is a sum over k of a
//! broadcast input times neighbouring weights. Each sum starts at zero, has one accumulator, and is
//! then added to what earlier runs left; a row's bits do not depend on the rows beside it.

use super::Columns;
use crate::simd::tile::{GROUP, PANEL};
use crate::simd::{Simd, dispatch};
use std::ops::Range;

/// What [`panel`] reads and writes.
#[derive(Debug, Clone)]
pub(crate) struct PanelCall<'a> {
    /// Input rows.
    pub(crate) x: &'a [f32],
    /// Numbers from one input row to the next.
    pub(crate) x_stride: usize,
    /// Input rows.
    pub(crate) rows: usize,
    /// The run of input columns that the panel covers.
    pub(crate) depth: Range<usize>,
    /// `[k][64]` weights, `depth.len()` of k.
    pub(crate) weights: &'a [f32],
    /// Results.
    pub(crate) out: &'a Columns<'a>,
    /// The panel's columns of results, at most 64 and this call's alone.
    pub(crate) columns: Range<usize>,
}

dispatch! {
    /// Products of one panel with every input row; the first run writes, later ones add.
    pub(crate) fn panel(call: &PanelCall<'_>) = panel_kernel
}

#[inline(always)]
fn panel_kernel<S: Simd>(s: S, call: &PanelCall<'_>) {
    assert!(call.weights.len() >= call.depth.len() * PANEL && call.columns.len() <= PANEL);
    for row in (0..call.rows).step_by(GROUP) {
        match (call.rows - row).min(GROUP) {
            1 => group::<S, 1>(s, call, row),
            2 => group::<S, 2>(s, call, row),
            3 => group::<S, 3>(s, call, row),
            4 => group::<S, 4>(s, call, row),
            5 => group::<S, 5>(s, call, row),
            _ => group::<S, 6>(s, call, row),
        }
    }
}

#[inline(always)]
fn group<S: Simd, const R: usize>(s: S, call: &PanelCall<'_>, row: usize) {
    let last = (row + R - 1) * call.x_stride + call.depth.end;
    assert!(call.x.len() >= last);
    let vectors = call.columns.len().div_ceil(S::LANES);
    let mut v = 0;
    while v < vectors {
        let taken = (vectors - v).min(S::TILE_VECTORS);
        let lane = v * S::LANES;
        // SAFETY: rows row..row + R reach `last` numbers; lanes lane.. hold `taken` vectors of the
        // panel's 64.
        unsafe {
            match taken {
                1 => tile::<S, R, 1>(s, call, row, lane),
                2 if S::TILE_VECTORS >= 2 => tile::<S, R, 2>(s, call, row, lane),
                3 if S::TILE_VECTORS >= 3 => tile::<S, R, 3>(s, call, row, lane),
                _ => tile::<S, R, 4>(s, call, row, lane),
            }
        }
        v += taken;
    }
}

/// # Safety
/// `call.x` holds rows `row..row + R` up to `call.depth.end`, and `lane + V * LANES <= 64`.
#[inline(always)]
unsafe fn tile<S: Simd, const R: usize, const V: usize>(
    s: S,
    call: &PanelCall<'_>,
    row: usize,
    lane: usize,
) {
    let mut sums = [[s.splat(0.0); V]; R];
    let (depth, stride) = (call.depth.len(), call.x_stride);
    // SAFETY: k < depth stays inside the panel and inside the input rows.
    unsafe {
        let weights = call.weights.as_ptr().add(lane);
        let x = call.x.as_ptr().add(row * stride + call.depth.start);
        for k in 0..depth {
            let mut weight = [s.splat(0.0); V];
            for (v, weight) in weight.iter_mut().enumerate() {
                *weight = s.load(weights.add(k * PANEL + v * S::LANES));
            }
            for (r, sums) in sums.iter_mut().enumerate() {
                let x = s.splat(*x.add(r * stride + k));
                for (sum, &weight) in sums.iter_mut().zip(&weight) {
                    *sum = s.fma(x, weight, *sum);
                }
            }
        }
    }
    for (r, sums) in sums.iter().enumerate() {
        let at = call.columns.start + lane;
        for (v, &sum) in sums.iter().enumerate() {
            let first = (at + v * S::LANES).min(call.columns.end);
            let columns = first..call.columns.end.min(first + S::LANES);
            // SAFETY: the columns are this call's alone, and as many are loaded and stored.
            unsafe {
                let out = call.out.part(row + r, columns);
                let (p, n) = (out.as_mut_ptr(), out.len());
                let sum = if call.depth.start == 0 { sum } else { s.add(s.load_part(p, n), sum) };
                s.store_part(p, sum, n);
            }
        }
    }
}
