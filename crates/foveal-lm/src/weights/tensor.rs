//! Tensors as a file lists them, and weights: tensors that keep their file's bytes.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use foveal::projection::{Format, dequantize_row};

use super::{Error, Mapping};

/// How the elements of a tensor in a file are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ElementType {
    /// A format that the kernels read.
    Known(Format),
    /// A format that can only be listed.
    Unsupported {
        /// The name that its file format gives it, or `unknown`.
        name: &'static str,
        /// The number of the ggml type; `None` in a safetensors file.
        id: Option<u32>,
    },
}

impl std::fmt::Display for ElementType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            ElementType::Known(format) => f.write_str(format.name()),
            ElementType::Unsupported { name, id: Some(id) } => write!(f, "{name} (ggml type {id})"),
            ElementType::Unsupported { name, id: None } => f.write_str(name),
        }
    }
}

/// One line of a model file's table of tensors.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct TensorInfo {
    /// The name in the file.
    pub name: Arc<str>,
    /// The lengths of the axes, the last one contiguous: `[out_features, in_features]` for a matrix, whatever the
    /// order in the file. Empty for a scalar.
    pub shape: Vec<usize>,
    /// How the elements are stored.
    pub element: ElementType,
    /// Where the data starts, in bytes from the start of its file.
    pub offset: usize,
    /// The bytes of the data; `None` for an element type of unknown size.
    pub bytes: Option<usize>,
    /// The number of the file, from 0, for a model in several files.
    pub file: usize,
}

impl TensorInfo {
    /// The number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// The tensors of a model, by name and in the order of its files.
#[derive(Debug, Default)]
pub(super) struct Tensors {
    files: Vec<Arc<Mapping>>,
    list: Vec<TensorInfo>,
    by_name: BTreeMap<Arc<str>, usize>,
}

impl Tensors {
    pub(super) fn list(&self) -> &[TensorInfo] {
        &self.list
    }

    /// Adds a file and returns its number.
    pub(super) fn add_file(&mut self, file: Arc<Mapping>) -> usize {
        self.files.push(file);
        self.files.len() - 1
    }

    /// Adds a tensor; the bytes that `info` speaks of must lie in its file.
    pub(super) fn insert(&mut self, info: TensorInfo) -> Result<(), Error> {
        if self.by_name.insert(info.name.clone(), self.list.len()).is_some() {
            return Err(Error::Duplicate { what: "tensor", name: info.name.to_string() });
        }
        self.list.push(info);
        Ok(())
    }

    pub(super) fn weight(&self, name: &str) -> Result<Weight, Error> {
        let Some(&index) = self.by_name.get(name) else {
            return Err(Error::MissingTensor { name: name.to_owned() });
        };
        let info = &self.list[index];
        let (ElementType::Known(format), Some(bytes)) = (info.element, info.bytes) else {
            return Err(Error::Unsupported { name: name.to_owned(), element: info.element });
        };
        Ok(Weight {
            name: info.name.clone(),
            shape: info.shape.clone(),
            format,
            file: self.files[info.file].clone(),
            range: info.offset..info.offset + bytes,
        })
    }
}

/// A tensor in the form in which its file stores it; it keeps the file's bytes alive and copies none.
///
/// The last axis is contiguous and a whole number of blocks; a matrix is `[out_features, in_features]`.
/// Cloning copies no data.
#[derive(Clone)]
pub struct Weight {
    name: Arc<str>,
    shape: Vec<usize>,
    format: Format,
    file: Arc<Mapping>,
    range: Range<usize>,
}

impl Weight {
    /// A weight that is not in a file.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] when the last axis is not a whole number of blocks or the size overflows, and
    /// [`Error::Length`] when `bytes` is not exactly the tensor.
    pub fn new(
        name: &str,
        shape: &[usize],
        format: Format,
        bytes: impl Into<Mapping>,
    ) -> Result<Weight, Error> {
        let file = Arc::new(bytes.into());
        let expected = stored_bytes(name, shape, format)?;
        let found = file.as_slice().len();
        if found != expected {
            return Err(Error::Length { name: name.to_owned(), format, expected, found });
        }
        Ok(Weight { name: name.into(), shape: shape.to_vec(), format, file, range: 0..expected })
    }

    /// The name in the file.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The lengths of the axes, the last one contiguous.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// How the elements are stored.
    pub fn format(&self) -> Format {
        self.format
    }

    /// All rows, one after the other. The bytes of a GGUF file are aligned as the file's own alignment says
    /// (32 by default); those of a safetensors file or an embedded model may have any alignment.
    pub fn bytes(&self) -> &[u8] {
        &self.file.as_slice()[self.range.clone()]
    }

    /// The length of the last axis; 1 for a scalar.
    pub fn in_features(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// The number of rows: the product of all axes but the last.
    pub fn out_features(&self) -> usize {
        self.shape.split_last().map_or(1, |(_, outer)| outer.iter().product())
    }

    /// The bytes of a row.
    pub fn row_bytes(&self) -> usize {
        self.in_features() / self.format.block_len() * self.format.block_bytes()
    }

    /// The bytes of row `row`: `None` when there are fewer rows.
    pub fn row(&self, row: usize) -> Option<&[u8]> {
        if row >= self.out_features() {
            return None;
        }
        let bytes = self.row_bytes();
        self.bytes().get(row * bytes..(row + 1) * bytes)
    }

    /// This weight, if it has the shape that the model's configuration asks for.
    ///
    /// # Errors
    ///
    /// [`Error::WrongShape`] with both shapes.
    pub fn with_shape(self, expected: &[usize]) -> Result<Weight, Error> {
        if self.shape != expected {
            return Err(Error::WrongShape {
                name: self.name.to_string(),
                expected: expected.to_vec(),
                found: self.shape,
            });
        }
        Ok(self)
    }

    /// All values, row by row. Allocates four bytes an element; meant for norms, biases and tests.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.shape.iter().product()];
        dequantize_row(self.format, self.bytes(), &mut values)
            .expect("a weight's bytes are whole blocks of its shape");
        values
    }
}

impl std::fmt::Debug for Weight {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Weight({:?}, {} {:?})", self.name, self.format, self.shape)
    }
}

/// The bytes of a tensor.
pub(super) fn stored_bytes(name: &str, shape: &[usize], format: Format) -> Result<usize, Error> {
    let layout = Some((format.block_len(), format.block_bytes()));
    let bytes = laid_out_bytes(name, shape, ElementType::Known(format), layout)?;
    Ok(bytes.expect("the layout of a known format is known"))
}

/// The bytes of a tensor whose blocks have the layout `(elements, bytes)`: `None` without a layout.
pub(super) fn laid_out_bytes(
    name: &str,
    shape: &[usize],
    element: ElementType,
    layout: Option<(usize, usize)>,
) -> Result<Option<usize>, Error> {
    let wrong =
        |reason| Error::Shape { name: name.to_owned(), element, shape: shape.to_vec(), reason };
    let too_large = || wrong("its size overflows");
    let elements =
        shape.iter().try_fold(1usize, |n, &axis| n.checked_mul(axis)).ok_or_else(too_large)?;
    let Some((block_len, block_bytes)) = layout else { return Ok(None) };
    if !shape.last().copied().unwrap_or(1).is_multiple_of(block_len) {
        return Err(wrong("its last axis is not a whole number of blocks"));
    }
    let bytes = (elements / block_len).checked_mul(block_bytes).ok_or_else(too_large)?;
    Ok(Some(bytes))
}
