//! An inverted file for large memories: entries in lists by the centroid that is nearest, of which a query searches a few.
//!
//! ```text
//! c_l     = unit mean of the keys that lie nearest to it, by 8 rounds of k-means on a sample, for each key/value head
//! list l  = the entries with l = argmax_m k̂ᵀ c_m                       in the order of their positions
//! a query searches the lists with the n largest q̂ᵀ c_l, and takes the k largest q̂ᵀ k̂ of their entries       exactly
//! ```
//!
//! Sivic and Zisserman 2003; spherical k-means: Dhillon and Modha 2001. All is inner products of vectors of length 1, as
//! retrieval is. Approximate: an entry in a list that is not searched is not found. With all lists it is what exact search gives.
//!
//! Until a memory holds [`Index::least`] entries, all are searched. Then centroids are made, and made anew when the document has
//! grown by as much as it was long, and later whenever as many tokens have come as are remembered. Between, new entries go to
//! the nearest list, and old ones leave. When that happens follows from the document's tokens alone, so that no bit depends on
//! how it is cut into calls. An entry takes 4 bytes; its key stays where it is. Cost a query: 2·L·Dk for L lists, and the share
//! n / L of exact search.

use super::super::MemoryStore;
use super::search::{NONE, search};
use super::{Level, normalise};
use crate::cache::{ContiguousCache, KvStore, with_rows};
use crate::cpu::{Cpu, Phase};
use crate::error::{Error, Result};
use crate::simd::row;
use crate::tensor::{Shape, Tensor, TensorMut, TensorRef};
use std::ops::Range;

/// The most lists.
const MOST: usize = 1 << 16;
/// Entries for each list from which on lists are made, and of which centroids are made: so many to twice as many.
const SAMPLE: usize = 32;
/// Rounds of k-means.
const ROUNDS: usize = 8;
/// Entries that find their lists together.
const TOGETHER: usize = 4096;

/// How many lists a memory has, and how many of them a query searches.
///
/// ```
/// use foveal::memory::memorizing::{Index, Memorizing};
/// # fn main() -> foveal::Result<()> {
/// let memorizing = Memorizing::new(512, 32, 262_144)?.index(Some(Index::new(1024, 32)?));
/// assert_eq!(memorizing.indexed().map(|index| index.least()), Some(32_768));
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Index {
    lists: usize,
    probes: usize,
}

impl Index {
    /// So many lists for each key/value head, of which a query searches so many.
    ///
    /// # Errors
    /// [`Error::InvalidParameter`] for no lists or more than 65536, and for a search of none or more than there are.
    pub fn new(lists: usize, probes: usize) -> Result<Index> {
        for (what, n, most, expected) in [
            ("lists of a memory's index", lists, MOST, "1 to 65536"),
            ("lists that a query searches", probes, lists, "1 to the number of lists"),
        ] {
            if !(1..=most).contains(&n) {
                return Err(Error::InvalidParameter { what, expected, got: n.to_string() });
            }
        }
        Ok(Index { lists, probes })
    }

    /// Lists of a key/value head.
    pub fn lists(&self) -> usize {
        self.lists
    }

    /// Lists that a query searches.
    pub fn probes(&self) -> usize {
        self.probes
    }

    /// Entries of a memory from which on there are lists: 32 for each.
    pub fn least(&self) -> usize {
        SAMPLE * self.lists
    }
}

/// The lists of a memory.
#[derive(Debug, Clone)]
pub(super) struct Lists {
    index: Index,
    /// A token for each list, without values; none before they are made.
    centroids: ContiguousCache<f32>,
    /// Tokens of the document when centroids were made.
    made_at: usize,
    /// Entries before this position are in lists, if there are any.
    end: usize,
    /// `[kv head][list]`: positions in order.
    members: Vec<Vec<u32>>,
}

impl Lists {
    pub(super) fn new(index: Index, kv_heads: usize, dim: usize) -> Result<Lists> {
        let centroids = ContiguousCache::new(kv_heads, (dim, 0), index.lists)?;
        let members = vec![vec![]; kv_heads * index.lists];
        Ok(Lists { index, centroids, made_at: 0, end: 0, members })
    }

