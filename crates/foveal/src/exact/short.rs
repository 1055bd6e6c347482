//! Forward attention for prompts of at most 64 tokens over at most 64 keys: one panel, one pass.
//!
//! The computation and its bits are those of [`forward`](super::forward); only what surrounds it differs: a part is a
//! (sequence, key/value head), whose keys are packed once and whose heads go from scores to outputs in one call each.
//! A head with a result that is not finite takes the tiles, which know what to do about it.

use super::terms::Terms;
use super::{Factor, Problem, forward};
use crate::cache::{KvRows, with_rows};
use crate::element::Element;
use crate::mask::{Mask, Pattern, Site};
use crate::parallel::for_each_part;
use crate::plan::Sizes;
use crate::simd::row;
use crate::simd::short::{ShortHead, scratch_floats, short_head};
use crate::simd::tile::{KeyWords, PANEL, STEP, pack_keys};
use crate::tensor::Rows;

/// Query positions that a call may have.
const QUERIES: usize = 64;

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
    let scratches = floats.chunks_exact_mut(scratch(sizes));
    for_each_part(parts, scratches, |unit, scratch| attend(problem, unit, scratch));
}

/// All rows of one (sequence, key/value head).
fn attend<E: Element, K: Element>(problem: &Problem<'_, E, K>, unit: usize, scratch: &mut [f32]) {
    let sizes = &problem.sizes;
    let (dim, width, level) = (sizes.q.dim, sizes.value_dim, sizes.cpu.level);
    let (batch, kv_head) = (unit / sizes.kv_heads, unit % sizes.kv_heads);
    let positions = problem.kv.start(batch)..problem.kv.end(batch);
    let n = positions.len();
    let (keys, rest) = scratch.split_at_mut(PANEL * dim);
    let (widened, rest) = rest.split_at_mut(PANEL * width);
    let (queries, scratch) = rest.split_at_mut(QUERIES * dim);
    let kv = problem.kv.tile(batch, kv_head, positions.clone());
    if n > 0 {
        with_rows!(kv.keys, rows => pack_keys(level, rows, keys));
    }
    let values = match kv.values {
        KvRows::F32(rows) => rows,
        other => {
            with_rows!(other, rows => for i in 0..n {
                row::widen(level, rows.row(i), &mut widened[i * width..(i + 1) * width]);
            });
            Rows::new(&widened[..n * width], width, n, width).expect("a row for each key")
        }
    };
    let factor = Factor::new(problem.scale);
    let mut words = [KeyWords::default(); QUERIES];
    let words = &mut words[..sizes.q.seq];
    let all = matches!(problem.mask, Mask::Full) && n.is_multiple_of(STEP);
    let group = kv_head * sizes.group()..(kv_head + 1) * sizes.group();
    let mut finite = true;
    for head in group.clone() {
        if !all && (head == group.start || !sizes.same_heads) {
            let at = Site { batch, q_head: head, kv_head };
            let origin = positions.end as isize - sizes.q.seq as isize;
            for (i, words) in words.iter_mut().enumerate() {
                let bits = &mut words[..n.div_ceil(PANEL)];
                problem.mask.fill(at, origin + i as isize, positions.clone(), bits);
            }
        }
        let rows = match E::kv_rows(problem.q.head(batch, head)) {
            KvRows::F32(rows) if factor.sign == 1.0 => rows,
            _ => {
                for (i, query) in queries.chunks_exact_mut(dim).enumerate().take(sizes.q.seq) {
                    factor.load(level, problem.q.row(batch, i, head), query);
                }
                Rows::new(&queries[..sizes.q.seq * dim], dim, sizes.q.seq, dim).expect("all rows")
            }
        };
        // SAFETY: outputs have the queries' rows and heads; each head belongs to one part.
        let (out, lse) = unsafe {
            let lse = problem.lse.as_ref().map(|lse| lse.head(batch, head));
            (problem.out.head(batch, head), lse)
        };
        let args = ShortHead {
            queries: rows,
            keys,
            values,
            words: (!all).then_some(&*words),
            factor: factor.factor,
            scratch: &mut *scratch,
            out,
            lse,
        };
        finite &= short_head(level, args);
    }
    if !finite {
        forward::run_unit(problem, unit);
    }
}
