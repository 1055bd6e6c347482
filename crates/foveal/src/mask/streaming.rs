//! The first tokens and the newest ones: a window with attention sinks.
//!
//! ```text
//! allows(i, j)  =  j ≤ i  and  (j < s or j > i − w)
//! ```
//!
//! `live` costs at most six ranges however long the sequence is, `fill` a few words: less than the same
//! mask put together by `and` and `or`. Keys stay at their positions; StreamingLLM (Xiao et al. 2024,
//! §3.2) also gives them new ones.

use super::{Coverage, Pattern, Site, add_range, fill_range, live_between};
use std::ops::Range;

/// The first `sinks` tokens and the `width` newest ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Streaming {
    pub(super) sinks: usize,
    pub(super) width: usize,
}

impl Streaming {
    /// Of the first tokens, those that one query position sees.
    fn first(&self, i: isize) -> Range<usize> {
        0..self.newest(i).end.min(self.sinks)
    }

    /// The window of one query position.
    fn newest(&self, i: isize) -> Range<usize> {
        let end = i.saturating_add(1).max(0) as usize;
        end.saturating_sub(self.width)..end
    }
}

impl Pattern for Streaming {
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
        let split = self.sinks.clamp(keys.start, keys.end);
        live_between(self.first(a), self.first(b), keys.start..split, visit);
        if self.width > 0 {
            live_between(self.newest(a), self.newest(b), split..keys.end, visit);
        }
    }

    fn fill(&self, _: Site, i: isize, keys: Range<usize>, bits: &mut [u64]) {
        fill_range(self.newest(i), keys.clone(), bits);
        add_range(self.first(i), keys, bits);
    }

    fn same_for_all_heads(&self) -> bool {
        true
    }

    fn describe(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "first {} and window {}", self.sinks, self.width)
    }
}
