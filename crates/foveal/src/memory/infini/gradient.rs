//! Gradients of what the queries of one segment read of one memory, and of what its keys and values write.
//!
//! The formulas are those of [`backward`](super::backward), 32 tokens at a time.

use super::super::Gate;
use super::Update;
use super::head::{Dims, blocks, holds_nothing, plain, write};
use crate::element::Element;
use crate::linear::{BLOCK, FeatureMap, take};
use crate::simd::sweep::{Layout, Read, TokenRows, sweep};
use crate::simd::token::{
    Features, Normaliser, accumulate, denominators, derive, divide, dots, gather,
    normalise_queries, scale,
};
use crate::simd::{Level, row};
use crate::tensor::{Patch, Rows};

/// The rows of one head that gradients of the memory go to.
pub(super) struct Patches<'a, E> {
    pub(super) q: Patch<'a, E>,
    pub(super) k: Patch<'a, E>,
    pub(super) v: Patch<'a, E>,
    /// Whether those of queries and keys come from the memory alone.
    pub(super) whole: bool,
}

/// What a thread writes to.
pub(super) struct Scratch<'a> {
    /// M and Mᵀ of what is read.
    matrix: &'a mut [f32],
    transposed: &'a mut [f32],
    /// dM of what is written, and its transpose.
    after: &'a mut [f32],
    after_transposed: &'a mut [f32],
    /// What this segment's reads add to dM, and to dz.
    sum: &'a mut [f32],
    d_z_sum: &'a mut [f32],
    z: &'a mut [f32],
    d_z: &'a mut [f32],
    rows: &'a mut [f32],
    zeros: &'a mut [f32],
    features: &'a mut [f32],
    more: &'a mut [f32],
    values: &'a mut [f32],
    read: &'a mut [f32],
    den: &'a mut [f32],
    h: &'a mut [f32],
}

impl<'a> Scratch<'a> {
    pub(super) fn floats(dims: Dims) -> usize {
        let (keys, values) = dims.strides();
        let matrices = 3 * dims.key * values + 2 * dims.value * keys;
        matrices + 3 * keys + BLOCK * (4 * keys + 2 * values + 2)
    }

    pub(super) fn take(mut floats: &'a mut [f32], dims: Dims) -> Scratch<'a> {
        let (keys, values) = dims.strides();
        let floats = &mut floats;
        let scratch = Scratch {
            matrix: take(floats, dims.key * values),
            transposed: take(floats, dims.value * keys),
            after: take(floats, dims.key * values),
            after_transposed: take(floats, dims.value * keys),
            sum: take(floats, dims.key * values),
            d_z_sum: take(floats, keys),
            z: take(floats, keys),
            d_z: take(floats, keys),
            rows: take(floats, BLOCK * keys),
            zeros: take(floats, BLOCK * keys),
            features: take(floats, BLOCK * keys),
            more: take(floats, BLOCK * keys),
            values: take(floats, BLOCK * values),
            read: take(floats, BLOCK * values),
            den: take(floats, BLOCK),
            h: take(floats, BLOCK),
        };
        for numbers in [&mut *scratch.sum, scratch.d_z_sum, scratch.zeros, scratch.more] {
            numbers.fill(0.0);
        }
        scratch
    }
}

impl Scratch<'_> {
    /// den = rows · z; a row that reads nothing is divided by infinity.
    fn denominators(&mut self, level: Level, len: usize) {
        let rows = Features { q: self.rows, k: self.zeros, stride: self.z.len() };
        denominators(level, rows, 0.0, self.z, &mut self.den[..len]);
        self.den[..len].iter_mut().filter(|den| **den == 0.0).for_each(|den| *den = f32::INFINITY);
    }

    /// values ← v − r.
    fn subtract(&mut self, level: Level, len: usize, layout: Layout) {
        let (keys, values) = (self.z.len(), layout.columns);
        self.denominators(level, len);
        read_of(level, (self.matrix, layout), (self.rows, keys, len), self.read);
        for t in 0..len {
            let (own, less) = (t * values..(t + 1) * values, -1.0 / self.den[t]);
            row::mix(level, &mut self.values[own.clone()], 1.0, &self.read[own], less);
        }
    }

