//! Model files from strangers: any bytes are an error or a model of which everything can be read.

use foveal_lm::testing::{read_gguf, read_safetensors};
use foveal_lm::weights::{Gguf, Safetensors};

/// A GGUF file.
pub fn gguf(bytes: &[u8]) {
    if let Ok(file) = Gguf::from_bytes(bytes.to_vec()) {
        read_gguf(&file, bytes.len());
    }
}

/// A safetensors file.
pub fn safetensors(bytes: &[u8]) {
    if let Ok(file) = Safetensors::from_bytes(bytes.to_vec()) {
        read_safetensors(&file, bytes.len());
    }
}
