//! Keys and values in any of their forms, as one type.

use std::ops::Range;

use foveal::cache::codes::Bits;
use foveal::cache::{
    ContiguousCache, KvStore, KvTile, PagedCache, QuantizedCache, SharedTile, TILE,
};
use foveal::memory::MemoryStore;
use foveal::{DType, TensorRef};
use half::{bf16, f16};

use super::CacheStorage;
use crate::Error;

/// Keys and values of one sequence of one layer.
#[derive(Debug, Clone)]
pub(crate) enum Store {
    F32(ContiguousCache<f32>),
    F16(ContiguousCache<f16>),
    Bf16(ContiguousCache<bf16>),
    Coded(QuantizedCache),
    PagedF32(PagedCache<f32>),
    PagedF16(PagedCache<f16>),
    PagedBf16(PagedCache<bf16>),
}

/// Runs the same expression on the store of whichever kind it is.
macro_rules! with_store {
    ($store:expr, $name:ident => $body:expr) => {
        match $store {
            Store::F32($name) => $body,
            Store::F16($name) => $body,
            Store::Bf16($name) => $body,
            Store::Coded($name) => $body,
            Store::PagedF32($name) => $body,
            Store::PagedF16($name) => $body,
            Store::PagedBf16($name) => $body,
        }
    };
}

impl Store {
    /// A store without tokens, for keys of `dims.0` and values of `dims.1` numbers for each of `kv_heads` heads.
    pub(in crate::mixer) fn new(
        storage: CacheStorage,
        kv_heads: usize,
        dims: (usize, usize),
    ) -> Result<Store, Error> {
        let coded = |bits| QuantizedCache::new(bits, kv_heads, dims, 0);
        Ok(match storage {
            CacheStorage::F32 => Store::F32(ContiguousCache::new(kv_heads, dims, 0)?),
            CacheStorage::F16 => Store::F16(ContiguousCache::new(kv_heads, dims, 0)?),
            CacheStorage::Bf16 => Store::Bf16(ContiguousCache::new(kv_heads, dims, 0)?),
            CacheStorage::Q8 => Store::Coded(coded(Bits::Eight)?),
            CacheStorage::Q4 => Store::Coded(coded(Bits::Four)?),
        })
    }

    pub(super) fn storage(&self) -> CacheStorage {
        match self {
            Store::F32(_) | Store::PagedF32(_) => CacheStorage::F32,
            Store::F16(_) | Store::PagedF16(_) => CacheStorage::F16,
            Store::Bf16(_) | Store::PagedBf16(_) => CacheStorage::Bf16,
            Store::Coded(cache) => match cache.bits() {
                Bits::Four => CacheStorage::Q4,
                _ => CacheStorage::Q8,
            },
        }
    }

    /// Tokens held.
    pub(super) fn held(&self) -> usize {
        self.end() - self.start()
    }

    /// Whether it has so many tokens, and all of them that the next query sees, of the newest `reach`.
    pub(in crate::mixer) fn is_at(&self, reach: Option<usize>, position: usize) -> bool {
        let seen = (position + 1).saturating_sub(reach.unwrap_or(usize::MAX));
        self.end() == position && self.start() <= seen
    }

    /// Bytes of what is held.
    pub(in crate::mixer) fn bytes(&self) -> usize {
        match self {
            Store::Coded(cache) => cache.bytes(),
            _ => {
                let (key_dim, value_dim) = self.dims();
                self.held() * self.kv_heads() * (key_dim + value_dim) * self.dtype().size()
            }
        }
    }

    pub(in crate::mixer) fn clear(&mut self) {
        with_store!(self, cache => cache.clear());
    }

    /// Appends tokens for which there is room.
    pub(in crate::mixer) fn append(
        &mut self,
        k: TensorRef<'_, f32>,
        v: TensorRef<'_, f32>,
    ) -> Result<(), Error> {
        if self.storage() == CacheStorage::F16 {
            check_f16(k)?;
            check_f16(v)?;
        }
        Ok(with_store!(self, cache => cache.append(k, v))?)
    }

    /// Gives up what no query from `end()` on can see, and makes room for `tokens` more.
    ///
    /// The room doubles, up to what is ever held: the reach, the tile that is being filled and the one being left.
    pub(in crate::mixer) fn make_room(
        &mut self,
        reach: Option<usize>,
        tokens: usize,
    ) -> Result<(), Error> {
        let forgotten = (self.end() + 1).saturating_sub(reach.unwrap_or(usize::MAX));
        with_store!(self, cache => cache.forget(forgotten));
        match self {
            Store::F32(cache) if cache.room() < tokens => cache.grow(room(cache, reach, tokens))?,
            Store::F16(cache) if cache.room() < tokens => cache.grow(room(cache, reach, tokens))?,
            Store::Bf16(cache) if cache.room() < tokens => {
                cache.grow(room(cache, reach, tokens))?
            }
            Store::Coded(cache) if cache.room() < tokens => {
                cache.grow(room(cache, reach, tokens))?
            }
            _ => {}
        }
        Ok(())
    }

