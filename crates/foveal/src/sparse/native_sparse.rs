//! Native Sparse Attention: compressed tokens, selected blocks and a window, three softmaxes summed by gates.
//!
//! ```text
//! out_i = g_i¹ · attn(q, K¹, V¹) + g_i² · attn(q, K², V²) + g_i³ · attn(q, K³, V³)
//! 1  compressed  token n stands for tokens n·d … n·d + l − 1; a row sees it once it is at or behind the last of them
//! 2  selected    block 0, the own block of l' tokens and the one before it, and the n − 3 others with the largest
//!                P_c = Σ over heads of the group, m < l'/d, o < l/d of p_(c·l'/d + m − o)      p: weights of branch 1
//! 3  window      the w newest tokens
//! ```
//!
//! What makes compressed tokens of tokens is the caller's, who gets gradients for them; [`NativeSparse::pool`] takes
//! means. No gradient goes through the selection, which the heads of a group make together. Cost for each query:
//! i/d compressed tokens, twice, as selecting looks at their weights again; n · l' and w tokens. Yuan et al. 2025,
//! section 3; the index of P as its geometry says, where equation 9 has other signs.

use super::choices::{BlockChoices, best};
use super::native_pattern::{Chosen, Forced, Whole};
use super::parts::{Heads, Memory, Part, Runner, Tokens};
use super::rows::each_row;
use crate::cpu::Cpu;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::inspect::Forwarded;
use crate::mask::Mask;
use crate::plan::{Backward, Inputs, expect};
use crate::problem::{Attention, Forward, Scale};
use crate::tensor::{Shape, Tensor, TensorRef};
use std::ops::Range;

/// Weights of compressed tokens that are looked at together.
const LOOKED: usize = 1 << 21;
/// Blocks that every row sees: the first, its own and the one before.
pub(super) const FORCED: usize = 3;

/// Sizes of the three branches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NativeSizes {
    /// l: tokens that a compressed one stands for.
    pub length: usize,
    /// d: tokens from one compressed one's first to the next one's.
    pub stride: usize,
    /// l': tokens of a block that is selected or not.
    pub block: usize,
    /// n: blocks that a row sees, the first, its own and the one before included.
    pub top: usize,
    /// w: the newest tokens.
    pub window: usize,
}

impl Default for NativeSizes {
    /// As published: 32, 16, 64, 16, 512.
    fn default() -> NativeSizes {
        NativeSizes { length: 32, stride: 16, block: 64, top: 16, window: 512 }
    }
}

/// Something of each branch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Branches<T> {
    /// Of compressed tokens.
    pub compressed: T,
    /// Of selected blocks.
    pub selected: T,
    /// Of the newest tokens.
    pub window: T,
}

impl<T> Branches<T> {
    /// In the order of gates.
    pub(super) fn each(&self) -> [&T; 3] {
        [&self.compressed, &self.selected, &self.window]
    }
}

/// Native Sparse Attention.
///
/// ```
/// use foveal::plan::Inputs;
/// use foveal::sparse::{Branches, NativeSizes, NativeSparse};
/// use foveal::{Shape, Tensor};
/// # fn main() -> foveal::Result<()> {
/// let shape = Shape { batch: 1, seq: 100, heads: 4, dim: 16 };
/// let q = Tensor::<f32>::zeros(shape)?;
/// let x = Tensor::<f32>::zeros(Shape { heads: 2, ..shape })?;
/// let gates = Tensor::zeros(Shape { dim: 3, ..shape })?;
/// let sizes = NativeSizes { length: 8, stride: 4, block: 8, top: 5, window: 16 };
/// let layer = NativeSparse::new(sizes)?;
/// let compressed = layer.pool(x.view())?;
/// let tokens = Inputs { q: q.view(), k: x.view(), v: x.view() };
/// let inputs = Branches {
///     compressed: Inputs { k: compressed.view(), v: compressed.view(), ..tokens },
///     selected: tokens,
///     window: tokens,
/// };
/// let forward = layer.forward(inputs, gates.view())?;
/// let (d, d_gates) = layer.backward(inputs, gates.view(), &forward, q.view())?;
/// let d_x = layer.pool_backward(d.compressed.d_k.view(), 100)?;
/// assert_eq!((d_x.shape(), d_gates.shape()), (x.shape(), gates.shape()));
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, Copy)]
pub struct NativeSparse {
    pub(super) sizes: NativeSizes,
    scale: Scale,
    cpu: Option<Cpu>,
}

