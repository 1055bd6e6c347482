//! Infini-attention: exact attention within a segment, and a matrix of constant size for all segments before it.
//!
//! ```text
//! A_dot = softmax(scale · Q Kᵀ, causal within the segment) V            Q, K rotated, if positions are
//! A_mem = σ(Q) M_{s−1} / (σ(Q) z_{s−1})                                 Q, K as they are; σ(x) = elu(x) + 1
//! out   = g · A_mem + (1 − g) · A_dot                                   g = sigmoid(β), one β for each query head
//!
//! M_s = M_{s−1} + σ(K)ᵀ V                                               [`Update::Linear`]
//! M_s = M_{s−1} + σ(K)ᵀ (V − σ(K) M_{s−1} / (σ(K) z_{s−1}))             [`Update::Delta`], the whole segment at once
//! z_s = z_{s−1} + Σ_t σ(K_t)
//! ```
//!
//! Munkhdalai, Faruqui and Gopal 2024, "Leave No Context Behind", arXiv:2404.07143v2, §2.1. A segment reads before it writes.
//! Only whole segments are written: a shorter last one reads alone. A memory that holds nothing (z = 0) reads as 0, and the
//! delta rule then subtracts nothing; whether the gate acts meanwhile is [`Empty`]'s matter. Query heads of a group read the
//! memory of their key/value head.
//!
//! Cost a token and query head: 2·N·D operations for attention within a segment of N, 2·Dk·Dv for the read, and for each
//! key/value head 2·Dk·Dv (delta: 4·Dk·Dv) for the write. The memory is Dk·(Dv + 1) numbers for each key/value head.

mod backward;
mod gradient;
mod head;
mod state;

pub use backward::{Gradients, InfiniBackward, Upstream};
pub use state::InfiniState;

use super::Gate;
use crate::cpu::Cpu;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::linear::{State, StateShape, scratches};
use crate::mask::Mask;
use crate::parallel::for_each_item;
use crate::plan::{Inputs, expect};
use crate::problem::{Attention, Scale};
use crate::tensor::{Shape, Spans, Tensor, TensorMut, TensorRef};
use crate::workspace::Workspace;
use head::{Dims, Head};

/// What a segment adds to the memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Update {
    /// Its values.
    #[default]
    Linear,
    /// Its values less what its keys already read.
    Delta,
}

/// What the gate does while a memory holds nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Empty {
    /// It acts on a read of zeros: out = (1 − g) · A_dot.
    #[default]
    Gated,
    /// It waits: out = A_dot.
    Bypassed,
}

/// Infini-attention: segment, update rule and scale.
///
/// ```
/// use foveal::memory::infini::{Infini, Tokens};
/// use foveal::{Shape, Tensor};
///
/// # fn main() -> foveal::Result<()> {
/// let q = Tensor::<f32>::zeros(Shape { batch: 1, seq: 1000, heads: 4, dim: 64 })?;
/// let kv = Tensor::<f32>::zeros(Shape { batch: 1, seq: 1000, heads: 2, dim: 64 })?;
/// let gate = [0.0; 4];
/// let tokens = Tokens::new(q.view(), kv.view(), kv.view(), &gate);
/// let infini = Infini::new(256)?;
/// let mut memory = infini.memory(&tokens)?;
/// let out = infini.forward(&tokens, &mut memory)?;
/// assert_eq!(out.shape(), q.shape());
/// // Three of the segments were whole, and are in the memory now.
/// assert!(memory.key_sums().iter().all(|&z| z == 3.0 * 256.0));
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Infini {
    segment: usize,
    update: Update,
    empty: Empty,
    scale: Scale,
    cpu: Option<Cpu>,
}

/// The tokens of a call, which begin with a segment.
#[derive(Debug, Clone, Copy)]
pub struct Tokens<'a, E> {
    /// Queries without positions, `[B, T, H, Dk]`.
    pub q: TensorRef<'a, E>,
    /// Keys without positions, `[B, T, KV, Dk]`.
    pub k: TensorRef<'a, E>,
    /// Values, `[B, T, KV, Dv]`.
    pub v: TensorRef<'a, E>,
    /// β, one for each query head: sigmoid(β) is the share of the memory.
    pub gate: &'a [f32],
    /// See [`Tokens::rotated`].
    pub rotated: Option<(TensorRef<'a, E>, TensorRef<'a, E>)>,
}

