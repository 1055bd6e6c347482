//! Token mixing: the part of a layer through which tokens see each other.

pub(crate) mod attention;

pub use attention::GroupedQueryAttention;

/// What a layer keeps of the tokens seen so far.
pub type LayerState = foveal::cache::ContiguousCache<f32>;
