//! Where the sequences of a tensor begin and end: those of a batch, or some that are packed into one.

use crate::error::{Error, Result};
use std::ops::Range;

/// Stretches of tokens that share none: whole sequences, or those packed into one.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Spans<'a> {
    pub(super) batch: usize,
    pub(super) seq: usize,
    cuts: Option<&'a [usize]>,
}

impl<'a> Spans<'a> {
    /// The sequences of a batch, or the stretches between neighbouring cuts of its only one.
    ///
    /// # Errors
    /// [`Error::InvalidParameter`] unless cuts ascend from 0 to `seq` and the batch is 1.
    pub(crate) fn new(batch: usize, seq: usize, cuts: Option<&'a [usize]>) -> Result<Spans<'a>> {
        if let Some(cuts) = cuts {
            let ascend = cuts.first() == Some(&0) && cuts.is_sorted() && cuts.last() == Some(&seq);
            if batch != 1 || !ascend {
                return Err(Error::InvalidParameter {
                    what: "cuts of packed sequences",
                    expected: "a batch of 1 and offsets that ascend from 0 to the number of tokens",
                    got: format!("batch {batch}, {seq} tokens, cuts {cuts:?}"),
                });
            }
        }
        Ok(Spans { batch, seq, cuts })
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.cuts.map_or(self.batch, |cuts| cuts.len() - 1)
    }

    /// The sequence of a span and its tokens.
    pub(crate) fn get(&self, index: usize) -> (usize, Range<usize>) {
        assert!(index < self.count());
        match self.cuts {
            Some(cuts) => (0, cuts[index]..cuts[index + 1]),
            None => (index, 0..self.seq),
        }
    }
}
