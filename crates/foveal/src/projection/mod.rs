//! The matrices around attention, held in the form in which their file stores them.
//!
//! A weight matrix is `[out_features, in_features]`, row-major. Each row is a whole number of the blocks that
//! [`Format`] describes.

mod format;

pub use format::Format;
