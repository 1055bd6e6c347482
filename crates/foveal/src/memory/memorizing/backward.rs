//! Gradients of queries, of keys and values of the own segment, of gates, scales and the bias.
//!
//! ```text
//! dA_near = (1 − g) dA      dA_mem = g dA      dβ = g (1 − g) Σ dA ∘ (A_mem − A_near)
//! dq′ = those of both softmaxes with respect to |s| q̂       d|s| = Σ q̂ · dq′ + Σ bias · d(|s| bias)
//! dq = |s| r (dq′ − q̂ (q̂ · dq′))                           r = 1/√(Σ q² + ε); keys likewise, without |s|
//! ```
//!
//! Entries of the memory and the segment before are constants, and so is which entries are retrieved. The segments of a call
//! are gone through again in order, on a copy of the state with which forward began, so that each finds the memory that it read.

use super::super::{Gate, MemoryStore};
use super::search::NONE;
use super::{MemorizingForward, MemorizingState, Normal, Tokens, inverse_norm};
use crate::cpu::Cpu;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::plan::{Gradients, Inputs, Saved, TermGradients, Upstream, expect};
use crate::simd::row::{dot, widen};
use crate::tensor::{Shape, Tensor, TensorRef};
use std::ops::Range;

/// The gradients of a call, all `f32`.
#[derive(Debug, Clone, PartialEq)]
pub struct MemorizingBackward {
    /// Of the queries, `[1, T, H, Dk]`.
    pub d_q: Tensor<f32>,
    /// Of the keys, `[1, T, KV, Dk]`, as keys of their own segment.
    pub d_k: Tensor<f32>,
    /// Of the values, `[1, T, KV, Dv]`, likewise.
    pub d_v: Tensor<f32>,
    /// Of the gates β.
    pub d_gate: Vec<f32>,
    /// Of the scales s; 0 for a scale of 0.
    pub d_scale: Vec<f32>,
    /// Of the bias, in its shape, if tokens have one.
    pub d_bias: Option<Tensor<f32>>,
}

/// Sums over segments.
struct Sums {
    gate: Vec<f64>,
    scale: Vec<f64>,
    bias: Vec<f64>,
}

impl<M: MemoryStore + Clone> MemorizingState<M> {
    /// The gradients of a loss. `self` is the state with which `forward` began, which was at the beginning of a segment: a copy
    /// of it from before the call, or a new one. Allocates the gradients, a copy of the state, and a few times a segment.
    ///
    /// # Errors
    /// Those of [`MemorizingState::forward`] for every tensor here; [`Error::InvalidParameter`] within a segment, or for a
    /// forward that retrieved what this state does not hold.
    pub fn backward<E: Element>(
        &self,
        tokens: &Tokens<'_, E>,
        forward: &MemorizingForward<E>,
        d_out: TensorRef<'_, E>,
    ) -> Result<MemorizingBackward> {
        self.check_backward(tokens, forward, d_out)?;
        let heads = self.shape.heads;
        let mut d = MemorizingBackward {
            d_q: Tensor::zeros(tokens.q.shape())?,
            d_k: Tensor::zeros(tokens.k.shape())?,
            d_v: Tensor::zeros(tokens.v.shape())?,
            d_gate: vec![],
            d_scale: vec![],
            d_bias: None,
        };
        let numbers = tokens.bias.and_then(|bias| bias.shape().checked_len()).unwrap_or(0);
        let (gate, scale) = (vec![0.0; heads], vec![0.0; heads]);
        let mut sums = Sums { gate, scale, bias: vec![0.0; numbers] };
        let (mut state, seq) = (self.clone(), tokens.q.shape().seq);
        let segment = self.memorizing.segment;
        for start in (0..seq).step_by(segment) {
            let own = start..seq.min(start + segment);
            state.segment((tokens, forward, d_out), own, &mut d, &mut sums)?;
            state.close()?;
        }
        let slopes = tokens.gate.iter().map(|&beta| Gate::new(beta).slope());
        d.d_gate = slopes.zip(&sums.gate).map(|(slope, sum)| (slope * sum) as f32).collect();
        let signs =
            tokens.scale.iter().map(|&s| if s == 0.0 { 0.0 } else { f64::from(s.signum()) });
        d.d_scale = signs.zip(&sums.scale).map(|(sign, sum)| (sign * sum) as f32).collect();
        if let Some(bias) = tokens.bias {
            let sum = sums.bias.iter().map(|&x| x as f32).collect();
            d.d_bias = Some(Tensor::from_vec(sum, bias.shape())?);
        }
        Ok(d)
    }

