//! Dropout of rows of activations, whose zeros can be made again from a seed.
//!
//! ```text
//! y_r = x_r ∘ m_r / (1 − rate)      m: 0 with probability `rate`, else 1
//! ```
//!
//! Random bits depend on the seed, the row's number and the column, and on nothing else: nothing is stored for backward,
//! which is the same call on the gradient. Srivastava et al. 2014; Vaswani et al. 2017, §5.4.

use super::same_length;
use crate::error::{Error, Result};
use crate::exact::terms::Dropout;
use crate::simd::Level;
use crate::simd::terms::drop_row;

/// Drops numbers of rows `x`, `[rows, width]`, of which the first is row number `first`.
///
/// # Errors
/// [`Error::LengthMismatch`] unless `x` is whole rows; [`Error::InvalidParameter`] for a rate outside 0 to 1. Nothing is
/// written then.
pub fn dropout(
    of: Dropout,
    x: &mut [f32],
    (first, width): (usize, usize),
    level: Level,
) -> Result<()> {
    if !(0.0..1.0).contains(&of.rate) {
        let (what, expected, got) = ("dropout rate", "0 to 1, without 1", of.rate.to_string());
        return Err(Error::InvalidParameter { what, expected, got });
    }
    same_length("whole rows", x.len() / width.max(1) * width, x.len())?;
    for (n, row) in x.chunks_exact_mut(width.max(1)).enumerate() {
        drop_row(level, of.row((0, 0), (first + n) as isize), row);
    }
    Ok(())
}
