//! Where a model comes from: a file, a folder, or the command itself.

use std::path::Path;

use anyhow::Context;
use foveal_lm::tokenizer::Tokenizer;
use foveal_lm::weights::{Description, Gguf, Weights};

/// The model that is built into the command: six novels' English, 5.6 million parameters; models/novels has all that made it.
static BUILT_IN: &[u8] = include_bytes!("../assets/novels.gguf");

/// What a model is called in messages.
pub(crate) fn name(path: Option<&Path>) -> String {
    path.map_or_else(|| "the built-in model".to_owned(), |path| path.display().to_string())
}

/// Opens a model's file or folder, or the built-in model.
pub(crate) fn open(path: Option<&Path>) -> anyhow::Result<Weights> {
    let weights = match path {
        Some(path) => Weights::open(path),
        None => Gguf::from_static(BUILT_IN).and_then(Weights::from_gguf),
    };
    weights.with_context(|| format!("cannot open {}", name(path)))
}

/// The tokenizer that belongs to a model.
pub(crate) fn tokenizer(path: Option<&Path>, weights: &Weights) -> anyhow::Result<Tokenizer> {
    let tokenizer = match (weights.description(), path) {
        (Description::Gguf(metadata), _) => Tokenizer::from_gguf(metadata),
        (_, Some(folder)) => Tokenizer::from_folder(folder),
        (_, None) => unreachable!("the built-in model is a GGUF file"),
    };
    tokenizer.with_context(|| format!("cannot use the tokenizer of {}", name(path)))
}
