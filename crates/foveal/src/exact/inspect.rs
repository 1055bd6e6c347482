//! Looking at weights without storing them: rows, column sums, entropies and means over a grid, made again
//! from the log-sum-exp of a forward.
//!
//! ```text
//! P_ij = e^(s_ij − lse_i)                        [T, S] a head, a tile of 256 keys at a time
//! probabilities:  P_ij of chosen rows            column sums:  Σ_i P_ij, per head or summed over a group
//! entropy:        −Σ_j P_ij ln P_ij              block means:  the mean P_ij of each cell of an R × C grid
//! ```
//!
//! Cost: the 2·T·S·Dk operations of the scores a head for the visible part of the rows asked for; memory is the
//! result, and one packed key tile and six rows of scores a thread. Weights are those before dropout. They are
//! as exact as their logarithm: an absolute error of about (|s| + |lse|)·2⁻²⁴ in s − lse.
//! Column sums choose the keys that H2O (Zhang et al. 2023) and SnapKV (Li et al. 2024) keep.

use super::relative::Band;
use super::terms::{ByDistance, Finish, RowSite, Terms};
use super::{Factor, live_tiles};
use crate::cache::{KvStore, Sequences};
use crate::element::Element;
use crate::error::{Error, Result};
use crate::mask::{Mask, Pattern, Site};
use crate::parallel::{for_each_item, for_each_part};
use crate::plan::{Plan, Sizes};
use crate::simd::Level;
use crate::simd::product::Form;
use crate::simd::tile::{self, GROUP, KEY_TILE, KeyWords, PANEL, STEP, Scores, Softmax, Visible};
use crate::tensor::{Shape, Tensor, TensorRef};
use std::f32::consts::LOG2_E;
use std::ops::Range;

/// Query rows that the mask is asked about together.
const ROWS: usize = 48;

/// What a forward was given and what it left: queries, keys and log-sum-exp.
#[derive(Debug, Clone, Copy)]
pub struct Forwarded<'a, E, K> {
    pub(crate) q: TensorRef<'a, E>,
    pub(crate) keys: Sequences<'a, K>,
    pub(crate) lse: TensorRef<'a, f32>,
}

impl<'a, E: Element, K: Element> Forwarded<'a, E, K> {
    /// Queries `[B, T, H, Dk]` and keys `[B, S, KV, Dk]` of [`Plan::forward`], and its log-sum-exp
    /// `[B, T, H, 1]`.
    pub fn new(q: TensorRef<'a, E>, k: TensorRef<'a, K>, lse: TensorRef<'a, f32>) -> Self {
        Forwarded { q, keys: Sequences::Tensors(k, k), lse }
    }
}

impl<E: Element, K: Element> Forwarded<'_, E, K> {
    /// Keys that the first sequence holds, if there is one.
    pub(crate) fn held(&self) -> usize {
        match self.keys {
            Sequences::Stores([]) => 0,
            keys => keys.end(0) - keys.start(0),
        }
    }
}

impl<'a, E: Element> Forwarded<'a, E, E> {
    /// Queries and caches of [`Plan::forward_cached`], and its log-sum-exp.
    pub fn cached(
        q: TensorRef<'a, E>,
        stores: &'a [&'a dyn KvStore],
        lse: TensorRef<'a, f32>,
    ) -> Self {
        Forwarded { q, keys: Sequences::Stores(stores), lse }
    }
}

/// Whose weights a sum over columns joins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Per {
    /// Each query head by itself.
    QueryHead,
    /// All query heads that read one key/value head.
    KvHead,
}

/// A grid over a call's (query, key) pairs: row `r` of `R` holds the queries from `T·r/R` up to
/// `T·(r + 1)/R`, both rounded down, and columns likewise.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grid {
    /// R.
    pub rows: usize,
    /// C.
    pub columns: usize,
}

