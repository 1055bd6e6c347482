//! Tensors in any layout, with numbers that would be noticed around them.

use super::case::Layout;
use crate::numbers::Numbers;
use foveal::{Element, Shape, Strides, TensorMut, TensorRef};

/// A tensor and the memory that it lies in.
#[derive(Debug, Clone)]
pub(super) struct Memory<E> {
    data: Vec<E>,
    shape: Shape,
    strides: Strides,
    skip: usize,
}

impl<E: Element> Memory<E> {
    /// NaN everywhere.
    pub(super) fn new(shape: Shape, layout: Layout) -> Memory<E> {
        let extents = [shape.batch, shape.seq, shape.heads];
        let mut strides = [0; 3];
        let mut reach = shape.dim + layout.gap;
        for axis in layout.order {
            strides[axis] = reach;
            reach = reach * extents[axis].max(1) + layout.gap;
        }
        if layout.repeat {
            strides[0] = 0;
        }
        let data = vec![E::from_f32(f32::NAN); reach + layout.skip];
        let [batch, seq, heads] = strides;
        Memory { data, shape, strides: Strides { batch, seq, heads }, skip: layout.skip }
    }

    /// Numbers in every row, and NaN still between them.
    pub(super) fn fill(mut self, numbers: &mut Numbers) -> Memory<E> {
        for at in self.rows() {
            for x in &mut self.data[at..at + self.shape.dim] {
                *x = E::from_f32(numbers.next());
            }
        }
        self
    }

    /// Takes elements in row-major order.
    pub(super) fn write(&mut self, elements: &[E]) {
        let dim = self.shape.dim;
        for (n, at) in self.rows().into_iter().enumerate() {
            self.data[at..at + dim].copy_from_slice(&elements[n * dim..(n + 1) * dim]);
        }
    }

    /// Replaces one element.
    pub(super) fn set(&mut self, numbers: &mut Numbers, x: f32) {
        let rows = self.rows();
        if rows.is_empty() || self.shape.dim == 0 {
            return;
        }
        let below = |n: usize, bits: u64| (bits % n as u64) as usize;
        let row = rows[below(rows.len(), numbers.bits())];
        self.data[row + below(self.shape.dim, numbers.bits())] = E::from_f32(x);
    }

    pub(super) fn view(&self) -> TensorRef<'_, E> {
        TensorRef::from_strides(&self.data[self.skip..], self.shape, self.strides)
            .expect("the memory was made for the shape")
    }

    /// For layouts that do not repeat.
    pub(super) fn view_mut(&mut self) -> TensorMut<'_, E> {
        TensorMut::from_strides(&mut self.data[self.skip..], self.shape, self.strides)
            .expect("the memory was made for the shape")
    }

    /// The rows' elements in row-major order.
    pub(super) fn elements(&self) -> Vec<E> {
        let rows = self.rows().into_iter();
        rows.flat_map(|at| self.data[at..at + self.shape.dim].iter().copied()).collect()
    }

    /// Nothing was written between the rows.
    pub(super) fn assert_untouched_between_rows(&self) {
        let mut gaps = self.data.clone();
        for at in self.rows() {
            gaps[at..at + self.shape.dim].fill(E::from_f32(f32::NAN));
        }
        assert!(gaps.iter().all(|x| x.to_f32().is_nan()), "written outside of the output");
    }

    /// Where rows start, in row-major order.
    fn rows(&self) -> Vec<usize> {
        let Shape { batch, seq, heads, .. } = self.shape;
        let Strides { batch: along_batch, seq: along_seq, heads: along_heads } = self.strides;
        let mut rows = vec![];
        for b in 0..batch {
            for s in 0..seq {
                for h in 0..heads {
                    rows.push(self.skip + b * along_batch + s * along_seq + h * along_heads);
                }
            }
        }
        rows
    }
}

/// The elements' bits, so that NaN equals itself and −0 differs from 0.
pub(super) fn bits<E: Element>(elements: &[E]) -> Vec<u32> {
    elements.iter().map(|x| x.to_f32().to_bits()).collect()
}