/// A result, and what backward needs of its making.
#[derive(Debug, Clone, PartialEq)]
pub struct NativeForward<E> {
    /// `[B, T, H, Dv]`.
    pub out: Tensor<E>,
    /// What each branch gave before its gate.
    pub branches: Branches<Forward<E>>,
    /// What the rows of each key/value head selected, besides the blocks that all see.
    pub choices: BlockChoices,
}

impl NativeSparse {
    /// Branches of these sizes.
    ///
    /// # Errors
    /// [`Error::InvalidParameter`] for sizes of 0, a stride that does not divide l and l', and fewer than 3 blocks.
    pub fn new(sizes: NativeSizes) -> Result<NativeSparse> {
        let NativeSizes { length, stride, block, top, window } = sizes;
        let divides = |size: usize| stride > 0 && size > 0 && size.is_multiple_of(stride);
        let rules = [
            ("stride d of compressed tokens", stride, "at least 1", stride > 0),
            (
                "length l of compressed tokens",
                length,
                "a multiple of their stride",
                divides(length),
            ),
            ("tokens l' of a block", block, "a multiple of the stride d", divides(block)),
            (
                "blocks n that a row sees",
                top,
                "at least 3: the first, its own and the one before",
                top >= FORCED,
            ),
            ("window w", window, "at least 1", window > 0),
        ];
        for (what, got, expected, holds) in rules {
            if !holds {
                return Err(Error::InvalidParameter { what, expected, got: got.to_string() });
            }
        }
        Ok(NativeSparse { sizes, scale: Scale::default(), cpu: None })
    }

    /// What scores are multiplied by.
    pub fn scale(self, scale: Scale) -> NativeSparse {
        NativeSparse { scale, ..self }
    }

    /// Which instructions and threads to use, instead of [`Cpu::detect`].
    pub fn cpu(self, cpu: Cpu) -> NativeSparse {
        NativeSparse { cpu: Some(cpu), ..self }
    }

    /// Its sizes.
    pub fn sizes(&self) -> NativeSizes {
        self.sizes
    }

    /// How many compressed tokens so many tokens have.
    pub fn compressed_tokens(&self, tokens: usize) -> usize {
        let NativeSizes { length, stride, .. } = self.sizes;
        tokens.checked_sub(length).map_or(0, |rest| rest / stride + 1)
    }

    /// Compressed tokens that are means: of tokens `[B, S, KV, D]`, `[B, compressed, KV, D]`. Sums run in f64.
    /// Allocates the result.
    ///
    /// # Errors
    /// [`Error::ShapeOverflow`].
    pub fn pool<E: Element>(&self, x: TensorRef<'_, E>) -> Result<Tensor<E>> {
        let (NativeSizes { length, stride, .. }, shape) = (self.sizes, x.shape());
        let mut to = Tensor::zeros(Shape { seq: self.compressed_tokens(shape.seq), ..shape })?;
        each_row(to.view_mut(), self.runner(shape.dim)?.cpu.threads.count(), |[b, n, h], row| {
            let tokens = n * stride..n * stride + length;
            for (d, to) in row.iter_mut().enumerate() {
                let sum: f64 = tokens.clone().map(|t| f64::from(x.row(b, t, h)[d].to_f32())).sum();
                *to = E::from_f32((sum / length as f64) as f32);
            }
        });
        Ok(to)
    }

