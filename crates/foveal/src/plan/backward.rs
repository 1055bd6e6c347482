//! The backward half of a plan: what forward has to keep, what comes from above, what comes out.

use super::{Inputs, Plan, expect};
use crate::cpu::Phase;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::exact::backward::{self, BackwardProblem, TermOutputs};
use crate::exact::instances;
use crate::problem::{Attention, Forward};
use crate::tensor::{Shape, Tensor, TensorMut, TensorRef};
use crate::workspace::Workspace;

/// What forward keeps for backward besides its inputs: its two results.
#[derive(Debug, Clone, Copy)]
pub struct Saved<'a, E> {
    /// The output, `[B, T, H, Dv]`.
    pub out: TensorRef<'a, E>,
    /// The log-sum-exp, `[B, T, H, 1]`.
    pub lse: TensorRef<'a, f32>,
}

/// The gradients of a loss with respect to forward's results.
#[derive(Debug, Clone, Copy)]
pub struct Upstream<'a, E> {
    /// Of the output, `[B, T, H, Dv]`.
    pub d_out: TensorRef<'a, E>,
    /// Of the log-sum-exp, `[B, T, H, 1]`; `None` for zeros.
    pub d_lse: Option<TensorRef<'a, f32>>,
}

/// Where the gradients of the loss with respect to the inputs are written. What was there is overwritten.
#[derive(Debug)]
pub struct Gradients<'a, E, K> {
    /// Of the queries, `[B, T, H, Dk]`.
    pub d_q: TensorMut<'a, E>,
    /// Of the keys, `[B, S, KV, Dk]`: the sum over the query heads that read them.
    pub d_k: TensorMut<'a, K>,
    /// Of the values, `[B, S, KV, Dv]`, likewise.
    pub d_v: TensorMut<'a, K>,
    /// Of what else scores are made of.
    pub terms: TermGradients<'a>,
}

/// Where the gradients of a call's terms are written, for those that are wanted. What was there is overwritten.
///
/// They are those of the loss with respect to the numbers that the [`Attention`] was given.
#[derive(Debug, Default)]
pub struct TermGradients<'a> {
    /// Of the bias, in its shape: summed over the axes that it shares.
    pub d_bias: Option<TensorMut<'a, f32>>,
    /// Of the ALiBi slopes, one a query head.
    pub d_slopes: Option<&'a mut [f32]>,
    /// Of the table of the relative bias, `[buckets, heads]` row by row.
    pub d_table: Option<&'a mut [f32]>,
    /// Of the sinks, one a query head.
    pub d_sinks: Option<&'a mut [f32]>,
    /// Of the keys by distance of a relative encoding, in their shape: summed over sequences.
    pub d_relative_keys: Option<TensorMut<'a, f32>>,
    /// Of its content bias u, `[heads, dim]` row by row.
    pub d_content_bias: Option<&'a mut [f32]>,
    /// Of its position bias v, likewise.
    pub d_position_bias: Option<&'a mut [f32]>,
}

/// The gradients that [`Attention::backward`] allocates.
#[derive(Debug, Clone, PartialEq)]
pub struct Backward<E> {
    /// Of the queries, `[B, T, H, Dk]`.
    pub d_q: Tensor<E>,
    /// Of the keys, `[B, S, KV, Dk]`.
    pub d_k: Tensor<E>,
    /// Of the values, `[B, S, KV, Dv]`.
    pub d_v: Tensor<E>,
}

impl<'a> From<TermGradients<'a>> for TermOutputs<'a> {
    fn from(gradients: TermGradients<'a>) -> TermOutputs<'a> {
        TermOutputs {
            bias: gradients.d_bias.map(TensorMut::into_shared),
            slopes: gradients.d_slopes,
            table: gradients.d_table,
            sinks: gradients.d_sinks,
            relative_keys: gradients.d_relative_keys.map(TensorMut::into_shared),
            content_bias: gradients.d_content_bias,
            position_bias: gradients.d_position_bias,
        }
    }
}

