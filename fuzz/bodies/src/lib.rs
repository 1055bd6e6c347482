//! What each fuzz target does with its bytes, as plain functions: libFuzzer calls them with inputs that it makes up,
//! the tests with the inputs in `fuzz/corpus-seeds`.
//!
//! A body returns when the bytes were refused with an error of the library's own, or when everything that must hold of
//! the result does. Anything else is a panic.

#![forbid(unsafe_code)]

mod attention;
mod cache;
mod model;
mod numbers;
mod pool;
mod tokenizer;
mod weights;

pub use attention::attention;
pub use cache::cache;
pub use model::model;
pub use tokenizer::tokenizer;
pub use weights::{gguf, safetensors};

/// A target's name, which is that of its folder of seeds, and its body.
pub type Target = (&'static str, fn(&[u8]));

/// All targets.
pub const TARGETS: &[Target] =
    &[("attention", attention), ("cache", cache), ("gguf", gguf), ("safetensors", safetensors)];
