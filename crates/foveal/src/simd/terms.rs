//! One row of scores between the product and the softmax: cap, biases, mask, largest score.
//!
//! ```text
//! t = cap · tanh(scale s / cap)  (or scale s)      t ← (t + bias − slope |i − j|) · log2 e      −∞ where masked
//! ```
//!
//! The row lies in L1, so that a term costs its arithmetic only. Biases are read where they lie.

use super::tile::{KEY_TILE, KeyWords, PANEL, STEP, Steps};
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

/// What [`finish_row`] reads and writes.
#[derive(Debug)]
pub(crate) struct RowTerms<'a> {
    /// In: products of query and keys; out: logits in base 2, −∞ where masked. `[KEY_TILE]`.
    pub(crate) scores: &'a mut [f32],
    /// The steps of 16 keys to be finished; the others are untouched.
    pub(crate) steps: Steps,
    /// Which keys count; all if none.
    pub(crate) visible: Option<&'a KeyWords>,
    /// Multiplies products into scores.
    pub(crate) scale: f32,
    /// The bound that scores are bent towards.
    pub(crate) cap: Option<f32>,
    /// Subtracted for each position between query and key.
    pub(crate) slope: f32,
    /// The first key's position less the query's.
    pub(crate) distance: f32,
    /// Added to scores; keys beyond its end get nothing.
    pub(crate) bias: Option<&'a [f32]>,
    /// Out: dt/ds of the cap, 1 − tanh², where it is asked for. `[KEY_TILE]`.
    pub(crate) bend: Option<&'a mut [f32]>,
}

dispatch! {
    /// Finishes a row of scores and returns the largest, −∞ if there is none.
    pub(crate) fn finish_row(args: RowTerms<'_>) -> f32 = finish_row_kernel
}

#[inline(always)]
fn finish_row_kernel<S: Simd>(s: S, args: RowTerms<'_>) -> f32 {
    match (args.cap.is_some(), args.bias.is_some()) {
        (false, false) => finish::<S, false, false>(s, args),
        (false, true) => finish::<S, false, true>(s, args),
        (true, false) => finish::<S, true, false>(s, args),
        (true, true) => finish::<S, true, true>(s, args),
    }
}

#[inline(always)]
fn finish<S: Simd, const CAP: bool, const BIAS: bool>(s: S, mut args: RowTerms<'_>) -> f32 {
    assert!(args.scores.len() >= KEY_TILE);
    assert!(args.bend.as_ref().is_none_or(|bend| bend.len() >= KEY_TILE));
    let cap = args.cap.unwrap_or(1.0);
    let scale = s.splat(if CAP { args.scale / cap } else { args.scale * LOG2_E });
    let (cap, slope) = (s.splat(cap * LOG2_E), s.splat(-args.slope * LOG2_E));
    let bias = args.bias.unwrap_or(&[]);
    // SAFETY: LANE holds 16 >= LANES numbers.
    let lane = unsafe { s.load(LANE.as_ptr()) };
    let mut largest = s.splat(f32::NEG_INFINITY);
    for (panel, &(first, end)) in args.steps.iter().enumerate() {
        for v in first * STEP / S::LANES..end * STEP / S::LANES {
            let at = panel * PANEL + v * S::LANES;
            // SAFETY: steps lie inside the row's KEY_TILE numbers.
            let mut x = s.mul(unsafe { s.load(args.scores.as_ptr().add(at)) }, scale);
            if CAP {
                let tanh = math::tanh(s, x);
                if let Some(bend) = &mut args.bend {
                    let minus = s.sub(s.splat(0.0), tanh);
                    // SAFETY: as long as the scores.
                    unsafe { s.store(bend.as_mut_ptr().add(at), s.fma(minus, tanh, s.splat(1.0))) };
                }
                x = s.mul(tanh, cap);
            }
            if args.slope != 0.0 {
                let ahead = s.add(lane, s.splat(args.distance + at as f32));
                let distance = s.max(ahead, s.sub(s.splat(0.0), ahead));
                x = s.fma(distance, slope, x);
            }
            if BIAS && at < bias.len() {
                let left = bias.len() - at;
                // SAFETY: `left` numbers are left.
                let term = unsafe {
                    let p = bias.as_ptr().add(at);
                    if left >= S::LANES { s.load(p) } else { s.load_part(p, left) }
                };
                x = s.fma(term, s.splat(LOG2_E), x);
            }
            if let Some(words) = args.visible {
                let bits = (words[at / 64] >> (at % 64)) as u32;
                x = s.select(bits, x, s.splat(f32::NEG_INFINITY));
            }
            largest = s.max(x, largest);
            // SAFETY: as the load.
            unsafe { s.store(args.scores.as_mut_ptr().add(at), x) };
        }
    }
    s.reduce_max(largest)
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
