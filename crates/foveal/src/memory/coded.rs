//! A memory whose keys and values are searched and read as codes of 8 bits, and whose keys decide.
//!
//! ```text
//! in memory    codes of k̂ and v, 8.5 bits a number (the newest 256 to 512 tokens bf16), and a distance for each tile and head
//! elsewhere    k̂ as rows of 16 bits (or 32): only those of candidates are read
//! ```
//!
//! What is retrieved is what the rows alone would have given: the distance of codes from keys bounds how far a score from codes
//! may be wrong, and all keys that may be among the best are scored again. Values are those of the codes.

use super::MemoryStore;
use crate::cache::{KvKeys, KvRows, KvStore, KvTile, QuantizedCache, TILE, codes::Bits, pieces};
use crate::element::DType;
use crate::error::{Error, Result};
use crate::tensor::{Shape, Tensor, TensorRef};
use std::ops::Range;

/// Codes of 8 bits, and a store of the keys that they stand for.
#[derive(Debug, Clone)]
pub struct CodedMemory<X> {
    codes: QuantizedCache,
    exact: X,
    /// `[tile from codes.start() on][head]`.
    distances: Vec<f32>,
    /// Codes are made of these positions' keys.
    measured: usize,
}

impl<X: MemoryStore> CodedMemory<X> {
    /// Codes for the keys of a store of rows, and values of so many numbers. Tokens that the store holds are coded, for which it
    /// needs their values; else it may have keys alone (values of 0 numbers).
    ///
    /// # Errors
    /// [`Error::InvalidParameter`] for a store of codes, or tokens without values or with numbers that codes can't stand for;
    /// [`Error::ShapeOverflow`].
    pub fn new(exact: X, value_dim: usize) -> Result<CodedMemory<X>> {
        let (key_dim, stored) = exact.dims();
        let without = stored != value_dim && (stored != 0 || exact.end() != 0);
        if exact.coded() || without {
            let what = "store of a coded memory's keys";
            let expected = "rows of keys, empty or with the values";
            let codes = if exact.coded() { ", codes" } else { "" };
            let got = format!("values of {stored} numbers, {} tokens{codes}", exact.end());
            return Err(Error::InvalidParameter { what, expected, got });
        }
        let mut codes =
            QuantizedCache::new(Bits::Eight, exact.kv_heads(), (key_dim, value_dim), 0)?;
        codes.clear_to(exact.start())?;
        let (distances, measured) = (vec![], exact.start());
        let mut memory = CodedMemory { codes, exact, distances, measured };
        for piece in pieces(memory.exact.start()..memory.exact.end()) {
            let [k, v] = memory.rows(piece)?;
            memory.code(k.view(), v.view())?;
        }
        memory.measure();
        Ok(memory)
    }

    /// The keys that decide.
    pub fn keys(&self) -> &X {
        &self.exact
    }

    /// The store of rows alone.
    pub fn into_keys(self) -> X {
        self.exact
    }

    /// Keys and values of a piece that the store of rows holds.
    fn rows(&self, piece: Range<usize>) -> Result<[Tensor<f32>; 2]> {
        let (dims, heads) = (self.codes.dims(), self.codes.kv_heads());
        let shape = |dim| Shape { batch: 1, seq: piece.len(), heads, dim };
        let mut rows = [Tensor::zeros(shape(dims.0))?, Tensor::zeros(shape(dims.1))?];
        for head in 0..heads {
            let tile = self.exact.tile(head, piece.clone());
            for (to, from) in rows.iter_mut().zip([tile.keys.rows(), tile.values.rows()]) {
                let mut to = to.view_mut();
                let Some(from) = from else { continue };
                (0..piece.len()).for_each(|t| widen(from, t, to.row_mut(0, t, head)));
            }
        }
        Ok(rows)
    }

    /// Appends tokens to the codes, for which room is made.
    fn code(&mut self, k: TensorRef<'_, f32>, v: TensorRef<'_, f32>) -> Result<()> {
        let needed = self.codes.end() - self.codes.start() + k.shape().seq;
        if needed > self.codes.capacity() {
            // A sixteenth more than needed: what is held is copied now and then.
            self.codes.grow((needed + needed / 16).next_multiple_of(TILE))?;
        }
        self.codes.append(k, v)
    }

