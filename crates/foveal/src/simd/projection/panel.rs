//! Tiles of results: up to 6 input rows × 64 columns, over a run of the numbers that are summed over.
//!
//! Inputs and weights are cells, numbers or pairs of bf16 (see [`product`](crate::simd::product)).
//! The weights come as a panel `[k][64]`, so that a vector of results is a sum over k of a
//! broadcast input times neighbouring weights. Each sum starts at zero, has one accumulator, and is
//! then added to what earlier runs left; a row's bits do not depend on the rows beside it.

use super::Columns;
use crate::simd::Simd;
use crate::simd::product::{Product, dispatch_form};
use crate::simd::tile::{GROUP, PANEL};
use std::ops::Range;

/// What [`panel`] reads and writes.
#[derive(Debug, Clone)]
pub(crate) struct PanelCall<'a> {
    /// Input rows, from the first cell of the run on.
    pub(crate) x: &'a [f32],
    /// Cells from one input row to the next.
    pub(crate) x_stride: usize,
    /// Cells of the run.
    pub(crate) depth: usize,
    /// `[k][64]` weights, `depth` of k.
    pub(crate) weights: &'a [f32],
    /// Results.
    pub(crate) out: &'a Columns<'a>,
    /// The rows of results that belong to the input rows.
    pub(crate) rows: Range<usize>,
    /// The panel's columns of results, at most 64; in these rows they are this call's alone.
    pub(crate) columns: Range<usize>,
    /// Whether to add to the results; else they are written.
    pub(crate) add: bool,
}

dispatch_form! {
    /// Products of one panel with every input row.
    pub(crate) fn panel(call: &PanelCall<'_>) = panel_kernel
}

#[inline(always)]
fn panel_kernel<P: Product>(product: P, call: &PanelCall<'_>) {
    assert!(call.weights.len() >= call.depth * PANEL && call.columns.len() <= PANEL);
    for row in (0..call.rows.len()).step_by(GROUP) {
        match (call.rows.len() - row).min(GROUP) {
            1 => group::<P, 1>(product, call, row),
            2 => group::<P, 2>(product, call, row),
            3 => group::<P, 3>(product, call, row),
            4 => group::<P, 4>(product, call, row),
            5 => group::<P, 5>(product, call, row),
            _ => group::<P, 6>(product, call, row),
        }
    }
}

#[inline(always)]
fn group<P: Product, const R: usize>(product: P, call: &PanelCall<'_>, row: usize) {
    let last = (row + R - 1) * call.x_stride + call.depth;
    assert!(call.x.len() >= last);
    let vectors = call.columns.len().div_ceil(P::S::LANES);
    let mut v = 0;
    while v < vectors {
        let taken = (vectors - v).min(P::S::TILE_VECTORS);
        let lane = v * P::S::LANES;
        // SAFETY: rows row..row + R reach `last` numbers; lanes lane.. hold `taken` vectors of the
        // panel's 64.
        unsafe {
            match taken {
                1 => tile::<P, R, 1>(product, call, row, lane),
                2 if P::S::TILE_VECTORS >= 2 => tile::<P, R, 2>(product, call, row, lane),
                3 if P::S::TILE_VECTORS >= 3 => tile::<P, R, 3>(product, call, row, lane),
                _ => tile::<P, R, 4>(product, call, row, lane),
            }
        }
        v += taken;
    }
}

/// # Safety
/// `call.x` holds `call.depth` cells of rows `row..row + R`, and `lane + V * LANES <= 64`.
#[inline(always)]
unsafe fn tile<P: Product, const R: usize, const V: usize>(
    product: P,
    call: &PanelCall<'_>,
    row: usize,
    lane: usize,
) {
    let s = product.simd();
    let mut sums = [[s.splat(0.0); V]; R];
    let (depth, stride) = (call.depth, call.x_stride);
    // SAFETY: k < depth stays inside the panel and inside the input rows.
    unsafe {
        let weights = call.weights.as_ptr().add(lane);
        let x = call.x.as_ptr().add(row * stride);
        for k in 0..depth {
            let mut weight = [s.splat(0.0); V];
            for (v, weight) in weight.iter_mut().enumerate() {
                *weight = s.load(weights.add(k * PANEL + v * P::S::LANES));
            }
            for (r, sums) in sums.iter_mut().enumerate() {
                let x = s.splat(*x.add(r * stride + k));
                for (sum, &weight) in sums.iter_mut().zip(&weight) {
                    *sum = product.step(x, weight, *sum);
                }
            }
        }
    }
    for (r, sums) in sums.iter().enumerate() {
        let at = call.columns.start + lane;
        for (v, &sum) in sums.iter().enumerate() {
            let first = (at + v * P::S::LANES).min(call.columns.end);
            let columns = first..call.columns.end.min(first + P::S::LANES);
            // SAFETY: the rows' columns are this call's alone; as many are loaded and stored.
            unsafe {
                let out = call.out.part(call.rows.start + row + r, columns);
                let (p, n) = (out.as_mut_ptr(), out.len());
                let sum = if call.add { s.add(s.load_part(p, n), sum) } else { sum };
                s.store_part(p, sum, n);
            }
        }
    }
}
