//! Another mask for each head, or for each sequence of a batch.

use super::{Coverage, Extent, Mask, Pattern, Site};
use crate::error::{Error, Result};
use std::ops::Range;

/// Which axis chooses among the masks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Axis {
    Head,
    Sequence,
}

/// Masks, one for each query head or sequence.
#[derive(Debug)]
pub(super) struct Choice {
    axis: Axis,
    masks: Vec<Mask>,
}

impl Choice {
    pub(super) fn by_head(masks: Vec<Mask>) -> Choice {
        Choice { axis: Axis::Head, masks }
    }

    pub(super) fn by_sequence(masks: Vec<Mask>) -> Choice {
        Choice { axis: Axis::Sequence, masks }
    }

    fn at(&self, at: Site) -> Option<&Mask> {
        self.masks.get(match self.axis {
            Axis::Head => at.q_head,
            Axis::Sequence => at.batch,
        })
    }

    fn check_count(&self, extent: Extent) -> Result<()> {
        let (what, noun, count) = match self.axis {
            Axis::Head => ("a mask for each head", "heads", extent.heads),
            Axis::Sequence => ("a mask for each sequence", "sequences", extent.batch),
        };
        if self.masks.len() == count {
            return Ok(());
        }
        let expected = format!("{} {noun}", self.masks.len());
        Err(Error::MaskShape { what, expected, got: format!("{count} {noun}") })
    }
}

impl Pattern for Choice {
    fn allows(&self, at: Site, i: isize, j: usize) -> bool {
        self.at(at).is_some_and(|mask| mask.allows(at, i, j))
    }

    fn live(
        &self,
        at: Site,
        rows: Range<isize>,
        keys: Range<usize>,
        visit: &mut dyn FnMut(Range<usize>, Coverage),
    ) {
        if let Some(mask) = self.at(at) {
            mask.live(at, rows, keys, visit);
        }
    }

    fn fill(&self, at: Site, i: isize, keys: Range<usize>, bits: &mut [u64]) {
        match self.at(at) {
            Some(mask) => mask.fill(at, i, keys, bits),
            None => bits.fill(0),
        }
    }

    fn same_for_all_heads(&self) -> bool {
        match self.axis {
            Axis::Head => false,
            Axis::Sequence => self.masks.iter().all(Mask::same_for_all_heads),
        }
    }

    fn check(&self, extent: Extent) -> Result<()> {
        self.check_count(extent)?;
        self.masks.iter().try_for_each(|mask| mask.check(extent))
    }

    fn check_sequence(&self, batch: usize, extent: Extent) -> Result<()> {
        self.check_count(extent)?;
        match self.axis {
            Axis::Head => self.masks.iter().try_for_each(|mask| mask.check_sequence(batch, extent)),
            Axis::Sequence => {
                self.masks.get(batch).map_or(Ok(()), |mask| mask.check_sequence(batch, extent))
            }
        }
    }

    /// Each mask once, with the heads or sequences that follow each other under it.
    fn describe(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let noun = match self.axis {
            Axis::Head => "head",
            Axis::Sequence => "sequence",
        };
        let words: Vec<_> = self.masks.iter().map(Mask::to_string).collect();
        write!(f, "by {noun} (")?;
        let mut first = 0;
        for run in words.chunk_by(|a, b| a == b) {
            let (comma, end) = (if first > 0 { ", " } else { "" }, first + run.len());
            match run.len() {
                1 => write!(f, "{comma}{first}: {}", run[0])?,
                _ => write!(f, "{comma}{first} to {}: {}", end - 1, run[0])?,
            }
            first = end;
        }
        f.write_str(")")
    }
}