impl<'a, E: Element> Tokens<'a, E> {
    /// Tokens whose queries and keys have no positions.
    pub fn new(
        q: TensorRef<'a, E>,
        k: TensorRef<'a, E>,
        v: TensorRef<'a, E>,
        gate: &'a [f32],
    ) -> Tokens<'a, E> {
        Tokens { q, k, v, gate, rotated: None }
    }

    /// The same queries and keys with positions, for attention within a segment. The memory takes those without: what it
    /// adds up of many segments has no place (§2.1 of the paper, "position embeddings").
    pub fn rotated(self, q: TensorRef<'a, E>, k: TensorRef<'a, E>) -> Tokens<'a, E> {
        Tokens { rotated: Some((q, k)), ..self }
    }

    /// What local attention reads.
    fn local(&self) -> Inputs<'a, E, E> {
        let (q, k) = self.rotated.unwrap_or((self.q, self.k));
        Inputs { q, k, v: self.v }
    }

    /// Some tokens of all sequences.
    fn span(&self, tokens: std::ops::Range<usize>) -> Tokens<'a, E> {
        let of = |x: TensorRef<'a, E>| x.span(tokens.clone());
        let rotated = self.rotated.map(|(q, k)| (of(q), of(k)));
        Tokens { q: of(self.q), k: of(self.k), v: of(self.v), rotated, ..*self }
    }
}

/// The sizes of a checked call.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    batch: usize,
    seq: usize,
    heads: usize,
    kv_heads: usize,
    dims: Dims,
}

impl Sizes {
    /// Query heads that share a memory.
    fn group(&self) -> usize {
        self.heads / self.kv_heads.max(1)
    }

    /// Memories.
    fn units(&self) -> usize {
        self.batch * self.kv_heads
    }

    fn out(&self) -> Shape {
        Shape { batch: self.batch, seq: self.seq, heads: self.heads, dim: self.dims.value }
    }

    fn memory(&self) -> StateShape {
        StateShape {
            sequences: self.batch,
            heads: self.kv_heads,
            key_dim: self.dims.key,
            value_dim: self.dims.value,
        }
    }

    fn is_empty(&self) -> bool {
        self.out().checked_len() == Some(0)
    }
}

impl Infini {
    /// Segments of so many tokens, the linear update, scores scaled by 1/√Dk. (The paper prints √d_model, and means this.)
    ///
    /// # Errors
    /// [`Error::InvalidParameter`] for segments of no tokens.
    pub fn new(segment: usize) -> Result<Infini> {
        if segment == 0 {
            let (what, expected) = ("tokens of a segment", "at least 1");
            return Err(Error::InvalidParameter { what, expected, got: segment.to_string() });
        }
        let (update, empty) = (Update::default(), Empty::default());
        Ok(Infini { segment, update, empty, scale: Scale::default(), cpu: None })
    }

    /// What a segment adds to the memory.
    pub fn update(self, update: Update) -> Infini {
        Infini { update, ..self }
    }

    /// What the gate does while a memory holds nothing.
    pub fn empty(self, empty: Empty) -> Infini {
        Infini { empty, ..self }
    }

    /// What scores within a segment are multiplied by.
    pub fn scale(self, scale: Scale) -> Infini {
        Infini { scale, ..self }
    }

    /// Which instructions and threads to use, instead of [`Cpu::detect`].
    pub fn cpu(self, cpu: Cpu) -> Infini {
        Infini { cpu: Some(cpu), ..self }
    }

    /// Tokens of a segment.
    pub fn segment(&self) -> usize {
        self.segment
    }

    /// A memory that holds nothing, for these tokens' sequences: the matrices M and the sums of keys z. Allocates it.
    ///
    /// # Errors
    /// If the tokens do not fit together.
    pub fn memory<E: Element>(&self, tokens: &Tokens<'_, E>) -> Result<State> {
        State::zeros(self.check(tokens)?.memory(), 1)
    }

    /// The outputs `[B, T, H, Dv]` of tokens that begin with a segment. `memory` comes in as what earlier segments left, and
    /// goes out with the whole segments of this call. Allocates the outputs and a workspace.
    ///
    /// # Errors
    /// Those of [`Infini::forward_into`].
    pub fn forward<E: Element>(
        &self,
        tokens: &Tokens<'_, E>,
        memory: &mut State,
    ) -> Result<Tensor<E>> {
        let mut out = Tensor::zeros(self.check(tokens)?.out())?;
        self.forward_into(tokens, out.view_mut(), memory, &mut Workspace::new())?;
        Ok(out)
    }

