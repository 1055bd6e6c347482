//! One chunk of query rows against one key tile: 96 rows at a time, six rows of them at a time.

use super::layout::{ROWS, Scratch};
use super::{Chunk, Engine, Image};
use crate::element::Element;
use crate::exact::live_tiles;
use crate::mask::Pattern;
use crate::simd::gradient::{self, Across, Differentiate};
use crate::simd::row;
use crate::simd::tile::{
    self, GROUP, KEY_TILE, KeyWords, STEP, Scores, Values, Visible, padded,
};
use crate::tensor::Rows;
use std::ops::Range;

/// Groups of keys of a tile.
const KEY_GROUPS: usize = KEY_TILE.div_ceil(GROUP);

/// A key tile as the kernels read it.
#[derive(Debug)]
pub(super) struct KeyTile<'a> {
    pub(super) positions: Range<usize>,
    /// Packed keys.
    pub(super) keys: &'a [f32],
    /// Packed values.
    pub(super) values: &'a [f32],
    /// Keys as rows.
    pub(super) rows: Rows<'a, f32>,
}

/// What a chunk is computed from and with.
pub(super) struct Work<'a> {
    /// Log-sum-exp and D of its rows.
    pub(super) statistics: &'a [f32],
    pub(super) image: &'a Image<'a>,
    pub(super) scratch: &'a mut [f32],
    /// Out: dK and dV, `[key][padded dim + padded value dim]`.
    pub(super) sums: &'a mut [f32],
}

impl<E: Element, K: Element> Engine<'_, E, K> {
    /// Adds to dQ of the chunk's rows what they get from a key tile, and sums up what its keys and
    /// values get from them.
    pub(super) fn accumulate(&self, chunk: &Chunk, keys: &KeyTile<'_>, work: Work<'_>) {
        let Work { statistics, image, scratch, sums } = work;
        let sizes = &self.call.sizes;
        sums[..keys.positions.len() * self.layout.width].fill(0.0);
        let (logs, deltas) = statistics.split_at(self.layout.rows);
        let mut pass = Pass {
            engine: self,
            chunk,
            keys,
            image,
            scratch: Scratch::new(scratch, sizes.q.dim, sizes.value_dim),
            sums,
        };
        for start in chunk.rows.clone().step_by(ROWS) {
            let rows = start..(start + ROWS).min(chunk.rows.end);
            let at = (chunk.site, self.positions(&rows));
            let mut coverage = None;
            live_tiles(self.call.mask, at, keys.positions.clone(), &mut |_, full| {
                coverage = Some(full);
            });
            if let Some(full) = coverage {
                let own = start - chunk.rows.start..rows.end - chunk.rows.start;
                pass.compute(rows, full, (&logs[own.clone()], &deltas[own]));
            }
        }
    }
}

/// A pass of one chunk over one key tile.
struct Pass<'p, 's, E, K> {
    engine: &'p Engine<'p, E, K>,
    chunk: &'p Chunk,
    keys: &'p KeyTile<'p>,
    image: &'p Image<'p>,
    scratch: Scratch<'s>,
    sums: &'s mut [f32],
}

impl<E: Element, K: Element> Pass<'_, '_, E, K> {
    /// All products of up to 96 rows.
    fn compute(&mut self, rows: Range<usize>, full: bool, (logs, deltas): (&[f32], &[f32])) {
        self.load(&rows);
        let all = full && self.keys.positions.len().is_multiple_of(STEP);
        let mut words = [KeyWords::default(); ROWS];
        let mut bounds = [(0, rows.len()); KEY_GROUPS];
        if !all {
            self.fill(&rows, &mut words[..rows.len()]);
            row_bounds(&words[..rows.len()], &mut bounds);
        }
        for first in (0..rows.len()).step_by(GROUP) {
            let group = first..(first + GROUP).min(rows.len());
            let visible = match all {
                true => Visible::All(self.keys.positions.len()),
                false => Visible::Some(&words[group.clone()]),
            };
            let statistics = (&logs[group.clone()], &deltas[group.clone()]);
            self.differentiate(group.clone(), visible, statistics);
            self.queries(rows.start, group, visible);
        }
        self.keys_and_values(rows.len(), &bounds);
    }

    /// Copies the rows' queries, turned around if the scale asks for it, and output gradients.
    fn load(&mut self, rows: &Range<usize>) {
        let call = self.engine.call;
        let (level, site) = (call.sizes.cpu.level, self.chunk.site);
        let Scratch { queries, d_out, .. } = &mut self.scratch;
        let queries = queries.chunks_exact_mut(call.sizes.q.dim);
        let d_outs = d_out.chunks_exact_mut(call.sizes.value_dim);
        for (i, (query, d_out)) in rows.clone().zip(queries.zip(d_outs)) {
            let q = call.q.row(site.batch, i, site.q_head);
            self.engine.factor.load(level, q, query);
            row::widen(level, call.d_out.row(site.batch, i, site.q_head), d_out);
        }
    }

