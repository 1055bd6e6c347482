//! A long text behind a short attention: each call sees the first tokens, the newest, and the pieces of the past that suit its
//! queries best, at places that stay small.
//!
//! ```text
//! seen         the first M tokens  |  C tokens of chosen pieces, in their order  |  the newest N, own included
//! at places    0 .. M              |  M .. M + C                                 |  M + C .. M + C + N
//! a query      is at M + C + near − 1 to the first two, whatever its place among the newest
//! score of a piece for a key/value head = Σ over its queries of softmax over pieces (scale · Σ_c max(q_c · high_c, q_c · low_c))
//! ```
//!
//! with the largest and the smallest number of each channel of a piece's keys: the inner sum is no less than any key's score
//! (Quest: Tang et al. 2024). Queries and keys are compared without rotation, and fetched keys are rotated to their places, so
//! that no distance occurs that training had not, and near to queries: small models do not read what lies behind a thousand other
//! tokens, fetched or not (InfLLM, Xiao et al. 2024, gives all of them one distance, that of the window). As long as a
//! text has no more than M + C + N tokens, all are seen where they are, which is exact. Keys and values of the whole text lie in
//! RAM or in a file.

use std::ops::Range;
use std::path::Path;

use foveal::cache::{ContiguousCache, KvRows, KvStore, Rolling};
use foveal::memory::MemoryStore;
use foveal::nn;
use foveal::position::{Rope, RopeTable};
use foveal::projection::{Matrix, MatrixShape};
use foveal::{DType, Shape, Tensor, TensorRef};

use super::{CacheStorage, Heads, Retrieval, Store};
use crate::Error;
use crate::linear::{Affine, Run, forward_together};
use crate::memory_file::{MemoryFile, MemoryLayout};
use crate::mixer::sections::Rows;

/// Tokens that a file has room for.
const FILE_TOKENS: usize = 1 << 20;

/// What a layer keeps of a whole text.
#[derive(Clone, Debug)]
pub(crate) struct Retrieving {
    options: Retrieval,
    heads: Heads,
    /// Keys without rotation, and values, of all tokens.
    past: Rows,
    /// For each key/value head, the largest and the smallest numbers of each piece's keys, `[piece][2 · dim]`.
    bounds: Vec<Vec<f32>>,
    /// What was chosen last, for each key/value head, in order; none while all is seen.
    chosen: Option<Vec<Vec<usize>>>,
    /// The first tokens and the fetched ones, at their places.
    first: ContiguousCache<f32>,
    table: Option<RopeTable>,
}

/// The queries of one call.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Asking<'a> {
    /// Without rotation, `[1, tokens, heads, head_dim]`; the last of the text.
    pub(crate) q: TensorRef<'a, f32>,
    pub(crate) scale: f32,
    /// What rotates; none for layers without positions.
    pub(crate) rope: Option<&'a Rope>,
}

impl Retrieving {
    pub(crate) fn new(
        options: Retrieval,
        storage: CacheStorage,
        heads: Heads,
    ) -> Result<Retrieving, Error> {
        // Only rows are fetched.
        let storage = if storage.coded() { CacheStorage::Bf16 } else { storage };
        let past = Rows::Ram(Box::new(Store::new(storage, heads.kv_heads, heads.dims)?));
        let first = ContiguousCache::new(heads.kv_heads, heads.dims, options.first_tokens())?;
        let bounds = vec![vec![]; heads.kv_heads];
        Ok(Retrieving { options, heads, past, bounds, chosen: None, first, table: None })
    }

    /// Keeps the text in a file from here on, from its beginning.
    pub(crate) fn keep_in(&mut self, path: &Path, identity: [u8; 32]) -> Result<(), Error> {
        let Heads { kv_heads, dims, .. } = self.heads;
        let storage: DType = self.past.dtype();
        let layout = MemoryLayout { storage, kv_heads, dims, capacity: FILE_TOKENS, identity };
        self.past = Rows::File(Box::new(MemoryFile::open(path, &layout)?));
        self.clear();
        Ok(())
    }

    pub(crate) fn clear(&mut self) {
        MemoryStore::clear(&mut self.past);
        self.bounds.iter_mut().for_each(Vec::clear);
        self.first.clear();
        self.chosen = None;
    }

    /// Bytes in RAM.
    pub(crate) fn bytes(&self) -> usize {
        let (key_dim, value_dim) = self.heads.dims;
        let row = self.heads.kv_heads * (key_dim + value_dim);
        let past = self.past.end() * row * self.past.dtype().size();
        let bounds = self.bounds.iter().map(Vec::len).sum::<usize>() * size_of::<f32>();
        let past = self.past.held_bytes().unwrap_or(past);
        past + bounds + self.first.end() * row * size_of::<f32>()
    }

    /// Bytes in a file.
    pub(crate) fn file_bytes(&self) -> usize {
        match &self.past {
            Rows::File(file) => file.held_file_bytes(),
            Rows::Ram(_) => 0,
        }
    }

