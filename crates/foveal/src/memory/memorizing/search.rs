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
//! alone. A score is one chain of products over the key's numbers, wherever the key lies. Of codes that are searched in the place
//! of keys, those that may be among the best are scored again by the keys themselves ([`Bounded`]).

use super::super::MemoryStore;
use super::best::{Best, Exact, Scored, Selection};
use super::bounded::Bounded;
use crate::cache::{KvKeys, KvStore, TILE, with_rows};
use crate::cpu::{Cpu, Phase};
use crate::element::DType;
use crate::parallel::for_each_item;
use crate::simd::Level;
use crate::simd::coded::{ChannelScores, channel_scores, with_code};
use crate::simd::decode::{RowScores, row_scores};
use crate::simd::product::Form;
use crate::simd::tile::{
    GROUP, KEY_TILE, KeyWords, PANEL, STEP, Scores, Visible, group_size, padded, scores,
};
use crate::tensor::{Shape, TensorRef};
use std::ops::Range;

/// No entry.
pub(super) const NONE: u32 = u32::MAX;

/// Queries that share the packed keys of a tile.
pub(super) const QUERIES: usize = 512;

/// What a thread writes to.
struct Scratch<S> {
    keys: Vec<f32>,
    scores: Vec<f32>,
    best: Vec<S>,
}

/// Some neighbouring queries of one head.
struct Part<'a> {
    head: usize,
    tokens: Range<usize>,
    selected: &'a mut [u32],
}

/// Where entries are looked for.
pub(super) type Where<'a> = (&'a dyn MemoryStore, Range<usize>);

/// The positions of the `top` best keys in a range of a store, for each query of `[1, n, H, Dk]`: `[H][n][top]`. `q` is dense.
pub(super) fn search(
    at: Where<'_>,
    q: TensorRef<'_, f32>,
    (top, cpu, phase): (usize, Cpu, Phase),
    selected: &mut [u32],
) {
    if selected.is_empty() {
        return;
    }
    match (at.0.coded(), phase) {
        (false, Phase::Prompt) => search_tiles::<Best>(at, q, (top, cpu), selected),
        (true, Phase::Prompt) => search_tiles::<Bounded>(at, q, (top, cpu), selected),
        (false, Phase::Generated) => search_rows::<Best>(at, q, (top, cpu), selected),
        (true, Phase::Generated) => search_rows::<Bounded>(at, q, (top, cpu), selected),
    }
}

/// How far the score of a unit query with a coded key of a tile may lie from that with the key: the distance of the two keys, and
/// rounding of sums whose terms are at most 8 in magnitude, in any order. 0 where keys are no codes.
fn slack(store: &dyn MemoryStore, kv_head: usize, tile: &Range<usize>) -> f32 {
    if !store.coded() {
        return 0.0;
    }
    let dim = store.dims().0 as f32;
    1.001 * store.distance(kv_head, tile.start) + 8.0 * (dim + 8.0) * dim.sqrt() * f32::EPSILON
}

/// Generated queries: all of a key/value head's at a time.
fn search_rows<S: Selection>(
    (store, range): Where<'_>,
    q: TensorRef<'_, f32>,
    (top, cpu): (usize, Cpu),
    selected: &mut [u32],
) {
    let Shape { seq, heads, dim, .. } = q.shape();
    let (kv_heads, width) = (store.kv_heads(), padded(dim));
    let rows = heads / kv_heads * seq;
    let scratch = || Scratch {
        keys: vec![0.0; rows * width],
        scores: vec![0.0; rows * KEY_TILE],
        best: (0..rows).map(|_| S::default()).collect(),
    };
    let scratches: Vec<Scratch<S>> =
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
        let exact = |n: usize| Exact {
            level: cpu.level,
            store,
            kv_head,
            query: &queries[n * width..][..dim],
        };
        let (mut words, mut max) = (vec![KeyWords::default(); rows], vec![0.0; rows]);
        for tile in tiles(store, &range) {
            words.fill(inside(&tile, &range));
            let keys = store.tile(kv_head, tile.clone()).keys;
            row_products(cpu.level, (queries, keys), &words, (scores, &mut max));
            let steps = Visible::Some(&words[..1]).all_steps();
            let slack = slack(store, kv_head, &tile);
            let rows = best.iter_mut().zip(scores.chunks_exact(KEY_TILE)).zip(&max).enumerate();
            for (n, ((best, scores), &max)) in rows {
                let scored = Scored { scores, max, steps, first: tile.start, slack };
                best.take(&scored, &exact(n));
            }
        }
        let results = best.iter_mut().zip(selected.chunks_exact_mut(top));
        results.enumerate().for_each(|(n, (best, selected))| best.finish(&exact(n), selected));
    });
}

