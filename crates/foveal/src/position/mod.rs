//! How attention knows where a token stands.

mod alibi;
mod encoding;
mod frequency;
mod relative;
mod rope;

pub use alibi::Slopes;
pub use encoding::RelativeEncoding;
pub use frequency::{RopeScaling, Yarn, YarnAmplitude};
pub use relative::{MAX_BUCKETS, MAX_DISTANCE, RelativeBias};
pub use rope::{MAX_ROTARY_DIM, Rope, RopeConfig, RopeLayout, RopeTable};
