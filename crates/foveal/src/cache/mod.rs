//! What decoding keeps: the keys and values of the tokens seen so far.
//!
//! A [`KvStore`] holds one sequence of one layer and hands it out a tile at a time, so that every
//! attention kernel works with every store. A batch of sequences is a slice of stores, each of its own
//! length.

pub mod codes;
mod contiguous;
pub mod eviction;
mod latent;
mod paged;
mod quantized;
mod rolling;

pub use contiguous::ContiguousCache;
pub use latent::{LatentCache, LatentRows};
pub use paged::{PagePool, PagedCache};
pub use quantized::{CodedTiles, QuantizedCache};
pub use rolling::{Rolling, RollingCall, RollingScratch};

use crate::element::{DType, Element};
use crate::error::{Error, Result};
use crate::tensor::{Rows, Shape, TensorRef};
use codes::{ChannelCodes, TokenCodes};
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

    /// The type that keys and values are stored in, or are decoded to for a call whose queries have it.
    fn dtype(&self) -> DType;

    /// Whether tiles may be handed out as codes, now or later.
    fn coded(&self) -> bool {
        false
    }

    /// Which memory the tile that begins at `position` is, if other stores may read the same. Of two stores in one call that
    /// answer alike for a tile, both hold the same keys and values there, of all heads: they may be read once for both.
    fn shared_tile(&self, position: usize) -> Option<SharedTile> {
        let _ = position;
        None
    }

    /// The keys and values of one head at `positions`: those of one tile that lie within `start()..end()`.
    /// A store that keeps rows may be asked for fewer.
    fn tile(&self, head: usize, positions: Range<usize>) -> KvTile<'_>;
}

/// A tile's memory, by what it belongs to and its number there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SharedTile {
    /// The pool's address, or any number that no other owner in the call has.
    pub owner: usize,
    /// The number of the page.
    pub number: usize,
}

/// Keys and values of neighbouring positions.
#[derive(Debug, Clone, Copy)]
pub struct KvTile<'a> {
    /// One key a position.
    pub keys: KvKeys<'a>,
    /// One value a position.
    pub values: KvValues<'a>,
}

/// Keys of neighbouring positions.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum KvKeys<'a> {
    /// As numbers.
    Rows(KvRows<'a>),
    /// As codes: a whole tile.
    Channels(ChannelCodes<'a>),
}

/// Values of neighbouring positions.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum KvValues<'a> {
    /// As numbers.
    Rows(KvRows<'a>),
    /// As codes: a whole tile.
    Tokens(TokenCodes<'a>),
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

impl<'a> KvRows<'a> {
    /// A range of each row's numbers.
    pub(crate) fn columns(self, columns: Range<usize>) -> KvRows<'a> {
        match self {
            KvRows::F32(rows) => KvRows::F32(rows.columns(columns)),
            KvRows::F16(rows) => KvRows::F16(rows.columns(columns)),
            KvRows::Bf16(rows) => KvRows::Bf16(rows.columns(columns)),
        }
    }

    /// The number of rows.
    pub fn count(&self) -> usize {
        with_rows!(self, rows => rows.count())
    }

    /// Elements of a row.
    pub fn width(&self) -> usize {
        with_rows!(self, rows => rows.width())
    }
}

impl<'a> KvKeys<'a> {
    /// The rows of keys that are no codes.
    pub fn rows(self) -> Option<KvRows<'a>> {
        match self {
            KvKeys::Rows(rows) => Some(rows),
            KvKeys::Channels(_) => None,
        }
    }

    /// The number of keys, and of numbers in one.
    pub(crate) fn size(&self) -> (usize, usize) {
        match self {
            KvKeys::Rows(rows) => (rows.count(), rows.width()),
            KvKeys::Channels(codes) => (TILE, codes.width()),
        }
    }
}

impl<'a> KvValues<'a> {
    /// The rows of values that are no codes.
    pub fn rows(self) -> Option<KvRows<'a>> {
        match self {
            KvValues::Rows(rows) => Some(rows),
            KvValues::Tokens(_) => None,
        }
    }

    /// The number of values, and of numbers in one.
    pub(crate) fn size(&self) -> (usize, usize) {
        match self {
            KvValues::Rows(rows) => (rows.count(), rows.width()),
            KvValues::Tokens(codes) => (TILE, codes.width()),
        }
    }
}

