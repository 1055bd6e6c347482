//! The three steps of the tile kernels, for a group of up to 6 query rows against one key tile:
//! scores S = Q Kᵀ, probabilities P = exp2(c S − m), and O ← α O + P V.
//!
//! Keys are packed into panels `[key / 64][d][key % 64]`, so that a score vector is a sum over d of
//! a broadcast query times 16 neighbouring keys; values are used as they lie, `[key][d]`. Each sum
//! runs over d (or over keys) in order with one accumulator per element, started at zero for each
//! key tile. A row's bits therefore depend neither on the rows that share its group nor on which
//! masked keys were skipped: a skipped key would have added an exact zero.

use super::product::{Product, dispatch_form};
use super::{Simd, dispatch, math};
use crate::element::Element;
use crate::tensor::Rows;

/// Query rows that one pass over a tile computes together.
pub(crate) const GROUP: usize = 6;
/// Keys of one packed panel, and bits of one mask word.
pub(crate) const PANEL: usize = 64;
/// Keys of a tile; tiles start at multiples of this position in every sequence.
pub(crate) const KEY_TILE: usize = 256;
/// Keys that masks are resolved to before exact key bounds apply.
pub(crate) const STEP: usize = 16;
pub(super) const PANELS: usize = KEY_TILE / PANEL;

/// One bit per key of a tile: may the row see it?
pub(crate) type KeyWords = [u64; PANELS];

/// For each panel of a tile, steps of [`STEP`] keys: `first..end`.
pub(crate) type Steps = [(usize, usize); PANELS];

/// Which keys of a tile a group of rows computes.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Visible<'a> {
    /// Every row sees the first `n` keys; `n` is a multiple of [`STEP`].
    All(usize),
    /// One set of bits per row.
    Some(&'a [KeyWords]),
}

impl Visible<'_> {
    /// Steps of all panels that some row sees.
    pub(crate) fn all_steps(&self) -> Steps {
        std::array::from_fn(|panel| self.steps(panel))
    }

    /// Steps of 16 keys of a panel that some row sees: `first..end`, empty if none.
    #[inline(always)]
    pub(super) fn steps(&self, panel: usize) -> (usize, usize) {
        match self {
            Visible::All(n) => (0, n.saturating_sub(panel * PANEL).min(PANEL) / STEP),
            Visible::Some(rows) => {
                let any = rows.iter().fold(0, |any, words| any | words[panel]);
                match any {
                    0 => (0, 0),
                    _ => (
                        any.trailing_zeros() as usize / STEP,
                        (PANEL - any.leading_zeros() as usize).div_ceil(STEP),
                    ),
                }
            }
        }
    }

    /// The keys that one of the rows sees, unless it sees all.
    pub(crate) fn row(&self, r: usize) -> Option<&KeyWords> {
        match self {
            Visible::All(_) => None,
            Visible::Some(rows) => Some(&rows[r]),
        }
    }

    /// Exact bounds of the keys of a panel that some row sees.
    #[inline(always)]
    fn keys(&self, panel: usize) -> (usize, usize) {
        let at = panel * PANEL;
        match self {
            Visible::All(n) => (at, (*n).clamp(at, at + PANEL)),
            Visible::Some(rows) => {
                let any = rows.iter().fold(0, |any, words| any | words[panel]);
                match any {
                    0 => (at, at),
                    _ => (
                        at + any.trailing_zeros() as usize,
                        at + PANEL - any.leading_zeros() as usize,
                    ),
                }
            }
        }
    }
}

