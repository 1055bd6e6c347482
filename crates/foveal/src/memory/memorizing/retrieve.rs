//! Exact attention of each query to the entries that it selected: gathered, one sequence of a batch for each token.
//!
//! ```text
//! queries |s| q̂ [n, 1, H, Dk]      keys and values [n, k, H, Dk] and [n, k, H, Dv], those of each query its own
//! ```
//!
//! A few tokens at a time, so that what is gathered stays near. There is no other softmax here than [`crate::Attention`]'s.

use super::super::MemoryStore;
use super::search::NONE;
use crate::cache::{KvValues, TILE, with_rows};
use crate::cpu::Cpu;
use crate::error::Result;
use crate::parallel::for_each_item;
use crate::plan::{Gradients, Inputs, Saved, TermGradients, Upstream};
use crate::problem::Attention;
use crate::simd::row;
use crate::tensor::{Patch, Shape, Spans, Tensor, TensorMut, TensorRef};
use crate::workspace::Workspace;
use std::ops::Range;

/// Numbers that are gathered at a time.
const GATHERED: usize = 1 << 20;

/// Selected entries of a segment's queries, `[head][token][top]`, and where they are.
#[derive(Clone, Copy)]
pub(super) struct Entries<'a> {
    pub(super) store: &'a dyn MemoryStore,
    pub(super) selected: &'a [u32],
    pub(super) top: usize,
    /// Entries that a query may have: at most `top`.
    pub(super) most: usize,
    pub(super) cpu: Cpu,
}

/// What is gathered for some tokens.
struct Gathered {
    k: Tensor<f32>,
    v: Tensor<f32>,
    /// −∞ for what is missing, if something is.
    missing: Option<Tensor<f32>>,
}

impl Gathered {
    fn bias<'a>(&'a self, attention: Attention<'a>) -> Attention<'a> {
        match &self.missing {
            Some(missing) => attention.bias(missing.view()),
            None => attention,
        }
    }
}

