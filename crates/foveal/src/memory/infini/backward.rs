//! Gradients through all segments, from the last to the first.
//!
//! ```text
//! dA_dot = (1 − g) dA                      backward of exact attention within the segment
//! read    u = dA / den     h = −(σ(q) · M u) / den
//!         dσ(q) = g (M u + h z)            dM += g σ(q) uᵀ     dz += g h σ(q)
//! write   v′ = v − r (delta: r = Mᵀ σ(k) / den)
//!         dv = dMᵀ σ(k)                    dσ(k) = dM v′ + dz
//!         delta: a read by k of M_{s−1} with −dv from above
//! gate    dβ += g (1 − g) Σ dA ∘ (A_mem − A_dot)        Σ dA ∘ A_mem = −Σ h den
//! ```
//!
//! with M = M_{s−1}, and dM that of M_s for what is written. Munkhdalai et al. 2024, §2.1: trained by back-propagation through
//! time. Nothing of forward is kept but its inputs: the memories are made again first, one for each segment, and attention
//! within a segment once more when its turn comes. Memory: the memories of all segments, and one segment's output and
//! gradient of it.

use super::super::Gate;
use super::gradient::{Back, Patches, Scratch};
use super::head::{Head, holds_nothing};
use super::{Empty, Infini, Sizes, Tokens};
use crate::cpu::Cpu;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::linear::{State, scratches};
use crate::parallel::for_each_item;
use crate::plan::{self, Inputs, Saved, TermGradients, expect};
use crate::tensor::{Spans, Tensor, TensorMut, TensorRef};
use crate::workspace::Workspace;

/// What forward was given and what comes from above.
#[derive(Debug, Clone, Copy)]
pub struct Upstream<'a, E> {
    /// The gradient of the outputs, `[B, T, H, Dv]`.
    pub d_out: TensorRef<'a, E>,
    /// The memory with which forward began.
    pub initial: &'a State,
}

/// Where gradients are written. What was there is overwritten.
#[derive(Debug)]
pub struct Gradients<'a, E> {
    /// Of the queries, `[B, T, H, Dk]`.
    pub d_q: TensorMut<'a, E>,
    /// Of the keys, `[B, T, KV, Dk]`: the sum over the query heads that read them.
    pub d_k: TensorMut<'a, E>,
    /// Of the values, `[B, T, KV, Dv]`, likewise.
    pub d_v: TensorMut<'a, E>,
    /// Of the gates β, one for each query head.
    pub d_gate: &'a mut [f32],
    /// Of the rotated queries and keys, where tokens have some. Those of the others come from the memory alone then; rotated
    /// back and added, these make them whole.
    pub d_rotated: Option<(TensorMut<'a, E>, TensorMut<'a, E>)>,
}

/// The gradients that [`Infini::backward`] allocates.
#[derive(Debug, Clone, PartialEq)]
pub struct InfiniBackward<E> {
    /// Of the queries.
    pub d_q: Tensor<E>,
    /// Of the keys.
    pub d_k: Tensor<E>,
    /// Of the values.
    pub d_v: Tensor<E>,
    /// Of the gates.
    pub d_gate: Vec<f32>,
    /// Of the rotated queries and keys, if tokens have some.
    pub d_rotated: Option<(Tensor<E>, Tensor<E>)>,
}

impl Infini {
    /// The gradients of a loss. `d_memory` comes in as the gradient of the final memory and goes out as that of the initial
    /// one. Allocates the gradients and what [`Infini::backward_into`] allocates.
    ///
    /// # Errors
    /// Those of [`Infini::backward_into`].
    pub fn backward<E: Element>(
        &self,
        tokens: &Tokens<'_, E>,
        upstream: Upstream<'_, E>,
        d_memory: &mut State,
    ) -> Result<InfiniBackward<E>> {
        let zeros = |x: TensorRef<'_, E>| Tensor::zeros(x.shape());
        let mut d = InfiniBackward {
            d_q: zeros(tokens.q)?,
            d_k: zeros(tokens.k)?,
            d_v: zeros(tokens.v)?,
            d_gate: vec![0.0; tokens.gate.len()],
            d_rotated: match tokens.rotated {
                Some((q, k)) => Some((zeros(q)?, zeros(k)?)),
                None => None,
            },
        };
        let gradients = Gradients {
            d_q: d.d_q.view_mut(),
            d_k: d.d_k.view_mut(),
            d_v: d.d_v.view_mut(),
            d_gate: &mut d.d_gate,
            d_rotated: d.d_rotated.as_mut().map(|(q, k)| (q.view_mut(), k.view_mut())),
        };
        self.backward_into(tokens, upstream, gradients, d_memory, &mut Workspace::new())?;
        Ok(d)
    }