/// Checks that tokens of these shapes fit a store; returns how many there are.
fn check_appended(store: &dyn KvStore, k: Shape, v: Shape) -> Result<usize> {
    let (key_dim, value_dim) = store.dims();
    let expected = Shape { batch: 1, seq: k.seq, heads: store.kv_heads(), dim: key_dim };
    for (what, dim, got) in [("appended keys", key_dim, k), ("appended values", value_dim, v)] {
        let expected = Shape { dim, ..expected };
        if got != expected {
            return Err(Error::ShapeMismatch { what, expected, got });
        }
    }
    Ok(k.seq)
}

/// One of the rows of `dim` numbers that data consists of.
fn row_mut<E>(data: &mut [E], row: usize, dim: usize) -> &mut [E] {
    &mut data[row * dim..(row + 1) * dim]
}

/// Copies a row to another type.
fn store<F: Element, E: Element>(from: &[F], to: &mut [E]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = E::from_f32(from.to_f32());
    }
}

/// Cuts positions at multiples of [`TILE`]. A prompt that is appended and attended to piece by piece has the same bits
/// however it was cut before, whatever the store: see [`QuantizedCache`].
pub fn pieces(positions: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let tiles = positions.start / TILE..positions.end.div_ceil(TILE);
    tiles.map(move |t| {
        let end = t.saturating_add(1).saturating_mul(TILE);
        (t * TILE).max(positions.start)..end.min(positions.end)
    })
}

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

    /// What a sequence's keys and values are stored as, or decoded to.
    pub(crate) fn dtype(&self, batch: usize) -> DType {
        match self {
            Sequences::Stores(stores) => stores[batch].dtype(),
            Sequences::Tensors(..) => E::DTYPE,
        }
    }

    /// Whether a sequence's keys and values may be codes.
    pub(crate) fn coded(&self, batch: usize) -> bool {
        match self {
            Sequences::Stores(stores) => stores[batch].coded(),
            Sequences::Tensors(..) => false,
        }
    }

    /// Whether values can be used where they lie, being `f32`.
    pub(crate) fn plain(&self) -> bool {
        match self {
            Sequences::Stores(stores) => stores.iter().all(|store| store.dtype() == DType::F32),
            Sequences::Tensors(..) => E::DTYPE == DType::F32,
        }
    }

    /// Whether sequences may hold tiles in the same memory, from their beginning on.
    pub(crate) fn may_share(&self) -> bool {
        match self {
            Sequences::Stores(stores) => {
                let shared = |store: &&&dyn KvStore| store.shared_tile(store.start()).is_some();
                stores.iter().filter(shared).count() > 1
            }
            Sequences::Tensors(..) => false,
        }
    }

    /// Whether two sequences hold positions of the first one, all that it holds of a span, in the same memory, and the
    /// other one holds no more of the span.
    pub(crate) fn share(
        &self,
        (a, b): (usize, usize),
        positions: &Range<usize>,
        span: usize,
    ) -> bool {
        let Sequences::Stores(stores) = self else { return false };
        let (a, b) = (stores[a], stores[b]);
        let whole = positions.end.is_multiple_of(span) && positions.end <= b.end();
        let alike = a.start() == b.start() && (whole || positions.end == b.end());
        let first = positions.start / TILE * TILE;
        let same = |position: usize| {
            let tile = a.shared_tile(position);
            tile.is_some() && tile == b.shared_tile(position)
        };
        !positions.is_empty() && alike && (first..positions.end).step_by(TILE).all(same)
    }

    pub(crate) fn tile(&self, batch: usize, head: usize, positions: Range<usize>) -> KvTile<'a> {
        match self {
            Sequences::Stores(stores) => stores[batch].tile(head, positions),
            Sequences::Tensors(keys, values) => KvTile {
                keys: KvKeys::Rows(E::kv_rows(keys.head(batch, head).slice(positions.clone()))),
                values: KvValues::Rows(E::kv_rows(values.head(batch, head).slice(positions))),
            },
        }
    }
}
