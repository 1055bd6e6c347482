//! What can go wrong between a model's file and its text.

use std::path::PathBuf;

use crate::config::Architecture;
use crate::mixer::CacheStorage;
use crate::{tokenizer, weights};

/// Why a model can't be assembled or run: what was found, what was expected, and what to do where that helps.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "each message says what its fields are")]
pub enum Error {
    /// The file.
    #[error(transparent)]
    Weights(#[from] weights::Error),
    /// The tokenizer.
    #[error(transparent)]
    Tokenizer(#[from] tokenizer::Error),
    /// A tensor that has no form in the format asked for.
    #[error("tensor {name:?}: {source}")]
    Quantize { name: String, source: foveal::projection::QuantizeError },
    /// A kernel refused a call.
    #[error(transparent)]
    Kernel(#[from] foveal::Error),
    /// A lone safetensors file.
    #[error("the file doesn't describe its model; open the folder that has its config.json")]
    NoConfig,
    /// A family of models that can't be assembled.
    #[error(
        "the architecture {found:?} is not supported; supported are {}",
        Architecture::ALL.map(Architecture::name).join(", ")
    )]
    Architecture { found: String },
    /// A value of the model's description that no model has.
    #[error("the model's {key} is {found}, expected {expected}")]
    Config { key: String, found: String, expected: String },
    /// A model of two texts, where one is expected.
    #[error(
        "the model is an encoder–decoder, which only training computes; expected a decoder. With norms behind sums (model.norms = \"post\") transformers' MarianMTModel opens its folder"
    )]
    EncoderDecoder,
    /// A part of a model that this crate doesn't compute.
    #[error("the model sets {key} to {found}, which is not supported")]
    UnsupportedConfig { key: String, found: String },
    /// A token that the model doesn't have.
    #[error("token {found} is outside the model's vocabulary of {vocab}")]
    Token { found: u32, vocab: usize },
    /// Too many tokens in one call for the generated phase.
    #[error("{found} generated tokens in one call, at most {limit} expected")]
    TooManyTokens { found: usize, limit: usize },
    /// Another number of tokens than a batch has texts.
    #[error("{found} tokens for a batch of {expected} texts, expected one for each")]
    BatchTokens { found: usize, expected: usize },
    /// A state that reaches another number of tokens than those of a batch; `None` is what the model has.
    #[error(
        "the state was made for a context of {found:?} tokens, the batch has {expected:?}; give all the same"
    )]
    BatchReach { found: Option<usize>, expected: Option<usize> },
    /// A state that gives up keys of its own choice, in a batch.
    #[error(
        "the state keeps some keys only, but a batch takes states that keep all; leave out --window, --sinks and --evict"
    )]
    BatchKeep,
    /// A state whose pages are not those of a batch.
    #[error(
        "the state takes its pages from elsewhere than the batch; make all with Model::state_in and the same pages, or none"
    )]
    BatchPages,
    /// Pages of a model with other layers, or keys and values of other sizes.
    #[error("the pages were made for another model; make them with Model::pages of this one")]
    PageSizes,
    /// Pages for a model with mixers that are named in the configuration.
    #[error(
        "mixers that are named in the configuration keep no pages; make states with Model::state_with"
    )]
    SectionPages,
    /// Nothing to continue.
    #[error("the prompt is empty and the model has no token to begin with; give it some text")]
    EmptyPrompt,
    /// A chat template that is none, or that refuses what it is given.
    #[error("the model's chat template: {reason}")]
    Template { reason: String },
    /// A state that gives up keys by itself, where every weight is to be seen.
    #[error("attention can't be looked at in a state that gives up keys by itself; keep all")]
    ObservedKeep,
    /// A layer of latent attention, or one whose mixer is named in the configuration, where an observer is to be shown weights.
    #[error(
        "states of latent attention (MLA) and of mixers that are named in the configuration do not keep what weights are made of; look at the text with Look or Looking"
    )]
    ObservedMixer,
    /// A state of another mixer than the layer's.
    #[error(
        "the state is that of another mixer than the layer's; make it with Model::state of the same model"
    )]
    SectionState,
    /// A token that a text does not have.
    #[error("there is no token at position {found}; the text has {tokens}")]
    Position { found: usize, tokens: usize },
    /// Whoever watched a call broke it off.
    #[error("interrupted")]
    Interrupted,
    /// A state that was made by another model.
    #[error("the state has {found} layers, the model {expected}; make it with Model::state")]
    State { expected: usize, found: usize },
    /// A state that gradients can't go through.
    #[error("training needs a state that stores f32, this one stores {}; make it with MultiHeadAttention::state", found.name())]
    TrainingState { found: CacheStorage },
    /// A choice for keys and values that makes no sense.
    #[error("the {what} is {found}, expected {expected}")]
    CacheOptions { what: &'static str, found: String, expected: String },
    /// A key or value that its store can't hold.
    #[error("a key or value of {found} is beyond f16; store keys and values as bf16 or f32")]
    KeyValue { found: f32 },
    /// A file that is no prompt cache, or not this model's.
    #[error("the prompt cache {}: {reason}", path.display())]
    PromptCache { path: PathBuf, reason: String },
    /// A file that is no memory, or not that of this model and layer.
    #[error("the memory {}: {reason}", path.display())]
    MemoryFile { path: PathBuf, reason: String },
    /// A text that comes piece by piece and can't be read.
    #[error("the text can't be read: {reason}")]
    TextStream { reason: String },
    /// A tensor in a file that the model to be trained does not have.
    #[error("the file has a tensor {name:?} that the model does not have; is it another model's?")]
    ForeignTensor { name: String },
    /// A mechanism that has no gradients yet.
    #[error("the mixer {name:?} can't be trained")]
    UntrainedMechanism { name: &'static str },
    /// A mechanism that shows no later tokens, where those are to be seen.
    #[error(
        "the mixer {name:?} is causal and can't be trained with hidden tokens; take one without order"
    )]
    MaskedMechanism { name: &'static str },
    /// A loss that is no number.
    #[error(
        "the loss is not finite; it arose in {place}; a lower learning rate or a smaller clip helps where it is not the data"
    )]
    NotFinite { place: String },
    /// Bytes that are not what texts carry.
    #[error(
        "the bytes are not what texts of this network carry from segment to segment; take those of the same network and batch"
    )]
    CarriedBytes,
    /// A sampling parameter outside its range.
    #[error("{name} is {found}, expected {expected}")]
    Sampling { name: &'static str, found: String, expected: &'static str },
    /// Logits that no token can be chosen from.
    #[error("the logit of token {token} is {found}; the model's file may be damaged")]
    Logit { token: usize, found: f32 },
    /// No logits, or none above −∞.
    #[error("no token has a finite logit; the model's file may be damaged")]
    NoCandidate,
}

impl Error {
    #[allow(clippy::needless_pass_by_value, reason = "numbers and literals come as they are")]
    pub(crate) fn config(
        key: &str,
        found: impl std::fmt::Display,
        expected: impl Into<String>,
    ) -> Error {
        let (key, found, expected) = (key.to_owned(), found.to_string(), expected.into());
        Error::Config { key, found, expected }
    }
}