    /// The gradient of the `tokens` that [`NativeSparse::pool`] was given, from that of what it gave. Allocates it.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] for another number of compressed tokens, [`Error::ShapeOverflow`].
    pub fn pool_backward<E: Element>(
        &self,
        d: TensorRef<'_, E>,
        tokens: usize,
    ) -> Result<Tensor<E>> {
        let (NativeSizes { length, stride, .. }, shape) = (self.sizes, d.shape());
        let count = self.compressed_tokens(tokens);
        expect("gradient of compressed tokens", Shape { seq: count, ..shape }, shape)?;
        let mut to = Tensor::zeros(Shape { seq: tokens, ..shape })?;
        each_row(to.view_mut(), self.runner(shape.dim)?.cpu.threads.count(), |[b, t, h], row| {
            // Those that token t is part of.
            let first = (t + 1).saturating_sub(length).div_ceil(stride);
            let parts = first..(t / stride + 1).min(count);
            for (at, to) in row.iter_mut().enumerate() {
                let sum: f64 = parts.clone().map(|n| f64::from(d.row(b, n, h)[at].to_f32())).sum();
                *to = E::from_f32((sum / length as f64) as f32);
            }
        });
        Ok(to)
    }

    /// The tokens that selection or window let through among so many, as a mask, for looking at it. Through compressed
    /// tokens a row sees means of all that is at least a stride and a length behind it.
    pub fn mask(&self, choices: &BlockChoices, keys: usize) -> Mask {
        Mask::pattern(Chosen { sizes: self.sizes, choices: choices.clone(), keys })
    }

    /// Attention as the rows select: of queries `[B, T, H, Dk]` to keys `[B, S, KV, Dk]` and values `[B, S, KV, Dv]`
    /// of each branch, where S is [`NativeSparse::compressed_tokens`] for the first; query `i` is at position
    /// `i + S − T`. Gates `[B, T, H, 3]` are numbers as they are, in the order of [`Branches`]. Queries may differ from
    /// branch to branch, in their rotation for one. Allocates the result and what is gathered.
    ///
    /// # Errors
    /// Those of [`Attention::plan`]; [`Error::ShapeMismatch`] for branches or gates of other shapes.
    pub fn forward<E: Element>(
        &self,
        inputs: Branches<Inputs<'_, E, E>>,
        gates: TensorRef<'_, f32>,
    ) -> Result<NativeForward<E>> {
        let runner = self.prepare(&inputs, gates.shape())?;
        let Inputs { q, k, v } = inputs.compressed;
        let keys = inputs.selected.k.shape().seq;
        let compressed = self.compressed(&runner, [k.shape().seq, keys]).forward(q, k, v)?;
        let choices = self.choose(&runner, (q, k, compressed.lse.view()), keys)?;
        self.join(&runner, (inputs, gates), compressed, choices)
    }

    /// The same with given choices of the rows of each key/value head.
    ///
    /// # Errors
    /// Those of [`NativeSparse::forward`]; [`Error::ShapeMismatch`] for choices of other rows;
    /// [`Error::InvalidParameter`] for a block that is chosen twice, or is not between the first block and the one
    /// before the row's own.
    pub fn forward_with<E: Element>(
        &self,
        inputs: Branches<Inputs<'_, E, E>>,
        gates: TensorRef<'_, f32>,
        choices: BlockChoices,
    ) -> Result<NativeForward<E>> {
        let runner = self.prepare(&inputs, gates.shape())?;
        self.check(&inputs, &choices)?;
        let Inputs { q, k, v } = inputs.compressed;
        let lengths = [k.shape().seq, inputs.selected.k.shape().seq];
        let compressed = self.compressed(&runner, lengths).forward(q, k, v)?;
        self.join(&runner, (inputs, gates), compressed, choices)
    }

