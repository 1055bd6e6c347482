//! One chunk of query rows against one key tile: 96 rows at a time, six rows of them at a time.

use super::layout::{ROWS, Scratch};
use super::terms::RowGradient;
use super::{Chunk, Engine, Image};
use crate::element::Element;
use crate::exact::live_tiles;
use crate::exact::terms::Finish;
use crate::mask::Pattern;
use crate::simd::gradient::{self, Across, Differentiate};
use crate::simd::product::Form;
use crate::simd::tile::{self, GROUP, KEY_TILE, KeyWords, STEP, Scores, Values, Visible, padded};
use crate::simd::{pairs, row};
use crate::tensor::Rows;
use std::ops::Range;

/// Groups of keys of a tile.
const KEY_GROUPS: usize = KEY_TILE.div_ceil(GROUP);

/// Neighbouring key tiles for which rows are loaded once.
#[derive(Debug)]
pub(super) struct Stretch<'a> {
    /// What cells are.
    pub(super) form: Form,
    pub(super) positions: Range<usize>,
    /// Packed keys.
    pub(super) keys: &'a [f32],
    /// Packed values.
    pub(super) values: &'a [f32],
    /// Keys as rows of cells.
    pub(super) rows: &'a [f32],
}

/// One of them as the kernels read it.
#[derive(Debug)]
pub(super) struct KeyTile<'a> {
    pub(super) positions: Range<usize>,
    /// Its first key's place in the stretch.
    pub(super) first: usize,
    /// Packed keys.
    pub(super) keys: &'a [f32],
    /// Packed values.
    pub(super) values: &'a [f32],
    /// Keys as rows of cells.
    pub(super) rows: Rows<'a, f32>,
}

/// What a chunk is computed from and with.
pub(super) struct Work<'a> {
    /// Log-sum-exp and D of its rows.
    pub(super) statistics: &'a [f32],
    pub(super) image: &'a Image<'a>,
    pub(super) scratch: &'a mut [f32],
    /// Out: dK and dV, `[key][padded dim + padded value dim]`, then what rows give to a shared bias.
    pub(super) sums: &'a mut [f32],
}

impl<E: Element, K: Element> Engine<'_, E, K> {
    /// Adds to dQ of the chunk's rows what they get from a stretch of keys, and sums up what its keys
    /// and values get from them.
    pub(super) fn accumulate(&self, chunk: &Chunk, keys: &Stretch<'_>, work: Work<'_>) {
        let Work { statistics, image, scratch, sums } = work;
        let sizes = &self.call.sizes;
        let (sums, rest) = sums.split_at_mut(self.layout.sums);
        let (bias_sums, distance_sums) = rest.split_at_mut(self.layout.bias_sums);
        sums[..keys.positions.len() * self.layout.width].fill(0.0);
        bias_sums.fill(0.0);
        distance_sums.fill(0.0);
        let of = ((sizes.q.dim, sizes.value_dim), self.call.terms);
        let scratch = Scratch::new(self.form, scratch, of);
        let mut pass = Pass { engine: self, chunk, image, scratch, sums, bias_sums, distance_sums };
        for start in chunk.rows.clone().step_by(ROWS) {
            let rows = start..(start + ROWS).min(chunk.rows.end);
            let at = (chunk.site, self.positions(&rows));
            let own = start - chunk.rows.start..rows.end - chunk.rows.start;
            let statistics = statistics.split_at(self.layout.rows);
            let statistics = (&statistics.0[own.clone()], &statistics.1[own]);
            let mut tiles = 0;
            live_tiles(self.call.mask, at, keys.positions.clone(), &mut |positions, full| {
                if tiles == 0 {
                    pass.load(&rows);
                }
                tiles += 1;
                let tile = self.layout.tile(keys, positions);
                pass.compute(&rows, (&tile, full), statistics);
            });
            if tiles > 0 {
                pass.add_queries(&rows);
            }
        }
    }
}

