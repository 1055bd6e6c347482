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
//! few free pages changes nothing. A sequence is read through [`PagePool::store`], tile by tile and in place, as any
//! [`KvStore`] is; it has the bits of a [`ContiguousCache`](super::ContiguousCache) of the same tokens.

use super::{KvKeys, KvStore, KvTile, KvValues, SharedTile, TILE};
use super::{check_appended, row_mut, store};
use crate::element::{DType, Element};
use crate::error::{Error, Result};
use crate::tensor::{Rows, Shape, TensorRef};
use std::ops::Range;

/// Pages of keys and values of one layer, stored as `E`, and the sequences that hold them.
#[derive(Debug, Clone)]
pub struct PagePool<E> {
    kv_heads: usize,
    key_dim: usize,
    value_dim: usize,
    keys: Vec<E>,
    values: Vec<E>,
    /// How many sequences hold each page.
    holders: Vec<usize>,
    free: Vec<usize>,
    slots: Vec<Slot>,
    vacant: Vec<usize>,
}

/// A sequence of a pool. Its own as long as it has not been freed; another pool's is another sequence or none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SequenceId {
    slot: usize,
    /// Sequences that had the slot before.
    generation: u64,
}

#[derive(Debug, Clone, Default)]
struct Slot {
    generation: u64,
    sequence: Option<Sequence>,
}

#[derive(Debug, Clone, Default)]
struct Sequence {
    /// The position of the first page.
    start: usize,
    end: usize,
    pages: Vec<usize>,
}

impl<E: Element> PagePool<E> {
    /// A pool of `pages` pages, each of 256 tokens of `kv_heads` heads with keys of `dims.0` and values of `dims.1`
    /// numbers. Allocates all of it.
    ///
    /// # Errors
    /// [`Error::ShapeOverflow`] if that is more than the address space.
    pub fn new(kv_heads: usize, dims: (usize, usize), pages: usize) -> Result<PagePool<E>> {
        let (key_dim, value_dim) = dims;
        let numbers = |dim| -> Result<Vec<E>> {
            let seq = pages.checked_mul(TILE);
            let shape = Shape { batch: 1, seq: seq.unwrap_or(usize::MAX), heads: kv_heads, dim };
            let overflow = Error::ShapeOverflow { what: "pool of pages", shape };
            let len = seq.and(shape.checked_len()).filter(|&n| n <= isize::MAX as usize / 4);
            Ok(vec![E::default(); len.ok_or(overflow)?])
        };
        let (keys, values) = (numbers(key_dim)?, numbers(value_dim)?);
        let (holders, free) = (vec![0; pages], (0..pages).rev().collect());
        let (slots, vacant) = (vec![], vec![]);
        Ok(PagePool { kv_heads, key_dim, value_dim, keys, values, holders, free, slots, vacant })
    }

    /// Pages of the pool.
    pub fn pages(&self) -> usize {
        self.holders.len()
    }

    /// Pages that no sequence holds.
    pub fn free_pages(&self) -> usize {
        self.free.len()
    }

    /// Bytes of keys and values per token.
    pub fn bytes_per_token(&self) -> usize {
        self.kv_heads * (self.key_dim + self.value_dim) * E::DTYPE.size()
    }

    /// A new sequence without tokens.
    pub fn create(&mut self) -> SequenceId {
        self.place(Sequence::default())
    }

    /// A new sequence that begins with the tokens of another one up to the position `end`, whose pages it shares.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`]; [`Error::OutOfRange`] for a position that the sequence does not hold yet or no more.
    pub fn fork(&mut self, of: SequenceId, end: usize) -> Result<SequenceId> {
        let sequence = self.sequence(of)?;
        if end < sequence.start || end > sequence.end {
            let what = "end of a fork after the oldest position held, that is";
            let (got, limit) = (end.wrapping_sub(sequence.start), sequence.end - sequence.start);
            return Err(Error::OutOfRange { what, got, limit });
        }
        let pages = sequence.pages[..(end - sequence.start).div_ceil(TILE)].to_vec();
        let fork = Sequence { start: sequence.start, end, pages };
        fork.pages.iter().for_each(|&page| self.holders[page] += 1);
        Ok(self.place(fork))
    }

    /// Gives a sequence up. Pages that no other one holds are free again.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`].
    pub fn free(&mut self, id: SequenceId) -> Result<()> {
        self.sequence(id)?;
        let slot = &mut self.slots[id.slot];
        slot.generation += 1;
        let sequence = slot.sequence.take().unwrap_or_default();
        self.vacant.push(id.slot);
        self.release(&sequence.pages);
        Ok(())
    }

    /// Appends tokens `[1, tokens, kv_heads, dim]` to a sequence, rounding to `E`. The last page is copied first if another
    /// sequence holds it too.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`], [`Error::ShapeMismatch`]; [`Error::OutOfPages`] if fewer pages are free than it takes. Nothing
    /// has changed then.
    pub fn append<F: Element>(
        &mut self,
        id: SequenceId,
        k: TensorRef<'_, F>,
        v: TensorRef<'_, F>,
    ) -> Result<()> {
        let sequence = self.sequence(id)?;
        let tokens = check_appended(&self.store(id)?, k.shape(), v.shape())?;
        let (held, end) = (sequence.pages.len(), sequence.end + tokens);
        let more = (end - sequence.start).div_ceil(TILE) - held;
        let (open, used) = (sequence.pages.last().copied(), sequence.end % TILE);
        let shared = open.filter(|&page| tokens > 0 && used > 0 && self.holders[page] > 1);
        let (needed, free) = (more + usize::from(shared.is_some()), self.free.len());
        if needed > free {
            return Err(Error::OutOfPages { needed, free });
        }
        let mut pages = std::mem::take(&mut self.sequence_mut(id).pages);
        if let (Some(shared), Some(last)) = (shared, pages.last_mut()) {
            *last = self.take();
            self.copy_page(shared, *last, used);
            self.release(&[shared]);
        }
        pages.extend((0..more).map(|_| self.take()));
        let (start, first) = (self.sequence_mut(id).start, self.sequence_mut(id).end);
        for (t, head) in (0..tokens).flat_map(|t| (0..self.kv_heads).map(move |head| (t, head))) {
            let at = first + t - start;
            let row = self.row(pages[at / TILE], head, at % TILE);
            store(k.row(0, t, head), row_mut(&mut self.keys, row, self.key_dim));
            store(v.row(0, t, head), row_mut(&mut self.values, row, self.value_dim));
        }
        let sequence = self.sequence_mut(id);
        (sequence.pages, sequence.end) = (pages, end);
        Ok(())
    }

