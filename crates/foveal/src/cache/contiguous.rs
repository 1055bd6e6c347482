//! One block of memory per head, filled from the front.
//!
//! ```text
//! keys[head][position − start]  values[head][position − start]
//! ```
//!
//! `capacity · kv_heads · (key_dim + value_dim)` elements, allocated at once; [`ContiguousCache::grow`] moves to more.
//! A decoding step reads a head's rows from end to end.

use super::eviction::check_kept;
use super::{KvKeys, KvStore, KvTile, KvValues, TILE, check_appended, row_mut, store};
use crate::element::{DType, Element};
use crate::error::{Error, Result};
use crate::tensor::{Rows, Shape, TensorRef};
use std::ops::Range;

/// Keys and values of one sequence of one layer, stored as `E`.
#[derive(Debug, Clone)]
pub struct ContiguousCache<E> {
    kv_heads: usize,
    key_dim: usize,
    value_dim: usize,
    capacity: usize,
    start: usize,
    held: usize,
    keys: Vec<E>,
    values: Vec<E>,
}

impl<E: Element> ContiguousCache<E> {
    /// Room for `capacity` tokens of `kv_heads` heads with keys of `dims.0` and values of `dims.1`
    /// numbers. Allocates all of it.
    ///
    /// # Errors
    /// [`Error::ShapeOverflow`] if that is more than the address space.
    pub fn new(kv_heads: usize, dims: (usize, usize), capacity: usize) -> Result<Self> {
        let (key_dim, value_dim) = dims;
        let shape = |dim| Shape { batch: 1, seq: capacity, heads: kv_heads, dim };
        let (keys, values) = (zeros(shape(key_dim))?, zeros(shape(value_dim))?);
        Ok(Self { kv_heads, key_dim, value_dim, capacity, start: 0, held: 0, keys, values })
    }

    /// Makes the capacity at least `capacity` tokens. If it was less, allocates anew and copies what is held.
    ///
    /// # Errors
    /// [`Error::ShapeOverflow`] if that is more than the address space; the cache is then unchanged.
    pub fn grow(&mut self, capacity: usize) -> Result<()> {
        if capacity <= self.capacity {
            return Ok(());
        }
        let mut grown = Self::new(self.kv_heads, (self.key_dim, self.value_dim), capacity)?;
        for head in 0..self.kv_heads {
            let (from, to) = (head * self.capacity, head * capacity);
            for (data, grown, dim) in [
                (&self.keys, &mut grown.keys, self.key_dim),
                (&self.values, &mut grown.values, self.value_dim),
            ] {
                let held = &data[from * dim..(from + self.held) * dim];
                grown[to * dim..(to + self.held) * dim].copy_from_slice(held);
            }
        }
        (grown.start, grown.held) = (self.start, self.held);
        *self = grown;
        Ok(())
    }

    /// Tokens that can be held at once.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Tokens that can still be appended before something has to be forgotten.
    pub fn room(&self) -> usize {
        self.capacity - self.held
    }

    /// Bytes of keys and values per token.
    pub fn bytes_per_token(&self) -> usize {
        self.kv_heads * (self.key_dim + self.value_dim) * E::DTYPE.size()
    }

    /// Appends the tokens of one sequence, `[1, tokens, kv_heads, dim]`, rounding to `E`.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] or [`Error::CacheFull`]; the cache is then unchanged.
    pub fn append<F: Element>(&mut self, k: TensorRef<'_, F>, v: TensorRef<'_, F>) -> Result<()> {
        let tokens = check_appended(self, k.shape(), v.shape())?;
        if tokens > self.room() {
            let Self { held: len, capacity, .. } = *self;
            return Err(Error::CacheFull { len, capacity, appended: tokens });
        }
        for head in 0..self.kv_heads {
            let at = head * self.capacity + self.held;
            for t in 0..tokens {
                store(k.row(0, t, head), row_mut(&mut self.keys, at + t, self.key_dim));
                store(v.row(0, t, head), row_mut(&mut self.values, at + t, self.value_dim));
            }
        }
        self.held += tokens;
        Ok(())
    }

    /// Gives up the positions from `end` on, as if they had not been appended; those that are gone stay gone.
    pub fn truncate(&mut self, end: usize) {
        self.held = self.held.min(end.saturating_sub(self.start));
    }

    /// Gives up whole tiles of positions below `before`: what no later query will see. What remains
    /// moves to the front of its memory; nothing is allocated.
    pub fn forget(&mut self, before: usize) {
        let dropped =
            (before / TILE * TILE).saturating_sub(self.start).min(self.held / TILE * TILE);
        if dropped == 0 {
            return;
        }
        let kept = dropped..self.held;
        for head in 0..self.kv_heads {
            let at = head * self.capacity;
            for (data, dim) in [(&mut self.keys, self.key_dim), (&mut self.values, self.value_dim)]
            {
                data.copy_within((at + kept.start) * dim..(at + kept.end) * dim, at * dim);
            }
        }
        self.start += dropped;
        self.held -= dropped;
    }

