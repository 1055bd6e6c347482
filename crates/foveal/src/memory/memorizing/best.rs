//! The best entries of one query among those whose scores are exact.
//!
//! ```text
//! candidates: scores above the k-th best so far; whenever there are 2 k of them, the k best stay
//! ```
//!
//! Larger scores come first, and earlier positions among equals. NaN and −∞ are never above anything.

use super::super::MemoryStore;
use super::search::NONE;
use crate::cache::with_rows;
use crate::simd::Level;
use crate::simd::row::dot;
use crate::simd::select::above;
use crate::simd::tile::{KEY_TILE, KeyWords, PANEL, Steps};

/// A key's score and position.
pub(super) type Candidate = (f32, u32);

/// Larger scores first, and earlier positions among equals. No score is NaN.
pub(super) fn order(a: &Candidate, b: &Candidate) -> std::cmp::Ordering {
    b.0.partial_cmp(&a.0).unwrap_or(std::cmp::Ordering::Equal).then(a.1.cmp(&b.1))
}

/// The scores of a query with a tile of keys.
#[derive(Clone, Copy)]
pub(super) struct Scored<'a> {
    pub(super) scores: &'a [f32],
    /// The largest of them.
    pub(super) max: f32,
    /// Those that were computed.
    pub(super) steps: Steps,
    /// The position of the first key.
    pub(super) first: usize,
    /// How far each may lie from the score that decides.
    pub(super) slack: f32,
}

impl Scored<'_> {
    /// Those above a number, with their positions.
    pub(super) fn each_above(&self, level: Level, least: f32, mut give: impl FnMut(f32, u32)) {
        each(&above(level, self.scores, least, self.steps), |j| {
            give(self.scores[j], (self.first + j) as u32);
        });
    }
}

fn each(words: &KeyWords, mut give: impl FnMut(usize)) {
    for (panel, &word) in words.iter().enumerate() {
        let mut left = word;
        while left != 0 {
            give(panel * PANEL + left.trailing_zeros() as usize);
            left &= left - 1;
        }
    }
}

/// What scores decide between keys: the products of a query with the keys themselves.
#[derive(Clone, Copy)]
pub(super) struct Exact<'a> {
    pub(super) level: Level,
    pub(super) store: &'a dyn MemoryStore,
    pub(super) kv_head: usize,
    pub(super) query: &'a [f32],
}

impl Exact<'_> {
    pub(super) fn score(&self, position: u32) -> f32 {
        let at = position as usize;
        let tile = self.store.exact().tile(self.kv_head, at..at + 1);
        let Some(keys) = tile.keys.rows() else {
            unreachable!("a memory's store was checked to have rows of keys")
        };
        with_rows!(keys, keys => dot_with(self.level, self.query, keys.row(0)))
    }
}

fn dot_with<E: crate::element::Element>(level: Level, query: &[f32], key: &[E]) -> f32 {
    let mut row = [0.0f32; 512];
    let mut sum = 0.0;
    for (query, key) in query.chunks(row.len()).zip(key.chunks(row.len())) {
        let row = &mut row[..key.len()];
        crate::simd::row::widen(level, key, row);
        sum += dot::<f32>(level, query, row);
    }
    sum
}

/// How a query's best entries are found.
pub(super) trait Selection: Default + Send {
    /// Forgets everything; there are to be so many.
    fn reset(&mut self, top: usize);
    /// Looks at the keys of the next tile.
    fn take(&mut self, scored: &Scored<'_>, exact: &Exact<'_>);
    /// The positions of the best, best first; [`NONE`] where there are fewer.
    fn finish(&mut self, exact: &Exact<'_>, to: &mut [u32]);
}

/// The best entries of one query so far, and candidates.
#[derive(Debug, Default)]
pub(super) struct Best {
    top: usize,
    candidates: Vec<Candidate>,
    /// What a score has to exceed.
    least: f32,
}

impl Best {
    fn prune(&mut self) {
        if self.candidates.len() >= self.top {
            let (_, last, _) = self.candidates.select_nth_unstable_by(self.top - 1, order);
            self.least = last.0;
            self.candidates.truncate(self.top);
        }
    }

    /// Looks at keys that lie anywhere: an equal may come later and lie earlier.
    pub(super) fn take_listed(&mut self, level: Level, scored: &Scored<'_>, positions: &[u32]) {
        let least = self.least.next_down();
        if scored.max > least {
            let candidates = &mut self.candidates;
            scored.each_above(level, least, |score, j| {
                candidates.push((score, positions[j as usize]));
            });
            if self.candidates.len() >= 2 * self.top {
                self.prune();
            }
        }
    }

    fn write(&mut self, to: &mut [u32]) {
        self.prune();
        self.candidates.sort_unstable_by(order);
        to.fill(NONE);
        for (to, candidate) in to.iter_mut().zip(&self.candidates) {
            *to = candidate.1;
        }
    }
}

impl Selection for Best {
    fn reset(&mut self, top: usize) {
        self.top = top;
        self.candidates.clear();
        self.candidates.reserve(2 * top + KEY_TILE);
        self.least = f32::NEG_INFINITY;
    }

    fn take(&mut self, scored: &Scored<'_>, exact: &Exact<'_>) {
        if scored.max > self.least {
            let candidates = &mut self.candidates;
            scored.each_above(exact.level, self.least, |score, at| candidates.push((score, at)));
            if self.candidates.len() >= 2 * self.top {
                self.prune();
            }
        }
    }

    fn finish(&mut self, _: &Exact<'_>, to: &mut [u32]) {
        self.write(to);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_are_kept_in_order_and_the_earlier_among_equals() {
        let scores: Vec<f32> = (0..KEY_TILE).map(|j| ((j * 37) % 64) as f32).collect();
        let mut expected: Vec<Candidate> =
            (0..3 * KEY_TILE).map(|at| (scores[at % KEY_TILE], at as u32)).collect();
        expected.sort_by(order);
        for top in [1, 2, 5, 31, 200, 700, 1000] {
            let mut best = Best::default();
            best.reset(top);
            for tile in 0..3 {
                let mut words = KeyWords::default();
                for (j, &score) in scores.iter().enumerate() {
                    words[j / PANEL] |= u64::from(score > best.least) << (j % PANEL);
                }
                let first = tile * KEY_TILE;
                each(&words, |j| best.candidates.push((scores[j], (first + j) as u32)));
                if best.candidates.len() >= 2 * top {
                    best.prune();
                }
            }
            let mut got = vec![0; top];
            best.write(&mut got);
            let held = top.min(expected.len());
            assert!(got[..held].iter().zip(&expected).all(|(got, (_, at))| got == at), "{top}");
            assert!(got[held..].iter().all(|&at| at == NONE));
        }
    }
}
