//! What can be wrong with a tokenizer's description.

/// Why a tokenizer can't be built or used: what was found, what was expected, and what to do where that helps.
///
/// Names that come from the file are shown escaped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "each message says what its fields are")]
pub enum Error {
    /// A kind of tokenizer that Foveal doesn't have.
    #[error("tokenizer model {found:?} is not supported, expected one of: {}", supported.join(", "))]
    Model { found: String, supported: &'static [&'static str] },
    /// A way to cut text into words that Foveal doesn't have.
    #[error("pre-tokenizer {found:?} is not supported, expected one of: {}", supported.join(", "))]
    PreTokenizer { found: String, supported: Vec<&'static str> },
    /// The vocabulary has no token at all.
    #[error("the vocabulary is empty, expected at least one token")]
    EmptyVocabulary,
    /// More tokens or merges than any model has.
    #[error("{what}: {found}, at most {limit} expected")]
    Limit { what: &'static str, found: usize, limit: usize },
    /// A list with one entry per token has another length than the list of tokens.
    #[error("{found} {what} for {expected} tokens, expected one for each")]
    Length { what: &'static str, expected: usize, found: usize },
    /// Something that this kind of tokenizer can't do without.
    #[error("a {model} tokenizer needs {what}; convert the model again")]
    Missing { model: &'static str, what: &'static str },
    /// Two tokens have the same text.
    #[error("tokens {first} and {second} are both {text:?}, expected every token once")]
    DuplicateToken { text: String, first: u32, second: u32 },
    /// A token type that the format doesn't have.
    #[error("token {id} has type {found}, expected 0 to 6")]
    TokenType { id: u32, found: i32 },
    /// A byte token whose text names no byte.
    #[error("byte token {id} is {text:?}, expected the form <0x0A>")]
    ByteToken { id: u32, text: String },
    /// A score that orders nothing.
    #[error("token {id} has the score {found}, expected a number")]
    Score { id: u32, found: f32 },
    /// A merge that is not two pieces with a space between.
    #[error("merge {index} is {text:?}, expected two pieces separated by a space")]
    MergeForm { index: usize, text: String },
    /// A merge of or into something that is not in the vocabulary.
    #[error("merge {index} ({merge:?}) names {piece:?}, which is not a token")]
    MergeToken { index: usize, merge: String, piece: String },
    /// An id beyond the vocabulary.
    #[error("{what} is {found}, expected less than the vocabulary's size, {size}")]
    OutOfRange { what: &'static str, found: u32, size: usize },
    /// A `tokenizer.json` that can't be read.
    #[error("tokenizer.json can't be used: {reason}")]
    HuggingFace { reason: String },
    /// A `tokenizer.json` that refused a text.
    #[error("the text can't be encoded: {reason}")]
    Encode { reason: String },
    /// The operating system refused.
    #[error("cannot read {}: {source}", path.display())]
    Io { path: std::path::PathBuf, source: std::io::Error },
    /// The metadata of the model file is wrong.
    #[error(transparent)]
    Metadata(#[from] crate::weights::Error),
}
