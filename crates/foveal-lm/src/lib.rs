//! Language models built on the `foveal` attention engine.
//!
//! [`weights`] opens model files, [`config`] says what is in them, [`Model`] assembles them, [`tokenizer`] turns text
//! into tokens and back, [`sample`] chooses tokens, and [`generate`] puts all of it together; [`chat`] keeps a conversation,
//! [`evaluate`] says how well a model predicts a text, [`quantize`] writes models in other formats,
//! [`prompt_cache`] keeps what was read of a text on disk, [`train`] trains models, and [`convert`] gives them another attention.

#![deny(unsafe_code)]

pub mod atomic_file;
mod block;
pub mod chat;
pub mod config;
pub mod convert;
pub mod documents;
mod error;
pub mod evaluate;
pub mod folder;
pub mod generate;
mod linear;
pub mod look;
pub mod memory_file;
pub mod mixer;
pub mod model;
mod names;
mod norm;
pub mod prompt_cache;
pub mod quantize;
mod ropes;
pub mod sample;
#[doc(hidden)]
pub mod testing;
pub mod text_stream;
pub mod tokenizer;
pub mod train;
pub mod weights;

pub use error::Error;
pub use model::Model;
