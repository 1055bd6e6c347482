//! The entries whose keys suit a query best, exactly: blocked products, and a selection that looks at few of them.
//!
//! ```text
//! for each tile of 256 keys, packed once:   for each 6 queries:   s = q̂ k̂ᵀ and the largest s of each query
//!     a query whose largest s is not above its k-th best passes on; else scores above it become candidates,
//!     of which the k best are kept whenever there are 2 k
//! ```
//!
//! Generated queries read keys as they lie, once for all query heads of a group, and select likewise.
//!
//! Tiles come in the order of positions and later equals never replace earlier ones: what is selected depends on the scores
//! alone. A score is one chain of products over the key's numbers, wherever the key lies.

use crate::cache::{KvStore, TILE, with_rows};
use crate::cpu::Cpu;
use crate::element::DType;
use crate::parallel::for_each_item;
use crate::simd::decode::{RowScores, row_scores};
use crate::simd::product::Form;
use crate::simd::select::above;
use crate::simd::tile::{
    GROUP, KEY_TILE, KeyWords, PANEL, STEP, Scores, Visible, group_size, padded, scores,
};
use crate::tensor::{Shape, TensorRef};
use std::ops::Range;

/// No entry.
pub(super) const NONE: u32 = u32::MAX;

/// Queries that share the packed keys of a tile.
const QUERIES: usize = 512;

/// A key's score and position.
type Candidate = (f32, u32);

/// The best entries of one query so far, and candidates.
#[derive(Debug, Default)]
struct Best {
    candidates: Vec<Candidate>,
    /// What a score has to exceed.
    least: f32,
}

/// Larger scores first, and earlier positions among equals. No score is NaN.
fn order(a: &Candidate, b: &Candidate) -> std::cmp::Ordering {
    b.0.partial_cmp(&a.0).unwrap_or(std::cmp::Ordering::Equal).then(a.1.cmp(&b.1))
}

impl Best {
    fn reset(&mut self, top: usize) {
        self.candidates.clear();
        self.candidates.reserve(2 * top + KEY_TILE);
        self.least = f32::NEG_INFINITY;
    }

    /// Takes the scores of a tile whose bits are set.
    fn take(&mut self, scores: &[f32], words: &KeyWords, first: usize, top: usize) {
        for (panel, &word) in words.iter().enumerate() {
            let mut left = word;
            while left != 0 {
                let j = panel * PANEL + left.trailing_zeros() as usize;
                self.candidates.push((scores[j], (first + j) as u32));
                left &= left - 1;
            }
        }
        if self.candidates.len() >= 2 * top {
            self.prune(top);
        }
    }

    fn prune(&mut self, top: usize) {
        if self.candidates.len() >= top {
            let (_, last, _) = self.candidates.select_nth_unstable_by(top - 1, order);
            self.least = last.0;
            self.candidates.truncate(top);
        }
    }

    /// The positions of the best, best first; [`NONE`] where there are fewer.
    fn finish(&mut self, to: &mut [u32]) {
        self.prune(to.len());
        self.candidates.sort_unstable_by(order);
        to.fill(NONE);
        for (to, candidate) in to.iter_mut().zip(&self.candidates) {
            *to = candidate.1;
        }
    }
}

/// What a thread writes to.
struct Scratch {
    keys: Vec<f32>,
    scores: Vec<f32>,
    best: Vec<Best>,
}

/// Some neighbouring queries of one head.
struct Part<'a> {
    head: usize,
    tokens: Range<usize>,
    selected: &'a mut [u32],
}

