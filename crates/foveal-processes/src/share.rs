//! Which tokens of a sequence a process holds.
//!
//! ```text
//! balanced    2W pieces; process r of W holds pieces r and 2W − 1 − r: the same work for all under a causal mask
//! otherwise   W pieces; process r holds piece r
//! ```

use foveal::{Shape, Tensor, TensorRef};

use crate::{Error, Processes};

/// How a sequence is shared out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// How many processes there are.
    pub count: usize,
    /// Whether each holds a piece from either end.
    pub balanced: bool,
}

impl Share {
    /// The pieces of a whole sequence.
    pub fn pieces(self) -> usize {
        if self.balanced { 2 * self.count } else { self.count }
    }

    /// Those that a process holds, in the order of the sequence.
    pub fn held_by(self, rank: usize) -> Vec<usize> {
        if self.balanced { vec![rank, 2 * self.count - 1 - rank] } else { vec![rank] }
    }

    /// The share of a process in a whole sequence `[B, T, H, D]`. Allocates it.
    ///
    /// # Errors
    /// [`Error::Uneven`] unless T is a multiple of the pieces.
    pub fn of(self, whole: TensorRef<'_, f32>, rank: usize) -> Result<Tensor<f32>, Error> {
        let Shape { batch, seq, heads, .. } = whole.shape();
        let pieces = self.pieces();
        if !seq.is_multiple_of(pieces) {
            return Err(Error::Uneven { what: "tokens", found: seq, multiple: pieces });
        }
        let len = seq / pieces;
        let held = self.held_by(rank);
        let mut share = Tensor::zeros(Shape { seq: len * held.len(), ..whole.shape() })?;
        let mut view = share.view_mut();
        for (n, piece) in held.into_iter().enumerate() {
            for (b, t, h) in rows(batch, len, heads) {
                let from = whole.row(b, piece * len + t, h);
                view.row_mut(b, n * len + t, h).copy_from_slice(from);
            }
        }
        Ok(share)
    }

    /// The whole sequence, on every process, from the share of each. Allocates it, and a share more.
    ///
    /// # Errors
    /// [`Error::Uneven`] for shares that are no whole pieces; those of [`Processes::shift`].
    pub fn gather(
        self,
        processes: &dyn Processes,
        own: &Tensor<f32>,
    ) -> Result<Tensor<f32>, Error> {
        let Shape { batch, seq, heads, .. } = own.shape();
        let held = self.held_by(0).len();
        if !seq.is_multiple_of(held) {
            return Err(Error::Uneven { what: "tokens of a share", found: seq, multiple: held });
        }
        let len = seq / held;
        let mut whole = Tensor::zeros(Shape { seq: seq * self.count, ..own.shape() })?;
        let mut view = whole.view_mut();
        let mut numbers = vec![0.0; own.as_slice().len()];
        for by in 0..self.count {
            match by {
                0 => numbers.copy_from_slice(own.as_slice()),
                by => processes.shift(by, own.as_slice(), &mut numbers)?,
            }
            let share = TensorRef::new(&numbers, own.shape())?;
            for (n, piece) in self.held_by(crate::before(processes, by)).into_iter().enumerate() {
                for (b, t, h) in rows(batch, len, heads) {
                    let to = view.row_mut(b, piece * len + t, h);
                    to.copy_from_slice(share.row(b, n * len + t, h));
                }
            }
        }
        Ok(whole)
    }
}

/// All rows of a tensor.
pub(crate) fn rows(
    batch: usize,
    seq: usize,
    heads: usize,
) -> impl Iterator<Item = (usize, usize, usize)> {
    (0..batch).flat_map(move |b| (0..seq).flat_map(move |t| (0..heads).map(move |h| (b, t, h))))
}
