//! The memory of one key/value head: what queries read of it, and what a segment writes to it.
//!
//! ```text
//! den_t = σ(q_t) · z        read_t = Mᵀ σ(q_t)        out_t ← (1 − g) out_t + (g / den_t) read_t
//! M ← M + Σ_t σ(k_t) v_tᵀ        z ← z + Σ_t σ(k_t)        sums of a segment apart, so that their errors do not grow
//! ```
//!
//! Rows are mapped 32 at a time; no bit of a row depends on that.

use super::super::Gate;
use super::{Empty, Update};
use crate::element::Element;
use crate::exact::state::reciprocal;
use crate::linear::{BLOCK, FeatureMap, take};
use crate::simd::sweep::{Decay, Layout, NARROW, Read, Sweep, TokenRows, Write, padded, sweep};
use crate::simd::token::{Features, accumulate, denominators, gather};
use crate::simd::{Level, row};
use crate::tensor::{Patch, Rows};
use std::ops::Range;

/// Numbers of a key and of a value.
#[derive(Debug, Clone, Copy)]
pub(super) struct Dims {
    pub(super) key: usize,
    pub(super) value: usize,
}

impl Dims {
    /// Numbers of a padded key and of a padded value.
    pub(super) fn strides(self) -> (usize, usize) {
        (padded(self.key), padded(self.value))
    }

    /// Where a matrix whose rows are key channels lies, and its transpose.
    pub(super) fn layouts(self) -> (Layout, Layout) {
        let packed = |rows, columns| Layout::packed(rows, columns, NARROW);
        (packed(self.key, self.value), packed(self.value, self.key))
    }

    /// Numbers of a memory as it is kept between segments.
    pub(super) fn floats(self) -> usize {
        self.key * (self.value + 1)
    }
}

/// So few tokens read a memory as it lies.
const IN_PLACE: usize = 3;

/// The blocks of so many tokens.
pub(super) fn blocks(count: usize) -> impl Iterator<Item = Range<usize>> {
    (0..count).step_by(BLOCK).map(move |first| first..count.min(first + BLOCK))
}

/// Whether a memory holds nothing.
pub(super) fn holds_nothing(sums: &[f32]) -> bool {
    sums.iter().all(|&z| z == 0.0)
}

/// A memory in the form in which kernels read it, and what a thread writes to meanwhile.
pub(super) struct Head<'a> {
    level: Level,
    dims: Dims,
    matrix: &'a mut [f32],
    layout: Layout,
    z: &'a mut [f32],
    sum: &'a mut [f32],
    z_sum: &'a mut [f32],
    rows: &'a mut [f32],
    zeros: &'a mut [f32],
    values: &'a mut [f32],
    read: &'a mut [f32],
    den: &'a mut [f32],
}

impl<'a> Head<'a> {
    /// Numbers that a thread needs.
    pub(super) fn floats(dims: Dims) -> usize {
        let (keys, values) = dims.strides();
        2 * dims.key * values + 2 * keys + BLOCK * (2 * keys + 2 * values + 1)
    }

