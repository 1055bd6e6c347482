//! Sweeps of a matrix state over tokens: decay, add outer products, read with vectors.
//!
//! ```text
//! for each token t:   M ← a_t M + 2⁻¹⁰⁰                    decay: one number, one a row, or one a column
//!                     b_t = Mᵀ p_t                         before
//!                     M ← M + x_t y_tᵀ                     write
//!                     o_t = Mᵀ w_t                         read
//!                     M ← M + x'_t y'_tᵀ                   after
//! ```
//!
//! Each part is optional; a backward pass decays last. Columns are independent of each other, so a sweep takes
//! a few of them through all its tokens, several tokens a pass over the rows: the state is read and written once a
//! pass. An element of M is one chain of operations in the order of tokens, an element of a read one chain over rows:
//! no bit depends on how many tokens share a pass or a call.
//! A decay adds 2⁻¹⁰⁰ to what it leaves: what decays for long settles there, and not among subnormal numbers.

use super::near::{Near, Turn};
use super::{Simd, dispatch};

/// What a decay adds: 2⁻¹⁰⁰.
pub(super) const FLOOR: f32 = 7.888_609e-31;
/// Columns of a packed panel: what stays in the first level of cache.
pub(crate) const NARROW: usize = 32;
/// Columns of a panel of a state that lies in place: long pieces of each row.
const WIDE: usize = 64;

/// A dimension, padded to whole vectors of every level.
pub(crate) const fn padded(n: usize) -> usize {
    n.next_multiple_of(16)
}

/// Where the elements of a matrix lie: panels of neighbouring columns, in each of them row after row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Layout {
    /// Rows.
    pub(crate) rows: usize,
    /// Columns, whole vectors.
    pub(crate) columns: usize,
    /// Columns of a panel; the last one may have fewer.
    pub(crate) panel: usize,
    /// From one row to the next in a full panel; `None` if rows of a panel are packed.
    pub(crate) row_stride: Option<usize>,
}

impl Layout {
    /// Panels packed one after the other.
    pub(crate) fn packed(rows: usize, columns: usize, panel: usize) -> Layout {
        Layout { rows, columns: padded(columns), panel, row_stride: None }
    }

    /// A dense row-major matrix as it lies; `columns` is a multiple of 16.
    pub(crate) fn dense(rows: usize, columns: usize) -> Layout {
        Layout { rows, columns, panel: WIDE, row_stride: Some(columns) }
    }

    /// Numbers of the matrix.
    pub(crate) fn floats(&self) -> usize {
        self.rows * self.columns
    }

    /// Where each panel lies.
    pub(super) fn panels(self) -> impl Iterator<Item = Panel> {
        (0..self.columns).step_by(self.panel).map(move |first| {
            let width = self.panel.min(self.columns - first);
            match self.row_stride {
                Some(stride) => Panel { first, width, offset: first, stride },
                None => Panel { first, width, offset: first * self.rows, stride: width },
            }
        })
    }

    /// The place of an element.
    fn at(&self, row: usize, column: usize) -> usize {
        match self.row_stride {
            Some(stride) => row * stride + column,
            None => {
                let first = column / self.panel * self.panel;
                let width = self.panel.min(self.columns - first);
                first * self.rows + row * width + column - first
            }
        }
    }

    /// Packs a dense row-major matrix of `columns` columns; padding becomes zero.
    pub(crate) fn pack(&self, dense: &[f32], columns: usize, to: &mut [f32]) {
        for (row, dense) in dense.chunks_exact(columns.max(1)).enumerate() {
            for first in (0..self.columns).step_by(16) {
                let to = &mut to[self.at(row, first)..][..16];
                let from = &dense[first.min(columns)..columns.min(first + 16)];
                to[..from.len()].copy_from_slice(from);
                to[from.len()..].fill(0.0);
            }
        }
    }

