//! Training: models whose gradients are computed by hand-written backward passes on plain slices.
//!
//! [`parameters`] holds what is learned, [`network`] computes losses and gradients of it.

pub mod network;
pub mod parameters;

pub use network::{
    Batch, Carried, EncoderDecoder, EncoderDecoderConfig, IGNORED, Loss, Network, NormPlace,
    Objective, Pairs, PositionKind, Precision, Scratch, StepOptions,
};
pub use parameters::{Entry, Group, Parameters};