    /// Packs a dense memory.
    pub(super) fn load(
        floats: &'a mut [f32],
        dims: Dims,
        level: Level,
        (matrix, sums): (&[f32], &[f32]),
    ) -> Head<'a> {
        let (mut floats, values) = (floats, dims.strides().1);
        let packed = take(&mut floats, dims.key * values);
        let layout = dims.layouts().0;
        layout.pack(matrix, dims.value, packed);
        Head::over((packed, layout), floats, (dims, level), sums)
    }

    /// A memory that few tokens read: dense, where it lies, if its rows are whole vectors.
    pub(super) fn borrow(
        tokens: usize,
        floats: &'a mut [f32],
        (dims, level): (Dims, Level),
        (matrix, sums): (&'a mut [f32], &[f32]),
    ) -> Head<'a> {
        if tokens > IN_PLACE || dims.value != padded(dims.value) {
            return Head::load(floats, dims, level, (matrix, sums));
        }
        let dense = (matrix, Layout::dense(dims.key, dims.value));
        Head::over(dense, floats, (dims, level), sums)
    }

    fn over(
        (matrix, layout): (&'a mut [f32], Layout),
        mut floats: &'a mut [f32],
        (dims, level): (Dims, Level),
        sums: &[f32],
    ) -> Head<'a> {
        let (keys, values) = dims.strides();
        let floats = &mut floats;
        let head = Head {
            level,
            dims,
            matrix,
            layout,
            z: take(floats, keys),
            sum: take(floats, dims.key * values),
            z_sum: take(floats, keys),
            rows: take(floats, BLOCK * keys),
            zeros: take(floats, BLOCK * keys),
            values: take(floats, BLOCK * values),
            read: take(floats, BLOCK * values),
            den: take(floats, BLOCK),
        };
        head.z[..dims.key].copy_from_slice(sums);
        head.z[dims.key..].fill(0.0);
        head.zeros.fill(0.0);
        head
    }

    /// The inverse of [`Head::load`].
    pub(super) fn store(&self, (matrix, sums): (&mut [f32], &mut [f32])) {
        self.layout.unpack(self.matrix, matrix, self.dims.value);
        sums.copy_from_slice(&self.z[..self.dims.key]);
    }

    /// Mixes what queries read into their outputs: rows of the `own`-th head of a patch, from `first` on.
    pub(super) fn read<E: Element>(
        &mut self,
        q: Rows<'_, E>,
        (out, first, own): (&mut Patch<'_, E>, usize, usize),
        (gate, empty): (Gate, Empty),
    ) {
        let nothing = holds_nothing(self.z);
        if nothing && empty == Empty::Bypassed {
            return;
        }
        let stride = self.dims.strides().1;
        if nothing {
            self.read.fill(0.0);
            self.den.fill(0.0);
        }
        for block in blocks(q.count()) {
            if !nothing {
                gather(self.level, q.slice(block.clone()), FeatureMap::EluPlusOne, self.rows);
                self.read_rows(block.len());
            }
            for (t, at) in block.enumerate() {
                let share = gate.memory * reciprocal(self.den[t]);
                let to = out.row(first + at, own);
                row::mix(self.level, to, gate.local, &self.read[t * stride..], share);
            }
        }
    }

    /// What the mapped rows read, and their denominators.
    fn read_rows(&mut self, len: usize) {
        let keys = self.dims.strides().0;
        let rows = Features { q: self.rows, k: self.zeros, stride: keys };
        denominators(self.level, rows, 0.0, self.z, &mut self.den[..len]);
        let by = TokenRows { data: self.rows, stride: keys };
        let read = Read { by, out: self.read };
        sweep(self.level, plain((self.matrix, self.layout), len, None, Some(read)));
    }

    /// Adds a segment.
    pub(super) fn write<E: Element>(&mut self, k: Rows<'_, E>, v: Rows<'_, E>, update: Update) {
        let (keys, values) = self.dims.strides();
        let subtract = update == Update::Delta && !holds_nothing(self.z);
        self.sum.fill(0.0);
        self.z_sum.fill(0.0);
        for block in blocks(k.count()) {
            let len = block.len();
            gather(self.level, k.slice(block.clone()), FeatureMap::EluPlusOne, self.rows);
            gather(self.level, v.slice(block), FeatureMap::Identity, self.values);
            if subtract {
                self.read_rows(len);
                for t in 0..len {
                    let (row, read) = (t * values..(t + 1) * values, &self.read[t * values..]);
                    let less = -reciprocal(self.den[t]);
                    row::mix(self.level, &mut self.values[row], 1.0, read, less);
                }
            }
            let rows = Features { q: self.zeros, k: self.rows, stride: keys };
            denominators(self.level, rows, 0.0, self.z_sum, &mut self.den[..len]);
            let product = write((self.rows, keys), (self.values, values));
            let sum = (&mut *self.sum, self.dims.layouts().0);
            sweep(self.level, plain(sum, len, Some(product), None));
        }
        accumulate(self.level, self.sum, self.matrix);
        accumulate(self.level, self.z_sum, self.z);
    }
}

/// An outer product for each token, of rows with their strides.
pub(super) fn write<'a>(rows: (&'a [f32], usize), columns: (&'a [f32], usize)) -> Write<'a> {
    let of = |(data, stride)| TokenRows { data, stride };
    Write { rows: of(rows), columns: of(columns) }
}

/// A sweep without decay.
pub(super) fn plain<'a>(
    (state, layout): (&'a mut [f32], Layout),
    tokens: usize,
    write: Option<Write<'a>>,
    read: Option<Read<'a>>,
) -> Sweep<'a> {
    let decay = Decay::None;
    Sweep {
        state,
        layout,
        tokens,
        reverse: false,
        decay,
        before: None,
        write,
        read,
        after: None,
        near: None,
    }
}