    /// The same without allocating, but for a workspace that has to grow. Outputs of 16 bits are rounded twice: attention
    /// within the segment, and the mixture.
    ///
    /// # Errors
    /// Those of [`Attention::plan`]; [`Error::LengthMismatch`] for other gates than query heads;
    /// [`Error::StateShape`] for another memory. Nothing is written then.
    pub fn forward_into<E: Element>(
        &self,
        tokens: &Tokens<'_, E>,
        mut out: TensorMut<'_, E>,
        memory: &mut State,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let sizes = self.check(tokens)?;
        expect("outputs", sizes.out(), out.shape())?;
        memory.check(sizes.memory(), 1)?;
        if sizes.is_empty() {
            return Ok(());
        }
        self.attend_to_segments(tokens.local(), out.reborrow(), workspace)?;
        let cpu = self.machine()?;
        let scratches = scratches(workspace, cpu, sizes.units(), Head::floats(sizes.dims))?;
        let spans = Spans::new(sizes.batch, sizes.seq, None)?;
        let items = out.into_patches(spans, sizes.group()).zip(memory.units_mut(1)).enumerate();
        for_each_item(items, scratches, |(index, (mut out, memory)), floats| {
            let (batch, kv_head) = (index / sizes.kv_heads, index % sizes.kv_heads);
            let mut head = Head::load(floats, sizes.dims, cpu.level, (memory.0, memory.1));
            for start in (0..sizes.seq).step_by(self.segment) {
                let end = start.saturating_add(self.segment).min(sizes.seq);
                for own in 0..sizes.group() {
                    let h = kv_head * sizes.group() + own;
                    let q = tokens.q.head(batch, h).slice(start..end);
                    let gate = (Gate::new(tokens.gate[h]), self.empty);
                    head.read(q, (&mut out, start, own), gate);
                }
                if end - start == self.segment {
                    let [k, v] = [tokens.k, tokens.v].map(|x| x.head(batch, kv_head));
                    head.write(k.slice(start..end), v.slice(start..end), self.update);
                }
            }
            head.store((memory.0, memory.1));
        });
        Ok(())
    }

    /// Causal attention within the segments of tokens that begin with one: segments of a sequence as a batch, where they lie.
    fn attend_to_segments<E: Element>(
        &self,
        inputs: Inputs<'_, E, E>,
        mut out: TensorMut<'_, E>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let Inputs { q, k, v } = inputs;
        let Shape { batch, seq, .. } = q.shape();
        let mut whole = seq / self.segment;
        // One call for each sequence, or for each segment, whichever are fewer.
        let sequences = if batch <= whole { batch } else { 0 };
        if sequences == 0 {
            whole = 0;
        }
        for sequence in 0..sequences {
            let [q, k, v] = [q, k, v].map(|x| x.stretches(sequence, self.segment));
            let own = Inputs { q, k, v };
            let out = out.reborrow().into_stretches(sequence, self.segment);
            self.attend(own, out, None, workspace)?;
        }
        for start in (whole * self.segment..seq).step_by(self.segment) {
            let span = start..start.saturating_add(self.segment).min(seq);
            let [q, k, v] = [q, k, v].map(|x| x.span(span.clone()));
            let own = Inputs { q, k, v };
            self.attend(own, out.reborrow().into_span(span), None, workspace)?;
        }
        Ok(())
    }

    fn attend<E: Element>(
        &self,
        inputs: Inputs<'_, E, E>,
        out: TensorMut<'_, E>,
        lse: Option<TensorMut<'_, f32>>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let attention = self.attention()?;
        let Inputs { q, k, v } = inputs;
        let plan = attention.plan(q.shape(), k.shape(), v.shape())?;
        workspace.reserve(plan.workspace_bytes());
        plan.forward(inputs, out, lse, workspace)
    }

    fn attention(&self) -> Result<Attention<'static>> {
        Ok(Attention::new().mask(Mask::causal()).scale(self.scale).cpu(self.machine()?))
    }

    fn machine(&self) -> Result<Cpu> {
        self.cpu.map_or_else(Cpu::detect, Ok)
    }

    fn check<E: Element>(&self, tokens: &Tokens<'_, E>) -> Result<Sizes> {
        let [q, k, v] = [tokens.q.shape(), tokens.k.shape(), tokens.v.shape()];
        expect("keys, one for each query", Shape { seq: q.seq, ..k }, k)?;
        self.attention()?.plan(q, k, v)?;
        if let Some((rotated_q, rotated_k)) = tokens.rotated {
            expect("rotated queries", q, rotated_q.shape())?;
            expect("rotated keys", k, rotated_k.shape())?;
        }
        if tokens.gate.len() != q.heads {
            let (what, expected) = ("gates, one for each query head", q.heads);
            return Err(Error::LengthMismatch { what, expected, got: tokens.gate.len() });
        }
        let dims = Dims { key: q.dim, value: v.dim };
        Ok(Sizes { batch: q.batch, seq: q.seq, heads: q.heads, kv_heads: k.heads, dims })
    }
}
