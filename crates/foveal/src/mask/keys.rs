//! Keys that exist: a range for each sequence, whatever the query; the rest is padding.
//!
//! ```text
//! allows(i, j)  =  start ≤ j < end        padding right: 0..length      padding left: padding..
//! ```
//!
//! Queries stay where the call puts them, the last of them beside the last key, padding or not.
//! `live` costs one range, `fill` a few words.

use super::{Coverage, Extent, Pattern, Site, fill_range, one_or_own};
use std::ops::Range;

/// One range of visible keys for each sequence, or one for all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Keys {
    ranges: Vec<Range<usize>>,
}

impl Keys {
    /// One range for each sequence, or one for all; what lies beyond the call's keys is not there.
    pub fn new(ranges: Vec<Range<usize>>) -> Keys {
        Keys { ranges }
    }

    /// Sequences padded to the right: the first `lengths[b]` keys of sequence `b` exist. Allocates.
    pub fn padded_right(lengths: &[usize]) -> Keys {
        Keys::new(lengths.iter().map(|&length| 0..length).collect())
    }

    /// Sequences padded to the left: the first `padding[b]` keys of sequence `b` don't exist.
    /// Allocates.
    pub fn padded_left(padding: &[usize]) -> Keys {
        Keys::new(padding.iter().map(|&padding| padding..usize::MAX).collect())
    }

    fn range(&self, at: Site) -> Range<usize> {
        one_or_own(&self.ranges, at.batch).cloned().unwrap_or(0..0)
    }
}

impl Pattern for Keys {
    fn allows(&self, at: Site, _: isize, j: usize) -> bool {
        self.range(at).contains(&j)
    }

    fn live(
        &self,
        at: Site,
        rows: Range<isize>,
        keys: Range<usize>,
        visit: &mut dyn FnMut(Range<usize>, Coverage),
    ) {
        let range = self.range(at);
        let seen = range.start.max(keys.start)..range.end.min(keys.end);
        if !rows.is_empty() && !seen.is_empty() {
            visit(seen, Coverage::Full);
        }
    }

    fn fill(&self, at: Site, _: isize, keys: Range<usize>, bits: &mut [u64]) {
        fill_range(self.range(at), keys, bits);
    }

    fn same_for_all_heads(&self) -> bool {
        true
    }

    fn check(&self, extent: Extent) -> crate::Result<()> {
        super::check_sequences("key ranges", self.ranges.len(), extent)
    }

    fn describe(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.ranges[..] {
            [range] if range.end == usize::MAX => write!(f, "keys from {}", range.start),
            [range] => write!(f, "keys {}..{}", range.start, range.end),
            _ => write!(f, "keys of {} sequences", self.ranges.len()),
        }
    }
}
