//! Trees of guessed tokens: each sees the tokens before the tree, its ancestors and itself.
//!
//! ```text
//! allows(i, j)  =  j < p  or  j − p is an ancestor of i − p or i itself       for i ≥ p
//! allows(i, j)  =  j ≤ i                                                      for i < p
//! ```
//!
//! p tokens come before the tree, whose T tokens lie behind them in any order in which parents come
//! first (SpecInfer, Miao et al. 2024, §4.2). T²/8 bytes; `live` costs the runs of live tokens, and a
//! word for each 64 tokens and row.

use super::runs::Blocked;
use super::{Coverage, Extent, Pattern, Site, fill_range, live_between};
use crate::error::{Error, Result};
use std::ops::Range;

/// The most tokens of a [`Tree`]: 8 MiB of bits.
pub const MAX_TREE: usize = 8192;

/// A tree (or several beside each other) of tokens behind a sequence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tree {
    /// Tokens before the tree.
    before: usize,
    /// Tokens of the tree.
    count: usize,
    words_per_row: usize,
    /// For each token, its ancestors and itself.
    bits: Vec<u64>,
}

impl Tree {
    /// A tree behind `before` tokens: `parents[n]` is the place in the tree of token `n`'s parent, `None`
    /// for a token that follows the sequence itself. Allocates a bit for each pair of tokens.
    ///
    /// ```
    /// use foveal::mask::Tree;
    /// // Two guesses for the next token; the first has two continuations.
    /// let tree = Tree::new(1000, &[None, None, Some(0), Some(0)])?;
    /// # Ok::<(), foveal::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::InvalidParameter`] if a parent does not come before its child, and for more than
    /// [`MAX_TREE`] tokens.
    pub fn new(before: usize, parents: &[Option<usize>]) -> Result<Tree> {
        let count = parents.len();
        if count > MAX_TREE {
            let (what, expected) = ("tree tokens", "at most 8192");
            return Err(Error::InvalidParameter { what, expected, got: count.to_string() });
        }
        let words_per_row = count.div_ceil(64);
        let mut bits = vec![0u64; count * words_per_row];
        for (n, &parent) in parents.iter().enumerate() {
            let (earlier, own) = bits.split_at_mut(n * words_per_row);
            match parent {
                Some(parent) if parent < n => own[..words_per_row]
                    .copy_from_slice(&earlier[parent * words_per_row..][..words_per_row]),
                Some(parent) => {
                    return Err(Error::InvalidParameter {
                        what: "parent of a tree token",
                        expected: "a token before it",
                        got: format!("{parent} for token {n}"),
                    });
                }
                None => {}
            }
            own[n / 64] |= 1 << (n % 64);
        }
        Ok(Tree { before, count, words_per_row, bits })
    }

    /// The words of the token at a position, if it belongs to the tree.
    fn row(&self, i: isize) -> Option<&[u64]> {
        let n = usize::try_from(i).ok()?.checked_sub(self.before)?;
        (n < self.count).then(|| &self.bits[n * self.words_per_row..][..self.words_per_row])
    }

    /// The keys before the tree that one query position sees.
    fn earlier(&self, i: isize) -> Range<usize> {
        0..(i.saturating_add(1).max(0) as usize).min(self.before)
    }

    fn keys(&self) -> Blocked {
        Blocked { start: self.before, size: 1, count: self.count }
    }
}

impl Pattern for Tree {
    fn allows(&self, _: Site, i: isize, j: usize) -> bool {
        match j.checked_sub(self.before) {
            None => self.earlier(i).contains(&j),
            Some(n) => {
                n < self.count && self.row(i).is_some_and(|row| row[n / 64] >> (n % 64) & 1 == 1)
            }
        }
    }

    fn live(
        &self,
        _: Site,
        rows: Range<isize>,
        keys: Range<usize>,
        visit: &mut dyn FnMut(Range<usize>, Coverage),
    ) {
        if rows.is_empty() {
            return;
        }
        let split = self.before.clamp(keys.start, keys.end);
        let (first, last) = (self.earlier(rows.start), self.earlier(rows.end - 1));
        live_between(first, last, keys.start..split, visit);
        let words = |w: usize| {
            let from = isize::try_from(self.before).unwrap_or(isize::MAX);
            let to = from.saturating_add_unsigned(self.count);
            let within = from <= rows.start && rows.end <= to;
            let start = (0, if within { u64::MAX } else { 0 });
            let rows = (rows.start.max(from)..rows.end.min(to)).filter_map(|i| self.row(i));
            rows.fold(start, |(any, all), row| (any | row[w], all & row[w]))
        };
        self.keys().live(split..keys.end, words, visit);
    }

    fn fill(&self, _: Site, i: isize, keys: Range<usize>, bits: &mut [u64]) {
        fill_range(self.earlier(i), keys.clone(), bits);
        if let Some(row) = self.row(i) {
            self.keys().fill(row, keys, bits);
        }
    }

    fn same_for_all_heads(&self) -> bool {
        true
    }

    fn check(&self, extent: Extent) -> Result<()> {
        let keys = self.before.saturating_add(self.count);
        if extent.keys <= keys {
            return Ok(());
        }
        Err(Error::MaskShape {
            what: "a tree mask",
            expected: format!("{} keys and {} tree tokens behind them", self.before, self.count),
            got: format!("{} keys", extent.keys),
        })
    }

    fn describe(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "tree of {} tokens behind {}", self.count, self.before)
    }
}
