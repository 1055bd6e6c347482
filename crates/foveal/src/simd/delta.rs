//! Delta rules through tokens: a token's write depends on what its key reads, so tokens go one by one.
//!
//! ```text
//! ahead     r = a Sᵀ k         u = β (v − r)             S ← a S + k uᵀ            o = Sᵀ q
//! behind    d = Sᵀ k + (q·k) g     dr = −β d             S ← a (S + q gᵀ + k drᵀ)
//! ```
//!
//! Each token takes one pass over the rows of a few columns: the pass that writes reads with the *next* token's key, so
//! that the state goes through the registers once a token. Sums over rows are one chain each: no bit depends on where a
//! sequence is cut.

use super::near::{Near, Turn};
use super::sweep::{FLOOR, Layout, TokenRows};
use super::{Simd, dispatch};

/// Rows of tokens: queries, keys, and values or gradients of outputs.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rows<'a> {
    pub(crate) q: TokenRows<'a>,
    pub(crate) k: TokenRows<'a>,
    pub(crate) v: TokenRows<'a>,
}

/// What [`ahead`] reads and writes. Rows of values are packed, of the state's columns.
#[derive(Debug)]
pub(crate) struct Ahead<'a> {
    pub(crate) state: &'a mut [f32],
    pub(crate) layout: Layout,
    pub(crate) rows: Rows<'a>,
    pub(crate) decay: Option<&'a [f32]>,
    /// One number a token.
    pub(crate) beta: &'a [f32],
    /// Out: r.
    pub(crate) reads: &'a mut [f32],
    /// Out: o.
    pub(crate) out: &'a mut [f32],
    /// What is asked for meanwhile.
    pub(crate) near: Option<&'a Near>,
}

/// What [`behind`] reads and writes.
#[derive(Debug)]
pub(crate) struct Behind<'a> {
    /// The gradient of the state.
    pub(crate) state: &'a mut [f32],
    pub(crate) layout: Layout,
    /// Queries, keys, gradients of outputs.
    pub(crate) rows: Rows<'a>,
    pub(crate) decay: Option<&'a [f32]>,
    pub(crate) beta: &'a [f32],
    /// q · k of each token.
    pub(crate) products: &'a [f32],
    /// Out: d, the gradient of u.
    pub(crate) out: &'a mut [f32],
    /// What is asked for meanwhile.
    pub(crate) near: Option<&'a Near>,
}

struct Io<'a> {
    state: *mut f32,
    layout: Layout,
    rows: Rows<'a>,
    decay: &'a [f32],
    beta: &'a [f32],
    products: &'a [f32],
    reads: *mut f32,
    out: *mut f32,
    near: Option<&'a Near>,
}