    /// Packs the transpose of a dense row-major matrix of `self.rows` columns; padding becomes zero.
    pub(crate) fn pack_transposed(&self, dense: &[f32], to: &mut [f32]) {
        to[..self.floats()].fill(0.0);
        for (column, dense) in dense.chunks_exact(self.rows.max(1)).enumerate() {
            for (row, &x) in dense.iter().enumerate() {
                to[self.at(row, column)] = x;
            }
        }
    }

    /// The inverse of [`Layout::pack`].
    pub(crate) fn unpack(&self, from: &[f32], dense: &mut [f32], columns: usize) {
        for (row, dense) in dense.chunks_exact_mut(columns.max(1)).enumerate() {
            for first in (0..columns).step_by(16) {
                let n = (columns - first).min(16);
                dense[first..first + n].copy_from_slice(&from[self.at(row, first)..][..n]);
            }
        }
    }

    /// Σ over columns of a row of this matrix times the same column of a dense row-major transpose.
    pub(crate) fn dot_transposed_column(&self, from: &[f32], column: usize, dense: &[f32]) -> f64 {
        let terms =
            (0..self.rows).map(|row| f64::from(from[self.at(row, column)]) * f64::from(dense[row]));
        terms.sum()
    }
}

/// Neighbouring columns: the first of them and their number, the place of the first element, from row to row.
#[derive(Debug, Clone, Copy)]
pub(super) struct Panel {
    pub(super) first: usize,
    pub(super) width: usize,
    pub(super) offset: usize,
    pub(super) stride: usize,
}

/// One row of numbers for each token, `stride` apart.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TokenRows<'a> {
    /// The numbers.
    pub(crate) data: &'a [f32],
    /// From one token to the next.
    pub(crate) stride: usize,
}

impl TokenRows<'_> {
    pub(super) fn check(&self, tokens: usize, width: usize) {
        assert!(tokens == 0 || self.data.len() >= (tokens - 1) * self.stride + width);
    }
}

