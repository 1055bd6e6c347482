//! From bits to ranges: sets of keys as words of 64 blocks, and the live ranges that they make.

use super::Coverage;
use std::ops::Range;

/// A row of blocks: bit `b` stands for the keys `start + b · size ..` of its block.
#[derive(Debug, Clone, Copy)]
pub(super) struct Blocked {
    /// The first block's first key.
    pub(super) start: usize,
    /// Keys of a block.
    pub(super) size: usize,
    /// Blocks.
    pub(super) count: usize,
}

impl Blocked {
    /// The keys of blocks `first..end`, as far as they lie in `keys`.
    fn clip(&self, first: usize, end: usize, keys: &Range<usize>) -> Range<usize> {
        let key = |block: usize| self.start.saturating_add(block.saturating_mul(self.size));
        key(first).max(keys.start)..key(end).min(keys.end)
    }

    /// The blocks that hold some of the keys.
    fn blocks(&self, keys: &Range<usize>) -> Range<usize> {
        let first = keys.start.saturating_sub(self.start) / self.size;
        let end = keys.end.saturating_sub(self.start).div_ceil(self.size).min(self.count);
        if keys.is_empty() || end <= first { 0..0 } else { first..end }
    }

    /// Visits the keys of set blocks. `words(w)` says which of the blocks `64 w ..` some row sees, and
    /// which of these all rows see. Costs a word for each 64 blocks and a step for each run of blocks.
    pub(super) fn live(
        &self,
        keys: Range<usize>,
        words: impl Fn(usize) -> (u64, u64),
        visit: &mut dyn FnMut(Range<usize>, Coverage),
    ) {
        let blocks = self.blocks(&keys);
        let mut open: Option<(Range<usize>, Coverage)> = None;
        for w in blocks.start / 64..blocks.end.div_ceil(64) {
            let (any, all) = words(w);
            let mut left = any & ones(blocks.start.max(w * 64) - w * 64, blocks.end - w * 64);
            while left != 0 {
                let first = left.trailing_zeros() as usize;
                let full = all >> first & 1 == 1;
                let same = if full { left & all } else { left & !all };
                let end = first + (!(same >> first)).trailing_zeros() as usize;
                left &= !ones(first, end);
                let range = self.clip(w * 64 + first, w * 64 + end, &keys);
                let coverage = if full { Coverage::Full } else { Coverage::Partial };
                match &mut open {
                    Some((last, c)) if last.end == range.start && *c == coverage => {
                        last.end = range.end;
                    }
                    _ => {
                        if let Some((last, c)) = open.replace((range, coverage)) {
                            visit(last, c);
                        }
                    }
                }
            }
        }
        if let Some((last, c)) = open {
            visit(last, c);
        }
    }

    /// Sets the bits of those `keys` whose block's bit is set in `words`, and leaves the others alone.
    pub(super) fn fill(&self, words: &[u64], keys: Range<usize>, bits: &mut [u64]) {
        let words = |w: usize| (words[w], words[w]);
        self.live(keys.clone(), words, &mut |range, _| {
            set_bits(bits, range.start - keys.start, range.end - keys.start);
        });
    }
}

/// The bits `first..end` of a word; `end` may lie beyond it.
fn ones(first: usize, end: usize) -> u64 {
    let below = |n: usize| if n < 64 { (1 << n) - 1 } else { u64::MAX };
    below(end) & !below(first)
}

/// Sets the bits of `first..end` (relative to the words' beginning) and leaves the others alone.
pub(crate) fn set_bits(bits: &mut [u64], first: usize, end: usize) {
    let used = bits.len().min(end.div_ceil(64));
    for (w, word) in bits.iter_mut().enumerate().take(used).skip(first / 64) {
        *word |= ones(first.max(w * 64) - w * 64, end - w * 64);
    }
}

/// Sets the bits of the keys that lie in `row`, and clears all others.
pub(crate) fn fill_range(row: Range<usize>, keys: Range<usize>, bits: &mut [u64]) {
    bits.fill(0);
    add_range(row, keys, bits);
}

/// Sets the bits of the keys that lie in `row`, and leaves the others alone.
pub(crate) fn add_range(row: Range<usize>, keys: Range<usize>, bits: &mut [u64]) {
    let (start, end) = (row.start.max(keys.start), row.end.min(keys.end));
    if start < end {
        set_bits(bits, start - keys.start, end - keys.start);
    }
}

/// Visits the keys between two rows' ranges, whose bounds rise from row to row: what both see is
/// full, what only some may see is partial.
pub(crate) fn live_between(
    first: Range<usize>,
    last: Range<usize>,
    keys: Range<usize>,
    visit: &mut dyn FnMut(Range<usize>, Coverage),
) {
    let clip = |x: usize| x.clamp(keys.start, keys.end);
    let (start, end) = (clip(first.start), clip(last.end));
    let (full_start, full_end) = (clip(last.start), clip(first.end));
    let mut emit = |range: Range<usize>, coverage| {
        if range.start < range.end {
            visit(range, coverage);
        }
    };
    if full_start < full_end {
        emit(start..full_start, Coverage::Partial);
        emit(full_start..full_end, Coverage::Full);
        emit(full_end..end, Coverage::Partial);
    } else {
        emit(start..end, Coverage::Partial);
    }
}
