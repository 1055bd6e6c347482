//! Writes safetensors files tensor by tensor, so that memory does not grow with the model.

use std::io::{self, Write};

use serde_json::{Map, Value, json};

/// How the numbers of a tensor are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Written {
    F32,
    F16,
    Bf16,
    Bytes,
}

impl Written {
    const fn name(self) -> &'static str {
        match self {
            Written::F32 => "F32",
            Written::F16 => "F16",
            Written::Bf16 => "BF16",
            Written::Bytes => "U8",
        }
    }

    const fn size(self) -> usize {
        match self {
            Written::F32 => 4,
            Written::F16 | Written::Bf16 => 2,
            Written::Bytes => 1,
        }
    }
}

/// A tensor to be written.
#[derive(Clone, Debug)]
pub(crate) struct Layout {
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
    pub(crate) written: Written,
}

impl Layout {
    fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.written.size()
    }
}

/// Writes a header, and the tensors as `fill` writes them, in their order.
pub(crate) fn write<W: Write>(
    out: &mut W,
    tensors: &[Layout],
    mut fill: impl FnMut(usize, &mut W) -> io::Result<()>,
) -> io::Result<()> {
    let mut header = Map::new();
    header.insert("__metadata__".to_owned(), json!({"format": "pt"}));
    let mut start = 0;
    for tensor in tensors {
        let end = start + tensor.bytes();
        let fields = json!({
            "dtype": tensor.written.name(), "shape": tensor.shape, "data_offsets": [start, end],
        });
        header.insert(tensor.name.clone(), fields);
        start = end;
    }
    let mut header = Value::Object(header).to_string();
    // Numbers begin at multiples of eight.
    header.extend(std::iter::repeat_n(' ', header.len().next_multiple_of(8) - header.len()));
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(header.as_bytes())?;
    (0..tensors.len()).try_for_each(|n| fill(n, out))
}

/// Writes numbers in the form of a file.
pub(crate) fn numbers(values: &[f32], written: Written, out: &mut impl Write) -> io::Result<()> {
    let mut bytes = Vec::with_capacity(4 * values.len().min(1 << 14));
    for part in values.chunks(1 << 14) {
        bytes.clear();
        match written {
            Written::F16 => {
                bytes.extend(part.iter().flat_map(|&x| half::f16::from_f32(x).to_le_bytes()));
            }
            Written::Bf16 => {
                bytes.extend(part.iter().flat_map(|&x| half::bf16::from_f32(x).to_le_bytes()));
            }
            Written::F32 | Written::Bytes => {
                bytes.extend(part.iter().flat_map(|x| x.to_le_bytes()));
            }
        }
        out.write_all(&bytes)?;
    }
    Ok(())
}
