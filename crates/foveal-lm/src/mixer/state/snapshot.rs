//! What a store holds as arrays of plain numbers, and a store made of them again, to the bit.
//!
//! ```text
//! keys, values                               [kv_heads, tokens, dim]   the rows that are no codes, as they are stored
//! key_codes, key_ranges, value_codes, …      [tiles, kv_heads, …]      coded tiles, as they lie in memory
//! ```
//!
//! Arrays are made one at a time, when they are asked for.

use std::ops::Range;

use foveal::cache::{CodedTiles, KvRows, KvStore, pieces};
use foveal::{Element, Rows, Shape, Strides, TensorRef};
use half::{bf16, f16};
use safetensors::Dtype;

use super::store::Store;
use crate::Error;

/// One of the arrays of a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Array {
    Keys,
    Values,
    KeyCodes,
    KeyRanges,
    ValueCodes,
    ValueRanges,
}

impl Array {
    const ROWS: [Array; 2] = [Array::Keys, Array::Values];
    const ALL: [Array; 6] = [
        Array::Keys,
        Array::Values,
        Array::KeyCodes,
        Array::KeyRanges,
        Array::ValueCodes,
        Array::ValueRanges,
    ];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Array::Keys => "keys",
            Array::Values => "values",
            Array::KeyCodes => "key_codes",
            Array::KeyRanges => "key_ranges",
            Array::ValueCodes => "value_codes",
            Array::ValueRanges => "value_ranges",
        }
    }
}

/// Where a store's tokens lie in the text: those that are codes, and those up to the end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) coded: Range<usize>,
    pub(crate) end: usize,
}

