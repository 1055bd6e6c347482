//! Masks of parts, on tokens as they lie after gathering; a row's range costs no more than a search.

use crate::mask::{Mask, Rising, Site};
use std::ops::Range;

/// Rows and keys in segments side by side; a row sees the keys of its own segment up to its own place, but
/// for the newest `skip` of these. In each segment rows and keys end together.
#[derive(Debug)]
pub(super) struct Segments {
    /// Where the rows of each segment begin, and the end.
    pub(super) rows: Vec<usize>,
    /// Where its keys begin, and the end.
    pub(super) keys: Vec<usize>,
    pub(super) skip: usize,
}

impl Rising for Segments {
    fn visible(&self, _: Site, i: isize) -> Range<usize> {
        let [rows, keys] = [&self.rows, &self.keys].map(|x| x.last().copied().unwrap_or(0));
        let row = i.saturating_add_unsigned(rows).saturating_sub_unsigned(keys);
        let Some(row) = usize::try_from(row).ok().filter(|&row| row < rows) else { return 0..0 };
        let n = self.rows.partition_point(|&start| start <= row) - 1;
        let keys = self.keys[n]..self.keys[n + 1];
        let unseen = (self.rows[n + 1] - 1 - row).saturating_add(self.skip);
        keys.start..keys.end.saturating_sub(unseen).max(keys.start)
    }

    fn words(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} segments", self.rows.len().saturating_sub(1))
    }
}

/// Blocks of neighbouring tokens, causal.
pub(super) fn blocks([queries, keys]: [usize; 2], stride: usize) -> Mask {
    let starts: Vec<usize> = (0..keys).step_by(stride).chain([keys]).collect();
    let row = |&key: &usize| (key + queries).saturating_sub(keys);
    let mut rows: Vec<usize> = starts.iter().map(row).collect();
    rows[0] = 0;
    Mask::pattern(Segments { rows, keys: starts, skip: 0 })
}

/// Keys that are `width` columns of each block of `stride` tokens, one block's after the other's: a row sees
/// those of earlier blocks, and perhaps those of its own up to itself.
#[derive(Debug)]
pub(super) struct Stairs {
    pub(super) stride: usize,
    pub(super) width: usize,
    /// The first column's place in a block, if rows see those of their own block.
    pub(super) own: Option<usize>,
    /// What is added to a position among the gathered tokens to have that among all.
    pub(super) origin: isize,
}

impl Rising for Stairs {
    fn visible(&self, _: Site, i: isize) -> Range<usize> {
        let Ok(position) = usize::try_from(i.saturating_add(self.origin)) else { return 0..0 };
        let place = position % self.stride;
        let own = self.own.map_or(0, |first| (place + 1).saturating_sub(first).min(self.width));
        0..position / self.stride * self.width + own
    }

    fn words(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} columns of each {} tokens", self.width, self.stride)
    }
}
