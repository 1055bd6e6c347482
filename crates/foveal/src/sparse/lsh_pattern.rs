//! Sorted tokens of [`Reformer`](super::Reformer), in chunks: who sees whom.

use super::lsh::Buckets;
use crate::mask::{Coverage, Pattern, Site, set_bits};
use std::ops::Range;

/// A token in its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) token: u32,
    /// Its bucket and round, as one number.
    pub(super) bucket: u64,
}

impl Entry {
    /// Whether it is a later token of the same bucket.
    pub(super) fn follows(self, other: Entry) -> bool {
        self.bucket == other.bucket && self.token > other.token
    }
}

/// The tokens of one head, sorted for each round.
pub(super) struct Sorted {
    pub(super) rounds: Vec<Vec<Entry>>,
    chunk: usize,
}

impl Sorted {
    pub(super) fn new(buckets: &Buckets, (batch, head): (usize, usize), chunk: usize) -> Sorted {
        let round = |round: usize| {
            let own = buckets.of(batch, head, round).iter().zip(0u64..);
            let mut keys: Vec<u64> =
                own.map(|(&bucket, token)| u64::from(bucket) << 32 | token).collect();
            keys.sort_unstable();
            let entry =
                |key: u64| Entry { token: key as u32, bucket: (round as u64) << 32 | key >> 32 };
            keys.into_iter().map(entry).collect()
        };
        Sorted { rounds: (0..buckets.rounds()).map(round).collect(), chunk }
    }

    /// The round whose last chunk the first chunk of a round sees.
    pub(super) fn before(&self, round: usize) -> usize {
        (round + self.rounds.len() - 1) % self.rounds.len()
    }

    pub(super) fn last_chunk(&self, round: usize) -> &[Entry] {
        let own = &self.rounds[round];
        &own[own.len().saturating_sub(1) / self.chunk * self.chunk..]
    }

    /// Each token's place in each round.
    pub(super) fn places(&self) -> Vec<Vec<usize>> {
        let round = |own: &Vec<Entry>| {
            let mut places = vec![0; own.len()];
            own.iter().enumerate().for_each(|(place, entry)| places[entry.token as usize] = place);
            places
        };
        self.rounds.iter().map(round).collect()
    }

    /// Each token's place in its bucket, in each round.
    pub(super) fn ranks(&self) -> Vec<Vec<usize>> {
        let round = |own: &Vec<Entry>| {
            let mut ranks = vec![0; own.len()];
            for bucket in own.chunk_by(|a, b| a.bucket == b.bucket) {
                let places = bucket.iter().enumerate();
                places.for_each(|(rank, entry)| ranks[entry.token as usize] = rank);
            }
            ranks
        };
        self.rounds.iter().map(round).collect()
    }

    /// How often each token sees itself.
    pub(super) fn self_counts(&self, strict: bool) -> Vec<usize> {
        let mut counts = vec![self.rounds.len(); self.rounds[0].len()];
        for (round, own) in self.rounds.iter().enumerate() {
            let before = self.last_chunk(self.before(round));
            for entry in own.iter().take(self.chunk) {
                let same = |other: &&Entry| {
                    other.token == entry.token && (!strict || other.bucket == entry.bucket)
                };
                counts[entry.token as usize] += before.iter().filter(same).count();
            }
        }
        counts
    }
}

/// Sorted rows in chunks, each of which sees itself and what lies before it; but no row sees its own token.
#[derive(Debug)]
pub(super) struct Chunks {
    /// The keys; rows are those behind the first `before`.
    pub(super) entries: Vec<Entry>,
    /// Where runs of ascending tokens of one bucket begin.
    pub(super) runs: Vec<usize>,
    pub(super) before: usize,
    pub(super) chunk: usize,
    pub(super) causal: bool,
    pub(super) strict: bool,
}

