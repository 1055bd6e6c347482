//! The matrices around attention, held in the form in which their file stores them.
//!
//! A weight matrix is `[out_features, in_features]`, row-major. Each row is a whole number of the
//! blocks that [`Format`] describes; [`dequantize_row`] says what they mean, [`quantize_row`] makes them. [`project`] computes
//!
//! ```text
//! y[r, n] = Σ_k W[n, k] · x[r, k]
//! ```
//!
//! in f32 without ever expanding the matrix as a whole: 2 · rows · out_features · in_features
//! operations, and each stored byte read from memory once. [`project_many`] does it for several
//! matrices of one input, [`embed`] reads rows, [`project_backward`] computes gradients.
//!
//! With s and m a block's scale and minimum, c the middle of its integers q, and K = in_features,
//! the absolute error of a result is at most
//!
//! ```text
//! 2⁻²⁴ · n · Σ_k (|s (q − c)| + |m + s c|) · |x_k|
//! ```
//!
//! with n = K / 32 + 16 for generated rows and n = min(K, 256) + K / 256 + 4 for prompts; for plain
//! floats the bracket is |W\[n, k\]|. (Inputs below 2⁻¹¹⁰ may lose bits besides.)
//!
//! [`Activations`] other than f32 add to it: pairs of bf16 at most (2⁻⁷ + 2⁻¹⁶) Σ_k |W\[n, k\] · x_k|, both factors being
//! rounded (and subnormal ones taken for zero); 8-bit integers Σ |W\[n, k\]| · max |x| / 254 over runs of 32, and eight times
//! the rounding of sums, whose integers are not centred.

mod backward;
mod dequantize;
mod embed;
mod format;
mod matrix;
mod project;
mod quantize;

pub use backward::{
    ProjectionBackward, ProjectionGradients, backward_workspace_bytes, project_backward,
    project_backward_as,
};
pub use dequantize::{RowError, dequantize_row};
pub use embed::embed;
pub use format::Format;
pub use matrix::{Matrix, MatrixShape};
pub use project::{
    Activations, Call, Input, Output, Projection, project, project_many, workspace_bytes,
};
pub use quantize::{QuantizeError, quantize_row};

#[cfg(target_endian = "big")]
compile_error!("stored matrices are little-endian and are read in place");
