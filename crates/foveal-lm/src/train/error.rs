//! What can go wrong in training.

use std::path::PathBuf;

/// Why a training run can't start or go on: what was found, what was expected, and what to do where that helps.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "each message says what its fields are")]
pub enum Error {
    /// A configuration that is no TOML, or has a key that there is not, or a value of another kind.
    #[error("the configuration: {reason}")]
    Toml { reason: String },
    /// A setting of the command line that is none.
    #[error("the setting {found:?} is not of the form section.key=value")]
    Setting { found: String },
    /// A value that makes no sense.
    #[error("{key} is {found}, expected {expected}")]
    Config { key: String, found: String, expected: String },
    /// A setting that a run can't change any more.
    #[error("{key} can't be changed in a run that has begun; start a new one")]
    Fixed { key: String },
    /// Texts that are too short.
    #[error(
        "the {what} has {found} tokens, expected {expected} at least; give more text or shorter sequences"
    )]
    TooShort { what: &'static str, found: usize, expected: usize },
    /// A text that can't be read.
    #[error("cannot read the text {}: {reason}", path.display())]
    Text { path: PathBuf, reason: String },
    /// No text at all.
    #[error("data.train names no text; give it files or folders")]
    NoText,
    /// No pairs at all.
    #[error(
        "data.train names no pairs; give it .jsonl or .tsv files, or set data.task to \"copy\" or \"reverse\""
    )]
    NoPairs,
    /// Fewer pairs than a step takes.
    #[error(
        "there are {found} pairs, expected {expected} at least, those of a step; give more or lower data.batch"
    )]
    TooFewPairs { found: usize, expected: usize },
    /// A pair that is longer than the model reads.
    #[error(
        "pair {number} has {found} tokens, expected {limit} at most; raise data.sequence, or leave it out of the file"
    )]
    LongPair { number: usize, found: usize, limit: usize },
    /// Texts that are not those with which a run began.
    #[error(
        "the texts or the tokenizer have changed since the run began; resume with the same ones, or start a new run"
    )]
    OtherText,
    /// A tokenizer that can't be trained.
    #[error("the tokenizer can't be trained: {reason}")]
    Vocabulary { reason: String },
    /// A folder that has a run already.
    #[error("{} holds a training run; go on with --resume, or choose another folder", path.display())]
    Taken { path: PathBuf },
    /// A folder that has none.
    #[error("{} holds no training run: it has no train.toml", path.display())]
    NoRun { path: PathBuf },
    /// A checkpoint that is damaged, or of something else.
    #[error("the checkpoint {}: {reason}", path.display())]
    Checkpoint { path: PathBuf, reason: String },
    /// A file that can't be written; the last checkpoint is as it was.
    #[error("cannot write {}: {source}", path.display())]
    Write { path: PathBuf, source: std::io::Error },
    /// A loss or a gradient that is no number.
    #[error("step {step}: {what} is {found}; {place}. {advice}")]
    NotFinite { step: u64, what: &'static str, found: f64, place: String, advice: &'static str },
    /// Another process of the run has failed.
    #[error("process {rank} failed: {reason}")]
    Elsewhere { rank: usize, reason: String },
    /// What processes have to have in common, or how they talk.
    #[error(transparent)]
    Processes(#[from] foveal_processes::Error),
    /// A model, its weights or its tokenizer.
    #[error(transparent)]
    Model(#[from] crate::Error),
}

impl From<crate::tokenizer::Error> for Error {
    fn from(error: crate::tokenizer::Error) -> Error {
        Error::Model(error.into())
    }
}

impl From<crate::weights::Error> for Error {
    fn from(error: crate::weights::Error) -> Error {
        Error::Model(error.into())
    }
}

impl From<foveal::Error> for Error {
    fn from(error: foveal::Error) -> Error {
        Error::Model(error.into())
    }
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
