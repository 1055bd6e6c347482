//! The plain form: keys and values of a few heads at a time, made from the rows.
//!
//! ```text
//! for each group of heads, as many as fit 16 MiB, at least one:
//!     for each tile of 256 rows that some query may see:   k = [W_UK c | kᴿ]   v = W_UV c
//!     attention of the group
//! ```
//!
//! A token's keys and values depend on its row alone, so that neither cuts of a prompt nor groups change a bit. Memory is
//! one group's keys and values, whatever the number of heads.

use super::{LatentAttention, LatentCall, LatentDims, LatentOutputs, LatentScratch, Part, room};
use crate::cache::{KvKeys, KvRows, KvStore, KvTile, KvValues, TILE, pieces, with_rows};
use crate::cpu::Phase;
use crate::element::DType;
use crate::error::Result;
use crate::exact::sees;
use crate::mask::{Pattern, Site};
use crate::projection::{
    Activations, Call, Input, Output, Projection, project_many, workspace_bytes,
};
use crate::simd::row;
use crate::tensor::Rows;
use crate::workspace::Workspace;
use std::ops::Range;

/// Floats of keys and values that may be held at once, beyond one head's.
const GROUP_FLOATS: usize = 4 << 20;

impl LatentAttention<'_> {
    pub(super) fn plain(
        &self,
        call: LatentCall<'_>,
        (mut out, mut lse): LatentOutputs<'_>,
        scratch: &mut LatentScratch,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let LatentDims { heads, .. } = self.dims;
        let size = self.group(&call);
        for first in (0..heads).step_by(size) {
            let group = first..(first + size).min(heads);
            let plan = self.plan(&call, group.len())?;
            self.make(&call, group.clone(), scratch, workspace)?;
            workspace.reserve(plan.workspace_bytes());
            let made = self.made(&call, group.len(), scratch);
            let stores: Vec<&dyn KvStore> = made.iter().map(|store| store as _).collect();
            let outputs = (out.heads(group.clone()), lse.as_mut().map(|x| x.heads(group.clone())));
            plan.forward_cached(call.q.heads(group), &stores, outputs, workspace)?;
        }
        Ok(())
    }

    /// Heads whose keys and values are made together: all of them where the attention tells heads apart by number.
    fn group(&self, call: &LatentCall<'_>) -> usize {
        let heads = self.dims.heads.max(1);
        if !self.attention.masked_by().same_for_all_heads() || self.attention.terms().by_head() {
            return heads;
        }
        let tokens: usize = call.stores.iter().map(|store| store.end() - store.start()).sum();
        let each = tokens.saturating_mul(self.dims.query() + self.dims.value);
        (GROUP_FLOATS / each.max(1)).clamp(1, heads)
    }

    /// Makes the keys and values of a group of heads, as far as some query may see them.
    fn make(
        &self,
        call: &LatentCall<'_>,
        group: Range<usize>,
        scratch: &mut LatentScratch,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let (query, value) = (self.dims.query(), self.dims.value);
        let tokens: usize = call.stores.iter().map(|store| store.end() - store.start()).sum();
        let LatentScratch { first, second, third, .. } = scratch;
        let mut keys = room(first, tokens * group.len() * query);
        let mut values = room(second, tokens * group.len() * value);
        let rows = room(third, TILE * self.dims.row());
        for (batch, store) in call.stores.iter().enumerate() {
            let held = store.start()..store.end();
            let (own_keys, rest_keys) = keys.split_at_mut(held.len() * group.len() * query);
            let (own_values, rest_values) = values.split_at_mut(held.len() * group.len() * value);
            (keys, values) = (rest_keys, rest_values);
            for tile in pieces(held.clone()) {
                if !self.seen(call, batch, group.clone(), &tile) {
                    continue;
                }
                self.widen(*store, tile.clone(), rows);
                let at = tile.start - held.start..tile.end - held.start;
                let mut to = Made { keys: own_keys, values: own_values, held: held.len(), at };
                self.make_tile(group.clone(), rows, &mut to, workspace)?;
            }
        }
        Ok(())
    }

    /// Whether a query of the call may see any of the positions.
    fn seen(
        &self,
        call: &LatentCall<'_>,
        batch: usize,
        group: Range<usize>,
        tile: &Range<usize>,
    ) -> bool {
        let end = call.stores[batch].end() as isize;
        let rows = end - call.q.shape().seq as isize..end;
        let mask = self.attention.masked_by();
        let heads = if mask.same_for_all_heads() { group.start..group.start + 1 } else { group };
        heads.into_iter().any(|head| {
            let site = Site { batch, q_head: head, kv_head: head };
            sees(mask, (site, rows.clone()), tile.clone())
        })
    }

    /// The rows of a tile as `f32`.
    fn widen(&self, store: &dyn KvStore, tile: Range<usize>, to: &mut [f32]) {
        let rows = store.tile(0, tile).keys.rows().expect("codes were refused");
        with_rows!(rows, rows => {
            for (n, to) in to.chunks_exact_mut(self.dims.row()).enumerate().take(rows.count()) {
                row::widen(self.cpu.level, rows.row(n), to);
            }
        });
    }

    /// Makes the keys and values of a group of heads for one tile's rows.
    fn make_tile(
        &self,
        group: Range<usize>,
        rows: &[f32],
        to: &mut Made<'_>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let LatentDims { latent, nope, value, .. } = self.dims;
        let (query, stride) = (self.dims.query(), self.dims.row());
        let count = to.at.len();
        let call = Call { phase: Phase::Prompt, cpu: self.cpu, activations: Activations::F32 };
        let mut projections = Vec::with_capacity(2 * group.len());
        let keys = to.keys.chunks_exact_mut(to.held * query);
        let values = to.values.chunks_exact_mut(to.held * value);
        for (head, (keys, values)) in group.zip(keys.zip(values)) {
            let keys = &mut keys[to.at.start * query..to.at.end * query];
            for (key, row) in keys.chunks_exact_mut(query).zip(rows.chunks_exact(stride)) {
                key[nope..].copy_from_slice(&row[latent..]);
            }
            let values = &mut values[to.at.start * value..to.at.end * value];
            for (part, data, stride) in [(Part::Keys, keys, query), (Part::Values, values, value)] {
                let output = Output { data, stride };
                projections.push(Projection { weights: self.head(head, part), output });
            }
        }
        let weights: Vec<_> = projections.iter().map(|projection| projection.weights).collect();
        workspace.reserve(workspace_bytes(&weights, count, call));
        let x = Input { data: rows, rows: count, stride };
        project_many(&mut projections, x, call, workspace)
    }

    /// What [`LatentAttention::make`] has left, as a store for each sequence.
    fn made<'s>(
        &self,
        call: &LatentCall<'s>,
        heads: usize,
        scratch: &'s LatentScratch,
    ) -> Vec<MadeStore<'s>> {
        let dims = (self.dims.query(), self.dims.value);
        let (mut keys, mut values) = (&scratch.first[..], &scratch.second[..]);
        let stores = call.stores.iter().map(|store| {
            let held = store.end() - store.start();
            let (own_keys, rest_keys) = keys.split_at(held * heads * dims.0);
            let (own_values, rest_values) = values.split_at(held * heads * dims.1);
            (keys, values) = (rest_keys, rest_values);
            let positions = store.start()..store.end();
            MadeStore { positions, heads, dims, keys: own_keys, values: own_values }
        });
        stores.collect()
    }
}