    /// Gradients of each branch and of the gates, from what [`NativeSparse::forward`] was given and gave, and the
    /// gradient of its output. What several branches read has the sum of their gradients. Allocates the results and
    /// what is gathered.
    ///
    /// # Errors
    /// Those of [`NativeSparse::forward_with`]; [`Error::ShapeMismatch`] for results of another shape.
    pub fn backward<E: Element>(
        &self,
        inputs: Branches<Inputs<'_, E, E>>,
        gates: TensorRef<'_, f32>,
        forward: &NativeForward<E>,
        d_out: TensorRef<'_, E>,
    ) -> Result<(Branches<Backward<E>>, Tensor<f32>)> {
        let runner = self.prepare(&inputs, gates.shape())?;
        self.check(&inputs, &forward.choices)?;
        let expected = Shape { dim: inputs.selected.v.shape().dim, ..inputs.selected.q.shape() };
        expect("gradient of the output", expected, d_out.shape())?;
        for branch in forward.branches.each() {
            expect("output of a branch", expected, branch.out.shape())?;
        }
        let threads = runner.cpu.threads.count();
        let gated = |n| gated(d_out, gates, n, threads);
        let attend = |attention: Attention<'_>, inputs, forward, n| {
            attention.backward(inputs, forward, gated(n)?.view())
        };
        let lengths = [inputs.compressed.k.shape().seq, inputs.selected.k.shape().seq];
        let compressed = self.compressed(&runner, lengths);
        let branches = &forward.branches;
        let d = Branches {
            compressed: attend(compressed, inputs.compressed, &branches.compressed, 0)?,
            selected: self.selected_backward(
                &runner,
                inputs.selected,
                forward,
                gated(1)?.view(),
            )?,
            window: attend(self.near(&runner), inputs.window, &branches.window, 2)?,
        };
        let d_gates = gate_gradients(branches, d_out, threads)?;
        Ok((d, d_gates))
    }

    pub(super) fn runner(&self, dim: usize) -> Result<Runner> {
        let cpu = self.cpu.map_or_else(Cpu::detect, Ok)?;
        Ok(Runner { scale: self.scale.resolve(dim)?, cpu })
    }

    fn prepare<E: Element>(
        &self,
        inputs: &Branches<Inputs<'_, E, E>>,
        gates: Shape,
    ) -> Result<Runner> {
        let Inputs { q, k, v } = inputs.selected;
        let [q, k, v] = [q.shape(), k.shape(), v.shape()];
        let runner = self.runner(q.dim)?;
        Attention::new().cpu(runner.cpu).plan(q, k, v)?;
        let seq = self.compressed_tokens(k.seq);
        expect("queries of compressed tokens", q, inputs.compressed.q.shape())?;
        expect("keys of compressed tokens", Shape { seq, ..k }, inputs.compressed.k.shape())?;
        expect("values of compressed tokens", Shape { seq, ..v }, inputs.compressed.v.shape())?;
        expect("queries of the window", q, inputs.window.q.shape())?;
        expect("keys of the window", k, inputs.window.k.shape())?;
        expect("values of the window", v, inputs.window.v.shape())?;
        expect("gates of three branches", Shape { dim: 3, ..q }, gates)?;
        Ok(runner)
    }

    fn check<E: Element>(
        &self,
        inputs: &Branches<Inputs<'_, E, E>>,
        choices: &BlockChoices,
    ) -> Result<()> {
        let (q, k) = (inputs.selected.q.shape(), inputs.selected.k.shape());
        let rule = "blocks between the first and the one before the row's own, each once";
        let allowed = |row: usize| self.candidates((row + k.seq).checked_sub(q.seq));
        choices.check([q.batch, k.heads, q.seq], rule, allowed)
    }

    /// The blocks that a row at a position may choose.
    fn candidates(&self, position: Option<usize>) -> Range<usize> {
        let own = position.map_or(0, |position| position / self.sizes.block);
        1..own.saturating_sub(1).max(1)
    }

    /// Attention to compressed tokens.
    pub(super) fn compressed(
        &self,
        runner: &Runner,
        [compressed, keys]: [usize; 2],
    ) -> Attention<'static> {
        let NativeSizes { length, stride, .. } = self.sizes;
        let origin = keys as isize - compressed as isize;
        runner.attention(Mask::pattern(Whole { length, stride, origin }))
    }

    /// Attention to the newest tokens.
    pub(super) fn near(&self, runner: &Runner) -> Attention<'static> {
        runner.attention(Mask::window(self.sizes.window))
    }

    /// What the rows of each key/value head select, from queries, compressed keys and their log-sum-exp.
    pub(super) fn choose<E: Element>(
        &self,
        runner: &Runner,
        (q, k, lse): (TensorRef<'_, E>, TensorRef<'_, E>, TensorRef<'_, f32>),
        keys: usize,
    ) -> Result<BlockChoices> {
        let (Shape { batch, seq, heads, .. }, compressed) = (q.shape(), k.shape());
        let last = self.candidates(keys.checked_sub(1));
        let most = (self.sizes.top - FORCED).min(last.len());
        let mut choices = BlockChoices::none([batch, compressed.heads, seq], most);
        if most == 0 {
            return Ok(choices);
        }
        let group = heads / compressed.heads;
        let step = (LOOKED / (group * compressed.seq.max(1))).clamp(64, 1024);
        let attention = self.compressed(runner, [compressed.seq, keys]);
        let (mut sums, mut scores) = (vec![0.0f32; compressed.seq], vec![]);
        let counts = self.counts();
        for (b, kv) in (0..batch).flat_map(|b| (0..compressed.heads).map(move |kv| (b, kv))) {
            let own = kv * group..(kv + 1) * group;
            let [q, k] = [q.part(b..b + 1, own.clone()), k.part(b..b + 1, kv..kv + 1)];
            let of = Forwarded::new(q, k, lse.part(b..b + 1, own));
            let plan = attention.plan(q.shape(), k.shape(), k.shape())?;
            for first in (0..seq).step_by(step) {
                let rows = first..(first + step).min(seq);
                let weights = plan.probabilities(of, rows.clone())?;
                for (n, row) in rows.enumerate() {
                    sums.fill(0.0);
                    for head in 0..group {
                        let own = weights.view().row(0, n, head);
                        sums.iter_mut().zip(own).for_each(|(sum, weight)| *sum += weight);
                    }
                    let blocks = self.candidates((row + keys).checked_sub(seq));
                    scores.clear();
                    scores.extend(blocks.clone().map(|block| self.score((&sums, &counts), block)));
                    best(&scores, blocks.start, choices.row_mut([b, kv, row]));
                }
            }
        }
        Ok(choices)
    }

    /// How often P of a block counts its compressed tokens, from the first that reaches into it on.
    fn counts(&self) -> Vec<f32> {
        let NativeSizes { length, stride, block, .. } = self.sizes;
        let (length, block) = (length / stride, block / stride);
        let mut counts = vec![0.0; length + block - 1];
        for (m, o) in (0..block).flat_map(|m| (0..length).map(move |o| (m, o))) {
            counts[m + length - 1 - o] += 1.0;
        }
        counts
    }

    /// P of a block from the weights of compressed tokens.
    fn score(&self, (weights, counts): (&[f32], &[f32]), block: usize) -> f32 {
        let NativeSizes { length, stride, block: size, .. } = self.sizes;
        // Before the first compressed token there is none.
        let (first, before) = (block * (size / stride), length / stride - 1);
        let skip = before.saturating_sub(first);
        let weights = weights.get(first + skip - before..).unwrap_or(&[]);
        weights.iter().zip(&counts[skip..]).map(|(weight, count)| weight * count).sum()
    }

    /// The branches besides the first, and their sum.
    fn join<E: Element>(
        &self,
        runner: &Runner,
        (inputs, gates): (Branches<Inputs<'_, E, E>>, TensorRef<'_, f32>),
        compressed: Forward<E>,
        choices: BlockChoices,
    ) -> Result<NativeForward<E>> {
        let selected = self.selected(runner, inputs.selected, &choices)?;
        let Inputs { q, k, v } = inputs.window;
        let window = self.near(runner).forward(q, k, v)?;
        let branches = Branches { compressed, selected, window };
        let out = gated_sum(&branches, gates, runner.cpu.threads.count())?;
        Ok(NativeForward { out, branches, choices })
    }

    /// The blocks that every row sees, and what it chose.
    pub(super) fn selected<E: Element>(
        &self,
        runner: &Runner,
        inputs: Inputs<'_, E, E>,
        choices: &BlockChoices,
    ) -> Result<Forward<E>> {
        let mut result = runner.forward(inputs, &[self.forced(&inputs)])?;
        if !result.out.as_slice().is_empty() {
            let mut memory = Memory::new(runner.cpu);
            let group = inputs.q.shape().heads / inputs.k.shape().heads;
            for heads in choices.parts(group, self.sizes.block) {
                runner.forward_in(&mut memory, inputs, &[heads], &mut result)?;
            }
        }
        Ok(result)
    }

    fn selected_backward<E: Element>(
        &self,
        runner: &Runner,
        inputs: Inputs<'_, E, E>,
        forward: &NativeForward<E>,
        d_out: TensorRef<'_, E>,
    ) -> Result<Backward<E>> {
        let NativeForward { branches: Branches { selected, .. }, choices, .. } = forward;
        let mut d = runner.backward(inputs, selected, d_out, &[self.forced(&inputs)])?;
        if !selected.out.as_slice().is_empty() {
            let mut memory = Memory::new(runner.cpu);
            let group = inputs.q.shape().heads / inputs.k.shape().heads;
            for heads in choices.parts(group, self.sizes.block) {
                runner.backward_in(&mut memory, (inputs, selected, d_out), &[heads], &mut d)?;
            }
        }
        Ok(d)
    }

    /// The blocks that every row sees.
    fn forced<E: Element>(&self, inputs: &Inputs<'_, E, E>) -> Heads {
        let (q, keys) = (inputs.q.shape(), inputs.k.shape().seq);
        let mask = Mask::pattern(Forced { block: self.sizes.block });
        let part = Part { queries: Tokens::Span(0..q.seq), keys: Tokens::Span(0..keys), mask };
        Heads { sequences: 0..q.batch, heads: 0..q.heads, parts: vec![part] }
    }
}

