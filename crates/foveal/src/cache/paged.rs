//! Sequences whose keys and values lie in pages of one pool, shared where sequences have the same beginning.
//!
//! ```text
//! sequence  →  pages of its tiles:  [ 4, 9, 2 ]          page  →  keys [head][256][Dk], values [head][256][Dv]
//! fork                              [ 4, 9, 2 ]          pages 4, 9, 2 now belong to two
//! append to the fork                [ 4, 9, 7 ]          page 2 was not full: its tokens are copied to a page of the fork's own
//! ```
//!
//! A page holds one tile of all heads of one layer (PagedAttention: Kwon et al. 2023, with pages of a tile). Pages are
//! counted: one that several sequences hold is never written, and goes back to the pool with its last sequence. An append that finds too
//! few free pages changes nothing. A sequence is read tile by tile and in place, as any [`KvStore`] is; it has the bits of a
//! [`ContiguousCache`](super::ContiguousCache) of the same tokens.

use super::{KvKeys, KvStore, KvTile, KvValues, SharedTile, TILE};
use super::{check_appended, contiguous::check_start, row_mut, store};
use crate::element::{DType, Element};
use crate::error::{Error, Result};
use crate::tensor::{Rows, Shape, TensorRef};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Pages of keys and values of one size, stored as `E`: a budget from which sequences take and to which they give back.
///
/// A handle: clones are the same pool. Layers whose keys and values have the same sizes may share one.
#[derive(Debug, Clone)]
pub struct PagePool<E>(Arc<Pool<E>>);

#[derive(Debug)]
struct Pool<E> {
    kv_heads: usize,
    dims: (usize, usize),
    pages: usize,
    stock: Mutex<Stock<E>>,
}

/// What no sequence holds.
#[derive(Debug)]
struct Stock<E> {
    /// Pages that exist.
    made: usize,
    free: Vec<Page<E>>,
}

#[derive(Debug)]
struct Page<E> {
    number: usize,
    keys: Vec<E>,
    values: Vec<E>,
}

impl<E: Element> PagePool<E> {
    /// A pool of `pages` pages, each of 256 tokens of `kv_heads` heads with keys of `dims.0` and values of `dims.1`
    /// numbers. A page is allocated when it is first taken, and stays with the pool.
    ///
    /// # Errors
    /// [`Error::ShapeOverflow`] if a page is more than the address space.
    pub fn new(kv_heads: usize, dims: (usize, usize), pages: usize) -> Result<PagePool<E>> {
        for dim in [dims.0, dims.1] {
            let shape = Shape { batch: 1, seq: TILE, heads: kv_heads, dim };
            if shape.checked_len().is_none_or(|n| n > isize::MAX as usize / 4) {
                return Err(Error::ShapeOverflow { what: "page of keys or values", shape });
            }
        }
        let stock = Mutex::new(Stock { made: 0, free: vec![] });
        Ok(PagePool(Arc::new(Pool { kv_heads, dims, pages, stock })))
    }

    /// Pages of the pool.
    pub fn pages(&self) -> usize {
        self.0.pages
    }

    /// Pages that no sequence holds.
    pub fn free_pages(&self) -> usize {
        self.0.stock().free_of(self.0.pages)
    }

    /// Bytes of keys and values per token.
    pub fn bytes_per_token(&self) -> usize {
        self.0.kv_heads * (self.0.dims.0 + self.0.dims.1) * E::DTYPE.size()
    }

    /// A new sequence without tokens.
    pub fn create(&self) -> PagedCache<E> {
        PagedCache { pool: Arc::clone(&self.0), start: 0, end: 0, pages: vec![] }
    }
}

impl<E: Element> Pool<E> {
    fn stock(&self) -> MutexGuard<'_, Stock<E>> {
        // Nothing can be half done: the stock is only counted up, pushed to and popped from.
        self.stock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// So many pages, or none.
    fn take(&self, count: usize) -> Result<Vec<Arc<Page<E>>>> {
        if count == 0 {
            return Ok(vec![]);
        }
        let mut stock = self.stock();
        let free = stock.free_of(self.pages);
        if count > free {
            return Err(Error::OutOfPages { needed: count, free });
        }
        Ok((0..count).map(|_| Arc::new(self.page(&mut stock))).collect())
    }

    fn page(&self, stock: &mut Stock<E>) -> Page<E> {
        stock.free.pop().unwrap_or_else(|| {
            let numbers = |dim| vec![E::default(); self.kv_heads * TILE * dim];
            stock.made += 1;
            let (keys, values) = (numbers(self.dims.0), numbers(self.dims.1));
            Page { number: stock.made - 1, keys, values }
        })
    }
}