impl Plan<'_> {
    /// The weights of a range of query rows, `[B, rows, H, S]`. Column `j` is the `j`-th key held; beyond
    /// the keys of a shorter cache there are zeros. Allocates the result and a little for each thread.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] and [`Error::MaskShape`] as [`Plan::forward`],
    /// [`Error::InvalidParameter`] for rows that the call does not have, [`Error::ShapeOverflow`].
    pub fn probabilities<E: Element, K: Element>(
        &self,
        of: Forwarded<'_, E, K>,
        rows: Range<usize>,
    ) -> Result<Tensor<f32>> {
        let look = self.look(of)?;
        look.check_rows(&rows)?;
        let Sizes { q, keys, .. } = look.sizes;
        let mut result = Tensor::zeros(Shape { seq: rows.len(), dim: keys, ..q })?;
        let mut view = result.view_mut();
        let out = view.share();
        look.for_row_parts(&rows, |part, scratch| {
            let held = look.held(part.batch);
            for positions in tiles(&held) {
                look.weigh(part, positions, scratch, &mut |group| {
                    for (row, weights) in group.rows.zip(group.weights.chunks_exact(KEY_TILE)) {
                        // SAFETY: each row belongs to one part.
                        let out = unsafe { out.row(part.batch, row - rows.start, group.head) };
                        let columns = group.positions.start - held.start..;
                        let n = group.positions.len();
                        out[columns][..n].copy_from_slice(&weights[..n]);
                    }
                });
            }
        });
        Ok(result)
    }

    /// How much weight each key gets from a range of query rows, `[B, S, H, 1]` or `[B, S, KV, 1]`: the sum
    /// over these rows, and over the heads of a group. Keys as in [`Plan::probabilities`]. Sums run in f64
    /// in the order of rows. Allocates the result and a little for each thread.
    ///
    /// # Errors
    /// Those of [`Plan::probabilities`].
    pub fn column_sums<E: Element, K: Element>(
        &self,
        of: Forwarded<'_, E, K>,
        rows: Range<usize>,
        per: Per,
    ) -> Result<Tensor<f32>> {
        let look = self.look(of)?;
        look.check_rows(&rows)?;
        let Sizes { q, kv_heads, keys, .. } = look.sizes;
        let (heads, joined) = match per {
            Per::QueryHead => (q.heads, 1),
            Per::KvHead => (kv_heads, look.sizes.group()),
        };
        let mut result = Tensor::zeros(Shape { batch: q.batch, seq: keys, heads, dim: 1 })?;
        let mut view = result.view_mut();
        let out = view.share();
        let most = keys.div_ceil(KEY_TILE);
        look.for_parts(q.batch * heads * most, 0, |n, scratch| {
            let (batch, head, t) = (n / (heads * most), n / most % heads, n % most);
            let held = look.held(batch);
            let Some(positions) = tiles(&held).nth(t) else { return };
            let heads = head * joined..(head + 1) * joined;
            let part = Part { batch, heads, rows: rows.clone() };
            look.sum_columns(&part, positions.clone(), scratch);
            for (j, &sum) in positions.zip(&scratch.columns) {
                // SAFETY: each (key, head) belongs to one part.
                unsafe { out.row(batch, j - held.start, head)[0] = sum as f32 };
            }
        });
        Ok(result)
    }

    /// Adds the weights of a range of query rows of one sequence to a sum for each query head and key held, row after row in
    /// f64: however rows are cut into calls, sums have the same bits.
    pub(crate) fn add_columns<E: Element, K: Element>(
        &self,
        of: Forwarded<'_, E, K>,
        rows: Range<usize>,
        sums: &mut [Vec<f64>],
    ) -> Result<()> {
        let look = self.look(of)?;
        look.check_rows(&rows)?;
        let held = look.held(0);
        let columns = sums.iter_mut().enumerate().flat_map(|(head, sums)| {
            let places = tiles(&held).zip(sums.chunks_mut(KEY_TILE));
            places.map(move |(positions, sums)| (head, positions, sums))
        });
        let scratches = look.scratches(look.sizes.q.heads * tiles(&held).count(), 0);
        for_each_item(columns, scratches.into_iter(), |(head, positions, sums), scratch| {
            let part = Part { batch: 0, heads: head..head + 1, rows: rows.clone() };
            look.weigh(&part, positions, scratch, &mut |group| {
                for weights in group.weights.chunks_exact(KEY_TILE) {
                    sums.iter_mut().zip(weights).for_each(|(sum, w)| *sum += f64::from(*w));
                }
            });
        });
        Ok(())
    }

    /// The entropy of the weights of a range of query rows, `[B, rows, H, 1]`, in nats: 0 where one key or
    /// none gets everything, ln n where n keys share evenly. A learned sink is no key: what it takes is
    /// missing. Allocates the result and a little for each thread.
    ///
    /// # Errors
    /// Those of [`Plan::probabilities`].
    pub fn entropy<E: Element, K: Element>(
        &self,
        of: Forwarded<'_, E, K>,
        rows: Range<usize>,
    ) -> Result<Tensor<f32>> {
        let look = self.look(of)?;
        look.check_rows(&rows)?;
        let mut result = Tensor::zeros(Shape { seq: rows.len(), dim: 1, ..look.sizes.q })?;
        let mut view = result.view_mut();
        let out = view.share();
        look.for_row_parts(&rows, |part, scratch| {
            let (head, mut sums) = (part.heads.start, [0.0f64; ROWS]);
            for positions in tiles(&look.held(part.batch)) {
                look.weigh(part, positions, scratch, &mut |group| {
                    for (r, row) in group.rows.clone().enumerate() {
                        sums[row - part.rows.start] +=
                            group.entropy(r, look.base_2((part.batch, row, head)));
                    }
                });
            }
            for (row, sum) in part.rows.clone().zip(sums) {
                // SAFETY: each row belongs to one part.
                unsafe { out.row(part.batch, row - rows.start, head)[0] = sum as f32 };
            }
        });
        Ok(result)
    }

    /// The mean weight in each cell of a grid over all queries and keys, `[B, R, H, C]`; masked pairs count
    /// as zeros, and a cell without pairs is 0. Allocates the result and a little for each thread.
    ///
    /// # Errors
    /// Those of [`Plan::probabilities`].
    pub fn block_means<E: Element, K: Element>(
        &self,
        of: Forwarded<'_, E, K>,
        grid: Grid,
    ) -> Result<Tensor<f32>> {
        let look = self.look(of)?;
        let (q, Grid { rows, columns }) = (look.sizes.q, grid);
        let mut result = Tensor::zeros(Shape { seq: rows, dim: columns, ..q })?;
        if columns == 0 {
            return Ok(result);
        }
        let mut view = result.view_mut();
        let out = view.share();
        look.for_parts(q.batch * q.heads * rows, columns, |n, scratch| {
            let (batch, head, r) = (n / (q.heads * rows), n / rows % q.heads, n % rows);
            let held = look.held(batch);
            let part = Part { batch, heads: head..head + 1, rows: cell(q.seq, r, rows) };
            scratch.cells.fill(0.0);
            for positions in tiles(&held) {
                look.sum_columns(&part, positions.clone(), scratch);
                let from = positions.start - held.start;
                add_to_cells(
                    &scratch.columns[..positions.len()],
                    (from, held.len()),
                    &mut scratch.cells,
                );
            }
            // SAFETY: each row of cells belongs to one part.
            let out = unsafe { out.row(batch, r, head) };
            for (c, (out, &sum)) in out.iter_mut().zip(&scratch.cells).enumerate() {
                let pairs = part.rows.len() as f64 * cell(held.len(), c, columns).len() as f64;
                *out = if pairs == 0.0 { 0.0 } else { (sum / pairs) as f32 };
            }
        });
        Ok(result)
    }
}

