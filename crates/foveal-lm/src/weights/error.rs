//! What can be wrong with a model file.

use std::path::PathBuf;

use foveal::projection::{Format, RowError};

use super::ElementType;

/// Why a model file can't be read or written: what was found, what was expected, and what to do where that helps.
///
/// Names that come from the file are shown escaped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "each message says what its fields are")]
pub enum Error {
    /// The operating system refused.
    #[error("cannot {action} {}: {source}", path.display())]
    Io { action: &'static str, path: PathBuf, source: std::io::Error },
    /// Neither a GGUF file nor a safetensors file nor a folder with one.
    #[error("{} is not a model: expected {expected}", path.display())]
    NotAModel { path: PathBuf, expected: &'static str },
    /// The first four bytes are not GGUF's.
    #[error("not a GGUF file: it begins with the bytes {found:02x?}, expected \"GGUF\"")]
    Magic { found: [u8; 4] },
    /// The numbers are stored with the high byte first.
    #[error("this GGUF file is big-endian; convert the model again to a little-endian file")]
    BigEndian,
    /// A version of the format that is too old or too new.
    #[error("GGUF version {found} is not supported, expected 2 or 3; convert the model again")]
    Version { found: u32 },
    /// The model is spread over several GGUF files.
    #[error("this file is one of {parts} parts of a model; merge them with gguf-split --merge")]
    Split { parts: u64 },
    /// The file ends before what it announces.
    #[error("the file is cut short: {what} at byte {at} needs {needed} bytes, {left} are left")]
    Truncated { what: &'static str, at: usize, needed: u64, left: usize },
    /// A count or length beyond what any model has.
    #[error("{what}: {found}, at most {limit} expected")]
    Limit { what: &'static str, found: u64, limit: u64 },
    /// Text that is not UTF-8.
    #[error("the {what} at byte {at} is not valid UTF-8")]
    Utf8 { what: &'static str, at: usize },
    /// A metadata type id that the format doesn't have.
    #[error("unknown metadata type {id} at byte {at}, expected 0 to 12")]
    ValueType { id: u32, at: usize },
    /// A truth value that is neither 0 nor 1.
    #[error("the truth value at byte {at} is {found}, expected 0 or 1")]
    Bool { found: u8, at: usize },
    /// The same name twice.
    #[error("{what} {name:?} is there twice")]
    Duplicate { what: &'static str, name: String },
    /// `general.alignment` can't be used.
    #[error("the alignment is {found}, expected a power of two up to {limit}")]
    Alignment { found: u64, limit: u64 },
    /// A number of axes that the format doesn't have.
    #[error("tensor {name:?} has {found} axes, expected 1 to 4")]
    Axes { name: String, found: u64 },
    /// A shape that no file can hold, or a row that is not a whole number of blocks.
    #[error("tensor {name:?} of {element} can't have the shape {shape:?}: {reason}")]
    Shape { name: String, element: ElementType, shape: Vec<usize>, reason: &'static str },
    /// Tensor data that does not start at a multiple of the alignment.
    #[error("tensor {name:?} starts at offset {offset}, expected a multiple of {alignment}")]
    Misaligned { name: String, offset: u64, alignment: usize },
    /// Tensor data beyond the end of the file.
    #[error("tensor {name:?} needs bytes {start} to {end}, the file has {len}; download it again")]
    OutOfBounds { name: String, start: u64, end: u64, len: usize },
    /// Two tensors share bytes.
    #[error("tensors {first:?} and {second:?} overlap")]
    Overlap { first: String, second: String },
    /// A metadata key that the model needs.
    #[error("the metadata has no {key:?}")]
    MissingKey { key: String },
    /// A metadata value of another type, or out of the type's range.
    #[error("the metadata value {key:?} is {found}, expected {expected}")]
    WrongType { key: String, expected: String, found: String },
    /// An array of mixed types was given to the GGUF writer.
    #[error("an array of {expected} can't hold {found}")]
    MixedArray { expected: &'static str, found: &'static str },
    /// A tensor that the model needs.
    #[error("the model has no tensor {name:?}")]
    MissingTensor { name: String },
    /// A tensor of another shape than the model's configuration asks for.
    #[error("tensor {name:?} has the shape {found:?}, expected {expected:?}")]
    WrongShape { name: String, expected: Vec<usize>, found: Vec<usize> },
    /// A tensor in a format that this crate can't compute with.
    #[error(
        "tensor {name:?} is stored as {element}, which is not supported; supported are {}",
        Format::ALL.map(Format::name).join(", ")
    )]
    Unsupported { name: String, element: ElementType },
    /// Bytes that don't make up the tensor.
    #[error("tensor {name:?} of {format} has {expected} bytes, got {found}")]
    Length { name: String, format: Format, expected: usize, found: usize },
    /// A row that can't be decoded.
    #[error(transparent)]
    Row(#[from] RowError),
    /// JSON that can't be read.
    #[error("cannot read {what}: {source}")]
    Json { what: String, source: serde_json::Error },
    /// A shard name in a safetensors index that is not a plain file name.
    #[error("the index names the file {found:?}, expected a file name without a path")]
    ShardName { found: String },
    /// A safetensors file whose tensors don't fill it exactly.
    #[error("the safetensors data has {found} bytes, the header describes {expected}")]
    DataLength { expected: usize, found: usize },
}
