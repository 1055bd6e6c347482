//! Text that goes on where a prompt ended, token by token.

mod batch;
mod prefixes;
mod stop;
mod writing;

use std::ops::ControlFlow;

use crate::Error;
use crate::model::{CHUNK, Logits, Model, Scratch, State, Step};
use crate::sample::{Logprobs, Sampling};
use crate::tokenizer::{Encode, Tokenizer};
use writing::Writing;

pub use batch::{BatchOptions, Batcher, Finished, Request, Text};

/// When to stop, and how to choose.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Options {
    /// The most tokens to make, the end token included.
    pub max_tokens: usize,
    /// Strings that end the text; they are not part of it. Empty ones count for nothing.
    pub stop: Vec<String>,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// With how many of the most probable tokens each token comes, and with its own probability; `None` for neither.
    pub logprobs: Option<usize>,
}

/// Why a text ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum StopReason {
    /// [`Options::max_tokens`] were made.
    MaxTokens,
    /// The model gave a token that ends a text or a turn.
    EndToken,
    /// One of [`Options::stop`] came.
    StopString,
}

impl StopReason {
    /// The reason in one word: `max_tokens`, `end_token` or `stop_string`.
    pub const fn name(self) -> &'static str {
        match self {
            StopReason::MaxTokens => "max_tokens",
            StopReason::EndToken => "end_token",
            StopReason::StopString => "stop_string",
        }
    }
}

/// One generated token.
#[derive(Clone, Debug, PartialEq)]
pub struct Piece {
    /// The token.
    pub token: u32,
    /// The text that became certain with it, whole characters; may be empty, or more than the token's own.
    pub text: String,
    /// Its probability, if [`Options::logprobs`] asks for it.
    pub logprobs: Option<Logprobs>,
}

/// The tokens of `text` for a model to continue, with its begin token where it wants one.
///
/// # Errors
///
/// [`Error::EmptyPrompt`] when nothing is left to begin with; [`Error::Tokenizer`].
pub fn prompt_tokens(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>, Error> {
    let mut tokens = tokenizer.encode(text, Encode::PROMPT)?;
    if tokens.is_empty() {
        tokens.push(tokenizer.bos().ok_or(Error::EmptyPrompt)?);
    }
    Ok(tokens)
}

/// What a text begins with.
#[derive(Clone, Copy, Debug, Default)]
pub struct Prompt<'a> {
    /// Tokens that the state holds already: what a repeat penalty looks back on. May be empty.
    pub held: &'a [u32],
    /// Tokens to read, one at least.
    pub new: &'a [u32],
}

impl<'a, T: AsRef<[u32]> + ?Sized> From<&'a T> for Prompt<'a> {
    fn from(tokens: &'a T) -> Prompt<'a> {
        Prompt { held: &[], new: tokens.as_ref() }
    }
}

/// Reads a prompt up to its last chunk, and returns that: what is left to read is short. `watch` is told how many tokens
/// have been read, again and again, and may break the reading off. Bits are those of a prompt read at once.
///
/// # Errors
///
/// [`Error::Interrupted`], with a state that has read what `watch` was told last; those of [`Model::forward`].
pub fn read<'t>(
    model: &Model,
    tokens: &'t [u32],
    state: &mut State,
    watch: &mut dyn FnMut(usize) -> ControlFlow<()>,
) -> Result<&'t [u32], Error> {
    let step = Step { logits: Logits::None, ..Step::PROMPT };
    let (mut scratch, mut rest) = (Scratch::new(), tokens);
    loop {
        if watch(tokens.len() - rest.len()).is_break() {
            return Err(Error::Interrupted);
        }
        let room = CHUNK - state.position() % CHUNK;
        if rest.len() <= room {
            return Ok(rest);
        }
        let (chunk, later) = rest.split_at(room);
        model.forward(chunk, step, state, &mut scratch)?;
        rest = later;
    }
}

/// Makes tokens until there is a reason to stop; an iterator over [`Piece`]s.
///
/// The texts of all pieces make up the whole text. After an error there are no more pieces.
///
/// ```no_run
/// use foveal_lm::generate::{Generator, Options, prompt_tokens};
/// use foveal_lm::{Model, tokenizer::Tokenizer, weights::{Description, Weights}};
///
/// let weights = Weights::open("model.gguf".as_ref())?;
/// let model = Model::new(&weights)?;
/// let Description::Gguf(metadata) = weights.description() else { return Ok(()) };
/// let tokenizer = Tokenizer::from_gguf(metadata)?;
///
/// let prompt = prompt_tokens(&tokenizer, "Alice was beginning to")?;
/// let options = Options { max_tokens: 100, ..Options::default() };
/// let mut state = model.state()?;
/// for piece in Generator::new(&model, &tokenizer, &mut state, &prompt, &options)? {
///     print!("{}", piece?.text);
/// }
/// # Ok::<(), foveal_lm::Error>(())
/// ```
#[derive(Debug)]
pub struct Generator<'a> {
    model: &'a Model,
    state: &'a mut State,
    scratch: Scratch,
    writing: Writing<'a>,
    /// Chosen, but not yet seen by the model.
    pending: Option<u32>,
    failed: bool,
}

impl<'a> Generator<'a> {
    /// Lets the model read what is new of `prompt` and gets ready to go on. `state` may hold earlier tokens of the same text,
    /// and goes on to hold this one's.
    ///
    /// # Errors
    ///
    /// [`Error::EmptyPrompt`], [`Error::Sampling`], and those of [`Model::forward`].
    pub fn new<'p>(
        model: &'a Model,
        tokenizer: &'a Tokenizer,
        state: &'a mut State,
        prompt: impl Into<Prompt<'p>>,
        options: &Options,
    ) -> Result<Generator<'a>, Error> {
        let prompt = prompt.into();
        let writing = Writing::new(tokenizer, prompt, options)?;
        let mut scratch = Scratch::new();
        model.forward(prompt.new, Step::PROMPT, state, &mut scratch)?;
        Ok(Generator { model, state, scratch, writing, pending: None, failed: false })
    }

    /// Why the text ended; `None` while it goes on, and after an error.
    pub fn stopped(&self) -> Option<StopReason> {
        self.writing.stopped()
    }

    /// What the model holds of the text.
    pub fn state(&self) -> &State {
        self.state
    }

    fn step(&mut self) -> Result<Piece, Error> {
        if let Some(token) = self.pending.take() {
            self.model.forward(&[token], Step::GENERATED, self.state, &mut self.scratch)?;
        }
        let piece = self.writing.next(self.scratch.logits())?;
        self.pending = Some(piece.token);
        Ok(piece)
    }
}

impl Iterator for Generator<'_> {
    type Item = Result<Piece, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed || self.stopped().is_some() {
            return None;
        }
        let piece = self.step();
        self.failed = piece.is_err();
        Some(piece)
    }
}

impl std::iter::FusedIterator for Generator<'_> {}
