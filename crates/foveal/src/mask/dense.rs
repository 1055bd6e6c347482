//! One bit per (query, key): any mask at all, at a cost of one bit each.

use super::{Coverage, Extent, Pattern, Site};
use crate::error::{Error, Result};
use std::ops::Range;

/// A mask `[batch, heads, queries, keys]` of bits; a batch or head axis of 1 is shared by all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dense {
    batch: usize,
    heads: usize,
    queries: usize,
    keys: usize,
    words_per_row: usize,
    bits: Vec<u64>,
}

impl Dense {
    /// A mask from row-major booleans `[batch, heads, queries, keys]`, true = visible. Allocates one
    /// bit per boolean, rows rounded up to 64.
    ///
    /// # Errors
    /// [`Error::BufferLength`] unless `visible` holds exactly the extent's booleans.
    pub fn new(visible: &[bool], extent: Extent) -> Result<Dense> {
        let Extent { batch, heads, queries, keys } = extent;
        let rows = batch.checked_mul(heads).and_then(|n| n.checked_mul(queries));
        let expected = rows.and_then(|n| n.checked_mul(keys)).unwrap_or(usize::MAX);
        if visible.len() != expected {
            let got = visible.len();
            return Err(Error::BufferLength { what: "dense mask", expected, got });
        }
        let words_per_row = keys.div_ceil(64);
        let mut bits = vec![0u64; rows.unwrap_or(0) * words_per_row];
        for (n, _) in visible.iter().enumerate().filter(|(_, visible)| **visible) {
            bits[n / keys * words_per_row + n % keys / 64] |= 1 << (n % keys % 64);
        }
        Ok(Dense { batch, heads, queries, keys, words_per_row, bits })
    }

    /// A mask from rows of bits, 1 = visible: key `j` of a row is bit `j % 64` of its word `j / 64`, and each row
    /// begins with a word of its own. Takes the vector; bits beyond the last key are cleared.
    ///
    /// # Errors
    /// [`Error::BufferLength`] unless `bits` holds exactly the words of the extent's rows.
    pub fn from_words(mut bits: Vec<u64>, extent: Extent) -> Result<Dense> {
        let Extent { batch, heads, queries, keys } = extent;
        let words_per_row = keys.div_ceil(64);
        let rows = batch.checked_mul(heads).and_then(|n| n.checked_mul(queries));
        let expected = rows.and_then(|n| n.checked_mul(words_per_row)).unwrap_or(usize::MAX);
        if bits.len() != expected {
            return Err(Error::BufferLength { what: "dense mask", expected, got: bits.len() });
        }
        if keys % 64 != 0 {
            let last = bits.iter_mut().skip(words_per_row - 1).step_by(words_per_row);
            last.for_each(|word| *word &= (1 << (keys % 64)) - 1);
        }
        Ok(Dense { batch, heads, queries, keys, words_per_row, bits })
    }

    /// The words of the row at absolute position `i = row + S − T`.
    fn row(&self, at: Site, i: isize) -> Option<&[u64]> {
        let row = usize::try_from(i + self.queries as isize - self.keys as isize).ok()?;
        if row >= self.queries {
            return None;
        }
        let batch = if self.batch == 1 { 0 } else { at.batch };
        let head = if self.heads == 1 { 0 } else { at.q_head };
        let n = (batch * self.heads + head) * self.queries + row;
        Some(&self.bits[n * self.words_per_row..][..self.words_per_row])
    }
}

impl Pattern for Dense {
    fn allows(&self, at: Site, i: isize, j: usize) -> bool {
        j < self.keys && self.row(at, i).is_some_and(|row| row[j / 64] >> (j % 64) & 1 == 1)
    }

