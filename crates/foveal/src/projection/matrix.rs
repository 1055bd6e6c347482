//! A stored matrix whose bytes fit its shape.

use super::{Format, RowError};
use crate::error::{Error, Result};
use crate::simd::projection::bytes_of;
use std::ops::Range;

/// The extents of a stored matrix, by name, so that they can't be swapped in silence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MatrixShape {
    /// Rows: numbers of a result.
    pub out_features: usize,
    /// Elements of a row: numbers of an input.
    pub in_features: usize,
}

/// A borrowed matrix `[out_features, in_features]` in its stored form.
#[derive(Debug, Clone, Copy)]
pub struct Matrix<'a> {
    format: Format,
    shape: MatrixShape,
    row_bytes: usize,
    bytes: &'a [u8],
}

impl<'a> Matrix<'a> {
    /// Views stored bytes, which need no alignment. Does not look at the numbers.
    ///
    /// # Errors
    /// [`Error::Row`] if a row is not a whole number of blocks; [`Error::MatrixBytes`] unless
    /// `bytes` is exactly the matrix.
    ///
    /// ```
    /// use foveal::projection::{Format, Matrix, MatrixShape};
    ///
    /// let shape = MatrixShape { out_features: 2, in_features: 64 };
    /// assert!(Matrix::new(Format::Q8_0, shape, &[0; 2 * 2 * 34]).is_ok());
    /// assert!(Matrix::new(Format::Q8_0, shape, &[0; 7]).is_err());
    /// ```
    pub fn new(format: Format, shape: MatrixShape, bytes: &'a [u8]) -> Result<Matrix<'a>> {
        let MatrixShape { out_features, in_features } = shape;
        let block_len = format.block_len();
        if !in_features.is_multiple_of(block_len) {
            return Err(RowError::PartialBlock { format, elements: in_features, block_len }.into());
        }
        let row_bytes = format.row_bytes(in_features).unwrap_or(usize::MAX);
        let expected = row_bytes.saturating_mul(out_features);
        if bytes.len() != expected {
            let got = bytes.len();
            return Err(Error::MatrixBytes { format, out_features, in_features, expected, got });
        }
        Ok(Matrix { format, shape, row_bytes, bytes })
    }

    /// Views numbers in memory, `[out_features, in_features]`, row-major.
    ///
    /// # Errors
    /// [`Error::MatrixBytes`] unless `numbers` is exactly the matrix.
    ///
    /// ```
    /// use foveal::projection::{Matrix, MatrixShape};
    ///
    /// let shape = MatrixShape { out_features: 2, in_features: 3 };
    /// assert!(Matrix::from_floats(shape, &[0.0; 6]).is_ok());
    /// assert!(Matrix::from_floats(shape, &[0.0; 5]).is_err());
    /// ```
    pub fn from_floats(shape: MatrixShape, numbers: &'a [f32]) -> Result<Matrix<'a>> {
        Matrix::new(Format::F32, shape, bytes_of(numbers))
    }

    /// The element format.
    pub fn format(&self) -> Format {
        self.format
    }

    /// The extents.
    pub fn shape(&self) -> MatrixShape {
        self.shape
    }

    /// All rows, one after the other.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    pub(super) fn row_bytes(&self) -> usize {
        self.row_bytes
    }

    pub(super) fn rows(&self, rows: Range<usize>) -> &'a [u8] {
        &self.bytes[rows.start * self.row_bytes..rows.end * self.row_bytes]
    }
}
