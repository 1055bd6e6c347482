//! The product by distance of a relative encoding, as tiles of scores need it.
//!
//! ```text
//! s_ij = scale (⟨q_i + u, k_j⟩ + ⟨q_i + v, r(i − j)⟩)
//!
//! rows i₀ … i_n against keys j₀ …:        column c of their band is distance i_n − j₀ − c
//! B = (Q + v) r(columns)ᵀ                 s_rt += B[r, (n − r) + t]
//! ```
//!
//! The second product of a tile depends on i − j alone, so that of R rows and 256 keys it has 255 + R columns, not R · 256.
//! Keys by distance are gathered in the order of columns and packed as keys are; six rows need 261 neighbouring columns,
//! which stay in L1, and each row reads them from a place of its own: nothing is shifted in memory. A column beyond the
//! first or last distance takes that key. Each product is one chain over d, so that its bits depend on the query and
//! the distance alone. Dai et al. 2019, §3.3 and appendix B.

use super::Factor;
use super::terms::{ByDistance, Terms};
use crate::position::RelativeEncoding;
use crate::simd::decode::{RowScores, row_scores};
use crate::simd::product::Form;
use crate::simd::tile::{self, GROUP, KEY_TILE, KeyWords, PANEL, STEP, Scores, Visible, padded};
use crate::simd::{Level, row};
use crate::tensor::Rows;
use std::ops::Range;

/// Columns that six rows may need, from the beginning of a panel on.
const BAND: usize = (PANEL - 1 + KEY_TILE + GROUP - 1 + STEP).next_multiple_of(PANEL);

/// Columns of some rows against a tile of keys.
pub(super) fn columns(rows: usize) -> usize {
    KEY_TILE + rows - 1
}

/// The band of neighbouring rows of one head, and what it is made from.
#[derive(Debug)]
pub(super) struct Band<'a> {
    encoding: RelativeEncoding<'a>,
    level: Level,
    /// Rows of the tile that was packed last.
    rows: usize,
    /// q + v, `[row][dim]`, turned around if the scale asks for it.
    queries: &'a mut [f32],
    /// `[column][dim]`.
    keys: &'a mut [f32],
    /// The same in panels.
    panels: &'a mut [f32],
    /// `[row][BAND]`.
    products: &'a mut [f32],
}

impl<'a> Band<'a> {
    /// Floats for at most so many rows.
    pub(super) fn floats(rows: usize, dim: usize) -> usize {
        let columns = columns(rows).next_multiple_of(PANEL);
        (rows + 2 * columns) * dim.next_multiple_of(16) + GROUP * BAND
    }

    /// Takes its memory off the beginning of `scratch`, if the terms have a relative encoding.
    pub(super) fn split(
        terms: &Terms<'a>,
        level: Level,
        rows: usize,
        scratch: &'a mut [f32],
    ) -> (Option<Band<'a>>, &'a mut [f32]) {
        let Some(encoding) = terms.encoding else { return (None, scratch) };
        let dim = encoding.shape().dim;
        let (own, rest) = scratch.split_at_mut(Band::floats(rows, dim));
        let columns = columns(rows).next_multiple_of(PANEL);
        let (products, own) = own.split_at_mut(GROUP * BAND);
        let (panels, own) = own.split_at_mut(columns * dim.next_multiple_of(16));
        let (keys, own) = own.split_at_mut(columns * dim.next_multiple_of(16));
        let queries = &mut own[..rows * dim];
        (Some(Band { encoding, level, rows: 0, queries, keys, panels, products }), rest)
    }

    /// Rows of the tile that was packed last.
    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    fn dim(&self) -> usize {
        self.encoding.shape().dim
    }

    /// Moves row `r`, a query times `sign`, by u, and keeps it moved by v.
    pub(super) fn load(&mut self, factor: Factor, (r, head): (usize, usize), query: &mut [f32]) {
        let dim = self.dim();
        let own = &mut self.queries[r * dim..(r + 1) * dim];
        load(self.level, factor, self.encoding.biases(head), query, own);
    }

    /// Takes a tile of so many rows whose columns are packed elsewhere.
    pub(super) fn take(&mut self, rows: usize) {
        self.rows = rows;
    }

    /// Gathers and packs the columns of rows of a head of which the last is `first` behind the first key.
    pub(super) fn pack(&mut self, head: usize, first: isize, rows: usize) {
        let (dim, columns) = (self.dim(), columns(rows));
        self.rows = rows;
        let (keys, panels) = (&mut self.keys[..columns * dim], &mut *self.panels);
        let panels = &mut panels[..columns.next_multiple_of(PANEL) * dim];
        pack(self.level, &self.encoding, (head, first), keys, panels);
    }

