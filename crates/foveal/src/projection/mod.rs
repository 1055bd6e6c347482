//! The matrices around attention, held in the form in which their file stores them.
//!
//! A weight matrix is `[out_features, in_features]`, row-major. Each row is a whole number of the blocks that
//! [`Format`] describes; [`dequantize_row`] says what they mean.

mod dequantize;
mod format;

pub use dequantize::{RowError, dequantize_row};
pub use format::Format;
#[allow(clippy::all, missing_docs, clippy::undocumented_unsafe_blocks)]
mod standin;
pub use standin::{Matrix, project};
