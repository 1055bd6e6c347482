//! Search in the lists of an index: each list's keys are gathered once for all queries that search it.
//!
//! ```text
//! for each list, for each 256 of its entries, gathered once:   s = q̂ k̂ᵀ of the queries that search it, candidates as in `search`
//! ```
//!
//! Prompts take the tile kernels, generated queries the row kernels: a score has the bits that exact search gives it. Lists are
//! visited in order of their numbers; among equals the earlier position stays, as everywhere.

use super::super::MemoryStore;
use super::best::{Best, Exact, Scored, Selection};
use super::index::{Lists, gather};
use super::search::{NONE, QUERIES, Where};
use crate::cache::KvKeys;
use crate::cache::KvRows;
use crate::cpu::{Cpu, Phase};
use crate::element::DType;
use crate::parallel::for_each_item;
use crate::simd::decode::{RowScores, row_scores};
use crate::simd::product::Form;
use crate::simd::tile::{GROUP, KEY_TILE, KeyWords, PANEL, STEP, Scores, Visible, padded, scores};
use crate::tensor::{Rows, Shape, TensorMut, TensorRef};

/// Some neighbouring queries of one key/value head, `[head][token]`.
struct Part<'a> {
    kv_head: usize,
    /// The first of them, of all.
    first: usize,
    probed: &'a [u32],
    selected: &'a mut [u32],
}

/// What a thread writes to.
struct Scratch {
    /// Rows of the part's queries, padded.
    queries: Vec<f32>,
    /// Those that search a list.
    own: Vec<f32>,
    keys: Vec<f32>,
    packed: Vec<f32>,
    scores: Vec<f32>,
    max: Vec<f32>,
    words: Vec<KeyWords>,
    best: Vec<Best>,
}

impl Scratch {
    fn new(rows: usize, dim: usize) -> Scratch {
        Scratch {
            queries: vec![0.0; rows * padded(dim)],
            own: vec![0.0; rows * padded(dim)],
            keys: vec![0.0; KEY_TILE * dim],
            packed: vec![0.0; KEY_TILE * dim],
            scores: vec![0.0; rows * KEY_TILE],
            max: vec![0.0; rows],
            words: vec![KeyWords::default(); rows],
            best: (0..rows).map(|_| Best::default()).collect(),
        }
    }
}

/// What all parts share.
#[derive(Clone, Copy)]
struct Search<'a> {
    lists: &'a Lists,
    store: &'a dyn MemoryStore,
    /// The first position that can be retrieved.
    start: usize,
    q: TensorRef<'a, f32>,
    top: usize,
    cpu: Cpu,
    phase: Phase,
}

/// The positions of the `top` best keys among those in the lists that each query searches, for each query of `[1, n, H, Dk]`:
/// `[H][n][top]`. Lists are those of the store's entries up to the end of the range.
pub(super) fn search_lists(
    lists: &Lists,
    (store, range): Where<'_>,
    q: TensorRef<'_, f32>,
    (top, cpu, phase): (usize, Cpu, Phase),
    selected: &mut [u32],
) {
    let Shape { seq, heads, dim, .. } = q.shape();
    if selected.is_empty() {
        return;
    }
    let (probed, probes) = (lists.probed(q, cpu, phase), lists.probes());
    let own = heads / store.kv_heads() * seq;
    let items = selected.chunks_mut(own * top).zip(probed.chunks(own * probes)).enumerate();
    let items = items.flat_map(|(kv_head, (selected, probed))| {
        let parts = selected.chunks_mut(QUERIES * top).zip(probed.chunks(QUERIES * probes));
        parts.enumerate().map(move |(n, (selected, probed))| Part {
            kv_head,
            first: kv_head * own + n * QUERIES,
            probed,
            selected,
        })
    });
    let search = Search { lists, store, start: range.start, q, top, cpu, phase };
    let parts = store.kv_heads() * own.div_ceil(QUERIES);
    let scratch = || Scratch::new(own.min(QUERIES), dim);
    let scratches: Vec<Scratch> = (0..cpu.threads.count().min(parts)).map(|_| scratch()).collect();
    for_each_item(items, scratches.into_iter(), |part, scratch| search.part(part, scratch));
}

