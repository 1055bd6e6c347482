//! Linear attention that is not causal: every query reads what all keys have written.
//!
//! ```text
//! S = S₀ + Σ_j φ(k_j) v_jᵀ      z = z₀ + Σ_j φ(k_j)      o_i = Sᵀ φ(q_i) / (φ(q_i) · z + ε)
//! ```
//!
//! shown for [`Linear`]. To the driver, keys are tokens without queries, and queries come after all of them as tokens
//! without keys: gradients need no formula of their own. There may be other numbers of queries than of keys. Cost:
//! 2·Dk·Dv operations for each key and for each query.

use super::backward::{Gradients, Upstream, check_gradients, check_upstream};
use super::driver::{Recurrent, Results};
use super::gather::Engine;
use super::tokens::{Sizes, expect};
use super::{Linear, Recurrence, State, Tokens};
use crate::element::Element;
use crate::error::{Error, Result};
use crate::tensor::{Shape, Tensor, TensorMut};
use crate::workspace::Workspace;

/// A mechanism whose state does not depend on the order of its keys, so that reading all of them has a meaning.
pub trait AnyOrder: Recurrence {}

impl AnyOrder for Linear {}

impl<R: AnyOrder> Recurrent<R> {
    /// The outputs of queries that read all keys. `state` holds what was written before and after. Allocates the outputs.
    ///
    /// # Errors
    /// Those of [`Recurrent::forward_bidirectional_into`].
    pub fn forward_bidirectional<E: Element>(
        &self,
        tokens: &Tokens<'_, E>,
        state: &mut State,
    ) -> Result<Tensor<E>> {
        let mut out = Tensor::zeros(out_shape(tokens))?;
        self.forward_bidirectional_into(tokens, out.view_mut(), state, &mut Workspace::new())?;
        Ok(out)
    }

    /// The same without allocating, but for a workspace that has to grow.
    ///
    /// # Errors
    /// Those of [`Recurrent::forward_into`]; [`Error::InvalidParameter`] for packed sequences.
    pub fn forward_bidirectional_into<E: Element>(
        &self,
        tokens: &Tokens<'_, E>,
        out: TensorMut<'_, E>,
        state: &mut State,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let engine = self.all_keys(tokens)?;
        expect("outputs", out_shape(tokens), out.shape())?;
        state.check(engine.sizes.state(), self.mechanism.form().sums)?;
        self.run(&engine, Results { out, reads: None }, state, workspace)
    }

    /// The gradients of a loss; the arguments are those of [`Recurrent::backward_into`].
    ///
    /// # Errors
    /// Those of [`Recurrent::backward_into`]; [`Error::InvalidParameter`] for packed sequences.
    pub fn backward_bidirectional_into<E: Element>(
        &self,
        tokens: &Tokens<'_, E>,
        upstream: Upstream<'_, E>,
        gradients: Gradients<'_>,
        d_state: &mut State,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let engine = self.all_keys(tokens)?;
        let (shape, sums) = (engine.sizes.state(), self.mechanism.form().sums);
        check_upstream(out_shape(tokens), &upstream, false)?;
        check_gradients(tokens, &gradients)?;
        upstream.initial.check(shape, sums)?;
        d_state.check(shape, sums)?;
        self.run_backward(&engine, upstream, gradients, (d_state, workspace))
    }

    /// The states with which these tokens' sequences begin: zeros. Allocates them.
    ///
    /// # Errors
    /// If the tokens do not fit together or the mechanism.
    pub fn state_bidirectional<E: Element>(&self, tokens: &Tokens<'_, E>) -> Result<State> {
        State::zeros(self.all_keys(tokens)?.sizes.state(), self.mechanism.form().sums)
    }

    fn all_keys<'a, 'b, E: Element>(
        &'a self,
        tokens: &'a Tokens<'b, E>,
    ) -> Result<Engine<'a, 'b, R, E>> {
        let sizes = self.check_bidirectional(tokens)?;
        let queries = Some(tokens.q.shape().seq);
        Ok(Engine { mechanism: &self.mechanism, tokens, sizes, queries })
    }

    fn check_bidirectional<'a, E: Element>(&self, tokens: &Tokens<'a, E>) -> Result<Sizes<'a>> {
        if let Some(cuts) = tokens.cuts {
            return Err(Error::InvalidParameter {
                what: "cuts of packed sequences",
                expected: "none, since every query reads all keys; use a batch",
                got: format!("{cuts:?}"),
            });
        }
        let q = tokens.q.shape();
        let keys = Shape { seq: tokens.k.shape().seq, ..q };
        // Queries are checked but for their number: keys stand in for them.
        expect("keys, but for their number the shape of queries", keys, tokens.k.shape())?;
        self.check(&Tokens { q: tokens.k, ..*tokens })
    }
}

fn out_shape<E: Element>(tokens: &Tokens<'_, E>) -> Shape {
    Shape { seq: tokens.q.shape().seq, ..tokens.v.shape() }
}
