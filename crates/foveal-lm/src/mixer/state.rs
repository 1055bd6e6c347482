//! What a layer of attention carries from call to call: keys and values, stored in one of several ways.
//!
//! ```text
//! f32  4 bytes a number, as they were computed      q8  8.5 bits, the newest 256 to 512 tokens bf16
//! f16  2 bytes, 11 significant bits                 q4  4.5 bits, likewise
//! bf16 2 bytes, 8 significant bits
//! ```
//!
//! Queries stay f32 whatever the store, so that nothing but what is stored is rounded, once. Scores and sums are f32.

use std::ops::Range;

use foveal::cache::codes::Bits;
use foveal::cache::{ContiguousCache, KvStore, KvTile, QuantizedCache, TILE};
use foveal::{DType, TensorRef};
use half::{bf16, f16};

use crate::Error;

/// The most tokens that a token may be made to see.
const MAX_CONTEXT: usize = 1 << 30;

/// How keys and values are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum CacheStorage {
    /// As they were computed. Training takes no other.
    #[default]
    F32,
    /// Rounded to f16. Numbers beyond 65504 are refused.
    F16,
    /// Rounded to bf16.
    Bf16,
    /// Codes of 8 bits, see [`QuantizedCache`].
    Q8,
    /// Codes of 4 bits.
    Q4,
}

impl CacheStorage {
    /// All of them.
    pub const ALL: [CacheStorage; 5] = [
        CacheStorage::F32,
        CacheStorage::F16,
        CacheStorage::Bf16,
        CacheStorage::Q8,
        CacheStorage::Q4,
    ];

    /// `f32`, `f16`, `bf16`, `q8` or `q4`.
    pub const fn name(self) -> &'static str {
        match self {
            CacheStorage::F32 => "f32",
            CacheStorage::F16 => "f16",
            CacheStorage::Bf16 => "bf16",
            CacheStorage::Q8 => "q8",
            CacheStorage::Q4 => "q4",
        }
    }

    /// The storage of that name.
    pub fn named(name: &str) -> Option<CacheStorage> {
        CacheStorage::ALL.into_iter().find(|storage| storage.name() == name)
    }
}

/// What a text's keys and values are kept as, and how many of them.
///
/// ```
/// use foveal_lm::mixer::{CacheOptions, CacheStorage};
/// let options = CacheOptions { storage: CacheStorage::Q8, ..CacheOptions::default() };
/// assert_eq!(options.context, None);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheOptions {
    /// How keys and values are stored.
    pub storage: CacheStorage,
    /// How many of the newest tokens a token sees at most, its own included, in place of the context that the model was
    /// trained with. Layers with a shorter window keep it.
    pub context: Option<usize>,
}

impl CacheOptions {
    /// # Errors
    /// [`Error::CacheOptions`] for numbers that make no sense.
    pub(crate) fn check(&self) -> Result<(), Error> {
        in_range("context of a text", self.context, "1 to 1073741824 tokens")
    }
}

fn in_range(
    what: &'static str,
    tokens: Option<usize>,
    expected: &'static str,
) -> Result<(), Error> {
    match tokens.filter(|tokens| !(1..=MAX_CONTEXT).contains(tokens)) {
        Some(found) => Err(Error::CacheOptions { what, found: found.to_string(), expected }),
        None => Ok(()),
    }
}

/// What a layer keeps of the tokens seen so far.
#[derive(Debug, Clone)]
pub struct LayerState {
    store: Store,
    /// How many of the newest tokens are seen, where that is not the layer's own reach.
    reach: Option<usize>,
}

#[derive(Debug, Clone)]
enum Store {
    F32(ContiguousCache<f32>),
    F16(ContiguousCache<f16>),
    Bf16(ContiguousCache<bf16>),
    Coded(QuantizedCache),
}

/// Runs the same expression on the store of whichever kind it is.
macro_rules! with_store {
    ($store:expr, $name:ident => $body:expr) => {
        match $store {
            Store::F32($name) => $body,
            Store::F16($name) => $body,
            Store::Bf16($name) => $body,
            Store::Coded($name) => $body,
        }
    };
}