    /// How many of the newest tokens are seen.
    pub(crate) fn window(&self) -> usize {
        self.options.window
    }

    /// The first tokens and what was fetched, as the newest call sees them, and how many newest tokens come behind.
    pub(crate) fn seen(&self) -> Result<(Rolling, &dyn KvStore), Error> {
        Ok((Rolling::new(self.first.end(), self.options.window)?, &self.first))
    }

    /// The positions that were fetched last, for each key/value head; `None` while all is seen.
    pub(crate) fn fetched(&self) -> Option<Vec<Vec<Range<usize>>>> {
        let piece = self.options.piece;
        let range = |&n: &usize| n * piece..(n + 1) * piece;
        let chosen = self.chosen.as_ref()?;
        Some(chosen.iter().map(|own| own.iter().map(range).collect()).collect())
    }

    /// Takes tokens in: keys without rotation, and values, `[1, tokens, kv_heads, dim]`.
    pub(crate) fn remember(
        &mut self,
        k: TensorRef<'_, f32>,
        v: TensorRef<'_, f32>,
    ) -> Result<(), Error> {
        let begin = self.past.end();
        MemoryStore::append(&mut self.past, k, v)?;
        let (piece, dim) = (self.options.piece, self.heads.dims.0);
        for (head, bounds) in self.bounds.iter_mut().enumerate() {
            for t in 0..k.shape().seq {
                if (begin + t).is_multiple_of(piece) {
                    bounds.extend(std::iter::repeat_n(f32::NEG_INFINITY, dim));
                    bounds.extend(std::iter::repeat_n(f32::INFINITY, dim));
                }
                let at = bounds.len() - 2 * dim;
                let (high, low) = bounds[at..].split_at_mut(dim);
                for ((high, low), &x) in high.iter_mut().zip(low).zip(k.row(0, t, head)) {
                    (*high, *low) = (high.max(x), low.min(x));
                }
            }
        }
        Ok(())
    }

    /// Puts in place what the queries of a call see before the newest tokens. All tokens up to the last query have been taken
    /// in.
    pub(crate) fn fetch(&mut self, asking: Asking<'_>, run: &mut Run<'_>) -> Result<(), Error> {
        let (end, all) = (self.past.end(), self.options.first_tokens());
        if end <= all.saturating_add(self.options.window) {
            return self.place(&[], self.first.end()..all.min(end), asking.rope, run);
        }
        let chosen = self.choose(asking, run)?;
        if self.chosen.as_ref() == Some(&chosen) {
            return Ok(());
        }
        self.first.clear();
        self.place(&chosen, 0..self.options.sinks, asking.rope, run)?;
        self.chosen = Some(chosen);
        Ok(())
    }

    /// The best pieces behind the first tokens and before what the first query of the call sees of the newest, for each
    /// key/value head.
    fn choose(&self, asking: Asking<'_>, run: &mut Run<'_>) -> Result<Vec<Vec<usize>>, Error> {
        let Asking { q, scale, .. } = asking;
        let Retrieval { sinks, fetched, window, piece, .. } = self.options;
        let Shape { seq, heads, dim, .. } = q.shape();
        let last = (self.past.end() + 1 - seq).saturating_sub(window) / piece;
        let pieces = sinks.div_ceil(piece).min(last)..last;
        let (group, count) = (heads / self.heads.kv_heads, pieces.len());
        let mut chosen = vec![];
        for (kv_head, bounds) in self.bounds.iter().enumerate() {
            let mut halves = Vec::with_capacity(seq * group * 2 * dim);
            for (t, n) in (0..seq).flat_map(|t| (0..group).map(move |n| (t, n))) {
                let row = q.row(0, t, kv_head * group + n);
                halves.extend(row.iter().map(|x| scale * x.max(0.0)));
                halves.extend(row.iter().map(|x| scale * x.min(0.0)));
            }
            let own = &bounds[2 * dim * pieces.start..2 * dim * pieces.end];
            let shape = MatrixShape { out_features: count, in_features: 2 * dim };
            let weight = Matrix::from_floats(shape, own)?;
            let mut scores = vec![0.0; seq * group * count];
            let products = Affine { weight, bias: None };
            forward_together(&halves, [(products, &mut scores[..])], run)?;
            let mut sums = vec![0.0f32; count];
            for row in scores.chunks_exact_mut(count.max(1)) {
                nn::softmax(row, run.cpu.level);
                sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += *x);
            }
            let mut order: Vec<usize> = (0..count).collect();
            order.sort_by(|&a, &b| sums[b].total_cmp(&sums[a]).then(a.cmp(&b)));
            order.truncate(fetched / piece);
            order.sort_unstable();
            chosen.push(order.into_iter().map(|n| n + pieces.start).collect());
        }
        Ok(chosen)
    }

    /// Appends some of the text's first tokens, and then the chosen pieces of each head, to those in place.
    fn place(
        &mut self,
        chosen: &[Vec<usize>],
        first: Range<usize>,
        rope: Option<&Rope>,
        run: &Run<'_>,
    ) -> Result<(), Error> {
        let piece = self.options.piece;
        let count = first.len() + chosen.first().map_or(0, |own| own.len() * piece);
        if count == 0 {
            return Ok(());
        }
        let Heads { kv_heads: heads, dims, .. } = self.heads;
        let shape = |dim| Shape { batch: 1, seq: count, heads, dim };
        let (mut k, mut v) = (Tensor::zeros(shape(dims.0))?, Tensor::zeros(shape(dims.1))?);
        for head in 0..heads {
            let own = chosen.get(head).into_iter().flatten().map(|n| n * piece..(n + 1) * piece);
            let (mut keys, mut values, mut place) = (k.view_mut(), v.view_mut(), 0);
            let ranges = std::iter::once(first.clone()).chain(own);
            for range in ranges.flat_map(foveal::cache::pieces) {
                let tile = self.past.tile(head, range.clone());
                for (rows, to) in [(tile.keys.rows(), &mut keys), (tile.values.rows(), &mut values)]
                {
                    let rows = rows.ok_or(Error::SectionState)?;
                    (0..range.len()).for_each(|n| widen(rows, n, to.row_mut(0, place + n, head)));
                }
                place += range.len();
            }
        }
        if let Some(rope) = rope {
            let places = self.first.end()..self.first.end() + count;
            let table = match &mut self.table {
                Some(table) => table,
                none => none.insert(rope.table(places.clone())?),
            };
            table.set_positions(places)?;
            table.rotate(run.cpu.level, k.view_mut())?;
        }
        Ok(self.first.append(k.view(), v.view())?)
    }
}

