//! What a section of a layer computes while a model is trained: neighbouring heads whose mechanism the configuration names.
//!
//! ```text
//! forward   out_h = mechanism(q_h, k_g, v_g, …)        whole sequences, on from what an earlier segment carried
//! backward  d_q, d_k, d_v from d_out                   and gradients of what the section itself learns
//! ```
//!
//! Projections, norms of queries and keys, and rotations are the layer's. What is carried between segments is a constant to
//! gradients (truncated backpropagation through time, Williams and Peng 1990).

use std::any::Any;
use std::fmt::Debug;

use foveal::position::Rope;
use foveal::{Dropout, TensorMut, TensorRef};

use super::carried::SectionCarried;
use super::tools::{Normed, Tools};
use crate::Error;

/// Which queries and keys a section reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Positions {
    /// Rotated ones, in `q` and `k`.
    Rotated,
    /// Those without rotation, in `q` and `k`.
    Plain,
    /// Rotated ones in `q` and `k`, those without rotation in `plain`.
    Both,
}

/// What a section sees of a call; the same in forward and backward.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SectionCall<'a> {
    /// The arena.
    pub(crate) parameters: &'a [f32],
    /// The layer's normalised inputs, `[sequences, T, width]`.
    pub(crate) x: &'a [f32],
    /// `[sequences, T, heads, dim]`, with strides.
    pub(crate) q: TensorRef<'a, f32>,
    /// `[sequences, T, kv_heads, dim]`, with strides.
    pub(crate) k: TensorRef<'a, f32>,
    /// `[sequences, T, kv_heads, dim]`, with strides.
    pub(crate) v: TensorRef<'a, f32>,
    /// Queries and keys without rotation; there for [`Positions::Both`].
    pub(crate) plain: Option<[TensorRef<'a, f32>; 2]>,
    /// The layer's norms of queries and of keys.
    pub(crate) norms: Option<&'a [Normed; 2]>,
    /// The layer's rotary embedding.
    pub(crate) rope: &'a Rope,
    /// The position of the first token in its text.
    pub(crate) start: usize,
    /// Whether backward follows.
    pub(crate) keep: bool,
    /// What mechanisms with weights leave out of them.
    pub(crate) dropout: Option<Dropout>,
}

/// What forward gave, and the gradient of it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SectionUpstream<'a> {
    /// `[sequences, T, heads, dim]`, with strides.
    pub(crate) out: TensorRef<'a, f32>,
    /// Likewise.
    pub(crate) d_out: TensorRef<'a, f32>,
}

/// Where gradients go.
#[derive(Debug)]
pub(crate) struct SectionGradients<'a> {
    /// Of the queries that `q` was: written, all of it.
    pub(crate) d_q: TensorMut<'a, f32>,
    /// Likewise of the keys.
    pub(crate) d_k: TensorMut<'a, f32>,
    /// Likewise of the values.
    pub(crate) d_v: TensorMut<'a, f32>,
    /// Likewise of `plain`, where it was there.
    pub(crate) d_plain: Option<[TensorMut<'a, f32>; 2]>,
    /// Of the layer's normalised inputs by other ways than queries, keys and values: added.
    pub(crate) d_x: &'a mut [f32],
    /// Of the arena: added.
    pub(crate) gradients: &'a mut [f32],
}

/// What a section leaves for its backward pass; empty where none follows.
pub(crate) type SectionSaved = Box<dyn Any + Send>;

/// A mechanism that can be trained.
pub(crate) trait TrainedSection: Send + Sync + Debug {
    /// Which queries and keys it reads.
    fn positions(&self) -> Positions;

    /// Writes what its heads give to `out`, and moves `carried` on, which is empty at the beginning of a text. Without
    /// `carried`, sequences begin and end with the call.
    fn forward(
        &self,
        call: SectionCall<'_>,
        carried: Option<&mut SectionCarried>,
        out: TensorMut<'_, f32>,
        tools: &mut Tools<'_>,
    ) -> Result<SectionSaved, Error>;

    /// The gradients of one call.
    fn backward(
        &self,
        call: SectionCall<'_>,
        saved: SectionSaved,
        upstream: SectionUpstream<'_>,
        gradients: SectionGradients<'_>,
        tools: &mut Tools<'_>,
    ) -> Result<(), Error>;
}

/// What a section itself left.
pub(crate) fn taken<T: 'static>(saved: SectionSaved) -> Result<T, Error> {
    saved.downcast().map(|saved| *saved).map_err(|_| Error::SectionState)
}
