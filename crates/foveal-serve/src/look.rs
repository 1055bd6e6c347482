//! Looks that are kept for the page, and the work for them between the steps of texts.
//!
//! A look is read a chunk of 256 tokens at a time, a row of weights is one token's work, and a text that goes on makes one
//! token at a time: none of it holds others up for longer. Where weights are made of what layers were given, a layer is a bit of
//! work. The newest few looks are kept.

use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use foveal_lm::Error;
use foveal_lm::look::{Looking, Weights};
use foveal_lm::mixer::CacheOptions;
use foveal_lm::sample::{Sampler, Sampling};
use tokio::sync::{mpsc, oneshot};

use crate::Served;
use crate::engine::Aside;

/// Looks that are kept.
const KEPT: usize = 3;
/// The longest text, in tokens.
pub(crate) const LONGEST: usize = 4096;
/// The most tokens that a text goes on with.
pub(crate) const MORE: usize = 256;
/// Cells of a map's side.
pub(crate) const CELLS: usize = 32;

/// A look that several requests use.
pub(crate) type Shared = Arc<Mutex<Looking>>;

/// What a panic has left is used by nobody: locks of others' faults are taken over.
fn lock(look: &Mutex<Looking>) -> MutexGuard<'_, Looking> {
    look.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The newest looks, by number.
#[derive(Default)]
pub(crate) struct Looks(Mutex<VecDeque<(u64, Shared)>>);

impl Looks {
    fn all(&self) -> MutexGuard<'_, VecDeque<(u64, Shared)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn keep(&self, id: u64, look: Shared) {
        let mut all = self.all();
        all.push_back((id, look));
        if all.len() > KEPT {
            all.pop_front();
        }
    }

    pub(crate) fn get(&self, id: u64) -> Option<Shared> {
        let all = self.all();
        all.iter().find(|(found, _)| *found == id).map(|(_, look)| look.clone())
    }
}

/// Reads a text.
pub(crate) struct Reading {
    /// Those of a text that is not begun yet.
    tokens: Vec<u32>,
    options: CacheOptions,
    look: Option<Looking>,
    done: Option<oneshot::Sender<Result<Shared, Error>>>,
}

impl Reading {
    /// Of a text each of whose tokens sees `context` tokens, or as many as the model was trained with.
    pub(crate) fn new(
        tokens: Vec<u32>,
        context: Option<usize>,
    ) -> (Reading, oneshot::Receiver<Result<Shared, Error>>) {
        let (done, receiver) = oneshot::channel();
        let options = CacheOptions { context, ..CacheOptions::default() };
        (Reading { tokens, options, look: None, done: Some(done) }, receiver)
    }

    fn go_on(&mut self, served: &Served) -> Result<bool, Error> {
        let mut look = match self.look.take() {
            Some(look) => look,
            None => {
                let tokens = std::mem::take(&mut self.tokens);
                Looking::new(&served.model, tokens, (CELLS, MORE), &self.options)?
            }
        };
        let more = look.step(&served.model)?;
        self.look = Some(look);
        Ok(more)
    }
}

impl Aside for Reading {
    fn step(&mut self, served: &Served) -> ControlFlow<()> {
        if self.done.as_ref().is_none_or(oneshot::Sender::is_closed) {
            return ControlFlow::Break(());
        }
        let result = match self.go_on(served) {
            Ok(true) => return ControlFlow::Continue(()),
            Ok(false) => self.look.take().map(|look| Ok(Arc::new(Mutex::new(look)))),
            Err(error) => Some(Err(error)),
        };
        if let (Some(done), Some(result)) = (self.done.take(), result) {
            // Whoever asked may be gone.
            let _ = done.send(result);
        }
        ControlFlow::Break(())
    }
}

/// The weights of one token: it is read again, or they are made layer by layer.
pub(crate) struct Row {
    look: Shared,
    position: usize,
    layer: Option<usize>,
    /// Of the layers that are done, where all are asked for one by one.
    made: Weights,
    done: Option<oneshot::Sender<Result<Weights, Error>>>,
}

impl Row {
    pub(crate) fn new(
        look: Shared,
        position: usize,
        layer: Option<usize>,
    ) -> (Row, oneshot::Receiver<Result<Weights, Error>>) {
        let (done, receiver) = oneshot::channel();
        (Row { look, position, layer, made: Weights::default(), done: Some(done) }, receiver)
    }

    /// `None` while there are more layers.
    fn go_on(&mut self, served: &Served) -> Result<Option<Weights>, Error> {
        let (look, model) = (lock(&self.look), &served.model);
        if self.layer.is_some() || !look.is_made_by_layer() {
            return look.row(model, self.position, self.layer).map(Some);
        }
        let n = self.made.layers.len();
        let mut next = look.row(model, self.position, Some(n))?;
        self.made.keys = next.keys.clone();
        self.made.layers.extend(next.layers.drain(..).nth(n));
        self.made.recalled.extend(next.recalled.drain(..).nth(n));
        let all = n + 1 >= model.config().layers.len();
        Ok(all.then(|| std::mem::take(&mut self.made)))
    }
}

impl Aside for Row {
    fn step(&mut self, served: &Served) -> ControlFlow<()> {
        if self.done.as_ref().is_none_or(oneshot::Sender::is_closed) {
            return ControlFlow::Break(());
        }
        let Some(row) = self.go_on(served).transpose() else { return ControlFlow::Continue(()) };
        if let Some(done) = self.done.take() {
            let _ = done.send(row);
        }
        ControlFlow::Break(())
    }
}

/// A token that a look's text went on with.
pub(crate) struct Newest {
    pub(crate) token: u32,
    pub(crate) position: usize,
    pub(crate) weights: Weights,
}

/// Goes on with a text, most probable token by most probable token.
pub(crate) struct Continuing {
    look: Shared,
    left: usize,
    layer: Option<usize>,
    sampler: Sampler,
    events: mpsc::UnboundedSender<Result<Newest, Error>>,
}

/// Where the tokens of a text that goes on arrive.
pub(crate) type Tokens = mpsc::UnboundedReceiver<Result<Newest, Error>>;

impl Continuing {
    pub(crate) fn new(
        look: Shared,
        tokens: usize,
        layer: Option<usize>,
    ) -> Result<(Continuing, Tokens), Error> {
        let (events, receiver) = mpsc::unbounded_channel();
        let sampler = Sampler::new(Sampling::greedy())?;
        Ok((Continuing { look, left: tokens, layer, sampler, events }, receiver))
    }

    fn next(&mut self, served: &Served) -> Result<Option<Newest>, Error> {
        let mut look = lock(&self.look);
        let position = look.tokens().len();
        if self.left == 0 || position >= LONGEST + MORE {
            return Ok(None);
        }
        self.left -= 1;
        let token = self.sampler.sample(look.logits())?;
        if served.tokenizer.is_end(token) {
            return Ok(None);
        }
        let weights = look.append(&served.model, token, self.layer)?;
        Ok(Some(Newest { token, position, weights }))
    }
}

impl Aside for Continuing {
    fn step(&mut self, served: &Served) -> ControlFlow<()> {
        let Some(next) = self.next(served).transpose() else { return ControlFlow::Break(()) };
        let failed = next.is_err();
        // Nobody who waits for it: that is the end.
        match self.events.send(next) {
            Ok(()) if !failed => ControlFlow::Continue(()),
            _ => ControlFlow::Break(()),
        }
    }
}
