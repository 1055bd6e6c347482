//! Writes GGUF v3.

use std::collections::BTreeSet;
use std::io::{self, Read, Write};
use std::path::Path;

use foveal::projection::Format;

use super::cursor::MAX_DEPTH;
use super::element::type_id;
use super::metadata::MAX_KEY_BYTES;
use super::owned::{OwnedValue, put_string};
use super::table::{MAX_AXES, MAX_NAME_BYTES};
use super::{ALIGNMENT_KEY, DEFAULT_ALIGNMENT, MAGIC, MAX_ALIGNMENT};
use crate::atomic_file;
use crate::weights::tensor::stored_bytes;
use crate::weights::{ElementType, Error};

/// Collects metadata and tensors and writes them as a GGUF v3 file. Tensor data is borrowed until then.
///
/// ```
/// use foveal::projection::Format;
/// use foveal_lm::weights::gguf::{Gguf, Writer};
///
/// let mut writer = Writer::new();
/// writer.metadata("general.architecture", "llama")?;
/// writer.tensor("norm.weight", &[2], Format::F32, &[0, 0, 0x80, 0x3f, 0, 0, 0, 0x40])?;
/// let file = Gguf::from_bytes(writer.to_bytes())?;
/// assert_eq!(file.tensor("norm.weight")?.to_f32(), [1.0, 2.0]);
/// # Ok::<(), foveal_lm::weights::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Writer<'a> {
    alignment: u64,
    metadata: Vec<(String, OwnedValue)>,
    tensors: Vec<Tensor<'a>>,
    names: BTreeSet<(&'static str, String)>,
}

#[derive(Clone, Debug)]
struct Tensor<'a> {
    name: String,
    shape: Vec<usize>,
    type_id: u32,
    len: usize,
    /// `None` for data that comes when the file is written.
    bytes: Option<&'a [u8]>,
}

impl Default for Writer<'_> {
    fn default() -> Self {
        Writer::new()
    }
}