impl<E> Stock<E> {
    fn free_of(&self, pages: usize) -> usize {
        pages - self.made + self.free.len()
    }
}

/// One sequence in pages of a pool, which get back to it when the sequence is dropped.
///
/// ```
/// use foveal::cache::{KvStore, PagePool};
/// use foveal::{Error, Shape, Tensor};
///
/// let pool = PagePool::<f32>::new(2, (64, 64), 4)?;
/// let mut first = pool.create();
/// let tokens = Tensor::<f32>::zeros(Shape { batch: 1, seq: 300, heads: 2, dim: 64 })?;
/// first.append(tokens.view(), tokens.view())?;
/// let mut second = first.fork(280)?;
/// assert_eq!((second.end(), pool.free_pages()), (280, 2));
/// // The second page was not full: the fork gets one of its own.
/// second.append(tokens.view(), tokens.view())?;
/// assert_eq!(pool.free_pages(), 0);
/// assert_eq!(first.append(tokens.view(), tokens.view()), Err(Error::OutOfPages { needed: 1, free: 0 }));
/// drop(second);
/// assert_eq!(pool.free_pages(), 2);
/// # Ok::<(), Error>(())
/// ```
#[derive(Debug)]
pub struct PagedCache<E: Element> {
    pool: Arc<Pool<E>>,
    /// The position of the first page.
    start: usize,
    end: usize,
    pages: Vec<Arc<Page<E>>>,
}

impl<E: Element> PagedCache<E> {
    /// The pool of its pages.
    pub fn pool(&self) -> PagePool<E> {
        PagePool(Arc::clone(&self.pool))
    }

    /// A new sequence that begins with the tokens of this one up to the position `end`, whose pages it shares.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] for a position that the sequence does not hold yet or no more.
    pub fn fork(&self, end: usize) -> Result<PagedCache<E>> {
        if end < self.start || end > self.end {
            let what = "end of a fork after the oldest position held, that is";
            let (got, limit) = (end.wrapping_sub(self.start), self.end - self.start);
            return Err(Error::OutOfRange { what, got, limit });
        }
        let pages = self.pages[..(end - self.start).div_ceil(TILE)].to_vec();
        Ok(PagedCache { pool: Arc::clone(&self.pool), start: self.start, end, pages })
    }

    /// Pages that an append of `tokens` tokens would take.
    pub fn pages_for(&self, tokens: usize) -> usize {
        let more = (self.end + tokens - self.start).div_ceil(TILE) - self.pages.len();
        more + usize::from(tokens > 0 && self.last_is_shared())
    }

    /// Whether the page that the next token goes to belongs to another sequence as well.
    fn last_is_shared(&self) -> bool {
        let last = self.pages.last().filter(|_| !self.end.is_multiple_of(TILE));
        last.is_some_and(|page| Arc::strong_count(page) > 1)
    }

    /// Appends tokens `[1, tokens, kv_heads, dim]`, rounding to `E`. The last page is copied first if another sequence
    /// holds it too.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`]; [`Error::OutOfPages`] if fewer pages are free than it takes. Nothing has changed then.
    pub fn append<F: Element>(&mut self, k: TensorRef<'_, F>, v: TensorRef<'_, F>) -> Result<()> {
        let tokens = check_appended(self, k.shape(), v.shape())?;
        let shared = tokens > 0 && self.last_is_shared();
        let mut taken = self.pool.take(self.pages_for(tokens))?;
        if let Some(copy) = taken.pop_if(|_| shared) {
            self.copy_last(copy);
        }
        self.pages.extend(taken);
        for t in 0..tokens {
            let at = self.end + t - self.start;
            let page = Arc::get_mut(&mut self.pages[at / TILE]);
            let page = page.expect("a page that is written has one holder");
            for head in 0..self.pool.kv_heads {
                let row = head * TILE + at % TILE;
                store(k.row(0, t, head), row_mut(&mut page.keys, row, self.pool.dims.0));
                store(v.row(0, t, head), row_mut(&mut page.values, row, self.pool.dims.1));
            }
        }
        self.end += tokens;
        Ok(())
    }

