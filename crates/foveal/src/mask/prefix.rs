//! Prefix language models: the first tokens see each other, later ones look back.
//!
//! ```text
//! allows(i, j)  =  j < n  or  j ≤ i
//! ```
//!
//! n is one number or one for each sequence. `live` costs at most two ranges, `fill` a few words
//! (Raffel et al. 2020, §3.2.1).

use super::{Coverage, Extent, Pattern, Site, fill_range, live_between, one_or_own};
use std::ops::Range;

/// Everything within a prefix, causal after it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prefix {
    lengths: Vec<usize>,
}

impl Prefix {
    /// Prefixes of so many tokens, one for each sequence or one for all. Allocates a copy.
    pub fn new(lengths: &[usize]) -> Prefix {
        Prefix { lengths: lengths.to_vec() }
    }

    /// The keys that one query position sees.
    fn keys(&self, at: Site, i: isize) -> Range<usize> {
        let Some(&length) = one_or_own(&self.lengths, at.batch) else { return 0..0 };
        0..length.max(i.saturating_add(1).max(0) as usize)
    }
}

impl Pattern for Prefix {
    fn allows(&self, at: Site, i: isize, j: usize) -> bool {
        self.keys(at, i).contains(&j)
    }

    fn live(
        &self,
        at: Site,
        rows: Range<isize>,
        keys: Range<usize>,
        visit: &mut dyn FnMut(Range<usize>, Coverage),
    ) {
        if !rows.is_empty() {
            live_between(self.keys(at, rows.start), self.keys(at, rows.end - 1), keys, visit);
        }
    }

    fn fill(&self, at: Site, i: isize, keys: Range<usize>, bits: &mut [u64]) {
        fill_range(self.keys(at, i), keys, bits);
    }

    fn same_for_all_heads(&self) -> bool {
        true
    }

    fn check(&self, extent: Extent) -> crate::Result<()> {
        super::check_sequences("prefix lengths", self.lengths.len(), extent)
    }

    fn describe(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.lengths[..] {
            [length] => write!(f, "prefix {length}"),
            _ => write!(f, "prefixes of {} sequences", self.lengths.len()),
        }
    }
}