    /// Gradients of what the mapped rows read, `values` being those of the reads: of the rows to `more`, and `factor` times
    /// what they add to dM and dz. Returns Σ values ∘ read.
    fn back_through_reads(&mut self, level: Level, dims: Dims, len: usize, factor: f32) -> f64 {
        let ((keys, values), (layout, transposed)) = (dims.strides(), dims.layouts());
        self.denominators(level, len);
        let u = &mut self.values[..len * values];
        divide(level, &self.den[..len], u);
        read_of(level, (self.transposed, transposed), (u, values, len), self.more);
        let (den, h) = (&self.den[..len], &mut self.h[..len]);
        let rows = Features { q: self.rows, k: self.zeros, stride: keys };
        normalise_queries(level, rows, Normaliser { den, h }, self.z, self.more);
        let read = |(&h, &den): (&f32, &f32)| match den {
            f32::INFINITY => 0.0,
            _ => -f64::from(h) * f64::from(den),
        };
        let sum = h.iter().zip(den).map(read).sum();
        scale(level, factor, u);
        let product = write((self.rows, keys), (u, values));
        sweep(level, plain((self.sum, layout), len, Some(product), None));
        for (row, h) in self.rows.chunks_exact(keys).zip(h) {
            row::mix(level, self.d_z_sum, 1.0, row, factor * *h);
        }
        sum
    }
}

/// One key/value head of one segment.
pub(super) struct Back<'a, E> {
    pub(super) level: Level,
    pub(super) dims: Dims,
    pub(super) scratch: Scratch<'a>,
    pub(super) d: Patches<'a, E>,
}