    fn check_backward<E: Element>(
        &self,
        tokens: &Tokens<'_, E>,
        forward: &MemorizingForward<E>,
        d_out: TensorRef<'_, E>,
    ) -> Result<()> {
        self.memorizing.check(self.shape, tokens)?;
        let out = Shape { dim: self.shape.value_dim, ..tokens.q.shape() };
        expect("gradient of the outputs", out, d_out.shape())?;
        expect("local attention of forward", out, forward.local.shape())?;
        expect("its log-sum-exp", out.per_row(), forward.local_lse.shape())?;
        expect("what forward retrieved", out, forward.memory.shape())?;
        expect("its log-sum-exp", out.per_row(), forward.memory_lse.shape())?;
        let (top, selected) = (self.memorizing.top, &forward.selected);
        let expected = out.seq * out.heads * top;
        if (selected.heads, selected.top, selected.data.len()) != (out.heads, top, expected) {
            let (what, got) = ("entries that forward selected", selected.data.len());
            return Err(Error::LengthMismatch { what, expected, got });
        }
        if self.open() != 0 {
            return Err(Error::InvalidParameter {
                what: "tokens of the open segment",
                expected: "none: gradients begin with a segment",
                got: self.open().to_string(),
            });
        }
        Ok(())
    }

    /// The tokens `own` of a call: one segment, which the state takes in.
    fn segment<E: Element>(
        &mut self,
        (tokens, forward, d_out): (&Tokens<'_, E>, &MemorizingForward<E>, TensorRef<'_, E>),
        own: Range<usize>,
        d: &mut MemorizingBackward,
        sums: &mut Sums,
    ) -> Result<()> {
        let cpu = self.memorizing.machine()?;
        let tokens = tokens.span(own.clone());
        let normal = Normal::of(cpu.level, &tokens)?;
        self.hold(&normal);
        let results = [&forward.local, &forward.memory].map(|x| x.view().span(own.clone()));
        let [d_local, d_memory] =
            shares(cpu, d_out.span(own.clone()), (tokens.gate, results), sums)?;
        let bias = self.bias(&tokens)?;
        let saved = Saved { out: results[0], lse: forward.local_lse.view().span(own.clone()) };
        let (mut d_q, d_near) = self.local(&normal, bias.as_ref(), saved, d_local.view())?;
        let selected = forward.selected.by_head(own.clone());
        let range = self.range();
        if let Some(at) = selected.iter().find(|&&at| at != NONE && !range.contains(&(at as usize)))
        {
            return Err(Error::InvalidParameter {
                what: "entry that forward retrieved",
                expected: "one that the state holds with which forward began",
                got: format!("{at}, where the state holds {range:?}"),
            });
        }
        let mut workspace = std::mem::take(&mut self.workspace);
        if let Some(entries) = self.entries(&selected)? {
            let mut more = Tensor::zeros(normal.q.shape())?;
            let saved = Saved { out: results[1], lse: forward.memory_lse.view().span(own.clone()) };
            let call = (normal.scaled.view(), saved);
            let attention = self.memorizing.attention()?;
            entries.differentiate(
                &attention,
                call,
                d_memory.view(),
                more.view_mut(),
                &mut workspace,
            )?;
            let mut sum = d_q.into_vec();
            sum.iter_mut().zip(more.as_slice()).for_each(|(a, b)| *a += b);
            d_q = Tensor::from_vec(sum, more.shape())?;
        }
        self.workspace = workspace;
        if let Some(d_bias) = &d_near.bias {
            self.add_bias(&tokens, d_bias, sums);
        }
        queries(cpu, (&tokens, &normal), d_q.view(), own.start, (d, sums));
        self.keys(cpu, (&tokens, &normal), &d_near, own.start, d);
        Ok(())
    }

    /// Gradients of local attention: of |s| q̂, and of the window.
    fn local(
        &mut self,
        normal: &Normal,
        bias: Option<&Tensor<f32>>,
        saved: Saved<'_, f32>,
        d_out: TensorRef<'_, f32>,
    ) -> Result<(Tensor<f32>, Near)> {
        let mut workspace = std::mem::take(&mut self.workspace);
        let (k, v) = self.near()?;
        let mut attention = self.memorizing.near()?;
        if let Some(bias) = bias {
            attention = attention.bias(bias.view());
        }
        let q = normal.scaled.view();
        let plan = attention.plan(q.shape(), k.shape(), v.shape())?;
        workspace.reserve(plan.backward_workspace_bytes::<f32>());
        let mut d_q = Tensor::zeros(q.shape())?;
        let mut near = Near {
            k: Tensor::zeros(k.shape())?,
            v: Tensor::zeros(v.shape())?,
            bias: bias.map(|bias| Tensor::zeros(bias.shape())).transpose()?,
        };
        let d_bias = near.bias.as_mut().map(Tensor::view_mut);
        let gradients = Gradients {
            d_q: d_q.view_mut(),
            d_k: near.k.view_mut(),
            d_v: near.v.view_mut(),
            terms: TermGradients { d_bias, ..TermGradients::default() },
        };
        let upstream = Upstream { d_out, d_lse: None };
        plan.backward(Inputs { q, k, v }, saved, upstream, gradients, &mut workspace)?;
        self.workspace = workspace;
        Ok((d_q, near))
    }

