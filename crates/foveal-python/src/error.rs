//! Why a call was refused, and the exception that says so.

use crate::dlpack::DataType;
use pyo3::PyErr;
use pyo3::exceptions::{PyMemoryError, PyNotImplementedError, PyTypeError, PyValueError};

/// The result of a call.
pub(crate) type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a call was refused. Nothing has been written then.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("{what}: expected {expected}, got {}", .got.name())]
    Dtype { what: &'static str, expected: String, got: DataType },
    #[error("{what}: expected an array of {expected} axes, {meaning}, got {got} axes")]
    Axes { what: &'static str, expected: usize, meaning: &'static str, got: usize },
    #[error(
        "{what}: the last axis has to be contiguous, its stride is {got}; make a copy with .contiguous() (PyTorch) or \
         np.ascontiguousarray"
    )]
    LastAxis { what: &'static str, got: i64 },
    #[error("{what}: a stride of {got} goes backwards; make a copy")]
    Backwards { what: &'static str, got: i64 },
    #[error(
        "{what}: has to be contiguous; make a copy with .contiguous() (PyTorch) or np.ascontiguousarray"
    )]
    Contiguous { what: &'static str },
    #[error("{what}: its address is no multiple of the size of its elements")]
    Misaligned { what: &'static str },
    #[error("{what} is needed")]
    Missing { what: &'static str },
    #[error("{what}: {got} axes; at most 4 are understood")]
    TooManyAxes { what: &'static str, got: i32 },
    #[error("{what} is read-only, but the result is to be written there")]
    ReadOnly { what: &'static str },
    #[error("{what} shares memory with {other}, which is read while it is written")]
    Shared { what: &'static str, other: &'static str },
    #[error("{what}: expected the shape {expected:?}, got {got:?}")]
    Shape { what: &'static str, expected: Vec<usize>, got: Vec<usize> },
    #[error("{what} = {got}: expected {expected}")]
    Option { what: &'static str, expected: &'static str, got: String },
    #[error("{what} has no gradients")]
    NoBackward { what: &'static str },
    #[error(transparent)]
    Foveal(#[from] foveal::Error),
}

impl From<Error> for PyErr {
    fn from(error: Error) -> PyErr {
        let text = error.to_string();
        match error {
            Error::Dtype { .. } => PyTypeError::new_err(text),
            Error::NoBackward { .. } => PyNotImplementedError::new_err(text),
            Error::Foveal(foveal::Error::OutOfMemory { .. }) => PyMemoryError::new_err(text),
            _ => PyValueError::new_err(text),
        }
    }
}
