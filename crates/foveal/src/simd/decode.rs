//! The row kernels: a few query rows against one key tile as it lies in memory.
//!
//! A generated token reads every key and value once and computes little with them, so order of access
//! is everything: rows are read from end to end, 16 keys at a time, and the block is reused from L1 by
//! the other query rows. A score is one chain of products over d, summed over lanes by a fixed tree; an
//! output is one chain over the keys of a tile. Neither depends on how many rows share the call.

use super::product::{Product, dispatch_pairs};
use super::tile::{KEY_TILE, KeyWords, padded};
use super::{Simd, dispatch};
use crate::element::Element;
use crate::tensor::Rows;
use half::bf16;

/// Keys that are read before the next query row takes its turn.
const BLOCK: usize = 16;
/// Vectors of one query that stay in registers.
const MAX_VECTORS: usize = 16;

/// What [`row_scores`] reads and writes.
#[derive(Debug)]
pub(crate) struct RowScores<'a, E> {
    /// Query rows of cells, each padded with zeros to the numbers of a key rounded up to 16.
    pub(crate) queries: &'a [f32],
    /// The tile's keys.
    pub(crate) keys: Rows<'a, E>,
    /// One set of bits per query row.
    pub(crate) visible: &'a [KeyWords],
    /// Out: `[row][KEY_TILE]`, −∞ where masked and from the last key to the next multiple of 16.
    pub(crate) out: &'a mut [f32],
    /// Out: the largest visible score of each row.
    pub(crate) max: &'a mut [f32],
}

