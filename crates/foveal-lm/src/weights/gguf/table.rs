//! The table of tensors of a GGUF file.

use std::sync::Arc;

use super::cursor::Cursor;
use super::element::element_type;
use crate::weights::tensor::{Tensors, laid_out_bytes};
use crate::weights::{Error, Mapping, TensorInfo};

/// Real files have a few thousand tensors.
const MAX_TENSORS: u64 = 1 << 18;
/// ggml itself keeps 63.
pub(super) const MAX_NAME_BYTES: u64 = 1024;
pub(super) const MAX_AXES: u32 = 4;
/// A name's length, the number of axes, one axis, the type, the offset.
const LEAST_BYTES: usize = 8 + 4 + 8 + 4 + 8;

/// Reads `count` tensors and checks that their data lies in the file, aligned and apart.
pub(super) fn read(
    file: &Arc<Mapping>,
    mut cursor: Cursor<'_>,
    count: u64,
    alignment: usize,
) -> Result<Tensors, Error> {
    if count > MAX_TENSORS {
        return Err(Error::Limit { what: "tensors", found: count, limit: MAX_TENSORS });
    }
    cursor.need("the table of tensors", count, LEAST_BYTES)?;
    let mut infos = Vec::with_capacity(count as usize);
    for _ in 0..count {
        infos.push(read_tensor(&mut cursor, alignment)?);
    }
    // Neither can overflow: the header lies in memory, and the alignment is small.
    let data = Data { start: cursor.at().next_multiple_of(alignment), len: file.as_slice().len() };
    let mut tensors = Tensors::default();
    tensors.add_file(file.clone());
    for (info, offset) in infos {
        tensors.insert(data.place(info, offset)?)?;
    }
    check_apart(tensors.list())?;
    Ok(tensors)
}

/// A tensor that is still without a place, and its offset in the data.
fn read_tensor(cursor: &mut Cursor<'_>, alignment: usize) -> Result<(TensorInfo, u64), Error> {
    let name = cursor.name("a tensor's name", MAX_NAME_BYTES)?;
    let shape = read_shape(cursor, name)?;
    let (element, layout) = element_type(cursor.u32("a tensor's type")?);
    if shape.contains(&0) {
        let reason = "an axis is empty";
        return Err(Error::Shape { name: name.to_owned(), element, shape, reason });
    }
    let bytes = laid_out_bytes(name, &shape, element, layout)?;
    let offset = cursor.u64("a tensor's offset")?;
    if !offset.is_multiple_of(alignment as u64) {
        return Err(Error::Misaligned { name: name.to_owned(), offset, alignment });
    }
    Ok((TensorInfo { name: name.into(), shape, element, offset: 0, bytes, file: 0 }, offset))
}

/// The axes, reversed: the file has the contiguous one first.
fn read_shape(cursor: &mut Cursor<'_>, name: &str) -> Result<Vec<usize>, Error> {
    let axes = cursor.u32("a tensor's number of axes")?;
    if axes == 0 || axes > MAX_AXES {
        return Err(Error::Axes { name: name.to_owned(), found: axes.into() });
    }
    let mut shape = Vec::with_capacity(axes as usize);
    for _ in 0..axes {
        let axis = cursor.u64("a tensor's axis")?;
        let limit = usize::MAX as u64;
        let axis = usize::try_from(axis).map_err(|_| Error::Limit {
            what: "a tensor's axis",
            found: axis,
            limit,
        })?;
        shape.push(axis);
    }
    shape.reverse();
    Ok(shape)
}

struct Data {
    start: usize,
    len: usize,
}

impl Data {
    fn place(&self, info: TensorInfo, offset: u64) -> Result<TensorInfo, Error> {
        let start = offset.saturating_add(self.start as u64);
        // A tensor of unknown size has one byte at least.
        let end = start.saturating_add(info.bytes.unwrap_or(1) as u64);
        if end > self.len as u64 {
            let (name, len) = (info.name.to_string(), self.len);
            return Err(Error::OutOfBounds { name, start, end, len });
        }
        Ok(TensorInfo { offset: start as usize, ..info })
    }
}

fn check_apart(tensors: &[TensorInfo]) -> Result<(), Error> {
    let mut by_offset: Vec<&TensorInfo> = tensors.iter().collect();
    by_offset.sort_unstable_by_key(|info| info.offset);
    for pair in by_offset.windows(2) {
        let end = pair[0].offset + pair[0].bytes.unwrap_or(1);
        if end > pair[1].offset {
            let (first, second) = (pair[0].name.to_string(), pair[1].name.to_string());
            return Err(Error::Overlap { first, second });
        }
    }
    Ok(())
}
