//! Many texts at once: texts join and leave a batch between any two tokens (Yu et al. 2022, "Orca", OSDI).
//!
//! ```text
//! step:  one token of every text that has its prompt      then read at most CHUNK tokens of prompts
//! ```
//!
//! So a long prompt holds the others up for one chunk at a time, and short prompts pass it. A text's tokens are those that it has alone: they depend
//! on its prompt, options and seed, and not on when it came or what ran beside it. Keys and values lie in pages, and what a
//! prompt has in common with an earlier one is read once, as is what prompts in hand have in common, if it is worth the wait
//! (32 tokens). A text begins when there are pages for all that it may become:
//! none runs out of them half way. (Codes of a few bits, and what mixers keep that are named in
//! the configuration, lie in memory of each text's own.)

mod reading;

use std::collections::VecDeque;

use super::prefixes::Prefixes;
use super::writing::Writing;
use super::{Options, Piece, Prompt, StopReason};
use crate::Error;
use crate::mixer::{CacheOptions, Demand, Keep, Pages};
use crate::model::{Batch, CHUNK, Logits, MAX_TEXTS, Model, Scratch, State, Step};
use crate::tokenizer::Tokenizer;
use reading::Reading;

/// A text to be made.
#[derive(Clone, Debug)]
pub struct Request {
    /// The tokens to continue.
    pub prompt: Vec<u32>,
    /// When to stop, and how to choose.
    pub options: Options,
}

/// A text that is done.
#[derive(Debug)]
pub struct Finished {
    /// The number that [`Batcher::push`] gave it.
    pub id: usize,
    /// Tokens of its prompt that needed no reading.
    pub shared: usize,
    /// Its tokens, and the text that they make.
    pub text: Result<Text, Error>,
}

/// What a request gave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Text {
    /// The tokens that were made.
    pub tokens: Vec<u32>,
    /// Their text, as far as it belongs to the result.
    pub text: String,
    /// Why it ended.
    pub stopped: StopReason,
}

/// How texts go on together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchOptions {
    /// How many at most, 1 to [`MAX_TEXTS`].
    pub parallel: usize,
    /// How keys and values are kept; all of them.
    pub cache: CacheOptions,
    /// For how many tokens there are pages, in every layer; `None` for as many as `parallel` texts can have. Codes of a few
    /// bits do not count.
    pub pool: Option<usize>,
}

impl Default for BatchOptions {
    fn default() -> BatchOptions {
        BatchOptions { parallel: 16, cache: CacheOptions::default(), pool: None }
    }
}

/// Makes many texts, a step at a time.
///
/// ```no_run
/// use foveal_lm::generate::{BatchOptions, Batcher, Options, Request, prompt_tokens};
/// use foveal_lm::{Model, tokenizer::Tokenizer};
///
/// # fn make(model: &Model, tokenizer: &Tokenizer) -> Result<(), foveal_lm::Error> {
/// let mut batcher = Batcher::new(model, tokenizer, &BatchOptions::default())?;
/// for text in ["Once upon a time", "The capital of France is"] {
///     let options = Options { max_tokens: 100, ..Options::default() };
///     batcher.push(Request { prompt: prompt_tokens(tokenizer, text)?, options });
/// }
/// while !batcher.is_idle() {
///     for finished in batcher.step()? {
///         println!("{}: {}", finished.id, finished.text?.text);
///     }
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Batcher<'a> {
    model: &'a Model,
    tokenizer: &'a Tokenizer,
    options: BatchOptions,
    pushed: usize,
    waiting: VecDeque<(usize, Request)>,
    /// In the order in which they came.
    readings: Vec<Reading<'a>>,
    /// The texts of `batch`, in its order.
    running: Vec<Running<'a>>,
    batch: Batch,
    pages: Option<Pages>,
    /// The most pages that the texts on their way will hold.
    promised: Demand,
    prefixes: Prefixes,
    shared: usize,
    scratch: Scratch,
}

