//! What a run reads: one text, or pairs.

use std::ops::Range;

use super::{Batches, PairBatches, Position, Sequences};
use crate::train::Error;

/// One text, or pairs.
#[derive(Debug)]
pub(in crate::train) enum Text {
    /// One text.
    One(Batches),
    /// Pairs.
    Pairs(PairBatches),
}

impl Text {
    /// A number that others do not have.
    pub(in crate::train) fn digest(&self) -> String {
        match self {
            Text::One(text) => text.digest(),
            Text::Pairs(pairs) => pairs.digest(),
        }
    }

    /// What has been read.
    pub(in crate::train) fn position(&self) -> &Position {
        match self {
            Text::One(text) => text.position(),
            Text::Pairs(pairs) => pairs.position(),
        }
    }

    /// Goes on from `position`.
    pub(in crate::train) fn set_position(&mut self, position: Position) -> Result<(), Error> {
        match self {
            Text::One(text) => text.set_position(position),
            Text::Pairs(pairs) => pairs.set_position(position),
        }
    }

    /// Begins anew.
    pub(in crate::train) fn rewind(&mut self) {
        match self {
            Text::One(text) => text.rewind(),
            Text::Pairs(pairs) => pairs.rewind(),
        }
    }

    /// Whether all sequences of a call begin and end with each other.
    pub(in crate::train) fn in_step(&self) -> bool {
        match self {
            Text::One(text) => text.in_step(),
            Text::Pairs(_) => true,
        }
    }

    /// The next sequences of the places of a step, in calls of `per_call`, which divides their number, or of fewer.
    pub(in crate::train) fn calls(
        &mut self,
        places: Range<usize>,
        per_call: usize,
    ) -> Vec<Sequences> {
        match self {
            Text::One(text) => places
                .step_by(per_call.max(1))
                .map(|place| text.next(place..place + per_call))
                .collect(),
            Text::Pairs(pairs) => pairs.calls(places.len(), per_call),
        }
    }
}