/// What the state is multiplied by at each token.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Decay<'a> {
    /// Nothing.
    None,
    /// One number a token.
    Scalar(&'a [f32]),
    /// One number a row.
    Rows(TokenRows<'a>),
    /// One number a column.
    Columns(TokenRows<'a>),
    /// One power of two a row, exactly: nothing is added.
    RowUnits(TokenRows<'a>),
    /// One power of two a column, exactly.
    ColumnUnits(TokenRows<'a>),
}

/// An outer product that is added at each token.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Write<'a> {
    /// One number a row of the state.
    pub(crate) rows: TokenRows<'a>,
    /// One number a column of the state.
    pub(crate) columns: TokenRows<'a>,
}

/// A product with the state at each token.
#[derive(Debug)]
pub(crate) struct Read<'a> {
    /// One number a row of the state.
    pub(crate) by: TokenRows<'a>,
    /// Out: one row of the state's columns for each token, packed.
    pub(crate) out: &'a mut [f32],
}

/// What [`sweep`] reads and writes.
#[derive(Debug)]
pub(crate) struct Sweep<'a> {
    /// The state.
    pub(crate) state: &'a mut [f32],
    /// Where its elements lie.
    pub(crate) layout: Layout,
    /// Tokens.
    pub(crate) tokens: usize,
    /// From the last token to the first, decaying last.
    pub(crate) reverse: bool,
    /// What the state is multiplied by.
    pub(crate) decay: Decay<'a>,
    /// Read before the write.
    pub(crate) before: Option<Read<'a>>,
    /// Added.
    pub(crate) write: Option<Write<'a>>,
    /// Read after the write.
    pub(crate) read: Option<Read<'a>>,
    /// Added after the read.
    pub(crate) after: Option<Write<'a>>,
    /// What is asked for meanwhile.
    pub(crate) near: Option<&'a Near>,
}

const SCALAR: u32 = 1;
const ROWS: u32 = 2;
const COLUMNS: u32 = 4;
const LATE: u32 = 8;
const BEFORE: u32 = 16;
const WRITE: u32 = 32;
const READ: u32 = 64;
const AFTER: u32 = 128;
const WRITE_READ: u32 = WRITE | READ;
/// The combinations of parts that mechanisms sweep with.
mod combined {
    use super::*;
    pub(super) const SCALAR_AHEAD: u32 = SCALAR | WRITE_READ;
    pub(super) const SCALAR_BACK: u32 = SCALAR | LATE | WRITE_READ;
    pub(super) const ROWS_AHEAD: u32 = ROWS | WRITE_READ;
    pub(super) const ROWS_BACK: u32 = ROWS | LATE | WRITE_READ;
    pub(super) const COLUMNS_AHEAD: u32 = COLUMNS | WRITE_READ;
    pub(super) const COLUMNS_BACK: u32 = COLUMNS | LATE | WRITE_READ;
    pub(super) const DELTA_AHEAD: u32 = BEFORE | WRITE_READ;
    pub(super) const DELTA_BACK: u32 = WRITE_READ | AFTER;
    pub(super) const GATED_AHEAD: u32 = SCALAR | DELTA_AHEAD;
    pub(super) const GATED_BACK: u32 = SCALAR | LATE | DELTA_BACK;
}

/// Rows of tokens as the passes read them.
#[derive(Clone, Copy)]
struct Source {
    data: *const f32,
    stride: usize,
}

impl Source {
    const NONE: Source = Source { data: std::ptr::null(), stride: 0 };

    fn of(rows: TokenRows<'_>) -> Source {
        Source { data: rows.data.as_ptr(), stride: rows.stride }
    }

    #[inline(always)]
    fn token(self, t: usize) -> *const f32 {
        self.data.wrapping_add(t * self.stride)
    }
}

struct Io<'a> {
    state: *mut f32,
    rows: usize,
    tokens: usize,
    reverse: bool,
    decay: Source,
    before: (Source, *mut f32),
    write: (Source, Source),
    read: (Source, *mut f32),
    after: (Source, Source),
    out_stride: usize,
    /// What decays add; −0 changes nothing.
    floor: f32,
    near: Option<&'a Near>,
}