impl Entries<'_> {
    /// Tokens at a time.
    fn chunks(&self, q: Shape) -> impl Iterator<Item = Range<usize>> + use<> {
        let (keys, values) = self.store.dims();
        let step =
            (GATHERED / (self.most * q.heads * (keys + values)).max(1)).clamp(1, q.seq.max(1));
        (0..q.seq).step_by(step).map(move |first| first..q.seq.min(first + step))
    }

    fn of(&self, tokens: usize, token: usize, head: usize) -> &[u32] {
        &self.selected[(head * tokens + token) * self.top..][..self.most]
    }

    /// The entries of some tokens' queries.
    fn gather(&self, q: Shape, tokens: Range<usize>) -> Result<Gathered> {
        let (keys, values) = self.store.dims();
        let shape = Shape { batch: tokens.len(), seq: self.most, heads: q.heads, dim: keys };
        let mut k = Tensor::zeros(shape)?;
        let mut v = Tensor::zeros(Shape { dim: values, ..shape })?;
        let spans = Spans::new(shape.batch, shape.seq, None)?;
        let patches = k.view_mut().into_patches(spans, 1).zip(v.view_mut().into_patches(spans, 1));
        let threads = std::iter::repeat_n((), self.cpu.threads.count());
        for_each_item(patches.enumerate(), threads, |(n, (mut k, mut v)), ()| {
            let (token, head) = (tokens.start + n / q.heads, n % q.heads);
            let own = self.of(q.seq, token, head);
            self.copy(own, head * self.store.kv_heads() / q.heads, (&mut k, &mut v));
        });
        let mut missing = None;
        for (n, token) in tokens.clone().enumerate() {
            for head in 0..q.heads {
                for (j, _) in
                    self.of(q.seq, token, head).iter().enumerate().filter(|x| *x.1 == NONE)
                {
                    let shape = Shape { seq: 1, dim: self.most, ..shape };
                    let bias = match &mut missing {
                        Some(bias) => bias,
                        none => none.insert(Tensor::<f32>::zeros(shape)?),
                    };
                    bias.view_mut().row_mut(n, 0, head)[j] = f32::NEG_INFINITY;
                }
            }
        }
        Ok(Gathered { k, v, missing })
    }

    fn copy(
        &self,
        own: &[u32],
        kv_head: usize,
        (k, v): (&mut Patch<'_, f32>, &mut Patch<'_, f32>),
    ) {
        for (j, &position) in own.iter().enumerate().filter(|x| *x.1 != NONE) {
            let (at, level) = (position as usize, self.cpu.level);
            let Some(key) = self.store.exact().tile(kv_head, at..at + 1).keys.rows() else {
                unreachable!("a memory's store was checked to have rows of keys")
            };
            with_rows!(key, rows => row::widen(level, rows.row(0), k.row(j, 0)));
            let tile = self.tile(at);
            match self.store.tile(kv_head, tile.clone()).values {
                KvValues::Rows(rows) => with_rows!(rows, rows => {
                    row::widen(level, rows.row(at - tile.start), v.row(j, 0));
                }),
                KvValues::Tokens(codes) => codes.row(at - tile.start, v.row(j, 0)),
            }
        }
    }

    /// What a store may be asked for to have the value at a position: all of a tile where there are codes.
    fn tile(&self, at: usize) -> Range<usize> {
        match self.store.coded() {
            false => at..at + 1,
            true => {
                let first = at / TILE * TILE;
                first.max(self.store.start())..(first + TILE).min(self.store.end())
            }
        }
    }

    /// Attention of the queries `[1, n, H, Dk]` of a segment; `results` are output and log-sum-exp.
    pub(super) fn attend(
        &self,
        attention: &Attention<'static>,
        q: TensorRef<'_, f32>,
        (mut out, mut lse): (TensorMut<'_, f32>, TensorMut<'_, f32>),
        workspace: &mut Workspace,
    ) -> Result<()> {
        let (shape, q) = (q.shape(), q.stretches(0, 1));
        for tokens in self.chunks(shape) {
            let gathered = self.gather(shape, tokens.clone())?;
            let attention = gathered.bias(attention.clone());
            let q = q.part(tokens.clone(), 0..shape.heads);
            let inputs = Inputs { q, k: gathered.k.view(), v: gathered.v.view() };
            let plan = attention.plan(q.shape(), gathered.k.shape(), gathered.v.shape())?;
            workspace.reserve(plan.workspace_bytes());
            let out = out.reborrow().into_stretches(0, 1).into_part(tokens.clone(), 0..shape.heads);
            let lse = lse.reborrow().into_stretches(0, 1).into_part(tokens, 0..shape.heads);
            plan.forward(inputs, out, Some(lse), workspace)?;
        }
        Ok(())
    }

    /// The gradients of these queries. Those of entries go nowhere.
    pub(super) fn differentiate(
        &self,
        attention: &Attention<'static>,
        (q, saved): (TensorRef<'_, f32>, Saved<'_, f32>),
        d_out: TensorRef<'_, f32>,
        mut d_q: TensorMut<'_, f32>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let (shape, q) = (q.shape(), q.stretches(0, 1));
        let (mut d_k, mut d_v) = (vec![], vec![]);
        for tokens in self.chunks(shape) {
            let gathered = self.gather(shape, tokens.clone())?;
            let attention = gathered.bias(attention.clone());
            let all = 0..shape.heads;
            let [lse, out, d_out] = [saved.lse, saved.out, d_out]
                .map(|x| x.stretches(0, 1).part(tokens.clone(), all.clone()));
            let q = q.part(tokens.clone(), all.clone());
            let inputs = Inputs { q, k: gathered.k.view(), v: gathered.v.view() };
            let [k, v] = [gathered.k.shape(), gathered.v.shape()];
            let plan = attention.plan(q.shape(), k, v)?;
            workspace.reserve(plan.backward_workspace_bytes::<f32>());
            d_k.resize(gathered.k.as_slice().len(), 0.0);
            d_v.resize(gathered.v.as_slice().len(), 0.0);
            let gradients = Gradients {
                d_q: d_q.reborrow().into_stretches(0, 1).into_part(tokens.clone(), all.clone()),
                d_k: TensorMut::new(&mut d_k, k)?,
                d_v: TensorMut::new(&mut d_v, v)?,
                terms: TermGradients::default(),
            };
            let saved = Saved { out, lse };
            let upstream = Upstream { d_out, d_lse: None };
            plan.backward(inputs, saved, upstream, gradients, workspace)?;
        }
        Ok(())
    }
}