    /// Adds |s| times the gradient of |s| · bias, and what scales get of it.
    fn add_bias<E: Element>(
        &self,
        tokens: &Tokens<'_, E>,
        d_scaled: &Tensor<f32>,
        sums: &mut Sums,
    ) {
        let (Some(bias), Shape { seq, heads, dim: keys, .. }) = (tokens.bias, d_scaled.shape())
        else {
            return;
        };
        let (first, width) = (self.first_column(), bias.shape().dim);
        for (t, head) in (0..seq).flat_map(|t| (0..heads).map(move |head| (t, head))) {
            let scale = f64::from(tokens.scale[head].abs());
            let own = &bias.row(0, t, head)[first..first + keys];
            let to = &mut sums.bias[(t * heads + head) * width + first..][..keys];
            for ((to, bias), d) in to.iter_mut().zip(own).zip(d_scaled.view().row(0, t, head)) {
                *to += scale * f64::from(*d);
                sums.scale[head] += f64::from(*bias) * f64::from(*d);
            }
        }
    }

    /// Gradients of the segment's keys and values: the newest of the window.
    fn keys<E: Element>(
        &self,
        cpu: Cpu,
        (tokens, normal): (&Tokens<'_, E>, &Normal),
        near: &Near,
        start: usize,
        d: &mut MemorizingBackward,
    ) {
        let Shape { seq, heads, dim, .. } = tokens.k.shape();
        let mut own = vec![0.0; dim];
        let (mut d_k, mut d_v) = (d.d_k.view_mut(), d.d_v.view_mut());
        for (t, head) in (0..seq).flat_map(|t| (0..heads).map(move |head| (t, head))) {
            widen(cpu.level, tokens.k.row(0, t, head), &mut own);
            let factor = inverse_norm(cpu.level, &own);
            let unit = normal.k.view().row(0, t, head);
            let d_unit = near.k.view().row(0, self.before + t, head);
            back_through_norm(cpu, (factor, unit), d_unit, d_k.row_mut(0, start + t, head));
            let d_value = near.v.view().row(0, self.before + t, head);
            d_v.row_mut(0, start + t, head).copy_from_slice(d_value);
        }
    }
}

/// Gradients of the window, and of the scaled bias.
struct Near {
    k: Tensor<f32>,
    v: Tensor<f32>,
    bias: Option<Tensor<f32>>,
}

/// (1 − g) dA and g dA; adds Σ dA ∘ (A_mem − A_near).
fn shares<E: Element>(
    cpu: Cpu,
    d_out: TensorRef<'_, E>,
    (gates, [local, memory]): (&[f32], [TensorRef<'_, f32>; 2]),
    sums: &mut Sums,
) -> Result<[Tensor<f32>; 2]> {
    let shape = d_out.shape();
    let (mut near, mut far) = (Tensor::zeros(shape)?, Tensor::zeros(shape)?);
    let (mut to_near, mut to_far) = (near.view_mut(), far.view_mut());
    for (t, head) in (0..shape.seq).flat_map(|t| (0..shape.heads).map(move |head| (t, head))) {
        let gate = Gate::new(gates[head]);
        let (near, far) = (to_near.row_mut(0, t, head), to_far.row_mut(0, t, head));
        widen(cpu.level, d_out.row(0, t, head), near);
        let of = |a: &[f32]| f64::from(dot(cpu.level, near, a));
        sums.gate[head] += of(memory.row(0, t, head)) - of(local.row(0, t, head));
        for (near, far) in near.iter_mut().zip(far) {
            *far = gate.memory * *near;
            *near *= gate.local;
        }
    }
    Ok([near, far])
}

/// dx = factor · (dx̂ − x̂ (x̂ · dx̂)).
fn back_through_norm(
    cpu: Cpu,
    (factor, unit): (f32, &[f32]),
    d_unit: &[f32],
    to: &mut [f32],
) -> f32 {
    let along = dot(cpu.level, unit, d_unit);
    for ((to, unit), d) in to.iter_mut().zip(unit).zip(d_unit) {
        *to = factor * (d - unit * along);
    }
    along
}

/// Gradients of queries and scales, from those of |s| q̂.
fn queries<E: Element>(
    cpu: Cpu,
    (tokens, normal): (&Tokens<'_, E>, &Normal),
    d_scaled: TensorRef<'_, f32>,
    start: usize,
    (d, sums): (&mut MemorizingBackward, &mut Sums),
) {
    let Shape { seq, heads, dim, .. } = tokens.q.shape();
    let (mut own, mut d_q) = (vec![0.0; dim], d.d_q.view_mut());
    for (t, head) in (0..seq).flat_map(|t| (0..heads).map(move |head| (t, head))) {
        widen(cpu.level, tokens.q.row(0, t, head), &mut own);
        let factor = tokens.scale[head].abs() * inverse_norm(cpu.level, &own);
        let (unit, to) = (normal.q.view().row(0, t, head), d_q.row_mut(0, start + t, head));
        let along = back_through_norm(cpu, (factor, unit), d_scaled.row(0, t, head), to);
        sums.scale[head] += f64::from(along);
    }
}