    /// Gives up all but the chosen keys of each head, counted from the oldest one held: lists in ascending order, of one
    /// length. What is kept takes the positions from 0 on, in its order; the next token has the position after it.
    /// Keys keep their numbers, and with them the rotation of their old positions.
    ///
    /// # Errors
    /// [`Error::LengthMismatch`], [`Error::OutOfRange`], [`Error::InvalidParameter`] for other lists; the cache is then
    /// unchanged.
    pub fn retain(&mut self, kept: &[Vec<usize>]) -> Result<()> {
        check_kept(kept, self.kv_heads, self.held)?;
        for (head, kept) in kept.iter().enumerate() {
            let first = head * self.capacity;
            for (data, dim) in [(&mut self.keys, self.key_dim), (&mut self.values, self.value_dim)]
            {
                for (to, from) in kept.iter().enumerate() {
                    let (to, from) = (first + to, first + from);
                    data.copy_within(from * dim..(from + 1) * dim, to * dim);
                }
            }
        }
        (self.start, self.held) = (0, kept.first().map_or(0, Vec::len));
        Ok(())
    }

    /// Forgets everything; the next token has position 0.
    pub fn clear(&mut self) {
        (self.start, self.held) = (0, 0);
    }

    /// Forgets everything; the next token has position `start`, as where a text is taken up whose first tokens no query will
    /// see.
    ///
    /// # Errors
    /// [`Error::InvalidParameter`] if that is no multiple of [`TILE`]; the cache is then unchanged.
    pub fn clear_to(&mut self, start: usize) -> Result<()> {
        check_start(start)?;
        (self.start, self.held) = (start, 0);
        Ok(())
    }

    /// The keys of a full cache, `[head][token][dim]`.
    pub(crate) fn keys(&self) -> &[E] {
        &self.keys
    }

    fn rows<'a>(&self, data: &'a [E], dim: usize, head: usize, at: Range<usize>) -> Rows<'a, E> {
        let first = head * self.capacity + at.start;
        let rows = Rows::new(&data[first * dim..], dim, at.len(), dim);
        rows.expect("positions were checked against those held")
    }
}

/// Checks that a cache may begin at a position.
pub(super) fn check_start(start: usize) -> Result<()> {
    if start.is_multiple_of(TILE) {
        return Ok(());
    }
    let (what, expected) = ("the first position of a cache", "a multiple of 256");
    Err(Error::InvalidParameter { what, expected, got: start.to_string() })
}

fn zeros<E: Element>(shape: Shape) -> Result<Vec<E>> {
    let overflow = Error::ShapeOverflow { what: "key/value cache", shape };
    let len = shape.checked_len().filter(|&n| n <= isize::MAX as usize / 4).ok_or(overflow)?;
    Ok(vec![E::default(); len])
}

impl<E: Element> KvStore for ContiguousCache<E> {
    fn end(&self) -> usize {
        self.start + self.held
    }

    fn start(&self) -> usize {
        self.start
    }

    fn kv_heads(&self) -> usize {
        self.kv_heads
    }

    fn dims(&self) -> (usize, usize) {
        (self.key_dim, self.value_dim)
    }

    fn dtype(&self) -> DType {
        E::DTYPE
    }

    fn tile(&self, head: usize, positions: Range<usize>) -> KvTile<'_> {
        assert!(
            head < self.kv_heads && self.start <= positions.start && positions.end <= self.end()
        );
        let at = positions.start - self.start..positions.end - self.start;
        KvTile {
            keys: KvKeys::Rows(E::kv_rows(self.rows(&self.keys, self.key_dim, head, at.clone()))),
            values: KvValues::Rows(E::kv_rows(self.rows(&self.values, self.value_dim, head, at))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::KvRows;
    use crate::tensor::Tensor;

    /// Tokens whose numbers tell their position, head and place.
    fn tokens(positions: Range<usize>, dim: usize) -> Tensor<f32> {
        let shape = Shape { batch: 1, seq: positions.len(), heads: 2, dim };
        let number = |t: usize, h: usize, d: usize| (t * 100 + h * 10 + d) as f32;
        let heads = |t| (0..2).flat_map(move |h| (0..dim).map(move |d| number(t, h, d)));
        Tensor::from_vec(positions.flat_map(heads).collect(), shape).unwrap()
    }

    #[test]
    fn growing_keeps_what_is_held() {
        let mut cache = ContiguousCache::<f32>::new(2, (3, 2), 0).unwrap();
        let mut at = 0;
        for end in [5, TILE + 1, 2 * TILE + 10] {
            cache.grow(end - cache.start()).unwrap();
            assert_eq!(cache.capacity(), end - cache.start());
            cache.append(tokens(at..end, 3).view(), tokens(at..end, 2).view()).unwrap();
            assert_eq!(cache.room(), 0);
            cache.forget(end - 5);
            at = end;
        }
        cache.grow(1).unwrap();
        cache.grow(5 * TILE).unwrap();
        assert_eq!((cache.start(), cache.end(), cache.capacity()), (2 * TILE, at, 5 * TILE));
        for (head, position) in (0..2).flat_map(|head| (2 * TILE..at).map(move |at| (head, at))) {
            let KvTile { keys, values } = cache.tile(head, position..position + 1);
            let (KvKeys::Rows(KvRows::F32(keys)), KvValues::Rows(KvRows::F32(values))) =
                (keys, values)
            else {
                panic!("stored as f32")
            };
            let (k, v) = (tokens(position..position + 1, 3), tokens(position..position + 1, 2));
            assert_eq!(keys.row(0), k.view().row(0, 0, head));
            assert_eq!(values.row(0), v.view().row(0, 0, head));
        }
    }
}
