//! What layers were given of a text, and the weights that they make of it, where no state keeps enough to make them later.
//!
//! ```text
//! out_i = Σ_j a_ij v_j          a_ij: a number for each query head, row i and key j ≤ i, whatever the mechanism
//! ```
//!
//! Softmax over a pattern gives `a` itself. Of everything else that is linear in the values (recurrences, memories, sums of
//! branches) `a` is what the mechanism gives of unit vectors in place of values: as many columns at a time as a value has numbers.
//! A column costs a forward of the mechanism over the text, its projections apart. Memory: what the layer was given, a few rows a
//! token.

use std::ops::Range;

use foveal::inspect::Forwarded;
use foveal::plan::Inputs;
use foveal::position::Rope;
use foveal::{Attention, Shape, Tensor, TensorRef, Workspace};

use crate::Error;

/// Rows whose weights are there at a time.
const ROWS: usize = 64;

/// What a layer was given of a text, from its first token on, row after row.
#[derive(Debug, Clone, Default)]
pub(crate) struct Trace {
    pub(crate) tokens: usize,
    /// The layer's inputs.
    pub(super) x: Vec<f32>,
    /// Queries, rotated if they are.
    pub(super) q: Vec<f32>,
    /// Keys likewise; of latent attention the rows that heads share.
    pub(super) k: Vec<f32>,
    /// Queries and keys without rotation, where both are read.
    pub(super) plain: [Vec<f32>; 2],
}

impl Trace {
    /// Takes in the tokens of a call.
    pub(super) fn extend(&mut self, tokens: usize, [x, q, k]: [&[f32]; 3], plain: [&[f32]; 2]) {
        self.tokens += tokens;
        for (all, new) in [(&mut self.x, x), (&mut self.q, q), (&mut self.k, k)] {
            all.extend_from_slice(new);
        }
        for (all, new) in self.plain.iter_mut().zip(plain) {
            all.extend_from_slice(new);
        }
    }
}

/// Whose weights are asked for.
#[derive(Debug, Clone)]
pub(crate) struct Asked<'a> {
    pub(crate) trace: &'a Trace,
    /// Positions of the queries.
    pub(crate) rows: Range<usize>,
    /// The model's rotary embeddings.
    pub(crate) ropes: &'a [Rope],
    /// Of how many of the newest tokens a query sees at most, where the layer has no sections.
    pub(crate) reach: usize,
}

/// Weights of one query on neighbouring keys. What comes of a query and a key more than once adds up.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Part<'a> {
    pub(crate) head: usize,
    pub(crate) row: usize,
    /// The first key.
    pub(crate) first: usize,
    pub(crate) weights: &'a [f32],
}

/// What a head with a memory read of it for one query.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Recalled {
    /// The memory's share of the output: g.
    pub gate: f32,
    /// The position at which the query's segment begins: what lies before comes out of the memory.
    pub segment: usize,
    /// Entries that were retrieved, the best first; a memory that is a matrix has none.
    pub entries: Vec<usize>,
}

/// Whoever takes weights in.
pub(crate) trait Weigher {
    /// Some of a row's weights.
    fn weights(&mut self, part: Part<'_>);
    /// What the query of a head at a row read of its memory.
    fn recalled(&mut self, head: usize, row: usize, recalled: Recalled);
}

/// The weights of exact attention: of queries at `rows` on all keys up to each chunk's last query, times `share(head)`.
pub(super) fn exact(
    attention: &Attention<'_>,
    [q, k]: [TensorRef<'_, f32>; 2],
    (rows, first_head): (Range<usize>, usize),
    share: &dyn Fn(usize) -> f32,
    (weigher, workspace): (&mut dyn Weigher, &mut Workspace),
) -> Result<(), Error> {
    for start in rows.clone().step_by(ROWS) {
        let chunk = start..rows.end.min(start + ROWS);
        let (q, k) = (q.tokens(chunk.clone()), k.tokens(0..chunk.end));
        let plan = attention.plan(q.shape(), k.shape(), k.shape())?;
        workspace.reserve(plan.workspace_bytes());
        let mut out = Tensor::zeros(Shape { dim: k.shape().dim, ..q.shape() })?;
        let mut lse = Tensor::zeros(q.shape().per_row())?;
        plan.forward(Inputs { q, k, v: k }, out.view_mut(), Some(lse.view_mut()), workspace)?;
        let forwarded = Forwarded::new(q, k, lse.view());
        let weights = plan.probabilities(forwarded, 0..chunk.len())?;
        let mut scaled = vec![];
        for (n, row) in chunk.enumerate() {
            for head in 0..q.shape().heads {
                let factor = share(head);
                scaled.clear();
                scaled.extend(weights.view().row(0, n, head).iter().map(|w| factor * w));
                weigher.weights(Part { head: first_head + head, row, first: 0, weights: &scaled });
            }
        }
    }
    Ok(())
}

/// Unit vectors in place of the values of tokens from `first` on, zeros in place of others: `[1, tokens, heads, dim]`.
pub(super) fn probes(shape: Shape, first: usize) -> Result<Tensor<f32>, Error> {
    let mut probes = Tensor::zeros(shape)?;
    let mut view = probes.view_mut();
    for (column, t) in (first..shape.seq).take(shape.dim).enumerate() {
        (0..shape.heads).for_each(|head| view.row_mut(0, t, head)[column] = 1.0);
    }
    Ok(probes)
}

/// Hands over what a mechanism gave of [`probes`]: rows `out` of the queries from `from` on.
pub(super) fn probed(
    out: TensorRef<'_, f32>,
    (from, first): (usize, usize),
    (rows, first_head): (Range<usize>, usize),
    weigher: &mut dyn Weigher,
) {
    for row in rows.start.max(first)..rows.end {
        let seen = (row + 1 - first).min(out.shape().dim);
        for head in 0..out.shape().heads {
            let weights = &out.row(0, row - from, head)[..seen];
            weigher.weights(Part { head: first_head + head, row, first, weights });
        }
    }
}
