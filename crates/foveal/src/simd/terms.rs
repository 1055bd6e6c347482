//! A group of rows of scores between the product and the softmax: cap, biases, mask, largest score.
//!
//! ```text
//! s ← s + product by distance
//! t = cap · tanh(scale s / cap)  (or scale s)      t ← (t + bias − slope |i − j|) · log2 e      −∞ where masked
//! ```
//!
//! The rows lie in L1, so that a term costs its arithmetic only. Biases are read where they lie.

use super::tile::{GROUP, KEY_TILE, PANEL, STEP, Visible};
use super::{Simd, dispatch, math};
use std::f32::consts::LOG2_E;

/// The numbers of the lanes.
pub(super) const LANE: [f32; 16] = {
    let mut lane = [0.0; 16];
    let mut n = 0;
    while n < 16 {
        lane[n] = n as f32;
        n += 1;
    }
    lane
};

/// What [`finish_group`] reads and writes.
#[derive(Debug)]
pub(crate) struct GroupTerms<'a> {
    /// In: products of query and keys; out: logits in base 2, −∞ where masked. `[row][KEY_TILE]`.
    pub(crate) scores: &'a mut [f32],
    /// Which keys count; steps of 16 that no row sees are untouched.
    pub(crate) visible: Visible<'a>,
    /// Multiplies products into scores.
    pub(crate) scale: f32,
    /// The bound that scores are bent towards.
    pub(crate) cap: Option<f32>,
    /// The rows' own terms, at most [`GROUP`].
    pub(crate) rows: &'a [RowTerms<'a>],
    /// Out: the largest logit of each row, −∞ if there is none.
    pub(crate) max: &'a mut [f32; GROUP],
    /// Out: dt/ds of the cap, 1 − tanh², where it is asked for. `[row][KEY_TILE]`.
    pub(crate) bend: Option<&'a mut [f32]>,
}

/// What differs from row to row.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct RowTerms<'a> {
    /// Added to products: KEY_TILE numbers, or none.
    pub(crate) product: &'a [f32],
    /// Subtracted for each position between query and key.
    pub(crate) slope: f32,
    /// The first key's position less the query's.
    pub(crate) distance: f32,
    /// Added to scores; keys beyond its end get nothing.
    pub(crate) bias: &'a [f32],
}

impl RowTerms<'_> {
    /// Whether products by distance are as many as scores, if there are any.
    #[inline(always)]
    fn fits(&self) -> bool {
        self.product.is_empty() || self.product.len() >= KEY_TILE
    }
}

