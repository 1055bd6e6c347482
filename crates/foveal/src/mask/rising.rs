//! Patterns whose rows see one range of keys each, both ends of which rise from row to row.
//!
//! ```text
//! allows(i, j)  =  j ∈ visible(i)        visible(i).start ≤ visible(i + 1).start,  visible(i).end ≤ visible(i + 1).end
//! ```
//!
//! `live` costs the two ranges of its first and last row, `fill` a few words.

use super::{Coverage, Extent, Pattern, Site, fill_range, live_between};
use std::ops::Range;

/// One rising range a row; a [`Pattern`] by that.
pub(crate) trait Rising: std::fmt::Debug + Send + Sync {
    /// The keys that one position sees, before they are cut to those that exist. The same for all heads.
    fn visible(&self, at: Site, i: isize) -> Range<usize>;

    /// See [`Pattern::check`].
    fn fits(&self, extent: Extent) -> crate::Result<()> {
        let _ = extent;
        Ok(())
    }

    /// See [`Pattern::describe`].
    fn words(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result;
}

impl<R: Rising> Pattern for R {
    fn allows(&self, at: Site, i: isize, j: usize) -> bool {
        self.visible(at, i).contains(&j)
    }

    fn live(
        &self,
        at: Site,
        rows: Range<isize>,
        keys: Range<usize>,
        visit: &mut dyn FnMut(Range<usize>, Coverage),
    ) {
        if !rows.is_empty() {
            live_between(self.visible(at, rows.start), self.visible(at, rows.end - 1), keys, visit);
        }
    }

    fn fill(&self, at: Site, i: isize, keys: Range<usize>, bits: &mut [u64]) {
        fill_range(self.visible(at, i), keys, bits);
    }

    fn same_for_all_heads(&self) -> bool {
        true
    }

    fn check(&self, extent: Extent) -> crate::Result<()> {
        self.fits(extent)
    }

    fn describe(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.words(f)
    }
}
