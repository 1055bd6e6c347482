//! Attention for generated tokens: single query rows over keys as they lie, split over the sequence.
//!
//! ```text
//! for each (sequence, key/value head, span of 512 positions):       a part
//!     for each key tile of the span:   S = Q Kᵀ     m, l, α     O ← α O + P V
//!     keep (m, l, O)
//! for each row: join its spans in order, out = O / l, lse = m + ln l
//! ```
//!
//! Keys and values are read once for all query heads of a group and all query rows of the call
//! (flash-decoding, Dao et al. 2023), and where sequences hold a span in the same memory, once for the rows of all of
//! them. Where many heads share a key, each tile is packed for the kernels of prompts.
//! Queries and keys of bf16 are multiplied in pairs where the processor can and heads share keys. Spans start at fixed positions and are joined in order, so a row's
//! bits do not depend on threads, on the batch, or on how many rows share the call.

mod rows;

use super::relative::Lines;
use super::state::Join;
use super::terms::{Finish, Terms};
use super::{Factor, Problem, seen};
use crate::cache::{KvKeys, KvRows, KvValues, kv_rows, with_rows};
use crate::element::Element;
use crate::parallel::for_each_part;
use crate::plan::Sizes;
use crate::simd::coded::{ChannelScores, TokenValues, channel_scores, token_values, with_code};
use crate::simd::decode::{RowScores, RowValues, row_score_pairs, row_scores, row_values};
use crate::simd::decode_pairs::row_value_pairs;
use crate::simd::product::Form;
use crate::simd::tile::{
    self, GROUP, KEY_TILE, KeyWords, STEP, Scores, Softmax, Values, Visible, padded, softmax,
};
use crate::simd::{pairs, row};
use crate::tensor::{Rows, Shape, TensorMut};
use rows::{Seat, Span, Takers, span_of};
use std::ops::Range;

/// Positions of one part.
const SPAN: usize = 2 * KEY_TILE;
/// Query rows (positions × heads of a group) that share one pass over the keys.
const ROWS: usize = 48;
/// From so many query heads of a key/value head on, packing a tile pays: its keys are then multiplied often enough.
const PACKED_GROUP: usize = 12;
/// Floats after a partial accumulator: its maximum, its sum, and room to the next cache line.
const TAIL: usize = 16;

/// Operations below which one thread is faster than two, where a byte counts as two: about 30 µs, as long as it may take to
/// wake another (measured: `decode/s64` to `decode/s1024` of the benchmark).
const WAKE: usize = 3 << 20;

/// How a call is cut into parts and its workspace into pieces.
#[derive(Debug, Clone, Copy)]
struct Layout {
    units: usize,
    /// Query rows of a (sequence, key/value head).
    rows: usize,
    /// Passes of up to [`ROWS`] rows.
    passes: usize,
    spans: usize,
    /// Floats of a row's partial result: accumulator, maximum, sum.
    partial: usize,
    /// Floats of one thread.
    scratch: usize,
    /// Whether so many heads share a key that tiles are packed for the kernels of prompts.
    packed: bool,
}

impl Layout {
    fn new(sizes: &Sizes) -> Layout {
        let rows = sizes.q.seq * sizes.group();
        let width = padded(sizes.value_dim);
        // Queries; accumulators and their tile's sums; scores; lanes, maximum, tile maximum, rescale.
        let row = padded(sizes.q.dim) + 2 * width + KEY_TILE + 16 + 3;
        let packed = sizes.group() >= PACKED_GROUP;
        let tile = if packed { KEY_TILE * (sizes.q.dim + sizes.value_dim) } else { 0 };
        let lines = if sizes.by_distance { Lines::floats(ROWS, sizes.q.dim) } else { 0 };
        Layout {
            units: sizes.q.batch * sizes.kv_heads,
            rows,
            passes: rows.div_ceil(ROWS),
            spans: sizes.keys.div_ceil(SPAN) + 1,
            partial: width + TAIL,
            scratch: ROWS * row + lines + tile,
            packed,
        }
    }

    /// Threads that the call is worth.
    fn threads(&self, sizes: &Sizes) -> usize {
        let pair = 2 * (sizes.q.dim + sizes.value_dim);
        // Two operations a pair and number for each row, and four bytes a number once.
        let each = self.rows.max(4).saturating_mul(sizes.keys).saturating_mul(pair);
        if self.units.saturating_mul(each) < WAKE { 1 } else { sizes.cpu.threads.count() }
    }

