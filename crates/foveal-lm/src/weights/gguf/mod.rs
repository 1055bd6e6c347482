//! GGUF: one file with metadata, a table of tensors, and their data.
//!
//! ```text
//! "GGUF"  u32 version  u64 tensors  u64 entries
//! entries × { string key, u32 type, value }                      string = u64 length, UTF-8 bytes
//! tensors × { string name, u32 axes, axes × u64, u32 type, u64 offset }   the contiguous axis first
//! padding to general.alignment (default 32)
//! data; each tensor at its offset, a multiple of the alignment
//! ```
//!
//! All numbers are little-endian. Versions 2 and 3 are read, which differ only in that 3 may be big-endian (refused
//! here); 3 is written. Source: the GGUF specification in ggml's `docs/gguf.md`.

mod cursor;
mod element;
mod metadata;
mod owned;
mod table;
mod value;
mod writer;

use std::path::Path;
use std::sync::Arc;

pub use metadata::Metadata;
pub use owned::{OwnedArray, OwnedValue};
pub use value::{Array, Elements, FromValue, Strings, Value, ValueType};
pub use writer::Writer;

use super::tensor::Tensors;
use super::{Error, Mapping, TensorInfo, Weight};
use cursor::Cursor;

const MAGIC: [u8; 4] = *b"GGUF";
const ALIGNMENT_KEY: &str = "general.alignment";
const DEFAULT_ALIGNMENT: u64 = 32;
/// Wider than any page.
const MAX_ALIGNMENT: u64 = 1 << 20;

/// An open GGUF file, every field of its header checked.
#[derive(Debug)]
pub struct Gguf {
    version: u32,
    alignment: usize,
    pub(super) metadata: Metadata,
    pub(super) tensors: Tensors,
}

impl Gguf {
    /// Maps and checks a file. Allocates for its keys and its table of tensors only.
    ///
    /// # Errors
    ///
    /// [`Error::Io`], and those of [`from_bytes`](Gguf::from_bytes).
    pub fn open(path: &Path) -> Result<Gguf, Error> {
        Gguf::from_bytes(Mapping::open(path)?)
    }

    /// Checks a file that is built into the program.
    ///
    /// # Errors
    ///
    /// Those of [`from_bytes`](Gguf::from_bytes).
    pub fn from_static(bytes: &'static [u8]) -> Result<Gguf, Error> {
        Gguf::from_bytes(Mapping::from_static(bytes))
    }

    /// Checks the bytes of a file, such as a `Vec<u8>` or an `Arc<[u8]>`.
    ///
    /// # Errors
    ///
    /// [`Error::Magic`], [`Error::BigEndian`], [`Error::Version`], [`Error::Truncated`], or whatever else of the
    /// header is not as the format has it.
    pub fn from_bytes(bytes: impl Into<Mapping>) -> Result<Gguf, Error> {
        let file = Arc::new(bytes.into());
        let mut cursor = Cursor::new(file.as_slice(), 0);
        let version = read_version(&mut cursor)?;
        let tensors = cursor.u64("the number of tensors")?;
        let entries = cursor.u64("the number of metadata entries")?;
        let metadata = Metadata::read(&file, &mut cursor, entries)?;
        let alignment = alignment(&metadata)?;
        let tensors = table::read(&file, cursor, tensors, alignment)?;
        Ok(Gguf { version, alignment, metadata, tensors })
    }

    /// The version of the format: 2 or 3.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// The alignment of the tensors' data within the file, in bytes.
    pub fn alignment(&self) -> usize {
        self.alignment
    }

    /// What the file says about its model.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// The tensors, in the order of the file.
    pub fn tensors(&self) -> &[TensorInfo] {
        self.tensors.list()
    }

    /// The tensor called `name`. Copies no data.
    ///
    /// # Errors
    ///
    /// [`Error::MissingTensor`] or [`Error::Unsupported`].
    pub fn tensor(&self, name: &str) -> Result<Weight, Error> {
        self.tensors.weight(name)
    }
}

fn read_version(cursor: &mut Cursor<'_>) -> Result<u32, Error> {
    let found = cursor.field("the magic number")?;
    if found != MAGIC {
        return Err(Error::Magic { found });
    }
    match cursor.u32("the version")? {
        version @ 2..=3 => Ok(version),
        swapped if matches!(swapped.swap_bytes(), 1..=3) => Err(Error::BigEndian),
        found => Err(Error::Version { found }),
    }
}

fn alignment(metadata: &Metadata) -> Result<usize, Error> {
    let found = metadata.get(ALIGNMENT_KEY)?.unwrap_or(DEFAULT_ALIGNMENT);
    if !found.is_power_of_two() || found > MAX_ALIGNMENT {
        return Err(Error::Alignment { found, limit: MAX_ALIGNMENT });
    }
    Ok(found as usize)
}
