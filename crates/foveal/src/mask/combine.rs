//! Masks made of two others: visible in both, or in either. Neither allocates.

use super::{Coverage, Extent, Mask, Pattern, Site};
use crate::simd::tile::KeyWords;
use std::ops::Range;

/// Visible in both.
#[derive(Debug)]
pub(super) struct And<'a>(pub(super) &'a Mask, pub(super) &'a Mask);

/// Visible in either.
#[derive(Debug)]
pub(super) struct Or<'a>(pub(super) &'a Mask, pub(super) &'a Mask);

impl Pattern for And<'_> {
    fn allows(&self, at: Site, i: isize, j: usize) -> bool {
        self.0.allows(at, i, j) && self.1.allows(at, i, j)
    }

    fn live(
        &self,
        at: Site,
        rows: Range<isize>,
        keys: Range<usize>,
        visit: &mut dyn FnMut(Range<usize>, Coverage),
    ) {
        self.0.live(at, rows.clone(), keys, &mut |outer, a| {
            self.1.live(at, rows.clone(), outer, &mut |inner, b| {
                let full = a == Coverage::Full && b == Coverage::Full;
                visit(inner, if full { Coverage::Full } else { Coverage::Partial });
            });
        });
    }

    fn fill(&self, at: Site, i: isize, keys: Range<usize>, bits: &mut [u64]) {
        let mut other = KeyWords::default();
        let other = &mut other[..bits.len()];
        self.0.fill(at, i, keys.clone(), bits);
        self.1.fill(at, i, keys, other);
        bits.iter_mut().zip(other).for_each(|(a, b)| *a &= *b);
    }

    fn same_for_all_heads(&self) -> bool {
        self.0.same_for_all_heads() && self.1.same_for_all_heads()
    }

    fn check(&self, extent: Extent) -> crate::Result<()> {
        self.0.check(extent)?;
        self.1.check(extent)
    }

    fn check_sequence(&self, batch: usize, extent: Extent) -> crate::Result<()> {
        self.0.check_sequence(batch, extent)?;
        self.1.check_sequence(batch, extent)
    }
}

impl Pattern for Or<'_> {
    fn allows(&self, at: Site, i: isize, j: usize) -> bool {
        self.0.allows(at, i, j) || self.1.allows(at, i, j)
    }

    /// The first mask's ranges, with the second's in the gaps and, where it covers a partial range
    /// fully, in its place.
    fn live(
        &self,
        at: Site,
        rows: Range<isize>,
        keys: Range<usize>,
        visit: &mut dyn FnMut(Range<usize>, Coverage),
    ) {
        let mut done = keys.start;
        self.0.live(at, rows.clone(), keys.clone(), &mut |range, coverage| {
            self.1.live(at, rows.clone(), done..range.start, visit);
            done = range.end;
            if coverage == Coverage::Full {
                return visit(range, coverage);
            }
            let mut partial = range.start;
            self.1.live(at, rows.clone(), range.clone(), &mut |inner, b| {
                if b == Coverage::Full {
                    if partial < inner.start {
                        visit(partial..inner.start, Coverage::Partial);
                    }
                    partial = inner.end;
                    visit(inner, b);
                }
            });
            if partial < range.end {
                visit(partial..range.end, Coverage::Partial);
            }
        });
        self.1.live(at, rows, done..keys.end, visit);
    }

    fn fill(&self, at: Site, i: isize, keys: Range<usize>, bits: &mut [u64]) {
        let mut other = KeyWords::default();
        let other = &mut other[..bits.len()];
        self.0.fill(at, i, keys.clone(), bits);
        self.1.fill(at, i, keys, other);
        bits.iter_mut().zip(other).for_each(|(a, b)| *a |= *b);
    }

    fn same_for_all_heads(&self) -> bool {
        self.0.same_for_all_heads() && self.1.same_for_all_heads()
    }

    fn check(&self, extent: Extent) -> crate::Result<()> {
        self.0.check(extent)?;
        self.1.check(extent)
    }

    fn check_sequence(&self, batch: usize, extent: Extent) -> crate::Result<()> {
        self.0.check_sequence(batch, extent)?;
        self.1.check_sequence(batch, extent)
    }
}
