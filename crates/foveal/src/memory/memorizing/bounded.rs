//! The best entries of one query where codes are searched in the place of keys: none is missed.
//!
//! ```text
//! |s − s̃| ≤ ε = ‖k̂ − k̃‖ + rounding            s exact, s̃ from codes; ‖q̂‖ ≤ 1; the distance is the largest of the tile
//! least   = k-th largest of what exact scores are at least         a key whose s̃ + ε is below can't be among the k best
//! ```
//!
//! Those that are left when all keys were looked at are scored by the keys themselves. If too many are left before, as among
//! equal keys, they are scored at once, so that memory stays bounded. What is selected is what the keys themselves would
//! have selected, with one order of summation however a query came.

use super::best::{Candidate, Exact, Scored, Selection, order};
use super::search::NONE;
use crate::simd::tile::KEY_TILE;

/// A key's position, and what its score lies between.
#[derive(Debug, Clone, Copy)]
struct Between {
    low: f32,
    high: f32,
    at: u32,
    exact: bool,
}

/// Entries that may be among the best of one query.
#[derive(Debug, Default)]
pub(super) struct Bounded {
    top: usize,
    kept: Vec<Between>,
    /// What exact scores of the best are at least.
    least: f32,
    /// How many there may be before the worst are given up.
    full: usize,
}

impl Bounded {
    /// Gives up what can't be among the best.
    fn prune(&mut self, exact: &Exact<'_>) {
        if self.kept.len() >= self.top {
            let worse = |a: &Between, b: &Between| b.low.total_cmp(&a.low);
            let (_, last, _) = self.kept.select_nth_unstable_by(self.top - 1, worse);
            self.least = self.least.max(last.low);
            let least = self.least;
            self.kept.retain(|x| x.high >= least);
            if self.kept.len() > 3 * self.top + KEY_TILE {
                self.decide(exact);
            }
        }
        self.full = (self.kept.len() + self.top).max(2 * self.top);
    }

    /// Keeps the best by their exact scores, in order.
    fn decide(&mut self, exact: &Exact<'_>) {
        let score = |x: &Between| if x.exact { x.low } else { exact.score(x.at) };
        let mut scored: Vec<Candidate> = self.kept.iter().map(|x| (score(x), x.at)).collect();
        scored.sort_unstable_by(order);
        scored.truncate(self.top);
        self.kept.clear();
        let known = |&(score, at)| Between { low: score, high: score, at, exact: true };
        self.kept.extend(scored.iter().map(known));
        if let Some(last) = scored.get(self.top - 1) {
            self.least = self.least.max(last.0);
        }
    }
}

impl Selection for Bounded {
    fn reset(&mut self, top: usize) {
        self.kept.clear();
        (self.top, self.full, self.least) = (top, 2 * top, f32::NEG_INFINITY);
    }

    fn take(&mut self, scored: &Scored<'_>, exact: &Exact<'_>) {
        let (slack, least) = (scored.slack, self.least - scored.slack);
        if scored.max > least {
            let kept = &mut self.kept;
            scored.each_above(exact.level, least, |score, at| {
                kept.push(Between { low: score - slack, high: score + slack, at, exact: false });
            });
            if self.kept.len() >= self.full {
                self.prune(exact);
            }
        }
    }

    fn finish(&mut self, exact: &Exact<'_>, to: &mut [u32]) {
        self.prune(exact);
        self.decide(exact);
        to.fill(NONE);
        for (to, kept) in to.iter_mut().zip(&self.kept) {
            *to = kept.at;
        }
    }
}