/// A checked forward to look at.
#[derive(Debug)]
pub(crate) struct Look<'a, E, K> {
    pub(crate) of: Forwarded<'a, E, K>,
    pub(crate) mask: &'a Mask,
    pub(crate) terms: &'a Terms<'a>,
    pub(crate) factor: Factor,
    pub(crate) sizes: Sizes,
}

/// Neighbouring query rows of heads that read one key/value head.
#[derive(Debug)]
struct Part {
    batch: usize,
    heads: Range<usize>,
    rows: Range<usize>,
}

/// Rows of one head against one key tile.
struct Group<'a> {
    head: usize,
    rows: Range<usize>,
    positions: Range<usize>,
    /// `[row][KEY_TILE]`; 0 where masked and beyond the tile's end.
    weights: &'a [f32],
    /// `[row][KEY_TILE]`: logits in base 2 over `factor`; anything where the weight is 0.
    logits: &'a [f32],
    factor: f32,
}

impl Group<'_> {
    /// −Σ P ln P of row `r`, whose log-sum-exp is `lse` in base 2.
    fn entropy(&self, r: usize, lse: f32) -> f64 {
        let at = r * KEY_TILE..r * KEY_TILE + self.positions.len();
        let pairs = self.weights[at.clone()].iter().zip(&self.logits[at]);
        let bits: f64 = pairs
            .filter(|(weight, _)| **weight != 0.0)
            .map(|(&weight, &logit)| f64::from(weight) * f64::from(lse - logit * self.factor))
            .sum();
        bits * std::f64::consts::LN_2
    }
}

