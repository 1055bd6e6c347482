//! Keys near the query: causal, sliding window, and bands to both sides.
//!
//! ```text
//! allows(i, j)  =  i − behind ≤ j ≤ i + ahead
//! ```
//!
//! Causal attention (Vaswani et al. 2017, §3.2.3) is `ahead` = 0 without a lower end; a sliding window
//! (Beltagy et al. 2020) of w keys is `behind` = w − 1, `ahead` = 0.

use super::{Coverage, Pattern, Rising, Site, set_bits};
use std::ops::Range;

/// Keys from `behind` before to `ahead` after the query's position, both included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Band {
    /// How far back; `None` to the beginning.
    pub behind: Option<usize>,
    /// How far forward; `None` to the end.
    pub ahead: Option<usize>,
}

impl Band {
    /// What lies in both bands.
    pub(super) fn and(self, other: Band) -> Band {
        let tighter = |a: Option<usize>, b: Option<usize>| match (a, b) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
        Band { behind: tighter(self.behind, other.behind), ahead: tighter(self.ahead, other.ahead) }
    }
}

impl Rising for Band {
    fn visible(&self, _: Site, i: isize) -> Range<usize> {
        let position = |x: isize| x.max(0) as usize;
        let start = self.behind.map_or(0, |behind| position(i.saturating_sub_unsigned(behind)));
        let end = self.ahead.map_or(usize::MAX, |ahead| {
            position(i.saturating_add_unsigned(ahead).saturating_add(1))
        });
        start..end
    }

    fn words(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Debug::fmt(self, f)
    }
}

impl std::fmt::Display for Band {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (self.behind, self.ahead) {
            (None, None) => f.write_str("full"),
            (None, Some(0)) => f.write_str("causal"),
            (Some(behind), Some(0)) => write!(f, "window {}", behind.saturating_add(1)),
            (behind, ahead) => {
                let end = |x: Option<usize>| x.map_or("all".into(), |x| x.to_string());
                write!(f, "band {} behind {} ahead", end(behind), end(ahead))
            }
        }
    }
}

/// The pattern of [`super::Mask::Full`].
#[derive(Debug)]
pub(super) struct Everything;

impl Pattern for Everything {
    fn allows(&self, _: Site, _: isize, _: usize) -> bool {
        true
    }
    fn live(
        &self,
        _: Site,
        rows: Range<isize>,
        keys: Range<usize>,
        visit: &mut dyn FnMut(Range<usize>, Coverage),
    ) {
        if !rows.is_empty() && !keys.is_empty() {
            visit(keys, Coverage::Full);
        }
    }
    fn fill(&self, _: Site, _: isize, keys: Range<usize>, bits: &mut [u64]) {
        bits.fill(0);
        set_bits(bits, 0, keys.len());
    }
    fn same_for_all_heads(&self) -> bool {
        true
    }
}

/// The pattern under which no row sees anything.
#[derive(Debug)]
pub(super) struct Nothing;

impl Pattern for Nothing {
    fn allows(&self, _: Site, _: isize, _: usize) -> bool {
        false
    }
    fn live(
        &self,
        _: Site,
        _: Range<isize>,
        _: Range<usize>,
        _: &mut dyn FnMut(Range<usize>, Coverage),
    ) {
    }
    fn fill(&self, _: Site, _: isize, _: Range<usize>, bits: &mut [u64]) {
        bits.fill(0);
    }
    fn same_for_all_heads(&self) -> bool {
        true
    }
    fn describe(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("nothing")
    }
}