    /// The same with gradients in place. Gradients of 16 bits are rounded twice: those of attention within the segment, and
    /// the sum. Allocates the memories of all segments, and one segment's output and its gradient.
    ///
    /// # Errors
    /// Those of [`Infini::forward_into`], for every tensor here; [`Error::InvalidParameter`] for rotated gradients without
    /// rotated tokens, or the other way round. Nothing is written then.
    pub fn backward_into<E: Element>(
        &self,
        tokens: &Tokens<'_, E>,
        upstream: Upstream<'_, E>,
        mut gradients: Gradients<'_, E>,
        d_memory: &mut State,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let sizes = self.check(tokens)?;
        check_gradients(tokens, &gradients)?;
        expect("gradient of the outputs", sizes.out(), upstream.d_out.shape())?;
        upstream.initial.check(sizes.memory(), 1)?;
        d_memory.check(sizes.memory(), 1)?;
        gradients.d_gate.fill(0.0);
        if sizes.is_empty() {
            return Ok(());
        }
        let memories = self.memories(tokens, sizes, upstream.initial, workspace)?;
        let mut call = Call {
            infini: self,
            sizes,
            cpu: self.machine()?,
            memories: &memories,
            gates: tokens.gate.iter().map(|&beta| Gate::new(beta)).collect(),
            d_gate: vec![0.0; sizes.batch * sizes.heads],
        };
        for segment in (0..call.segments()).rev() {
            call.segment(segment, (tokens, upstream.d_out), &mut gradients, (d_memory, workspace))?;
        }
        for (h, d_gate) in gradients.d_gate.iter_mut().enumerate() {
            let sum: f64 = call.d_gate.iter().skip(h).step_by(sizes.heads).sum();
            *d_gate = (call.gates[h].slope() * sum) as f32;
        }
        Ok(())
    }

    /// What each segment reads, for each sequence and key/value head: `[unit][segment]`, matrix and sums.
    fn memories<E: Element>(
        &self,
        tokens: &Tokens<'_, E>,
        sizes: Sizes,
        initial: &State,
        workspace: &mut Workspace,
    ) -> Result<Vec<f32>> {
        let (dims, segments) = (sizes.dims, sizes.seq.div_ceil(self.segment));
        let overflow =
            Error::ShapeOverflow { what: "memories of all segments", shape: sizes.out() };
        let each = dims.floats().checked_mul(segments).ok_or(overflow.clone())?;
        let count = each.checked_mul(sizes.units()).filter(|&n| n <= isize::MAX as usize / 4);
        let mut memories = vec![0.0f32; count.ok_or(overflow)?];
        let cpu = self.machine()?;
        let scratches = scratches(workspace, cpu, sizes.units(), Head::floats(dims))?;
        let items = memories.chunks_exact_mut(each).zip(initial.units(1)).enumerate();
        for_each_item(items, scratches, |(index, (memories, initial)), floats| {
            let (batch, kv_head) = (index / sizes.kv_heads, index % sizes.kv_heads);
            let mut head = Head::load(floats, dims, cpu.level, initial);
            for (n, memory) in memories.chunks_exact_mut(dims.floats()).enumerate() {
                head.store(memory.split_at_mut(dims.key * dims.value));
                if n + 1 < segments {
                    let own = n * self.segment..(n + 1) * self.segment;
                    let [k, v] = [tokens.k, tokens.v].map(|x| x.head(batch, kv_head));
                    head.write(k.slice(own.clone()), v.slice(own), self.update);
                }
            }
        });
        Ok(memories)
    }
}

