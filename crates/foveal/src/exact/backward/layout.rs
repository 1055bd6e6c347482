//! How a backward call is cut into parts and its workspace into pieces. Nothing here depends on data.

use super::relative::{self, Distances};
use super::terms::{Sharing, tally};
use super::tile::{KeyTile, Stretch};
use crate::element::DType;
use crate::exact::terms::Terms;
use crate::plan::Sizes;
use crate::simd::pairs;
use crate::simd::product::Form;
use crate::simd::tile::{GROUP, KEY_TILE, PANEL, padded};
use crate::tensor::{Rows, Shape, SharedRows, TensorMut};
use std::ops::Range;

/// Query rows of a tile.
pub(super) const ROWS: usize = 96;
/// The most query rows of a chunk.
const CHUNK: usize = 3 * ROWS;
/// Chunks of which each thread may hold the sums, where threads share a head.
const SLOTS: usize = 4;
/// The most chunks whose sums are held.
pub(super) const MOST_SLOTS: usize = 128;

/// Numbers of a key and value, times key tiles, that a stretch may hold.
const STRETCH: usize = 256;
/// The most key tiles of a stretch.
const MOST_TILES: usize = 4;

/// Sizes of everything; all pieces are whole cache lines.
#[derive(Debug, Clone, Copy)]
pub(super) struct Layout {
    /// (Sequence, key/value head) pairs.
    pub(super) units: usize,
    /// Rows of units that come one after the other: each by itself, or all sequences of a head.
    pub(super) strands: usize,
    /// Of which so many are computed at the same time, each by threads of its own.
    pub(super) heads_at_once: usize,
    /// Threads that share one.
    threads: usize,
    /// Chunks of a query head.
    pub(super) per_head: usize,
    /// Chunks of a key/value head.
    pub(super) chunks: usize,
    /// Rows of a chunk.
    pub(super) rows: usize,
    /// Positions of a stretch: neighbouring key tiles for which rows are loaded once.
    pub(super) stretch: usize,
    /// Stretches of a sequence.
    pub(super) stretches: usize,
    dims: (usize, usize),
    /// Floats of a key's sums: dK, then dV, each padded.
    pub(super) width: usize,
    /// Floats of a chunk's statistics.
    pub(super) statistics: usize,
    /// Floats of the image of dQ.
    image: usize,
    /// Floats of one stretch of keys.
    keys: usize,
    /// Floats of its sums.
    pub(super) sums: usize,
    /// Floats of a chunk's sums for the gradient of a bias.
    pub(super) bias_sums: usize,
    /// Floats of all sums of a chunk: of keys, for the gradient of a bias, and for that of keys by distance.
    pub(super) slot: usize,
    /// Numbers that a chunk adds up for the gradients of terms.
    pub(super) tally: usize,
    /// Chunks whose sums are held at the same time.
    pub(super) slots: usize,
    /// Floats of one thread.
    pub(super) scratch: usize,
}

/// The pieces of the workspace of one key/value head.
#[derive(Debug)]
pub(super) struct Memory<'a> {
    pub(super) statistics: &'a mut [f32],
    pub(super) image: &'a mut [f32],
    pub(super) keys: &'a mut [f32],
    pub(super) total: &'a mut [f32],
    pub(super) sums: &'a mut [f32],
    pub(super) scratch: &'a mut [f32],
}

