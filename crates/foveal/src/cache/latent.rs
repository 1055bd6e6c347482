//! What multi-head latent attention keeps of a token: one row, shared by all heads.
//!
//! ```text
//! row = [c | kᴿ]        key: all of it, c + r numbers        value: its first c numbers
//! ```
//!
//! Values are keys cut short: they are read from the keys' memory and stored nowhere else, so that a token takes
//! (c + r) elements a layer whatever the number of heads. A [`LatentCache`] owns its rows; a [`LatentRows`] sees those
//! of another store so, pages of a pool for instance. Either is a [`KvStore`] of one head that every kernel reads.
//! DeepSeek-V2 (arXiv:2405.04434), §2.1.

use super::{ContiguousCache, KvStore, KvTile, KvValues, SharedTile};
use crate::element::{DType, Element};
use crate::error::{Error, Result};
use crate::tensor::{Shape, TensorRef};
use std::ops::Range;

/// Latent rows of one sequence of one layer, stored as `E`.
#[derive(Debug, Clone)]
pub struct LatentCache<E> {
    rows: ContiguousCache<E>,
    latent: usize,
}

impl<E: Element> LatentCache<E> {
    /// Room for `capacity` tokens with `dims.0` compressed numbers and a rotated key of `dims.1`. Allocates all of it.
    ///
    /// # Errors
    /// [`Error::ShapeOverflow`] if that is more than the address space.
    pub fn new(dims: (usize, usize), capacity: usize) -> Result<LatentCache<E>> {
        let (latent, rope) = dims;
        let rows = ContiguousCache::new(1, (latent.saturating_add(rope), 0), capacity)?;
        Ok(LatentCache { rows, latent })
    }

    /// Makes the capacity at least `capacity` tokens, as [`ContiguousCache::grow`].
    ///
    /// # Errors
    /// [`Error::ShapeOverflow`] if that is more than the address space; the cache is then unchanged.
    pub fn grow(&mut self, capacity: usize) -> Result<()> {
        self.rows.grow(capacity)
    }

    /// Tokens that can be held at once.
    pub fn capacity(&self) -> usize {
        self.rows.capacity()
    }

    /// Tokens that can still be appended before something has to be forgotten.
    pub fn room(&self) -> usize {
        self.rows.room()
    }

    /// Bytes of a token: (c + r) elements.
    pub fn bytes_per_token(&self) -> usize {
        self.rows.bytes_per_token()
    }

    /// Appends the rows `[1, tokens, 1, c + r]` of one sequence, rounding to `E`: the compressed numbers after their
    /// norm, then the key after its rotation.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] or [`Error::CacheFull`]; the cache is then unchanged.
    pub fn append<F: Element>(&mut self, rows: TensorRef<'_, F>) -> Result<()> {
        let nothing = TensorRef::new(&[], Shape { dim: 0, ..rows.shape() })?;
        self.rows.append(rows, nothing)
    }

    /// Gives up whole tiles of positions below `before`, as [`ContiguousCache::forget`].
    pub fn forget(&mut self, before: usize) {
        self.rows.forget(before);
    }

    /// Forgets everything and keeps the memory; the next token has position 0.
    pub fn clear(&mut self) {
        self.rows.clear();
    }
}

/// Another store's rows seen as latent ones.
#[derive(Debug, Clone, Copy)]
pub struct LatentRows<'a> {
    store: &'a dyn KvStore,
    latent: usize,
}

impl<'a> LatentRows<'a> {
    /// The keys of `store` as latent rows of which the first `latent` numbers are compressed.
    ///
    /// ```
    /// use foveal::cache::{KvStore, LatentRows, PagePool};
    ///
    /// let (latent, rope) = (512, 64);
    /// let store = PagePool::<f32>::new(1, (latent + rope, 0), 2)?.create();
    /// assert_eq!(LatentRows::new(&store, latent)?.dims(), (576, 512));
    /// # Ok::<(), foveal::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::InvalidParameter`] unless the store has one head, keys of at least `latent` numbers, no values, and keeps
    /// rows rather than codes.
    pub fn new(store: &'a dyn KvStore, latent: usize) -> Result<LatentRows<'a>> {
        let (width, values) = store.dims();
        if store.kv_heads() == 1 && values == 0 && latent <= width && !store.coded() {
            return Ok(LatentRows { store, latent });
        }
        let heads = store.kv_heads();
        let coded = if store.coded() { "codes" } else { "rows" };
        Err(Error::InvalidParameter {
            what: "a store of latent rows",
            expected: "one head, keys as wide as a row, values of 0 numbers, no codes",
            got: format!(
                "{heads} heads, keys of {width} for {latent} compressed numbers, values of {values}, {coded}"
            ),
        })
    }
}

impl KvStore for LatentRows<'_> {
    fn end(&self) -> usize {
        self.store.end()
    }

    fn start(&self) -> usize {
        self.store.start()
    }

    fn kv_heads(&self) -> usize {
        1
    }

    fn dims(&self) -> (usize, usize) {
        (self.store.dims().0, self.latent)
    }

    fn dtype(&self) -> DType {
        self.store.dtype()
    }

    fn shared_tile(&self, position: usize) -> Option<SharedTile> {
        self.store.shared_tile(position)
    }

    fn tile(&self, head: usize, positions: Range<usize>) -> KvTile<'_> {
        latent_tile(self.store.tile(head, positions), self.latent)
    }
}

impl<E: Element> KvStore for LatentCache<E> {
    fn end(&self) -> usize {
        self.rows.end()
    }

    fn start(&self) -> usize {
        self.rows.start()
    }

    fn kv_heads(&self) -> usize {
        1
    }

    fn dims(&self) -> (usize, usize) {
        (self.rows.dims().0, self.latent)
    }

    fn dtype(&self) -> DType {
        E::DTYPE
    }

    fn tile(&self, head: usize, positions: Range<usize>) -> KvTile<'_> {
        latent_tile(self.rows.tile(head, positions), self.latent)
    }
}

/// The values of a tile as the beginnings of its keys.
fn latent_tile(tile: KvTile<'_>, latent: usize) -> KvTile<'_> {
    let rows = tile.keys.rows().expect("stores with codes were refused");
    KvTile { values: KvValues::Rows(rows.columns(0..latent)), ..tile }
}