/// A text that goes on.
#[derive(Debug)]
struct Running<'a> {
    id: usize,
    shared: usize,
    writing: Writing<'a>,
    tokens: Vec<u32>,
    text: String,
    /// The most pages that it will hold.
    promised: Demand,
}

/// Sees each token of each text as it is made, with the text's number.
type Watch<'w> = dyn FnMut(usize, &Piece) + 'w;

impl Running<'_> {
    /// Chooses a token and shows it; whether the text goes on.
    fn next(&mut self, logits: &[f32], watch: &mut Watch<'_>) -> Result<bool, Error> {
        let piece = self.writing.next(logits)?;
        watch(self.id, &piece);
        self.tokens.push(piece.token);
        self.text.push_str(&piece.text);
        Ok(self.writing.stopped().is_none())
    }

    fn finish(self) -> Finished {
        let stopped = self.writing.stopped().unwrap_or(StopReason::MaxTokens);
        let text = Text { tokens: self.tokens, text: self.text, stopped };
        Finished { id: self.id, shared: self.shared, text: Ok(text) }
    }
}

impl<'a> Batcher<'a> {
    /// No texts yet.
    ///
    /// # Errors
    ///
    /// [`Error::CacheOptions`]; [`Error::BatchKeep`] for states that give up keys of their own choice, which a batch does
    /// not take.
    pub fn new(
        model: &'a Model,
        tokenizer: &'a Tokenizer,
        options: &BatchOptions,
    ) -> Result<Batcher<'a>, Error> {
        let parallel = options.parallel.clamp(1, MAX_TEXTS);
        let BatchOptions { cache, pool, .. } = *options;
        if cache.keep != Keep::All {
            return Err(Error::BatchKeep);
        }
        let context = cache.context.unwrap_or(model.config().context);
        // A text whose context is full holds the chunk being read and what is partly seen as well.
        let most = context.saturating_add(3 * CHUNK);
        let tokens = pool.unwrap_or(parallel.saturating_mul(most));
        let paged = model.takes_pages() && !cache.storage.coded();
        let pages = paged.then(|| model.pages(&cache, tokens)).transpose()?;
        Ok(Batcher {
            model,
            tokenizer,
            options: BatchOptions { parallel, ..*options },
            pushed: 0,
            waiting: VecDeque::new(),
            readings: vec![],
            running: vec![],
            batch: Batch::new(),
            pages,
            promised: Demand::default(),
            prefixes: Prefixes::new(parallel),
            shared: 0,
            scratch: Scratch::new(),
        })
    }

    /// Queues a request and returns its number, from 0.
    pub fn push(&mut self, request: Request) -> usize {
        self.waiting.push_back((self.pushed, request));
        self.pushed += 1;
        self.pushed - 1
    }

    /// Requests of which nothing has been read yet.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Texts whose prompts are being read.
    pub fn reading(&self) -> usize {
        self.readings.len()
    }

    /// Texts that go on, with their prompts read.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Whether there is nothing to do.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.readings.is_empty() && self.running.is_empty()
    }

    /// Tokens of prompts that needed no reading, because an earlier prompt began with them too.
    pub fn shared(&self) -> usize {
        self.shared
    }

    /// The pages of the keys and values; `None` if each text keeps its own.
    pub fn pages(&self) -> Option<&Pages> {
        self.pages.as_ref()
    }

    /// Bytes of the keys and values of the texts on their way, each counted for itself.
    pub fn kv_bytes(&self) -> usize {
        let reading = self.readings.iter().map(|reading| reading.state.kv_bytes());
        reading.sum::<usize>() + self.batch.kv_bytes()
    }

    /// Takes a request back, whatever has become of it: what it holds is free at once, and it gets no result. `false` if it
    /// has ended already.
    pub fn cancel(&mut self, id: usize) -> bool {
        if let Some(at) = self.waiting.iter().position(|(waiting, _)| *waiting == id) {
            self.waiting.remove(at);
            return true;
        }
        if let Some(at) = self.readings.iter().position(|reading| reading.running.id == id) {
            let Reading { running, .. } = self.readings.remove(at);
            self.promised.remove(&running.promised);
            return true;
        }
        let Some(at) = self.running.iter().position(|running| running.id == id) else {
            return false;
        };
        let running = self.running.swap_remove(at);
        self.batch.leave(at);
        self.promised.remove(&running.promised);
        true
    }

    /// [`Batcher::step_with`], without looking at tokens.
    ///
    /// # Errors
    ///
    /// Those of [`Batcher::step_with`].
    pub fn step(&mut self) -> Result<Vec<Finished>, Error> {
        self.step_with(&mut |_, _| {})
    }

    /// Makes one token of every text that goes on, and reads a piece of what waits. `watch` sees each token as it is made,
    /// with the number of its text. What went wrong with one text is that text's result.
    ///
    /// # Errors
    ///
    /// [`Error::CacheOptions`]; [`Error::Kernel`] and [`Error::KeyValue`] when the whole batch cannot go on.
    pub fn step_with(&mut self, watch: &mut Watch<'_>) -> Result<Vec<Finished>, Error> {
        let mut finished = vec![];
        self.write(&mut finished, watch)?;
        let mut left = CHUNK;
        while left > 0 && self.take_waiting(&mut finished)? {
            left -= self.read(left, &mut finished, watch)?;
        }
        Ok(finished)
    }

    /// Begins what waits, as far as there are places for texts and pages for what they may become; whether there are prompts
    /// to read.
    fn take_waiting(&mut self, finished: &mut Vec<Finished>) -> Result<bool, Error> {
        let mut at = 0;
        while self.running.len() + self.readings.len() < self.options.parallel {
            let Some((_, request)) = self.waiting.get(at) else { break };
            if self.about_to_share(&request.prompt) {
                at += 1;
                continue;
            }
            if !self.fits(request) {
                break;
            }
            let Some((id, request)) = self.waiting.remove(at) else { break };
            match self.begin(id, request)? {
                Ok(reading) if reading.running.writing.stopped().is_some() => {
                    finished.push(self.end(reading.running, None));
                }
                Ok(reading) => self.readings.push(reading),
                Err(error) => finished.push(Finished { id, shared: 0, text: Err(error) }),
            }
        }
        Ok(!self.readings.is_empty())
    }

    /// Whether a prompt in hand is about to read what this one begins with.
    fn about_to_share(&self, prompt: &[u32]) -> bool {
        let common = reading::about_to_share(&self.readings, prompt);
        let Some(common) = common.filter(|_| self.pages.is_some()) else { return false };
        common >= self.prefixes.known(self.model, prompt) + reading::WORTH
    }

    /// The most pages that a text will hold.
    fn most(&self, request: &Request) -> Demand {
        let tokens = request.prompt.len().saturating_add(request.options.max_tokens);
        self.pages.as_ref().map_or_else(Demand::default, |pages| pages.most(tokens))
    }

    /// Whether a text may begin now: whether its pages are promised to no other, or it could never begin.
    fn fits(&self, request: &Request) -> bool {
        let Some(pages) = &self.pages else { return true };
        let alone = self.most(request);
        let mut all = self.promised.clone();
        all.add(&alone);
        pages.could_hold(&all).is_ok() || pages.could_hold(&alone).is_err()
    }

    /// The inner error is the request's.
    fn begin(&mut self, id: usize, request: Request) -> Result<Result<Reading<'a>, Error>, Error> {
        let promised = self.most(&request);
        let Request { prompt, options } = request;
        let vocab = self.model.config().vocab;
        if let Some(&found) = prompt.iter().find(|&&token| token as usize >= vocab) {
            return Ok(Err(Error::Token { found, vocab }));
        }
        if let Some(Err(error)) = self.pages.as_ref().map(|pages| pages.could_hold(&promised)) {
            return Ok(Err(error));
        }
        let writing = match Writing::new(self.tokenizer, Prompt::from(&prompt), &options) {
            Ok(writing) => writing,
            Err(error) => return Ok(Err(error)),
        };
        let state = self.first_state(&prompt)?;
        let shared = state.position();
        self.shared += shared;
        self.promised.add(&promised);
        let (tokens, text) = (vec![], String::new());
        let running = Running { id, shared, writing, tokens, text, promised };
        Ok(Ok(Reading { running, prompt, state }))
    }

    /// A state of as many of the first tokens of `prompt` as have been read, by whomever.
    fn first_state(&mut self, prompt: &[u32]) -> Result<State, Error> {
        let known = self.prefixes.known(self.model, prompt);
        if let Some(state) = reading::share(&self.readings, (self.model, prompt), known) {
            return Ok(state);
        }
        match (self.prefixes.longest(self.model, prompt), &self.pages) {
            (Some(state), _) => Ok(state),
            (None, Some(pages)) => self.model.state_in(pages),
            (None, None) => self.model.state_with(&self.options.cache),
        }
    }

    /// The result of a text that has ended, or failed; its pages are promised no more.
    fn end(&mut self, running: Running<'_>, failed: Option<Error>) -> Finished {
        self.promised.remove(&running.promised);
        match failed {
            None => running.finish(),
            Some(error) => Finished { id: running.id, shared: running.shared, text: Err(error) },
        }
    }

    /// Reads at most `left` tokens of a prompt in hand, and says how many; with its last one, the text goes on.
    fn read(
        &mut self,
        left: usize,
        finished: &mut Vec<Finished>,
        watch: &mut Watch<'_>,
    ) -> Result<usize, Error> {
        let (at, most) = reading::next(&self.readings, left);
        let Reading { prompt, state, .. } = &mut self.readings[at];
        let done = state.position();
        let end = prompt.len().min(done + most);
        let last = end == prompt.len();
        let logits = if last { Logits::Last } else { Logits::None };
        let step = Step { logits, ..Step::PROMPT };
        if let Some((pages, needed)) = state.needed(end - done) {
            self.prefixes.make_room(pages, &needed);
        }
        let forward = self.model.forward(&prompt[done..end], step, state, &mut self.scratch);
        if let Err(error) = forward {
            let running = self.readings.remove(at).running;
            finished.push(self.end(running, Some(error)));
        } else if last {
            let reading = self.readings.remove(at);
            self.go_on(reading, finished, watch)?;
        }
        Ok(end - done)
    }

    /// A prompt has been read: its text gets its first token, and goes on.
    fn go_on(
        &mut self,
        reading: Reading<'a>,
        finished: &mut Vec<Finished>,
        watch: &mut Watch<'_>,
    ) -> Result<(), Error> {
        let Reading { mut running, prompt, state } = reading;
        self.prefixes.keep(self.model, prompt, &state);
        match running.next(self.scratch.logits(), watch) {
            Ok(true) => {
                self.batch.join(state)?;
                self.running.push(running);
            }
            Ok(false) => finished.push(self.end(running, None)),
            Err(error) => finished.push(self.end(running, Some(error))),
        }
        Ok(())
    }

    /// One token of every text that goes on.
    fn write(&mut self, finished: &mut Vec<Finished>, watch: &mut Watch<'_>) -> Result<(), Error> {
        let last = |running: &Running<'_>| running.tokens.last().copied().unwrap_or(0);
        let tokens: Vec<u32> = self.running.iter().map(last).collect();
        if let Some((pages, needed)) = self.batch.needed() {
            self.prefixes.make_room(pages, &needed);
        }
        self.model.forward_batch(&tokens, &mut self.batch, &mut self.scratch)?;
        let vocab = self.model.config().vocab;
        // From the last: a text that leaves has the last one take its place.
        for text in (0..self.running.len()).rev() {
            let logits = &self.scratch.logits()[text * vocab..][..vocab];
            let goes_on = self.running[text].next(logits, watch);
            if matches!(goes_on, Ok(true)) {
                continue;
            }
            let running = self.running.swap_remove(text);
            self.batch.leave(text);
            finished.push(self.end(running, goes_on.err()));
        }
        Ok(())
    }
}
