//! O ← α O + P V for a few rows and values of bf16 as they lie: two keys a step.
//!
//! ```text
//! o_d ← α o_d + Σ_pairs (p_j v_jd + p_j+1 v_j+1,d)        p rounded to bf16
//! ```
//!
//! Rows of values are read from end to end, two at a time, and their numbers brought side by side in registers, once
//! for up to four query rows. An output is one chain over the pairs of a tile, whatever the number of rows.

use super::Simd;
use super::decode::RowValues;
use super::product::{PairProduct, dispatch_pairs};
use super::tile::{KEY_TILE, padded};
use crate::tensor::Rows;
use half::bf16;

/// Keys that are read before the next query rows take their turn.
const BLOCK: usize = 32;

dispatch_pairs! {
    /// Like [`row_values`](super::decode::row_values); weights are cells, `[row][KEY_TILE]`, of which the first half is
    /// used.
    pub(crate) fn row_value_pairs(args: RowValues<'_, bf16>) = row_values_kernel
}

#[inline(always)]
fn row_values_kernel<P: PairProduct>(product: P, args: RowValues<'_, bf16>) {
    let RowValues { probabilities, values, rescale, out, sums } = args;
    let (s, rows, width) = (product.simd(), rescale.len(), values.width());
    let stride = padded(width);
    assert!(probabilities.len() >= rows * KEY_TILE && values.count() <= KEY_TILE);
    assert!(out.len() >= rows * stride && sums.len() >= rows * stride);
    sums[..rows * stride].fill(0.0);
    for first in (0..values.count()).step_by(BLOCK) {
        let block = values.slice(first..(first + BLOCK).min(values.count()));
        let mut r = 0;
        while r < rows {
            let p = probabilities[r * KEY_TILE + first / 2..].as_ptr();
            let at = Columns { block, p, sum: sums[r * stride..].as_mut_ptr(), stride };
            // SAFETY: so many rows are left, each with a weight for each of the block's pairs and
            // sums for its columns.
            unsafe {
                r += match rows - r {
                    1 => weigh_rows::<P, 1, 4>(product, &at),
                    _ => weigh_rows::<P, 2, 4>(product, &at),
                };
            }
        }
    }
    for r in 0..rows {
        for at in (r * stride..(r + 1) * stride).step_by(P::S::LANES) {
            // SAFETY: strides are multiples of LANES and both buffers hold `rows` of them.
            unsafe {
                let (o, sum) = (out.as_mut_ptr().add(at), s.load(sums.as_ptr().add(at)));
                s.store(o, s.fma(s.splat(rescale[r]), s.load(o), sum));
            }
        }
    }
}

struct Columns<'a> {
    block: Rows<'a, bf16>,
    p: *const f32,
    sum: *mut f32,
    stride: usize,
}

/// Adds a block of weighted values to R rows of sums, up to V double vectors of columns at a time;
/// returns R.
///
/// # Safety
/// `at.p` holds one cell for each pair of the block in each of R score rows, `at.sum` R rows of the width
/// rounded up to 16.
#[inline(always)]
unsafe fn weigh_rows<P: PairProduct, const R: usize, const V: usize>(
    product: P,
    at: &Columns<'_>,
) -> usize {
    let (double, width) = (2 * P::S::LANES, at.block.width());
    let mut column = 0;
    while column < width {
        let left = (width - column) / double;
        // SAFETY: the caller's promise; columns end below the width.
        unsafe {
            let taken = match left {
                0 => weigh::<P, R, 1, true>(product, at, column),
                1 => weigh::<P, R, 1, false>(product, at, column),
                _ if V == 2 || left < 4 => weigh::<P, R, 2, false>(product, at, column),
                _ => weigh::<P, R, V, false>(product, at, column),
            };
            column += taken * double;
        }
    }
    R
}

/// One stretch of V double vectors of columns; with TAIL, the rest of the row. Returns V.
///
/// # Safety
/// That of [`weigh_rows`], and the row has so many columns from `column` on.
#[inline(always)]
unsafe fn weigh<P: PairProduct, const R: usize, const V: usize, const TAIL: bool>(
    product: P,
    at: &Columns<'_>,
    column: usize,
) -> usize {
    let s = product.simd();
    let (lanes, count) = (P::S::LANES, at.block.count());
    let rest = at.block.width() - column;
    // What a tail's two vectors hold of the row.
    let parts = [rest.min(lanes), rest.saturating_sub(lanes)];
    // SAFETY: see the contract. Parts of no numbers are neither read nor written.
    unsafe {
        let place = |r: usize, v: usize, half: usize| {
            at.sum.wrapping_add(r * at.stride + column + (2 * v + half) * lanes)
        };
        let mut sums = [[[s.splat(0.0); 2]; V]; R];
        for r in 0..R {
            for v in 0..V {
                for half in 0..2 {
                    let p = place(r, v, half);
                    sums[r][v][half] = if TAIL { s.load_part(p, parts[half]) } else { s.load(p) };
                }
            }
        }
        let load = |j: usize, v: usize| {
            let p = at.block.as_ptr().add(j * at.block.stride() + column + 2 * v * lanes);
            if TAIL { product.load_cells_part(p, rest) } else { product.load_cells(p) }
        };
        for j in (0..count).step_by(2) {
            let mut weights = [s.splat(0.0); R];
            for (r, weight) in weights.iter_mut().enumerate() {
                *weight = s.splat(*at.p.add(r * KEY_TILE + j / 2));
            }
            // One row from end to end, then the next, is the order in which memory is fast.
            let mut above = [s.splat(0.0); V];
            for (v, x) in above.iter_mut().enumerate() {
                *x = load(j, v);
            }
            for v in 0..V {
                let below = if j + 1 < count { load(j + 1, v) } else { s.splat(0.0) };
                let cells = product.interleave(above[v], below);
                for r in 0..R {
                    for half in 0..2 {
                        let sum = &mut sums[r][v][half];
                        *sum = product.step(weights[r], cells[half], *sum);
                    }
                }
            }
        }
        for r in 0..R {
            for v in 0..V {
                for half in 0..2 {
                    let (p, sum) = (place(r, v, half), sums[r][v][half]);
                    if TAIL { s.store_part(p, sum, parts[half]) } else { s.store(p, sum) }
                }
            }
        }
    }
    V
}