dispatch! {
    /// Takes a state through tokens.
    pub(crate) fn sweep(args: Sweep<'_>) = sweep_kernel
}

#[inline(always)]
fn sweep_kernel<S: Simd>(s: S, args: Sweep<'_>) {
    let layout = args.layout;
    let (io, ops) = checked(args);
    // SAFETY: every pointer of `io` that `ops` names was checked to hold `tokens` rows of its width, and the
    // state all elements of its layout.
    unsafe {
        match ops {
            WRITE => panels::<S, WRITE>(s, &io, layout),
            READ => panels::<S, READ>(s, &io, layout),
            WRITE_READ => panels::<S, WRITE_READ>(s, &io, layout),
            combined::SCALAR_AHEAD => panels::<S, { combined::SCALAR_AHEAD }>(s, &io, layout),
            combined::SCALAR_BACK => panels::<S, { combined::SCALAR_BACK }>(s, &io, layout),
            combined::ROWS_AHEAD => panels::<S, { combined::ROWS_AHEAD }>(s, &io, layout),
            combined::ROWS_BACK => panels::<S, { combined::ROWS_BACK }>(s, &io, layout),
            combined::COLUMNS_AHEAD => panels::<S, { combined::COLUMNS_AHEAD }>(s, &io, layout),
            combined::COLUMNS_BACK => panels::<S, { combined::COLUMNS_BACK }>(s, &io, layout),
            combined::DELTA_AHEAD => panels::<S, { combined::DELTA_AHEAD }>(s, &io, layout),
            combined::DELTA_BACK => panels::<S, { combined::DELTA_BACK }>(s, &io, layout),
            combined::GATED_AHEAD => panels::<S, { combined::GATED_AHEAD }>(s, &io, layout),
            combined::GATED_BACK => panels::<S, { combined::GATED_BACK }>(s, &io, layout),
            _ => unreachable!("no mechanism sweeps with the parts {ops:#b}"),
        }
    }
}

dispatch! {
    /// What tokens read of a state that stays as it is.
    pub(crate) fn read(state: &[f32], layout: Layout, tokens: usize, args: Read<'_>) = read_kernel
}

#[inline(always)]
fn read_kernel<S: Simd>(s: S, state: &[f32], layout: Layout, tokens: usize, args: Read<'_>) {
    args.by.check(tokens, layout.rows);
    assert!(args.out.len() >= tokens * layout.columns);
    let mut io = Io::of(state.as_ptr().cast_mut(), state.len(), layout, tokens);
    io.read = (Source::of(args.by), args.out.as_mut_ptr());
    // SAFETY: the pointers were checked to hold `tokens` rows of their width and all elements of the layout; what only
    // reads does not write to the state.
    unsafe { panels::<S, READ>(s, &io, layout) }
}

impl Io<'_> {
    /// A state with all elements of its layout, of which nothing is asked yet.
    fn of(state: *mut f32, len: usize, layout: Layout, tokens: usize) -> Self {
        let Layout { rows, columns, panel, row_stride } = layout;
        let stride = row_stride.unwrap_or(columns);
        assert!(columns.is_multiple_of(16) && panel.is_multiple_of(16));
        assert!(stride >= columns && len >= rows * stride);
        Io {
            state,
            rows,
            tokens,
            reverse: false,
            decay: Source::NONE,
            before: (Source::NONE, std::ptr::null_mut()),
            write: (Source::NONE, Source::NONE),
            read: (Source::NONE, std::ptr::null_mut()),
            after: (Source::NONE, Source::NONE),
            out_stride: columns,
            floor: FLOOR,
            near: None,
        }
    }
}

/// Where everything lies, and which parts there are; checked.
fn checked(args: Sweep<'_>) -> (Io<'_>, u32) {
    let Sweep { state, layout, tokens, reverse, decay, before, write, read, after, near } = args;
    let Layout { rows, columns, .. } = layout;
    let mut ops = 0;
    let mut io = Io { reverse, near, ..Io::of(state.as_mut_ptr(), state.len(), layout, tokens) };
    let exact = matches!(decay, Decay::RowUnits(_) | Decay::ColumnUnits(_));
    io.floor = if exact { -0.0 } else { FLOOR };
    let (decay_rows, kind, width) = match decay {
        Decay::None => (None, 0, 0),
        Decay::Scalar(data) => (Some(TokenRows { data, stride: 1 }), SCALAR, 1),
        Decay::Rows(data) | Decay::RowUnits(data) => (Some(data), ROWS, rows),
        Decay::Columns(data) | Decay::ColumnUnits(data) => (Some(data), COLUMNS, columns),
    };
    if let Some(data) = decay_rows {
        data.check(tokens, width);
        io.decay = Source::of(data);
        ops |= if reverse { kind | LATE } else { kind };
    }
    for (read, place, bit) in [(before, &mut io.before, BEFORE), (read, &mut io.read, READ)] {
        if let Some(Read { by, out }) = read {
            by.check(tokens, rows);
            assert!(out.len() >= tokens * columns);
            *place = (Source::of(by), out.as_mut_ptr());
            ops |= bit;
        }
    }
    for (write, place, bit) in [(write, &mut io.write, WRITE), (after, &mut io.after, AFTER)] {
        if let Some(Write { rows: x, columns: y }) = write {
            x.check(tokens, rows);
            y.check(tokens, columns);
            *place = (Source::of(x), Source::of(y));
            ops |= bit;
        }
    }
    (io, ops)
}

/// # Safety
/// Every pointer of `io` that `OPS` names is valid for its rows, and the state for its layout.
#[inline(always)]
unsafe fn panels<S: Simd, const OPS: u32>(s: S, io: &Io<'_>, layout: Layout) {
    for panel in layout.panels() {
        let vectors = panel.width / S::LANES;
        let mut v = 0;
        while v < vectors {
            let first = panel.first + v * S::LANES;
            let width = if vectors - v >= 4 && io.tokens == 1 { 4 } else { 2.min(vectors - v) };
            let at = Column {
                state: io.state.wrapping_add(panel.offset + v * S::LANES),
                stride: panel.stride,
                first,
                turn: Turn::new(first, width * S::LANES, layout.columns),
            };
            // SAFETY: so many vectors of the panel are left from this column on.
            v += unsafe {
                match width {
                    4 => {
                        pass::<S, OPS, 1, 4>(s, io, at, 0);
                        4
                    }
                    2 => tokens::<S, OPS, 2>(s, io, at),
                    _ => tokens::<S, OPS, 1>(s, io, at),
                }
            };
        }
    }
}

/// Vectors of neighbouring columns of one panel.
#[derive(Clone, Copy)]
struct Column {
    state: *mut f32,
    stride: usize,
    first: usize,
    turn: Turn,
}

/// Takes V vectors of columns through all tokens; returns V.
///
/// # Safety
/// As for [`panels`], for V vectors from the column on.
#[inline(always)]
unsafe fn tokens<S: Simd, const OPS: u32, const V: usize>(s: S, io: &Io<'_>, at: Column) -> usize {
    let mut t = 0;
    // SAFETY: the caller's promise, for tokens below the count.
    unsafe {
        if S::LANES == 16 && OPS & (BEFORE | AFTER) == 0 {
            while t + 4 <= io.tokens {
                pass::<S, OPS, 4, V>(s, io, at, t);
                t += 4;
            }
        }
        while t + 2 <= io.tokens {
            pass::<S, OPS, 2, V>(s, io, at, t);
            t += 2;
        }
        while t < io.tokens {
            pass::<S, OPS, 1, V>(s, io, at, t);
            t += 1;
        }
    }
    V
}

/// T tokens in one pass over the rows of V vectors of columns.
///
/// # Safety
/// As for [`panels`]; tokens `t..t + T` exist.
#[inline(always)]
unsafe fn pass<S: Simd, const OPS: u32, const T: usize, const V: usize>(
    s: S,
    io: &Io<'_>,
    at: Column,
    t: usize,
) {
    let tokens = token_indices::<T>(io, t);
    let (zero, floor) = (s.splat(0.0), s.splat(io.floor));
    // SAFETY: the caller's promise; a part that OPS does not name is not read.
    unsafe {
        let decay_rows = rows_of(io.decay, &tokens);
        let mut decay = [[zero; V]; T];
        if OPS & SCALAR != 0 {
            for i in 0..T {
                decay[i] = [s.splat(*decay_rows[i]); V];
            }
        } else if OPS & COLUMNS != 0 {
            load_columns(s, io.decay, &tokens, at.first, &mut decay);
        }
        let (before_by, by) = (rows_of(io.before.0, &tokens), rows_of(io.read.0, &tokens));
        let (x, after_x) = (rows_of(io.write.0, &tokens), rows_of(io.after.0, &tokens));
        let (mut y, mut after_y) = ([[zero; V]; T], [[zero; V]; T]);
        if OPS & WRITE != 0 {
            load_columns(s, io.write.1, &tokens, at.first, &mut y);
        }
        if OPS & AFTER != 0 {
            load_columns(s, io.after.1, &tokens, at.first, &mut after_y);
        }
        let mut before = [[zero; V]; T];
        let mut sums = [[zero; V]; T];
        for part in 0..T {
            if let Some(near) = io.near {
                near.ask(s, t + part, at.turn);
            }
            for r in io.rows * part / T..io.rows * (part + 1) / T {
                let p = at.state.add(r * at.stride);
                let mut m = [zero; V];
                for v in 0..V {
                    m[v] = s.load(p.add(v * S::LANES));
                }
                for i in 0..T {
                    if OPS & LATE == 0 {
                        let row = decay_rows[i].wrapping_add(r);
                        multiply::<S, OPS, V>(s, &mut m, (&decay[i], row), floor);
                    }
                    if OPS & BEFORE != 0 {
                        accumulate(s, *before_by[i].add(r), &m, &mut before[i]);
                    }
                    if OPS & WRITE != 0 {
                        accumulate(s, *x[i].add(r), &y[i], &mut m);
                    }
                    if OPS & READ != 0 {
                        accumulate(s, *by[i].add(r), &m, &mut sums[i]);
                    }
                    if OPS & AFTER != 0 {
                        accumulate(s, *after_x[i].add(r), &after_y[i], &mut m);
                    }
                    if OPS & LATE != 0 {
                        let row = decay_rows[i].wrapping_add(r);
                        multiply::<S, OPS, V>(s, &mut m, (&decay[i], row), floor);
                    }
                }
                if OPS != READ {
                    for v in 0..V {
                        s.store(p.add(v * S::LANES), m[v]);
                    }
                }
            }
        }
        for i in 0..T {
            let out = tokens[i] * io.out_stride + at.first;
            for v in 0..V {
                if OPS & BEFORE != 0 {
                    s.store(io.before.1.add(out + v * S::LANES), before[i][v]);
                }
                if OPS & READ != 0 {
                    s.store(io.read.1.add(out + v * S::LANES), sums[i][v]);
                }
            }
        }
    }
}

/// The indices of the tokens of a pass, in the order in which it takes them.
#[inline(always)]
fn token_indices<const T: usize>(io: &Io<'_>, t: usize) -> [usize; T] {
    let mut tokens = [0; T];
    for i in 0..T {
        tokens[i] = if io.reverse { io.tokens - 1 - t - i } else { t + i };
    }
    tokens
}

#[inline(always)]
fn rows_of<const T: usize>(source: Source, tokens: &[usize; T]) -> [*const f32; T] {
    let mut rows = [source.data; T];
    for i in 0..T {
        rows[i] = source.token(tokens[i]);
    }
    rows
}

/// Vectors from a column on of each token's row.
///
/// # Safety
/// So many numbers are there.
#[inline(always)]
unsafe fn load_columns<S: Simd, const T: usize, const V: usize>(
    s: S,
    source: Source,
    tokens: &[usize; T],
    first: usize,
    to: &mut [[S::F; V]; T],
) {
    for i in 0..T {
        for v in 0..V {
            // SAFETY: the caller's promise.
            to[i][v] = unsafe { s.load(source.token(tokens[i]).add(first + v * S::LANES)) };
        }
    }
}

/// `sum += factor · x`.
#[inline(always)]
fn accumulate<S: Simd, const V: usize>(s: S, factor: f32, x: &[S::F; V], sum: &mut [S::F; V]) {
    let factor = s.splat(factor);
    for v in 0..V {
        sum[v] = s.fma(factor, x[v], sum[v]);
    }
}

/// `m = m * decay + floor`, whichever axis the decay belongs to.
///
/// # Safety
/// `row` is valid for reading if decays belong to rows.
#[inline(always)]
unsafe fn multiply<S: Simd, const OPS: u32, const V: usize>(
    s: S,
    m: &mut [S::F; V],
    (decay, row): (&[S::F; V], *const f32),
    floor: S::F,
) {
    for v in 0..V {
        if OPS & ROWS != 0 {
            // SAFETY: the caller's promise.
            m[v] = s.fma(m[v], s.splat(unsafe { *row }), floor);
        } else if OPS & (SCALAR | COLUMNS) != 0 {
            m[v] = s.fma(m[v], decay[v], floor);
        }
    }
}