    fn partials(&self) -> usize {
        self.units * self.spans * self.rows * self.partial
    }

    /// Whole cache lines, so that what follows begins with one.
    fn takers(&self, sizes: &Sizes) -> usize {
        (sizes.q.batch * self.spans).next_multiple_of(TAIL)
    }
}

pub(crate) fn workspace_floats(sizes: &Sizes) -> usize {
    let layout = Layout::new(sizes);
    layout.partials() + layout.takers(sizes) + sizes.cpu.threads.count() * layout.scratch
}

/// Independent parts of the whole call.
pub(crate) fn parts(sizes: &Sizes) -> usize {
    let layout = Layout::new(sizes);
    layout.units * layout.passes * (layout.spans - 1)
}

/// Runs the call. `floats` is the workspace, of [`workspace_floats`].
pub(crate) fn run<E: Element, K: Element>(problem: &Problem<'_, E, K>, floats: &mut [f32]) {
    let layout = Layout::new(&problem.sizes);
    let (partials, rest) = floats.split_at_mut(layout.partials());
    let (takers, scratch) = rest.split_at_mut(layout.takers(&problem.sizes));
    let shape =
        Shape { batch: layout.units, seq: layout.spans, heads: layout.rows, dim: layout.partial };
    let engine = |form| Engine { problem, layout, factor: Factor::new(problem.scale), form };
    {
        let mut partials = TensorMut::new(partials, shape).expect("the workspace has this shape");
        let partials = partials.share();
        let takers = Takers::find(problem, layout.spans, takers);
        let passes = match takers.sharing() {
            true => (problem.sizes.q.batch * layout.rows).div_ceil(ROWS),
            false => layout.passes,
        };
        let parts = layout.units * passes * layout.spans;
        let scratches =
            scratch.chunks_exact_mut(layout.scratch).take(layout.threads(&problem.sizes));
        for_each_part(parts, scratches, |part, scratch| {
            let (unit, rest) = (part / (passes * layout.spans), part / passes);
            let (span, pass) = (rest % layout.spans, part % passes);
            let batch = unit / problem.sizes.kv_heads;
            let mut seats = [Seat::default(); ROWS];
            let rows = takers.rows(problem, (batch, span)).skip(pass * ROWS);
            let count = rows.zip(&mut seats).map(|(row, seat)| *seat = row).count();
            let seats = &seats[..count];
            let Some(first) = seats.first() else { return };
            let positions = span_of(&problem.held(batch), span);
            let work = Span::new(&problem.sizes, unit, seats);
            let of = (&problem.sizes, problem.terms);
            let mut state = State::new(scratch, of, seats.len());
            let form = problem.row_form(first.batch, layout.packed);
            engine(form).attend(&work, positions, &mut state);
            for (r, seat) in seats.iter().enumerate() {
                let unit = seat.batch * problem.sizes.kv_heads + work.kv_head;
                // SAFETY: each part writes its own rows of its own span.
                state.save(r, unsafe { partials.row(unit, span, seat.row) });
            }
        });
    }
    engine(Form::Numbers(problem.sizes.cpu.level)).join(partials);
}

impl<E: Element, K: Element> Problem<'_, E, K> {
    /// How a sequence's products are computed: by numbers where a head has a key/value head of its own, which waits
    /// for memory whatever the product, and numbers are faster to wait with and more exact; and where codes are multiplied
    /// as they are.
    fn row_form(&self, batch: usize, packed: bool) -> Form {
        if self.sizes.group() <= 1 || self.kv.coded(batch) && !packed {
            return Form::Numbers(self.sizes.cpu.level);
        }
        self.form(batch)
    }
}

struct Engine<'a, E, K> {
    problem: &'a Problem<'a, E, K>,
    layout: Layout,
    factor: Factor,
    form: Form,
}

