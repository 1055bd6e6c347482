//! Block layouts: one bit says whether a block of queries sees a block of keys.
//!
//! ```text
//! allows(i, j)  =  layout[i / block of queries][j / block of keys]
//! ```
//!
//! Blocks of any sizes, one layout for all heads and sequences or one for each; within the blocks, more
//! masks by `and` (usually causal). `live` costs a step for each run of live blocks and a word for each
//! 64 blocks of keys, times the blocks of queries asked about. Sparse Transformer kernels (Gray et al.
//! 2017), FlexAttention's and FlashInfer's block masks.

use super::runs::Blocked;
use super::{Coverage, Extent, Pattern, Site};
use crate::error::{Error, Result};
use std::ops::Range;

/// The sizes of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockSize {
    /// Query positions.
    pub queries: usize,
    /// Key positions.
    pub keys: usize,
}

/// A layout `[batch, heads, query blocks, key blocks]` of bits; a batch or head axis of 1 is shared by
/// all. The blocks of queries are those of absolute positions, unless [`Blocks::by_query`] says
/// otherwise.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blocks {
    layout: Extent,
    size: BlockSize,
    words_per_row: usize,
    bits: Vec<u64>,
    /// Queries and keys of the call whose rows the layout counts.
    lengths: Option<[usize; 2]>,
}

impl Blocks {
    /// A layout from row-major booleans, true = visible, one for each block: `layout` counts blocks
    /// of queries and keys. Allocates one bit per boolean, rows rounded up to 64.
    ///
    /// # Errors
    /// [`Error::BufferLength`] unless `visible` holds exactly the layout's booleans;
    /// [`Error::InvalidParameter`] for blocks of size zero.
    pub fn new(visible: &[bool], layout: Extent, size: BlockSize) -> Result<Blocks> {
        if size.queries == 0 || size.keys == 0 {
            return Err(Error::InvalidParameter {
                what: "block size",
                expected: "at least 1 query and 1 key",
                got: format!("{} by {}", size.queries, size.keys),
            });
        }
        let axes = [layout.heads, layout.queries, layout.keys];
        let expected = axes.iter().try_fold(layout.batch, |n, &axis| n.checked_mul(axis));
        let (expected, got) = (expected.unwrap_or(usize::MAX), visible.len());
        if got != expected {
            return Err(Error::BufferLength { what: "block layout", expected, got });
        }
        let words_per_row = layout.keys.div_ceil(64);
        let mut bits = Vec::with_capacity(expected.div_ceil(layout.keys.max(1)) * words_per_row);
        for row in visible.chunks(layout.keys.max(1)) {
            bits.extend(row.chunks(64).map(|blocks| {
                blocks.iter().rev().fold(0, |word, &visible| word << 1 | u64::from(visible))
            }));
        }
        Ok(Blocks { layout, size, words_per_row, bits, lengths: None })
    }

    /// Counts the blocks of queries from the first query of a call with so many queries and keys, as
    /// cross attention wants it, instead of by absolute position.
    pub fn by_query(self, queries: usize, keys: usize) -> Blocks {
        Blocks { lengths: Some([queries, keys]), ..self }
    }

    /// A position as the layout counts rows of queries.
    fn place(&self, i: isize) -> isize {
        let [queries, keys] = self.lengths.unwrap_or_default();
        i.saturating_add_unsigned(queries).saturating_sub_unsigned(keys)
    }

    /// The rows of queries that the layout covers.
    fn covered(&self) -> usize {
        self.layout.queries.saturating_mul(self.size.queries)
    }

    /// The block of queries that a position lies in.
    fn block(&self, i: isize) -> Option<usize> {
        let place = usize::try_from(self.place(i)).ok()?;
        (place < self.covered()).then_some(place / self.size.queries)
    }