/// Σ gate · output of the branches.
pub(super) fn gated_sum<E: Element>(
    branches: &Branches<Forward<E>>,
    gates: TensorRef<'_, f32>,
    threads: usize,
) -> Result<Tensor<E>> {
    let mut out = Tensor::zeros(branches.window.out.shape())?;
    each_row(out.view_mut(), threads, |[b, t, h], row| {
        let parts = branches.each().map(|branch| branch.out.view().row(b, t, h));
        let gates = gates.row(b, t, h);
        for (n, to) in row.iter_mut().enumerate() {
            let terms = gates.iter().zip(parts).map(|(gate, part)| gate * part[n].to_f32());
            *to = E::from_f32(terms.sum());
        }
    });
    Ok(out)
}

/// The gradient of a branch's output.
fn gated<E: Element>(
    d_out: TensorRef<'_, E>,
    gates: TensorRef<'_, f32>,
    n: usize,
    threads: usize,
) -> Result<Tensor<E>> {
    let mut d = Tensor::zeros(d_out.shape())?;
    each_row(d.view_mut(), threads, |[b, t, h], row| {
        let gate = gates.row(b, t, h)[n];
        for (to, d) in row.iter_mut().zip(d_out.row(b, t, h)) {
            *to = E::from_f32(gate * d.to_f32());
        }
    });
    Ok(d)
}

/// dO · O of each branch.
fn gate_gradients<E: Element>(
    branches: &Branches<Forward<E>>,
    d_out: TensorRef<'_, E>,
    threads: usize,
) -> Result<Tensor<f32>> {
    let mut d = Tensor::zeros(Shape { dim: 3, ..d_out.shape() })?;
    each_row(d.view_mut(), threads, |[b, t, h], row| {
        for (to, branch) in row.iter_mut().zip(branches.each()) {
            let pairs = d_out.row(b, t, h).iter().zip(branch.out.view().row(b, t, h));
            *to = pairs.map(|(d, out)| d.to_f32() * out.to_f32()).sum();
        }
    });
    Ok(d)
}