impl<E: Element, K: Element> Engine<'_, E, K> {
    /// Takes rows through a span of positions. A row whose result is not finite is computed again with
    /// the values that it may not see replaced by zeros (which allocates): 0 × NaN must not reach it
    /// from there.
    fn attend(&self, work: &Span<'_>, positions: Range<usize>, state: &mut State<'_>) {
        if positions.is_empty() {
            return;
        }
        self.accumulate(work, &positions, state, false);
        for r in 0..work.seats.len() {
            let (acc, _, sum) = state.row(r);
            if sum.is_finite() && row::all_finite(self.problem.sizes.cpu.level, acc) {
                continue;
            }
            let only = Span { seats: &work.seats[r..r + 1], ..*work };
            let mut scratch = vec![0.0; self.layout.scratch];
            let of = (&self.problem.sizes, self.problem.terms);
            let mut again = State::new(&mut scratch, of, 1);
            self.accumulate(&only, &positions, &mut again, true);
            state.replace(r, &again);
        }
    }

    fn accumulate(
        &self,
        work: &Span<'_>,
        positions: &Range<usize>,
        state: &mut State<'_>,
        careful: bool,
    ) {
        let cells = self.form.cells(self.problem.sizes.q.dim);
        let stride = self.query_stride();
        for (r, &seat) in work.seats.iter().enumerate() {
            let (i, head) = work.query(seat);
            let query = &mut state.queries[r * stride..(r + 1) * stride];
            query[cells..].fill(0.0);
            let from = self.problem.q.row(seat.batch, i, head);
            self.factor.load(self.form, from, &mut query[..cells]);
            if let Some(lines) = &mut state.lines {
                lines.load(self.factor, (r, head), &mut query[..cells]);
            }
        }
        for start in positions.clone().step_by(KEY_TILE) {
            let tile = start..(start + KEY_TILE).min(positions.end);
            if work.sees(self.problem.mask, self.problem.sizes.same_heads, &tile) {
                self.tile(work, tile, state, careful);
            }
        }
    }

    /// Cells from one query to the next.
    fn query_stride(&self) -> usize {
        let dim = self.problem.sizes.q.dim;
        if self.layout.packed { self.form.cells(dim) } else { padded(dim) }
    }

    /// One key tile for all rows.
    fn tile(&self, work: &Span<'_>, positions: Range<usize>, state: &mut State<'_>, careful: bool) {
        let rows = work.seats.len();
        let mut words = [KeyWords::default(); ROWS];
        let words = &mut words[..rows];
        work.fill(self.problem.mask, &positions, words);
        let tile = self.problem.kv.tile(work.batch(), work.kv_head, positions.clone());
        self.scores(tile.keys, words, state);
        for first in (0..rows).step_by(GROUP) {
            let group = first..(first + GROUP).min(rows);
            self.weights(work, (&positions, &words[group.clone()]), group, state);
        }
        match tile.values {
            // Codes stand for finite numbers.
            KvValues::Rows(rows) if careful => with_rows!(rows, values => {
                let (seen, width) = (seen(values, &words[0]), values.width());
                let values = Rows::new(&seen, width, values.count(), width);
                let values = KvValues::Rows(kv_rows(values.expect("as many as before")));
                self.values(values, words, state);
            }),
            values => self.values(values, words, state),
        }
    }

    /// Products of all rows with a tile's keys, and their maxima.
    fn scores(&self, keys: KvKeys<'_>, words: &[KeyWords], state: &mut State<'_>) {
        let (rows, level) = (words.len(), self.problem.sizes.cpu.level);
        let State { queries, scores, tile_max, local, .. } = state;
        if self.layout.packed {
            let depth = self.query_stride();
            let packed = self.form.pack_keys(keys, local);
            for first in (0..rows).step_by(GROUP) {
                let group = first..(first + GROUP).min(rows);
                let mut max = [0.0; GROUP];
                let args = Scores {
                    queries: &queries[group.start * depth..group.end * depth],
                    stride: depth,
                    rows: group.len(),
                    depth,
                    keys: packed,
                    visible: Visible::Some(&words[group.clone()]),
                    hidden: f32::NEG_INFINITY,
                    out: &mut scores[group.start * KEY_TILE..],
                    out_stride: KEY_TILE,
                    max: &mut max,
                };
                tile::scores(self.form, args);
                tile_max[group.clone()].copy_from_slice(&max[..group.len()]);
            }
            return;
        }
        let (out, max) = (&mut **scores, &mut tile_max[..rows]);
        match (self.form, keys) {
            (Form::Pairs(token), KvKeys::Rows(KvRows::Bf16(keys))) => {
                row_score_pairs(token, RowScores { queries, keys, visible: words, out, max });
            }
            (_, KvKeys::Rows(keys)) => with_rows!(keys, keys => {
                row_scores(level, RowScores { queries, keys, visible: words, out, max });
            }),
            (_, KvKeys::Channels(keys)) => {
                let args = ChannelScores { queries, keys, visible: words, out, max };
                with_code!(keys.bits, code => channel_scores(level, code, args));
            }
        }
    }

    /// Turns the scores of up to six rows into weights, and brings maxima and sums up to date.
    fn weights(
        &self,
        work: &Span<'_>,
        (positions, words): (&Range<usize>, &[KeyWords]),
        group: Range<usize>,
        state: &mut State<'_>,
    ) {
        let level = self.problem.sizes.cpu.level;
        let State { scores, lanes, max, tile_max, rescale, lines, .. } = state;
        let (mut group_max, mut group_rescale) = ([0.0; GROUP], [0.0; GROUP]);
        group_max[..group.len()].copy_from_slice(&tile_max[group.clone()]);
        let sites = group.clone().map(|r| work.row_site(work.seats[r]));
        let scores = &mut scores[group.start * KEY_TILE..group.end * KEY_TILE];
        let visible = Visible::Some(words);
        let start = positions.start as isize;
        let rows =
            group.clone().zip(sites.clone()).map(|(r, at)| (r, at.head, at.position - start));
        let by_distance = lines.as_mut().map(|lines| lines.products(rows, positions.len()));
        let factor = self.problem.terms.finish(
            sites.clone(),
            Finish {
                level,
                factor: self.factor,
                heads: self.problem.sizes.q.heads,
                positions: positions.clone(),
                visible,
                by_distance,
                scores: &mut *scores,
                max: &mut group_max,
                bend: None,
            },
        );
        // The tile kernels leave what no row of a group sees untouched; the row kernels write it all.
        let computed = match self.layout.packed {
            true => visible,
            false => Visible::All(positions.len().next_multiple_of(STEP)),
        };
        softmax(
            level,
            Softmax {
                scores: &mut *scores,
                max: &group_max,
                visible: computed,
                factor,
                running_max: &mut max[group.clone()],
                running_sum: &mut lanes[group.start * 16..group.end * 16],
                rescale: &mut group_rescale,
            },
        );
        rescale[group.clone()].copy_from_slice(&group_rescale[..group.len()]);
        self.problem.terms.drop(level, sites, positions, scores);
        if let Form::Pairs(token) = self.form {
            pairs::round(token, scores, computed.all_steps());
        }
    }

    /// Adds a tile's weighted values to the accumulators of all rows.
    fn values(&self, values: KvValues<'_>, words: &[KeyWords], state: &mut State<'_>) {
        let (rows, level) = (words.len(), self.problem.sizes.cpu.level);
        let State { acc, sums, scores, rescale, local, .. } = state;
        if self.layout.packed {
            let width = padded(self.problem.sizes.value_dim);
            let values = self.form.cell_rows(values, local);
            for first in (0..rows).step_by(GROUP) {
                let group = first..(first + GROUP).min(rows);
                let mut factors = [0.0; GROUP];
                factors[..group.len()].copy_from_slice(&rescale[group.clone()]);
                let args = Values {
                    probabilities: &scores[group.start * KEY_TILE..],
                    visible: Visible::Some(&words[group.clone()]),
                    values,
                    rescale: &factors,
                    out: &mut acc[group.start * width..group.end * width],
                };
                tile::values(self.form, args);
            }
            return;
        }
        let (probabilities, rescale, out) = (&**scores, &rescale[..rows], &mut **acc);
        match (self.form, values) {
            (Form::Pairs(token), KvValues::Rows(KvRows::Bf16(values))) => {
                row_value_pairs(token, RowValues { probabilities, values, rescale, out, sums });
            }
            (_, KvValues::Rows(values)) => with_rows!(values, values => {
                row_values(level, RowValues { probabilities, values, rescale, out, sums });
            }),
            (_, KvValues::Tokens(values)) => {
                let args = TokenValues { probabilities, values, rescale, out, sums };
                with_code!(values.bits, code => token_values(level, code, args));
            }
        }
    }

    /// Joins the spans of each row in order and writes outputs.
    fn join(&self, partials: &mut [f32]) {
        let Layout { units, rows, spans, partial, .. } = self.layout;
        let level = self.problem.sizes.cpu.level;
        let width = partial - TAIL;
        for (unit, row) in (0..units).flat_map(|unit| (0..rows).map(move |row| (unit, row))) {
            let at = |span: usize| ((unit * spans + span) * rows + row) * partial;
            let (first, rest) = partials.split_at_mut(at(0) + partial);
            let first = &mut first[at(0)..];
            for span in 1..spans {
                let other = &rest[at(span) - at(0) - partial..][..partial];
                let join = Join::new(first[width], other[width]);
                row::blend(level, &mut first[..width], join.keep, &other[..width], join.add);
                first[width] = join.max;
                first[width + 1] = first[width + 1] * join.keep + other[width + 1] * join.add;
            }
            let (max, sum) = (first[width], first[width + 1]);
            let batch = unit / self.problem.sizes.kv_heads;
            let seat = Seat { batch, row, origin: 0 };
            let (i, head) = Span::new(&self.problem.sizes, unit, &[seat]).query(seat);
            // SAFETY: this thread is the only one that writes outputs.
            unsafe { self.problem.finish((batch, i, head), &first[..width], (max, sum)) };
        }
    }
}

