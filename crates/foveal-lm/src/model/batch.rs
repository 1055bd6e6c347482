//! The next token of many texts in one call.
//!
//! ```text
//! x = scale · embedding[tokens], one row a text      x ← blockᵢ(x)      logits = cap(head(norm(x)))
//! ```
//!
//! Weights are read once for all texts, and attention of a layer gets the states of all texts. A text's row has the same
//! bits as it has alone: row kernels add in one order, whatever the number of rows. (Continuous batching: Yu et al. 2022,
//! "Orca", OSDI.)

use foveal::{MAX_GENERATED_ROWS, Phase};

use super::{Model, Scratch, State, Step};
use crate::Error;
use crate::linear::Run;
use crate::mixer::{CacheOptions, Demand, Keep, LayerState, Pages};

/// The states of texts that go on together. A text joins and leaves between any two calls.
#[derive(Debug, Default)]
pub struct Batch {
    /// For each layer, the states of all texts.
    layers: Vec<Vec<LayerState>>,
    positions: Vec<usize>,
    options: Vec<CacheOptions>,
    /// Where all take their pages from, if they do.
    pages: Option<Pages>,
}

impl Batch {
    /// No texts.
    pub fn new() -> Batch {
        Batch::default()
    }

    /// How many texts there are.
    pub fn len(&self) -> usize {
        self.positions.len()
    }

    /// Whether there are no texts.
    pub fn is_empty(&self) -> bool {
        self.positions.is_empty()
    }

    /// Tokens that the model has read of a text: `None` if there are not so many texts.
    pub fn position(&self, text: usize) -> Option<usize> {
        self.positions.get(text).copied()
    }

    /// Takes in a text, as the last.
    ///
    /// # Errors
    ///
    /// [`Error::State`] for a state of another model than the others', [`Error::BatchReach`] for one whose tokens see
    /// another number of tokens, [`Error::BatchKeep`] for one that gives up keys by itself, [`Error::BatchPages`] for one that
    /// takes its pages from elsewhere.
    pub fn join(&mut self, state: State) -> Result<(), Error> {
        let found = state.layers.len();
        if self.layers.is_empty() {
            self.layers.resize_with(found, Vec::new);
        }
        if self.layers.len() != found {
            return Err(Error::State { expected: self.layers.len(), found });
        }
        if state.options.keep != Keep::All {
            return Err(Error::BatchKeep);
        }
        let same = match (&state.pages, &self.pages) {
            (Some(a), Some(b)) => a.is(b),
            (a, b) => a.is_none() && b.is_none(),
        };
        if !same && !self.is_empty() {
            return Err(Error::BatchPages);
        }
        let reach = |layer: &LayerState| layer.sight().and_then(|(_, reach)| reach);
        for (texts, layer) in self.layers.iter().zip(&state.layers) {
            let (found, expected) = (reach(layer), reach(texts.first().unwrap_or(layer)));
            if found != expected {
                return Err(Error::BatchReach { found, expected });
            }
        }
        for (texts, layer) in self.layers.iter_mut().zip(state.layers) {
            texts.push(layer);
        }
        self.positions.push(state.position);
        self.pages = state.pages;
        self.options.push(state.options);
        Ok(())
    }

    /// Gives a text's state back; the last text takes its place. `None` if there are not so many texts.
    pub fn leave(&mut self, text: usize) -> Option<State> {
        if text >= self.len() {
            return None;
        }
        let position = self.positions.swap_remove(text);
        let layers = self.layers.iter_mut().map(|texts| texts.swap_remove(text)).collect();
        let options = self.options.swap_remove(text);
        Some(State { layers, position, options, pages: self.pages.clone() })
    }

    /// Bytes of the keys and values that are held.
    pub fn kv_bytes(&self) -> usize {
        self.layers.iter().flatten().map(LayerState::bytes).sum()
    }

    /// Pages that the next token of every text takes.
    pub(crate) fn needed(&self) -> Option<(&Pages, Demand)> {
        let pages = self.pages.as_ref()?;
        Some((pages, pages.needed(&self.layers, 1)))
    }
}

impl Model {
    /// Reads a generated token of each text of a batch, and leaves the logits of all texts in `scratch`, in their order.
    ///
    /// Every text gets the bits that [`Model::forward`] gives with [`Step::GENERATED`], whatever the other texts are.
    ///
    /// # Errors
    ///
    /// [`Error::TooManyTokens`] for more than 64 texts, [`Error::BatchTokens`] unless there is one token for each,
    /// [`Error::Token`], [`Error::State`] and [`Error::Kernel`] with [`OutOfPages`](foveal::Error::OutOfPages); nothing has
    /// changed then.
    pub fn forward_batch(
        &self,
        tokens: &[u32],
        batch: &mut Batch,
        scratch: &mut Scratch,
    ) -> Result<(), Error> {
        let (expected, found) = (batch.len(), tokens.len());
        if found != expected {
            return Err(Error::BatchTokens { found, expected });
        }
        self.check(tokens, Step::GENERATED, batch.layers.len())?;
        scratch.logits.clear();
        if batch.is_empty() {
            return Ok(());
        }
        if let Some((pages, needed)) = batch.needed() {
            pages.has_free(&needed)?;
        }
        self.embed(tokens, &mut scratch.x)?;
        scratch.activations.set_positions(&self.ropes, &batch.positions, None)?;
        let (phase, workspace) = (Phase::Generated, &mut scratch.workspace);
        let mut run = Run { cpu: self.cpu, phase, activations: self.activations, workspace };
        for (block, states) in self.blocks.iter().zip(&mut batch.layers) {
            block.forward(&mut scratch.x, states, &mut scratch.activations, &mut run)?;
        }
        batch.positions.iter_mut().for_each(|position| *position += 1);
        self.append_logits(tokens.len(), scratch)
    }
}

/// The most texts of a batch.
pub const MAX_TEXTS: usize = MAX_GENERATED_ROWS;