dispatch! {
    /// Finishes the scores of a group of rows.
    pub(crate) fn finish_group(args: GroupTerms<'_>) = finish_group_kernel
}

#[inline(always)]
fn finish_group_kernel<S: Simd>(s: S, args: GroupTerms<'_>) {
    match (args.cap.is_some(), args.rows.iter().any(|row| !row.bias.is_empty())) {
        (false, false) => finish::<S, false, false>(s, args),
        (false, true) => finish::<S, false, true>(s, args),
        (true, false) => finish::<S, true, false>(s, args),
        (true, true) => finish::<S, true, true>(s, args),
    }
}

#[inline(always)]
fn finish<S: Simd, const CAP: bool, const BIAS: bool>(s: S, mut args: GroupTerms<'_>) {
    let (rows, steps) = (args.rows.len(), args.visible.all_steps());
    assert!(rows <= GROUP && args.scores.len() >= rows * KEY_TILE);
    assert!(args.bend.as_ref().is_none_or(|bend| bend.len() >= rows * KEY_TILE));
    assert!(args.rows.iter().all(RowTerms::fits));
    let cap = args.cap.unwrap_or(1.0);
    let scale = s.splat(if CAP { args.scale / cap } else { args.scale * LOG2_E });
    let cap = s.splat(cap * LOG2_E);
    for (r, &row) in args.rows.iter().enumerate() {
        let words = args.visible.row(r);
        let scores = args.scores[r * KEY_TILE..][..KEY_TILE].as_mut_ptr();
        let bend = args.bend.as_mut().map(|bend| bend[r * KEY_TILE..][..KEY_TILE].as_mut_ptr());
        let mut largest = s.splat(f32::NEG_INFINITY);
        for (panel, &(first, end)) in steps.iter().enumerate() {
            for v in first * STEP / S::LANES..end * STEP / S::LANES {
                let at = panel * PANEL + v * S::LANES;
                // SAFETY: steps lie inside the row's KEY_TILE numbers.
                let mut x = unsafe { s.load(scores.add(at)) };
                if !row.product.is_empty() {
                    // SAFETY: as long as the scores.
                    x = s.add(x, unsafe { s.load(row.product.as_ptr().add(at)) });
                }
                x = s.mul(x, scale);
                if CAP {
                    let tanh = math::tanh(s, x);
                    if let Some(bend) = bend {
                        let minus = s.sub(s.splat(0.0), tanh);
                        // SAFETY: as long as the scores.
                        unsafe { s.store(bend.add(at), s.fma(minus, tanh, s.splat(1.0))) };
                    }
                    x = s.mul(tanh, cap);
                }
                if row.slope != 0.0 {
                    x = s.fma(
                        distances(s, row.distance + at as f32),
                        s.splat(-row.slope * LOG2_E),
                        x,
                    );
                }
                if BIAS && at < row.bias.len() {
                    let left = row.bias.len() - at;
                    // SAFETY: `left` numbers are left.
                    let term = unsafe {
                        let p = row.bias.as_ptr().add(at);
                        if left >= S::LANES { s.load(p) } else { s.load_part(p, left) }
                    };
                    x = s.fma(term, s.splat(LOG2_E), x);
                }
                if let Some(words) = words {
                    let bits = (words[at / 64] >> (at % 64)) as u32;
                    x = s.select(bits, x, s.splat(f32::NEG_INFINITY));
                }
                largest = s.max(x, largest);
                // SAFETY: as the load.
                unsafe { s.store(scores.add(at), x) };
            }
        }
        args.max[r] = s.reduce_max(largest);
    }
}

/// How far the keys are from the query of which the first is so far ahead.
#[inline(always)]
fn distances<S: Simd>(s: S, first: f32) -> S::F {
    // SAFETY: LANE holds 16 >= LANES numbers.
    let ahead = s.add(unsafe { s.load(LANE.as_ptr()) }, s.splat(first));
    s.max(ahead, s.sub(s.splat(0.0), ahead))
}

/// Which weights of a row survive dropout, and by what they are multiplied.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RowDropout {
    /// The row's two keys.
    pub(crate) keys: [u32; 2],
    /// The position of the first weight.
    pub(crate) first: usize,
    /// A weight survives if its 32 random bits are at most this.
    pub(crate) most: u32,
    /// 1 / probability to survive.
    pub(crate) factor: f32,
}

impl RowDropout {
    /// Whether the weight of the key at position `j` survives.
    #[inline(always)]
    pub(crate) fn keeps(self, j: usize) -> bool {
        random_bits(self.keys, j as u32) <= self.most
    }
}

dispatch! {
    /// Multiplies each weight of a row by 0 or 1/keep.
    pub(crate) fn drop_row(row: RowDropout, weights: &mut [f32]) = drop_row_kernel
}

#[inline(always)]
fn drop_row_kernel<S: Simd>(_: S, row: RowDropout, weights: &mut [f32]) {
    for (n, weight) in weights.iter_mut().enumerate() {
        *weight = if row.keeps(row.first + n) { *weight * row.factor } else { 0.0 };
    }
}

/// 32 bits for counter `j` under two keys: multiplications and shifts that each mix the whole word
/// (the constants are those of C. Wellons' hash with the least bias), keyed before and between.
#[inline(always)]
fn random_bits([first, second]: [u32; 2], j: u32) -> u32 {
    let mut x = j ^ first;
    x = (x ^ (x >> 16)).wrapping_mul(0x7feb_352d);
    x = (x ^ (x >> 15)).wrapping_mul(0x846c_a68b);
    x = (x ^ (x >> 16)) ^ second;
    x = (x ^ (x >> 16)).wrapping_mul(0x7feb_352d);
    x = (x ^ (x >> 15)).wrapping_mul(0x846c_a68b);
    x ^ (x >> 16)
}
