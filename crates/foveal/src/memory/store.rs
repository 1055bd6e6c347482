//! What keeps the entries of a memory: a [`KvStore`] that appends, forgets and is cleared.

use crate::cache::{ContiguousCache, KvStore};
use crate::element::Element;
use crate::error::Result;
use crate::tensor::TensorRef;

/// A store of the keys and values that a memory retrieves: rows, of any storage type, or codes and the keys that they stand for,
/// wherever they lie.
///
/// Positions count the tokens of the document. [`KvStore::tile`] hands out what is searched, a tile of 256 positions or fewer at
/// a time. A store may hold more than a memory's capacity; what is older is not looked at.
pub trait MemoryStore: KvStore {
    /// Appends tokens: keys `[1, n, KV, Dk]` and values `[1, n, KV, Dv]`.
    ///
    /// # Errors
    /// Those of the store, if it has no room; it is unchanged then.
    fn append(&mut self, k: TensorRef<'_, f32>, v: TensorRef<'_, f32>) -> Result<()>;

    /// Gives up what lies before a position, or some of it.
    fn forget(&mut self, before: usize);

    /// Forgets everything; the next token has position 0.
    fn clear(&mut self);

    /// The keys that decide what is retrieved, as rows: the store itself, unless it hands out codes.
    fn exact(&self) -> &dyn KvStore;

    /// Where keys are codes: the largest Euclidean distance of a code's key from the key itself, in the tile that holds a
    /// position.
    fn distance(&self, kv_head: usize, position: usize) -> f32 {
        let _ = (kv_head, position);
        0.0
    }

    /// Bytes of what is held in memory, if that is not the keys and values as rows.
    fn held_bytes(&self) -> Option<usize> {
        None
    }
}

impl<E: Element> MemoryStore for ContiguousCache<E> {
    fn append(&mut self, k: TensorRef<'_, f32>, v: TensorRef<'_, f32>) -> Result<()> {
        ContiguousCache::append(self, k, v)
    }

    fn forget(&mut self, before: usize) {
        ContiguousCache::forget(self, before);
    }

    fn clear(&mut self) {
        ContiguousCache::clear(self);
    }

    fn exact(&self) -> &dyn KvStore {
        self
    }
}
