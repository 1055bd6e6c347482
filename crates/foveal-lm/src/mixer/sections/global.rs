//! Longformer's global tokens with projections of their own.
//!
//! ```text
//! row g of a global token    softmax over all tokens up to g of scale ⟨q'_g, k'_j⟩, times v'_j
//! q', k', v' = x W'          normed and rotated as the layer's other queries and keys are
//! ```
//!
//! Other rows see global tokens by the layer's own keys and values. Beltagy et al. 2020, section 3.1, its causal half. A state
//! holds k' and v' up to the last global position, and none behind it.

use foveal::cache::KvStore;
use foveal::nn::{RmsNorm, rms_norm_in_place};
use foveal::position::RopeTable;
use foveal::{Attention, Phase, Scale, Shape, Tensor, TensorMut, TensorRef};

use super::core::{copy, sequence_of};
use super::state::SectionState;
use crate::Error;
use crate::linear::{Linear, Run, forward_together};
use crate::mixer::state::Heads;
use crate::mixer::{LayerState, Store};
use crate::names::Parts;

/// The projections, and which tokens are global.
#[derive(Clone, Debug)]
pub(super) struct Globals {
    query: Linear,
    key: Linear,
    value: Linear,
    sizes: Heads,
    /// Ascending, one at least.
    positions: Vec<usize>,
}

/// What they make of a call's tokens, `[rows, heads, head_dim]`.
pub(super) struct Projected([Vec<f32>; 3]);

impl Globals {
    pub(super) fn new(
        positions: &[usize],
        sizes: Heads,
        (parts, layer, section): (&Parts<'_>, usize, usize),
    ) -> Result<Globals, Error> {
        if positions.is_empty() {
            let expected = "positions in \"global\"";
            return Err(Error::config(
                "global projections of a mixer",
                "no global token",
                expected,
            ));
        }
        let mut positions = positions.to_vec();
        positions.sort_unstable();
        positions.dedup();
        let width = parts.config().width;
        let (dim, _) = sizes.dims;
        let read = |part: &str, heads| parts.section(layer, section, part, [heads * dim, width]);
        Ok(Globals {
            query: read("q_global", sizes.heads)?,
            key: read("k_global", sizes.kv_heads)?,
            value: read("v_global", sizes.kv_heads)?,
            sizes,
            positions,
        })
    }

    /// The last position of a global token.
    pub(super) fn last(&self) -> usize {
        self.positions.last().copied().unwrap_or(0)
    }

    /// The positions of global tokens, ascending.
    pub(super) fn positions(&self) -> &[usize] {
        &self.positions
    }

    /// Queries and keys of rows.
    pub(super) fn scored<'p>(
        &self,
        projected: &'p Projected,
        call: [usize; 2],
    ) -> Result<[TensorRef<'p, f32>; 2], Error> {
        let [q, k, _] = &projected.0;
        let of = |x, heads| TensorRef::new(x, self.shape(call, heads));
        Ok([of(q, self.sizes.heads)?, of(k, self.sizes.kv_heads)?])
    }

    /// The projections of rows, with norms (of queries and keys, if there are any) and rotation.
    pub(super) fn project(
        &self,
        x: &[f32],
        call: [usize; 2],
        (norms, rotation): ([Option<RmsNorm<'_>>; 2], &RopeTable),
        run: &mut Run<'_>,
    ) -> Result<Projected, Error> {
        let rows = call[0] * call[1];
        let [mut q, mut k, mut v] = [&self.query, &self.key, &self.value]
            .map(|linear| vec![0.0; rows * linear.out_features()]);
        let three = [
            (self.query.view()?, &mut q[..]),
            (self.key.view()?, &mut k),
            (self.value.view()?, &mut v),
        ];
        forward_together(x, three, run)?;
        for (norm, rows) in norms.into_iter().zip([&mut q, &mut k]) {
            if let Some(norm) = norm {
                rms_norm_in_place(norm, rows, run.cpu.level)?;
            }
        }
        for (x, heads) in [(&mut q, self.sizes.heads), (&mut k, self.sizes.kv_heads)] {
            rotation.rotate(run.cpu.level, TensorMut::new(x, self.shape(call, heads))?)?;
        }
        Ok(Projected([q, k, v]))
    }

    fn shape(&self, [batch, seq]: [usize; 2], heads: usize) -> Shape {
        Shape { batch, seq, heads, dim: self.sizes.dims.0 }
    }

    /// Writes the rows of a call's global tokens over what others made of them, behind section `n` of the states, which
    /// already holds the call's tokens.
    pub(super) fn forward(
        &self,
        (states, n): (&mut [LayerState], usize),
        projected: &Projected,
        (scale, mut out): (Scale, TensorMut<'_, f32>),
        run: &mut Run<'_>,
    ) -> Result<(), Error> {
        let call = [out.shape().batch, out.shape().seq];
        let Heads { heads, kv_heads, .. } = self.sizes;
        let [q, k, v] = &projected.0;
        let of = |x, heads| TensorRef::new(x, self.shape(call, heads));
        let (q, k, v) = (of(q, heads)?, of(k, kv_heads)?, of(v, kv_heads)?);
        for (sequence, state) in states.iter_mut().enumerate() {
            let Some(SectionState::Global(both, _)) = state.section_mut(n) else {
                return Err(Error::SectionState);
            };
            let [local, store] = &mut **both;
            let first = local.end() - call[1];
            let own =
                self.positions.iter().filter(|position| (first..local.end()).contains(position));
            let own: Vec<usize> = own.map(|position| position - first).collect();
            let mut taken = 0;
            for t in own {
                self.append(store, [k, v].map(|x| sequence_of(x, sequence).tokens(taken..t + 1)))?;
                taken = t + 1;
                let row =
                    self.attend(store, sequence_of(q, sequence).tokens(t..t + 1), scale, run)?;
                copy(row.view(), &mut out, (sequence, t));
            }
            if self.last() >= local.end() {
                let rest = [k, v].map(|x| sequence_of(x, sequence).tokens(taken..call[1]));
                self.append(store, rest)?;
            } else {
                store.clear();
            }
        }
        Ok(())
    }

    fn append(&self, store: &mut Store, [k, v]: [TensorRef<'_, f32>; 2]) -> Result<(), Error> {
        store.make_room(None, k.shape().seq)?;
        store.append(k, v)
    }

    /// One row over all that a store holds.
    fn attend(
        &self,
        store: &Store,
        q: TensorRef<'_, f32>,
        scale: Scale,
        run: &mut Run<'_>,
    ) -> Result<Tensor<f32>, Error> {
        let keys = Shape { seq: store.end(), heads: self.sizes.kv_heads, ..q.shape() };
        let attention = Attention::new().scale(scale).cpu(run.cpu);
        let plan = match run.phase {
            Phase::Prompt => attention.plan(q.shape(), keys, keys)?,
            Phase::Generated => attention.plan_decode(q.shape(), keys, keys)?,
        };
        run.workspace.reserve(plan.workspace_bytes());
        let mut row = Tensor::zeros(q.shape())?;
        let stores: [&dyn KvStore; 1] = [store];
        plan.forward_cached(q, &stores, (row.view_mut(), None), run.workspace)?;
        Ok(row)
    }
}