    /// Takes the tokens of the last page, which is not full, to another one.
    fn copy_last(&mut self, mut copy: Arc<Page<E>>) {
        let Some(last) = self.pages.last_mut() else { return };
        let page = Arc::get_mut(&mut copy).expect("a page that was taken has one holder");
        let (heads, (key_dim, value_dim)) = (self.pool.kv_heads, self.pool.dims);
        for head in 0..heads {
            let rows = head * TILE..head * TILE + self.end % TILE;
            let keys = rows.start * key_dim..rows.end * key_dim;
            page.keys[keys.clone()].copy_from_slice(&last.keys[keys]);
            let values = rows.start * value_dim..rows.end * value_dim;
            page.values[values.clone()].copy_from_slice(&last.values[values]);
        }
        let shared = std::mem::replace(last, copy);
        give_back(&self.pool, [shared]);
    }

    /// Gives up whole tiles of positions below `before`: what no later query will see.
    pub fn forget(&mut self, before: usize) {
        let start = (before.min(self.end) / TILE * TILE).max(self.start);
        let gone = self.pages.drain(..(start - self.start) / TILE);
        give_back(&self.pool, gone);
        self.start = start;
    }

    /// Gives up the positions from `end` on, as if they had not been appended; those that are gone stay gone.
    pub fn truncate(&mut self, end: usize) {
        self.end = self.end.min(end.max(self.start));
        let gone = self.pages.drain((self.end - self.start).div_ceil(TILE)..);
        give_back(&self.pool, gone);
    }

    /// Forgets everything; the next token has position 0.
    pub fn clear(&mut self) {
        give_back(&self.pool, self.pages.drain(..));
        (self.start, self.end) = (0, 0);
    }

    /// Forgets everything; the next token has position `start`, as where a text is taken up whose first tokens no query will
    /// see.
    ///
    /// # Errors
    /// [`Error::InvalidParameter`] if that is no multiple of [`TILE`]; the cache is then unchanged.
    pub fn clear_to(&mut self, start: usize) -> Result<()> {
        check_start(start)?;
        self.clear();
        (self.start, self.end) = (start, start);
        Ok(())
    }

    /// The pages of its tiles, by their number in the pool.
    pub fn pages(&self) -> impl ExactSizeIterator<Item = usize> {
        self.pages.iter().map(|page| page.number)
    }
}

/// Gives up pages; those that no other sequence holds are free again.
fn give_back<E: Element>(pool: &Pool<E>, pages: impl IntoIterator<Item = Arc<Page<E>>>) {
    let free: Vec<_> = pages.into_iter().filter_map(Arc::into_inner).collect();
    if !free.is_empty() {
        pool.stock().free.extend(free);
    }
}

impl<E: Element> Clone for PagedCache<E> {
    /// A fork of the whole.
    fn clone(&self) -> PagedCache<E> {
        PagedCache { pool: Arc::clone(&self.pool), pages: self.pages.clone(), ..*self }
    }
}

impl<E: Element> Drop for PagedCache<E> {
    fn drop(&mut self) {
        self.clear();
    }
}

impl<E: Element> KvStore for PagedCache<E> {
    fn end(&self) -> usize {
        self.end
    }

    fn start(&self) -> usize {
        self.start
    }

    fn kv_heads(&self) -> usize {
        self.pool.kv_heads
    }

    fn dims(&self) -> (usize, usize) {
        self.pool.dims
    }

    fn dtype(&self) -> DType {
        E::DTYPE
    }

    fn shared_tile(&self, position: usize) -> Option<SharedTile> {
        let page = self.pages.get(position.checked_sub(self.start)? / TILE)?;
        let owner = Arc::as_ptr(&self.pool).addr();
        (Arc::strong_count(page) > 1).then_some(SharedTile { owner, number: page.number })
    }

    fn tile(&self, head: usize, positions: Range<usize>) -> KvTile<'_> {
        assert!(head < self.pool.kv_heads && self.start <= positions.start);
        assert!(positions.start <= positions.end && positions.end <= self.end);
        let at = positions.start - self.start;
        assert!(at % TILE + positions.len() <= TILE, "positions of one tile");
        let rows = |data: fn(&Page<E>) -> &[E], dim| {
            let page = self.pages.get(at / TILE).map_or(&[][..], |page| data(page));
            let row = if page.is_empty() { 0 } else { head * TILE + at % TILE };
            let rows = Rows::new(&page[row * dim..], dim, positions.len(), dim);
            rows.expect("positions were checked against those held")
        };
        let (keys, values) = (
            rows(|page| &page.keys, self.pool.dims.0),
            rows(|page| &page.values, self.pool.dims.1),
        );
        KvTile { keys: KvKeys::Rows(E::kv_rows(keys)), values: KvValues::Rows(E::kv_rows(values)) }
    }
}
