//! Rows turned into columns, a square of vectors at a time.

use crate::simd::{Simd, dispatch};
use crate::tensor::Rows;

dispatch! {
    /// `out[c * stride + r] = rows[r][c]`; the other numbers of `out` are left alone.
    pub(crate) fn transpose(rows: Rows<'_, f32>, out: &mut [f32], stride: usize) = transpose_kernel
}

#[inline(always)]
fn transpose_kernel<S: Simd>(s: S, rows: Rows<'_, f32>, out: &mut [f32], stride: usize) {
    let (count, width) = (rows.count(), rows.width());
    if count == 0 || width == 0 {
        return;
    }
    assert!(count <= stride && (width - 1) * stride + count <= out.len());
    for first in (0..count).step_by(S::LANES) {
        let taken = (count - first).min(S::LANES);
        for column in (0..width).step_by(S::LANES) {
            let lanes = (width - column).min(S::LANES);
            let mut square = [s.splat(0.0); 16];
            for (r, row) in square.iter_mut().enumerate().take(taken) {
                // SAFETY: row first + r < count starts at its stride and has `lanes` numbers from
                // `column` on.
                *row = unsafe {
                    let p = rows.as_ptr().add((first + r) * rows.stride() + column);
                    if lanes == S::LANES { s.load(p) } else { s.load_part(p, lanes) }
                };
            }
            s.transpose(&mut square);
            for (c, &vector) in square.iter().enumerate().take(lanes) {
                // SAFETY: column + c < width and first + taken <= count, which fit `out`.
                unsafe {
                    let p = out.as_mut_ptr().add((column + c) * stride + first);
                    if taken == S::LANES {
                        s.store(p, vector)
                    } else {
                        s.store_part(p, vector, taken)
                    }
                }
            }
        }
    }
}
