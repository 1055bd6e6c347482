//! Exact attention over a sequence that is shared out: keys and values go round, and each process merges what it sees of them.
//!
//! ```text
//! (o_n, L_n) = attention of own queries to the n-th share of keys       L = log Σ_n e^(L_n)      o = Σ_n e^(L_n − L) o_n
//! backward     of a part with the joined o and L is exact; gradients of keys and values go round with them
//! ```
//!
//! Own queries are `[B, T/W, H, D]`, keys and values `[B, T/W, KV, D]`, cut as a [`Share`] says: with a causal mask and
//! balanced shares all processes have the same work. W − 1 messages of one share of keys and values forward, 2W − 1 backward;
//! memory is two shares of them (four backward). Exact up to the rounding of merging; the bits depend on W. Liu, Zaharia and
//! Abbeel 2023 (arXiv:2310.01889).

use std::ops::Range;

use foveal::{
    Attention, Cpu, Mask, Scale, Shape, SoftmaxState, Tensor, TensorRef, Workspace, nn, plan,
};

use crate::share::rows;
use crate::{Error, Processes, Share, before, same_everywhere};

/// Attention over a sequence that several processes hold.
///
/// ```
/// use foveal::{Shape, Workspace, plan::Inputs, testing::normal};
/// use foveal_processes::{Processes, RingAttention, Share, Threads};
/// # fn main() -> Result<(), foveal_processes::Error> {
/// let whole = normal(Shape { batch: 1, seq: 64, heads: 2, dim: 8 }, 1)?;
/// let outs = Threads::run(2, |processes| {
///     let share = Share { count: 2, balanced: true };
///     let x = share.of(whole.view(), processes.rank())?;
///     let inputs = Inputs { q: x.view(), k: x.view(), v: x.view() };
///     let result = RingAttention::new(&processes).forward(inputs, &mut Workspace::new())?;
///     share.gather(&processes, &result.out)
/// });
/// assert_eq!(outs[0].as_ref().unwrap(), outs[1].as_ref().unwrap());
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct RingAttention<'p> {
    processes: &'p dyn Processes,
    causal: bool,
    share: Share,
    scale: Scale,
    cpu: Option<Cpu>,
}

/// What forward gives: this process's share.
#[derive(Clone, Debug, PartialEq)]
pub struct RingResult {
    /// `[B, T/W, H, Dv]`.
    pub out: Tensor<f32>,
    /// The log-sum-exp over all keys, `[B, T/W, H, 1]`.
    pub lse: Tensor<f32>,
}

/// Gradients of this process's share.
#[derive(Clone, Debug, PartialEq)]
pub struct RingGradients {
    /// `[B, T/W, H, D]`.
    pub d_q: Tensor<f32>,
    /// `[B, T/W, KV, D]`, of the queries of all processes.
    pub d_k: Tensor<f32>,
    /// `[B, T/W, KV, Dv]`, likewise.
    pub d_v: Tensor<f32>,
}

/// A share as it lies in messages: of each piece its keys, then its values.
#[derive(Clone, Copy, Debug)]
struct Layout {
    k: Shape,
    v: Shape,
}

/// One of this process's pieces against one of those that are there.
#[derive(Clone, Copy, Debug)]
struct Part {
    own: usize,
    there: usize,
    /// Whether rows see only what is before them.
    diagonal: bool,
}

impl<'p> RingAttention<'p> {
    /// Causal, with balanced shares, scaled by 1 / √D.
    pub fn new(processes: &'p dyn Processes) -> RingAttention<'p> {
        let share = Share { count: processes.count(), balanced: true };
        RingAttention { processes, causal: true, share, scale: Scale::default(), cpu: None }
    }

    /// Whether tokens see only those before them.
    #[must_use]
    pub fn causal(self, causal: bool) -> RingAttention<'p> {
        RingAttention { causal, ..self }
    }