dispatch! {
    /// Packs keys into panels; missing keys become zero up to the next multiple of [`STEP`], and what lies
    /// beyond in the last panel is untouched.
    ///
    /// `out` holds `ceil(count / 64) * 64 * width` numbers.
    pub(crate) fn pack_keys<E: Element>(keys: Rows<'_, E>, out: &mut [f32]) = pack_keys_kernel
}

#[inline(always)]
pub(super) fn pack_keys_kernel<P: Product, E: Element>(
    product: P,
    keys: Rows<'_, E>,
    out: &mut [f32],
) {
    let (count, width) = (keys.count(), keys.width());
    let depth = width.div_ceil(P::CELL);
    assert_eq!(out.len(), count.div_ceil(PANEL) * PANEL * depth);
    for block in 0..count.next_multiple_of(STEP) / P::S::LANES {
        let first = block * P::S::LANES;
        let rows = count.saturating_sub(first).min(P::S::LANES);
        let column = first / PANEL * PANEL * depth + first % PANEL;
        for d in (0..depth).step_by(P::S::LANES) {
            let left = (width - d * P::CELL).min(P::S::LANES * P::CELL);
            // SAFETY: row first + r < count starts at its stride and holds `width` elements, of which
            // those of cells d.. are at least `left`; the panel holds PANEL cells for each of `depth`
            // d, and `column` leaves room for LANES of them.
            unsafe {
                let from = keys.as_ptr().add(first * keys.stride() + d * P::CELL);
                let to = out.as_mut_ptr().add(column + d * PANEL);
                if rows == P::S::LANES && left == P::S::LANES * P::CELL {
                    pack_square(product, from, keys.stride(), to);
                } else {
                    pack_corner(product, (from, keys.stride()), [rows, left], to);
                }
            }
        }
    }
}

/// LANES rows of LANES cells, from rows to columns.
///
/// # Safety
/// So many elements are readable at `from`, rows `stride` apart, and so many cells writable at `to`, rows
/// PANEL apart.
#[inline(always)]
unsafe fn pack_square<P: Product, E: Element>(
    product: P,
    from: *const E,
    stride: usize,
    to: *mut f32,
) {
    let s = product.simd();
    let mut square = [s.splat(0.0); 16];
    // SAFETY: the caller's promise.
    unsafe {
        for r in 0..P::S::LANES {
            square[r] = product.load_cells(from.add(r * stride));
        }
        s.transpose(&mut square);
        for k in 0..P::S::LANES {
            s.store(to.add(k * PANEL), square[k]);
        }
    }
}

/// Fewer rows, or fewer numbers of each; missing rows are zero.
///
/// # Safety
/// That of [`pack_square`], for `rows` rows of `left` numbers.
#[inline(always)]
unsafe fn pack_corner<P: Product, E: Element>(
    product: P,
    (from, stride): (*const E, usize),
    [rows, left]: [usize; 2],
    to: *mut f32,
) {
    let s = product.simd();
    let mut square = [s.splat(0.0); 16];
    // SAFETY: the caller's promise.
    unsafe {
        for (r, row) in square.iter_mut().enumerate().take(rows) {
            let p = from.add(r * stride);
            *row = match left == P::S::LANES * P::CELL {
                true => product.load_cells(p),
                false => product.load_cells_part(p, left),
            };
        }
        s.transpose(&mut square);
        for (k, &vector) in square.iter().enumerate().take(left.div_ceil(P::CELL)) {
            s.store(to.add(k * PANEL), vector);
        }
    }
}

/// What [`scores`] reads and writes.
#[derive(Debug)]
pub(crate) struct Scores<'a> {
    /// The group's query rows, `depth` numbers each.
    pub(crate) queries: &'a [f32],
    /// Numbers from one query row to the next.
    pub(crate) stride: usize,
    /// Query rows, at most [`GROUP`].
    pub(crate) rows: usize,
    /// Numbers of a query or key.
    pub(crate) depth: usize,
    /// The tile's packed panels.
    pub(crate) keys: &'a [f32],
    /// Which keys count.
    pub(crate) visible: Visible<'a>,
    /// What a computed key gets that the row may not see: −∞ for scores.
    pub(crate) hidden: f32,
    /// Out: a row for each query; skipped steps are untouched.
    pub(crate) out: &'a mut [f32],
    /// Numbers from one of them to the next.
    pub(crate) out_stride: usize,
    /// Out: the largest visible score of each row, −∞ if there is none.
    pub(crate) max: &'a mut [f32; GROUP],
}