    pub(super) fn clear(&mut self) {
        self.centroids.clear();
        self.members.iter_mut().for_each(Vec::clear);
        (self.made_at, self.end) = (0, 0);
    }

    /// Whether there are lists to search.
    pub(super) fn ready(&self) -> bool {
        self.centroids.end() > 0
    }

    /// Tokens of the document when the centroids were made, and the centroids, `[kv head][list][dim]`: with the store, all that
    /// the lists are. None before they are made.
    pub(super) fn made(&self) -> (usize, &[f32]) {
        let rows = if self.ready() { self.centroids.keys() } else { &[] };
        (self.made_at, rows)
    }

    /// Takes up what [`Lists::made`] gave; entries find their lists again.
    pub(super) fn restore(&mut self, made_at: usize, centroids: &[f32]) -> Result<()> {
        let (heads, dim) = (self.centroids.kv_heads(), self.centroids.dims().0);
        let (what, expected) = ("numbers of an index's centroids", heads * self.index.lists * dim);
        if centroids.len() != expected {
            return Err(Error::LengthMismatch { what, expected, got: centroids.len() });
        }
        self.clear();
        self.hold(centroids)?;
        self.made_at = made_at;
        Ok(())
    }

    /// Centroids `[kv head][list][dim]`.
    fn hold(&mut self, centroids: &[f32]) -> Result<()> {
        let (heads, dim) = (self.centroids.kv_heads(), self.centroids.dims().0);
        let shape = Shape { batch: 1, seq: self.index.lists, heads, dim };
        let strides = crate::tensor::Strides { batch: 0, seq: dim, heads: self.index.lists * dim };
        let none = Tensor::<f32>::zeros(Shape { dim: 0, ..shape })?;
        self.centroids.clear();
        self.centroids.append(TensorRef::from_strides(centroids, shape, strides)?, none.view())
    }

    /// Bytes of the lists of so many entries a head.
    pub(super) fn bytes(&self, entries: usize) -> usize {
        let (_, centroids) = self.made();
        let members = entries * self.centroids.kv_heads() * size_of::<u32>();
        if centroids.is_empty() { 0 } else { size_of_val(centroids) + members }
    }

    /// The entries of a list that are remembered, from `start` on.
    pub(super) fn members(&self, kv_head: usize, list: u32, start: usize) -> &[u32] {
        let own = &self.members[kv_head * self.index.lists + list as usize];
        &own[own.partition_point(|&at| (at as usize) < start)..]
    }

    /// The lists that queries search, `[H][n][probes]`, the nearest first.
    pub(super) fn probed(&self, q: TensorRef<'_, f32>, cpu: Cpu, phase: Phase) -> Vec<u32> {
        let (Shape { seq, heads, .. }, probes) = (q.shape(), self.index.probes);
        let mut probed = vec![NONE; heads * seq * probes];
        search((&self.centroids, 0..self.index.lists), q, (probes, cpu, phase), &mut probed);
        probed
    }

    pub(super) fn probes(&self) -> usize {
        self.index.probes
    }

    /// Brings the lists to where a memory is whose entries at `range` can be retrieved, of `capacity` at most.
    pub(super) fn catch_up(
        &mut self,
        store: &dyn MemoryStore,
        (range, capacity): (&Range<usize>, usize),
        cpu: Cpu,
    ) -> Result<()> {
        if self.end == range.end {
            return Ok(());
        }
        let due = match self.made_at {
            0 => range.len() >= self.index.least(),
            at => range.end.saturating_sub(at) >= at.min(capacity),
        };
        if due {
            self.make(store, range, cpu)?;
        }
        if self.ready() {
            for own in &mut self.members {
                let gone = own.partition_point(|&at| (at as usize) < range.start);
                own.drain(..gone);
            }
            self.list(store, self.end.max(range.start)..range.end, cpu)?;
        }
        self.end = range.end;
        Ok(())
    }

