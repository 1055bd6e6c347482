//! Matrices of bf16 pairs: packed keys and values, queries, weights, rows of numbers.
//!
//! ```text
//! keys    [key / 64][d / 2][key % 64] of (k_d, k_d+1)        queries [row][d / 2] of (q_d, q_d+1)
//! values  [key / 2][d] of (v_d of key, v_d of key + 1)       weights [row][key / 2] of (p_key, p_key+1), rounded
//!                                                            or across [row / 2][key] of (p of row, p of row + 1)
//! ```
//!
//! An odd last number has a zero beside it. Cells lie in `f32` buffers as bits; see [`product`](super::product).

use super::Simd;
use super::product::{PairProduct, dispatch_pairs};
use super::tile::{KEY_TILE, PANEL, STEP, Steps, pack_keys_kernel};
use crate::tensor::Rows;
use half::bf16;

dispatch_pairs! {
    /// Packs keys into panels, as [`pack_keys`](super::tile::pack_keys) does.
    ///
    /// `out` holds `ceil(count / 64) * 64 * ceil(width / 2)` cells.
    pub(crate) fn pack_keys(keys: Rows<'_, bf16>, out: &mut [f32]) = pack_keys_kernel
}

dispatch_pairs! {
    /// Packs values, two rows into one of `width` cells.
    ///
    /// `out` holds `ceil(count / 2) * width` cells.
    pub(crate) fn pack_values(values: Rows<'_, bf16>, out: &mut [f32]) = pack_values_kernel
}

#[inline(always)]
fn pack_values_kernel<P: PairProduct>(product: P, values: Rows<'_, bf16>, out: &mut [f32]) {
    let (s, width) = (product.simd(), values.width());
    assert_eq!(out.len(), values.count().div_ceil(2) * width);
    for (pair, out) in out.chunks_exact_mut(width.max(1)).enumerate() {
        let two = 2 * pair + 1 < values.count();
        for d in (0..width).step_by(2 * P::S::LANES) {
            let n = (width - d).min(2 * P::S::LANES);
            // SAFETY: rows 2 pair and, if there is one, the next hold n elements from d on; so does
            // `out`, which is stored to vector by vector.
            unsafe {
                let at = values.as_ptr().add(2 * pair * values.stride() + d);
                let load = |p| match n == 2 * P::S::LANES {
                    true => product.load_cells::<bf16>(p),
                    false => product.load_cells_part::<bf16>(p, n),
                };
                let below = if two { load(at.add(values.stride())) } else { s.splat(0.0) };
                let cells = product.interleave(load(at), below);
                let to = out.as_mut_ptr().add(d);
                if n == 2 * P::S::LANES {
                    s.store(to, cells[0]);
                    s.store(to.add(P::S::LANES), cells[1]);
                } else {
                    s.store_part(to, cells[0], n.min(P::S::LANES));
                    let rest = n.saturating_sub(P::S::LANES);
                    s.store_part(to.wrapping_add(P::S::LANES), cells[1], rest);
                }
            }
        }
    }
}

dispatch_pairs! {
    /// Packs rows of cells with `width` numbers each as [`pack_values`] does.
    pub(crate) fn pack_rows(rows: Rows<'_, f32>, width: usize, out: &mut [f32]) = pack_rows_kernel
}

#[inline(always)]
fn pack_rows_kernel<P: PairProduct>(
    product: P,
    rows: Rows<'_, f32>,
    width: usize,
    out: &mut [f32],
) {
    pack_values_kernel(product, elements(rows, width), out);
}

/// The elements that cells hold, `width` of each row.
fn elements(rows: Rows<'_, f32>, width: usize) -> Rows<'_, bf16> {
    let cells = rows.as_slice();
    // SAFETY: every cell is two elements of half its size and alignment, and any bits are one.
    let halves = unsafe { std::slice::from_raw_parts(cells.as_ptr().cast(), 2 * cells.len()) };
    Rows::new(halves, 2 * rows.stride(), rows.count(), width).expect("no more than there were")
}

dispatch_pairs! {
    /// Packs rows of cells into panels, as [`pack_keys`] does those of elements.
    pub(crate) fn pack_cells(rows: Rows<'_, f32>, width: usize, out: &mut [f32]) = pack_cells_kernel
}

#[inline(always)]
fn pack_cells_kernel<P: PairProduct>(
    product: P,
    rows: Rows<'_, f32>,
    width: usize,
    out: &mut [f32],
) {
    pack_keys_kernel(product, elements(rows, width), out);
}

dispatch_pairs! {
    /// Rounds weights of a few rows, `[row][KEY_TILE]`, twice: to pairs across rows, `[row / 2][KEY_TILE]`, and in
    /// their place to pairs of each row, as [`round`] does.
    pub(crate) fn round_across(weights: &mut [f32], across: &mut [f32]) = round_across_kernel
}

#[inline(always)]
fn round_across_kernel<P: PairProduct>(product: P, weights: &mut [f32], across: &mut [f32]) {
    let s = product.simd();
    assert!(P::S::LANES == STEP && weights.len().is_multiple_of(KEY_TILE));
    let rows = weights.len() / KEY_TILE;
    assert!(across.len() == rows.div_ceil(2) * KEY_TILE);
    for (pair, across) in across.chunks_exact_mut(KEY_TILE).enumerate() {
        let first = weights[2 * pair * KEY_TILE..].as_mut_ptr();
        let two = 2 * pair + 1 < rows;
        for at in (0..KEY_TILE).step_by(2 * STEP) {
            // SAFETY: 32 keys lie inside a row, of which there is a second if `two`; their cells are not
            // behind them: what they overwrite has been read.
            unsafe {
                let round = |row: *mut f32| {
                    let cells = product.round(s.load(row.add(at)), s.load(row.add(at + STEP)));
                    s.store(row.add(at / 2), cells);
                    cells
                };
                let above = round(first);
                let below = if two { round(first.add(KEY_TILE)) } else { s.splat(0.0) };
                let cells = product.interleave(above, below);
                s.store(across.as_mut_ptr().add(at), cells[0]);
                s.store(across.as_mut_ptr().add(at + STEP), cells[1]);
            }
        }
    }
}

dispatch_pairs! {
    /// Rounds weights `[row][KEY_TILE]` to pairs, `[row][KEY_TILE]` of cells of which the first half is
    /// used, in steps of 16 keys that are computed (and their neighbours).
    pub(crate) fn round(weights: &mut [f32], steps: Steps) = round_kernel
}

#[inline(always)]
pub(super) fn round_kernel<P: PairProduct>(product: P, weights: &mut [f32], steps: Steps) {
    const PAIR: usize = 2 * STEP;
    let s = product.simd();
    assert!(P::S::LANES == STEP);
    for row in weights.chunks_exact_mut(KEY_TILE) {
        for (panel, (first, end)) in steps.into_iter().enumerate() {
            for step in first / 2..end.div_ceil(2) {
                let at = panel * PANEL + step * PAIR;
                // SAFETY: 32 keys of a panel lie inside the row, and their cells not behind them:
                // what they overwrite has been read.
                unsafe {
                    let p = row.as_mut_ptr();
                    let cells = product.round(s.load(p.add(at)), s.load(p.add(at + STEP)));
                    s.store(p.add(at / 2), cells);
                }
            }
        }
    }
}

dispatch_pairs! {
    /// Rounds a row of numbers to `ceil(len / 2)` cells.
    pub(crate) fn round_row(row: &[f32], cells: &mut [f32]) = round_row_kernel
}

#[inline(always)]
fn round_row_kernel<P: PairProduct>(product: P, row: &[f32], cells: &mut [f32]) {
    let s = product.simd();
    assert_eq!(cells.len(), row.len().div_ceil(2));
    let (parts, cells) = (row.chunks(2 * P::S::LANES), cells.chunks_mut(P::S::LANES));
    for (part, cells) in parts.zip(cells) {
        let low = part.len().min(P::S::LANES);
        let (low, high) = part.split_at(low);
        // SAFETY: both halves hold at most LANES numbers, and as many cells are stored as there are.
        unsafe {
            let half = |half: &[f32]| match half.len() == P::S::LANES {
                true => s.load(half.as_ptr()),
                false => s.load_part(half.as_ptr(), half.len()),
            };
            s.store_part(cells.as_mut_ptr(), product.round(half(low), half(high)), cells.len());
        }
    }
}

dispatch_pairs! {
    /// Copies a row's cells, each number multiplied by `sign`, which is 1, −1 or 0.
    pub(crate) fn load(row: &[bf16], sign: f32, to: &mut [f32]) = load_kernel
}

#[inline(always)]
fn load_kernel<P: PairProduct>(product: P, row: &[bf16], sign: f32, to: &mut [f32]) {
    let s = product.simd();
    assert_eq!(to.len(), row.len().div_ceil(2));
    let (parts, cells) = (row.chunks(2 * P::S::LANES), to.chunks_mut(P::S::LANES));
    for (part, cells) in parts.zip(cells) {
        // SAFETY: the part's elements are readable, and its cells writable.
        unsafe {
            if part.len() == 2 * P::S::LANES {
                s.store(cells.as_mut_ptr(), product.load_cells(part.as_ptr()));
            } else {
                let last = product.load_cells_part(part.as_ptr(), part.len());
                s.store_part(cells.as_mut_ptr(), last, cells.len());
            }
        }
    }
    if sign != 1.0 {
        let turn = |half: u32| u32::from(bf16::from_f32(f32::from_bits(half) * sign).to_bits());
        for cell in to {
            let bits = cell.to_bits();
            *cell = f32::from_bits(turn(bits & 0xffff_0000) << 16 | turn(bits << 16));
        }
    }
}