impl Chunks {
    /// The keys of the chunks that a position sees.
    fn visible(&self, i: isize) -> Range<usize> {
        // A row's position is that of its own entry.
        let entry = usize::try_from(i).ok().filter(|&i| i < self.entries.len());
        let Some(row) = entry.and_then(|i| i.checked_sub(self.before)) else { return 0..0 };
        let own = self.before + row / self.chunk * self.chunk;
        let start = if row < self.chunk { 0 } else { own - self.chunk };
        start..own.saturating_add(self.chunk).min(self.entries.len())
    }

    fn shows(&self, row: Entry, key: Entry) -> bool {
        let other = if self.causal { key.token < row.token } else { key.token != row.token };
        other && (!self.strict || key.bucket == row.bucket)
    }
}

impl Pattern for Chunks {
    fn allows(&self, _: Site, i: isize, j: usize) -> bool {
        self.visible(i).contains(&j) && self.shows(self.entries[i as usize], self.entries[j])
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
        let (first, last) = (self.visible(rows.start), self.visible(rows.end - 1));
        let live = first.start.max(keys.start)..last.end.min(keys.end);
        if !live.is_empty() {
            visit(live, Coverage::Partial);
        }
    }

    fn fill(&self, _: Site, i: isize, keys: Range<usize>, bits: &mut [u64]) {
        bits.fill(0);
        let visible = self.visible(i);
        let seen = visible.start.max(keys.start)..visible.end.min(keys.end);
        if seen.is_empty() {
            return;
        }
        let row = self.entries[i as usize];
        let first = self.runs.partition_point(|&start| start <= seen.start) - 1;
        let runs = &self.runs[first..self.runs.partition_point(|&start| start < seen.end)];
        let ends = runs[1..].iter().copied().chain([seen.end]);
        for (&start, end) in runs.iter().zip(ends) {
            let run = start.max(seen.start)..end;
            if self.strict && self.entries[run.start].bucket != row.bucket {
                continue;
            }
            let before = |end: u32| {
                run.start + self.entries[run.clone()].partition_point(|key| key.token < end)
            };
            let own = before(row.token);
            set_bits(bits, run.start - keys.start, own - keys.start);
            if !self.causal {
                set_bits(bits, before(row.token + 1) - keys.start, run.end - keys.start);
            }
        }
    }

    fn same_for_all_heads(&self) -> bool {
        true
    }

    fn describe(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "sorted chunks of {}", self.chunk)
    }
}

/// The pairs of all rounds as they are defined.
#[derive(Debug)]
pub(super) struct Definition {
    pub(super) buckets: Buckets,
    pub(super) cuts: Cuts,
    /// Each token's place in its round, or where buckets are cut by themselves, in its bucket: `[batch · heads][round][token]`.
    pub(super) places: Vec<Vec<Vec<usize>>>,
}

/// How sorted tokens are cut into chunks, and what chunks hide.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Cuts {
    pub(super) chunk: usize,
    pub(super) causal: bool,
    pub(super) strict: bool,
    /// Each bucket by itself.
    pub(super) apart: bool,
}

impl Pattern for Definition {
    fn allows(&self, at: Site, i: isize, j: usize) -> bool {
        let [batch, heads] = self.buckets.choosers();
        let tokens = self.buckets.tokens();
        let Some(i) = usize::try_from(i).ok().filter(|&i| i < tokens && j < tokens) else {
            return false;
        };
        let Cuts { chunk: size, causal, strict, apart } = self.cuts;
        if at.batch >= batch || at.q_head >= heads || causal && j > i {
            return false;
        }
        let rounds = &self.places[at.batch * heads + at.q_head];
        let last = (tokens - 1) / size;
        (0..rounds.len()).any(|round| {
            let before = (round + rounds.len() - 1) % rounds.len();
            let buckets = |round| self.buckets.of(at.batch, at.q_head, round);
            let same = |other| round == other && buckets(round)[i] == buckets(other)[j];
            let shown = |other| !(strict || apart) || same(other);
            let chunk = |round: usize, token: usize| rounds[round][token] / size;
            let (own, key) = (chunk(round, i), chunk(round, j));
            let wraps = !apart && own == 0 && chunk(before, j) == last && shown(before);
            (key == own || key + 1 == own) && shown(round) || wraps
        })
    }
}
