//! The row kernels: a few query rows against one key tile as it lies in memory.
//!
//! A generated token reads every key and value once and computes little with them, so order of access
//! is everything: rows are read from end to end, 16 keys at a time, and the block is reused from L1 by
//! the other query rows. A score is one chain of products over d, summed over lanes by a fixed tree; an
//! output is one chain over the keys of a tile. Neither depends on how many rows share the call.

use super::tile::{KEY_TILE, KeyWords, padded};
use super::{Simd, dispatch};
use crate::element::Element;
use crate::tensor::Rows;

/// Keys that are read before the next query row takes its turn.
const BLOCK: usize = 16;
/// Vectors of one query that stay in registers.
const MAX_VECTORS: usize = 16;

/// What [`row_scores`] reads and writes.
#[derive(Debug)]
pub(crate) struct RowScores<'a, E> {
    /// Query rows, each padded with zeros to a multiple of 16 numbers.
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

#[inline(always)]
fn row_scores_kernel<S: Simd, E: Element>(s: S, args: RowScores<'_, E>) {
    let RowScores { queries, keys, visible, out, max } = args;
    let (rows, width) = (visible.len(), keys.width());
    let stride = padded(width);
    assert!(queries.len() >= rows * stride && out.len() >= rows * KEY_TILE && max.len() == rows);
    assert!(keys.count() <= KEY_TILE);
    for first in (0..keys.count()).step_by(BLOCK) {
        let block = keys.slice(first..(first + BLOCK).min(keys.count()));
        for r in 0..rows {
            let query = queries[r * stride..][..stride].as_ptr();
            let to = out[r * KEY_TILE + first..][..BLOCK].as_mut_ptr();
            // SAFETY: the query holds `width` numbers padded to 16, `to` holds 16.
            unsafe {
                match width {
                    _ if width == 2 * S::LANES => dots::<S, E, 2>(s, query, block, to),
                    _ if width == 4 * S::LANES => dots::<S, E, 4>(s, query, block, to),
                    _ if width == 8 * S::LANES => dots::<S, E, 8>(s, query, block, to),
                    _ if width == 16 * S::LANES => dots::<S, E, 16>(s, query, block, to),
                    _ => dots_any::<S, E>(s, query, block, to),
                }
            }
        }
    }
    for r in 0..rows {
        let mut largest = s.splat(f32::NEG_INFINITY);
        for at in (0..keys.count().next_multiple_of(BLOCK)).step_by(S::LANES) {
            let bits = (visible[r][at / 64] >> (at % 64)) as u32;
            let row = out[r * KEY_TILE + at..][..S::LANES].as_mut_ptr();
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
unsafe fn dots<S: Simd, E: Element, const V: usize>(
    s: S,
    query: *const f32,
    keys: Rows<'_, E>,
    out: *mut f32,
) {
    const { assert!(V <= MAX_VECTORS) };
    // SAFETY: see the contract; key rows are V vectors wide.
    unsafe {
        let mut q = [s.splat(0.0); V];
        for (v, q) in q.iter_mut().enumerate() {
            *q = s.load(query.add(v * S::LANES));
        }
        let mut sums = [s.splat(0.0); BLOCK];
        for (j, sum) in sums.iter_mut().enumerate().take(keys.count()) {
            let key = keys.as_ptr().add(j * keys.stride());
            for (v, q) in q.iter().enumerate() {
                *sum = s.fma(*q, E::load(s, key.add(v * S::LANES)), *sum);
            }
        }
        s.sums(&sums, out);
    }
}

/// Like [`dots`] for keys of any width.
///
/// # Safety
/// `query` is valid for the width rounded up to 16, `out` for 16 numbers.
#[inline(always)]
unsafe fn dots_any<S: Simd, E: Element>(s: S, query: *const f32, keys: Rows<'_, E>, out: *mut f32) {
    let (whole, tail) = (keys.width() / S::LANES, keys.width() % S::LANES);
    // SAFETY: see the contract; whole vectors and the tail lie inside each row.
    unsafe {
        let mut sums = [s.splat(0.0); BLOCK];
        for (j, sum) in sums.iter_mut().enumerate().take(keys.count()) {
            let key = keys.as_ptr().add(j * keys.stride());
            for v in 0..whole {
                let at = v * S::LANES;
                *sum = s.fma(s.load(query.add(at)), E::load(s, key.add(at)), *sum);
            }
            if tail > 0 {
                let at = whole * S::LANES;
                *sum = s.fma(s.load(query.add(at)), E::load_part(s, key.add(at), tail), *sum);
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
        for r in 0..rows {
            let p = probabilities[r * KEY_TILE + first..][..block.count()].as_ptr();
            let sum = sums[r * stride..][..stride].as_mut_ptr();
            let mut column = 0;
            while column < width {
                let left = width - column;
                // SAFETY: `block.count()` probabilities; columns below the width, sums padded to 16.
                unsafe {
                    let at = Columns { block, column, p, sum: sum.add(column) };
                    column += match left / S::LANES {
                        0 => weigh::<S, E, 1, true>(s, &at),
                        1 => weigh::<S, E, 1, false>(s, &at),
                        2..4 => weigh::<S, E, 2, false>(s, &at),
                        4..8 => weigh::<S, E, 4, false>(s, &at),
                        _ => weigh::<S, E, 8, false>(s, &at),
                    };
                }
            }
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
}

/// Adds a block of weighted values to V vectors of sums; returns how many numbers that covers.
///
/// # Safety
/// `at.p` holds one number per row of the block, the rows hold V vectors (with TAIL, the rest of the
/// row) from the column on, `at.sum` is valid for V vectors.
#[inline(always)]
unsafe fn weigh<S: Simd, E: Element, const V: usize, const TAIL: bool>(
    s: S,
    at: &Columns<'_, E>,
) -> usize {
    let rest = at.block.width() - at.column;
    // SAFETY: see the contract.
    unsafe {
        let mut sums = [s.splat(0.0); V];
        for (v, sum) in sums.iter_mut().enumerate() {
            *sum = s.load(at.sum.add(v * S::LANES));
        }
        for j in 0..at.block.count() {
            let p = s.splat(*at.p.add(j));
            let value = at.block.as_ptr().add(j * at.block.stride() + at.column);
            for (v, sum) in sums.iter_mut().enumerate() {
                let from = value.add(v * S::LANES);
                let x = if TAIL { E::load_part(s, from, rest) } else { E::load(s, from) };
                *sum = s.fma(p, x, *sum);
            }
        }
        for (v, sum) in sums.iter().enumerate() {
            s.store(at.sum.add(v * S::LANES), *sum);
        }
    }
    V * S::LANES
}