/// Like [`search`], for generated queries.
pub(super) fn search_rows(
    (store, range): (&dyn KvStore, Range<usize>),
    q: TensorRef<'_, f32>,
    (top, cpu): (usize, Cpu),
    selected: &mut [u32],
) {
    let Shape { seq, heads, dim, .. } = q.shape();
    if selected.is_empty() {
        return;
    }
    let (kv_heads, width) = (store.kv_heads(), padded(dim));
    let rows = heads / kv_heads * seq;
    let scratch = || Scratch {
        keys: vec![0.0; rows * width],
        scores: vec![0.0; rows * KEY_TILE],
        best: (0..rows).map(|_| Best::default()).collect(),
    };
    let scratches: Vec<Scratch> =
        (0..cpu.threads.count().min(kv_heads)).map(|_| scratch()).collect();
    let items = selected.chunks_mut(rows * top).enumerate();
    for_each_item(items, scratches.into_iter(), |(kv_head, selected), scratch| {
        let Scratch { keys: queries, scores, best } = scratch;
        queries.fill(0.0);
        for (n, query) in queries.chunks_exact_mut(width).enumerate() {
            let head = kv_head * (heads / kv_heads) + n / seq;
            query[..dim].copy_from_slice(q.row(0, n % seq, head));
        }
        best.iter_mut().for_each(|best| best.reset(top));
        let (mut words, mut max) = (vec![KeyWords::default(); rows], vec![0.0; rows]);
        for tile in tiles(store, &range) {
            words.fill(inside(&tile, &range));
            let Some(keys) = store.tile(kv_head, tile.clone()).keys.rows() else {
                unreachable!("a memory's store was checked to hold rows")
            };
            let (visible, out, max) = (&words[..], &mut scores[..], &mut max[..]);
            with_rows!(keys, keys => {
                row_scores(cpu.level, RowScores { queries, keys, visible, out, max });
            });
            let steps = Visible::Some(&words[..1]).all_steps();
            let scores = scores.chunks_exact(KEY_TILE);
            for ((best, scores), &max) in best.iter_mut().zip(scores).zip(&*max) {
                if max > best.least {
                    let words = above(cpu.level, scores, best.least, steps);
                    best.take(scores, &words, tile.start, top);
                }
            }
        }
        for (best, selected) in best.iter_mut().zip(selected.chunks_exact_mut(top)) {
            best.finish(selected);
        }
    });
}

/// The positions of the `top` best keys in a range of a store, for each query of `[1, n, H, Dk]`: `[H][n][top]`. `q` is dense.
pub(super) fn search(
    (store, range): (&dyn KvStore, Range<usize>),
    q: TensorRef<'_, f32>,
    (top, cpu): (usize, Cpu),
    selected: &mut [u32],
) {
    let Shape { seq, heads, dim, .. } = q.shape();
    if selected.is_empty() {
        return;
    }
    let rows = QUERIES.min(seq);
    let scratch = || Scratch {
        keys: vec![0.0; KEY_TILE * dim],
        scores: vec![0.0; GROUP * KEY_TILE],
        best: (0..rows).map(|_| Best::default()).collect(),
    };
    let parts = heads * seq.div_ceil(rows);
    let threads = cpu.threads.count().min(parts);
    let scratches: Vec<Scratch> = (0..threads).map(|_| scratch()).collect();
    let items = selected.chunks_mut(seq * top).enumerate().flat_map(|(head, selected)| {
        selected.chunks_mut(rows * top).enumerate().map(move |(n, selected)| {
            let first = n * rows;
            Part { head, tokens: first..first + selected.len() / top, selected }
        })
    });
    let form = Form::of(cpu.level, [DType::F32, store.dtype()]);
    for_each_item(items, scratches.into_iter(), |part, scratch| {
        let kv_head = part.head * store.kv_heads() / heads;
        let best = &mut scratch.best[..part.tokens.len()];
        best.iter_mut().for_each(|best| best.reset(top));
        for tile in tiles(store, &range) {
            let keys = form.pack_keys(store.tile(kv_head, tile.clone()).keys, &mut scratch.keys);
            let mut words = [KeyWords::default(); GROUP];
            let visible = visible(&tile, &range, &mut words);
            let queries = (q, part.head, part.tokens.clone());
            tile_candidates(
                form,
                queries,
                (keys, visible, tile.start),
                &mut scratch.scores,
                (best, top),
            );
        }
        for (best, selected) in best.iter_mut().zip(part.selected.chunks_exact_mut(top)) {
            best.finish(selected);
        }
    });
}

