//! What is carried from call to call.

use crate::error::{Error, Result};

/// The extents of a state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct StateShape {
    /// Sequences: those of the batch, or those that are packed into one.
    pub sequences: usize,
    /// Heads of the values.
    pub heads: usize,
    /// Numbers of a key: rows of a matrix.
    pub key_dim: usize,
    /// Numbers of a value: columns of a matrix.
    pub value_dim: usize,
}

impl std::fmt::Display for StateShape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let StateShape { sequences, heads, key_dim, value_dim } = self;
        write!(
            f,
            "[sequences {sequences}, heads {heads}, key dim {key_dim}, value dim {value_dim}]"
        )
    }
}

/// The states of all heads of some sequences, or gradients with respect to them: dense, `f32`, of constant size.
///
/// Saved and restored bit for bit through its slices.
#[derive(Debug, Clone, PartialEq)]
pub struct State {
    shape: StateShape,
    /// Sums of each key channel.
    sums: usize,
    matrices: Vec<f32>,
    key_sums: Vec<f32>,
}

impl State {
    /// A state that has seen nothing. Allocates. `sums`: how many numbers of each key channel it holds next to the matrix
    /// ([`Form::sums`](super::Form::sums)).
    ///
    /// # Errors
    /// [`Error::StateShape`] if it is larger than the address space.
    pub fn zeros(shape: StateShape, sums: usize) -> Result<State> {
        let StateShape { sequences, heads, key_dim, value_dim } = shape;
        let keys = sequences.checked_mul(heads).and_then(|n| n.checked_mul(key_dim));
        let fits = |n: Option<usize>| n.filter(|&n| n <= isize::MAX as usize / 8);
        let numbers = fits(keys.and_then(|n| n.checked_mul(value_dim)));
        let (Some(keys), Some(numbers)) = (fits(keys.and_then(|n| n.checked_mul(sums))), numbers)
        else {
            let expected = "one that fits the address space".to_string();
            return Err(Error::StateShape { expected, got: shape.to_string() });
        };
        Ok(State { shape, sums, matrices: vec![0.0; numbers], key_sums: vec![0.0; keys] })
    }

    /// The extents.
    pub fn shape(&self) -> StateShape {
        self.shape
    }

    /// The matrices S, `[sequence][head][key][value]`.
    pub fn matrices(&self) -> &[f32] {
        &self.matrices
    }

    /// The matrices, to be written.
    pub fn matrices_mut(&mut self) -> &mut [f32] {
        &mut self.matrices
    }

    /// The sums of keys z, `[sequence][head][sum][key]`; empty for mechanisms without any.
    pub fn key_sums(&self) -> &[f32] {
        &self.key_sums
    }

    /// The sums of keys, to be written.
    pub fn key_sums_mut(&mut self) -> &mut [f32] {
        &mut self.key_sums
    }

    /// Refuses a state of another shape or kind.
    pub(crate) fn check(&self, expected: StateShape, sums: usize) -> Result<()> {
        let name = |shape: StateShape, sums: usize| format!("{shape} with {sums} sums of keys");
        if self.shape == expected && self.sums == sums {
            return Ok(());
        }
        let got = name(self.shape, self.sums);
        Err(Error::StateShape { expected: name(expected, sums), got })
    }

    /// Matrix and sum of keys of each sequence and head, in order; the sums are empty if there are none.
    pub(crate) fn units_mut(
        &mut self,
        heads: usize,
    ) -> impl Iterator<Item = (&mut [f32], &mut [f32])> + Send {
        let StateShape { sequences, heads: all, key_dim, value_dim } = self.shape;
        let keys = heads * self.sums * key_dim;
        let mut sums = self.key_sums.as_mut_slice();
        let matrices = self.matrices.chunks_exact_mut((heads * key_dim * value_dim).max(1));
        matrices.take(sequences * all / heads).map(move |matrix| {
            let (own, rest) = std::mem::take(&mut sums).split_at_mut(keys);
            sums = rest;
            (matrix, own)
        })
    }

    /// The same, to be read.
    pub(crate) fn units(&self, heads: usize) -> impl Iterator<Item = (&[f32], &[f32])> + Send {
        let StateShape { key_dim, value_dim, .. } = self.shape;
        let keys = heads * self.sums * key_dim;
        let matrices = self.matrices.chunks_exact((heads * key_dim * value_dim).max(1));
        matrices
            .enumerate()
            .map(move |(n, matrix)| (matrix, &self.key_sums[n * keys..(n + 1) * keys]))
    }
}