impl<'a> Writer<'a> {
    /// A file without metadata and tensors.
    pub fn new() -> Writer<'a> {
        Writer {
            alignment: DEFAULT_ALIGNMENT,
            metadata: Vec::new(),
            tensors: Vec::new(),
            names: BTreeSet::new(),
        }
    }

    /// Adds a key. `general.alignment` (a `u32`) also sets the alignment of the file.
    ///
    /// # Errors
    ///
    /// [`Error::Duplicate`], [`Error::Limit`] for a key of more than 65535 bytes or arrays nested too deep, and
    /// [`Error::Alignment`].
    pub fn metadata(
        &mut self,
        key: &str,
        value: impl Into<OwnedValue>,
    ) -> Result<&mut Self, Error> {
        let value = value.into();
        at_most("the bytes of a metadata key", key.len(), MAX_KEY_BYTES)?;
        at_most("arrays in one another", value.depth(), MAX_DEPTH as u64)?;
        if key == ALIGNMENT_KEY {
            self.alignment = alignment(key, &value)?;
        }
        self.claim("metadata key", key)?;
        self.metadata.push((key.to_owned(), value));
        Ok(self)
    }

    /// Adds a tensor with its stored bytes; the last axis of `shape` is the contiguous one.
    ///
    /// # Errors
    ///
    /// [`Error::Duplicate`], [`Error::Limit`] for a name of more than 1024 bytes, [`Error::Axes`] for a scalar or
    /// more than four axes, [`Error::Shape`] for an empty axis or rows that are not whole blocks, and
    /// [`Error::Length`] when `bytes` is not exactly the tensor.
    pub fn tensor(
        &mut self,
        name: &str,
        shape: &[usize],
        format: Format,
        bytes: &'a [u8],
    ) -> Result<&mut Self, Error> {
        let (expected, found) = (stored_bytes(name, shape, format)?, bytes.len());
        if found != expected {
            let name = name.to_owned();
            return Err(Error::Length { name, format, expected, found });
        }
        self.add(name, shape, format, Some(bytes))
    }

    /// Adds a tensor whose data [`Writer::write_with`] will ask for.
    ///
    /// # Errors
    ///
    /// Those of [`Writer::tensor`].
    pub fn layout(
        &mut self,
        name: &str,
        shape: &[usize],
        format: Format,
    ) -> Result<&mut Self, Error> {
        self.add(name, shape, format, None)
    }

    fn add(
        &mut self,
        name: &str,
        shape: &[usize],
        format: Format,
        bytes: Option<&'a [u8]>,
    ) -> Result<&mut Self, Error> {
        at_most("the bytes of a tensor's name", name.len(), MAX_NAME_BYTES)?;
        let element = ElementType::Known(format);
        let name = name.to_owned();
        let Some(type_id) = type_id(format) else {
            return Err(Error::Unsupported { name, element });
        };
        if shape.is_empty() || shape.len() > MAX_AXES as usize {
            return Err(Error::Axes { name, found: shape.len() as u64 });
        }
        if shape.contains(&0) {
            let reason = "an axis is empty";
            return Err(Error::Shape { name, element, shape: shape.to_vec(), reason });
        }
        let len = stored_bytes(&name, shape, format)?;
        self.claim("tensor", &name)?;
        self.tensors.push(Tensor { name, shape: shape.to_vec(), type_id, len, bytes });
        Ok(self)
    }

    /// Writes the file.
    ///
    /// # Errors
    ///
    /// Those of `out`; an error for a tensor without data.
    pub fn write_to(&self, out: &mut impl Write) -> io::Result<()> {
        let missing = |index: usize, _: &mut dyn Write| {
            Err(io::Error::other(format!("tensor {:?} has no data", self.tensors[index].name)))
        };
        self.write_with(out, missing)
    }

    /// Writes the file, and lets `fill` write the data of each tensor without, given by its place among all tensors.
    /// Memory is that of the header.
    ///
    /// # Errors
    ///
    /// Those of `out` and `fill`; an error when `fill` writes another number of bytes than the tensor has.
    pub fn write_with(
        &self,
        out: &mut impl Write,
        mut fill: impl FnMut(usize, &mut dyn Write) -> io::Result<()>,
    ) -> io::Result<()> {
        let header = self.header();
        out.write_all(&header)?;
        self.pad(out, header.len())?;
        for (index, tensor) in self.tensors.iter().enumerate() {
            match tensor.bytes {
                Some(bytes) => out.write_all(bytes)?,
                None => {
                    let mut counted = Counted { out: &mut *out, left: tensor.len };
                    fill(index, &mut counted)?;
                    if counted.left > 0 {
                        let (name, left) = (&tensor.name, counted.left);
                        let message = format!("tensor {name:?} lacks {left} bytes of its data");
                        return Err(io::Error::other(message));
                    }
                }
            }
            self.pad(out, tensor.len)?;
        }
        Ok(())
    }

    /// The file in memory.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.write_to(&mut bytes).expect("a Vec takes all bytes");
        bytes
    }

    /// Writes the file to `path`, wholly or not at all: a temporary file beside it is flushed to disk and renamed.
    ///
    /// # Errors
    ///
    /// [`Error::Io`].
    pub fn save(&self, path: &Path) -> Result<(), Error> {
        atomic_file::write(path, |out| self.write_to(out)).map_err(|source| Error::Io {
            action: "write",
            path: path.to_owned(),
            source,
        })
    }

    fn claim(&mut self, what: &'static str, name: &str) -> Result<(), Error> {
        if !self.names.insert((what, name.to_owned())) {
            return Err(Error::Duplicate { what, name: name.to_owned() });
        }
        Ok(())
    }

    fn header(&self) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        out.extend(3u32.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            put_string(key, &mut out);
            out.extend(value.value_type().id().to_le_bytes());
            value.put(&mut out);
        }
        let mut offset = 0;
        for tensor in &self.tensors {
            tensor.put(offset, &mut out);
            offset += (tensor.len as u64).next_multiple_of(self.alignment);
        }
        out
    }

    fn pad(&self, out: &mut impl Write, len: usize) -> io::Result<()> {
        let len = len as u64;
        io::copy(&mut io::repeat(0).take(len.next_multiple_of(self.alignment) - len), out)?;
        Ok(())
    }
}

impl Tensor<'_> {
    fn put(&self, offset: u64, out: &mut Vec<u8>) {
        put_string(&self.name, out);
        out.extend((self.shape.len() as u32).to_le_bytes());
        for &axis in self.shape.iter().rev() {
            out.extend((axis as u64).to_le_bytes());
        }
        out.extend(self.type_id.to_le_bytes());
        out.extend(offset.to_le_bytes());
    }
}

/// Lets so many bytes through.
struct Counted<W> {
    out: W,
    left: usize,
}

impl<W: Write> Write for Counted<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.len() > self.left {
            return Err(io::Error::other("more bytes than the tensor has"));
        }
        let written = self.out.write(bytes)?;
        self.left -= written;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

fn at_most(what: &'static str, found: usize, limit: u64) -> Result<(), Error> {
    let found = found as u64;
    if found > limit { Err(Error::Limit { what, found, limit }) } else { Ok(()) }
}

fn alignment(key: &str, value: &OwnedValue) -> Result<u64, Error> {
    let &OwnedValue::U32(alignment) = value else {
        let found = value.value_type().name().to_owned();
        return Err(Error::WrongType { key: key.to_owned(), expected: "u32".to_owned(), found });
    };
    let found = u64::from(alignment);
    if !found.is_power_of_two() || found > MAX_ALIGNMENT {
        return Err(Error::Alignment { found, limit: MAX_ALIGNMENT });
    }
    Ok(found)
}