fn check_gradients<E: Element>(tokens: &Tokens<'_, E>, gradients: &Gradients<'_, E>) -> Result<()> {
    let Gradients { d_q, d_k, d_v, d_gate, d_rotated } = gradients;
    expect("gradient of the queries", tokens.q.shape(), d_q.shape())?;
    expect("gradient of the keys", tokens.k.shape(), d_k.shape())?;
    expect("gradient of the values", tokens.v.shape(), d_v.shape())?;
    if d_gate.len() != tokens.gate.len() {
        let (what, expected) = ("gradients of gates", tokens.gate.len());
        return Err(Error::LengthMismatch { what, expected, got: d_gate.len() });
    }
    match (tokens.rotated, d_rotated) {
        (Some(_), Some((d_q, d_k))) => {
            expect("gradient of the rotated queries", tokens.q.shape(), d_q.shape())?;
            expect("gradient of the rotated keys", tokens.k.shape(), d_k.shape())
        }
        (None, None) => Ok(()),
        (rotated, _) => {
            let name = |some: bool| if some { "tokens that are" } else { "tokens that are not" };
            let (what, expected) =
                ("gradients of rotated tokens", "one exactly if tokens are rotated");
            let got = name(rotated.is_some()).to_string();
            Err(Error::InvalidParameter { what, expected, got })
        }
    }
}

/// A checked call.
struct Call<'a> {
    infini: &'a Infini,
    sizes: Sizes,
    cpu: Cpu,
    memories: &'a [f32],
    gates: Vec<Gate>,
    /// Σ dA ∘ (A_mem − A_dot) for each sequence and query head.
    d_gate: Vec<f64>,
}

