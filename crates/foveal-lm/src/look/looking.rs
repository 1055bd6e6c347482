//! A look that is taken a chunk at a time and kept: maps of a whole text, rows of any token when they are asked for, and
//! rows of tokens that the text goes on with.
//!
//! ```text
//! state: keys and values of t₀ … tₙ₋₁, in pages       row i: a fork at i reads tᵢ again, one token's work
//! latent attention, named mixers: what layers were given      row i: made of that, see [`Section`](super::Section)
//! ```

use std::ops::Range;

use super::habits::{self, Habits, Watching};
use super::{Look, Recalled, Wanted, Watcher, made};
use crate::Error;
use crate::mixer::{Attended, CacheOptions, Trace};
use crate::model::{CHUNK, Model, Observer, Scratch, State};

/// A text, what a model holds of it, and what was seen so far.
#[derive(Debug)]
pub struct Looking {
    tokens: Vec<u32>,
    wanted: Wanted,
    sampled: Vec<usize>,
    look: Look,
    habits: Vec<Vec<Habits>>,
    state: State,
    scratch: Scratch,
    /// What each layer was given, where weights are made of that.
    traces: Option<Vec<Trace>>,
    options: CacheOptions,
}

/// The weights of a token under all heads.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Weights {
    /// Positions that they are of; others have 0.
    pub keys: Range<usize>,
    /// For each layer and head, in order; nothing of layers that were not asked for.
    pub layers: Vec<Vec<Vec<f32>>>,
    /// What heads with a memory read of it, likewise.
    pub recalled: Vec<Vec<Option<Recalled>>>,
}

impl Looking {
    /// A look at a text whose maps have `cells` cells a side, with keys and values kept as `options` say; there is room for
    /// `more` tokens behind it.
    ///
    /// # Errors
    ///
    /// [`Error::EmptyPrompt`] without tokens; those of [`Model::pages`].
    pub fn new(
        model: &Model,
        tokens: Vec<u32>,
        (cells, more): (usize, usize),
        options: &CacheOptions,
    ) -> Result<Looking, Error> {
        if tokens.is_empty() {
            return Err(Error::EmptyPrompt);
        }
        let (state, traces) = match model.traced() {
            true => (model.state_with(options)?, Some(vec![])),
            false => {
                let room = tokens.len().saturating_add(more).saturating_add(4 * CHUNK);
                (model.state_in(&model.pages(options, room)?)?, None)
            }
        };
        let wanted = Wanted { cells, rows: vec![], kept: 0 };
        let sampled = habits::rows(tokens.len());
        let (look, habits, scratch) = (Look::default(), vec![], Scratch::new());
        let options = *options;
        Ok(Looking { tokens, wanted, sampled, look, habits, state, scratch, traces, options })
    }

    /// The text.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Tokens that have been read.
    pub fn read(&self) -> usize {
        self.state.position()
    }

    /// The maps, of the text without what was appended.
    pub fn look(&self) -> &Look {
        &self.look
    }

    /// What each layer's heads do, of the same text.
    pub fn habits(&self) -> &[Vec<Habits>] {
        &self.habits
    }

    /// Whether weights are made of what layers were given, each layer for itself: then a row of all of them takes as many times
    /// longer.
    pub fn is_made_by_layer(&self) -> bool {
        self.traces.is_some()
    }

    /// The logits of the token after the last one, once all is read.
    pub fn logits(&self) -> &[f32] {
        self.scratch.logits()
    }

    /// Reads a chunk, or makes a layer's weights; whether there is more.
    ///
    /// # Errors
    ///
    /// Those of [`Model::forward_observed`], after which the look is of no use.
    pub fn step(&mut self, model: &Model) -> Result<bool, Error> {
        if self.traces.is_some() {
            return self.step_traced(model);
        }
        let done = self.state.position();
        let end = self.tokens.len().min(done + CHUNK);
        if done == end {
            return Ok(false);
        }
        let (length, cells) = (self.tokens.len(), self.wanted.cells.min(self.tokens.len()));
        let mut go_on = |_: usize| std::ops::ControlFlow::Continue(());
        let watch = &mut go_on;
        let look = std::mem::take(&mut self.look);
        let habits =
            Watching { tokens: &self.tokens, rows: &self.sampled, habits: &mut self.habits };
        let maps = Watcher { look, wanted: &self.wanted, cells, length, watch };
        let mut both = Both { maps, habits };
        let chunk = &self.tokens[done..end];
        model.forward_observed(chunk, &mut self.state, &mut self.scratch, &mut both)?;
        self.look = both.maps.look;
        Ok(end < length)
    }