/// Adds rows of gradients, `factor` times, or writes them.
fn put<E: Element>(
    (level, patch, own): (Level, &mut Patch<'_, E>, usize),
    (first, count): (usize, usize),
    (from, stride): (&[f32], usize),
    (factor, write): (f32, bool),
) {
    for t in 0..count {
        let (to, from) = (patch.row(first + t, own), &from[t * stride..]);
        match write {
            true => row::scale_into(level, from, factor, to),
            false => row::mix(level, to, 1.0, from, factor),
        }
    }
}

impl<E: Element> Back<'_, E> {
    /// Packs M_{s−1} and dM_s.
    pub(super) fn load(&mut self, before: (&[f32], &[f32]), after: (&[f32], &[f32])) {
        let (layout, transposed) = self.dims.layouts();
        let scratch = &mut self.scratch;
        layout.pack(before.0, self.dims.value, scratch.matrix);
        transposed.pack_transposed(before.0, scratch.transposed);
        layout.pack(after.0, self.dims.value, scratch.after);
        transposed.pack_transposed(after.0, scratch.after_transposed);
        for (to, from) in [(&mut *scratch.z, before.1), (scratch.d_z, after.1)] {
            to[..from.len()].copy_from_slice(from);
            to[from.len()..].fill(0.0);
        }
    }

    /// dM_{s−1} = dM_s and what was read.
    pub(super) fn store(&mut self, (matrix, sums): (&mut [f32], &mut [f32])) {
        let Scratch { after, sum, d_z, d_z_sum, .. } = &mut self.scratch;
        accumulate(self.level, sum, after);
        accumulate(self.level, d_z_sum, d_z);
        self.dims.layouts().0.unpack(after, matrix, self.dims.value);
        sums.copy_from_slice(&d_z[..sums.len()]);
    }

    /// Gradients of keys that nothing is written of.
    pub(super) fn no_writes(&mut self, tokens: usize) {
        if self.d.whole {
            (0..tokens).for_each(|t| self.d.k.row(t, 0).fill(E::default()));
        }
    }

    /// Gradients of what the segment wrote.
    pub(super) fn writes(&mut self, (k, v): (Rows<'_, E>, Rows<'_, E>), update: Update) {
        let (level, (layout, transposed)) = (self.level, self.dims.layouts());
        let (keys, values) = self.dims.strides();
        let subtract = update == Update::Delta && !holds_nothing(self.scratch.z);
        for block in blocks(k.count()) {
            let (first, len) = (block.start, block.len());
            let scratch = &mut self.scratch;
            gather(level, k.slice(block.clone()), FeatureMap::EluPlusOne, scratch.rows);
            gather(level, v.slice(block), FeatureMap::Identity, scratch.values);
            if subtract {
                scratch.subtract(level, len, layout);
            }
            let Scratch { after, after_transposed, rows, values: v, read, features, d_z, .. } =
                scratch;
            read_of(level, (after_transposed, transposed), (v, values, len), features);
            for features in features[..len * keys].chunks_exact_mut(keys) {
                accumulate(level, d_z, features);
            }
            read_of(level, (after, layout), (rows, keys, len), read);
            put((level, &mut self.d.v, 0), (first, len), (read, values), (1.0, false));
            if subtract {
                scale(level, -1.0, &mut read[..len * values]);
                scratch.values[..len * values].copy_from_slice(&scratch.read[..len * values]);
                scratch.back_through_reads(level, self.dims, len, 1.0);
                let Scratch { more, features, .. } = &mut self.scratch;
                accumulate(level, more, &mut features[..len * keys]);
            }
            let Scratch { rows, features, .. } = &mut self.scratch;
            let own = ..len * keys;
            derive(level, FeatureMap::EluPlusOne, &rows[own], &mut features[own]);
            let write = self.d.whole;
            put((level, &mut self.d.k, 0), (first, len), (features, keys), (1.0, write));
        }
    }

    /// Gradients of what the `own`-th query head read: `[queries, gradient of outputs, local outputs]`. Returns
    /// Σ dA ∘ (A_mem − A_dot), or 0 if there is no gate.
    pub(super) fn reads(&mut self, rows: [Rows<'_, E>; 3], own: usize, gate: Option<Gate>) -> f64 {
        let [q, d_out, local] = rows;
        let level = self.level;
        let (keys, values) = self.dims.strides();
        let nothing = holds_nothing(self.scratch.z);
        if nothing && self.d.whole {
            (0..q.count()).for_each(|t| self.d.q.row(t, own).fill(E::default()));
        }
        let Some(gate) = gate else { return 0.0 };
        let mut sum = 0.0;
        for block in blocks(q.count()) {
            let (first, len) = (block.start, block.len());
            let scratch = &mut self.scratch;
            gather(level, d_out.slice(block.clone()), FeatureMap::Identity, scratch.values);
            gather(level, local.slice(block.clone()), FeatureMap::Identity, scratch.read);
            let own_rows = ..len * values;
            let (d, a) = (&scratch.values[own_rows], &scratch.read[own_rows]);
            dots(level, d, a, &mut scratch.h[..len]);
            sum -= scratch.h[..len].iter().map(|&x| f64::from(x)).sum::<f64>();
            if nothing {
                continue;
            }
            gather(level, q.slice(block), FeatureMap::EluPlusOne, scratch.rows);
            sum += scratch.back_through_reads(level, self.dims, len, gate.memory);
            let Scratch { rows, more, .. } = scratch;
            derive(level, FeatureMap::EluPlusOne, &rows[..len * keys], &mut more[..len * keys]);
            let (to, how) = ((level, &mut self.d.q, own), (gate.memory, self.d.whole));
            put(to, (first, len), (more, keys), how);
        }
        sum
    }
}

/// Mᵀ of the state by rows.
fn read_of(
    level: Level,
    (state, layout): (&mut [f32], Layout),
    (by, stride, len): (&[f32], usize, usize),
    out: &mut [f32],
) {
    let by = TokenRows { data: by, stride };
    sweep(level, plain((state, layout), len, None, Some(Read { by, out })));
}
