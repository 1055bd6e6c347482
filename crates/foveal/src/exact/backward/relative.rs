//! What a relative encoding gets: gradients of keys by distance and of what queries are moved by.
//!
//! ```text
//! dA = scale · dS                       by column:   dB[r, (n − r) + t] = dS[r, t]
//! dQ  = dA K + dB r(columns)            dr(column) = dBᵀ (Q + v)
//! du  = Σ_i (dA K)_i                    dv = Σ_i (dB r)_i
//! ```
//!
//! dS of up to 96 rows is laid out once more, each row as far to the right as its band begins, so that the sums along
//! diagonals are the products that keys and queries have too. Each chunk sums up dr by column, and its rows' parts of du
//! and dv; chunks are joined in the order of sequences and rows. Dai et al. 2019, §3.3.

use super::layout::ROWS;
use super::terms::TABLE;
use super::{Chunk, Engine, Join, Wave};
use crate::element::Element;
use crate::exact::relative::{Band, columns, words};
use crate::exact::terms::Terms;
use crate::mask::Pattern;
use crate::simd::Level;
use crate::simd::gradient::{self, Across};
use crate::simd::product::Form;
use crate::simd::row;
use crate::simd::tile::{self, GROUP, KEY_TILE, PANEL, Values, Visible, padded};
use std::ops::Range;

/// Groups of columns of half a band.
const GROUPS: usize = KEY_TILE.div_ceil(GROUP);
/// Zeros on either side of a row: more than the columns that it is computed for because of its neighbours.
const MARGIN: usize = 2 * GROUP;

/// The band of a tile and its gradients.
pub(super) struct Distances<'a> {
    pub(super) band: Band<'a>,
    form: Form,
    dim: usize,
    /// dS by column, `[half][row][KEY_TILE]`.
    gradients: &'a mut [f32],
    /// What rows get from keys by distance, `[row][padded dim]`.
    d_q: &'a mut [f32],
    /// For each half and each group of its columns, the first row that counts and the one after the last.
    bounds: [[(usize, usize); GROUPS]; 2],
}

impl<'a> Distances<'a> {
    pub(super) fn floats(dim: usize) -> usize {
        Band::floats(ROWS, dim) + ROWS * (2 * KEY_TILE + padded(dim))
    }

    /// Takes its memory off the beginning of `scratch`, if the terms have a relative encoding.
    pub(super) fn split(
        terms: &Terms<'a>,
        form: Form,
        scratch: &'a mut [f32],
    ) -> (Option<Distances<'a>>, &'a mut [f32]) {
        let (band, rest) = Band::split(terms, form.level(), ROWS, scratch);
        let Some(band) = band else { return (None, rest) };
        let dim = terms.encoding.map_or(0, |encoding| encoding.shape().dim);
        let (gradients, rest) = rest.split_at_mut(2 * ROWS * KEY_TILE);
        let (d_q, rest) = rest.split_at_mut(ROWS * padded(dim));
        let bounds = [[(0, 0); GROUPS]; 2];
        (Some(Distances { band, form, dim, gradients, d_q, bounds }), rest)
    }

    /// Begins with other rows.
    pub(super) fn clear(&mut self, rows: usize) {
        self.d_q[..rows * padded(self.dim)].fill(0.0);
    }

    /// Packs the columns of `rows` rows of a head, of which the last is `first` behind the first key.
    pub(super) fn pack(&mut self, head: usize, first: isize, rows: usize) {
        self.band.pack(head, first, rows);
        self.bounds = [[(usize::MAX, 0); GROUPS]; 2];
    }

