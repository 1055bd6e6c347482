//! Keys and values of one sequence, rows `[entry][head]`, and exact attention of one token to some of them.

use super::parts::Runner;
use super::state::StateHeads;
use crate::element::Element;
use crate::error::Result;
use crate::exact::state::join_rows;
use crate::mask::Mask;
use crate::plan::{Inputs, expect};
use crate::problem::{Attention, Forward};
use crate::tensor::{Shape, Strides, Tensor, TensorRef};
use crate::workspace::Workspace;
use std::ops::Range;

#[derive(Debug, Clone)]
pub(super) struct Held<E> {
    pub(super) runner: Runner,
    pub(super) shape: StateHeads,
    pub(super) keys: Vec<E>,
    pub(super) values: Vec<E>,
    workspace: Workspace,
}

impl<E: Element> Held<E> {
    /// Nothing held, of shapes that can be attended to.
    pub(super) fn new(runner: Runner, shape: StateHeads) -> Result<Held<E>> {
        let StateHeads { heads, kv_heads, key_dim, value_dim } = shape;
        let q = Shape { batch: 1, seq: 1, heads, dim: key_dim };
        let k = Shape { heads: kv_heads, ..q };
        Attention::new().cpu(runner.cpu).plan_decode(q, k, Shape { dim: value_dim, ..k })?;
        Ok(Held { runner, shape, keys: vec![], values: vec![], workspace: Workspace::new() })
    }

    pub(super) fn entries(&self) -> usize {
        self.keys.len() / self.widths()[0].max(1)
    }

    /// Bytes of keys and values.
    pub(super) fn bytes(&self) -> usize {
        (self.keys.len() + self.values.len()) * E::DTYPE.size()
    }

    /// Keys and values, rows `[entry][kv head]`.
    pub(super) fn rows(&self) -> [&[E]; 2] {
        [&self.keys, &self.values]
    }

    /// Numbers of all keys, and of all values, of an entry.
    pub(super) fn widths(&self) -> [usize; 2] {
        [self.shape.key_dim, self.shape.value_dim].map(|dim| dim * self.shape.kv_heads)
    }

    pub(super) fn clear(&mut self) {
        self.keys.clear();
        self.values.clear();
    }

    /// All keys.
    pub(super) fn view(&self) -> Result<TensorRef<'_, E>> {
        let StateHeads { kv_heads: heads, key_dim: dim, .. } = self.shape;
        TensorRef::new(&self.keys, Shape { batch: 1, seq: self.entries(), heads, dim })
    }

    /// How many tokens there are to append, if they fit.
    pub(super) fn check(&self, k: Shape, v: Shape) -> Result<usize> {
        let StateHeads { kv_heads, key_dim, value_dim, .. } = self.shape;
        let shape = Shape { batch: 1, seq: k.seq, heads: kv_heads, dim: key_dim };
        expect("keys to append", shape, k)?;
        expect("values to append", Shape { dim: value_dim, ..shape }, v)?;
        Ok(k.seq)
    }

    /// Writes token `t` over an entry, or behind the last one.
    pub(super) fn write(&mut self, place: usize, [k, v]: [TensorRef<'_, E>; 2], t: usize) {
        for (x, to) in [(k, &mut self.keys), (v, &mut self.values)] {
            let Shape { heads, dim, .. } = x.shape();
            let start = place * heads * dim;
            if to.len() == start {
                (0..heads).for_each(|head| to.extend_from_slice(x.row(0, t, head)));
            } else {
                let rows = to[start..start + heads * dim].chunks_exact_mut(dim);
                rows.enumerate().for_each(|(head, row)| row.copy_from_slice(x.row(0, t, head)));
            }
        }
    }

    /// What a token with the queries `[1, 1, H, Dk]` that has seen nothing yet gives.
    pub(super) fn nothing(&self, q: Shape) -> Result<Forward<E>> {
        let StateHeads { heads, key_dim, value_dim, .. } = self.shape;
        let shape = Shape { batch: 1, seq: 1, heads, dim: key_dim };
        expect("queries of the newest token", shape, q)?;
        let shape = Shape { dim: value_dim, ..shape };
        let lse = Tensor::from_vec(vec![f32::NEG_INFINITY; heads], shape.per_row())?;
        Ok(Forward { out: Tensor::zeros(shape)?, lse })
    }

    /// Joins what some query heads see of some entries with what they have seen.
    pub(super) fn attend(
        &mut self,
        q: TensorRef<'_, E>,
        heads: Range<usize>,
        (entries, mask): (Stepped, Mask),
        to: &mut Forward<E>,
    ) -> Result<()> {
        let part = self.read(q.part(0..1, heads.clone()), (entries, heads.clone()), mask)?;
        let (mut out, mut lse) = (to.out.view_mut(), to.lse.view_mut());
        for (n, head) in heads.enumerate() {
            let more = (part.out.view().row(0, 0, n), part.lse.view().row(0, 0, n)[0]);
            let row = (out.row_mut(0, 0, head), &mut lse.row_mut(0, 0, head)[0]);
            join_rows(self.runner.cpu.level, row, more);
        }
        Ok(())
    }

    /// One call of the exact engine.
    fn read(
        &mut self,
        q: TensorRef<'_, E>,
        (entries, own): (Stepped, Range<usize>),
        mask: Mask,
    ) -> Result<Forward<E>> {
        let StateHeads { heads, kv_heads, key_dim, value_dim } = self.shape;
        let kv = own.start * kv_heads / heads..(own.end * kv_heads).div_ceil(heads);
        let k = entries.view(&self.keys, [kv_heads, key_dim], kv.clone())?;
        let v = entries.view(&self.values, [kv_heads, value_dim], kv)?;
        let attention = self.runner.attention(mask);
        let plan = attention.plan_decode(q.shape(), k.shape(), v.shape())?;
        self.workspace.reserve(plan.workspace_bytes());
        let mut out = Tensor::zeros(plan.out_shape())?;
        let mut lse = Tensor::zeros(plan.out_shape().per_row())?;
        let outputs = (out.view_mut(), Some(lse.view_mut()));
        plan.forward(Inputs { q, k, v }, outputs.0, outputs.1, &mut self.workspace)?;
        Ok(Forward { out, lse })
    }
}

/// Each `step`-th entry of a range.
#[derive(Debug, Clone)]
pub(super) struct Stepped {
    pub(super) entries: Range<usize>,
    pub(super) step: usize,
}

impl Stepped {
    fn view<'a, E: Element>(
        &self,
        data: &'a [E],
        [heads, dim]: [usize; 2],
        own: Range<usize>,
    ) -> Result<TensorRef<'a, E>> {
        let width = heads * dim;
        let seq = self.entries.len().div_ceil(self.step);
        let shape = Shape { batch: 1, seq, heads, dim };
        let strides = Strides { batch: 0, seq: self.step.saturating_mul(width), heads: dim };
        let from = (self.entries.start * width).min(data.len());
        Ok(TensorRef::from_strides(&data[from..], shape, strides)?.part(0..1, own))
    }
}