impl Call<'_> {
    fn segments(&self) -> usize {
        self.sizes.seq.div_ceil(self.infini.segment)
    }

    /// What a segment reads of a unit's memory.
    fn memory(&self, unit: usize, segment: usize) -> (&[f32], &[f32]) {
        let dims = self.sizes.dims;
        let at = (unit * self.segments() + segment) * dims.floats();
        self.memories[at..at + dims.floats()].split_at(dims.key * dims.value)
    }

    /// The gates of a query head at a segment; `None` if the gate waits.
    fn gate(&self, batch: usize, head: usize, segment: usize) -> Option<Gate> {
        let unit = batch * self.sizes.kv_heads + head / self.sizes.group();
        let nothing = holds_nothing(self.memory(unit, segment).1);
        let waits = nothing && self.infini.empty == Empty::Bypassed;
        (!waits).then(|| self.gates[head])
    }

    fn segment<E: Element>(
        &mut self,
        segment: usize,
        (tokens, d_out): (&Tokens<'_, E>, TensorRef<'_, E>),
        gradients: &mut Gradients<'_, E>,
        (d_memory, workspace): (&mut State, &mut Workspace),
    ) -> Result<()> {
        let start = segment * self.infini.segment;
        let span = start..self.sizes.seq.min(start.saturating_add(self.infini.segment));
        let (tokens, d_out) = (tokens.span(span.clone()), d_out.span(span.clone()));
        let mut of = Gradients {
            d_q: gradients.d_q.reborrow().into_span(span.clone()),
            d_k: gradients.d_k.reborrow().into_span(span.clone()),
            d_v: gradients.d_v.reborrow().into_span(span.clone()),
            d_gate: &mut [],
            d_rotated: gradients.d_rotated.as_mut().map(|(q, k)| {
                (q.reborrow().into_span(span.clone()), k.reborrow().into_span(span.clone()))
            }),
        };
        let local = self.local(segment, (&tokens, d_out), &mut of, workspace)?;
        let Sizes { dims, kv_heads, .. } = self.sizes;
        let group = self.sizes.group();
        let mut sums = std::mem::take(&mut self.d_gate);
        let scratches = scratches(workspace, self.cpu, self.sizes.units(), Scratch::floats(dims))?;
        let spans = Spans::new(self.sizes.batch, span.len(), None)?;
        let d_kv = of.d_k.into_patches(spans, 1).zip(of.d_v.into_patches(spans, 1));
        let patches = of.d_q.into_patches(spans, group).zip(d_kv);
        let items = patches.zip(d_memory.units_mut(1).zip(sums.chunks_exact_mut(group)));
        let local = local.view();
        for_each_item(
            items.enumerate(),
            scratches,
            |(unit, (patches, (after, d_gate))), floats| {
                let (batch, kv_head) = (unit / kv_heads, unit % kv_heads);
                let (d_q, (d_k, d_v)) = patches;
                let mut back = Back {
                    level: self.cpu.level,
                    dims,
                    scratch: Scratch::take(floats, dims),
                    d: Patches { q: d_q, k: d_k, v: d_v, whole: tokens.rotated.is_some() },
                };
                back.load(self.memory(unit, segment), (after.0, after.1));
                if span.len() == self.infini.segment {
                    let [k, v] = [tokens.k, tokens.v].map(|x| x.head(batch, kv_head));
                    back.writes((k, v), self.infini.update);
                } else {
                    back.no_writes(span.len());
                }
                for (own, d_gate) in d_gate.iter_mut().enumerate() {
                    let h = kv_head * group + own;
                    let rows = [tokens.q, d_out, local].map(|x| x.head(batch, h));
                    *d_gate += back.reads(rows, own, self.gate(batch, h, segment));
                }
                back.store((after.0, after.1));
            },
        );
        self.d_gate = sums;
        Ok(())
    }

    /// Attention within a segment, again, and its gradients. Returns its output.
    fn local<E: Element>(
        &self,
        segment: usize,
        (tokens, d_out): (&Tokens<'_, E>, TensorRef<'_, E>),
        gradients: &mut Gradients<'_, E>,
        workspace: &mut Workspace,
    ) -> Result<Tensor<E>> {
        let shape = d_out.shape();
        let mut out = Tensor::zeros(shape)?;
        let mut lse = Tensor::zeros(shape.per_row())?;
        let inputs = tokens.local();
        self.infini.attend(inputs, out.view_mut(), Some(lse.view_mut()), workspace)?;
        let d_local = self.weighed(segment, d_out)?;
        let attention = self.infini.attention()?;
        let Inputs { q, k, v } = inputs;
        let plan = attention.plan(q.shape(), k.shape(), v.shape())?;
        workspace.reserve(plan.backward_workspace_bytes::<E>());
        let (d_q, d_k) = match &mut gradients.d_rotated {
            Some((d_q, d_k)) => (d_q.reborrow(), d_k.reborrow()),
            None => (gradients.d_q.reborrow(), gradients.d_k.reborrow()),
        };
        let to = plan::Gradients {
            d_q,
            d_k,
            d_v: gradients.d_v.reborrow(),
            terms: TermGradients::default(),
        };
        let saved = Saved { out: out.view(), lse: lse.view() };
        let upstream = plan::Upstream { d_out: d_local.view(), d_lse: None };
        plan.backward(inputs, saved, upstream, to, workspace)?;
        Ok(out)
    }

    /// (1 − g) dA of a segment.
    fn weighed<E: Element>(&self, segment: usize, d_out: TensorRef<'_, E>) -> Result<Tensor<E>> {
        let mut weighed = Tensor::zeros(d_out.shape())?;
        let spans = Spans::new(self.sizes.batch, d_out.shape().seq, None)?;
        let patches = weighed.view_mut().into_patches(spans, 1).enumerate();
        let threads = std::iter::repeat_n((), self.cpu.threads.count());
        for_each_item(patches, threads, |(n, mut patch), ()| {
            let (batch, head) = (n / self.sizes.heads, n % self.sizes.heads);
            let keep = self.gate(batch, head, segment).map_or(1.0, |gate| gate.local);
            for t in 0..d_out.shape().seq {
                let from = d_out.row(batch, t, head);
                for (to, from) in patch.row(t, 0).iter_mut().zip(from) {
                    *to = E::from_f32(keep * from.to_f32());
                }
            }
        });
        Ok(weighed)
    }
}
