//! Documents packed into one sequence, which do not see each other ("varlen").
//!
//! ```text
//! allows(i, j)  =  document(i) = document(j)  and  j's place ≤ i's place + ahead …
//! ```
//!
//! Queries and keys may be cut at different places (`cu_seqlens_q`, `cu_seqlens_k` of FlashAttention):
//! query row r of the packed queries belongs to the document in whose query span it lies, and its
//! place within the document is aligned bottom-right with the document's keys.

use super::{Band, Coverage, Extent, Pattern, Site, fill_range, live_between};
use crate::error::{Error, Result};
use std::ops::Range;

/// Packed documents, each with its own band (by default everything within the document).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Documents {
    queries: Vec<usize>,
    keys: Vec<usize>,
    within: Band,
}

impl Documents {
    /// Documents by cumulative lengths: `query_starts[d]..query_starts[d + 1]` are document `d`'s
    /// rows among the packed queries, and likewise its keys. Allocates two vectors.
    ///
    /// # Errors
    /// [`Error::InvalidParameter`] unless both begin with 0, do not fall, and have the same length.
    pub fn new(query_starts: &[usize], key_starts: &[usize]) -> Result<Documents> {
        let rising = |starts: &[usize]| {
            starts.first() == Some(&0) && starts.windows(2).all(|pair| pair[0] <= pair[1])
        };
        if !rising(query_starts) || !rising(key_starts) || query_starts.len() != key_starts.len() {
            return Err(Error::InvalidParameter {
                what: "document starts",
                expected: "cumulative lengths that begin with 0, as many for queries as for keys",
                got: format!("{query_starts:?} and {key_starts:?}"),
            });
        }
        let within = Band { behind: None, ahead: None };
        Ok(Documents { queries: query_starts.to_vec(), keys: key_starts.to_vec(), within })
    }

    /// Restricts what a row sees within its document, by places aligned bottom-right in it.
    pub fn within(self, within: Band) -> Documents {
        Documents { within, ..self }
    }

    /// How many documents there are.
    pub fn count(&self) -> usize {
        self.queries.len() - 1
    }

    /// Row `r` of the packed queries, from its absolute position `r + S − T`.
    fn row(&self, i: isize) -> Option<usize> {
        let (rows, keys) = (self.queries[self.count()], self.keys[self.count()]);
        usize::try_from(i + rows as isize - keys as isize).ok().filter(|&r| r < rows)
    }

    /// The keys that one query position sees.
    fn visible(&self, i: isize) -> Range<usize> {
        let Some(r) = self.row(i) else { return 0..0 };
        let d = self.queries.partition_point(|&start| start <= r) - 1;
        let keys = self.keys[d]..self.keys[d + 1];
        // From the document's end both count backwards alike.
        let before_end = (self.queries[d + 1] - 1 - r) as isize;
        let place = keys.len() as isize - 1 - before_end;
        let bound = |x: isize| x.clamp(0, keys.len() as isize) as usize;
        let start =
            self.within.behind.map_or(0, |behind| bound(place.saturating_sub_unsigned(behind)));
        let end = self.within.ahead.map_or(keys.len(), |ahead| {
            bound(place.saturating_add_unsigned(ahead).saturating_add(1))
        });
        keys.start + start.min(end)..keys.start + end
    }
}

impl Pattern for Documents {
    fn allows(&self, _: Site, i: isize, j: usize) -> bool {
        self.visible(i).contains(&j)
    }

    fn live(
        &self,
        _: Site,
        rows: Range<isize>,
        keys: Range<usize>,
        visit: &mut dyn FnMut(Range<usize>, Coverage),
    ) {
        // Bounds rise from row to row, except that rows which see nothing say 0..0 or a place of
        // their own; those only make the answer partial.
        let mut row = rows.start;
        let mut done = keys.start;
        while row < rows.end {
            let Some(r) = self.row(row) else {
                row += 1;
                continue;
            };
            let d = self.queries.partition_point(|&start| start <= r) - 1;
            let last = (row + (self.queries[d + 1] - 1 - r) as isize).min(rows.end - 1);
            let whole = row == rows.start && last == rows.end - 1;
            let span = done.max(keys.start)..keys.end;
            let (first, end) = (self.visible(row), self.visible(last));
            live_between(first, end, span, &mut |range, coverage| {
                done = range.end;
                visit(range, if whole { coverage } else { Coverage::Partial });
            });
            row = last + 1;
        }
    }

    fn fill(&self, _: Site, i: isize, keys: Range<usize>, bits: &mut [u64]) {
        fill_range(self.visible(i), keys, bits);
    }

    fn same_for_all_heads(&self) -> bool {
        true
    }

    fn check(&self, extent: Extent) -> Result<()> {
        let (queries, keys) = (self.queries[self.count()], self.keys[self.count()]);
        if (queries, keys) == (extent.queries, extent.keys) {
            return Ok(());
        }
        Err(Error::MaskShape {
            what: "a documents mask",
            expected: format!("{queries} queries and {keys} keys"),
            got: format!("{} queries and {} keys", extent.queries, extent.keys),
        })
    }
}