    /// The columns that a group of the rows needs for the keys that some of them sees; empty if they see none.
    pub(super) fn columns(&self, group: &Range<usize>, visible: Visible<'_>) -> Range<usize> {
        let keys = seen(visible);
        match keys.is_empty() {
            true => 0..0,
            false => self.rows - group.end + keys.start..self.rows - 1 - group.start + keys.end,
        }
    }

    /// Products of a group of the rows, with the columns that were packed last, or those of a call.
    pub(super) fn products(
        &mut self,
        group: Range<usize>,
        visible: Visible<'_>,
        shared: Option<Columns<'_>>,
    ) -> ByDistance<'_> {
        let Columns { panels: keys, lead } =
            shared.unwrap_or(Columns { panels: self.panels, lead: 0 });
        let columns = self.columns(&group, visible);
        let (dim, n) = (self.dim(), group.len());
        // Products begin with the panel of the last row's first column.
        let begin = (lead + self.rows - group.end) / PANEL;
        let steps =
            (lead + columns.start) / STEP * STEP..(lead + columns.end).next_multiple_of(STEP);
        let steps = if columns.is_empty() { 0..0 } else { steps };
        for panels in [begin..begin + KEY_TILE / PANEL, begin + KEY_TILE / PANEL..usize::MAX] {
            let words = words(&steps, &panels);
            if words == KeyWords::default() {
                continue;
            }
            let used = panels.end.min(steps.end.div_ceil(PANEL));
            let product = Scores {
                queries: &self.queries[group.start * dim..group.end * dim],
                stride: dim,
                rows: n,
                depth: dim,
                keys: &keys[panels.start * PANEL * dim..used * PANEL * dim],
                visible: Visible::Some(&[words; GROUP][..n]),
                hidden: 0.0,
                out: &mut self.products[(panels.start - begin) * PANEL..],
                out_stride: BAND,
                max: &mut [0.0; GROUP],
            };
            tile::scores(Form::Numbers(self.level), product);
        }
        let first = lead + self.rows - 1 - group.start - begin * PANEL;
        ByDistance { floats: self.products, first, stride: BAND - 1 }
    }

    /// The keys of the columns, and the queries of the rows.
    pub(super) fn matrices(&self) -> [Rows<'_, f32>; 2] {
        let dim = self.dim();
        let rows =
            |floats, count| Rows::new(floats, dim, count, dim).expect("as many as were packed");
        [rows(&*self.keys, columns(self.rows)), rows(&*self.queries, self.rows)]
    }
}

/// Columns in panels, of which the band's first is column `lead`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Columns<'a> {
    panels: &'a [f32],
    lead: usize,
}

/// Panels of all columns of a head in a call, one after the other: column c is for the largest distance less c.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shared<'a> {
    pub(super) panels: &'a [f32],
    /// Of the last query from the first key.
    pub(super) largest: isize,
    pub(super) dim: usize,
}

impl<'a> Shared<'a> {
    /// Panels that a call may need. A last tile of keys is computed in whole steps.
    pub(super) fn panels(queries: usize, keys: usize) -> usize {
        (queries + keys + KEY_TILE).div_ceil(PANEL)
    }

    /// The columns of rows of which the last is `first` behind the first key of a tile.
    pub(super) fn columns(&self, first: isize) -> Columns<'a> {
        let column = self.largest.abs_diff(first);
        let panels = &self.panels[column / PANEL * PANEL * self.dim..];
        Columns { panels, lead: column % PANEL }
    }
}

/// Packs a panel of the columns of a head, of which the first is for a distance. `keys` is room for as many rows.
pub(super) fn pack(
    level: Level,
    encoding: &RelativeEncoding<'_>,
    (head, first): (usize, isize),
    keys: &mut [f32],
    panels: &mut [f32],
) {
    let dim = encoding.shape().dim;
    let count = keys.len() / dim;
    for (c, to) in keys.chunks_exact_mut(dim).enumerate() {
        to.copy_from_slice(encoding.key(head, first - c as isize));
    }
    let keys = Rows::new(keys, dim, count, dim).expect("as many as were gathered");
    tile::pack_keys(level, keys, panels);
}

/// Bits for the columns of four panels at most.
pub(super) fn words(columns: &Range<usize>, panels: &Range<usize>) -> KeyWords {
    std::array::from_fn(|n| {
        let panel = panels.start + n;
        let within = |column: usize| column.saturating_sub(panel * PANEL).min(PANEL) as u32;
        let below = |n: u32| 1u64.checked_shl(n).map_or(u64::MAX, |bit| bit - 1);
        below(within(columns.end)) & !below(within(columns.start))
    })
}