    /// Whether each process holds a piece from either end.
    #[must_use]
    pub fn balanced(self, balanced: bool) -> RingAttention<'p> {
        RingAttention { share: Share { balanced, ..self.share }, ..self }
    }

    /// What products are multiplied by.
    #[must_use]
    pub fn scale(self, scale: Scale) -> RingAttention<'p> {
        RingAttention { scale, ..self }
    }

    /// Instructions and threads; those of the machine if it is not called.
    #[must_use]
    pub fn cpu(self, cpu: Cpu) -> RingAttention<'p> {
        RingAttention { cpu: Some(cpu), ..self }
    }

    /// Attention of this process's queries to the keys of all. Every process calls it. Allocates its results, a state a row,
    /// and two shares of keys and values.
    ///
    /// # Errors
    /// [`Error::Uneven`]; [`Error::Differs`] where processes have other shapes or options; [`Error::Kernel`] for shapes that do
    /// not fit each other; those of [`Processes::shift`].
    pub fn forward(
        &self,
        inputs: plan::Inputs<'_, f32, f32>,
        workspace: &mut Workspace,
    ) -> Result<RingResult, Error> {
        let layout = self.layout(&inputs)?;
        let queries = self.cut(inputs.q)?;
        let value_dim = layout.v.dim;
        let states = |q: &Tensor<f32>| {
            let Shape { batch, seq, heads, .. } = q.shape();
            vec![SoftmaxState::new(value_dim); batch * seq * heads]
        };
        let mut states: Vec<Vec<SoftmaxState>> = queries.iter().map(states).collect();
        let mut held = self.packed(inputs.k, inputs.v)?;
        let mut next = vec![0.0; held.len()];
        for step in 0..self.share.count {
            for part in self.parts(step) {
                let q = queries[part.own].view();
                let [k, v] = layout.views(&held, part.there)?;
                let given = self.part(part, plan::Inputs { q, k, v }, workspace)?;
                merge(&mut states[part.own], &given, self.resolved_cpu()?);
            }
            if step + 1 < self.share.count {
                self.processes.shift(1, &held, &mut next)?;
                std::mem::swap(&mut held, &mut next);
            }
        }
        self.finished(&states, Shape { dim: value_dim, ..inputs.q.shape() })
    }

    /// Gradients of a loss whose gradient with respect to this process's outputs is `d_out`, `[B, T/W, H, Dv]`. Every process
    /// calls it, with what its forward gave. Allocates its results and four shares of keys and values.
    ///
    /// # Errors
    /// Those of [`RingAttention::forward`].
    pub fn backward(
        &self,
        inputs: plan::Inputs<'_, f32, f32>,
        result: &RingResult,
        d_out: TensorRef<'_, f32>,
        workspace: &mut Workspace,
    ) -> Result<RingGradients, Error> {
        let layout = self.layout(&inputs)?;
        let (queries, d_outs) = (self.cut(inputs.q)?, self.cut(d_out)?);
        let (outs, lses) = (self.cut(result.out.view())?, self.cut(result.lse.view())?);
        let zeros = |q: &Tensor<f32>| vec![0.0; q.as_slice().len()];
        let mut d_queries: Vec<Vec<f32>> = queries.iter().map(zeros).collect();
        let mut held = self.packed(inputs.k, inputs.v)?;
        let mut d_held = vec![0.0; held.len()];
        let mut next = vec![0.0; held.len()];
        for step in 0..self.share.count {
            for part in self.parts(step) {
                let n = part.own;
                let [k, v] = layout.views(&held, part.there)?;
                let given = plan::Inputs { q: queries[n].view(), k, v };
                let saved = plan::Saved { out: outs[n].view(), lse: lses[n].view() };
                let d = self.part_backward(part, given, (saved, d_outs[n].view()), workspace)?;
                let level = self.resolved_cpu()?.level;
                nn::add(&mut d_queries[n], d.d_q.as_slice(), level)?;
                let [keys, values] = layout.ranges(part.there);
                nn::add(&mut d_held[keys], d.d_k.as_slice(), level)?;
                nn::add(&mut d_held[values], d.d_v.as_slice(), level)?;
            }
            if step + 1 < self.share.count {
                self.processes.shift(1, &held, &mut next)?;
                std::mem::swap(&mut held, &mut next);
            }
            // Gradients follow their keys and values, and are home after the last step.
            if self.share.count > 1 {
                self.processes.shift(1, &d_held, &mut next)?;
                std::mem::swap(&mut d_held, &mut next);
            }
        }
        self.gradients((layout, &d_held), &d_queries, &inputs)
    }

    fn resolved_cpu(&self) -> Result<Cpu, Error> {
        Ok(self.cpu.map_or_else(Cpu::detect, Ok)?)
    }

    /// The shapes of pieces, the same on all processes.
    fn layout(&self, inputs: &plan::Inputs<'_, f32, f32>) -> Result<Layout, Error> {
        let pieces = self.share.held_by(0).len();
        let shapes = [inputs.q.shape(), inputs.k.shape(), inputs.v.shape()];
        let [q, k, v] = shapes;
        let how = format!("{} {} {:?}", self.causal, self.share.balanced, self.scale);
        let shapes = shapes.map(|shape| shape.to_string()).join(" ");
        same_everywhere(
            self.processes,
            &[("the shapes of a ring's shares", shapes), ("the options of a ring", how)],
        )?;
        if !q.seq.is_multiple_of(pieces) {
            let what = "tokens of a share";
            return Err(Error::Uneven { what, found: q.seq, multiple: pieces });
        }
        let expected = Shape { seq: q.seq, dim: k.dim, ..k };
        if k != expected || v != (Shape { dim: v.dim, ..k }) {
            let what = "keys and values of a share must have its tokens";
            let got = if k == expected { v } else { k };
            return Err(foveal::Error::ShapeMismatch { what, expected, got }.into());
        }
        let seq = q.seq / pieces;
        Ok(Layout { k: Shape { seq, ..k }, v: Shape { seq, ..v } })
    }

    /// What of the share that is here at a step own pieces see.
    fn parts(&self, step: usize) -> Vec<Part> {
        let own = self.share.held_by(self.processes.rank());
        let there = self.share.held_by(before(self.processes, step));
        let mut parts = vec![];
        for (i, a) in own.iter().enumerate() {
            for (j, b) in there.iter().enumerate() {
                if !self.causal || b <= a {
                    parts.push(Part { own: i, there: j, diagonal: self.causal && a == b });
                }
            }
        }
        parts
    }

    fn attention(&self, part: Part) -> Result<Attention<'static>, Error> {
        let mask = if part.diagonal { Mask::causal() } else { Mask::full() };
        Ok(Attention::new().mask(mask).scale(self.scale).cpu(self.resolved_cpu()?))
    }

    fn part(
        &self,
        part: Part,
        inputs: plan::Inputs<'_, f32, f32>,
        workspace: &mut Workspace,
    ) -> Result<RingResult, Error> {
        let attention = self.attention(part)?;
        let plan = attention.plan(inputs.q.shape(), inputs.k.shape(), inputs.v.shape())?;
        workspace.try_reserve(plan.workspace_bytes())?;
        let mut out = Tensor::zeros(plan.out_shape())?;
        let mut lse = Tensor::zeros(plan.out_shape().per_row())?;
        plan.forward(inputs, out.view_mut(), Some(lse.view_mut()), workspace)?;
        Ok(RingResult { out, lse })
    }

    fn part_backward(
        &self,
        part: Part,
        inputs: plan::Inputs<'_, f32, f32>,
        (saved, d_out): (plan::Saved<'_, f32>, TensorRef<'_, f32>),
        workspace: &mut Workspace,
    ) -> Result<RingGradients, Error> {
        let attention = self.attention(part)?;
        let plan = attention.plan(inputs.q.shape(), inputs.k.shape(), inputs.v.shape())?;
        workspace.try_reserve(plan.backward_workspace_bytes::<f32>())?;
        let mut d_q = Tensor::zeros(inputs.q.shape())?;
        let mut d_k = Tensor::zeros(inputs.k.shape())?;
        let mut d_v = Tensor::zeros(inputs.v.shape())?;
        let places = plan::Gradients {
            d_q: d_q.view_mut(),
            d_k: d_k.view_mut(),
            d_v: d_v.view_mut(),
            terms: plan::TermGradients::default(),
        };
        let upstream = plan::Upstream { d_out, d_lse: None };
        plan.backward(inputs, saved, upstream, places, workspace)?;
        Ok(RingGradients { d_q, d_k, d_v })
    }

    /// The pieces of a share, each as a tensor of its own.
    fn cut(&self, share: TensorRef<'_, f32>) -> Result<Vec<Tensor<f32>>, Error> {
        let Shape { batch, seq, heads, .. } = share.shape();
        let count = self.share.held_by(0).len();
        let len = seq / count;
        let piece = |n: usize| {
            let mut piece = Tensor::zeros(Shape { seq: len, ..share.shape() })?;
            let mut view = piece.view_mut();
            for (b, t, h) in rows(batch, len, heads) {
                view.row_mut(b, t, h).copy_from_slice(share.row(b, n * len + t, h));
            }
            Ok(piece)
        };
        (0..count).map(piece).collect()
    }

    /// Keys and values as they go round.
    fn packed(&self, k: TensorRef<'_, f32>, v: TensorRef<'_, f32>) -> Result<Vec<f32>, Error> {
        let mut packed = vec![];
        for (k, v) in self.cut(k)?.iter().zip(&self.cut(v)?) {
            packed.extend_from_slice(k.as_slice());
            packed.extend_from_slice(v.as_slice());
        }
        Ok(packed)
    }

    /// Pieces as a share.
    fn joined(&self, pieces: &[&[f32]], shape: Shape) -> Result<Tensor<f32>, Error> {
        let mut share = Tensor::zeros(shape)?;
        let len = shape.seq / pieces.len().max(1);
        let mut view = share.view_mut();
        for (n, piece) in pieces.iter().enumerate() {
            let piece = TensorRef::new(piece, Shape { seq: len, ..shape })?;
            for (b, t, h) in rows(shape.batch, len, shape.heads) {
                view.row_mut(b, n * len + t, h).copy_from_slice(piece.row(b, t, h));
            }
        }
        Ok(share)
    }

    fn finished(&self, states: &[Vec<SoftmaxState>], shape: Shape) -> Result<RingResult, Error> {
        let (mut outs, mut lses) = (vec![], vec![]);
        for states in states {
            let mut out = vec![0.0; states.len() * shape.dim];
            let rows = states.iter().zip(out.chunks_exact_mut(shape.dim.max(1)));
            lses.push(rows.map(|(state, out)| state.finish(out)).collect::<Vec<f32>>());
            outs.push(out);
        }
        let slices = |all: &[Vec<f32>], shape| {
            self.joined(&all.iter().map(Vec::as_slice).collect::<Vec<_>>(), shape)
        };
        Ok(RingResult { out: slices(&outs, shape)?, lse: slices(&lses, shape.per_row())? })
    }

    fn gradients(
        &self,
        (layout, d_held): (Layout, &[f32]),
        d_queries: &[Vec<f32>],
        inputs: &plan::Inputs<'_, f32, f32>,
    ) -> Result<RingGradients, Error> {
        let (mut keys, mut values) = (vec![], vec![]);
        for n in 0..d_queries.len() {
            let [k, v] = layout.ranges(n);
            keys.push(&d_held[k]);
            values.push(&d_held[v]);
        }
        let queries: Vec<&[f32]> = d_queries.iter().map(Vec::as_slice).collect();
        Ok(RingGradients {
            d_q: self.joined(&queries, inputs.q.shape())?,
            d_k: self.joined(&keys, inputs.k.shape())?,
            d_v: self.joined(&values, inputs.v.shape())?,
        })
    }
}