    /// Gives up whole tiles of a sequence's positions below `before`: what no later query will see.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`].
    pub fn forget(&mut self, id: SequenceId, before: usize) -> Result<()> {
        self.sequence(id)?;
        let sequence = self.sequence_mut(id);
        let start = (before.min(sequence.end) / TILE * TILE).max(sequence.start);
        let gone: Vec<usize> = sequence.pages.drain(..(start - sequence.start) / TILE).collect();
        sequence.start = start;
        self.release(&gone);
        Ok(())
    }

    /// A sequence as a store.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`].
    pub fn store(&self, id: SequenceId) -> Result<PagedStore<'_, E>> {
        Ok(PagedStore { pool: self, sequence: self.sequence(id)? })
    }

    fn place(&mut self, sequence: Sequence) -> SequenceId {
        let slot = self.vacant.pop().unwrap_or_else(|| {
            self.slots.push(Slot::default());
            self.slots.len() - 1
        });
        self.slots[slot].sequence = Some(sequence);
        SequenceId { slot, generation: self.slots[slot].generation }
    }

    fn sequence(&self, id: SequenceId) -> Result<&Sequence> {
        let slot = self.slots.get(id.slot).filter(|slot| slot.generation == id.generation);
        slot.and_then(|slot| slot.sequence.as_ref()).ok_or(Error::UnknownSequence)
    }

    /// The sequence of an id that was looked up before.
    fn sequence_mut(&mut self, id: SequenceId) -> &mut Sequence {
        self.slots[id.slot].sequence.as_mut().expect("the sequence was found before")
    }

    /// A free page, of which there is one.
    fn take(&mut self) -> usize {
        let page = self.free.pop().expect("free pages were counted before");
        self.holders[page] = 1;
        page
    }

    fn release(&mut self, pages: &[usize]) {
        for &page in pages {
            self.holders[page] -= 1;
            if self.holders[page] == 0 {
                self.free.push(page);
            }
        }
    }

    /// Copies the first tokens of a page.
    fn copy_page(&mut self, from: usize, to: usize, tokens: usize) {
        for head in 0..self.kv_heads {
            let (from, to) = (self.row(from, head, 0), self.row(to, head, 0));
            for (data, dim) in [(&mut self.keys, self.key_dim), (&mut self.values, self.value_dim)]
            {
                data.copy_within(from * dim..(from + tokens) * dim, to * dim);
            }
        }
    }

    /// The number of a token's row.
    fn row(&self, page: usize, head: usize, token: usize) -> usize {
        (page * self.kv_heads + head) * TILE + token
    }
}

/// One sequence of a pool.
#[derive(Debug, Clone, Copy)]
pub struct PagedStore<'a, E> {
    pool: &'a PagePool<E>,
    sequence: &'a Sequence,
}

impl<E: Element> PagedStore<'_, E> {
    /// The pages of its tiles, by number.
    pub fn pages(&self) -> &[usize] {
        &self.sequence.pages
    }
}

impl<E: Element> KvStore for PagedStore<'_, E> {
    fn end(&self) -> usize {
        self.sequence.end
    }

    fn start(&self) -> usize {
        self.sequence.start
    }

    fn kv_heads(&self) -> usize {
        self.pool.kv_heads
    }

    fn dims(&self) -> (usize, usize) {
        (self.pool.key_dim, self.pool.value_dim)
    }

    fn dtype(&self) -> DType {
        E::DTYPE
    }

    fn shared_tile(&self, position: usize) -> Option<SharedTile> {
        let tile = position.checked_sub(self.sequence.start)? / TILE;
        let &number = self.sequence.pages.get(tile)?;
        let owner = std::ptr::from_ref(self.pool).addr();
        (self.pool.holders[number] > 1).then_some(SharedTile { owner, number })
    }

    fn tile(&self, head: usize, positions: Range<usize>) -> KvTile<'_> {
        let (pool, sequence) = (self.pool, self.sequence);
        assert!(head < pool.kv_heads && sequence.start <= positions.start);
        assert!(positions.start <= positions.end && positions.end <= sequence.end);
        let at = positions.start - sequence.start;
        assert!(at % TILE + positions.len() <= TILE, "positions of one tile");
        let rows = |data, dim| {
            let row = match sequence.pages.get(at / TILE) {
                Some(&page) => pool.row(page, head, at % TILE),
                None => 0,
            };
            rows(data, (row, positions.len()), dim)
        };
        KvTile {
            keys: KvKeys::Rows(E::kv_rows(rows(&pool.keys, pool.key_dim))),
            values: KvValues::Rows(E::kv_rows(rows(&pool.values, pool.value_dim))),
        }
    }
}

fn rows<E>(data: &[E], (first, count): (usize, usize), dim: usize) -> Rows<'_, E> {
    let rows = Rows::new(&data[first * dim..], dim, count, dim);
    rows.expect("positions were checked against those held")
}