/// The tiles of a store that hold some of a range, as far as they are held.
fn tiles(store: &dyn KvStore, range: &Range<usize>) -> impl Iterator<Item = Range<usize>> + use<> {
    let held = store.start()..store.end();
    let tiles = range.start / TILE..range.end.div_ceil(TILE);
    tiles.map(move |n| (n * TILE).max(held.start)..((n + 1) * TILE).min(held.end))
}

/// Which keys of a tile are in the range: the same bits for each row of a group.
fn visible<'a>(
    tile: &Range<usize>,
    range: &Range<usize>,
    words: &'a mut [KeyWords; GROUP],
) -> Visible<'a> {
    let whole = range.start <= tile.start && tile.end <= range.end;
    if whole && tile.len().is_multiple_of(STEP) {
        return Visible::All(tile.len());
    }
    *words = [inside(tile, range); GROUP];
    Visible::Some(words)
}

/// A bit for each key of a tile that is in the range.
fn inside(tile: &Range<usize>, range: &Range<usize>) -> KeyWords {
    let mut words = KeyWords::default();
    for j in range.start.max(tile.start) - tile.start..range.end.min(tile.end) - tile.start {
        words[j / PANEL] |= 1 << (j % PANEL);
    }
    words
}

/// Scores of all queries of a part against one tile.
fn tile_candidates(
    form: Form,
    (q, head, tokens): (TensorRef<'_, f32>, usize, Range<usize>),
    (keys, visible, first): (&[f32], Visible<'_>, usize),
    out: &mut [f32],
    (best, top): (&mut [Best], usize),
) {
    let Shape { heads, dim, .. } = q.shape();
    let rows = q.head(0, head);
    let step = group_size(tokens.len());
    let steps = visible.all_steps();
    for start in tokens.clone().step_by(step.max(1)) {
        let group = start..tokens.end.min(start + step);
        let visible = match visible {
            Visible::Some(words) => Visible::Some(&words[..group.len()]),
            all => all,
        };
        let mut max = [f32::NEG_INFINITY; GROUP];
        scores(
            form,
            Scores {
                queries: rows.slice(group.clone()).as_slice(),
                stride: heads * dim,
                rows: group.len(),
                depth: dim,
                keys,
                visible,
                hidden: f32::NEG_INFINITY,
                out,
                out_stride: KEY_TILE,
                max: &mut max,
            },
        );
        let own = &mut best[start - tokens.start..group.end - tokens.start];
        for ((best, scores), &max) in own.iter_mut().zip(out.chunks_exact(KEY_TILE)).zip(&max) {
            if max > best.least {
                let words = above(form.level(), scores, best.least, steps);
                best.take(scores, &words, first, top);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_are_kept_in_order_and_the_earlier_among_equals() {
        let scores: Vec<f32> = (0..KEY_TILE).map(|j| ((j * 37) % 64) as f32).collect();
        let mut expected: Vec<Candidate> =
            (0..3 * KEY_TILE).map(|at| (scores[at % KEY_TILE], at as u32)).collect();
        expected.sort_by(order);
        for top in [1, 2, 5, 31, 200, 700, 1000] {
            let mut best = Best::default();
            best.reset(top);
            for tile in 0..3 {
                let mut words = KeyWords::default();
                for (j, &score) in scores.iter().enumerate() {
                    words[j / PANEL] |= u64::from(score > best.least) << (j % PANEL);
                }
                best.take(&scores, &words, tile * KEY_TILE, top);
            }
            let mut got = vec![0; top];
            best.finish(&mut got);
            let held = top.min(expected.len());
            assert!(got[..held].iter().zip(&expected).all(|(got, (_, at))| got == at), "{top}");
            assert!(got[held..].iter().all(|&at| at == NONE));
        }
    }
}
