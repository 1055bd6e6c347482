//! What a layer of attention leaves for its backward pass, and the gradient of its state.

use std::ops::Range;

use foveal::Shape;
use foveal::cache::{KvRows, KvStore, RollingScratch, TILE};
use foveal::position::RopeTable;

use super::{Inputs, MultiHeadAttention, Source};
use crate::Error;
use crate::mixer::{CacheStorage, LayerState};

/// What one call of forward leaves for backward: its inputs, and what it made of them.
#[derive(Debug, Default)]
pub struct Saved {
    /// Whether backward will follow; else this is scratch memory.
    pub(super) kept: bool,
    /// Whether someone will look at the weights.
    pub(super) observed: bool,
    pub(super) sequences: usize,
    /// Queries of each sequence.
    pub(super) tokens: usize,
    /// Keys and values that the call added to each sequence.
    pub(super) new: usize,
    /// Positions of the keys and values that queries could see.
    pub(super) held: Range<usize>,
    /// `[sequences, tokens, width]`.
    pub(super) x: Vec<f32>,
    /// What keys and values were made from, if not from `x`.
    pub(super) source: Option<[Vec<f32>; 2]>,
    pub(super) rotation: Option<RopeTable>,
    /// Queries and new keys before their norms, if they have norms.
    pub(super) plain_q: Vec<f32>,
    pub(super) plain_k: Vec<f32>,
    /// As attention takes them: `[sequences, tokens, heads, head_dim]`.
    pub(super) q: Vec<f32>,
    /// `[sequences, new, kv_heads, head_dim]`; once kept, those of all positions held.
    pub(super) k: Vec<f32>,
    pub(super) v: Vec<f32>,
    /// Queries as a rolling state's first tokens see them.
    pub(super) capped_q: Vec<f32>,
    pub(super) rolling: RollingScratch,
    /// Queries and new keys without rotation, where pieces of a text are fetched.
    pub(super) unrotated: [Vec<f32>; 2],
    /// What attention gave: `[sequences, tokens, heads, head_dim]`.
    pub(super) mixed: Vec<f32>,
    /// Of each row's scores: `[sequences, tokens, heads]`.
    pub(super) lse: Vec<f32>,
}

impl Saved {
    /// Memory of a call that backward will follow.
    pub(super) fn kept() -> Saved {
        Saved { kept: true, ..Saved::default() }
    }

    /// Takes in the inputs of a call and makes room for its results.
    pub(super) fn begin(
        &mut self,
        layer: &MultiHeadAttention,
        inputs: &Inputs<'_>,
        states: &[LayerState],
    ) -> Result<(), Error> {
        self.check_states(layer, states)?;
        let sequences = states.len();
        let count = |what, x: &[f32], width| rows(what, x, [sequences, width]);
        self.sequences = sequences;
        self.tokens = count("rows for an attention's queries", inputs.x, layer.width)?;
        self.new = match inputs.source {
            Source::Own => self.tokens,
            Source::Other { keys, values } => {
                let new = count("rows for an attention's keys", keys, layer.key_width)?;
                let got = count("rows for an attention's values", values, layer.value_width)?;
                same("rows for an attention's values", new, got)?;
                new
            }
        };
        if self.kept {
            self.x = inputs.x.to_vec();
            self.source = match inputs.source {
                Source::Own => None,
                Source::Other { keys, values } => Some([keys.to_vec(), values.to_vec()]),
            };
            self.rotation = inputs.rotation.cloned();
        }
        if self.leaves_lse() {
            self.lse.resize(sequences * self.tokens * layer.heads, 0.0);
        }
        let (queries, keys) = (sequences * self.tokens, sequences * self.new);
        for (buffer, len) in [
            (&mut self.q, queries * layer.q_width()),
            (&mut self.k, keys * layer.kv_width()),
            (&mut self.v, keys * layer.kv_width()),
            (&mut self.mixed, queries * layer.q_width()),
        ] {
            buffer.resize(len, 0.0);
        }
        Ok(())
    }

