//! RMSNorm: y = x · w / √(mean(x²) + ε), for every row of D numbers.
//!
//! Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019. GGUF files of models that
//! define the weight as 1 + w hold the sum.

use super::same_length;
use crate::error::{Error, Result};
use crate::simd::{Level, nn};

/// The parameters of one normalisation.
#[derive(Debug, Clone, Copy)]
pub struct RmsNorm<'a> {
    /// One factor for each of a row's D numbers.
    pub weight: &'a [f32],
    /// ε, added to the mean of squares.
    pub epsilon: f32,
}

/// Normalises the rows of `x`, `[rows, D]`, into `y` of the same length.
///
/// # Errors
/// [`Error::LengthMismatch`] if `y` has another length, or it is not a whole number of rows.
pub fn rms_norm(norm: RmsNorm<'_>, x: &[f32], y: &mut [f32], level: Level) -> Result<()> {
    same_length("normalised rows", x.len(), y.len())?;
    check_rows(norm, x.len())?;
    y.copy_from_slice(x);
    rms_norm_in_place(norm, y, level)
}

/// [`rms_norm`] with the rows themselves as the result.
///
/// # Errors
/// [`Error::LengthMismatch`] if `rows` is not a whole number of rows.
pub fn rms_norm_in_place(norm: RmsNorm<'_>, rows: &mut [f32], level: Level) -> Result<()> {
    check_rows(norm, rows.len())?;
    let width = norm.weight.len();
    for row in rows.chunks_exact_mut(width.max(1)) {
        let mean = nn::sum_squares(level, row) / width as f32;
        nn::scale_by(level, row, 1.0 / (mean + norm.epsilon).sqrt(), norm.weight);
    }
    Ok(())
}

fn check_rows(norm: RmsNorm<'_>, got: usize) -> Result<()> {
    let width = norm.weight.len();
    if got.is_multiple_of(width) {
        return Ok(());
    }
    let expected = got.checked_div(width).map_or(0, |rows| rows * width);
    Err(Error::LengthMismatch { what: "whole rows to normalise", expected, got })
}
