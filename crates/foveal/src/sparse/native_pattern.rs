//! Masks of Native Sparse Attention; the two that attention is computed with cost no more than a row's ranges.

use super::choices::BlockChoices;
use super::native_sparse::NativeSizes;
use crate::error::Result;
use crate::mask::{Coverage, Extent, Pattern, Rising, Site, add_range, fill_range, live_between};
use std::ops::Range;

/// Compressed tokens all of whose tokens are at or before the row.
#[derive(Debug)]
pub(super) struct Whole {
    pub(super) length: usize,
    pub(super) stride: usize,
    /// What is added to a position among compressed tokens to have that among all.
    pub(super) origin: isize,
}

impl Rising for Whole {
    fn visible(&self, _: Site, i: isize) -> Range<usize> {
        let position = usize::try_from(i.saturating_add(self.origin)).ok();
        let rest = position.and_then(|position| (position + 1).checked_sub(self.length));
        0..rest.map_or(0, |rest| rest / self.stride + 1)
    }

    fn words(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "whole compressed tokens, one for each {}", self.stride)
    }
}

/// Block 0, and the own block up to the row with the one before it.
#[derive(Debug)]
pub(super) struct Forced {
    pub(super) block: usize,
}

impl Forced {
    fn newest(&self, i: isize) -> Range<usize> {
        let Ok(position) = usize::try_from(i) else { return 0..0 };
        (position / self.block).saturating_sub(1) * self.block..position + 1
    }

    /// Of block 0, what is not among the newest.
    fn first(&self, i: isize) -> Range<usize> {
        0..self.newest(i).start.min(self.block)
    }
}

impl Pattern for Forced {
    fn allows(&self, _: Site, i: isize, j: usize) -> bool {
        self.first(i).contains(&j) || self.newest(i).contains(&j)
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
        let (a, b) = (rows.start, rows.end - 1);
        // Rows that hold block 0 among the newest hold all of it that they may see.
        let seen = |i| 0..self.newest(i).end.min(self.block);
        let split = self.block.clamp(keys.start, keys.end);
        live_between(seen(a), seen(b), keys.start..split, visit);
        live_between(self.newest(a), self.newest(b), split..keys.end, visit);
    }

    fn fill(&self, _: Site, i: isize, keys: Range<usize>, bits: &mut [u64]) {
        fill_range(self.newest(i), keys.clone(), bits);
        add_range(self.first(i), keys, bits);
    }

    fn same_for_all_heads(&self) -> bool {
        true
    }

    fn describe(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "the first, the own and the previous block of {}", self.block)
    }
}

/// The pairs of tokens as they are defined.
#[derive(Debug)]
pub(super) struct Chosen {
    pub(super) sizes: NativeSizes,
    pub(super) choices: BlockChoices,
    pub(super) keys: usize,
}

impl Pattern for Chosen {
    fn allows(&self, at: Site, i: isize, j: usize) -> bool {
        let Some(position) = usize::try_from(i).ok().filter(|&i| j <= i) else { return false };
        let (own, block) = (position / self.sizes.block, j / self.sizes.block);
        let forced = block == 0 || block + 1 >= own;
        let row = [at.batch, at.kv_head, position];
        position - j < self.sizes.window || forced || self.choices.chose(row, self.keys, block)
    }

    fn check(&self, extent: Extent) -> Result<()> {
        self.choices.fits(extent, self.keys)
    }
}
