//! How attention knows where a token stands.

mod frequency;
mod rope;

pub use frequency::{RopeScaling, Yarn, YarnAmplitude};
pub use rope::{MAX_ROTARY_DIM, Rope, RopeConfig, RopeLayout, RopeTable};