/// Scores of rows of queries with the keys of a tile as they lie, and the largest of each row.
fn row_products(
    level: Level,
    (queries, keys): (&[f32], KvKeys<'_>),
    visible: &[KeyWords],
    (out, max): (&mut [f32], &mut [f32]),
) {
    match keys {
        KvKeys::Rows(keys) => with_rows!(keys, keys => {
            row_scores(level, RowScores { queries, keys, visible, out, max });
        }),
        KvKeys::Channels(keys) => with_code!(keys.bits, code => {
            channel_scores(level, code, ChannelScores { queries, keys, visible, out, max });
        }),
    }
}

/// Queries of a prompt, which share packed tiles.
fn search_tiles<S: Selection>(
    (store, range): Where<'_>,
    q: TensorRef<'_, f32>,
    (top, cpu): (usize, Cpu),
    selected: &mut [u32],
) {
    let Shape { seq, heads, dim, .. } = q.shape();
    let rows = QUERIES.min(seq);
    let scratch = || Scratch {
        keys: vec![0.0; KEY_TILE * dim],
        scores: vec![0.0; GROUP * KEY_TILE],
        best: (0..rows).map(|_| S::default()).collect(),
    };
    let parts = heads * seq.div_ceil(rows);
    let threads = cpu.threads.count().min(parts);
    let scratches: Vec<Scratch<S>> = (0..threads).map(|_| scratch()).collect();
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
        let queries = Queries { q, head: part.head, tokens: part.tokens.clone(), store };
        for tile in tiles(store, &range) {
            let keys = form.pack_keys(store.tile(kv_head, tile.clone()).keys, &mut scratch.keys);
            let mut words = [KeyWords::default(); GROUP];
            let visible = visible(&tile, &range, &mut words);
            let slack = slack(store, kv_head, &tile);
            let keys = (keys, visible, tile.start, slack);
            tile_candidates(form, &queries, keys, &mut scratch.scores, best);
        }
        for (n, (best, selected)) in
            best.iter_mut().zip(part.selected.chunks_exact_mut(top)).enumerate()
        {
            best.finish(&queries.exact(form.level(), n), selected);
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

/// Some neighbouring queries of one head, and where the keys are.
struct Queries<'a> {
    q: TensorRef<'a, f32>,
    head: usize,
    tokens: Range<usize>,
    store: &'a dyn MemoryStore,
}

impl<'a> Queries<'a> {
    /// What decides for the `n`-th of them.
    fn exact(&self, level: Level, n: usize) -> Exact<'a> {
        let kv_head = self.head * self.store.kv_heads() / self.q.shape().heads;
        let query = self.q.row(0, self.tokens.start + n, self.head);
        Exact { level, store: self.store, kv_head, query }
    }
}

/// Scores of all queries of a part against one tile.
fn tile_candidates<S: Selection>(
    form: Form,
    queries: &Queries<'_>,
    (keys, visible, first, slack): (&[f32], Visible<'_>, usize, f32),
    out: &mut [f32],
    best: &mut [S],
) {
    let Shape { heads, dim, .. } = queries.q.shape();
    let (rows, tokens) = (queries.q.head(0, queries.head), &queries.tokens);
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
        let own = start - tokens.start..group.end - tokens.start;
        let scores = out.chunks_exact(KEY_TILE).zip(&max);
        for (n, (scores, &max)) in own.zip(scores) {
            let scored = Scored { scores, max, steps, first, slack };
            best[n].take(&scored, &queries.exact(form.level(), n));
        }
    }
}