    fn live(
        &self,
        at: Site,
        rows: Range<isize>,
        keys: Range<usize>,
        visit: &mut dyn FnMut(Range<usize>, Coverage),
    ) {
        // Word by word: what some row sees, and what all rows see.
        let mut open: Option<(Range<usize>, Coverage)> = None;
        let end = keys.end.min(self.keys);
        if keys.start >= end {
            return;
        }
        for word in keys.start / 64..end.div_ceil(64) {
            let (mut any, mut all) = (0u64, u64::MAX);
            for i in rows.clone() {
                let bits = self.row(at, i).map_or(0, |row| row[word]);
                any |= bits;
                all &= bits;
            }
            let span = (word * 64).max(keys.start)..(word * 64 + 64).min(end);
            let mask = (u64::MAX >> (64 - span.len())) << (span.start % 64);
            let coverage = match (any & mask, all & mask) {
                (0, _) => None,
                (_, all) if all == mask => Some(Coverage::Full),
                _ => Some(Coverage::Partial),
            };
            match (&mut open, coverage) {
                (Some((range, c)), Some(coverage)) if *c == coverage && range.end == span.start => {
                    range.end = span.end;
                }
                _ => {
                    if let Some((range, c)) = open.take() {
                        visit(range, c);
                    }
                    open = coverage.map(|coverage| (span, coverage));
                }
            }
        }
        if let Some((range, c)) = open {
            visit(range, c);
        }
    }

    fn fill(&self, at: Site, i: isize, keys: Range<usize>, bits: &mut [u64]) {
        bits.fill(0);
        let Some(row) = self.row(at, i) else { return };
        let (first, shift) = (keys.start / 64, keys.start % 64);
        let word = |w: usize| row.get(w).copied().unwrap_or(0);
        for (b, out) in bits.iter_mut().enumerate() {
            let high = if shift == 0 { 0 } else { word(first + b + 1) << (64 - shift) };
            *out = word(first + b) >> shift | high;
            let left = keys.len().saturating_sub(b * 64);
            if left < 64 {
                *out &= (1 << left) - 1;
            }
        }
    }

    fn same_for_all_heads(&self) -> bool {
        self.heads == 1
    }

    fn check(&self, extent: Extent) -> Result<()> {
        let fits = |own: usize, call: usize| own == 1 || own == call;
        if fits(self.batch, extent.batch)
            && fits(self.heads, extent.heads)
            && (self.queries, self.keys) == (extent.queries, extent.keys)
        {
            return Ok(());
        }
        let show = |e: Extent| {
            format!(
                "{} sequences, {} heads, {} queries, {} keys",
                e.batch, e.heads, e.queries, e.keys
            )
        };
        let own =
            Extent { batch: self.batch, heads: self.heads, queries: self.queries, keys: self.keys };
        Err(Error::MaskShape { what: "a dense mask", expected: show(own), got: show(extent) })
    }
}

#[cfg(test)]
mod tests {
    use super::{Dense, Extent};

    #[test]
    fn words_and_booleans_make_the_same_mask() {
        for keys in [0, 1, 63, 64, 65, 130] {
            let extent = Extent { batch: 2, heads: 1, queries: 3, keys };
            let words_per_row = keys.div_ceil(64);
            let words: Vec<u64> = (1..=6 * words_per_row as u64)
                .map(|n| n.wrapping_mul(0x9e37_79b9_7f4a_7c15))
                .collect();
            let row = |r: usize| &words[r * words_per_row..][..words_per_row];
            let visible: Vec<bool> = (0..6)
                .flat_map(|r| (0..keys).map(move |j| row(r)[j / 64] >> (j % 64) & 1 == 1))
                .collect();
            let dense = Dense::from_words(words.clone(), extent).unwrap();
            assert_eq!(dense, Dense::new(&visible, extent).unwrap(), "{keys}");
            let longer = [words.as_slice(), &[0]].concat();
            assert!(Dense::from_words(longer, extent).is_err());
        }
        let extent = Extent { batch: usize::MAX, heads: 3, queries: 1, keys: 1 };
        assert!(Dense::from_words(vec![], extent).is_err());
    }
}
