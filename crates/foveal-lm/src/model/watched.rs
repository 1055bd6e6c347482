//! Reading with someone who watches: the logits of every token, the attention of every layer; and the way back.
//!
//! All of it computes what [`Model::forward`] computes, to the same bits.

use std::ops::Range;

use foveal::{Phase, Workspace};

use super::{Model, Scratch, State, Step};
use crate::Error;
use crate::linear::Run;
use crate::mixer::{Asked, Attended, CacheOptions, Keep, Trace, Weigher};

/// Rows of logits that are there at a time where each token's are looked at.
const VISITED_ROWS: usize = 16;

/// Whoever looks at a model's attention while it reads; see [`Model::forward_observed`].
pub trait Observer {
    /// A layer has just mixed the tokens of a chunk.
    ///
    /// # Errors
    ///
    /// Whatever shall end the reading, such as those of [`Attended`].
    fn attention(&mut self, layer: usize, attended: &Attended<'_>) -> Result<(), Error>;
}

/// Who watches a chunk being read.
pub(super) enum Watch<'w, 'o> {
    Nobody,
    Observer(&'w mut (dyn Observer + 'o)),
    /// What each layer is given is kept.
    Traces(&'w mut [Trace]),
}

impl Model {
    /// Whether weights are made of what layers were given, [`Model::forward_traced`], instead of shown to an [`Observer`].
    pub(crate) fn traced(&self) -> bool {
        self.blocks.iter().any(|block| block.mixer.traced())
    }

    /// Reads a prompt as [`Model::forward`] does, to the same bits, and keeps what each layer is given.
    pub(crate) fn forward_traced(
        &self,
        tokens: &[u32],
        state: &mut State,
        scratch: &mut Scratch,
        traces: &mut Vec<Trace>,
    ) -> Result<(), Error> {
        self.check(tokens, Step::PROMPT, state.layers.len())?;
        traces.resize_with(self.blocks.len(), Trace::default);
        self.watch(tokens, (state, scratch), |model, chunk, both| {
            model.run_chunk(chunk, Phase::Prompt, both, Watch::Traces(traces))
        })
    }

    /// Hands over the weights of some queries of a layer, which was given what is in the trace; nothing of a layer that an
    /// observer is shown.
    pub(crate) fn weigh(
        &self,
        (layer, trace): (usize, &Trace),
        rows: Range<usize>,
        options: &CacheOptions,
        weigher: &mut dyn Weigher,
    ) -> Result<(), Error> {
        let (cpu, phase) = (self.cpu, Phase::Prompt);
        let mut run =
            Run { cpu, phase, activations: self.activations, workspace: &mut Workspace::new() };
        let reach = self.config.reach_within(&self.config.layers[layer], options.context);
        let asked = Asked { trace, rows, ropes: &self.ropes, reach };
        self.blocks[layer].mixer.weigh(&asked, weigher, &mut run)
    }

    /// For each section of a layer its heads, and whether its weights are those of a recurrence.
    pub(crate) fn kinds(&self, layer: usize) -> Vec<(usize, bool)> {
        self.blocks[layer].mixer.kinds()
    }

    /// Reads a prompt chunk by chunk, and makes the logits of its last token.
    fn watch(
        &self,
        tokens: &[u32],
        (state, scratch): (&mut State, &mut Scratch),
        mut run: impl FnMut(&Model, &[u32], (&mut State, &mut Scratch)) -> Result<(), Error>,
    ) -> Result<(), Error> {
        scratch.logits.clear();
        let mut rest = tokens;
        while !rest.is_empty() {
            let room = state.room(Phase::Prompt);
            let (chunk, later) = rest.split_at(room.min(rest.len()));
            run(self, chunk, (state, scratch))?;
            rest = later;
        }
        self.append_logits(usize::from(!tokens.is_empty()), scratch)
    }

    /// Reads a prompt as [`Model::forward`] does, to the same bits, and shows each layer's attention to `observer`, chunk by
    /// chunk. What is not asked for costs nothing but a number for each token and head.
    ///
    /// # Errors
    ///
    /// Those of [`Model::forward`], [`Error::ObservedKeep`]; [`Error::ObservedMixer`] for latent attention and mixers that are named in the
    /// configuration, whose weights a [`Look`](crate::look::Look) makes; those of `observer`, after which the state must be reset.
    pub fn forward_observed(
        &self,
        tokens: &[u32],
        state: &mut State,
        scratch: &mut Scratch,
        observer: &mut dyn Observer,
    ) -> Result<(), Error> {
        self.check(tokens, Step::PROMPT, state.layers.len())?;
        if state.options.keep != Keep::All {
            return Err(Error::ObservedKeep);
        }
        if self.traced() {
            return Err(Error::ObservedMixer);
        }
        scratch.activations.observe(true);
        let done = self.watch(tokens, (state, scratch), |model, chunk, both| {
            model.run_chunk(chunk, Phase::Prompt, both, Watch::Observer(&mut *observer))
        });
        scratch.activations.observe(false);
        done
    }

    /// Reads the tokens of a prompt as [`Model::forward`] does, and gives the logits of every one of them to `visit`, with
    /// its place among `tokens`. Memory stays that of a few rows of logits, however many tokens there are.
    ///
    /// # Errors
    ///
    /// Those of [`Model::forward`].
    pub fn forward_each(
        &self,
        tokens: &[u32],
        state: &mut State,
        scratch: &mut Scratch,
        visit: &mut dyn FnMut(usize, &mut [f32]),
    ) -> Result<(), Error> {
        self.check(tokens, Step::PROMPT, state.layers.len())?;
        let (width, vocab) = (self.config.width, self.config.vocab);
        let mut rest = tokens;
        while !rest.is_empty() {
            let room = state.room(Phase::Prompt);
            let (chunk, later) = rest.split_at(room.min(rest.len()));
            self.forward_chunk(chunk, Phase::Prompt, state, scratch)?;
            let first = tokens.len() - rest.len();
            let x = std::mem::take(&mut scratch.x);
            for (n, rows) in x.chunks(VISITED_ROWS * width).enumerate() {
                scratch.logits.clear();
                self.project_logits(rows, scratch)?;
                for (row, logits) in scratch.logits.chunks_exact_mut(vocab).enumerate() {
                    visit(first + n * VISITED_ROWS + row, logits);
                }
            }
            scratch.x = x;
            rest = later;
        }
        scratch.logits.clear();
        Ok(())
    }

    /// Whether every layer still holds what the token at `position` would see.
    pub(super) fn can_rewind(&self, state: &State, position: usize) -> bool {
        let mut layers = self.blocks.iter().zip(&state.layers);
        layers.all(|(block, layer)| layer.can_rewind(block.mixer.reach(), position))
    }

    /// Takes `state` back to where it had read its first `position` tokens, if what it holds allows that: codes of a few
    /// bits, and what a window has left behind, can't be brought back. `false` if it doesn't; nothing has changed then.
    pub fn rewind(&self, state: &mut State, position: usize) -> bool {
        if position == 0 {
            state.reset();
        }
        if position >= state.position {
            return position == state.position;
        }
        if !self.can_rewind(state, position) {
            return false;
        }
        state.layers.iter_mut().for_each(|layer| layer.rewind(position));
        state.position = position;
        true
    }
}
