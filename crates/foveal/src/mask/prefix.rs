//! Prefix language models: the first tokens see each other, later ones look back.
//!
//! ```text
//! allows(i, j)  =  j < n  or  j ≤ i
//! ```
//!
//! n is one number or one for each sequence. `live` costs at most two ranges, `fill` a few words
//! (Raffel et al. 2020, §3.2.1).

use super::{Extent, Rising, Site, one_or_own};
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
}

impl Rising for Prefix {
    fn visible(&self, at: Site, i: isize) -> Range<usize> {
        let Some(&length) = one_or_own(&self.lengths, at.batch) else { return 0..0 };
        0..length.max(i.saturating_add(1).max(0) as usize)
    }

    fn fits(&self, extent: Extent) -> crate::Result<()> {
        super::check_sequences("prefix lengths", self.lengths.len(), extent)
    }

    fn words(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.lengths[..] {
            [length] => write!(f, "prefix {length}"),
            _ => write!(f, "prefixes of {} sequences", self.lengths.len()),
        }
    }
}