impl Plan<'_> {
    /// The gradients of a loss whose gradients with respect to forward's results are given.
    ///
    /// Probabilities are computed again from the log-sum-exp; nothing of the size T×S is stored. The
    /// bits of a gradient depend neither on threads nor on the rest of the batch. A row that sees
    /// nothing has zero gradients. A NaN or an infinity reaches what the formulas take it to, through
    /// pairs that the mask allows, and slows its key/value head down.
    ///
    /// Sums are `f32` and are rounded once where the gradient is stored in 16 bits. Allocates nothing
    /// itself (threads may), unless an input is not finite. 2.5 times the arithmetic of forward.
    ///
    /// # Errors
    /// [`Error::NoBackward`] for a plan of generated tokens; [`Error::ShapeMismatch`] if a tensor is
    /// not of the planned shape, [`Error::MaskShape`], [`Error::WorkspaceTooSmall`]. Nothing is
    /// written then.
    pub fn backward<E: Element, K: Element>(
        &self,
        inputs: Inputs<'_, E, K>,
        saved: Saved<'_, E>,
        upstream: Upstream<'_, E>,
        gradients: Gradients<'_, E, K>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        if self.phase == Phase::Generated {
            return Err(Error::NoBackward);
        }
        let v = Shape { dim: self.value_dim, ..self.k };
        let (out, per_row) = (self.out_shape(), self.out_shape().per_row());
        let Gradients { d_q, d_k, d_v, terms } = gradients;
        for (what, expected, got) in [
            ("planned queries", self.q, inputs.q.shape()),
            ("planned keys", self.k, inputs.k.shape()),
            ("planned values", v, inputs.v.shape()),
            ("planned output", out, saved.out.shape()),
            ("planned log-sum-exp", per_row, saved.lse.shape()),
            ("gradient of the planned output", out, upstream.d_out.shape()),
            ("gradient of the planned queries", self.q, d_q.shape()),
            ("gradient of the planned keys", self.k, d_k.shape()),
            ("gradient of the planned values", v, d_v.shape()),
        ] {
            expect(what, expected, got)?;
        }
        if let Some(d_lse) = &upstream.d_lse {
            expect("gradient of the planned log-sum-exp", per_row, d_lse.shape())?;
        }
        self.check_mask(self.k.seq)?;
        self.check_terms(&terms)?;
        let floats = workspace.floats(self.backward_workspace_bytes::<E>() / 4)?;
        let mut call = BackwardProblem {
            q: inputs.q,
            k: inputs.k,
            v: inputs.v,
            out: saved.out,
            lse: saved.lse,
            d_out: upstream.d_out,
            d_lse: upstream.d_lse,
            d_q: d_q.into_shared(),
            d_k: d_k.into_shared(),
            d_v: d_v.into_shared(),
            terms_out: terms.into(),
            mask: self.mask,
            terms: self.terms,
            scale: self.scale,
            sizes: self.sizes(),
        };
        instances::backward(&mut call, floats);
        Ok(())
    }

    /// Refuses gradients of terms that the call does not have, or in other shapes.
    fn check_terms(&self, gradients: &TermGradients<'_>) -> Result<()> {
        let TermGradients { d_bias, d_slopes, d_table, d_sinks, .. } = gradients;
        let TermGradients { d_relative_keys, d_content_bias, d_position_bias, .. } = gradients;
        let terms = self.terms;
        let heads = self.q.heads;
        if let (Some(d_bias), Some(bias)) = (d_bias, terms.bias) {
            expect("gradient of the bias", bias.shape(), d_bias.shape())?;
        }
        if let (Some(d_keys), Some(encoding)) = (d_relative_keys, terms.encoding) {
            expect("gradient of the keys by distance", encoding.shape(), d_keys.shape())?;
        }
        let moved = terms.encoding.map(|_| heads * self.q.dim);
        let table = terms.relative.as_ref().map(|relative| relative.buckets() * heads);
        let length = |x: &Option<&mut [f32]>| x.as_ref().map(|x| x.len());
        for (what, wanted, expected) in [
            ("gradient of a bias", d_bias.as_ref().map(|_| 0), terms.bias.map(|_| 0)),
            ("gradient of slopes", length(d_slopes), terms.alibi.map(|_| heads)),
            ("gradient of a relative bias", length(d_table), table),
            ("gradient of sinks", length(d_sinks), terms.sinks.map(<[f32]>::len)),
            ("gradient of keys by distance", d_relative_keys.as_ref().map(|_| 0), moved.map(|_| 0)),
            ("gradient of a content bias", length(d_content_bias), moved),
            ("gradient of a position bias", length(d_position_bias), moved),
        ] {
            match (wanted, expected) {
                (Some(_), None) => {
                    let (expected, got) = ("a call with this term", format!("terms: {terms}"));
                    return Err(Error::InvalidParameter { what, expected, got });
                }
                (Some(got), Some(expected)) if got != expected => {
                    return Err(Error::LengthMismatch { what, expected, got });
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Bytes of workspace that [`Plan::backward`] needs for queries of this storage type.
    pub fn backward_workspace_bytes<E: Element>(&self) -> usize {
        4 * backward::workspace_floats(&self.sizes(), self.terms, E::DTYPE)
    }
}

impl Workspace {
    /// A workspace for the backward pass of `plan` with queries stored as `E`. Allocates it.
    pub fn for_backward<E: Element>(plan: &Plan<'_>) -> Workspace {
        let mut workspace = Workspace::new();
        workspace.reserve(plan.backward_workspace_bytes::<E>());
        workspace
    }
}

impl Attention<'_> {
    /// Plans, allocates and runs backward: the gradients of queries, keys and values from the result
    /// of [`Attention::forward`] on the same tensors and the gradient of its output. For the
    /// gradient of the log-sum-exp, those of terms, two storage types and gradients in place:
    /// [`Plan::backward`].
    ///
    /// ```
    /// use foveal::{Attention, Mask, Shape, Tensor};
    /// # fn main() -> foveal::Result<()> {
    /// let x = Tensor::<f32>::zeros(Shape { batch: 1, seq: 8, heads: 4, dim: 64 })?;
    /// let attention = Attention::new().mask(Mask::causal());
    /// let forward = attention.forward(x.view(), x.view(), x.view())?;
    /// let d_out = Tensor::<f32>::zeros(forward.out.shape())?;
    /// let inputs = foveal::plan::Inputs { q: x.view(), k: x.view(), v: x.view() };
    /// let gradients = attention.backward(inputs, &forward, d_out.view())?;
    /// assert_eq!(gradients.d_q.shape(), x.shape());
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// Those of [`Attention::plan`] and [`Plan::backward`].
    pub fn backward<E: Element>(
        &self,
        inputs: Inputs<'_, E, E>,
        forward: &Forward<E>,
        d_out: TensorRef<'_, E>,
    ) -> Result<Backward<E>> {
        let Inputs { q, k, v } = inputs;
        let plan = self.plan(q.shape(), k.shape(), v.shape())?;
        let mut d_q = Tensor::zeros(q.shape())?;
        let mut d_k = Tensor::zeros(k.shape())?;
        let mut d_v = Tensor::zeros(v.shape())?;
        let saved = Saved { out: forward.out.view(), lse: forward.lse.view() };
        let upstream = Upstream { d_out, d_lse: None };
        let gradients = Gradients {
            d_q: d_q.view_mut(),
            d_k: d_k.view_mut(),
            d_v: d_v.view_mut(),
            terms: TermGradients::default(),
        };
        plan.backward(
            inputs,
            saved,
            upstream,
            gradients,
            &mut Workspace::for_backward::<E>(&plan),
        )?;
        Ok(Backward { d_q, d_k, d_v })
    }
}