    /// Makes centroids of what is held, and empties the lists.
    fn make(&mut self, store: &dyn MemoryStore, range: &Range<usize>, cpu: Cpu) -> Result<()> {
        let step = (range.len() / self.index.least()).max(1);
        let sample: Vec<u32> = range.clone().step_by(step).map(|at| at as u32).collect();
        let (heads, dim) = (self.centroids.kv_heads(), self.centroids.dims().0);
        let mut all = Vec::with_capacity(heads * self.index.lists * dim);
        for head in 0..heads {
            let shape = Shape { batch: 1, seq: sample.len(), heads: 1, dim };
            let mut keys = Tensor::zeros(shape)?;
            gather((store, head), &sample, keys.view_mut(), (0, cpu.level));
            all.extend(means(keys.view(), self.index.lists, cpu)?);
        }
        self.clear();
        self.hold(&all)?;
        self.made_at = range.end;
        Ok(())
    }

    /// Puts entries into the lists of their keys.
    fn list(&mut self, store: &dyn MemoryStore, range: Range<usize>, cpu: Cpu) -> Result<()> {
        let (heads, dim) = (self.centroids.kv_heads(), self.centroids.dims().0);
        for first in range.clone().step_by(TOGETHER) {
            let at: Vec<u32> =
                (first..range.end.min(first + TOGETHER)).map(|at| at as u32).collect();
            let mut keys = Tensor::zeros(Shape { batch: 1, seq: at.len(), heads, dim })?;
            for head in 0..heads {
                gather((store, head), &at, keys.view_mut(), (head, cpu.level));
            }
            let mut nearest = vec![NONE; heads * at.len()];
            let centroids = (&self.centroids as &dyn MemoryStore, 0..self.index.lists);
            search(centroids, keys.view(), (1, cpu, Phase::Prompt), &mut nearest);
            for (n, &list) in nearest.iter().enumerate().filter(|(_, list)| **list != NONE) {
                let (head, at) = (n / at.len(), at[n % at.len()]);
                self.members[head * self.index.lists + list as usize].push(at);
            }
        }
        Ok(())
    }
}

/// Copies a head's keys at some positions to rows of a head of `to`.
pub(super) fn gather(
    (store, kv_head): (&dyn MemoryStore, usize),
    positions: &[u32],
    mut to: TensorMut<'_, f32>,
    (head, level): (usize, Level),
) {
    let exact = store.exact();
    for (n, &at) in positions.iter().enumerate() {
        let at = at as usize;
        let Some(key) = exact.tile(kv_head, at..at + 1).keys.rows() else {
            unreachable!("a memory's store was checked to have rows of keys")
        };
        with_rows!(key, rows => row::widen(level, rows.row(0), to.row_mut(0, n, head)));
    }
}

/// Spherical k-means of keys `[1, n, 1, D]`: `count` rows of length 1. A mean that is nearest to no key stays where it was.
fn means(keys: TensorRef<'_, f32>, count: usize, cpu: Cpu) -> Result<Vec<f32>> {
    let Shape { seq, dim, .. } = keys.shape();
    let first = (0..count).flat_map(|l| keys.row(0, l * seq / count, 0));
    let mut means: Vec<f32> = first.copied().collect();
    let shape = Shape { batch: 1, seq: count, heads: 1, dim };
    let none = Tensor::<f32>::zeros(Shape { dim: 0, ..shape })?;
    let mut store = ContiguousCache::<f32>::new(1, (dim, 0), count)?;
    let mut nearest = vec![NONE; seq];
    for _ in 0..ROUNDS {
        store.clear();
        store.append(TensorRef::new(&means, shape)?, none.view())?;
        search((&store, 0..count), keys, (1, cpu, Phase::Prompt), &mut nearest);
        let mut sums = vec![0.0f32; count * dim];
        for (n, &list) in nearest.iter().enumerate().filter(|(_, list)| **list != NONE) {
            let sum = &mut sums[list as usize * dim..][..dim];
            sum.iter_mut().zip(keys.row(0, n, 0)).for_each(|(sum, x)| *sum += x);
        }
        for (mean, sum) in means.chunks_exact_mut(dim).zip(sums.chunks_exact_mut(dim)) {
            if sum.iter().any(|x| *x != 0.0) {
                normalise(cpu.level, sum);
                mean.copy_from_slice(sum);
            }
        }
    }
    Ok(means)
}