/// What a thread needs.
struct Scratch {
    /// One packed key tile.
    keys: Vec<f32>,
    queries: Vec<f32>,
    /// `[row][KEY_TILE]`.
    weights: Vec<f32>,
    /// `[row][KEY_TILE]`.
    logits: Vec<f32>,
    /// A sum for each key of a tile.
    columns: Vec<f64>,
    /// A sum for each column of a grid.
    cells: Vec<f64>,
    /// Products by distance.
    band: Vec<f32>,
}

impl<E: Element, K: Element> Look<'_, E, K> {
    fn check_rows(&self, rows: &Range<usize>) -> Result<()> {
        let limit = self.sizes.q.seq;
        if rows.start <= rows.end && rows.end <= limit {
            return Ok(());
        }
        let got = format!("{rows:?} of {limit}");
        let expected = "a range of the call's queries";
        Err(Error::InvalidParameter { what: "query rows", expected, got })
    }

    /// Runs `work` for each part and a thread's scratch, which holds `cells` sums.
    fn for_parts(&self, parts: usize, cells: usize, work: impl Fn(usize, &mut Scratch) + Sync) {
        for_each_part(parts, self.scratches(parts, cells).into_iter(), work);
    }

    /// One for each thread that has a part to work on.
    fn scratches(&self, parts: usize, cells: usize) -> Vec<Scratch> {
        let dim = self.sizes.q.dim;
        let scratch = |_| Scratch {
            keys: vec![0.0; KEY_TILE * dim],
            queries: vec![0.0; GROUP * dim],
            weights: vec![0.0; GROUP * KEY_TILE],
            logits: vec![0.0; GROUP * KEY_TILE],
            columns: vec![0.0; KEY_TILE],
            cells: vec![0.0; cells],
            band: vec![0.0; if self.sizes.by_distance { Band::floats(GROUP, dim) } else { 0 }],
        };
        (0..self.sizes.cpu.threads.count().min(parts)).map(scratch).collect()
    }

    /// Runs `work` for each head and up to [`ROWS`] of the rows.
    fn for_row_parts(&self, rows: &Range<usize>, work: impl Fn(&Part, &mut Scratch) + Sync) {
        let Shape { batch, heads, .. } = self.sizes.q;
        let blocks = rows.len().div_ceil(ROWS);
        self.for_parts(batch * heads * blocks, 0, |n, scratch| {
            let (batch, head) = (n / (heads * blocks), n / blocks % heads);
            let first = rows.start + n % blocks * ROWS;
            let rows = first..(first + ROWS).min(rows.end);
            work(&Part { batch, heads: head..head + 1, rows }, scratch);
        });
    }

    /// The positions of a sequence's keys.
    fn held(&self, batch: usize) -> Range<usize> {
        self.of.keys.start(batch)..self.of.keys.end(batch)
    }

    fn position(&self, batch: usize, row: usize) -> isize {
        row as isize + self.of.keys.end(batch) as isize - self.sizes.q.seq as isize
    }

    fn site(&self, batch: usize, q_head: usize) -> Site {
        Site { batch, q_head, kv_head: q_head / self.sizes.group() }
    }

    /// The log-sum-exp of a (sequence, row, head) in base 2.
    fn base_2(&self, (batch, row, head): (usize, usize, usize)) -> f32 {
        self.of.lse.row(batch, row, head)[0] * LOG2_E
    }

    /// Sums the weights of a part's rows into the scratch's columns.
    fn sum_columns(&self, part: &Part, positions: Range<usize>, scratch: &mut Scratch) {
        let mut columns = std::mem::take(&mut scratch.columns);
        columns.fill(0.0);
        self.weigh(part, positions, scratch, &mut |group| {
            for (n, sum) in columns.iter_mut().enumerate() {
                let rows = 0..group.rows.len();
                let weights = rows.map(|r| group.weights[r * KEY_TILE + n]);
                *sum += f64::from(weights.fold(0.0, |sum, weight| sum + weight));
            }
        });
        scratch.columns = columns;
    }

    /// Computes the weights of a part's rows for the keys of one tile and hands them out in the order of
    /// heads and rows, leaving out groups of rows that see nothing there.
    fn weigh(
        &self,
        part: &Part,
        positions: Range<usize>,
        scratch: &mut Scratch,
        visit: &mut dyn FnMut(Group<'_>),
    ) {
        let mut packed = false;
        for head in part.heads.clone() {
            let site = self.site(part.batch, head);
            for first in part.rows.clone().step_by(ROWS) {
                let rows = first..(first + ROWS).min(part.rows.end);
                let end = self.position(part.batch, rows.end);
                let at = (site, self.position(part.batch, rows.start)..end);
                live_tiles(self.mask, at, positions.clone(), &mut |positions, full| {
                    if !std::mem::replace(&mut packed, true) {
                        self.pack(site, positions.clone(), &mut scratch.keys);
                    }
                    for first in rows.clone().step_by(GROUP) {
                        let rows = first..(first + GROUP).min(rows.end);
                        let tile = Tile { site, rows, positions: positions.clone(), full };
                        self.group(tile, scratch, visit);
                    }
                });
            }
        }
    }

    fn pack(&self, site: Site, positions: Range<usize>, keys: &mut [f32]) {
        let tile = self.of.keys.tile(site.batch, site.kv_head, positions);
        Form::Numbers(self.sizes.cpu.level).pack_keys(tile.keys, keys);
    }

    /// The weights of up to six rows.
    fn group(&self, tile: Tile, scratch: &mut Scratch, visit: &mut dyn FnMut(Group<'_>)) {
        let (level, depth, n) = (self.sizes.cpu.level, self.sizes.q.dim, tile.rows.len());
        let mut words = [KeyWords::default(); GROUP];
        let words = &mut words[..n];
        let used = tile.positions.len().div_ceil(64);
        for (words, row) in words.iter_mut().zip(tile.rows.clone()) {
            let i = self.position(tile.site.batch, row);
            self.mask.fill(tile.site, i, tile.positions.clone(), &mut words[..used]);
        }
        if words.iter().flatten().all(|&word| word == 0) {
            return;
        }
        let visible = match tile.full && tile.positions.len().is_multiple_of(STEP) {
            true => Visible::All(tile.positions.len()),
            false => Visible::Some(words),
        };
        let (batch, head) = (tile.site.batch, tile.site.q_head);
        let (queries, weights) =
            (&mut scratch.queries[..n * depth], &mut scratch.weights[..n * KEY_TILE]);
        let (mut shift, form) = ([0.0; GROUP], Form::Numbers(level));
        let (mut band, _) = Band::split(self.terms, level, GROUP, &mut scratch.band);
        for (r, row) in tile.rows.clone().enumerate() {
            let query = self.of.q.row(batch, row, head);
            let to = &mut queries[r * depth..(r + 1) * depth];
            self.factor.load(form, query, to);
            if let Some(band) = &mut band {
                band.load(self.factor, (r, head), to);
            }
            shift[r] = self.base_2((batch, row, head));
        }
        let keys = &scratch.keys[..tile.positions.len().div_ceil(PANEL) * PANEL * depth];
        let (out, max, hidden) = (&mut *weights, &mut [0.0; GROUP], f32::NEG_INFINITY);
        let (rows, stride, out_stride) = (n, depth, KEY_TILE);
        let product =
            Scores { queries, stride, rows, depth, keys, visible, hidden, out, out_stride, max };
        tile::scores(form, product);
        let last = self.position(batch, tile.rows.end - 1);
        let by_distance = band.as_mut().map(|band| {
            band.pack(head, last - tile.positions.start as isize, n);
            band.products(0..n, visible, None)
        });
        let factor = self.finish(&tile, (visible, by_distance), weights);
        scratch.logits[..n * KEY_TILE].copy_from_slice(weights);
        let shift = &shift[..n];
        normalise(level, Normalise { weights, visible, words, factor, shift });
        let (weights, logits) = (&*weights, &*scratch.logits);
        let Tile { rows, positions, .. } = tile;
        visit(Group { head, rows, positions, weights, logits, factor });
    }

    /// Applies the call's terms to scores; returns what makes logits in base 2 of the result.
    fn finish(
        &self,
        tile: &Tile,
        (visible, by_distance): (Visible<'_>, Option<ByDistance<'_>>),
        scores: &mut [f32],
    ) -> f32 {
        if self.terms.plain() {
            return self.factor.factor;
        }
        let (batch, head) = (tile.site.batch, tile.site.q_head);
        let sites = tile.rows.clone().map(|query| {
            let position = self.position(batch, query);
            RowSite { batch, head, query, position }
        });
        let finish = Finish {
            level: self.sizes.cpu.level,
            factor: self.factor,
            heads: self.sizes.q.heads,
            positions: tile.positions.clone(),
            visible,
            by_distance,
            scores,
            max: &mut [0.0; GROUP],
            bend: None,
        };
        self.terms.finish(sites, finish);
        1.0
    }
}

/// Up to six rows of one head against one key tile.
struct Tile {
    site: Site,
    rows: Range<usize>,
    positions: Range<usize>,
    /// Whether every row sees every key.
    full: bool,
}

struct Normalise<'a> {
    /// In: scores; out: weights. `[row][KEY_TILE]`.
    weights: &'a mut [f32],
    visible: Visible<'a>,
    /// One bit for each key that a row sees.
    words: &'a [KeyWords],
    factor: f32,
    /// The rows' log-sum-exp in base 2.
    shift: &'a [f32],
}