    /// The words of a block of queries.
    fn row(&self, at: Site, block: usize) -> Option<&[u64]> {
        let Extent { batch, heads, queries, .. } = self.layout;
        let shared = |axis: usize, index: usize| if axis == 1 { 0 } else { index };
        let (b, h) = (shared(batch, at.batch), shared(heads, at.q_head));
        let n = (b * heads + h) * queries + block;
        (b < batch && h < heads).then(|| &self.bits[n * self.words_per_row..][..self.words_per_row])
    }

    fn keys(&self) -> Blocked {
        Blocked { start: 0, size: self.size.keys, count: self.layout.keys }
    }

    fn refuse(&self, expected: String, got: String) -> Error {
        Error::MaskShape { what: "a block layout", expected, got }
    }
}

impl Pattern for Blocks {
    fn allows(&self, at: Site, i: isize, j: usize) -> bool {
        let block = j / self.size.keys;
        let row = self.block(i).and_then(|row| self.row(at, row));
        block < self.layout.keys && row.is_some_and(|row| row[block / 64] >> (block % 64) & 1 == 1)
    }

    fn live(
        &self,
        at: Site,
        rows: Range<isize>,
        keys: Range<usize>,
        visit: &mut dyn FnMut(Range<usize>, Coverage),
    ) {
        // Rows outside the layout see nothing; then nothing is full.
        let clip = |i: isize| (self.place(i).max(0) as usize).min(self.covered());
        let (start, end) = (clip(rows.start), clip(rows.end));
        if start >= end || self.row(at, 0).is_none() {
            return;
        }
        let within = end - start == rows.len();
        let (first, last) = (start / self.size.queries, (end - 1) / self.size.queries);
        let words = |w: usize| {
            let rows = (first..=last).filter_map(|block| self.row(at, block));
            let start = (0, if within { u64::MAX } else { 0 });
            rows.fold(start, |(any, all), row| (any | row[w], all & row[w]))
        };
        self.keys().live(keys, words, visit);
    }

    fn fill(&self, at: Site, i: isize, keys: Range<usize>, bits: &mut [u64]) {
        bits.fill(0);
        if let Some(row) = self.block(i).and_then(|row| self.row(at, row)) {
            self.keys().fill(row, keys, bits);
        }
    }

    fn same_for_all_heads(&self) -> bool {
        self.layout.heads == 1
    }

    fn check(&self, extent: Extent) -> Result<()> {
        let Extent { batch, heads, keys, .. } = self.layout;
        let fits = |own: usize, call: usize| own == 1 || own == call;
        if !fits(batch, extent.batch) || !fits(heads, extent.heads) {
            let show = |b: usize, h: usize| format!("{b} sequences and {h} heads");
            return Err(self.refuse(show(batch, heads), show(extent.batch, extent.heads)));
        }
        let covered = [self.covered(), keys.saturating_mul(self.size.keys)];
        let got = format!("{} queries and {} keys", extent.queries, extent.keys);
        match self.lengths {
            Some([queries, keys]) if [queries, keys] != [extent.queries, extent.keys] => {
                Err(self.refuse(format!("{queries} queries and {keys} keys"), got))
            }
            None if extent.queries > extent.keys => {
                Err(self.refuse("queries beside their keys; see Blocks::by_query".into(), got))
            }
            _ => {
                // Without lengths of its own, queries are counted by position, up to the last key.
                let rows = self.lengths.map_or(extent.keys, |[queries, _]| queries);
                if rows <= covered[0] && extent.keys <= covered[1] {
                    return Ok(());
                }
                Err(self.refuse(format!("{} queries and {} keys", covered[0], covered[1]), got))
            }
        }
    }

    fn describe(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let live: u64 = self.bits.iter().map(|word| u64::from(word.count_ones())).sum();
        let Extent { batch, heads, queries, keys } = self.layout;
        let all = batch as u64 * heads as u64 * queries as u64 * keys as u64;
        let BlockSize { queries, keys } = self.size;
        write!(f, "blocks of {queries} by {keys}, {live} of {all} live")
    }
}