/// Moves a query, times the scale's sign, by u, and copies it to `position`, moved by v.
fn load(
    level: Level,
    factor: Factor,
    [u, v]: [&[f32]; 2],
    query: &mut [f32],
    position: &mut [f32],
) {
    position.copy_from_slice(query);
    row::blend(level, query, 1.0, u, factor.sign);
    row::blend(level, position, 1.0, v, factor.sign);
}

/// From the first key that some row sees to the last, in steps.
fn seen(visible: Visible<'_>) -> Range<usize> {
    let steps = visible.all_steps();
    let mut keys = steps.iter().enumerate().filter(|(_, (first, end))| first < end);
    let Some((panel, (first, end))) = keys.next() else { return 0..0 };
    let start = panel * PANEL + first * STEP;
    let last = keys.next_back().map_or((panel, *end), |(panel, (_, end))| (panel, *end));
    start..last.0 * PANEL + last.1 * STEP
}

/// Products by distance of rows that are computed one by one, for generated tokens.
#[derive(Debug)]
pub(super) struct Lines<'a> {
    encoding: RelativeEncoding<'a>,
    level: Level,
    /// q + v, each padded with zeros.
    queries: &'a mut [f32],
    /// Of one row, in the order of distances.
    ascending: &'a mut [f32],
    /// `[row][KEY_TILE]`.
    products: &'a mut [f32],
}

impl<'a> Lines<'a> {
    pub(super) fn floats(rows: usize, dim: usize) -> usize {
        rows * padded(dim) + (1 + GROUP) * KEY_TILE
    }

    /// Takes its memory off the beginning of `scratch`, if the terms have a relative encoding.
    pub(super) fn split(
        terms: &Terms<'a>,
        level: Level,
        rows: usize,
        scratch: &'a mut [f32],
    ) -> (Option<Lines<'a>>, &'a mut [f32]) {
        let Some(encoding) = terms.encoding else { return (None, scratch) };
        let (queries, rest) = scratch.split_at_mut(rows * padded(encoding.shape().dim));
        let (ascending, rest) = rest.split_at_mut(KEY_TILE);
        let (products, rest) = rest.split_at_mut(GROUP * KEY_TILE);
        (Some(Lines { encoding, level, queries, ascending, products }), rest)
    }

    /// Like [`Band::load`].
    pub(super) fn load(&mut self, factor: Factor, (r, head): (usize, usize), query: &mut [f32]) {
        let (dim, stride) = (self.encoding.shape().dim, padded(self.encoding.shape().dim));
        let (own, padding) = self.queries[r * stride..(r + 1) * stride].split_at_mut(dim);
        padding.fill(0.0);
        load(self.level, factor, self.encoding.biases(head), query, own);
    }

    /// Products of rows, each given by its number, its head and how far it is ahead of the first of `count` keys.
    pub(super) fn products(
        &mut self,
        rows: impl Iterator<Item = (usize, usize, isize)>,
        count: usize,
    ) -> ByDistance<'_> {
        let stride = padded(self.encoding.shape().dim);
        for ((r, head, first), out) in rows.zip(self.products.chunks_exact_mut(KEY_TILE)) {
            let row = |c: usize| self.encoding.row(first - c as isize);
            let (low, high) = (row(count.saturating_sub(1)), row(0));
            let keys = self.encoding.keys().head(0, head).slice(low..high + 1);
            let args = RowScores {
                queries: &self.queries[r * stride..(r + 1) * stride],
                keys,
                visible: &[[u64::MAX; KEY_TILE / PANEL]],
                out: self.ascending,
                max: &mut [0.0],
            };
            row_scores(self.level, args);
            for (c, out) in out.iter_mut().enumerate().take(count) {
                *out = self.ascending[row(c) - low];
            }
        }
        ByDistance { floats: self.products, first: 0, stride: KEY_TILE }
    }
}

#[cfg(test)]
mod tests {
    use super::{PANEL, seen, words};
    use crate::simd::tile::Visible;

    #[test]
    fn words_mark_the_columns_of_a_range() {
        for columns in [0..0, 16..48, 0..64, 48..80, 112..384, 300..304] {
            for first in [0, 1, 4] {
                let words = words(&columns, &(first..first + 4));
                for c in 0..4 * PANEL {
                    let bit = words[c / 64] >> (c % 64) & 1 == 1;
                    assert_eq!(bit, columns.contains(&(first * PANEL + c)), "{columns:?} {c}");
                }
            }
        }
    }

    #[test]
    fn what_is_seen_begins_and_ends_with_steps() {
        assert_eq!(seen(Visible::All(240)), 0..240);
        assert_eq!(seen(Visible::Some(&[[0; 4]])), 0..0);
        assert_eq!(seen(Visible::Some(&[[0, 1 << 20, 0, 0]])), 80..96);
        assert_eq!(seen(Visible::Some(&[[0, 1 << 20, 0, 0], [0, 0, 0, 1]])), 80..208);
    }
}