/// exp2(factor · score − log-sum-exp), and 0 for every key that a row does not see.
fn normalise(level: Level, args: Normalise<'_>) {
    let Normalise { weights, visible, words, factor, shift } = args;
    let n = shift.len();
    // A maximum of all keys is known, so that the tile brings none.
    let (mut max, mut sum, mut rescale) = ([0.0; GROUP], [0.0; GROUP * 16], [0.0; GROUP]);
    max[..n].copy_from_slice(shift);
    tile::softmax(
        level,
        Softmax {
            scores: &mut *weights,
            max: &[f32::NEG_INFINITY; GROUP],
            visible,
            factor,
            running_max: &mut max[..n],
            running_sum: &mut sum[..n * 16],
            rescale: &mut rescale,
        },
    );
    let steps = visible.all_steps();
    for ((row, words), shift) in weights.chunks_exact_mut(KEY_TILE).zip(words).zip(shift) {
        if shift.is_nan() || *shift == f32::NEG_INFINITY {
            // Nothing was seen, or something that is no number: every key seen gets that.
            for (j, weight) in row.iter_mut().enumerate() {
                let seen = words[j / 64] >> (j % 64) & 1 == 1;
                *weight = if seen && shift.is_nan() { f32::NAN } else { 0.0 };
            }
        }
        for (panel, (first, end)) in row.chunks_exact_mut(PANEL).zip(steps) {
            panel[..first * STEP].fill(0.0);
            panel[end * STEP..].fill(0.0);
        }
    }
}

/// The key tiles of a sequence.
fn tiles(held: &Range<usize>) -> impl Iterator<Item = Range<usize>> + use<> {
    let end = held.end;
    held.clone().step_by(KEY_TILE).map(move |start| start..(start + KEY_TILE).min(end))
}

/// What cell `index` of `count` holds of `length` numbers.
fn cell(length: usize, index: usize, count: usize) -> Range<usize> {
    let edge = |n: usize| (length as u128 * n as u128 / count as u128) as usize;
    edge(index)..edge(index + 1)
}

/// Adds sums of the keys `from..` of `length` to the cells that they lie in.
fn add_to_cells(sums: &[f64], (from, length): (usize, usize), cells: &mut [f64]) {
    let count = cells.len();
    // The cell of the first key: the last that does not begin behind it.
    let mut c = (from as u128 * count as u128 / length as u128) as usize;
    for (j, sum) in sums.iter().enumerate() {
        while cell(length, c, count).end <= from + j {
            c += 1;
        }
        cells[c] += sum;
    }
}
