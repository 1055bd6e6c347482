//! All query rows of one head against at most one panel of 64 keys, from scores to outputs.
//!
//! The steps are those of [`tile`](super::tile), in the same order for each element, so that a row has the same bits
//! here as there; what is saved is everything around them.

use super::Simd;
use super::product::{Product, dispatch_form};
use super::tile::{
    self, GROUP, KEY_TILE, KeyWords, PANEL, Scores, Softmax, Values, Visible, padded,
};
use crate::element::Element;
use crate::exact::state::{log_sum_exp, reciprocal};
use crate::tensor::{HeadRows, Rows};

/// What [`short_head`] reads and writes.
#[derive(Debug)]
pub(crate) struct ShortHead<'a, E> {
    /// The head's queries, in cells.
    pub(crate) queries: Rows<'a, f32>,
    /// One packed panel of cells.
    pub(crate) keys: &'a [f32],
    /// Rows of cells.
    pub(crate) values: Rows<'a, f32>,
    /// Which keys each row sees; all if none.
    pub(crate) words: Option<&'a [KeyWords]>,
    /// Multiplies products into base-2 logits.
    pub(crate) factor: f32,
    /// [`scratch_floats`] of the value dimension.
    pub(crate) scratch: &'a mut [f32],
    /// Outputs, one row a query.
    pub(crate) out: HeadRows<'a, E>,
    /// Log-sum-exps, one a query.
    pub(crate) lse: Option<HeadRows<'a, f32>>,
}

/// Floats of scratch for a group of rows: scores and accumulators.
pub(crate) fn scratch_floats(value_dim: usize) -> usize {
    GROUP * (KEY_TILE + padded(value_dim))
}

dispatch_form! {
    /// Attends with all rows of a head; returns whether every result is finite.
    pub(crate) fn short_head<E: Element>(args: ShortHead<'_, E>) -> bool = short_head_kernel
}

#[inline(always)]
fn short_head_kernel<P: Product, E: Element>(product: P, args: ShortHead<'_, E>) -> bool {
    let s = product.simd();
    let ShortHead { queries, keys, values, words, factor, scratch, mut out, mut lse } = args;
    let (count, width) = (values.count() * P::CELL, values.width());
    let (depth, rows) = (queries.width(), queries.count());
    assert!(count <= PANEL && keys.len() == PANEL * depth);
    assert!(words.is_none_or(|words| words.len() == rows));
    let (scores, acc) = scratch.split_at_mut(GROUP * KEY_TILE);
    let size = tile::group_size(rows).max(1);
    let mut bad = s.splat(0.0);
    for first in (0..rows).step_by(size) {
        let n = size.min(rows - first);
        let visible = match words {
            Some(words) => Visible::Some(&words[first..first + n]),
            None => Visible::All(count),
        };
        let acc = &mut acc[..n * padded(width)];
        acc.fill(0.0);
        let (mut max, mut rescale) = ([0.0; GROUP], [0.0; GROUP]);
        let (mut running_max, mut running_sum) = ([f32::NEG_INFINITY; GROUP], [0.0; GROUP * 16]);
        let group = queries.slice(first..first + n);
        tile::scores_kernel(
            product,
            Scores {
                queries: group.as_slice(),
                stride: group.stride(),
                rows: n,
                depth,
                keys,
                visible,
                hidden: f32::NEG_INFINITY,
                out: scores,
                out_stride: KEY_TILE,
                max: &mut max,
            },
        );
        tile::softmax_kernel(
            s,
            Softmax {
                scores,
                max: &max,
                visible,
                factor,
                running_max: &mut running_max[..n],
                running_sum: &mut running_sum[..n * 16],
                rescale: &mut rescale,
            },
        );
        product.weights(&mut scores[..n * KEY_TILE], visible.all_steps());
        let probabilities = &*scores;
        tile::values_kernel(
            product,
            Values { probabilities, visible, values, rescale: &rescale, out: acc },
        );
        for (r, acc) in acc.chunks_exact(padded(width)).enumerate() {
            let sum = tile::lane_sum(&running_sum[r * 16..(r + 1) * 16]);
            bad = s.add(bad, finish_row(s, acc, sum, out.row(first + r)));
            if let Some(lse) = &mut lse {
                lse.row(first + r)[0] = log_sum_exp(running_max[r], sum);
            }
        }
    }
    s.sum(bad) == 0.0
}

/// Writes `acc / sum`; returns zeros if all of it is finite, else some NaN.
#[inline(always)]
fn finish_row<S: Simd, E: Element>(s: S, acc: &[f32], sum: f32, out: &mut [E]) -> S::F {
    let factor = s.splat(reciprocal(sum));
    // x · 0 is 0 for finite x and NaN otherwise.
    let mut bad = s.mul(s.splat(sum), s.splat(0.0));
    assert_eq!(acc.len(), padded(out.len()));
    for at in (0..out.len()).step_by(S::LANES) {
        let n = (out.len() - at).min(S::LANES);
        // SAFETY: the accumulator is padded; n elements of `out` are left.
        unsafe {
            let x = s.load(acc.as_ptr().add(at));
            bad = s.fma(x, s.splat(0.0), bad);
            E::store_part(s, out.as_mut_ptr().add(at), s.mul(x, factor), n);
        }
    }
    bad
}
