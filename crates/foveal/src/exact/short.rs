//! Forward attention for prompts of at most 64 tokens over at most 64 keys: one panel, one pass.
//!
//! The computation and its bits are those of [`forward`](super::forward); only what surrounds it differs: a part is a
//! (sequence, key/value head), whose keys are packed once and whose heads go from scores to outputs in one call each.
//! A head with a result that is not finite takes the tiles, which know what to do about it.

use super::terms::Terms;
use super::{Factor, Problem, forward};
use crate::cache::KvRows;
use crate::element::Element;
use crate::mask::{Mask, Pattern, Site};
use crate::parallel::for_each_part;
use crate::plan::Sizes;
use crate::simd::product::Form;
use crate::simd::short::{ShortHead, scratch_floats, short_head};
use crate::simd::tile::{KeyWords, PANEL, STEP};
use crate::tensor::{Rows, Shape};
use std::ops::Range;

/// Query positions that a call may have.
const QUERIES: usize = 64;

/// Floating-point operations below which one thread is faster than two: waking another costs 25 to 30 µs (measured:
/// `short/n16` and `short/n64` of the benchmark).
const WAKE: usize = 8 << 20;

/// Whether a call takes this path.
pub(crate) fn fits(sizes: &Sizes, terms: &Terms<'_>) -> bool {
    let plain = terms.plain() && terms.sinks.is_none() && terms.dropout.is_none();
    sizes.keys <= PANEL && sizes.q.seq <= QUERIES && plain
}

/// Floats of one thread: a panel of keys, widened values and queries, and the kernel's.
pub(crate) fn scratch(sizes: &Sizes) -> usize {
    let (dim, width) = (sizes.q.dim, sizes.value_dim);
    PANEL * dim + PANEL * width + QUERIES * dim + scratch_floats(width).next_multiple_of(16)
}

/// Runs the call.
pub(crate) fn run<E: Element, K: Element>(problem: &Problem<'_, E, K>, floats: &mut [f32]) {
    let sizes = &problem.sizes;
    if sizes.q.checked_len() == Some(0) {
        return;
    }
    let parts = sizes.q.batch * sizes.kv_heads;
    let work = 2 * sizes.q.seq * sizes.keys * (sizes.q.dim + sizes.value_dim);
    let threads = match (parts * sizes.group()).saturating_mul(work) {
        0..WAKE => 1,
        _ => sizes.cpu.threads.count(),
    };
    let scratches = floats.chunks_exact_mut(scratch(sizes)).take(threads);
    for_each_part(parts, scratches, |unit, scratch| attend(problem, unit, scratch));
}

/// All rows of one (sequence, key/value head).
fn attend<E: Element, K: Element>(problem: &Problem<'_, E, K>, unit: usize, scratch: &mut [f32]) {
    let sizes = &problem.sizes;
    let (batch, kv_head) = (unit / sizes.kv_heads, unit % sizes.kv_heads);
    let form = problem.form(batch);
    let (depth, width) = (form.cells(sizes.q.dim), sizes.value_dim);
    let positions = problem.kv.start(batch)..problem.kv.end(batch);
    let (keys, rest) = scratch.split_at_mut(PANEL * depth);
    let (values, rest) = rest.split_at_mut(PANEL * width);
    let (queries, scratch) = rest.split_at_mut(QUERIES * depth);
    let kv = problem.kv.tile(batch, kv_head, positions.clone());
    if !positions.is_empty() {
        form.pack_keys(kv.keys, keys);
    }
    let values = form.cell_rows(kv.values, values);
    let factor = Factor::new(problem.scale);
    let mut words = [KeyWords::default(); QUERIES];
    let words = &mut words[..sizes.q.seq];
    let all = matches!(problem.mask, Mask::Full) && positions.len().is_multiple_of(STEP);
    let group = kv_head * sizes.group()..(kv_head + 1) * sizes.group();
    let mut finite = true;
    for head in group.clone() {
        if !all && (head == group.start || !sizes.same_heads) {
            fill(problem, Site { batch, q_head: head, kv_head }, &positions, words);
        }
        // SAFETY: outputs have the queries' rows and heads; each head belongs to one part.
        let (out, lse) = unsafe {
            let lse = problem.lse.as_ref().map(|lse| lse.head(batch, head));
            (problem.out.head(batch, head), lse)
        };
        let args = ShortHead {
            queries: load_queries(problem, (form, factor), (batch, head), queries),
            keys,
            values,
            words: (!all).then_some(&*words),
            factor: factor.factor,
            scratch: &mut *scratch,
            out,
            lse,
        };
        finite &= short_head(form, args);
    }
    if !finite {
        forward::run_unit(problem, unit);
    }
}

/// The queries of a head as cells, where they lie or copied and turned around.
fn load_queries<'a, E: Element, K>(
    problem: &Problem<'a, E, K>,
    (form, factor): (Form, Factor),
    (batch, head): (usize, usize),
    copies: &'a mut [f32],
) -> Rows<'a, f32> {
    let Shape { seq, dim, .. } = problem.sizes.q;
    let depth = form.cells(dim);
    match E::kv_rows(problem.q.head(batch, head)) {
        KvRows::F32(rows) if factor.sign == 1.0 => rows,
        _ => {
            for (i, query) in copies.chunks_exact_mut(depth).enumerate().take(seq) {
                factor.load(form, problem.q.row(batch, i, head), query);
            }
            Rows::new(&copies[..seq * depth], depth, seq, depth).expect("all rows")
        }
    }
}

/// One bit for each (row, key) that the mask allows.
fn fill<E: Element, K: Element>(
    problem: &Problem<'_, E, K>,
    at: Site,
    positions: &Range<usize>,
    words: &mut [KeyWords],
) {
    let first = positions.end as isize - problem.sizes.q.seq as isize;
    for (i, words) in (first..).zip(words) {
        let bits = &mut words[..positions.len().div_ceil(PANEL)];
        problem.mask.fill(at, i, positions.clone(), bits);
    }
}
