//! Pages for the keys and values of many texts: a pool for each size that a model's layers have.
//!
//! ```text
//! pages of a text of n tokens in a layer of reach r:   at most  min(⌈n / 256⌉, ⌈r / 256⌉ + 3)
//! ```

use std::sync::Arc;

use foveal::cache::{KvStore, PagePool, TILE};
use half::{bf16, f16};

use super::store::Store;
use super::{CacheOptions, CacheStorage, LayerState};
use crate::Error;

/// Pages of 256 tokens from which the states of many texts take. Texts with the same beginning hold the same pages, see
/// [`State::fork`](crate::model::State::fork).
///
/// A handle: clones are the same pages. They are allocated when first taken, and stay.
#[derive(Clone, Debug)]
pub struct Pages(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    options: CacheOptions,
    pools: Vec<Pool>,
    /// For each layer, its pool and how many of the newest tokens it sees.
    layers: Vec<(usize, Option<usize>)>,
}

/// Key/value heads, and numbers of a key and of a value.
type Size = (usize, (usize, usize));

/// A pool of any storage.
#[derive(Debug)]
enum Pool {
    F32(PagePool<f32>),
    F16(PagePool<f16>),
    Bf16(PagePool<bf16>),
}

/// Runs the same expression on the pool of whichever storage it is.
macro_rules! with_pool {
    ($pool:expr, $name:ident => $body:expr) => {
        match $pool {
            Pool::F32($name) => $body,
            Pool::F16($name) => $body,
            Pool::Bf16($name) => $body,
        }
    };
}

impl Pool {
    fn new(storage: CacheStorage, (kv_heads, dims): Size, pages: usize) -> Result<Pool, Error> {
        Ok(match storage {
            CacheStorage::F32 => Pool::F32(PagePool::new(kv_heads, dims, pages)?),
            CacheStorage::F16 => Pool::F16(PagePool::new(kv_heads, dims, pages)?),
            CacheStorage::Bf16 => Pool::Bf16(PagePool::new(kv_heads, dims, pages)?),
            CacheStorage::Q8 | CacheStorage::Q4 => {
                return Err(Error::CacheOptions {
                    what: "storage of pages",
                    found: storage.name().to_owned(),
                    expected: "f32, f16 or bf16".to_owned(),
                });
            }
        })
    }

    fn create(&self) -> Store {
        match self {
            Pool::F32(pool) => Store::PagedF32(pool.create()),
            Pool::F16(pool) => Store::PagedF16(pool.create()),
            Pool::Bf16(pool) => Store::PagedBf16(pool.create()),
        }
    }
}

impl Pages {
    /// Pages for `tokens` tokens in each of `layers`, states without tokens with their layers' reach.
    pub(crate) fn new(
        options: &CacheOptions,
        layers: &[(LayerState, Option<usize>)],
        tokens: usize,
    ) -> Result<Pages, Error> {
        let mut sizes: Vec<Size> = vec![];
        let mut places = vec![];
        for (state, reach) in layers {
            let size = (state.kv_heads(), state.dims());
            let pool = sizes.iter().position(|known| *known == size);
            places.push((pool.unwrap_or(sizes.len()), *reach));
            if pool.is_none() {
                sizes.push(size);
            }
        }
        let pool = |(n, size)| {
            let layers = places.iter().filter(|(pool, _)| *pool == n).count();
            Pool::new(options.storage, size, tokens.div_ceil(TILE).saturating_mul(layers))
        };
        let pools = sizes.into_iter().enumerate().map(pool).collect::<Result<_, _>>()?;
        Ok(Pages(Arc::new(Inner { options: *options, pools, layers: places })))
    }

    /// How the states' keys and values are kept.
    pub fn options(&self) -> &CacheOptions {
        &self.0.options
    }

    /// Pages that there may be, in all pools.
    pub fn pages(&self) -> usize {
        self.0.pools.iter().map(|pool| with_pool!(pool, pool => pool.pages())).sum()
    }

    /// Pages that no text holds.
    pub fn free_pages(&self) -> usize {
        self.free().sum()
    }

    /// Whether both are the same pages.
    pub(crate) fn is(&self, other: &Pages) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    fn free(&self) -> impl Iterator<Item = usize> {
        self.0.pools.iter().map(|pool| with_pool!(pool, pool => pool.free_pages()))
    }

    /// Turns the states of all layers, without tokens, to states that take pages.
    ///
    /// # Errors
    /// [`Error::PageSizes`] for those of another model.
    pub(crate) fn give(&self, layers: &mut [LayerState]) -> Result<(), Error> {
        if layers.len() != self.0.layers.len() {
            return Err(Error::PageSizes);
        }
        for (state, (pool, _)) in layers.iter_mut().zip(&self.0.layers) {
            let store = self.0.pools[*pool].create();
            if (store.kv_heads(), store.dims()) != (state.kv_heads(), state.dims()) {
                return Err(Error::PageSizes);
            }
            state.store = store;
        }
        Ok(())
    }

    /// The most pages of each pool that a text of `tokens` tokens ever holds.
    pub(crate) fn most(&self, tokens: usize) -> Demand {
        let mut demand = self.none();
        for &(pool, reach) in &self.0.layers {
            let seen = reach.map_or(usize::MAX, |reach| reach.div_ceil(TILE).saturating_add(3));
            demand.0[pool] += tokens.div_ceil(TILE).min(seen);
        }
        demand
    }

    /// Pages of each pool that an append of `tokens` tokens takes, to all layers of each text.
    pub(crate) fn needed<'a>(
        &self,
        layers: impl IntoIterator<Item = impl IntoIterator<Item = &'a LayerState>>,
        tokens: usize,
    ) -> Demand {
        let mut demand = self.none();
        for (texts, &(pool, _)) in layers.into_iter().zip(&self.0.layers) {
            let pages = texts.into_iter().map(|state| state.store.pages_for(tokens));
            demand.0[pool] += pages.sum::<usize>();
        }
        demand
    }

    fn none(&self) -> Demand {
        Demand(vec![0; self.0.pools.len()])
    }

    /// Whether there may be so many pages at all.
    ///
    /// # Errors
    /// [`foveal::Error::OutOfPages`].
    pub(crate) fn could_hold(&self, demand: &Demand) -> Result<(), Error> {
        let all = self.0.pools.iter().map(|pool| with_pool!(pool, pool => pool.pages()));
        demand.within(all)
    }

    /// Whether so many pages are free.
    ///
    /// # Errors
    /// [`foveal::Error::OutOfPages`].
    pub(crate) fn has_free(&self, demand: &Demand) -> Result<(), Error> {
        demand.within(self.free())
    }
}

/// A number of pages of each pool.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Demand(Vec<usize>);

impl Demand {
    pub(crate) fn add(&mut self, other: &Demand) {
        self.0.resize(self.0.len().max(other.0.len()), 0);
        self.0.iter_mut().zip(&other.0).for_each(|(all, more)| *all += more);
    }

    pub(crate) fn remove(&mut self, other: &Demand) {
        self.0.iter_mut().zip(&other.0).for_each(|(all, less)| *all -= less);
    }

    fn within(&self, pages: impl Iterator<Item = usize>) -> Result<(), Error> {
        let lacking = self.0.iter().zip(pages).find(|(needed, free)| *needed > free);
        match lacking {
            Some((&needed, free)) => Err(foveal::Error::OutOfPages { needed, free }.into()),
            None => Ok(()),
        }
    }
}
