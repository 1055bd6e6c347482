//! Statuses, the text of a thread's last error, and the border that no panic crosses.

use foveal::DType;
use std::any::Any;
use std::cell::RefCell;
use std::ffi::{CString, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// What a call returns: `FOVEAL_OK`, or why it was refused. A refused call has written nothing, except after
/// `FOVEAL_PANIC`; `foveal_last_error_message` says in words what was found and what was expected.
pub type foveal_status = i32;

/// Done.
pub const FOVEAL_OK: foveal_status = 0;
/// A pointer is NULL where something has to be.
pub const FOVEAL_NULL_POINTER: foveal_status = 1;
/// A pointer is not aligned for what it points to.
pub const FOVEAL_MISALIGNED: foveal_status = 2;
/// A number of a tag (a dtype, a kind) that means nothing.
pub const FOVEAL_UNKNOWN_VALUE: foveal_status = 3;
/// A tensor is stored in another type than it has to be.
pub const FOVEAL_DTYPE_MISMATCH: foveal_status = 4;
/// Extents and strides, or what a call needs for them, exceed the address space.
pub const FOVEAL_SHAPE_OVERFLOW: foveal_status = 5;
/// Something that is written shares memory with itself or with something else.
pub const FOVEAL_OVERLAP: foveal_status = 6;
/// Two shapes that have to agree do not.
pub const FOVEAL_SHAPE_MISMATCH: foveal_status = 7;
/// Two lengths that have to agree do not.
pub const FOVEAL_LENGTH_MISMATCH: foveal_status = 8;
/// The number of query heads is no multiple of the number of key/value heads.
pub const FOVEAL_HEAD_GROUPING: foveal_status = 9;
/// A mask was made for other lengths than those of the call.
pub const FOVEAL_MASK_SHAPE: foveal_status = 10;
/// A number outside of the range that a parameter accepts.
pub const FOVEAL_INVALID_PARAMETER: foveal_status = 11;
/// More query rows than `foveal_attention_decode` takes in one call.
pub const FOVEAL_TOO_MANY_ROWS: foveal_status = 12;
/// The processor lacks the instructions that were asked for.
pub const FOVEAL_LEVEL_UNAVAILABLE: foveal_status = 13;
/// The workspace is in use by another call.
pub const FOVEAL_WORKSPACE_BUSY: foveal_status = 14;
/// There is no memory for the workspace or the mask.
pub const FOVEAL_OUT_OF_MEMORY: foveal_status = 15;
/// A reason that has no status of its own.
pub const FOVEAL_OTHER: foveal_status = 98;
/// A defect of the library. Outputs may have been written in part.
pub const FOVEAL_PANIC: foveal_status = 99;

pub(crate) type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a call was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum Error {
    #[error("{what} is NULL; expected {expected}")]
    Null { what: &'static str, expected: String },
    #[error("{what} is at address {address:#x}, which is no multiple of {alignment}")]
    Misaligned { what: &'static str, address: usize, alignment: usize },
    #[error("{what} = {got}: expected {expected}")]
    Unknown { what: &'static str, got: u32, expected: &'static str },
    #[error("{what} is stored as {got}; expected {expected}")]
    Dtype { what: &'static str, expected: DType, got: DType },
    #[error("{what} of {len} elements does not fit into the address space")]
    Span { what: &'static str, len: usize },
    #[error(
        "{what} is written and shares memory with {other}; from its first element to its last it needs memory of \
         its own"
    )]
    Shared { what: &'static str, other: &'static str },
    #[error("{what} is given, but nothing uses it; {expected}")]
    Unused { what: &'static str, expected: &'static str },
    #[error("the level's name is not UTF-8; expected portable, avx2, avx512, avx512bf16 or NULL")]
    LevelName,
    #[error("the workspace is in use by another call; give each thread one of its own")]
    Busy,
    #[error("a defect of the library, please report it: {0}")]
    Panic(String),
    #[error(transparent)]
    Foveal(#[from] foveal::Error),
}

impl Error {
    fn status(&self) -> foveal_status {
        use foveal::Error as Own;
        match self {
            Error::Null { .. } => FOVEAL_NULL_POINTER,
            Error::Misaligned { .. } => FOVEAL_MISALIGNED,
            Error::Unknown { .. } => FOVEAL_UNKNOWN_VALUE,
            Error::Dtype { .. } => FOVEAL_DTYPE_MISMATCH,
            Error::Span { .. } => FOVEAL_SHAPE_OVERFLOW,
            Error::Shared { .. } => FOVEAL_OVERLAP,
            Error::Unused { .. } => FOVEAL_INVALID_PARAMETER,
            Error::LevelName => FOVEAL_LEVEL_UNAVAILABLE,
            Error::Busy => FOVEAL_WORKSPACE_BUSY,
            Error::Panic(_) => FOVEAL_PANIC,
            Error::Foveal(error) => match error {
                Own::ShapeOverflow { .. } => FOVEAL_SHAPE_OVERFLOW,
                Own::OverlappingOutput { .. } => FOVEAL_OVERLAP,
                Own::ShapeMismatch { .. } => FOVEAL_SHAPE_MISMATCH,
                Own::LengthMismatch { .. } | Own::BufferLength { .. } => FOVEAL_LENGTH_MISMATCH,
                Own::HeadGrouping { .. } => FOVEAL_HEAD_GROUPING,
                Own::MaskShape { .. } => FOVEAL_MASK_SHAPE,
                Own::InvalidParameter { .. } => FOVEAL_INVALID_PARAMETER,
                Own::TooManyRows { .. } => FOVEAL_TOO_MANY_ROWS,
                Own::SimdUnavailable { .. } => FOVEAL_LEVEL_UNAVAILABLE,
                Own::OutOfMemory { .. } => FOVEAL_OUT_OF_MEMORY,
                _ => FOVEAL_OTHER,
            },
        }
    }
}

thread_local! {
    static MESSAGE: RefCell<CString> = RefCell::default();
}

/// The text of the last error that a call on this thread ended with; empty if none did. Never NULL. It belongs to
/// the library, and stays as it is until the next call on this thread fails or the thread ends.
#[unsafe(no_mangle)]
pub extern "C" fn foveal_last_error_message() -> *const c_char {
    MESSAGE.try_with(|message| message.borrow().as_ptr()).unwrap_or(c"".as_ptr())
}

/// Runs a call's work: its error, or the panic that it ended with, becomes a status and this thread's message.
pub(crate) fn guard(work: impl FnOnce() -> Result<()>) -> foveal_status {
    let caught = catch_unwind(AssertUnwindSafe(work));
    let Err(error) = caught.unwrap_or_else(|payload| Err(Error::Panic(said(&*payload)))) else {
        return FOVEAL_OK;
    };
    // No text of ours has a zero byte in it; one from elsewhere would be left out.
    let text = CString::new(error.to_string()).unwrap_or_default();
    // Fails in a thread that is ending only, in which nobody can ask any more.
    let _ = MESSAGE.try_with(|message| *message.borrow_mut() = text);
    error.status()
}

/// What a panic said.
fn said(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| payload.downcast_ref::<String>().cloned()).unwrap_or_else(|| "panic".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::CStr;

    fn message() -> String {
        // SAFETY: the pointer is that of a C string which lives until the next failing call.
        unsafe { CStr::from_ptr(foveal_last_error_message()) }.to_str().unwrap().to_owned()
    }

    #[test]
    fn a_panic_becomes_a_status_and_a_message() {
        assert_eq!(message(), "");
        assert_eq!(guard(|| panic!("row {} of 5", 7)), FOVEAL_PANIC);
        assert!(message().ends_with("please report it: row 7 of 5"), "{}", message());
        assert_eq!(guard(|| std::panic::panic_any(5)), FOVEAL_PANIC);
        assert!(message().ends_with(": panic"), "{}", message());
    }

    #[test]
    fn messages_stay_until_the_next_error_and_belong_to_a_thread() {
        let error = || foveal::Error::HeadGrouping { heads: 3, kv_heads: 2 };
        assert_eq!(guard(|| Err(error().into())), FOVEAL_HEAD_GROUPING);
        assert_eq!(guard(|| Ok(())), FOVEAL_OK);
        assert_eq!(message(), error().to_string());
        let elsewhere = std::thread::spawn(message).join().unwrap();
        assert_eq!(elsewhere, "");
    }
}