fn widen(rows: KvRows<'_>, n: usize, to: &mut [f32]) {
    match rows {
        KvRows::F32(rows) => to.copy_from_slice(rows.row(n)),
        KvRows::F16(rows) => to.iter_mut().zip(rows.row(n)).for_each(|(x, y)| *x = y.to_f32()),
        KvRows::Bf16(rows) => to.iter_mut().zip(rows.row(n)).for_each(|(x, y)| *x = y.to_f32()),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use foveal::cache::{KvKeys, KvValues};
    use foveal::projection::Activations;
    use foveal::{Cpu, Phase, Workspace};

    use super::*;

    /// Numbers that tell their position and place, between −1 and 1.
    fn rows(count: usize, heads: usize, factor: usize) -> Tensor<f32> {
        let shape = Shape { batch: 1, seq: count, heads, dim: 4 };
        let number = |n: usize| (n * factor % 101) as f32 / 50.5 - 1.0;
        Tensor::from_vec((0..count * heads * 4).map(number).collect(), shape).unwrap()
    }

    #[test]
    fn the_pieces_whose_keys_suit_best_are_in_place() {
        let options = Retrieval { sinks: 3, fetched: 4, window: 5, piece: 2, near: 5 };
        let heads = Heads { heads: 4, kv_heads: 2, dims: (4, 4) };
        let mut retrieving = Retrieving::new(options, CacheStorage::F32, heads).unwrap();
        let (mut k, v, q) = (rows(40, 2, 37), rows(40, 2, 29), rows(1, 4, 53));
        // What both queries of a head look for lies at 14 and 21 for the first, at 31 and 8 for the other.
        for (head, at) in [(0, 14), (0, 21), (1, 31), (1, 8)] {
            let both = [2 * head, 2 * head + 1].map(|h| q.view().row(0, 0, h).to_vec());
            let mut to = k.view_mut();
            let row = to.row_mut(0, at, head).iter_mut();
            row.enumerate().for_each(|(c, x)| *x = 20.0 * (both[0][c] + both[1][c]));
        }
        retrieving.remember(k.view(), v.view()).unwrap();
        let mut workspace = Workspace::new();
        let mut run = Run {
            cpu: Cpu::detect().unwrap(),
            phase: Phase::Generated,
            activations: Activations::default(),
            workspace: &mut workspace,
        };
        let asking = Asking { q: q.view(), scale: 0.5, rope: None };
        retrieving.fetch(asking, &mut run).unwrap();
        assert_eq!(retrieving.fetched(), Some(vec![vec![14..16, 20..22], vec![8..10, 30..32]]));
        let expected = [[0, 1, 2, 14, 15, 20, 21], [0, 1, 2, 8, 9, 30, 31]];
        for (head, positions) in expected.iter().enumerate() {
            let tile = retrieving.first.tile(head, 0..7);
            let (KvKeys::Rows(KvRows::F32(keys)), KvValues::Rows(KvRows::F32(values))) =
                (tile.keys, tile.values)
            else {
                panic!("rows")
            };
            for (n, &at) in positions.iter().enumerate() {
                assert_eq!(keys.row(n), k.view().row(0, at, head));
                assert_eq!(values.row(n), v.view().row(0, at, head));
            }
        }
    }
}