    /// Lays out dS of a group of the rows, and adds to dQ.
    pub(super) fn add(&mut self, group: &Range<usize>, visible: Visible<'_>, d_scores: &[f32]) {
        let (columns, rows) = (self.band.columns(group, visible), self.band.rows());
        for (r, d_scores) in group.clone().zip(d_scores.chunks_exact(KEY_TILE)) {
            let at = rows - 1 - r;
            let (low, high) = self.gradients.split_at_mut(ROWS * KEY_TILE);
            let [low, high] = [low, high].map(|half| &mut half[r * KEY_TILE..][..KEY_TILE]);
            let (left, right) = d_scores.split_at(KEY_TILE - at);
            low[at.saturating_sub(MARGIN)..at].fill(0.0);
            low[at..].copy_from_slice(left);
            high[..at].copy_from_slice(right);
            high[at..at + MARGIN].fill(0.0);
        }
        let [keys, _] = self.band.matrices();
        let out = &mut self.d_q[group.start * padded(self.dim)..group.end * padded(self.dim)];
        for half in 0..2 {
            let panels = half * KEY_TILE / PANEL..(half + 1) * KEY_TILE / PANEL;
            let words = words(&columns, &panels);
            let own = half * KEY_TILE..keys.count().min((half + 1) * KEY_TILE);
            if words == [0; KEY_TILE / PANEL] {
                continue;
            }
            let args = Values {
                probabilities: &self.gradients[(half * ROWS + group.start) * KEY_TILE..],
                visible: Visible::Some(&[words; GROUP][..group.len()]),
                values: keys.slice(own.clone()),
                rescale: &[1.0; GROUP],
                out: &mut *out,
            };
            tile::values(self.form, args);
            let first = columns.start.saturating_sub(own.start) / GROUP;
            let end = (columns.end.min(own.end) - own.start).div_ceil(GROUP);
            for bounds in &mut self.bounds[half][first..end] {
                *bounds = (bounds.0.min(group.start), bounds.1.max(group.end));
            }
        }
    }

    /// Adds what the columns' keys get from all rows to `sums`, one row of padded numbers a column.
    pub(super) fn add_keys(&self, sums: &mut [f32]) {
        let [keys, rows] = self.band.matrices();
        let out_stride = padded(self.dim);
        for (half, bounds) in self.bounds.iter().enumerate() {
            let own = keys.count().saturating_sub(half * KEY_TILE).min(KEY_TILE);
            let args = Across {
                weights: &self.gradients[half * ROWS * KEY_TILE..],
                rows,
                bounds: &bounds[..own.div_ceil(GROUP)],
                keys: own,
                out: &mut sums[half * KEY_TILE * out_stride..],
                out_stride,
            };
            if own > 0 {
                gradient::across(self.form, args);
            }
        }
    }

    /// What rows got from keys by distance, `[row][padded dim]`, without the scale.
    pub(super) fn queries(&mut self, rows: usize) -> &mut [f32] {
        &mut self.d_q[..rows * padded(self.dim)]
    }
}

/// The sum of rows of a width, which is left in the first: halves are added until one row is left.
fn row_sum(level: Level, rows: &mut [f32], width: usize) -> &[f32] {
    let mut n = rows.len() / width;
    while n > 1 {
        let (kept, added) = rows[..n * width].split_at_mut(n.div_ceil(2) * width);
        row::blend(level, &mut kept[..added.len()], 1.0, added, 1.0);
        n = n.div_ceil(2);
    }
    &rows[..width]
}

/// Floats of a chunk's sums for a stretch of keys.
pub(super) fn sums(terms: &Terms<'_>, rows: usize, stretch: usize) -> usize {
    let row = terms.encoding.map_or(0, |encoding| padded(encoding.shape().dim));
    (stretch - KEY_TILE + columns(rows.max(1))) * row
}

/// Where a chunk's numbers for du begin, and how many there are; those for dv follow.
pub(super) fn places(terms: &Terms<'_>) -> (usize, usize) {
    let buckets = terms.relative.as_ref().map_or(0, |relative| relative.buckets());
    (TABLE + buckets, terms.encoding.map_or(0, |encoding| encoding.shape().dim))
}

