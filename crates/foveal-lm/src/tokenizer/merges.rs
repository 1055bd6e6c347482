//! Which two tokens merge into which, and in what order.
//!
//! A merge of rank `r` joins the tokens `left`, `right` into one. Of all pairs of neighbours in a word the one of lowest
//! rank is merged first, the leftmost of equals, until none is left: with a heap of the pairs and a linked list of the
//! symbols that takes O(n log n) for n symbols. Source: Sennrich, Haddow, Birch, "Neural Machine Translation of Rare
//! Words with Subword Units" (2016); the order of equals is llama.cpp's.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::Error;
use super::vocabulary::Vocabulary;

/// Eight times the largest list known (Gemma 4's 514906).
const MAX_MERGES: usize = 1 << 22;

/// All merges of a vocabulary, by left token and then by right.
#[derive(Debug)]
pub(super) struct Merges {
    /// Where the merges with this left token begin; one more than tokens.
    starts: Vec<u32>,
    rights: Vec<u32>,
    results: Vec<Merge>,
}

#[derive(Clone, Copy, Debug)]
struct Merge {
    rank: u32,
    token: u32,
}

impl Merges {
    pub(super) fn new(lines: &[&str], vocabulary: &Vocabulary) -> Result<Merges, Error> {
        if lines.len() > MAX_MERGES {
            return Err(Error::Limit { what: "merges", found: lines.len(), limit: MAX_MERGES });
        }
        let mut all = Vec::with_capacity(lines.len());
        for (index, line) in lines.iter().enumerate() {
            let (left, right, token) = resolve(index, line, vocabulary)?;
            all.push((left, right, Merge { rank: index as u32, token }));
        }
        // Stable: of a pair that is there twice, the first counts.
        all.sort_by_key(|&(left, right, _)| (left, right));
        all.dedup_by_key(|&mut (left, right, _)| (left, right));
        let mut starts = vec![0; vocabulary.len() + 1];
        for &(left, ..) in &all {
            starts[left as usize + 1] += 1;
        }
        for token in 0..vocabulary.len() {
            starts[token + 1] += starts[token];
        }
        let rights = all.iter().map(|&(_, right, _)| right).collect();
        Ok(Merges { starts, rights, results: all.into_iter().map(|(.., merge)| merge).collect() })
    }

    fn find(&self, left: u32, right: u32) -> Option<Merge> {
        let start = *self.starts.get(left as usize)? as usize;
        let end = *self.starts.get(left as usize + 1)? as usize;
        let index = self.rights[start..end].binary_search(&right).ok()?;
        Some(self.results[start + index])
    }
}

fn resolve(index: usize, line: &str, vocabulary: &Vocabulary) -> Result<(u32, u32, u32), Error> {
    // The first piece may itself begin with a space.
    let second = line.char_indices().nth(1).map_or(line.len(), |(at, _)| at);
    let Some(space) = line[second..].find(' ').map(|at| at + second) else {
        return Err(Error::MergeForm { index, text: line.to_owned() });
    };
    let (left, right) = (&line[..space], &line[space + 1..]);
    let id = |piece: &str| {
        vocabulary.id(piece).ok_or_else(|| Error::MergeToken {
            index,
            merge: line.to_owned(),
            piece: piece.to_owned(),
        })
    };
    Ok((id(left)?, id(right)?, id(&format!("{left}{right}"))?))
}

/// The symbols of a word while they are being merged; kept between words for its memory.
#[derive(Debug, Default)]
pub(super) struct Word {
    symbols: Vec<Symbol>,
    queue: BinaryHeap<Reverse<Pair>>,
}

#[derive(Clone, Copy, Debug)]
struct Symbol {
    /// `None` once merged into the symbol before, and for what has no token, which nothing merges with.
    token: Option<u32>,
    previous: usize,
    next: usize,
}

/// Two neighbours that could merge; in the order in which they should.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Pair {
    rank: u32,
    left: usize,
    right: usize,
    tokens: [u32; 2],
    merged: u32,
}

const NONE: usize = usize::MAX;

impl Word {
    pub(super) fn clear(&mut self) {
        self.symbols.clear();
        self.queue.clear();
    }

    pub(super) fn push(&mut self, token: Option<u32>) {
        let at = self.symbols.len();
        if let Some(last) = self.symbols.last_mut() {
            last.next = at;
        }
        let previous = at.checked_sub(1).unwrap_or(NONE);
        self.symbols.push(Symbol { token, previous, next: NONE });
    }

    /// Merges all that can be merged.
    pub(super) fn merge(&mut self, merges: &Merges) {
        for right in 1..self.symbols.len() {
            self.consider(right - 1, right, merges);
        }
        while let Some(Reverse(pair)) = self.queue.pop() {
            let [left, right] = [pair.left, pair.right].map(|at| self.symbols[at]);
            if [left.token, right.token] != pair.tokens.map(Some) || left.next != pair.right {
                continue;
            }
            self.symbols[pair.left].token = Some(pair.merged);
            self.symbols[pair.left].next = right.next;
            self.symbols[pair.right].token = None;
            if right.next != NONE {
                self.symbols[right.next].previous = pair.left;
            }
            self.consider(left.previous, pair.left, merges);
            self.consider(pair.left, right.next, merges);
        }
    }

    /// The symbols that are left.
    pub(super) fn tokens(&self) -> impl Iterator<Item = u32> {
        self.symbols.iter().filter_map(|symbol| symbol.token)
    }

    fn consider(&mut self, left: usize, right: usize, merges: &Merges) {
        if left == NONE || right == NONE {
            return;
        }
        let (Some(first), Some(second)) = (self.symbols[left].token, self.symbols[right].token) else {
            return;
        };
        if let Some(Merge { rank, token }) = merges.find(first, second) {
            self.queue.push(Reverse(Pair { rank, left, right, tokens: [first, second], merged: token }));
        }
    }
}