impl Layout {
    /// Where keys and values of piece `n` lie.
    fn ranges(self, n: usize) -> [Range<usize>; 2] {
        let len = |Shape { batch, seq, heads, dim }: Shape| batch * seq * heads * dim;
        let (k, v) = (len(self.k), len(self.v));
        let start = n * (k + v);
        [start..start + k, start + k..start + k + v]
    }

    fn views(self, held: &[f32], n: usize) -> Result<[TensorRef<'_, f32>; 2], Error> {
        let [k, v] = self.ranges(n);
        Ok([TensorRef::new(&held[k], self.k)?, TensorRef::new(&held[v], self.v)?])
    }
}

/// Merges what rows see of one part into what they have seen.
fn merge(states: &mut [SoftmaxState], part: &RingResult, cpu: Cpu) {
    const ROWS: usize = 64;
    let dim = part.out.shape().dim;
    let outs = part.out.as_slice().chunks(ROWS * dim);
    let pieces = states.chunks_mut(ROWS).zip(outs).zip(part.lse.as_slice().chunks(ROWS));
    cpu.for_each(pieces, |((states, outs), lses)| {
        for ((state, out), &lse) in states.iter_mut().zip(outs.chunks_exact(dim)).zip(lses) {
            state.merge(&SoftmaxState::from_output(out, lse));
        }
    });
}
