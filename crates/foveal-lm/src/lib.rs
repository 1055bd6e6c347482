//! Language models built on the `foveal` attention engine.

#![deny(unsafe_code)]

pub mod atomic_file;
#[doc(hidden)]
pub mod testing;
pub mod tokenizer;
pub mod weights;
