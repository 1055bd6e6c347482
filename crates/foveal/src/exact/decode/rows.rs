//! Which query rows go through a span of positions together.
//!
//! ```text
//! span held in the same pages by sequences 0, 3 and 4:     rows of 0, then of 3, then of 4, by 48       taken by 0
//! ```
//!
//! Who takes what is found once, before threads pick up parts, so that each row has one taker whatever stores answer
//! later. Work is cut at the same positions as without sharing, and joined in the same order (cascade
//! inference: Ye et al. 2024, FlashInfer).

use super::SPAN;
use crate::element::Element;
use crate::exact::terms::RowSite;
use crate::exact::{Problem, sees};
use crate::mask::{Mask, Pattern, Site};
use crate::plan::Sizes;
use crate::simd::tile::KeyWords;
use std::ops::Range;

/// The sequence that takes each span of each sequence: itself, or an earlier one that holds the same memory.
#[derive(Debug, Clone, Copy)]
pub(super) struct Takers<'a> {
    /// `[batch][span]`, as the bits of floats, which a workspace consists of; empty where all take their own.
    table: &'a [f32],
    spans: usize,
}

impl<'a> Takers<'a> {
    /// Asks the stores. `table` has a float for each sequence and span, or more.
    pub(super) fn find<E: Element, K: Element>(
        problem: &Problem<'_, E, K>,
        spans: usize,
        table: &'a mut [f32],
    ) -> Takers<'a> {
        if !problem.kv.may_share() {
            return Takers { table: &[], spans };
        }
        for batch in 0..problem.sizes.q.batch {
            for span in 0..spans {
                let earlier = Takers { table: &table[..batch * spans], spans };
                let same = |&other: &usize| {
                    let positions = span_of(&problem.held(other), span);
                    earlier.of(other, span) == other
                        && problem.kv.share((other, batch), &positions, SPAN)
                };
                let taker = (0..batch).find(same).unwrap_or(batch);
                table[batch * spans + span] = f32::from_bits(taker as u32);
            }
        }
        Takers { table, spans }
    }

    /// Whether some sequences may take others' spans.
    pub(super) fn sharing(&self) -> bool {
        !self.table.is_empty()
    }

    fn of(&self, batch: usize, span: usize) -> usize {
        match self.sharing() {
            true => self.table[batch * self.spans + span].to_bits() as usize,
            false => batch,
        }
    }

    /// The rows that a sequence takes through a span: its own and those of later ones, or none.
    pub(super) fn rows<E: Element, K: Element>(
        &self,
        problem: &Problem<'_, E, K>,
        (taker, span): (usize, usize),
    ) -> impl Iterator<Item = Seat> {
        let Sizes { q, .. } = problem.sizes;
        let rows = q.seq * problem.sizes.group();
        let last = if self.sharing() { q.batch } else { taker + 1 };
        let members = (taker..last).filter(move |&batch| self.of(batch, span) == taker);
        members.flat_map(move |batch| {
            let origin = problem.held(batch).end as isize - q.seq as isize;
            (0..rows).map(move |row| Seat { batch, row, origin })
        })
    }
}

impl<E: Element, K: Element> Problem<'_, E, K> {
    /// The positions that a sequence holds.
    pub(super) fn held(&self, batch: usize) -> Range<usize> {
        self.kv.start(batch)..self.kv.end(batch)
    }
}

/// The positions of a span among those held.
pub(super) fn span_of(keys: &Range<usize>, span: usize) -> Range<usize> {
    let start = (keys.start / SPAN + span) * SPAN;
    let end = (start + SPAN).min(keys.end);
    start.max(keys.start).min(end)..end
}

/// A query row of a pass: row = position × group + head, of a sequence whose query 0 sits at `origin`.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Seat {
    pub(super) batch: usize,
    pub(super) row: usize,
    pub(super) origin: isize,
}

/// Query rows that read the same keys of one key/value head: of one sequence, or of several that share them.
#[derive(Debug, Clone, Copy)]
pub(super) struct Span<'a> {
    pub(super) kv_head: usize,
    pub(super) group: usize,
    pub(super) seats: &'a [Seat],
}

impl<'a> Span<'a> {
    pub(super) fn new(sizes: &Sizes, unit: usize, seats: &'a [Seat]) -> Span<'a> {
        Span { kv_head: unit % sizes.kv_heads, group: sizes.group(), seats }
    }

    /// The sequence whose memory is read.
    pub(super) fn batch(&self) -> usize {
        self.seats[0].batch
    }

    /// A row's number among the call's queries, and its head.
    pub(super) fn query(&self, seat: Seat) -> (usize, usize) {
        (seat.row / self.group, self.kv_head * self.group + seat.row % self.group)
    }

    fn position(&self, seat: Seat) -> isize {
        (seat.row / self.group) as isize + seat.origin
    }

    fn site(&self, seat: Seat) -> Site {
        Site { batch: seat.batch, q_head: self.query(seat).1, kv_head: self.kv_head }
    }

    pub(super) fn row_site(&self, seat: Seat) -> RowSite {
        let (query, head) = self.query(seat);
        RowSite { batch: seat.batch, head, query, position: self.position(seat) }
    }

    /// Whether some row may see some of the positions.
    pub(super) fn sees(&self, mask: &Mask, same_heads: bool, tile: &Range<usize>) -> bool {
        self.seats.chunk_by(|a, b| a.batch == b.batch).any(|seats| {
            let (first, last) = (seats[0], seats[seats.len() - 1]);
            let rows = self.position(first)..self.position(last) + 1;
            // Heads that see different keys: a tile counts if one of them sees some of it.
            let heads = if same_heads { 1 } else { self.group.min(seats.len()) };
            seats[..heads]
                .iter()
                .any(|&seat| sees(mask, (self.site(seat), rows.clone()), tile.clone()))
        })
    }

    /// One bit for each (row, key) that the mask allows.
    pub(super) fn fill(&self, mask: &Mask, positions: &Range<usize>, words: &mut [KeyWords]) {
        let used = positions.len().div_ceil(64);
        for (bits, &seat) in words.iter_mut().zip(self.seats) {
            mask.fill(self.site(seat), self.position(seat), positions.clone(), &mut bits[..used]);
        }
    }
}
