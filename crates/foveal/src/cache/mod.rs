//! What decoding keeps: the keys and values of the tokens seen so far.
//!
//! A [`KvStore`] holds one sequence of one layer and hands it out a tile at a time, so that every
//! attention kernel works with every store. A batch of sequences is a slice of stores, each of its own
//! length.

mod contiguous;

pub use contiguous::ContiguousCache;

use crate::element::{DType, Element};
use crate::tensor::{Rows, TensorRef};
use half::{bf16, f16};
use std::ops::Range;

/// Positions of a tile: tiles start at multiples of this, in every store and for every call.
pub const TILE: usize = crate::simd::tile::KEY_TILE;

/// Keys and values of one sequence of one layer, by absolute position.
pub trait KvStore: std::fmt::Debug + Sync {
    /// The position after the last token held: the number of tokens appended since the beginning.
    fn end(&self) -> usize;

    /// The oldest position still held: a multiple of [`TILE`].
    fn start(&self) -> usize;

    /// Key/value heads.
    fn kv_heads(&self) -> usize;

    /// Numbers of one key and of one value.
    fn dims(&self) -> (usize, usize);

    /// The type that keys and values are stored in.
    fn dtype(&self) -> DType;

    /// The keys and values of one head at `positions`, which lie within `start()..end()` and within
    /// one tile.
    fn tile(&self, head: usize, positions: Range<usize>) -> KvTile<'_>;
}

/// Keys and values of neighbouring positions.
#[derive(Debug, Clone, Copy)]
pub struct KvTile<'a> {
    /// One row a position.
    pub keys: KvRows<'a>,
    /// One row a position.
    pub values: KvRows<'a>,
}

/// Rows of any storage type.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum KvRows<'a> {
    /// `f32` rows.
    F32(Rows<'a, f32>),
    /// `f16` rows.
    F16(Rows<'a, f16>),
    /// `bf16` rows.
    Bf16(Rows<'a, bf16>),
}

/// Runs the same expression on the rows of whichever type they are.
macro_rules! with_rows {
    ($rows:expr, $name:ident => $body:expr) => {
        match $rows {
            $crate::cache::KvRows::F32($name) => $body,
            $crate::cache::KvRows::F16($name) => $body,
            $crate::cache::KvRows::Bf16($name) => $body,
        }
    };
}
pub(crate) use with_rows;

/// Rows as rows of any storage type.
pub(crate) fn kv_rows<E: Element>(rows: Rows<'_, E>) -> KvRows<'_> {
    E::kv_rows(rows)
}

/// The keys and values of a batch: stores, or tensors seen as stores.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Sequences<'a, E> {
    Stores(&'a [&'a dyn KvStore]),
    Tensors(TensorRef<'a, E>, TensorRef<'a, E>),
}

impl<'a, E: Element> Sequences<'a, E> {
    pub(crate) fn end(&self, batch: usize) -> usize {
        match self {
            Sequences::Stores(stores) => stores[batch].end(),
            Sequences::Tensors(keys, _) => keys.shape().seq,
        }
    }

    pub(crate) fn start(&self, batch: usize) -> usize {
        match self {
            Sequences::Stores(stores) => stores[batch].start(),
            Sequences::Tensors(..) => 0,
        }
    }

    /// What keys and values are stored as; `None` for a batch without sequences.
    pub(crate) fn dtype(&self) -> Option<DType> {
        match self {
            Sequences::Stores(stores) => Some(stores.first()?.dtype()),
            Sequences::Tensors(..) => Some(E::DTYPE),
        }
    }

    /// Whether values can be used where they lie, being `f32`.
    pub(crate) fn plain(&self) -> bool {
        self.dtype() == Some(DType::F32)
    }

    pub(crate) fn tile(&self, batch: usize, head: usize, positions: Range<usize>) -> KvTile<'a> {
        match self {
            Sequences::Stores(stores) => stores[batch].tile(head, positions),
            Sequences::Tensors(keys, values) => KvTile {
                keys: E::kv_rows(keys.head(batch, head).slice(positions.clone())),
                values: E::kv_rows(values.head(batch, head).slice(positions)),
            },
        }
    }
}
