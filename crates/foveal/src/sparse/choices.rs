//! Blocks of keys that rows chose for themselves, and the parts that see them.
//!
//! For each block, the rows that chose it are gathered and see all of it: cost follows the pairs, and what is gathered
//! for a block is its rows. Which blocks may be chosen, mechanisms say; what every row sees, they add.

use super::parts::{GATHERED, Heads, Part, Tokens};
use super::rows::Listed;
use crate::error::{Error, Result};
use crate::mask::{Extent, Mask};
use crate::tensor::Shape;
use std::ops::Range;

/// No block.
const NONE: u32 = u32::MAX;

/// The blocks of keys that rows chose, `[batch][chooser][query][most]`. A chooser is a query head, or a group of
/// heads that choose together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockChoices {
    /// Sequences, choosers and queries.
    shape: [usize; 3],
    most: usize,
    data: Vec<u32>,
}

impl BlockChoices {
    /// Given choices of at most `most` blocks for each row of `[batch, choosers, queries]`, row-major; `None` where a
    /// row chose fewer.
    ///
    /// # Errors
    /// [`Error::BufferLength`] unless there are so many.
    pub fn given(shape: [usize; 3], most: usize, choices: &[Option<u32>]) -> Result<BlockChoices> {
        let expected = shape.iter().try_fold(most, |n, &axis| n.checked_mul(axis));
        let (expected, got) = (expected.unwrap_or(usize::MAX), choices.len());
        if got != expected {
            return Err(Error::BufferLength { what: "chosen blocks", expected, got });
        }
        let data = choices.iter().map(|choice| choice.unwrap_or(NONE)).collect();
        Ok(BlockChoices { shape, most, data })
    }

    /// Nothing chosen yet.
    pub(super) fn none(shape: [usize; 3], most: usize) -> BlockChoices {
        BlockChoices { shape, most, data: vec![NONE; shape.iter().product::<usize>() * most] }
    }

    /// The blocks that a row chose, the best first where they were chosen here.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn of(&self, batch: usize, chooser: usize, query: usize) -> impl Iterator<Item = usize> {
        let at = self.place([batch, chooser, query]);
        blocks(&self.data[at..at + self.most])
    }

    /// Whether a row chose a block; false where there is no such row. The row is that of a position among so many keys.
    pub(super) fn chose(
        &self,
        [batch, chooser, position]: [usize; 3],
        keys: usize,
        block: usize,
    ) -> bool {
        let [batches, choosers, queries] = self.shape;
        let row = (position + queries).checked_sub(keys).filter(|&row| row < queries);
        let row = row.filter(|_| batch < batches && chooser < choosers);
        row.is_some_and(|row| self.of(batch, chooser, row).any(|n| n == block))
    }

    /// Refuses a call for which a mask of these choices was not made.
    pub(super) fn fits(&self, call: Extent, keys: usize) -> Result<()> {
        let [batch, choosers, queries] = self.shape;
        let made = Extent { batch, heads: choosers, queries, keys };
        let show = |x: Extent| {
            let Extent { batch, heads, queries, keys } = x;
            format!("{batch} sequences, {heads} heads, {queries} queries and {keys} keys")
        };
        match call.heads.is_multiple_of(choosers.max(1))
            && made == (Extent { heads: choosers, ..call })
        {
            true => Ok(()),
            false => Err(Error::MaskShape {
                what: "a mask of chosen blocks",
                expected: show(made),
                got: show(call),
            }),
        }
    }

    /// Where a row may write what it chooses.
    pub(super) fn row_mut(&mut self, row: [usize; 3]) -> &mut [u32] {
        let at = self.place(row);
        &mut self.data[at..at + self.most]
    }

    fn place(&self, [batch, chooser, query]: [usize; 3]) -> usize {
        let [batches, choosers, queries] = self.shape;
        assert!(batch < batches && chooser < choosers && query < queries, "no such row");
        ((batch * choosers + chooser) * queries + query) * self.most
    }

    /// Refuses choices of other rows than those of `[batch, choosers, queries]`, and blocks that a row may not
    /// choose: `expected` says which it may in words, `allowed` in numbers.
    pub(super) fn check(
        &self,
        [batch, heads, seq]: [usize; 3],
        expected: &'static str,
        allowed: impl Fn(usize) -> Range<usize>,
    ) -> Result<()> {
        let shape = |[batch, heads, seq]: [usize; 3]| Shape { batch, seq, heads, dim: 1 };
        crate::plan::expect("rows that chose", shape([batch, heads, seq]), shape(self.shape))?;
        for (n, own) in self.data.chunks(self.most.max(1)).enumerate() {
            let (row, chosen) = (n % seq, blocks(own).collect::<Vec<_>>());
            let allowed = allowed(row);
            let once = |(n, block): (usize, &usize)| !chosen[..n].contains(block);
            if !chosen.iter().all(|block| allowed.contains(block))
                || !chosen.iter().enumerate().all(once)
            {
                let got = format!("{chosen:?} for query {row}, which may choose {allowed:?}");
                return Err(Error::InvalidParameter { what: "chosen blocks", expected, got });
            }
        }
        Ok(())
    }

    /// For each sequence and chooser of so many heads, each block of so many tokens and the rows that chose it.
    pub(super) fn parts(
        &self,
        heads: usize,
        block: usize,
    ) -> impl Iterator<Item = Heads> + use<'_> {
        let [batches, choosers, _] = self.shape;
        let sites = (0..batches).flat_map(move |b| (0..choosers).map(move |chooser| (b, chooser)));
        sites.map(move |(b, chooser)| {
            let parts = self.rows_of_blocks(b, chooser).into_iter().enumerate();
            let part = |(n, rows): (usize, Vec<usize>)| {
                let keys = n * block..(n + 1) * block;
                let runs = rows.chunks(GATHERED).map(move |rows| Part {
                    queries: Tokens::Listed(Listed::ascending(rows.to_vec())),
                    keys: Tokens::Span(keys.clone()),
                    mask: Mask::Full,
                });
                runs.collect::<Vec<_>>()
            };
            let heads = chooser * heads..(chooser + 1) * heads;
            Heads { sequences: b..b + 1, heads, parts: parts.flat_map(part).collect() }
        })
    }

    /// The rows that chose each block.
    fn rows_of_blocks(&self, batch: usize, chooser: usize) -> Vec<Vec<usize>> {
        let mut rows = vec![];
        for query in 0..self.shape[2] {
            for block in self.of(batch, chooser, query) {
                if rows.len() <= block {
                    rows.resize(block + 1, vec![]);
                }
                rows[block].push(query);
            }
        }
        rows
    }
}

fn blocks(own: &[u32]) -> impl Iterator<Item = usize> {
    own.iter().filter(|&&block| block != NONE).map(|&block| block as usize)
}

/// Writes the places of the largest scores, counted from `first`, best first: as many as there are and fit. Among
/// equals the earlier one counts; NaN counts least.
pub(super) fn best(scores: &[f32], first: usize, to: &mut [u32]) {
    let score = |place: u32| scores[place as usize - first];
    let better = |a: f32, b: f32| a > b || b.is_nan() && !a.is_nan();
    let mut held = 0;
    for (n, &own) in (first..).zip(scores) {
        if held == to.len() && to.last().is_none_or(|&last| !better(own, score(last))) {
            continue;
        }
        let place = to[..held].partition_point(|&other| !better(own, score(other)));
        held = (held + 1).min(to.len());
        to[place..held].rotate_right(1);
        to[place] = n as u32;
    }
}
