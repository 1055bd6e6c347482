//! Rotation of pairs of numbers, all heads of all tokens in one call.
//!
//! Plain loops that the compiler vectorises for each level: products and sums are rounded one by one,
//! so every level gives the same bits.

use super::{Simd, dispatch};
use crate::tensor::TensorMut;

/// What to rotate by: for each token a row of cosines and then one of sines, each times a factor.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Angles<'a> {
    /// `[rows][cos, sin][pairs]`; `x.seq` rows shared by all sequences, or `x.batch · x.seq`.
    pub(crate) rows: &'a [f32],
    /// Pairs of a row.
    pub(crate) pairs: usize,
    /// Factor of the cosines.
    pub(crate) cos: f32,
    /// Factor of the sines.
    pub(crate) sin: f32,
    /// Pairs are neighbours; else the second half follows the first.
    pub(crate) interleaved: bool,
}

dispatch! {
    /// Rotates the first `2 · pairs` numbers of every head in place.
    pub(crate) fn rotate(x: TensorMut<'_, f32>, angles: Angles<'_>) = rotate_kernel
}

#[inline(always)]
fn rotate_kernel<S: Simd>(_: S, mut x: TensorMut<'_, f32>, angles: Angles<'_>) {
    let shape = x.shape();
    let mut rows = angles.rows.chunks_exact(2 * angles.pairs).cycle();
    for batch in 0..shape.batch {
        for (seq, row) in (0..shape.seq).zip(&mut rows) {
            let (cos, sin) = row.split_at(angles.pairs);
            for head in 0..shape.heads {
                let x = &mut x.row_mut(batch, seq, head)[..2 * angles.pairs];
                if angles.interleaved {
                    rotate_neighbours(x, cos, sin, angles);
                } else {
                    rotate_halves(x, cos, sin, angles);
                }
            }
        }
    }
}

#[inline(always)]
fn rotate_neighbours(x: &mut [f32], cos: &[f32], sin: &[f32], angles: Angles<'_>) {
    for ((pair, cos), sin) in x.as_chunks_mut::<2>().0.iter_mut().zip(cos).zip(sin) {
        let ([a, b], cos, sin) = (*pair, cos * angles.cos, sin * angles.sin);
        *pair = [a * cos - b * sin, b * cos + a * sin];
    }
}

#[inline(always)]
fn rotate_halves(x: &mut [f32], cos: &[f32], sin: &[f32], angles: Angles<'_>) {
    let (first, second) = x.split_at_mut(cos.len());
    for (((x, y), cos), sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
        let (a, b, cos, sin) = (*x, *y, cos * angles.cos, sin * angles.sin);
        (*x, *y) = (a * cos - b * sin, b * cos + a * sin);
    }
}
