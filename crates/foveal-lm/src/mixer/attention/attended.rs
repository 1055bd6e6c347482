//! What a layer of attention has just done, for whoever looks at its weights.
//!
//! ```text
//! P_ij = e^(s_ij − lse_i)      i: the call's queries, j: the keys that the state holds       [heads, T, S]
//! ```
//!
//! Weights are made again from queries, keys and the log-sum-exp of the forward, as many as are asked for; see
//! [`foveal::inspect`]. Nothing is stored for it but a number for each query and head.

use std::ops::Range;

use foveal::cache::KvStore;
use foveal::inspect::{Forwarded, Per};
use foveal::{Cpu, Plan, Tensor, TensorRef};

use super::{MultiHeadAttention, Saved};
use crate::Error;
use crate::mixer::LayerState;

/// One layer's attention of one call, just done.
#[derive(Debug)]
pub struct Attended<'a> {
    pub(super) layer: MultiHeadAttention,
    pub(super) sinks: Option<&'a [f32]>,
    pub(super) saved: &'a Saved,
    pub(super) state: &'a LayerState,
    pub(super) cpu: Cpu,
}

impl Attended<'_> {
    /// Query heads.
    pub fn heads(&self) -> usize {
        self.layer.heads
    }

    /// Key/value heads.
    pub fn kv_heads(&self) -> usize {
        self.layer.kv_heads
    }

    /// How many of the newest tokens a query sees at most.
    pub fn reach(&self) -> Option<usize> {
        self.layer.reach
    }

    /// Positions of the call's tokens.
    pub fn queries(&self) -> Range<usize> {
        self.state.end() - self.saved.tokens..self.state.end()
    }

    /// Positions of the keys that are held.
    pub fn keys(&self) -> Range<usize> {
        self.state.start()..self.state.end()
    }

    /// Queries `[1, tokens, heads, dim]` and keys `[1, tokens, kv_heads, dim]` of the call's tokens, rotated.
    ///
    /// # Errors
    ///
    /// [`Error::Kernel`] if the call was not observed.
    pub fn rows(&self) -> Result<[TensorRef<'_, f32>; 2], Error> {
        let (layer, seq) = (&self.layer, self.saved.tokens);
        let q = TensorRef::new(&self.saved.q, layer.shape([1, seq], layer.heads))?;
        Ok([q, TensorRef::new(&self.saved.k, layer.shape([1, seq], layer.kv_heads))?])
    }

    /// The weights of the queries at `positions`, `[1, positions, heads, keys]`.
    ///
    /// # Errors
    ///
    /// [`Error::Kernel`] for positions that the call does not have.
    pub fn weights(&self, positions: Range<usize>) -> Result<Tensor<f32>, Error> {
        self.look(positions, |plan, of, rows| plan.probabilities(of, rows))
    }

    /// The sums of these weights over the queries, `[1, keys, heads, 1]`.
    ///
    /// # Errors
    ///
    /// Those of [`Attended::weights`].
    pub fn column_sums(&self, positions: Range<usize>) -> Result<Tensor<f32>, Error> {
        self.look(positions, |plan, of, rows| plan.column_sums(of, rows, Per::QueryHead))
    }

    /// The entropy of the weights of each of the queries, `[1, positions, heads, 1]`, in nats.
    ///
    /// # Errors
    ///
    /// Those of [`Attended::weights`].
    pub fn entropy(&self, positions: Range<usize>) -> Result<Tensor<f32>, Error> {
        self.look(positions, |plan, of, rows| plan.entropy(of, rows))
    }

    fn look<R>(
        &self,
        positions: Range<usize>,
        ask: impl FnOnce(&Plan<'_>, Forwarded<'_, f32, f32>, Range<usize>) -> foveal::Result<R>,
    ) -> Result<R, Error> {
        let (layer, queries) = (&self.layer, self.queries());
        let shape = layer.shape([1, queries.len()], layer.heads);
        let keys = layer.shape([1, self.keys().len()], layer.kv_heads);
        let attention = layer.attention(self.sinks, self.cpu);
        let plan = attention.plan(shape, keys, keys)?;
        let stores: [&dyn KvStore; 1] = [self.state];
        let q = TensorRef::new(&self.saved.q, shape)?;
        let lse = TensorRef::new(&self.saved.lse, shape.per_row())?;
        // What lies before the call's queries wraps to what lies behind them, and is refused.
        let row = |position: usize| position.wrapping_sub(queries.start);
        let rows = row(positions.start)..row(positions.end);
        Ok(ask(&plan, Forwarded::cached(q, &stores, lse), rows)?)
    }
}