impl<E: Element, K: Element> Engine<'_, E, K> {
    /// Adds rows `[row][padded dim]`, times the scale, to those of dQ.
    fn add_rows(&self, chunk: &Chunk, rows: &Range<usize>, (image, sums): (&Image<'_>, &[f32])) {
        let (level, dim) = (self.call.sizes.cpu.level, self.call.sizes.q.dim);
        for (i, sum) in rows.clone().zip(sums.chunks_exact(padded(dim))) {
            // SAFETY: rows belong to one chunk, and each chunk to one part.
            let d_q = unsafe { image.row(chunk, i) };
            row::blend(level, d_q, 1.0, &sum[..dim], self.call.scale);
        }
    }
}

/// A pass of one chunk over one stretch of keys.
struct Pass<'p, 's, E, K> {
    engine: &'p Engine<'p, E, K>,
    chunk: &'p Chunk,
    image: &'p Image<'p>,
    scratch: Scratch<'s>,
    sums: &'s mut [f32],
    bias_sums: &'s mut [f32],
    distance_sums: &'s mut [f32],
}

impl<E: Element, K: Element> Pass<'_, '_, E, K> {
    /// All products of up to 96 rows with one key tile.
    fn compute(
        &mut self,
        rows: &Range<usize>,
        (keys, full): (&KeyTile<'_>, bool),
        (logs, deltas): (&[f32], &[f32]),
    ) {
        let all = full && keys.positions.len().is_multiple_of(STEP);
        let mut words = [KeyWords::default(); ROWS];
        let mut bounds = [(0, rows.len()); KEY_GROUPS];
        if !all {
            self.fill(rows, keys, &mut words[..rows.len()]);
            row_bounds(&words[..rows.len()], &mut bounds);
        }
        if let Some(distances) = &mut self.scratch.distances {
            let last = self.engine.positions(rows).end - 1;
            let first = last - keys.positions.start as isize;
            distances.pack(self.chunk.site.q_head, first, rows.len());
        }
        for first in (0..rows.len()).step_by(GROUP) {
            let group = first..(first + GROUP).min(rows.len());
            let visible = match all {
                true => Visible::All(keys.positions.len()),
                false => Visible::Some(&words[group.clone()]),
            };
            let statistics = (&logs[group.clone()], &deltas[group.clone()]);
            let at = Group { keys, first: rows.start, rows: group, visible };
            if keys.first == 0 {
                self.prefetch(at.queries());
            }
            self.differentiate(&at, statistics);
            self.terms(&at);
            self.scratch.scores.round(&at.rows);
            self.scratch.gradients.round(&at.rows);
            self.queries(&at);
        }
        self.keys_and_values(keys, rows.len(), &bounds);
        self.distances(keys, rows);
    }

    /// Copies the rows' queries, turned around if the scale asks for it, and output gradients.
    fn load(&mut self, rows: &Range<usize>) {
        let call = self.engine.call;
        let (form, site) = (self.engine.form, self.chunk.site);
        let (dim, value_dim) = (call.sizes.q.dim, call.sizes.value_dim);
        let Scratch { queries, d_out, d_q, query_rows, d_out_rows, distances, .. } =
            &mut self.scratch;
        if let Some(distances) = distances {
            distances.clear(rows.len());
        }
        d_q[..rows.len() * padded(dim)].fill(0.0);
        let cells = queries.chunks_exact_mut(form.cells(dim));
        let d_cells = d_out.chunks_exact_mut(form.cells(value_dim));
        for (i, (query, d_out)) in rows.clone().zip(cells.zip(d_cells)) {
            self.engine.factor.load(form, call.q.row(site.batch, i, site.q_head), query);
            if let Some(distances) = distances {
                let at = (i - rows.start, site.q_head);
                distances.band.load(self.engine.factor, at, query);
            }
            form.load(call.d_out.row(site.batch, i, site.q_head), 1.0, d_out);
        }
        if let Form::Pairs(token) = form {
            for (cells, width, out) in [(queries, dim, query_rows), (d_out, value_dim, d_out_rows)]
            {
                let depth = form.cells(width);
                let cells = Rows::new(cells, depth, rows.len(), depth).expect("all rows");
                let out = &mut out[..form.cells(rows.len()) * width];
                pairs::pack_rows(token, cells, width, out);
            }
        }
    }

    /// Asks for what the next tile of rows will read, while this one is computed.
    fn prefetch(&self, rows: Range<usize>) {
        let (call, site) = (self.engine.call, self.chunk.site);
        let level = call.sizes.cpu.level;
        for i in rows.start + ROWS..(rows.end + ROWS).min(call.sizes.q.seq) {
            row::prefetch(level, call.q.row(site.batch, i, site.q_head));
            row::prefetch(level, call.d_out.row(site.batch, i, site.q_head));
            if i < self.chunk.rows.end {
                // SAFETY: rows belong to one chunk, and each chunk to one part.
                row::prefetch(level, unsafe { self.image.row(self.chunk, i) });
            }
        }
    }

    /// One bit for each (row, key) that the mask allows.
    fn fill(&self, rows: &Range<usize>, keys: &KeyTile<'_>, words: &mut [KeyWords]) {
        let used = keys.positions.len().div_ceil(64);
        for (words, i) in words.iter_mut().zip(self.engine.positions(rows)) {
            let (mask, positions) = (self.engine.call.mask, keys.positions.clone());
            mask.fill(self.chunk.site, i, positions, &mut words[..used]);
        }
    }

    /// P (after dropout) and dS of a group of rows.
    fn differentiate(&mut self, at: &Group<'_>, (lse, delta): (&[f32], &[f32])) {
        let call = self.engine.call;
        let (level, visible) = (call.sizes.cpu.level, at.visible);
        let form = self.engine.form;
        let Scratch { queries, d_out, scores, gradients, bend, distances, .. } = &mut self.scratch;
        let (scores, gradients) = (scores.group(&at.rows), gradients.group(&at.rows));
        let mut max = [0.0; GROUP];
        let rows = at.rows.len();
        let mut product = |queries, depth, keys, hidden, out: &mut [f32]| {
            let (stride, max, out_stride) = (depth, &mut max, KEY_TILE);
            let product = Scores {
                queries,
                stride,
                rows,
                depth,
                keys,
                visible,
                hidden,
                out,
                out_stride,
                max,
            };
            tile::scores(form, product);
        };
        let (depth, value_depth) = (form.cells(call.sizes.q.dim), form.cells(call.sizes.value_dim));
        let (keys, values) = (at.keys.keys, at.keys.values);
        product(&queries[at.part(depth)], depth, keys, f32::NEG_INFINITY, scores);
        product(&d_out[at.part(value_depth)], value_depth, values, 0.0, gradients);
        let distances = distances.as_mut();
        let by_distance = distances.map(|x| x.band.products(at.rows.clone(), visible, None));
        let sites = at.queries().map(|i| self.engine.row_site(self.chunk, i));
        let positions = &at.keys.positions;
        let finish = Finish {
            level,
            factor: self.engine.factor,
            heads: call.sizes.q.heads,
            positions: positions.clone(),
            visible,
            by_distance,
            scores,
            max: &mut max,
            bend: call.terms.softcap.is_some().then_some(bend),
        };
        let factor = call.terms.finish(sites.clone(), finish);
        call.terms.drop(level, sites.clone(), positions, gradients);
        let args = Differentiate { scores, gradients, visible, factor, lse, delta };
        gradient::differentiate(level, args);
        call.terms.drop(level, sites, positions, scores);
    }

    /// Gives dS of a group of rows to the gradients of terms, then takes it through the cap.
    fn terms(&mut self, at: &Group<'_>) {
        let terms = self.engine.call.terms;
        if terms.plain() {
            return;
        }
        let Scratch { gradients, bend, .. } = &mut self.scratch;
        let gradients = gradients.group(&at.rows);
        for (i, values) in at.queries().zip(gradients.chunks_exact(KEY_TILE)) {
            let position = self.engine.row_site(self.chunk, i).position;
            let values = &values[..at.keys.positions.len()];
            let row = RowGradient { i, position, values };
            self.engine.add_terms(self.chunk, at.keys, &row, self.bias_sums);
        }
        if terms.softcap.is_some() {
            let level = self.engine.call.sizes.cpu.level;
            gradient::bend(level, gradients, bend, at.visible.all_steps());
        }
    }

    /// dQ += dS K for a group of rows, without the scale.
    fn queries(&mut self, at: &Group<'_>) {
        let call = self.engine.call;
        let Scratch { gradients, d_q, distances, .. } = &mut self.scratch;
        if let Some(distances) = distances {
            distances.add(&at.rows, at.visible, gradients.group(&at.rows));
        }
        let out = &mut d_q[at.part(padded(call.sizes.q.dim))];
        let (probabilities, visible) = (&*gradients.group(&at.rows), at.visible);
        let (values, rescale) = (at.keys.rows, &[1.0; GROUP]);
        let args = Values { probabilities, visible, values, rescale, out };
        tile::values(self.engine.form, args);
    }

    /// Adds what the rows got from a stretch of keys to dQ, times the scale.
    fn add_queries(&mut self, rows: &Range<usize>) {
        let width = padded(self.engine.call.sizes.q.dim);
        let Scratch { d_q, distances, .. } = &mut self.scratch;
        let d_q = &mut d_q[..rows.len() * width];
        let by_distance = distances.as_mut().map(|distances| distances.queries(rows.len()));
        self.engine.add_rows(self.chunk, rows, (self.image, d_q));
        if let Some(by_distance) = by_distance {
            self.engine.add_rows(self.chunk, rows, (self.image, by_distance));
            self.engine.add_biases(self.chunk, d_q, by_distance);
        }
    }

    /// Adds what keys by distance get from the rows to the chunk's sums, without the scale.
    fn distances(&mut self, keys: &KeyTile<'_>, rows: &Range<usize>) {
        let call = self.engine.call;
        if let Some(distances) = &self.scratch.distances
            && call.terms_out.relative_keys.is_some()
        {
            let first = self.chunk.rows.end - rows.end + keys.first;
            distances.add_keys(&mut self.distance_sums[first * padded(call.sizes.q.dim)..]);
        }
    }

    /// dK += dSᵀ Q and dV += Pᵀ dO, without the scale.
    fn keys_and_values(&mut self, keys: &KeyTile<'_>, rows: usize, bounds: &[(usize, usize)]) {
        let sizes = &self.engine.call.sizes;
        let (form, first) = (self.engine.form, keys.first * self.engine.layout.width);
        let keys = keys.positions.len();
        let bounds = &bounds[..keys.div_ceil(GROUP)];
        let Scratch { queries, d_out, query_rows, d_out_rows, scores, gradients, .. } =
            &self.scratch;
        let (queries, d_out) = match form {
            Form::Numbers(_) => (queries, d_out),
            Form::Pairs(_) => (query_rows, d_out_rows),
        };
        let out_stride = self.engine.layout.width;
        let matrix = |floats, width| {
            Rows::new(floats, width, form.cells(rows), width).expect("a tile's rows")
        };
        let (weights, rows) = (gradients.across(), matrix(queries, sizes.q.dim));
        let out = &mut self.sums[first..];
        gradient::across(form, Across { weights, rows, bounds, keys, out, out_stride });
        let (weights, rows) = (scores.across(), matrix(d_out, sizes.value_dim));
        let out = &mut self.sums[first + padded(sizes.q.dim)..];
        gradient::across(form, Across { weights, rows, bounds, keys, out, out_stride });
    }
}

/// Up to six rows.
struct Group<'a> {
    keys: &'a KeyTile<'a>,
    /// The query of row 0.
    first: usize,
    rows: Range<usize>,
    visible: Visible<'a>,
}

impl Group<'_> {
    /// Their part of a matrix of the tile's rows.
    fn part(&self, width: usize) -> Range<usize> {
        self.rows.start * width..self.rows.end * width
    }

    fn queries(&self) -> Range<usize> {
        self.first + self.rows.start..self.first + self.rows.end
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