/// Where a tile's keys and values go.
struct Made<'a> {
    /// `[heads, held, n + r]`.
    keys: &'a mut [f32],
    /// `[heads, held, v]`.
    values: &'a mut [f32],
    held: usize,
    /// The tile's rows among those held.
    at: Range<usize>,
}

/// Keys and values of some heads of one sequence.
#[derive(Debug)]
struct MadeStore<'a> {
    positions: Range<usize>,
    heads: usize,
    dims: (usize, usize),
    keys: &'a [f32],
    values: &'a [f32],
}

impl KvStore for MadeStore<'_> {
    fn end(&self) -> usize {
        self.positions.end
    }

    fn start(&self) -> usize {
        self.positions.start
    }

    fn kv_heads(&self) -> usize {
        self.heads
    }

    fn dims(&self) -> (usize, usize) {
        self.dims
    }

    fn dtype(&self) -> DType {
        DType::F32
    }

    fn tile(&self, head: usize, positions: Range<usize>) -> KvTile<'_> {
        assert!(head < self.heads && self.positions.start <= positions.start);
        assert!(positions.end <= self.positions.end);
        let first = head * self.positions.len() + positions.start - self.positions.start;
        KvTile {
            keys: KvKeys::Rows(rows(self.keys, (first, positions.len()), self.dims.0)),
            values: KvValues::Rows(rows(self.values, (first, positions.len()), self.dims.1)),
        }
    }
}

fn rows(data: &[f32], (first, count): (usize, usize), dim: usize) -> KvRows<'_> {
    let rows = Rows::new(&data[first * dim..], dim, count, dim);
    KvRows::F32(rows.expect("positions were checked against those held"))
}
