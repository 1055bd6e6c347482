//! Some sequences, tokens or heads of a tensor, as a tensor.

use super::{Shape, Strides, TensorMut, TensorRef};
use crate::element::Element;
use std::ops::Range;

impl<'a, E: Element> TensorRef<'a, E> {
    /// Some tokens of all sequences.
    ///
    /// # Panics
    /// If the range is not within the shape.
    pub(crate) fn span(&self, tokens: Range<usize>) -> TensorRef<'a, E> {
        let (shape, at) = span((self.shape, self.strides), &tokens);
        TensorRef { data: &self.data[at..], shape, strides: self.strides }
    }

    /// Some sequences and heads.
    ///
    /// # Panics
    /// If a range is not within the shape.
    pub fn part(&self, batch: Range<usize>, heads: Range<usize>) -> TensorRef<'a, E> {
        let (shape, at) = part((self.shape, self.strides), &batch, &heads);
        TensorRef { data: &self.data[at..], shape, strides: self.strides }
    }

    /// As many whole stretches of `len` tokens as one sequence has, as the sequences of a batch.
    ///
    /// # Panics
    /// If there is no such sequence, or for stretches of no tokens.
    pub(crate) fn stretches(&self, sequence: usize, len: usize) -> TensorRef<'a, E> {
        let own = self.part(sequence..sequence + 1, 0..self.shape.heads);
        let (shape, strides) = stretches((own.shape, own.strides), len);
        TensorRef { data: own.data, shape, strides }
    }
}

impl<'a, E: Element> TensorMut<'a, E> {
    /// Some tokens of all sequences.
    ///
    /// # Panics
    /// If the range is not within the shape.
    pub(crate) fn into_span(self, tokens: Range<usize>) -> TensorMut<'a, E> {
        let (shape, at) = span((self.shape, self.strides), &tokens);
        TensorMut { data: &mut self.data[at..], shape, strides: self.strides }
    }

    /// Some sequences and heads.
    ///
    /// # Panics
    /// If a range is not within the shape.
    pub(crate) fn into_part(self, batch: Range<usize>, heads: Range<usize>) -> TensorMut<'a, E> {
        let (shape, at) = part((self.shape, self.strides), &batch, &heads);
        TensorMut { data: &mut self.data[at..], shape, strides: self.strides }
    }

    /// As many whole stretches of `len` tokens as one sequence has, as the sequences of a batch.
    ///
    /// # Panics
    /// If there is no such sequence, or for stretches of no tokens.
    pub(crate) fn into_stretches(self, sequence: usize, len: usize) -> TensorMut<'a, E> {
        let heads = 0..self.shape.heads;
        let own = self.into_part(sequence..sequence + 1, heads);
        let (shape, strides) = stretches((own.shape, own.strides), len);
        TensorMut { data: own.data, shape, strides }
    }
}

/// The shape and strides of a sequence cut into stretches.
fn stretches((whole, strides): (Shape, Strides), len: usize) -> (Shape, Strides) {
    let shape = Shape { batch: whole.seq / len, seq: len, ..whole };
    // One stretch reaches no further than the sequence, and none has no neighbour.
    (shape, Strides { batch: strides.seq.saturating_mul(len), ..strides })
}

/// The part's shape, and where it begins.
fn part(
    (whole, strides): (Shape, Strides),
    batch: &Range<usize>,
    heads: &Range<usize>,
) -> (Shape, usize) {
    assert!(batch.start <= batch.end && batch.end <= whole.batch);
    assert!(heads.start <= heads.end && heads.end <= whole.heads);
    let shape = Shape { batch: batch.len(), heads: heads.len(), ..whole };
    let at = if shape.is_empty() { 0 } else { strides.offset(batch.start, 0, heads.start) };
    (shape, at)
}

/// The shape of some tokens, and where they begin.
fn span((whole, strides): (Shape, Strides), tokens: &Range<usize>) -> (Shape, usize) {
    assert!(tokens.start <= tokens.end && tokens.end <= whole.seq);
    let shape = Shape { seq: tokens.len(), ..whole };
    let at = if shape.is_empty() { 0 } else { tokens.start * strides.seq };
    (shape, at)
}