    /// Pages that an append of `tokens` tokens takes.
    pub(super) fn pages_for(&self, tokens: usize) -> usize {
        match self {
            Store::PagedF32(cache) => cache.pages_for(tokens),
            Store::PagedF16(cache) => cache.pages_for(tokens),
            Store::PagedBf16(cache) => cache.pages_for(tokens),
            _ => 0,
        }
    }

    /// Forgets the tokens from `position` on. Stores of codes have been refused before.
    pub(super) fn truncate(&mut self, position: usize) {
        match self {
            Store::F32(cache) => cache.truncate(position),
            Store::F16(cache) => cache.truncate(position),
            Store::Bf16(cache) => cache.truncate(position),
            Store::Coded(cache) => debug_assert_eq!(position, cache.end()),
            Store::PagedF32(cache) => cache.truncate(position),
            Store::PagedF16(cache) => cache.truncate(position),
            Store::PagedBf16(cache) => cache.truncate(position),
        }
    }

    /// Gives up all keys of each head but the chosen ones. Stores of codes and of pages have been refused before.
    pub(super) fn retain(&mut self, kept: &[Vec<usize>]) -> Result<(), Error> {
        match self {
            Store::F32(cache) => Ok(cache.retain(kept)?),
            Store::F16(cache) => Ok(cache.retain(kept)?),
            Store::Bf16(cache) => Ok(cache.retain(kept)?),
            _ => Err(Error::CacheOptions {
                what: "storage of an eviction",
                found: self.storage().name().to_owned(),
                expected: "f32, f16 or bf16, without pages".to_owned(),
            }),
        }
    }
}

/// How many tokens there is to be room for.
fn room(cache: &impl KvStore, reach: Option<usize>, tokens: usize) -> usize {
    let needed = cache.end() - cache.start() + tokens;
    let most = reach.unwrap_or(usize::MAX).saturating_add(2 * TILE);
    needed.next_power_of_two().max(TILE).min(most).max(needed)
}

/// Refuses numbers that an f16 would turn into infinity. What is no number, or infinite already, stays what it is.
fn check_f16(x: TensorRef<'_, f32>) -> Result<(), Error> {
    /// From here on f16 rounds to infinity.
    const LIMIT: f32 = 65520.0;
    let beyond = |x: &f32| (LIMIT..f32::INFINITY).contains(&x.abs());
    let shape = x.shape();
    for (token, head) in (0..shape.seq).flat_map(|t| (0..shape.heads).map(move |head| (t, head))) {
        let row = x.row(0, token, head);
        // A sum of flags has no early exit and is computed many numbers at a time.
        if row.iter().map(|x| u32::from(beyond(x))).sum::<u32>() > 0 {
            let found = row.iter().copied().find(beyond).unwrap_or(f32::NAN);
            return Err(Error::KeyValue { found });
        }
    }
    Ok(())
}

impl MemoryStore for Store {
    /// Room is made as it is needed. Numbers beyond f16 are refused by name, as [`Store::append`] refuses them.
    fn append(&mut self, k: TensorRef<'_, f32>, v: TensorRef<'_, f32>) -> foveal::Result<()> {
        let refused = |error: Error| match error {
            Error::Kernel(error) => error,
            error => foveal::Error::InvalidParameter {
                what: "a key or value of a memory",
                expected: "one that its storage holds",
                got: error.to_string(),
            },
        };
        self.make_room(None, k.shape().seq).map_err(refused)?;
        Store::append(self, k, v).map_err(refused)
    }

    fn forget(&mut self, before: usize) {
        with_store!(self, cache => cache.forget(before));
    }

    fn clear(&mut self) {
        Store::clear(self);
    }

    fn exact(&self) -> &dyn KvStore {
        self
    }
}

impl KvStore for Store {
    fn end(&self) -> usize {
        with_store!(self, cache => cache.end())
    }

    fn start(&self) -> usize {
        with_store!(self, cache => cache.start())
    }

    fn kv_heads(&self) -> usize {
        with_store!(self, cache => cache.kv_heads())
    }

    fn dims(&self) -> (usize, usize) {
        with_store!(self, cache => cache.dims())
    }

    fn dtype(&self) -> DType {
        with_store!(self, cache => cache.dtype())
    }

    fn coded(&self) -> bool {
        with_store!(self, cache => cache.coded())
    }

    fn shared_tile(&self, position: usize) -> Option<SharedTile> {
        with_store!(self, cache => cache.shared_tile(position))
    }

    fn tile(&self, head: usize, positions: Range<usize>) -> KvTile<'_> {
        with_store!(self, cache => cache.tile(head, positions))
    }
}