    /// Refuses states of another layer; and for backward, those that do not stand at one position or store other than f32.
    fn check_states(&self, layer: &MultiHeadAttention, states: &[LayerState]) -> Result<(), Error> {
        for state in states {
            same("key/value heads of a state", layer.kv_heads, state.kv_heads())?;
            same("numbers of a state's keys", layer.head_dim, state.dims().0)?;
            same("numbers of a state's values", layer.head_dim, state.dims().1)?;
            if self.kept {
                let (first, found) = (&states[0], state.storage());
                if found != CacheStorage::F32 {
                    return Err(Error::TrainingState { found });
                }
                same("first position of every sequence of a batch", first.start(), state.start())?;
                same("last position of every sequence of a batch", first.end(), state.end())?;
            }
        }
        Ok(())
    }

    /// Keeps the keys and values that the states hold.
    pub(super) fn keep_states(&mut self, layer: &MultiHeadAttention, states: &[LayerState]) {
        let Some(first) = states.first().filter(|_| self.kept) else { return };
        self.held = first.start()..first.end();
        if self.held.len() > self.new {
            let width = layer.head_dim;
            self.k = gather(states, width, |state, head, at| state.tile(head, at).keys.rows());
            self.v = gather(states, width, |state, head, at| state.tile(head, at).values.rows());
        }
    }

    /// Whether the log-sum-exp of each row is wanted.
    pub(super) fn leaves_lse(&self) -> bool {
        self.kept || self.observed
    }

    pub(super) fn query_shape(&self, layer: &MultiHeadAttention) -> Shape {
        layer.shape([self.sequences, self.tokens], layer.heads)
    }

    /// The shape of new keys and of new values.
    pub(super) fn new_shape(&self, layer: &MultiHeadAttention) -> Shape {
        layer.shape([self.sequences, self.new], layer.kv_heads)
    }

    /// The shape of all keys that queries could see.
    pub(super) fn held_shape(&self, layer: &MultiHeadAttention) -> Shape {
        layer.shape([self.sequences, self.held.len()], layer.kv_heads)
    }
}

/// Rows of `width` numbers of each sequence.
fn rows(what: &'static str, x: &[f32], [sequences, width]: [usize; 2]) -> Result<usize, Error> {
    let token = sequences * width;
    let rows = x.len().checked_div(token).unwrap_or(0);
    same(what, rows * token, x.len())?;
    Ok(rows)
}

pub(super) fn same(what: &'static str, expected: usize, got: usize) -> Result<(), Error> {
    if expected == got {
        return Ok(());
    }
    Err(foveal::Error::LengthMismatch { what, expected, got }.into())
}

/// What all states hold, `[sequences, positions, kv_heads, width]`.
fn gather<'a>(
    states: &'a [LayerState],
    width: usize,
    rows: impl Fn(&'a LayerState, usize, Range<usize>) -> Option<KvRows<'a>>,
) -> Vec<f32> {
    let mut all = vec![];
    for state in states {
        let (first, heads) = (all.len(), state.kv_heads());
        all.resize(first + (state.end() - state.start()) * heads * width, 0.0);
        for tile in (state.start()..state.end()).step_by(TILE) {
            let positions = tile..state.end().min(tile + TILE);
            for head in 0..heads {
                let Some(KvRows::F32(rows)) = rows(state, head, positions.clone()) else {
                    unreachable!("states store f32")
                };
                for (n, position) in positions.clone().enumerate() {
                    let at = first + ((position - state.start()) * heads + head) * width;
                    all[at..at + width].copy_from_slice(rows.row(n));
                }
            }
        }
    }
    all
}

/// The gradient of a loss with respect to the keys and values that the states of a batch hold.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct StateGradient {
    /// The first position that it is for; the states hold nothing older, or nothing that still counts.
    pub start: usize,
    /// `[sequences, positions, kv_heads, head_dim]`.
    pub keys: Vec<f32>,
    /// `[sequences, positions, kv_heads, head_dim]`.
    pub values: Vec<f32>,
}