dispatch! {
    /// S = Q Kᵀ, masked, with row maxima.
    pub(crate) fn row_scores<E: Element>(args: RowScores<'_, E>) = row_scores_kernel
}

dispatch_pairs! {
    /// Like [`row_scores`], with cells of pairs.
    pub(crate) fn row_score_pairs(args: RowScores<'_, bf16>) = row_scores_kernel
}

#[inline(always)]
fn row_scores_kernel<P: Product, E: Element>(product: P, args: RowScores<'_, E>) {
    let s = product.simd();
    let RowScores { queries, keys, visible, out, max } = args;
    let (rows, width, cells) = (visible.len(), keys.width(), P::S::LANES * P::CELL);
    let stride = padded(width);
    let (vectors, whole) = (width / cells, width.is_multiple_of(cells));
    assert!(queries.len() >= rows * stride && out.len() >= rows * KEY_TILE && max.len() == rows);
    assert!(keys.count() <= KEY_TILE);
    for first in (0..keys.count()).step_by(BLOCK) {
        let block = keys.slice(first..(first + BLOCK).min(keys.count()));
        let mut r = 0;
        while r < rows {
            let q = queries[r * stride..].as_ptr();
            let to = out[r * KEY_TILE + first..].as_mut_ptr();
            let pair = r + 1 < rows && whole && (vectors == 2 || vectors == 4 || vectors == 8);
            // SAFETY: queries hold `width` numbers padded to 16, and `out` KEY_TILE for each row, of
            // which this block is 16; a pair is taken only where two rows are left.
            unsafe {
                match vectors {
                    2 if pair => pair_dots::<P, E, 2>(product, q, block, to),
                    4 if pair => pair_dots::<P, E, 4>(product, q, block, to),
                    8 if pair => pair_dots::<P, E, 8>(product, q, block, to),
                    2 if whole => dots::<P, E, 2>(product, q, block, to),
                    4 if whole => dots::<P, E, 4>(product, q, block, to),
                    8 if whole => dots::<P, E, 8>(product, q, block, to),
                    16 if whole => dots::<P, E, 16>(product, q, block, to),
                    _ => dots_any::<P, E>(product, q, block, to),
                }
            }
            r += 1 + usize::from(pair);
        }
    }
    for r in 0..rows {
        let mut largest = s.splat(f32::NEG_INFINITY);
        for at in (0..keys.count().next_multiple_of(BLOCK)).step_by(P::S::LANES) {
            let bits = (visible[r][at / 64] >> (at % 64)) as u32;
            let row = out[r * KEY_TILE + at..][..P::S::LANES].as_mut_ptr();
            // SAFETY: a vector was sliced off just now.
            unsafe {
                let x = s.select(bits, s.load(row), s.splat(f32::NEG_INFINITY));
                s.store(row, x);
                largest = s.max(x, largest);
            }
        }
        max[r] = s.reduce_max(largest);
    }
}

/// Products of one query with up to 16 keys of exactly V vectors; the query stays in registers.
///
/// # Safety
/// `query` is valid for V vectors, `out` for 16 numbers.
#[inline(always)]
unsafe fn dots<P: Product, E: Element, const V: usize>(
    product: P,
    query: *const f32,
    keys: Rows<'_, E>,
    out: *mut f32,
) {
    const { assert!(V <= MAX_VECTORS) };
    let s = product.simd();
    // SAFETY: see the contract; key rows are V vectors wide.
    unsafe {
        let mut q = [s.splat(0.0); V];
        for (v, q) in q.iter_mut().enumerate() {
            *q = s.load(query.add(v * P::S::LANES));
        }
        let mut sums = [s.splat(0.0); BLOCK];
        for (j, sum) in sums.iter_mut().enumerate().take(keys.count()) {
            let key = keys.as_ptr().add(j * keys.stride());
            for (v, q) in q.iter().enumerate() {
                let x = product.load_cells(key.add(v * P::S::LANES * P::CELL));
                *sum = product.step(*q, x, *sum);
            }
        }
        s.sums(&sums, out);
    }
}

/// Like [`dots`] for two neighbouring query rows, which share each key that is loaded.
///
/// # Safety
/// `queries` is valid for two rows of V vectors, `out` for 16 numbers in each of two score rows.
#[inline(always)]
unsafe fn pair_dots<P: Product, E: Element, const V: usize>(
    product: P,
    queries: *const f32,
    keys: Rows<'_, E>,
    out: *mut f32,
) {
    const HALF: usize = BLOCK / 2;
    let s = product.simd();
    // SAFETY: see the contract; key rows are V vectors wide, a multiple of 16 numbers.
    unsafe {
        let second = queries.add(padded(keys.width()));
        for first in (0..keys.count()).step_by(HALF) {
            let mut sums = [s.splat(0.0); BLOCK];
            for j in 0..HALF.min(keys.count() - first) {
                let key = keys.as_ptr().add((first + j) * keys.stride());
                let (mut a, mut b) = (s.splat(0.0), s.splat(0.0));
                for v in 0..V {
                    let at = v * P::S::LANES;
                    let x = product.load_cells(key.add(at * P::CELL));
                    a = product.step(s.load(queries.add(at)), x, a);
                    b = product.step(s.load(second.add(at)), x, b);
                }
                (sums[j], sums[HALF + j]) = (a, b);
            }
            let mut both = [0.0f32; BLOCK];
            s.sums(&sums, both.as_mut_ptr());
            std::ptr::copy_nonoverlapping(both.as_ptr(), out.add(first), HALF);
            std::ptr::copy_nonoverlapping(both.as_ptr().add(HALF), out.add(KEY_TILE + first), HALF);
        }
    }
}

/// Like [`dots`] for keys of any width.
///
/// # Safety
/// `query` is valid for the width rounded up to 16, `out` for 16 numbers.
#[inline(always)]
unsafe fn dots_any<P: Product, E: Element>(
    product: P,
    query: *const f32,
    keys: Rows<'_, E>,
    out: *mut f32,
) {
    let s = product.simd();
    let cells = P::S::LANES * P::CELL;
    let (whole, tail) = (keys.width() / cells, keys.width() % cells);
    // SAFETY: see the contract; whole vectors and the tail lie inside each row.
    unsafe {
        let mut sums = [s.splat(0.0); BLOCK];
        for (j, sum) in sums.iter_mut().enumerate().take(keys.count()) {
            let key = keys.as_ptr().add(j * keys.stride());
            for v in 0..whole {
                let x = product.load_cells(key.add(v * cells));
                *sum = product.step(s.load(query.add(v * P::S::LANES)), x, *sum);
            }
            if tail > 0 {
                let x = product.load_cells_part(key.add(whole * cells), tail);
                *sum = product.step(s.load(query.add(whole * P::S::LANES)), x, *sum);
            }
        }
        s.sums(&sums, out);
    }
}

/// What [`row_values`] reads and writes.
#[derive(Debug)]
pub(crate) struct RowValues<'a, E> {
    /// Probabilities, `[row][KEY_TILE]`.
    pub(crate) probabilities: &'a [f32],
    /// The tile's values.
    pub(crate) values: Rows<'a, E>,
    /// What accumulators are multiplied by first; one per row.
    pub(crate) rescale: &'a [f32],
    /// Accumulators, `[row][width rounded up to 16]`.
    pub(crate) out: &'a mut [f32],
    /// Scratch of the same size.
    pub(crate) sums: &'a mut [f32],
}

dispatch! {
    /// O ← α O + P V.
    pub(crate) fn row_values<E: Element>(args: RowValues<'_, E>) = row_values_kernel
}

#[inline(always)]
fn row_values_kernel<S: Simd, E: Element>(s: S, args: RowValues<'_, E>) {
    let RowValues { probabilities, values, rescale, out, sums } = args;
    let (rows, width) = (rescale.len(), values.width());
    let stride = padded(width);
    assert!(probabilities.len() >= rows * KEY_TILE && values.count() <= KEY_TILE);
    assert!(out.len() >= rows * stride && sums.len() >= rows * stride);
    sums[..rows * stride].fill(0.0);
    for first in (0..values.count()).step_by(BLOCK) {
        let block = values.slice(first..(first + BLOCK).min(values.count()));
        let mut r = 0;
        while r < rows {
            let pair = r + 1 < rows;
            let p = probabilities[r * KEY_TILE + first..].as_ptr();
            let sum = sums[r * stride..].as_mut_ptr();
            let mut column = 0;
            while column < width {
                let left = (width - column) / S::LANES;
                // SAFETY: a row has `block.count()` probabilities and `width` sums padded to 16, and so
                // has the next one if it is taken along; columns end below the width.
                unsafe {
                    let at = Columns { block, column, p, sum: sum.add(column), stride };
                    column += match (left, pair) {
                        (0, false) => weigh::<S, E, 1, 1, true>(s, &at),
                        (1, false) => weigh::<S, E, 1, 1, false>(s, &at),
                        (2..4, false) => weigh::<S, E, 1, 2, false>(s, &at),
                        (4..8, false) => weigh::<S, E, 1, 4, false>(s, &at),
                        (_, false) => weigh::<S, E, 1, 8, false>(s, &at),
                        (0, true) => weigh::<S, E, 2, 1, true>(s, &at),
                        (1, true) => weigh::<S, E, 2, 1, false>(s, &at),
                        (2..4, true) => weigh::<S, E, 2, 2, false>(s, &at),
                        (4..8, true) => weigh::<S, E, 2, 4, false>(s, &at),
                        (_, true) => weigh::<S, E, 2, 8, false>(s, &at),
                    };
                }
            }
            r += 1 + usize::from(pair);
        }
    }
    for r in 0..rows {
        for at in (r * stride..(r + 1) * stride).step_by(S::LANES) {
            // SAFETY: strides are multiples of LANES and both buffers hold `rows` of them.
            unsafe {
                let (o, sum) = (out.as_mut_ptr().add(at), s.load(sums.as_ptr().add(at)));
                s.store(o, s.fma(s.splat(rescale[r]), s.load(o), sum));
            }
        }
    }
}

struct Columns<'a, E> {
    block: Rows<'a, E>,
    column: usize,
    p: *const f32,
    sum: *mut f32,
    stride: usize,
}

/// Adds a block of weighted values to V vectors of sums of R rows; returns how many numbers that
/// covers.
///
/// # Safety
/// `at.p` holds one number per row of the block in each of R score rows, the block's rows hold V vectors
/// (with TAIL, the rest of the row) from the column on, `at.sum` is valid for V vectors of R rows.
#[inline(always)]
unsafe fn weigh<S: Simd, E: Element, const R: usize, const V: usize, const TAIL: bool>(
    s: S,
    at: &Columns<'_, E>,
) -> usize {
    let rest = at.block.width() - at.column;
    // SAFETY: see the contract.
    unsafe {
        let mut sums = [[s.splat(0.0); V]; R];
        for r in 0..R {
            for v in 0..V {
                sums[r][v] = s.load(at.sum.add(r * at.stride + v * S::LANES));
            }
        }
        for j in 0..at.block.count() {
            let value = at.block.as_ptr().add(j * at.block.stride() + at.column);
            let mut p = [s.splat(0.0); R];
            for (r, p) in p.iter_mut().enumerate() {
                *p = s.splat(*at.p.add(r * KEY_TILE + j));
            }
            for v in 0..V {
                let from = value.add(v * S::LANES);
                let x = if TAIL { E::load_part(s, from, rest) } else { E::load(s, from) };
                for r in 0..R {
                    sums[r][v] = s.fma(p[r], x, sums[r][v]);
                }
            }
        }
        for r in 0..R {
            for v in 0..V {
                s.store(at.sum.add(r * at.stride + v * S::LANES), sums[r][v]);
            }
        }
    }
    V * S::LANES
}