impl Layout {
    pub(super) fn new(sizes: &Sizes, terms: &Terms<'_>, storage: DType) -> Layout {
        let (dim, value_dim) = (sizes.q.dim, sizes.value_dim);
        // Whole cells, whatever those are.
        let dims = (dim.next_multiple_of(2), value_dim.next_multiple_of(2));
        let units = sizes.q.batch * sizes.kv_heads;
        // Even chunks, so that threads which share them are done together.
        let even = sizes.q.seq.div_ceil(sizes.q.seq.div_ceil(CHUNK).max(1));
        let rows = even.next_multiple_of(GROUP).min(sizes.q.seq);
        let per_head = sizes.q.seq.div_ceil(rows.max(1));
        let chunks = per_head * sizes.group();
        let all = sizes.cpu.threads.count();
        // Heads apart need no barriers, unless some threads would have none for long.
        // Sequences share the gradient of keys by distance.
        let strands = if terms.encoding.is_some() { sizes.kv_heads } else { units };
        let rounds = strands.div_ceil(all).max(1);
        let busy = strands.saturating_mul(5) >= rounds.saturating_mul(all).saturating_mul(4);
        let sharing = Sharing::new(terms, sizes.q, sizes.kv_heads);
        let apart = sharing != Sharing::Across && (chunks <= 1 || busy);
        let (heads_at_once, threads) =
            if apart { (all.min(strands), 1) } else { (1, all.min(chunks.max(1))) };
        let width = padded(dim) + padded(value_dim);
        let lines = |n: usize| n.next_multiple_of(16);
        // Short vectors leave room for more keys, which repay the loading of rows.
        let stretch = KEY_TILE * (STRETCH / (dim + value_dim)).clamp(1, MOST_TILES);
        let sums = stretch * width;
        let bias_rows = if terms.bias.is_some_and(|bias| bias.shape().seq == 1) { 1 } else { rows };
        let bias_sums = if sharing == Sharing::Nothing { 0 } else { stretch * bias_rows };
        let distance_sums = lines(relative::sums(terms, rows, stretch));
        let image = if storage == DType::F32 { 0 } else { lines(chunks * rows * dim) };
        let distances = if sizes.by_distance { Distances::floats(dim) } else { 0 };
        Layout {
            units,
            strands,
            heads_at_once: heads_at_once.max(1),
            threads,
            per_head,
            chunks,
            rows,
            stretch,
            stretches: sizes.keys.div_ceil(stretch),
            dims: (dim, value_dim),
            width,
            statistics: lines(2 * rows),
            image,
            keys: stretch * (2 * dims.0 + dims.1),
            sums,
            bias_sums,
            slot: sums + bias_sums + distance_sums,
            tally: tally(terms),
            slots: if threads == 1 { 1 } else { chunks.min(SLOTS * threads).min(MOST_SLOTS) },
            scratch: Scratch::floats(dims) + distances,
        }
    }

    /// The units of a strand, in order.
    pub(super) fn units_of(&self, strand: usize) -> impl Iterator<Item = usize> + use<> {
        (strand..self.units).step_by(self.strands.max(1))
    }

    /// Floats of one key/value head that is being computed.
    pub(super) fn floats(&self) -> usize {
        let shared = self.chunks * self.statistics + self.image + self.keys;
        shared + self.sums + self.slots * self.slot + self.threads * self.scratch
    }

    /// Floats of what all chunks of the call add up for the gradients of terms.
    pub(super) fn tallies(&self) -> usize {
        self.units * self.chunks * self.tally
    }

    pub(super) fn split<'a>(&self, floats: &'a mut [f32]) -> Memory<'a> {
        let (statistics, rest) = floats.split_at_mut(self.chunks * self.statistics);
        let (image, rest) = rest.split_at_mut(self.image);
        let (keys, rest) = rest.split_at_mut(self.keys);
        let (total, rest) = rest.split_at_mut(self.sums);
        let (sums, scratch) = rest.split_at_mut(self.slots * self.slot);
        Memory { statistics, image, keys, total, sums, scratch }
    }

    /// A stretch's packed keys, packed values and keys as rows, panel by panel.
    pub(super) fn panels<'a>(&self, form: Form, floats: &'a mut [f32]) -> [SharedRows<'a, f32>; 3] {
        let (depth, value_depth) = (form.cells(self.dims.0), form.cells(self.dims.1));
        let (keys, rest) = floats.split_at_mut(self.stretch * depth);
        let (values, rows) = rest.split_at_mut(self.stretch * value_depth);
        [
            (keys, PANEL * depth),
            (values, PANEL * value_depth),
            (rows, form.cells(PANEL) * self.dims.0),
        ]
        .map(|(floats, panel)| shared(floats, [self.stretch / PANEL, 1, panel]))
    }

    /// What [`Layout::panels`] were filled with.
    pub(super) fn stretch<'a>(
        &self,
        form: Form,
        floats: &'a [f32],
        positions: Range<usize>,
    ) -> Stretch<'a> {
        let (keys, rest) = floats.split_at(self.stretch * form.cells(self.dims.0));
        let (values, rows) = rest.split_at(self.stretch * form.cells(self.dims.1));
        Stretch { form, positions, keys, values, rows }
    }

    /// A key tile of a stretch, and where its sums begin.
    pub(super) fn tile<'a>(&self, keys: &Stretch<'a>, positions: Range<usize>) -> KeyTile<'a> {
        let (form, dim) = (keys.form, self.dims.0);
        let (depth, value_depth) = (form.cells(dim), form.cells(self.dims.1));
        let first = positions.start - keys.positions.start;
        let padded = first + positions.len().next_multiple_of(PANEL);
        let (rows, count) = (&keys.rows[form.cells(first) * dim..], form.cells(positions.len()));
        KeyTile {
            first,
            keys: &keys.keys[first * depth..padded * depth],
            values: &keys.values[first * value_depth..padded * value_depth],
            rows: Rows::new(rows, dim, count, dim).expect("a tile's keys"),
            positions,
        }
    }
}