impl Store {
    /// The arrays that it has.
    pub(crate) fn arrays(&self) -> &'static [Array] {
        if self.coded() { &Array::ALL } else { &Array::ROWS }
    }

    pub(crate) fn span(&self) -> Span {
        let coded = match self {
            Store::Coded(cache) => cache.coded_positions(),
            _ => self.start()..self.start(),
        };
        Span { coded, end: self.end() }
    }

    /// The type of an array's numbers.
    pub(crate) fn array_dtype(&self, array: Array) -> Dtype {
        match (array, self) {
            (Array::KeyCodes | Array::ValueCodes, _) => Dtype::U8,
            (Array::KeyRanges | Array::ValueRanges, _) => Dtype::F16,
            (_, Store::F32(_) | Store::PagedF32(_)) => Dtype::F32,
            (_, Store::F16(_) | Store::PagedF16(_)) => Dtype::F16,
            (_, Store::Bf16(_) | Store::PagedBf16(_) | Store::Coded(_)) => Dtype::BF16,
        }
    }

    /// The lengths of an array's axes; of codes their number.
    pub(crate) fn array_shape(&self, array: Array) -> Vec<usize> {
        let Span { coded, end } = self.span();
        let (key_dim, value_dim) = self.dims();
        let rows = |dim| vec![self.kv_heads(), end - coded.end, dim];
        match (array, self) {
            (Array::Keys, _) => rows(key_dim),
            (Array::Values, _) => rows(value_dim),
            (_, Store::Coded(cache)) => {
                let tiles = cache.coded_tiles();
                vec![match array {
                    Array::KeyCodes => tiles.key_codes.len(),
                    Array::KeyRanges => tiles.key_ranges.len(),
                    Array::ValueCodes => tiles.value_codes.len(),
                    _ => tiles.value_ranges.len(),
                }]
            }
            _ => vec![0],
        }
    }

    /// An array's numbers, low bytes first.
    pub(crate) fn array_bytes(&self, array: Array) -> Vec<u8> {
        match (array, self) {
            (Array::KeyCodes, Store::Coded(cache)) => cache.coded_tiles().key_codes.to_vec(),
            (Array::ValueCodes, Store::Coded(cache)) => cache.coded_tiles().value_codes.to_vec(),
            (Array::KeyRanges, Store::Coded(cache)) => halves(cache.coded_tiles().key_ranges),
            (Array::ValueRanges, Store::Coded(cache)) => halves(cache.coded_tiles().value_ranges),
            _ => self.row_bytes(array),
        }
    }

    fn row_bytes(&self, array: Array) -> Vec<u8> {
        let Span { coded, end } = self.span();
        let mut bytes = vec![];
        for head in 0..self.kv_heads() {
            for positions in pieces(coded.end..end) {
                let tile = self.tile(head, positions);
                let keys = array == Array::Keys;
                match if keys { tile.keys.rows() } else { tile.values.rows() } {
                    Some(KvRows::F32(rows)) => extend(&mut bytes, rows, f32::to_le_bytes),
                    Some(KvRows::F16(rows)) => extend(&mut bytes, rows, f16::to_le_bytes),
                    Some(KvRows::Bf16(rows)) => extend(&mut bytes, rows, bf16::to_le_bytes),
                    _ => {}
                }
            }
        }
        bytes
    }

    /// Forgets everything and takes over what arrays hold of the positions in `span`.
    ///
    /// # Errors
    /// Those of the caches for positions and arrays that don't fit each other.
    pub(crate) fn restore<'a>(
        &mut self,
        span: &Span,
        array: impl Fn(Array) -> &'a [u8],
    ) -> Result<(), Error> {
        let new = span.coded.end..span.end;
        match self {
            Store::F32(cache) => cache.clear_to(new.start)?,
            Store::F16(cache) => cache.clear_to(new.start)?,
            Store::Bf16(cache) => cache.clear_to(new.start)?,
            Store::PagedF32(cache) => cache.clear_to(new.start)?,
            Store::PagedF16(cache) => cache.clear_to(new.start)?,
            Store::PagedBf16(cache) => cache.clear_to(new.start)?,
            Store::Coded(cache) => {
                let [key_ranges, value_ranges] =
                    [Array::KeyRanges, Array::ValueRanges].map(|ranges| from_halves(array(ranges)));
                let tiles = CodedTiles {
                    key_codes: array(Array::KeyCodes),
                    key_ranges: &key_ranges,
                    value_codes: array(Array::ValueCodes),
                    value_ranges: &value_ranges,
                };
                cache.restore(span.coded.clone(), tiles)?;
            }
        }
        if !self.coded() && !span.coded.is_empty() {
            let (what, expected) = ("the range of codes", "none");
            let got = format!("{:?}", span.coded);
            return Err(foveal::Error::InvalidParameter { what, expected, got }.into());
        }
        // Numbers are stored in what they come from: to go by way of f32 changes no bit.
        let (heads, (key_dim, value_dim)) = (self.kv_heads(), self.dims());
        let numbers = |rows, dim| {
            let shape = Shape { batch: 1, seq: new.len(), heads, dim };
            let numbers = self.numbers(array(rows));
            let (what, got) = ("numbers of stored keys or values", numbers.len());
            match shape.checked_len() {
                Some(expected) if expected == got => Ok((numbers, shape)),
                expected => {
                    let expected = expected.unwrap_or(usize::MAX);
                    Err(foveal::Error::LengthMismatch { what, expected, got })
                }
            }
        };
        let (keys, values) = (numbers(Array::Keys, key_dim)?, numbers(Array::Values, value_dim)?);
        let (k, v) = (heads_first(&keys)?, heads_first(&values)?);
        self.make_room(None, new.len())?;
        for piece in pieces(new.clone()) {
            let part = piece.start - new.start..piece.end - new.start;
            self.append(k.tokens(part.clone()), v.tokens(part))?;
        }
        Ok(())
    }

    /// The numbers of an array of rows.
    fn numbers(&self, bytes: &[u8]) -> Vec<f32> {
        match self {
            Store::F32(_) | Store::PagedF32(_) => each(bytes, f32::from_le_bytes),
            Store::F16(_) | Store::PagedF16(_) => each(bytes, |x| f16::from_le_bytes(x).to_f32()),
            Store::Bf16(_) | Store::PagedBf16(_) | Store::Coded(_) => {
                each(bytes, |x| bf16::from_le_bytes(x).to_f32())
            }
        }
    }
}

fn each<const BYTES: usize, T>(bytes: &[u8], number: impl Fn([u8; BYTES]) -> T) -> Vec<T> {
    bytes.as_chunks().0.iter().map(|&x| number(x)).collect()
}

/// Rows of one head after the other.
fn heads_first((numbers, shape): &(Vec<f32>, Shape)) -> foveal::Result<TensorRef<'_, f32>> {
    let strides = Strides { batch: 0, seq: shape.dim, heads: shape.seq * shape.dim };
    TensorRef::from_strides(numbers, *shape, strides)
}

fn extend<E: Element, const BYTES: usize>(
    bytes: &mut Vec<u8>,
    rows: Rows<'_, E>,
    number: fn(E) -> [u8; BYTES],
) {
    for n in 0..rows.count() {
        bytes.extend(rows.row(n).iter().flat_map(|&x| number(x)));
    }
}

fn halves(ranges: &[f16]) -> Vec<u8> {
    ranges.iter().flat_map(|x| x.to_le_bytes()).collect()
}

fn from_halves(bytes: &[u8]) -> Vec<f16> {
    each(bytes, f16::from_le_bytes)
}