    /// Takes note of how far codes are from the keys: of tiles that were coded, and of those that got new tokens.
    fn measure(&mut self) {
        let heads = self.codes.kv_heads();
        let (start, end) = (self.codes.start() / TILE, self.codes.end().div_ceil(TILE));
        self.distances.resize((end - start) * heads, 0.0);
        for tile in self.measured / TILE..end {
            let at =
                (tile * TILE).max(self.codes.start())..((tile + 1) * TILE).min(self.codes.end());
            for head in 0..heads {
                self.distances[(tile - start) * heads + head] = self.farthest(head, at.clone());
            }
        }
        self.measured = self.codes.coded_positions().end;
    }

    /// The largest distance in a tile, rounded up.
    fn farthest(&self, head: usize, at: Range<usize>) -> f32 {
        let coded = self.codes.tile(head, at.clone()).keys;
        if matches!(coded, KvKeys::Rows(_)) && self.exact.dtype() == self.codes.dtype() {
            return 0.0;
        }
        let Some(exact) = self.exact.tile(head, at.clone()).keys.rows() else { return 0.0 };
        let dim = self.codes.dims().0;
        let (mut row, mut own) = (vec![0.0f32; dim], vec![0.0f32; dim]);
        let squares = (0..at.len()).map(|t| {
            widen(exact, t, &mut row);
            match coded {
                KvKeys::Rows(rows) => widen(rows, t, &mut own),
                KvKeys::Channels(codes) => {
                    own.iter_mut().enumerate().for_each(|(c, x)| *x = codes.number(t, c));
                }
            }
            let square = |(a, b): (&f32, &f32)| (f64::from(*a) - f64::from(*b)).powi(2);
            row.iter().zip(&own).map(square).sum::<f64>()
        });
        (squares.fold(0.0, f64::max).sqrt() as f32).next_up()
    }
}

fn widen(rows: KvRows<'_>, t: usize, to: &mut [f32]) {
    match rows {
        KvRows::F32(rows) => to.copy_from_slice(rows.row(t)),
        KvRows::F16(rows) => to.iter_mut().zip(rows.row(t)).for_each(|(x, y)| *x = y.to_f32()),
        KvRows::Bf16(rows) => to.iter_mut().zip(rows.row(t)).for_each(|(x, y)| *x = y.to_f32()),
    }
}

impl<X: MemoryStore> MemoryStore for CodedMemory<X> {
    /// Appends to both stores.
    ///
    /// # Errors
    /// [`Error::InvalidParameter`] for numbers that codes can't stand for, and those of the store of keys, after which the
    /// memory is to be cleared.
    fn append(&mut self, k: TensorRef<'_, f32>, v: TensorRef<'_, f32>) -> Result<()> {
        self.code(k, v)?;
        match self.exact.dims().1 {
            0 => {
                let none = Tensor::zeros(Shape { dim: 0, ..v.shape() })?;
                self.exact.append(k, none.view())?;
            }
            _ => self.exact.append(k, v)?,
        }
        self.measure();
        Ok(())
    }

    fn forget(&mut self, before: usize) {
        let start = self.codes.start();
        self.codes.forget(before);
        // Keys are kept at least as long as codes.
        self.exact.forget(self.codes.start());
        let gone = (self.codes.start() - start) / TILE * self.codes.kv_heads();
        self.distances.drain(..gone.min(self.distances.len()));
        self.measured = self.measured.max(self.codes.start());
    }

    fn clear(&mut self) {
        self.codes.clear();
        self.exact.clear();
        self.distances.clear();
        self.measured = 0;
    }

    fn exact(&self) -> &dyn KvStore {
        self.exact.exact()
    }

    fn distance(&self, kv_head: usize, position: usize) -> f32 {
        let tile = (position - self.codes.start()) / TILE;
        self.distances[tile * self.codes.kv_heads() + kv_head]
    }

    fn held_bytes(&self) -> Option<usize> {
        Some(self.codes.bytes() + size_of_val(&self.distances[..]))
    }
}

impl<X: MemoryStore> KvStore for CodedMemory<X> {
    fn end(&self) -> usize {
        self.codes.end()
    }

    fn start(&self) -> usize {
        self.codes.start()
    }

    fn kv_heads(&self) -> usize {
        self.codes.kv_heads()
    }

    fn dims(&self) -> (usize, usize) {
        self.codes.dims()
    }

    fn dtype(&self) -> DType {
        self.codes.dtype()
    }

    fn coded(&self) -> bool {
        true
    }

    fn tile(&self, head: usize, positions: Range<usize>) -> KvTile<'_> {
        self.codes.tile(head, positions)
    }
}