/// `[rows, columns, numbers]` that threads share.
pub(super) fn shared(floats: &mut [f32], [seq, heads, dim]: [usize; 3]) -> SharedRows<'_, f32> {
    let shape = Shape { batch: 1, seq, heads, dim };
    let floats = &mut floats[..seq * heads * dim];
    TensorMut::new(floats, shape).expect("as many as the shape has").into_shared()
}

pub(crate) fn workspace_floats(sizes: &Sizes, terms: &Terms<'_>, storage: DType) -> usize {
    let layout = Layout::new(sizes, terms, storage);
    layout.tallies() + layout.heads_at_once * layout.floats()
}

/// A thread's share of the workspace.
pub(super) struct Scratch<'a> {
    /// Queries in cells.
    pub(super) queries: &'a mut [f32],
    /// The same as rows of cells across queries, where those are something else.
    pub(super) query_rows: &'a mut [f32],
    pub(super) d_out: &'a mut [f32],
    pub(super) d_out_rows: &'a mut [f32],
    /// P of a group, `[row][KEY_TILE]`, and of all rows, in cells across rows.
    pub(super) scores: Weights<'a>,
    /// dS, likewise.
    pub(super) gradients: Weights<'a>,
    /// Of a group of rows: the derivative of the cap, `[row][KEY_TILE]`.
    pub(super) bend: &'a mut [f32],
    /// dQ of all rows.
    pub(super) d_q: &'a mut [f32],
    /// Products by distance, where the call has a relative encoding.
    pub(super) distances: Option<Distances<'a>>,
}

impl<'a> Scratch<'a> {
    /// Of dimensions that are whole cells.
    fn floats((dim, value_dim): (usize, usize)) -> usize {
        ROWS * (dim + value_dim + 2 * KEY_TILE + padded(dim)) + GROUP * KEY_TILE
    }

    pub(super) fn new(
        form: Form,
        scratch: &'a mut [f32],
        ((dim, value_dim), terms): ((usize, usize), &Terms<'a>),
    ) -> Scratch<'a> {
        // Numbers need no other form of rows.
        let across = |width: usize| match form {
            Form::Numbers(_) => 0,
            Form::Pairs(_) => form.cells(ROWS) * width,
        };
        let (queries, rest) = scratch.split_at_mut(ROWS * form.cells(dim));
        let (query_rows, rest) = rest.split_at_mut(across(dim));
        let (d_out, rest) = rest.split_at_mut(ROWS * form.cells(value_dim));
        let (d_out_rows, rest) = rest.split_at_mut(across(value_dim));
        let (scores, rest) = rest.split_at_mut(ROWS * KEY_TILE);
        let (gradients, rest) = rest.split_at_mut(ROWS * KEY_TILE);
        let (bend, rest) = rest.split_at_mut(GROUP * KEY_TILE);
        let (d_q, rest) = rest.split_at_mut(ROWS * padded(dim));
        let (distances, _) = Distances::split(terms, form, rest);
        let (scores, gradients) = (Weights::new(form, scores), Weights::new(form, gradients));
        Scratch { queries, query_rows, d_out, d_out_rows, scores, gradients, bend, d_q, distances }
    }
}

/// Weights of a tile, group by group. Of numbers each group's stay where they are made; pairs are made from those of a
/// group, one group at a time.
pub(super) struct Weights<'a> {
    form: Form,
    floats: &'a mut [f32],
}

impl<'a> Weights<'a> {
    fn new(form: Form, floats: &'a mut [f32]) -> Weights<'a> {
        Weights { form, floats }
    }

    /// Cells across all rows: `[row / CELL][KEY_TILE]`.
    pub(super) fn across(&self) -> &[f32] {
        self.floats
    }

    /// Where a group of rows is computed, `[row][KEY_TILE]`.
    pub(super) fn group(&mut self, rows: &Range<usize>) -> &mut [f32] {
        let first = match self.form {
            Form::Numbers(_) => rows.start,
            Form::Pairs(_) => ROWS / 2,
        };
        &mut self.floats[first * KEY_TILE..][..rows.len() * KEY_TILE]
    }

    /// Rounds a group that has been computed, if the form asks for it.
    pub(super) fn round(&mut self, rows: &Range<usize>) {
        if let Form::Pairs(token) = self.form {
            let (across, group) = self.floats.split_at_mut(ROWS / 2 * KEY_TILE);
            let across = &mut across[rows.start / 2 * KEY_TILE..rows.end.div_ceil(2) * KEY_TILE];
            pairs::round_across(token, &mut group[..rows.len() * KEY_TILE], across);
        }
    }
}

const _: () = assert!(GROUP.is_multiple_of(2) && GROUP <= ROWS / 2);
