//! The absorbed form: queries are taken to the rows, and what they find is taken back.
//!
//! ```text
//! for each head:  q̂ [B·T, c + r] = [q_C W_UK,h | q_R]        a part
//! attention of H query heads over one key/value head
//! for each head:  o [B·T, v] = ĉ W_UV,hᵀ                      a part
//! ```
//!
//! 2 · B · T · H · c · (n + v) operations besides attention. Weights of generated rows are read once for all rows of
//! the call.

use super::{Lane, LatentAttention, LatentCall, LatentDims, LatentOutputs, LatentScratch};
use super::{Part, room};
use crate::cpu::{MAX_GENERATED_ROWS, Phase};
use crate::error::Result;
use crate::gradient::Gradient;
use crate::parallel::for_each_item;
use crate::projection::{
    Activations, Call, Input, Matrix, Output, ProjectionBackward, ProjectionGradients,
    backward_workspace_bytes, project, project_backward, workspace_bytes,
};
use crate::simd::projection::dequantize::dequantize;
use crate::simd::row;
use crate::tensor::{Shape, Strides, TensorMut, TensorRef};
use crate::workspace::Workspace;

/// Less than this many multiplications are not worth waking threads for.
const SPLIT_PRODUCTS: usize = 2 << 20;

impl LatentAttention<'_> {
    pub(super) fn absorbed(
        &self,
        call: LatentCall<'_>,
        (mut out, lse): LatentOutputs<'_>,
        scratch: &mut LatentScratch,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let LatentDims { heads, latent, value, .. } = self.dims;
        let Shape { batch, seq, .. } = call.q.shape();
        let (rows, row) = (batch * seq, self.dims.row());
        let plan = self.plan(&call, heads)?;
        workspace.reserve(plan.workspace_bytes());
        let LatentScratch { first, second, third, lanes } = scratch;
        let queries = room(first, heads * rows * row);
        let mixed = room(second, heads * rows * latent);
        let made = room(third, heads * rows * value);
        let lanes = self.lanes(lanes, rows);
        if rows == 0 || heads == 0 {
            return Ok(());
        }
        let parts = queries.chunks_exact_mut(rows * row).enumerate();
        for_each_item(parts, lanes.iter_mut(), |(head, to), lane| {
            self.absorb(&call, head, to, lane);
        });
        // Of each head all rows, one after the other.
        let shape = Shape { batch, seq, heads, dim: row };
        let by_head = |dim| Strides { batch: seq * dim, seq: dim, heads: rows * dim };
        let q = TensorRef::from_strides(queries, shape, by_head(row))?;
        let shape = Shape { dim: latent, ..shape };
        let to = TensorMut::from_strides(mixed, shape, by_head(latent))?;
        plan.forward_cached(q, call.stores, (to, lse), workspace)?;
        let parts = mixed.chunks_exact(rows * latent).zip(made.chunks_exact_mut(rows * value));
        for_each_item(parts.enumerate(), lanes.iter_mut(), |(head, (from, to)), lane| {
            self.expand(call.phase, head, (from, to), lane);
        });
        for (head, made) in made.chunks_exact(rows * value).enumerate() {
            for (n, from) in made.chunks_exact(value).enumerate() {
                out.row_mut(n / seq, n % seq, head).copy_from_slice(from);
            }
        }
        Ok(())
    }

    /// Memory for as many threads as the projections are worth.
    fn lanes<'s>(&self, lanes: &'s mut Vec<Lane>, rows: usize) -> &'s mut [Lane] {
        let LatentDims { heads, latent, nope, value, .. } = self.dims;
        let products = [heads, latent, nope.max(value), rows].into_iter();
        let products = products.fold(1usize, usize::saturating_mul);
        let threads = if products < SPLIT_PRODUCTS { 1 } else { self.cpu.threads.count() };
        let threads = threads.min(heads).max(1);
        if lanes.len() < threads {
            lanes.resize_with(threads, Lane::default);
        }
        let lanes = &mut lanes[..threads];
        for lane in &mut *lanes {
            room(&mut lane.floats, latent.max(rows * nope));
        }
        lanes
    }

    /// One head's queries as rows `[B, T, c + r]`.
    fn absorb(&self, call: &LatentCall<'_>, head: usize, to: &mut [f32], lane: &mut Lane) {
        let LatentDims { latent, nope, .. } = self.dims;
        let seq = call.q.shape().seq;
        let query = |n: usize| call.q.row(n / seq, n % seq, head).split_at(nope);
        for (n, to) in to.chunks_exact_mut(self.dims.row()).enumerate() {
            to[latent..].copy_from_slice(query(n).1);
        }
        let weights = self.head(head, Part::Keys);
        match call.phase {
            Phase::Generated => self.absorb_rows(weights, |n| query(n).0, to, lane),
            Phase::Prompt => {
                let rows = to.len() / self.dims.row();
                let gathered = &mut lane.floats[..rows * nope];
                for (n, to) in gathered.chunks_exact_mut(nope.max(1)).enumerate() {
                    to.copy_from_slice(query(n).0);
                }
                let x = Input { data: &[], rows: 0, stride: 0 };
                let d_y = Input { data: gathered, rows, stride: nope };
                let d_x = Gradient::Write(Output { data: to, stride: self.dims.row() });
                let gradients = ProjectionGradients { d_x, ..Default::default() };
                let cpu = self.alone();
                lane.workspace.reserve(backward_workspace_bytes(cpu));
                let product = ProjectionBackward { weights, x, d_y };
                let done = project_backward(product, gradients, cpu, &mut lane.workspace);
                done.expect("queries and rows of the head's matrix");
            }
        }
    }

    /// Σ_k q_k W\[k, ·\], a row of W at a time for all queries: chains in the order of k, whatever shares the call.
    fn absorb_rows<'q>(
        &self,
        weights: Matrix<'_>,
        query: impl Fn(usize) -> &'q [f32],
        to: &mut [f32],
        lane: &mut Lane,
    ) {
        let (LatentDims { latent, nope, .. }, level) = (self.dims, self.cpu.level);
        let widened = &mut lane.floats[..latent];
        let row = self.dims.row();
        to.chunks_exact_mut(row).for_each(|to| to[..latent].fill(0.0));
        let stored = weights.bytes().chunks_exact((weights.bytes().len() / nope.max(1)).max(1));
        for (k, stored) in stored.enumerate() {
            dequantize(level, weights.format(), stored, widened);
            for (n, to) in to.chunks_exact_mut(row).enumerate() {
                row::blend(level, &mut to[..latent], 1.0, widened, query(n)[k]);
            }
        }
    }

    /// One head's outputs `[B, T, v]` from its mixed rows `[B, T, c]`.
    fn expand(&self, phase: Phase, head: usize, (from, to): (&[f32], &mut [f32]), lane: &mut Lane) {
        let LatentDims { latent, value, .. } = self.dims;
        let weights = self.head(head, Part::Values);
        let call = Call { phase, cpu: self.alone(), activations: Activations::F32 };
        let most = match phase {
            Phase::Prompt => from.len() / latent,
            Phase::Generated => MAX_GENERATED_ROWS,
        };
        for (from, to) in from.chunks(most * latent).zip(to.chunks_mut(most * value)) {
            let rows = from.len() / latent;
            lane.workspace.reserve(workspace_bytes(&[weights], rows, call));
            let x = Input { data: from, rows, stride: latent };
            let output = Output { data: to, stride: value };
            let done = project(&weights, x, output, call, &mut lane.workspace);
            done.expect("mixed rows and outputs of the head's matrix");
        }
    }
}