dispatch_form! {
    /// S = Q Kᵀ for a group of rows, masked, with row maxima.
    pub(crate) fn scores(args: Scores<'_>) = scores_kernel
}

#[inline(always)]
pub(super) fn scores_kernel<P: Product>(product: P, args: Scores<'_>) {
    match args.rows {
        1 => scores_rows::<P, 1>(product, args),
        2 => scores_rows::<P, 2>(product, args),
        3 => scores_rows::<P, 3>(product, args),
        4 => scores_rows::<P, 4>(product, args),
        5 => scores_rows::<P, 5>(product, args),
        6 => scores_rows::<P, 6>(product, args),
        rows => panic!("a group has 1 to {GROUP} rows, not {rows}"),
    }
}

#[inline(always)]
fn scores_rows<P: Product, const R: usize>(product: P, args: Scores<'_>) {
    let s = product.simd();
    let Scores { queries, stride, depth, keys, visible, hidden, out, out_stride, max, .. } = args;
    let panels = (keys.len() / (PANEL * depth)).min(PANELS);
    assert!(queries.len() >= (R - 1) * stride + depth);
    assert!(out.len() >= (R - 1) * out_stride + panels * PANEL);
    if let Visible::Some(words) = visible {
        assert_eq!(words.len(), R);
    }
    let mut largest = [s.splat(f32::NEG_INFINITY); R];
    for panel in 0..panels {
        let (first, end) = visible.steps(panel);
        let (mut v, end) = (first * STEP / P::S::LANES, end * STEP / P::S::LANES);
        while v < end {
            let at = Column { panel, lane: v * P::S::LANES };
            let taken = (end - v).min(P::S::TILE_VECTORS);
            // SAFETY: the panel lies inside `keys`, columns v.. of it hold `taken` vectors, and
            // `out` has as many numbers as the panels for each of R rows; lengths were checked above.
            unsafe {
                let out = out.as_mut_ptr();
                let io =
                    ScoreBlock { queries, stride, depth, keys, visible, hidden, out, out_stride };
                match taken {
                    1 => score_block::<P, R, 1>(product, &io, at, &mut largest),
                    2 if P::S::TILE_VECTORS >= 2 => {
                        score_block::<P, R, 2>(product, &io, at, &mut largest)
                    }
                    3 if P::S::TILE_VECTORS >= 3 => {
                        score_block::<P, R, 3>(product, &io, at, &mut largest)
                    }
                    _ => score_block::<P, R, 4>(product, &io, at, &mut largest),
                }
            }
            v += taken;
        }
    }
    for r in 0..R {
        max[r] = s.reduce_max(largest[r]);
    }
}

struct ScoreBlock<'a> {
    queries: &'a [f32],
    stride: usize,
    depth: usize,
    keys: &'a [f32],
    visible: Visible<'a>,
    hidden: f32,
    out: *mut f32,
    out_stride: usize,
}

#[derive(Clone, Copy)]
struct Column {
    panel: usize,
    lane: usize,
}

/// R rows × V vectors of scores, then mask, store and running maximum while they are in registers.
///
/// # Safety
/// The panel lies inside `io.keys`, `at.lane + V * LANES <= PANEL`, `io.queries` holds R rows, and
/// `io.out` is valid for the panel's numbers of R rows, `io.out_stride` apart.
#[inline(always)]
unsafe fn score_block<P: Product, const R: usize, const V: usize>(
    product: P,
    io: &ScoreBlock<'_>,
    at: Column,
    largest: &mut [<P::S as Simd>::F; R],
) {
    let s = product.simd();
    let mut sums = [[s.splat(0.0); V]; R];
    // SAFETY: see the contract; d < depth stays inside a query row and inside the panel.
    unsafe {
        let panel = io.keys.as_ptr().add(at.panel * PANEL * io.depth + at.lane);
        let queries = io.queries.as_ptr();
        for d in 0..io.depth {
            let mut keys = [s.splat(0.0); V];
            for (v, key) in keys.iter_mut().enumerate() {
                *key = s.load(panel.add(d * PANEL + v * P::S::LANES));
            }
            for r in 0..R {
                let query = s.splat(*queries.add(r * io.stride + d));
                for v in 0..V {
                    sums[r][v] = product.step(query, keys[v], sums[r][v]);
                }
            }
        }
    }
    for r in 0..R {
        for v in 0..V {
            let lane = at.lane + v * P::S::LANES;
            let mut x = sums[r][v];
            if let Visible::Some(words) = io.visible {
                let bits = (words[r][at.panel] >> lane) as u32;
                x = s.select(bits, x, s.splat(io.hidden));
            }
            largest[r] = s.max(x, largest[r]);
            // SAFETY: the panel's lanes lie inside row r.
            unsafe { s.store(io.out.add(r * io.out_stride + at.panel * PANEL + lane), x) };
        }
    }
}

/// What [`softmax`] reads and writes.
#[derive(Debug)]
pub(crate) struct Softmax<'a> {
    /// In: scores; out: probabilities relative to the new maximum. `[row][KEY_TILE]`.
    pub(crate) scores: &'a mut [f32],
    /// The largest score of each row, from [`scores`].
    pub(crate) max: &'a [f32; GROUP],
    /// Which keys count.
    pub(crate) visible: Visible<'a>,
    /// Multiplies scores into base-2 logits: scale · log2 e, not negative.
    pub(crate) factor: f32,
    /// The rows' running maxima, in base-2 logits. One per row of the group.
    pub(crate) running_max: &'a mut [f32],
    /// The rows' running sums, 16 lanes each.
    pub(crate) running_sum: &'a mut [f32],
    /// Out: what earlier accumulators have to be multiplied by.
    pub(crate) rescale: &'a mut [f32; GROUP],
}