impl<E: Element, K: Element> Engine<'_, E, K> {
    /// How far a chunk's last row is ahead of the first of some keys: the distance of its first column.
    fn first_distance(&self, chunk: &Chunk, keys: &Range<usize>) -> isize {
        self.positions(&chunk.rows).end - 1 - keys.start as isize
    }

    /// Fills the gradient of keys by distance with zeros.
    pub(super) fn clear_relative_keys(&self) {
        let Some(keys) = &self.call.terms_out.relative_keys else { return };
        for (p, head) in
            (0..keys.shape().seq).flat_map(|p| (0..keys.shape().heads).map(move |h| (p, h)))
        {
            // SAFETY: one thread, before others begin.
            unsafe { keys.row(0, p, head) }.fill(0.0);
        }
    }

    /// Adds rows' parts of dQ, `[row][padded dim]` without the scale, to the chunk's du and dv. What they held is lost.
    pub(super) fn add_biases(&self, chunk: &Chunk, content: &mut [f32], position: &mut [f32]) {
        let (level, scale) = (self.call.sizes.cpu.level, self.call.scale);
        let (first, dim) = places(self.call.terms);
        // SAFETY: each chunk belongs to one part.
        let tally = unsafe { self.tallies.row(0, chunk.unit, chunk.index) };
        let (u, v) = tally[first..first + 2 * dim].split_at_mut(dim);
        row::blend(level, u, 1.0, &row_sum(level, content, padded(dim))[..dim], scale);
        row::blend(level, v, 1.0, &row_sum(level, position, padded(dim))[..dim], scale);
    }

    /// The columns of a chunk for which some row sees a key of a stretch.
    fn live_columns(&self, chunk: &Chunk, keys: &Range<usize>) -> Range<usize> {
        let (mut start, mut end) = (keys.end, keys.start);
        let positions = self.positions(&chunk.rows);
        self.call.mask.live(chunk.site, positions, keys.clone(), &mut |range, _| {
            (start, end) = (start.min(range.start), end.max(range.end));
        });
        match start < end {
            true => start - keys.start..end - keys.start + chunk.rows.len() - 1,
            false => 0..0,
        }
    }

    /// Adds the wave's sums to the gradient of keys by distance, chunk by chunk.
    pub(super) fn join_relative(&self, step: &Join<'_>, wave: &Wave, sums: &[f32]) {
        let (Some(out), Some(encoding)) =
            (&self.call.terms_out.relative_keys, self.call.terms.encoding)
        else {
            return;
        };
        let level = self.call.sizes.cpu.level;
        let dim = encoding.shape().dim;
        for (&index, sums) in wave.live().iter().zip(sums.chunks_exact(self.layout.slot)) {
            let chunk = self.chunk(step.unit, index);
            let first = self.first_distance(&chunk, step.keys);
            let sums = sums[self.layout.sums + self.layout.bias_sums..].chunks_exact(padded(dim));
            let columns = self.live_columns(&chunk, step.keys);
            for (c, sum) in sums.enumerate().take(columns.end).skip(columns.start) {
                let p = encoding.row(first - c as isize);
                // SAFETY: sequences of a head come one after the other, and one thread at a time joins.
                let out = unsafe { out.row(0, p, chunk.site.q_head) };
                row::blend(level, out, 1.0, &sum[..dim], self.call.scale.abs());
            }
        }
    }

    /// Whether what the heads of a unit have for distances is finite.
    pub(super) fn encoding_is_finite(&self, unit: usize) -> bool {
        let Some(encoding) = self.call.terms.encoding else { return true };
        let (level, group) = (self.call.sizes.cpu.level, self.call.sizes.group());
        let first = unit % self.call.sizes.kv_heads * group;
        (first..first + group).all(|head| {
            let keys = encoding.keys().head(0, head);
            let rows = (0..keys.count()).map(|p| keys.row(p)).chain(encoding.biases(head));
            rows.fold(true, |fine, row| fine & row::all_finite(level, row))
        })
    }
}