    /// One bit for each (row, key) that the mask allows.
    fn fill(&self, rows: &Range<usize>, words: &mut [KeyWords]) {
        let used = self.keys.positions.len().div_ceil(64);
        for (words, i) in words.iter_mut().zip(self.engine.positions(rows)) {
            let (mask, keys) = (self.engine.call.mask, self.keys.positions.clone());
            mask.fill(self.chunk.site, i, keys, &mut words[..used]);
        }
    }

    /// P and dS of a group of rows.
    fn differentiate(
        &mut self,
        group: Range<usize>,
        visible: Visible<'_>,
        (lse, delta): (&[f32], &[f32]),
    ) {
        let sizes = &self.engine.call.sizes;
        let level = sizes.cpu.level;
        let part = |width: usize| group.start * width..group.end * width;
        let Scratch { queries, d_out, scores, gradients, .. } = &mut self.scratch;
        let scores = &mut scores[part(KEY_TILE)];
        let gradients = &mut gradients[part(KEY_TILE)];
        let mut max = [0.0; GROUP];
        let of_scores = Scores {
            queries: &queries[part(sizes.q.dim)],
            depth: sizes.q.dim,
            keys: self.keys.keys,
            visible,
            hidden: f32::NEG_INFINITY,
            out: scores,
            max: &mut max,
        };
        tile::scores(level, of_scores);
        let of_gradients = Scores {
            queries: &d_out[part(sizes.value_dim)],
            depth: sizes.value_dim,
            keys: self.keys.values,
            visible,
            hidden: 0.0,
            out: gradients,
            max: &mut max,
        };
        tile::scores(level, of_gradients);
        let factor = self.engine.factor.factor;
        let args = Differentiate { scores, gradients, visible, factor, lse, delta };
        gradient::differentiate(level, args);
    }

    /// dQ += scale · dS K for a group of rows.
    fn queries(&mut self, first: usize, group: Range<usize>, visible: Visible<'_>) {
        let call = self.engine.call;
        let (level, dim) = (call.sizes.cpu.level, call.sizes.q.dim);
        let Scratch { gradients, d_q, .. } = &mut self.scratch;
        let out = &mut d_q[..group.len() * padded(dim)];
        out.fill(0.0);
        let probabilities = &gradients[group.start * KEY_TILE..group.end * KEY_TILE];
        let (values, rescale) = (self.keys.rows, &[1.0; GROUP]);
        tile::values(level, Values { probabilities, visible, values, rescale, out });
        for (r, sum) in group.zip(d_q.chunks_exact(padded(dim))) {
            // SAFETY: rows belong to one chunk, and each chunk to one part.
            let d_q = unsafe { self.image.row(self.chunk, first + r) };
            row::blend(level, d_q, 1.0, &sum[..dim], call.scale);
        }
    }

    /// dK += dSᵀ Q and dV += Pᵀ dO, without the scale.
    fn keys_and_values(&mut self, rows: usize, bounds: &[(usize, usize)]) {
        let sizes = &self.engine.call.sizes;
        let (level, keys) = (sizes.cpu.level, self.keys.positions.len());
        let bounds = &bounds[..keys.div_ceil(GROUP)];
        let Scratch { queries, d_out, scores, gradients, .. } = &self.scratch;
        let out_stride = self.engine.layout.width;
        let matrix = |floats, width| Rows::new(floats, width, rows, width).expect("a tile's rows");
        let queries = matrix(queries, sizes.q.dim);
        let out = &mut *self.sums;
        let args = Across { weights: gradients, rows: queries, bounds, keys, out, out_stride };
        gradient::across(level, args);
        let d_out = matrix(d_out, sizes.value_dim);
        let out = &mut self.sums[padded(sizes.q.dim)..];
        let args = Across { weights: scores, rows: d_out, bounds, keys, out, out_stride };
        gradient::across(level, args);
    }
}

/// For each group of keys the first row that sees one of them and the one after the last.
fn row_bounds(words: &[KeyWords], bounds: &mut [(usize, usize); KEY_GROUPS]) {
    bounds.fill((words.len(), 0));
    let mut first_seen = KeyWords::default();
    for (r, words) in words.iter().enumerate() {
        each_new(&mut first_seen, words, |group| bounds[group].0 = bounds[group].0.min(r));
    }
    let mut last_seen = KeyWords::default();
    for (r, words) in words.iter().enumerate().rev() {
        each_new(&mut last_seen, words, |group| bounds[group].1 = bounds[group].1.max(r + 1));
    }
}

/// Calls `visit` with the group of each key whose bit is not yet in `seen`, and adds it there.
fn each_new(seen: &mut KeyWords, words: &KeyWords, mut visit: impl FnMut(usize)) {
    for (w, (seen, &word)) in seen.iter_mut().zip(words).enumerate() {
        let mut new = word & !*seen;
        *seen |= word;
        while new != 0 {
            visit((w * 64 + new.trailing_zeros() as usize) / GROUP);
            new &= new - 1;
        }
    }
}