dispatch! {
    /// P = exp2(factor · S − m) with the running maximum m and sum brought up to date.
    pub(crate) fn softmax(args: Softmax<'_>) = softmax_kernel
}

#[inline(always)]
pub(super) fn softmax_kernel<S: Simd>(s: S, args: Softmax<'_>) {
    let rows = args.running_max.len();
    assert!(rows <= GROUP && args.running_sum.len() == rows * 16);
    assert!(args.scores.len() >= rows * KEY_TILE);
    const { assert!(GROUP <= S::LANES) };
    let (mut shifts, factor) = ([0.0; 16], s.splat(args.factor));
    // SAFETY: the maxima and rescales hold `rows` <= LANES numbers, and `shifts` 16.
    unsafe {
        let old = s.load_part(args.running_max.as_ptr(), rows);
        let new = s.max(s.mul(s.load_part(args.max.as_ptr(), rows), factor), old);
        s.store_part(args.running_max.as_mut_ptr(), new, rows);
        // A row that has seen nothing has maximum −∞; a finite number in its place keeps exp2(−∞ − m) at 0.
        let shift = s.max(new, s.splat(f32::MIN));
        s.store_part(args.rescale.as_mut_ptr(), math::exp2(s, s.sub(old, shift)), rows);
        s.store(shifts.as_mut_ptr(), s.sub(s.splat(0.0), shift));
    }
    for r in 0..rows {
        let (rescale, shift) = (s.splat(args.rescale[r]), s.splat(shifts[r]));
        let row = args.scores[r * KEY_TILE..][..KEY_TILE].as_mut_ptr();
        let sum_at = args.running_sum[r * 16..][..16].as_mut_ptr();
        // SAFETY: a row holds KEY_TILE numbers and its sum 16 >= LANES.
        let mut sum = s.mul(unsafe { s.load(sum_at) }, rescale);
        for panel in 0..PANELS {
            let (first, end) = args.visible.steps(panel);
            for v in first * STEP / S::LANES..end * STEP / S::LANES {
                // SAFETY: panel and vector index lie inside the row's KEY_TILE numbers.
                unsafe {
                    let p = row.add(panel * PANEL + v * S::LANES);
                    let x = math::exp2(s, s.fma(s.load(p), factor, shift));
                    sum = s.add(sum, x);
                    s.store(p, x);
                }
            }
        }
        // SAFETY: as above.
        unsafe { s.store(sum_at, sum) };
    }
}

/// What [`values`] reads and writes.
#[derive(Debug)]
pub(crate) struct Values<'a> {
    /// Probabilities, `[row][KEY_TILE]`.
    pub(crate) probabilities: &'a [f32],
    /// Which keys count.
    pub(crate) visible: Visible<'a>,
    /// The tile's values, one row a key.
    pub(crate) values: Rows<'a, f32>,
    /// What the accumulators are multiplied by first. One per row.
    pub(crate) rescale: &'a [f32; GROUP],
    /// Accumulators, `[row][width rounded up to 16]`.
    pub(crate) out: &'a mut [f32],
}

/// The sum of the 16 lanes of a row's running sum, by halves.
#[inline(always)]
pub(crate) fn lane_sum(lanes: &[f32]) -> f32 {
    let mut half: [f32; 8] = std::array::from_fn(|i| lanes[i] + lanes[i + 8]);
    for n in [4, 2, 1] {
        for i in 0..n {
            half[i] += half[i + n];
        }
    }
    half[0]
}

/// Rows that are computed together when `rows` are left to be: as many for each group, at most [`GROUP`].
pub(crate) fn group_size(rows: usize) -> usize {
    rows.div_ceil(rows.div_ceil(GROUP).max(1))
}

/// The length of an accumulator row for values of `width` numbers.
pub(crate) fn padded(width: usize) -> usize {
    width.next_multiple_of(16)
}

