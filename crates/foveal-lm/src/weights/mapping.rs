//! The bytes of a model file: mapped from disk, built into the program, or owned.
#![allow(unsafe_code)]

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use memmap2::Mmap;

use super::Error;

/// The bytes of one model file, shared by every [`Weight`](super::Weight) that lies in it.
#[derive(Debug)]
pub struct Mapping(Bytes);

#[derive(Debug)]
enum Bytes {
    Mapped(Mmap),
    Static(&'static [u8]),
    Owned(Vec<u8>),
    Shared(Arc<[u8]>),
}

impl Mapping {
    /// Maps a regular file read-only; its pages are read from disk when they are first used.
    ///
    /// The file must stay as it is while it is mapped. If another program shortens it, the operating system stops
    /// this one at the first read past the new end. Files replaced by renaming, as this crate replaces them, are safe.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] when the file can't be opened or mapped, or is not a regular file.
    pub fn open(path: &Path) -> Result<Mapping, Error> {
        let failed = |source| Error::Io { action: "open", path: path.to_owned(), source };
        // Asked before opening: to open a named pipe would wait for its writer.
        let metadata = std::fs::metadata(path).map_err(failed)?;
        if !metadata.is_file() {
            return Err(failed(std::io::Error::other("not a regular file")));
        }
        let file = File::open(path).map_err(failed)?;
        // SAFETY: the map is read-only and private to this type, which lends it only as `&[u8]`. That the file does
        // not change meanwhile can't be enforced by any program on its own; it is the documented duty of the caller,
        // and no code here relies on bytes staying as they were when they were checked.
        let map = unsafe { Mmap::map(&file) }.map_err(failed)?;
        Ok(Mapping(Bytes::Mapped(map)))
    }

    /// Bytes that are part of the program.
    pub const fn from_static(bytes: &'static [u8]) -> Mapping {
        Mapping(Bytes::Static(bytes))
    }

    /// All bytes of the file.
    pub fn as_slice(&self) -> &[u8] {
        match &self.0 {
            Bytes::Mapped(bytes) => bytes,
            Bytes::Static(bytes) => bytes,
            Bytes::Owned(bytes) => bytes,
            Bytes::Shared(bytes) => bytes,
        }
    }
}

/// Maps a file that its owner goes on writing to; what is written is seen.
///
/// # Errors
///
/// Those of the operating system.
pub(crate) fn map_shared(file: &File) -> std::io::Result<Mmap> {
    // SAFETY: the map is lent only as `&[u8]` by whoever owns the file, which it locks against other processes that ask, and
    // writes to through `&mut self`, when nothing is lent. That others keep to it is the documented duty of the caller.
    unsafe { Mmap::map(file) }
}

/// Numbers of which every pattern of bits is one.
pub(crate) trait Plain: Copy + sealed::Sealed {}
impl<T: Copy + sealed::Sealed> Plain for T {}

mod sealed {
    pub(crate) trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::f16 {}
    impl Sealed for half::bf16 {}
}

/// Bytes as the numbers that they are on a little-endian processor; they begin where such a number may.
///
/// # Panics
///
/// If they begin elsewhere, or end within a number.
pub(crate) fn numbers<T: Plain>(bytes: &[u8]) -> &[T] {
    // SAFETY: `Plain` is sealed to three types, without padding, of which every pattern of bits is a number.
    let (before, numbers, after) = unsafe { bytes.align_to::<T>() };
    assert!(before.is_empty() && after.is_empty(), "numbers are aligned and whole");
    numbers
}

impl From<Vec<u8>> for Mapping {
    fn from(bytes: Vec<u8>) -> Mapping {
        Mapping(Bytes::Owned(bytes))
    }
}

impl From<Arc<[u8]>> for Mapping {
    fn from(bytes: Arc<[u8]>) -> Mapping {
        Mapping(Bytes::Shared(bytes))
    }
}