/// A thread's share of the workspace.
struct State<'a> {
    queries: &'a mut [f32],
    acc: &'a mut [f32],
    sums: &'a mut [f32],
    scores: &'a mut [f32],
    lanes: &'a mut [f32],
    max: &'a mut [f32],
    tile_max: &'a mut [f32],
    rescale: &'a mut [f32],
    /// Products by distance, where the call has a relative encoding.
    lines: Option<Lines<'a>>,
    /// A packed tile of keys, then of values, where tiles are packed.
    local: &'a mut [f32],
}

impl<'a> State<'a> {
    fn new(scratch: &'a mut [f32], (sizes, terms): (&Sizes, &Terms<'a>), rows: usize) -> State<'a> {
        let width = padded(sizes.value_dim);
        let (queries, rest) = scratch.split_at_mut(ROWS * padded(sizes.q.dim));
        let (acc, rest) = rest.split_at_mut(ROWS * width);
        let (sums, rest) = rest.split_at_mut(ROWS * width);
        let (scores, rest) = rest.split_at_mut(ROWS * KEY_TILE);
        let (lanes, rest) = rest.split_at_mut(ROWS * 16);
        let (max, rest) = rest.split_at_mut(ROWS);
        let (tile_max, rest) = rest.split_at_mut(ROWS);
        let (rescale, rest) = rest.split_at_mut(ROWS);
        let (lines, local) = Lines::split(terms, sizes.cpu.level, ROWS, rest);
        acc[..rows * width].fill(0.0);
        lanes[..rows * 16].fill(0.0);
        max[..rows].fill(f32::NEG_INFINITY);
        State { queries, acc, sums, scores, lanes, max, tile_max, rescale, lines, local }
    }

    /// Accumulator, maximum and sum of a row.
    fn row(&self, r: usize) -> (&[f32], f32, f32) {
        let width = self.acc.len() / ROWS;
        let sum = tile::lane_sum(&self.lanes[r * 16..(r + 1) * 16]);
        (&self.acc[r * width..(r + 1) * width], self.max[r], sum)
    }

    /// Takes over the only row of another state.
    fn replace(&mut self, r: usize, other: &State<'_>) {
        let width = self.acc.len() / ROWS;
        self.acc[r * width..(r + 1) * width].copy_from_slice(&other.acc[..width]);
        self.lanes[r * 16..(r + 1) * 16].copy_from_slice(&other.lanes[..16]);
        self.max[r] = other.max[0];
    }

    /// Writes a row's partial result.
    fn save(&self, r: usize, to: &mut [f32]) {
        let (acc, max, sum) = self.row(r);
        to[..acc.len()].copy_from_slice(acc);
        to[acc.len()] = max;
        to[acc.len() + 1] = sum;
    }
}
