//! Rows of a stored matrix by number: token embeddings.

use super::Matrix;
use crate::error::{Error, Result};
use crate::simd::{Level, projection::dequantize::dequantize};

/// Writes row `tokens[i]` of `table` to row `i` of `out`, `[tokens.len(), in_features]`.
/// The values are those of [`super::dequantize_row`] (but for the sign of a zero). Does not allocate.
///
/// # Errors
/// [`Error::OutOfRange`] for a token at or beyond the table's `out_features`;
/// [`Error::LengthMismatch`] if `out` has another length. `out` is then unchanged.
pub fn embed(table: &Matrix<'_>, tokens: &[u32], out: &mut [f32], level: Level) -> Result<()> {
    let shape = table.shape();
    let expected = tokens.len().saturating_mul(shape.in_features);
    if out.len() != expected {
        let (what, got) = ("rows of embeddings", out.len());
        return Err(Error::LengthMismatch { what, expected, got });
    }
    if let Some(&token) = tokens.iter().find(|&&token| token as usize >= shape.out_features) {
        let (got, limit) = (token as usize, shape.out_features);
        return Err(Error::OutOfRange { what: "token", got, limit });
    }
    for (&token, row) in tokens.iter().zip(out.chunks_exact_mut(shape.in_features.max(1))) {
        let token = token as usize;
        dequantize(level, table.format(), table.rows(token..token + 1), row);
    }
    Ok(())
}