    /// The same where weights are made of what layers were given: first all is read, then layer by layer.
    fn step_traced(&mut self, model: &Model) -> Result<bool, Error> {
        let Looking { tokens, state, scratch, look, .. } = self;
        let (Some(traces), done) = (&mut self.traces, state.position()) else { return Ok(false) };
        let (layers, made) = (model.config().layers.len(), look.layers.len());
        if done < tokens.len() && made == 0 {
            let chunk = &tokens[done..tokens.len().min(done + CHUNK)];
            model.forward_traced(chunk, state, scratch, traces)?;
            return Ok(layers > 0);
        }
        if let Some(trace) = traces.get(made) {
            let text = (&tokens[..], &self.wanted, &self.sampled[..]);
            let (layer, habits) = made::layer(model, (made, trace), text, &self.options)?;
            look.layers.push(layer);
            self.habits.push(habits);
        }
        Ok(look.layers.len() < layers)
    }

    /// The weights of the token at `position` in all layers, or in one; read once more, unless they are made of what layers were
    /// given.
    ///
    /// # Errors
    ///
    /// [`Error::Position`] for one that was not read, or that a window has left behind.
    pub fn row(
        &self,
        model: &Model,
        position: usize,
        layer: Option<usize>,
    ) -> Result<Weights, Error> {
        let none = Error::Position { found: position, tokens: self.state.position() };
        if position >= self.state.position() {
            return Err(none);
        }
        if let Some(traces) = &self.traces {
            return self.made(model, traces, (position, layer));
        }
        let Some(mut fork) = self.state.fork(model, position) else { return Err(none) };
        let mut row = Weights::default();
        let token = &self.tokens[position..=position];
        model.forward_observed(token, &mut fork, &mut Scratch::new(), &mut row)?;
        Ok(row)
    }

    fn made(
        &self,
        model: &Model,
        traces: &[Trace],
        (position, layer): (usize, Option<usize>),
    ) -> Result<Weights, Error> {
        let mut weights = Weights { keys: 0..position + 1, ..Weights::default() };
        for (n, trace) in traces.iter().enumerate() {
            let (mut rows, mut recalled) = (vec![], vec![]);
            if layer.is_none_or(|layer| layer == n) {
                let made = made::row(model, (n, trace), position, &self.options)?;
                rows = made.rows.into_iter().flatten().collect();
                recalled = made.recalled.into_iter().flatten().collect();
            }
            weights.layers.push(rows);
            weights.recalled.push(recalled);
        }
        Ok(weights)
    }

    /// Goes on with a token, which takes the next position; its weights in all layers, or in one.
    ///
    /// # Errors
    ///
    /// Those of [`Model::forward_observed`].
    pub fn append(
        &mut self,
        model: &Model,
        token: u32,
        layer: Option<usize>,
    ) -> Result<Weights, Error> {
        if let Some(traces) = &mut self.traces {
            model.forward_traced(&[token], &mut self.state, &mut self.scratch, traces)?;
            self.tokens.push(token);
            return self.row(model, self.tokens.len() - 1, layer);
        }
        let mut row = Weights::default();
        model.forward_observed(&[token], &mut self.state, &mut self.scratch, &mut row)?;
        self.tokens.push(token);
        Ok(row)
    }
}

impl Weights {
    /// The mean of some heads' weights, on positions from 0: of all layers and heads, a layer's, or one head's. Of several heads it
    /// is the mean of magnitudes.
    pub fn mean(&self, layer: Option<usize>, head: Option<usize>) -> Vec<f32> {
        let chosen = |wanted: Option<usize>, n: usize| wanted.is_none_or(|wanted| wanted == n);
        let layers = self.layers.iter().enumerate().filter(|(n, _)| chosen(layer, *n));
        let heads = layers.flat_map(|(_, heads)| heads.iter().enumerate());
        let heads: Vec<_> = heads.filter(|(n, _)| chosen(head, *n)).map(|(_, row)| row).collect();
        let mut mean = vec![0.0; self.keys.end];
        for row in &heads {
            // A layer with a window has fewer keys than others, the newest.
            let from = self.keys.end - row.len();
            let size = |w: f32| if heads.len() > 1 { w.abs() } else { w };
            mean[from..].iter_mut().zip(*row).for_each(|(sum, w)| *sum += size(*w));
        }
        mean.iter_mut().for_each(|sum| *sum /= heads.len().max(1) as f32);
        mean
    }
}

/// The newest token's row of every layer and head.
impl Observer for Weights {
    fn attention(&mut self, _: usize, attended: &Attended<'_>) -> Result<(), Error> {
        let position = attended.queries().end - 1;
        let weights = attended.weights(position..position + 1)?;
        let rows = (0..attended.heads()).map(|h| weights.view().row(0, 0, h).to_vec());
        self.layers.push(rows.collect());
        self.recalled.push(vec![None; attended.heads()]);
        let keys = attended.keys();
        self.keys = self.keys.start.min(keys.start)..keys.end;
        Ok(())
    }
}

struct Both<'a> {
    maps: Watcher<'a>,
    habits: Watching<'a>,
}

impl Observer for Both<'_> {
    fn attention(&mut self, layer: usize, attended: &Attended<'_>) -> Result<(), Error> {
        self.maps.attention(layer, attended)?;
        self.habits.attention(layer, attended)
    }
}
