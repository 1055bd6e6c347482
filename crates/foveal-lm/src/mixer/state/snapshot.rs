//! What a store holds as arrays of plain numbers, and a store made of them again, to the bit.
//!
//! ```text
//! keys, values                               [kv_heads, tokens, dim]   the rows that are no codes, as they are stored
//! key_codes, key_ranges, value_codes, …      [tiles, kv_heads, …]      coded tiles, as they lie in memory
//! ```
//!
//! Arrays are made one at a time, when they are asked for.

use std::ops::Range;

use foveal::cache::{CodedTiles, ContiguousCache, KvRows, KvStore, QuantizedCache, pieces};
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
            (_, Store::F32(_)) => Dtype::F32,
            (_, Store::F16(_)) => Dtype::F16,
            (_, Store::Bf16(_) | Store::Coded(_)) => Dtype::BF16,
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
            let tile = self.tile(head, coded.end..end);
            let rows = if array == Array::Keys { tile.keys.rows() } else { tile.values.rows() };
            match rows {
                Some(KvRows::F32(rows)) => extend(&mut bytes, rows, f32::to_le_bytes),
                Some(KvRows::F16(rows)) => extend(&mut bytes, rows, f16::to_le_bytes),
                Some(KvRows::Bf16(rows)) => extend(&mut bytes, rows, bf16::to_le_bytes),
                _ => {}
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
        let rows = [array(Array::Keys), array(Array::Values)];
        if !self.coded() && !span.coded.is_empty() {
            let (what, expected) = ("the range of codes", "none");
            let got = format!("{:?}", span.coded);
            return Err(foveal::Error::InvalidParameter { what, expected, got }.into());
        }
        if let Store::Coded(cache) = self {
            let [key_ranges, value_ranges] =
                [array(Array::KeyRanges), array(Array::ValueRanges)].map(from_halves);
            let tiles = CodedTiles {
                key_codes: array(Array::KeyCodes),
                key_ranges: &key_ranges,
                value_codes: array(Array::ValueCodes),
                value_ranges: &value_ranges,
            };
            cache.restore(span.coded.clone(), tiles)?;
        }
        let new = span.coded.end..span.end;
        match self {
            Store::F32(cache) => {
                cache.clear_to(new.start)?;
                append(cache, &new, rows, f32::from_le_bytes)
            }
            Store::F16(cache) => {
                cache.clear_to(new.start)?;
                append(cache, &new, rows, f16::from_le_bytes)
            }
            Store::Bf16(cache) => {
                cache.clear_to(new.start)?;
                append(cache, &new, rows, bf16::from_le_bytes)
            }
            Store::Coded(cache) => append(cache, &new, rows, bf16::from_le_bytes),
        }
    }
}

/// A cache that takes rows of one type.
trait Appends<E>: KvStore {
    fn room_for(&mut self, held: usize) -> foveal::Result<()>;
    fn append(&mut self, k: TensorRef<'_, E>, v: TensorRef<'_, E>) -> foveal::Result<()>;
}

impl<E: Element> Appends<E> for ContiguousCache<E> {
    fn room_for(&mut self, held: usize) -> foveal::Result<()> {
        self.grow(held)
    }

    fn append(&mut self, k: TensorRef<'_, E>, v: TensorRef<'_, E>) -> foveal::Result<()> {
        ContiguousCache::append(self, k, v)
    }
}

impl Appends<bf16> for QuantizedCache {
    fn room_for(&mut self, held: usize) -> foveal::Result<()> {
        self.grow(held)
    }

    fn append(&mut self, k: TensorRef<'_, bf16>, v: TensorRef<'_, bf16>) -> foveal::Result<()> {
        QuantizedCache::append(self, k, v)
    }
}

/// Appends the rows of the positions `new`, as [`Store::array_bytes`] writes them.
fn append<E: Element, const BYTES: usize>(
    cache: &mut impl Appends<E>,
    new: &Range<usize>,
    rows: [&[u8]; 2],
    number: fn([u8; BYTES]) -> E,
) -> Result<(), Error> {
    let (heads, (key_dim, value_dim)) = (cache.kv_heads(), cache.dims());
    let shapes = [key_dim, value_dim].map(|dim| Shape { batch: 1, seq: new.len(), heads, dim });
    for (bytes, shape) in rows.iter().zip(shapes) {
        let (what, got) = ("numbers of stored keys or values", bytes.len() / BYTES);
        let expected = shape.checked_len().unwrap_or(usize::MAX);
        if got != expected {
            return Err(foveal::Error::LengthMismatch { what, expected, got }.into());
        }
    }
    cache.room_for(new.end - cache.start())?;
    let numbers = |bytes: &[u8]| bytes.as_chunks().0.iter().map(|&x| number(x)).collect::<Vec<E>>();
    let [keys, values] = rows.map(numbers);
    let strides = |dim| Strides { batch: 0, seq: dim, heads: new.len() * dim };
    let k = TensorRef::from_strides(&keys, shapes[0], strides(key_dim))?;
    let v = TensorRef::from_strides(&values, shapes[1], strides(value_dim))?;
    for piece in pieces(new.clone()) {
        let part = piece.start - new.start..piece.end - new.start;
        cache.append(k.tokens(part.clone()), v.tokens(part))?;
    }
    Ok(())
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
    bytes.as_chunks().0.iter().map(|&x| f16::from_le_bytes(x)).collect()
}