dispatch! {
    /// Takes a state through tokens.
    pub(crate) fn ahead(args: Ahead<'_>) = ahead_kernel
}

#[inline(always)]
fn ahead_kernel<S: Simd>(s: S, args: Ahead<'_>) {
    let Ahead { state, layout, rows, decay, beta, reads, out, near } = args;
    let (tokens, columns) = (beta.len(), layout.columns);
    check(state, layout, rows, tokens);
    assert!(reads.len() >= tokens * columns && out.len() >= tokens * columns);
    assert!(decay.is_none_or(|decay| decay.len() >= tokens));
    let (reads, out) = (reads.as_mut_ptr(), out.as_mut_ptr());
    let state = state.as_mut_ptr();
    let io = Io {
        state,
        layout,
        rows,
        decay: decay.unwrap_or(&[]),
        beta,
        products: &[],
        reads,
        out,
        near,
    };
    // SAFETY: rows and outputs hold `tokens` rows of the state's extents, and the state its layout.
    unsafe {
        match decay {
            None => panels::<S, false, false>(s, &io),
            Some(_) => panels::<S, true, false>(s, &io),
        }
    }
}

dispatch! {
    /// Takes the gradient of a state through tokens, from the last to the first.
    pub(crate) fn behind(args: Behind<'_>) = behind_kernel
}

#[inline(always)]
fn behind_kernel<S: Simd>(s: S, args: Behind<'_>) {
    let Behind { state, layout, rows, decay, beta, products, out, near } = args;
    let tokens = beta.len();
    check(state, layout, rows, tokens);
    assert!(out.len() >= tokens * layout.columns && products.len() >= tokens);
    assert!(decay.is_none_or(|decay| decay.len() >= tokens));
    let (reads, out) = (std::ptr::null_mut(), out.as_mut_ptr());
    let state = state.as_mut_ptr();
    let io =
        Io { state, layout, rows, decay: decay.unwrap_or(&[]), beta, products, reads, out, near };
    // SAFETY: as above; reads are not written.
    unsafe {
        match decay {
            None => panels::<S, false, true>(s, &io),
            Some(_) => panels::<S, true, true>(s, &io),
        }
    }
}

fn check(state: &[f32], layout: Layout, rows: Rows<'_>, tokens: usize) {
    assert!(layout.columns.is_multiple_of(16) && layout.panel.is_multiple_of(16));
    assert!(layout.row_stride.is_none_or(|stride| stride >= layout.columns));
    assert!(state.len() >= layout.rows * layout.row_stride.unwrap_or(layout.columns));
    rows.q.check(tokens, layout.rows);
    rows.k.check(tokens, layout.rows);
    rows.v.check(tokens, layout.columns);
}

/// # Safety
/// Every pointer of `io` is valid for rows of as many tokens as `io.beta` has, and the state for its layout.
#[inline(always)]
unsafe fn panels<S: Simd, const DECAY: bool, const BEHIND: bool>(s: S, io: &Io<'_>) {
    if io.beta.is_empty() {
        return;
    }
    for panel in io.layout.panels() {
        let vectors = panel.width / S::LANES;
        let mut v = 0;
        while v < vectors {
            let first = panel.first + v * S::LANES;
            let width = match vectors - v {
                4.. if S::LANES == 16 => 4,
                2.. => 2,
                _ => 1,
            };
            let at = Column {
                state: io.state.wrapping_add(panel.offset + v * S::LANES),
                stride: panel.stride,
                first,
                turn: Turn::new(first, width * S::LANES, io.layout.columns),
            };
            // SAFETY: so many vectors of the panel are left from this column on.
            v += unsafe {
                match width {
                    4 => tokens::<S, DECAY, BEHIND, 4>(s, io, at),
                    2 => tokens::<S, DECAY, BEHIND, 2>(s, io, at),
                    _ => tokens::<S, DECAY, BEHIND, 1>(s, io, at),
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
/// As for [`panels`], for V vectors from the column on; there is a token.
#[inline(always)]
unsafe fn tokens<S: Simd, const DECAY: bool, const BEHIND: bool, const V: usize>(
    s: S,
    io: &Io<'_>,
    at: Column,
) -> usize {
    let (count, columns) = (io.beta.len(), io.layout.columns);
    // SAFETY: the caller's promise, for tokens below the count.
    unsafe {
        let start = if BEHIND { count - 1 } else { 0 };
        let mut sums = read::<S, V>(s, io, at, row(io.rows.k, start));
        for i in 0..count {
            let t = if BEHIND { count - 1 - i } else { i };
            let next = if BEHIND { t.wrapping_sub(1) } else { t + 1 };
            let place = t * columns + at.first;
            if let Some(near) = io.near {
                near.ask(s, i, at.turn);
            }
            let mut v = [s.splat(0.0); V];
            for n in 0..V {
                v[n] = s.load(row(io.rows.v, t).add(at.first + n * S::LANES));
            }
            let decay = s.splat(if DECAY { io.decay[t] } else { 1.0 });
            let beta = s.splat(io.beta[t]);
            // What is added along the key.
            let mut u = [s.splat(0.0); V];
            for n in 0..V {
                if BEHIND {
                    let d = s.fma(s.splat(io.products[t]), v[n], sums[n]);
                    s.store(io.out.add(place + n * S::LANES), d);
                    u[n] = s.sub(s.splat(0.0), s.mul(beta, d));
                } else {
                    let r = if DECAY { s.mul(decay, sums[n]) } else { sums[n] };
                    s.store(io.reads.add(place + n * S::LANES), r);
                    u[n] = s.mul(beta, s.sub(v[n], r));
                }
            }
            let rows = [row(io.rows.q, t), row(io.rows.k, t), row(io.rows.k, next)];
            let step = Step { rows, v, u, decay };
            sums = match i + 1 < count {
                true => pass::<S, DECAY, BEHIND, V, true>(s, io, at, (t, &step)),
                false => pass::<S, DECAY, BEHIND, V, false>(s, io, at, (t, &step)),
            };
        }
    }
    V
}

#[inline(always)]
fn row(rows: TokenRows<'_>, t: usize) -> *const f32 {
    rows.data.as_ptr().wrapping_add(t.wrapping_mul(rows.stride))
}

/// Sᵀ k.
///
/// # Safety
/// As for [`tokens`]; `k` is valid for a number of each row.
#[inline(always)]
unsafe fn read<S: Simd, const V: usize>(s: S, io: &Io<'_>, at: Column, k: *const f32) -> [S::F; V] {
    let mut sums = [s.splat(0.0); V];
    for r in 0..io.layout.rows {
        // SAFETY: the caller's promise.
        unsafe {
            let (p, k) = (at.state.add(r * at.stride), s.splat(*k.add(r)));
            for v in 0..V {
                sums[v] = s.fma(k, s.load(p.add(v * S::LANES)), sums[v]);
            }
        }
    }
    sums
}

/// One token: its query, its key and the next one's; its value or gradient, what it writes along its key, its decay.
struct Step<F, const V: usize> {
    rows: [*const f32; 3],
    v: [F; V],
    u: [F; V],
    decay: F,
}

/// Writes a token, reads its output, and returns what the next token's key reads.
///
/// # Safety
/// As for [`tokens`]; the step's rows are valid for a number of each row, the last one if `NEXT`.
#[inline(always)]
unsafe fn pass<S: Simd, const DECAY: bool, const BEHIND: bool, const V: usize, const NEXT: bool>(
    s: S,
    io: &Io<'_>,
    at: Column,
    (t, step): (usize, &Step<S::F, V>),
) -> [S::F; V] {
    let Step { rows: [q, k, next], v, u, decay } = step;
    let (mut sums, mut out) = ([s.splat(0.0); V], [s.splat(0.0); V]);
    let floor = s.splat(FLOOR);
    // SAFETY: the caller's promise.
    unsafe {
        for r in 0..io.layout.rows {
            let p = at.state.add(r * at.stride);
            let (q, k) = (s.splat(*q.add(r)), s.splat(*k.add(r)));
            let next = if NEXT { s.splat(*next.add(r)) } else { q };
            for n in 0..V {
                let mut m = s.load(p.add(n * S::LANES));
                if BEHIND {
                    m = s.fma(q, v[n], m);
                    m = s.fma(k, u[n], m);
                    m = if DECAY { s.fma(m, *decay, floor) } else { m };
                } else {
                    m = if DECAY { s.fma(m, *decay, floor) } else { m };
                    m = s.fma(k, u[n], m);
                    out[n] = s.fma(q, m, out[n]);
                }
                if NEXT {
                    sums[n] = s.fma(next, m, sums[n]);
                }
                s.store(p.add(n * S::LANES), m);
            }
        }
        if !BEHIND {
            for n in 0..V {
                let place = t * io.layout.columns + at.first + n * S::LANES;
                s.store(io.out.add(place), out[n]);
            }
        }
    }
    sums
}

dispatch! {
    /// One token's gradients from d: dr = −β d in its place, dv = β d. Returns dβ = d · (v − r), and r · dr − u · d.
    ///
    /// `own` is v and r, `gradients` d and dv; all have the same length, whole padded rows.
    pub(crate) fn split(beta: f32, own: (&[f32], &[f32]), gradients: (&mut [f32], &mut [f32])) -> (f32, f32) = split_kernel
}

#[inline(always)]
fn split_kernel<S: Simd>(
    s: S,
    beta: f32,
    (v, r): (&[f32], &[f32]),
    (d, d_v): (&mut [f32], &mut [f32]),
) -> (f32, f32) {
    let len = d.len();
    assert!(len.is_multiple_of(16) && [v.len(), r.len(), d_v.len()] == [len; 3]);
    let (mut d_beta, mut reads) = (s.splat(0.0), s.splat(0.0));
    let strength = s.splat(beta);
    for at in (0..len).step_by(S::LANES) {
        // SAFETY: all are whole vectors of every level.
        unsafe {
            let p = d.as_mut_ptr().add(at);
            let (du, r) = (s.load(p), s.load(r.as_ptr().add(at)));
            let rest = s.sub(s.load(v.as_ptr().add(at)), r);
            let own = s.mul(strength, du);
            s.store(d_v.as_mut_ptr().add(at), own);
            s.store(p, s.sub(s.splat(0.0), own));
            d_beta = s.fma(du, rest, d_beta);
            reads = s.fma(r, own, reads);
        }
    }
    // u = β (v − r): u · d = β dβ.
    let d_beta = s.sum(d_beta);
    (d_beta, -s.sum(reads) - beta * d_beta)
}
