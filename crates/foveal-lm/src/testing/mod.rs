//! What this workspace's tests and benches share. Not part of the public interface.

mod consistency;
mod mixed;
mod models;
mod sources;
mod tiny;

pub use consistency::{read_gguf, read_safetensors};
pub use mixed::byte_tokenizer;
pub use models::{Model, fetch_model};
pub use sources::fetch_vocabularies;
pub use tiny::{Tiny, TinySizes, TinyTensor};
