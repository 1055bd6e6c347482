//! Token mixing: the part of a layer through which tokens see each other.
//!
//! Every mechanism is a description of what it computes, without numbers, and has the same four companions:
//!
//! | | what | for [`MultiHeadAttention`] |
//! |---|---|---|
//! | parameters | what is learned, generic over what holds the numbers: vectors, slices, gradients, a file's weights | [`AttentionParameters`] |
//! | state | what a sequence carries from call to call | [`LayerState`]: keys and values, as [`CacheOptions`] say |
//! | saved | what forward leaves for backward | [`Saved`] |
//! | gradient of the state | what backward carries from call to call, the other way | [`StateGradient`] |
//!
//! ```text
//! forward(parameters, x, state) → (y, saved)                         state moves on
//! backward(parameters, saved, d_y, d_state) → (d_x, d_state before)  gradients of parameters are added up
//! ```
//!
//! Models that are only run share one [`Saved`] among all layers and calls, as scratch memory.

pub(crate) mod attention;
mod latent;
mod sections;
mod state;
mod stored;
mod trace;

pub use crate::linear::{Affine, Run};
pub use attention::{
    Attended, AttentionParameters, GroupedQueryAttention, InputGradients, Inputs,
    MultiHeadAttention, Saved, Source, StateGradient, Upstream,
};
pub(crate) use sections::{MAX_REACH, MemoryState, SectionState, segments_mask};
pub(crate) use sections::{Rule, TAU, UNIT_EPSILON, refuse as refuse_more, with_rule};
pub(crate) use sections::{lsh, native_sparse, sparse_transformer};
pub(crate) use state::{Array, Contents, Demand, Span, Store, Taken};
pub use state::{CacheOptions, CacheStorage, Keep, LayerState, Pages, Retrieval};
pub(crate) use stored::StoredMixer;
pub use trace::Recalled;
pub(crate) use trace::{Asked, Part, Trace, Weigher};