dispatch_form! {
    /// O ← α O + P V for a group of rows.
    pub(crate) fn values(args: Values<'_>) = values_kernel
}

#[inline(always)]
pub(super) fn values_kernel<P: Product>(product: P, args: Values<'_>) {
    match args.out.len() / padded(args.values.width()).max(1) {
        1 => values_rows::<P, 1>(product, args),
        2 => values_rows::<P, 2>(product, args),
        3 => values_rows::<P, 3>(product, args),
        4 => values_rows::<P, 4>(product, args),
        5 => values_rows::<P, 5>(product, args),
        6 => values_rows::<P, 6>(product, args),
        rows => panic!("a group has 1 to {GROUP} rows, not {rows}"),
    }
}

#[inline(always)]
fn values_rows<P: Product, const R: usize>(product: P, args: Values<'_>) {
    let width = args.values.width();
    assert!(args.probabilities.len() >= R * KEY_TILE && args.out.len() == R * padded(width));
    let mut spans = [(0, 0); PANELS];
    for (panel, span) in spans.iter_mut().enumerate() {
        let (first, end) = args.visible.keys(panel);
        *span = (first / P::CELL, end.div_ceil(P::CELL));
        span.1 = span.1.min(args.values.count());
        span.0 = span.0.min(span.1);
    }
    let mut column = 0;
    while column < width {
        let left = width - column;
        let io = ValueBlock {
            probabilities: args.probabilities.as_ptr(),
            values: args.values.as_ptr().wrapping_add(column),
            stride: args.values.stride(),
            spans,
            rescale: args.rescale,
            out: args.out.as_mut_ptr().wrapping_add(column),
            out_stride: padded(width),
            tail: left % P::S::LANES,
        };
        let whole = (left / P::S::LANES).min(P::S::TILE_VECTORS);
        // SAFETY: keys below the rows' count, columns below their width; `out` rows are padded, so
        // that the last vector may be stored whole.
        unsafe { value_columns::<P, R, false>(product, &io, whole) };
        column += whole.max(1) * P::S::LANES;
    }
}

/// One block of columns of a product: which numbers weigh which rows, and where the sums go.
pub(super) struct ValueBlock<'a> {
    /// `[row][KEY_TILE]`; the weight of input j in output r is at `[r][j]`, or across at `[j][r]`.
    pub(super) probabilities: *const f32,
    pub(super) values: *const f32,
    pub(super) stride: usize,
    /// The inputs that count.
    pub(super) spans: [(usize, usize); PANELS],
    pub(super) rescale: &'a [f32; GROUP],
    pub(super) out: *mut f32,
    pub(super) out_stride: usize,
    /// Numbers of the last vector where there is no whole one.
    pub(super) tail: usize,
}

/// R rows × `whole` vectors of one column block, or `io.tail` numbers if there is no whole vector.
///
/// # Safety
/// That of [`value_block`].
#[inline(always)]
pub(super) unsafe fn value_columns<P: Product, const R: usize, const ACROSS: bool>(
    product: P,
    io: &ValueBlock<'_>,
    whole: usize,
) {
    // SAFETY: the caller's promise.
    unsafe {
        match whole {
            0 => value_block::<P, R, 1, true, ACROSS>(product, io),
            1 => value_block::<P, R, 1, false, ACROSS>(product, io),
            2 if P::S::TILE_VECTORS >= 2 => value_block::<P, R, 2, false, ACROSS>(product, io),
            3 if P::S::TILE_VECTORS >= 3 => value_block::<P, R, 3, false, ACROSS>(product, io),
            _ => value_block::<P, R, 4, false, ACROSS>(product, io),
        }
    }
}

/// R rows × V vectors of one column block; with TAIL the one vector is `tail` numbers wide.
///
/// # Safety
/// Each span's inputs have a row of values with V vectors (or `tail` numbers) at `io.values`;
/// probabilities hold R rows, or across R columns of a row for each input; `io.out` holds R rows
/// of V whole vectors.
#[inline(always)]
unsafe fn value_block<
    P: Product,
    const R: usize,
    const V: usize,
    const TAIL: bool,
    const ACROSS: bool,
>(
    product: P,
    io: &ValueBlock<'_>,
) {
    let s = product.simd();
    let mut sums = [[s.splat(0.0); V]; R];
    // SAFETY: see the contract.
    unsafe {
        for (first, end) in io.spans {
            for j in first..end {
                let at = io.values.add(j * io.stride);
                let mut value = [s.splat(0.0); V];
                for (v, x) in value.iter_mut().enumerate() {
                    let p = at.add(v * P::S::LANES);
                    *x = if TAIL { s.load_part(p, io.tail) } else { s.load(p) };
                }
                for r in 0..R {
                    let weight = if ACROSS { j * KEY_TILE + r } else { r * KEY_TILE + j };
                    let p = s.splat(*io.probabilities.add(weight));
                    for v in 0..V {
                        sums[r][v] = product.step(p, value[v], sums[r][v]);
                    }
                }
            }
        }
        for r in 0..R {
            let rescale = s.splat(io.rescale[r]);
            for v in 0..V {
                let p = io.out.add(r * io.out_stride + v * P::S::LANES);
                s.store(p, s.fma(rescale, s.load(p), sums[r][v]));
            }
        }
    }
}