impl Search<'_> {
    fn part(&self, part: Part<'_>, scratch: &mut Scratch) {
        let Part { kv_head, first, probed, selected } = part;
        let Shape { seq, dim, .. } = self.q.shape();
        let (width, probes) = (padded(dim), self.lists.probes());
        let rows = selected.len() / self.top;
        for n in 0..rows {
            let at = first + n;
            scratch.queries[n * width..][..dim].copy_from_slice(self.q.row(0, at % seq, at / seq));
            scratch.best[n].reset(self.top);
        }
        let mut pairs: Vec<(u32, u32)> = probed
            .iter()
            .enumerate()
            .filter(|(_, list)| **list != NONE)
            .map(|(n, &list)| (list, (n / probes) as u32))
            .collect();
        pairs.sort_unstable();
        for asking in pairs.chunk_by(|a, b| a.0 == b.0) {
            for (to, (_, row)) in scratch.own.chunks_exact_mut(width).zip(asking) {
                to.copy_from_slice(&scratch.queries[*row as usize * width..][..width]);
            }
            let members = self.lists.members(kv_head, asking[0].0, self.start);
            for positions in members.chunks(KEY_TILE) {
                self.take((kv_head, positions), asking, scratch);
            }
        }
        for (n, selected) in selected.chunks_exact_mut(self.top).enumerate() {
            let query = &scratch.queries[n * width..][..dim];
            let Search { store, cpu, .. } = *self;
            let exact = Exact { level: cpu.level, store, kv_head, query };
            scratch.best[n].finish(&exact, selected);
        }
    }

    /// Looks at some entries of a list with the queries that search it.
    fn take(
        &self,
        (kv_head, positions): (usize, &[u32]),
        asking: &[(u32, u32)],
        scratch: &mut Scratch,
    ) {
        let (dim, level) = (self.q.shape().dim, self.cpu.level);
        let Scratch { own, keys, packed, scores, max, words, best, .. } = scratch;
        let shape = Shape { batch: 1, seq: positions.len(), heads: 1, dim };
        let gathered = &mut keys[..positions.len() * dim];
        if let Ok(to) = TensorMut::new(gathered, shape) {
            gather((self.store, kv_head), positions, to, (0, level));
        }
        let Ok(keys) = Rows::new(gathered, dim, positions.len(), dim) else { return };
        let (words, max) = (&mut words[..asking.len()], &mut max[..asking.len()]);
        words.fill(first_bits(positions.len()));
        match self.phase {
            Phase::Generated => {
                let (queries, visible, out) = (&own[..], &*words, &mut scores[..]);
                row_scores(level, RowScores { queries, keys, visible, out, max });
            }
            Phase::Prompt => {
                let form = Form::of(level, [DType::F32; 2]);
                let keys = form.pack_keys(KvKeys::Rows(KvRows::F32(keys)), packed);
                tile_scores(form, (own, dim), (keys, words), (scores, max));
            }
        }
        let steps = Visible::Some(&words[..1]).all_steps();
        let rows = asking.iter().zip(scores.chunks_exact(KEY_TILE)).zip(&*max);
        for (((_, row), scores), &max) in rows {
            let scored = Scored { scores, max, steps, first: 0, slack: 0.0 };
            best[*row as usize].take_listed(level, &scored, positions);
        }
    }
}

/// Bits for the first keys of a tile.
fn first_bits(count: usize) -> KeyWords {
    std::array::from_fn(|panel| match count.saturating_sub(panel * PANEL) {
        PANEL.. => u64::MAX,
        left => (1 << left) - 1,
    })
}

/// Scores of queries, `dim` numbers of each padded row, with packed keys.
fn tile_scores(
    form: Form,
    (queries, dim): (&[f32], usize),
    (keys, words): (&[f32], &[KeyWords]),
    (out, largest): (&mut [f32], &mut [f32]),
) {
    let (rows, width) = (words.len(), padded(dim));
    let count = words[0].iter().map(|word| word.count_ones() as usize).sum::<usize>();
    for first in (0..rows).step_by(GROUP) {
        let group = first..rows.min(first + GROUP);
        let visible = match count.is_multiple_of(STEP) {
            true => Visible::All(count),
            false => Visible::Some(&words[group.clone()]),
        };
        let mut max = [f32::NEG_INFINITY; GROUP];
        let own = Scores {
            queries: &queries[first * width..group.end * width],
            stride: width,
            rows: group.len(),
            depth: dim,
            keys,
            visible,
            hidden: f32::NEG_INFINITY,
            out: &mut out[first * KEY_TILE..group.end * KEY_TILE],
            out_stride: KEY_TILE,
            max: &mut max,
        };
        scores(form, own);
        largest[group.clone()].copy_from_slice(&max[..group.len()]);
    }
}