impl LayerState {
    /// A state that holds no tokens, with keys and values of `dim` numbers for each of `kv_heads` heads.
    pub(crate) fn new(
        storage: CacheStorage,
        kv_heads: usize,
        dim: usize,
    ) -> Result<LayerState, Error> {
        let dims = (dim, dim);
        let coded = |bits| QuantizedCache::new(bits, kv_heads, dims, 0);
        let store = match storage {
            CacheStorage::F32 => Store::F32(ContiguousCache::new(kv_heads, dims, 0)?),
            CacheStorage::F16 => Store::F16(ContiguousCache::new(kv_heads, dims, 0)?),
            CacheStorage::Bf16 => Store::Bf16(ContiguousCache::new(kv_heads, dims, 0)?),
            CacheStorage::Q8 => Store::Coded(coded(Bits::Eight)?),
            CacheStorage::Q4 => Store::Coded(coded(Bits::Four)?),
        };
        Ok(LayerState { store, reach: None })
    }

    /// The same state, of which queries see no more than the `reach` newest tokens.
    pub(crate) fn with_reach(self, reach: usize) -> LayerState {
        LayerState { reach: Some(reach), ..self }
    }

    /// How many of the newest tokens are seen, where that is not the layer's own reach.
    pub(crate) fn reach(&self) -> Option<usize> {
        self.reach
    }

    /// How keys and values are stored.
    pub fn storage(&self) -> CacheStorage {
        match &self.store {
            Store::F32(_) => CacheStorage::F32,
            Store::F16(_) => CacheStorage::F16,
            Store::Bf16(_) => CacheStorage::Bf16,
            Store::Coded(cache) => match cache.bits() {
                Bits::Four => CacheStorage::Q4,
                _ => CacheStorage::Q8,
            },
        }
    }

    /// Bytes of the keys and values that are held.
    pub fn bytes(&self) -> usize {
        let tokens = self.end() - self.start();
        match &self.store {
            Store::F32(cache) => tokens * cache.bytes_per_token(),
            Store::F16(cache) => tokens * cache.bytes_per_token(),
            Store::Bf16(cache) => tokens * cache.bytes_per_token(),
            Store::Coded(cache) => cache.bytes(),
        }
    }

    /// Forgets everything and keeps the memory; the next token has position 0.
    pub fn clear(&mut self) {
        with_store!(&mut self.store, cache => cache.clear());
    }

    /// Appends the tokens of one sequence, `[1, tokens, kv_heads, dim]`, for which there is room.
    pub(crate) fn append(
        &mut self,
        k: TensorRef<'_, f32>,
        v: TensorRef<'_, f32>,
    ) -> Result<(), Error> {
        if let Store::F16(_) = self.store {
            check_f16(k)?;
            check_f16(v)?;
        }
        Ok(with_store!(&mut self.store, cache => cache.append(k, v))?)
    }

    /// Gives up what no query from `end()` on can see, and makes room for `tokens` more.
    ///
    /// The room doubles, up to what is ever held: the reach, the tile that is being filled and the one being left.
    pub(crate) fn make_room(&mut self, reach: Option<usize>, tokens: usize) -> Result<(), Error> {
        let (position, reach) = (self.end(), reach.unwrap_or(usize::MAX));
        let forgotten = (position + 1).saturating_sub(reach);
        with_store!(&mut self.store, cache => {
            cache.forget(forgotten);
            if cache.room() < tokens {
                let needed = position - cache.start() + tokens;
                let most = reach.saturating_add(2 * TILE);
                let doubled = needed.next_power_of_two().max(TILE);
                cache.grow(doubled.min(most).max(needed))?;
            }
        });
        Ok(())
    }
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

impl KvStore for LayerState {
    fn end(&self) -> usize {
        with_store!(&self.store, cache => cache.end())
    }

    fn start(&self) -> usize {
        with_store!(&self.store, cache => cache.start())
    }

    fn kv_heads(&self) -> usize {
        with_store!(&self.store, cache => cache.kv_heads())
    }

    fn dims(&self) -> (usize, usize) {
        with_store!(&self.store, cache => cache.dims())
    }

    fn dtype(&self) -> DType {
        with_store!(&self.store, cache => cache.dtype())
    }

    fn coded(&self) -> bool {
        with_store!(&self.store, cache => cache.coded())
    }

    fn tile(&self, head: usize, positions: Range<usize>) -> KvTile<'_> {
        with_store!(&self.store, cache => cache.tile(head, positions))
    }
}
