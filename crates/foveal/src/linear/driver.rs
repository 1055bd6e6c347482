//! The driver of all recurrences: splits a call into sequences and heads, gathers tokens, keeps states.
//!
//! ```text
//! for each sequence and head (shared out over threads):
//!     pack S into panels, or leave it in place for a few tokens
//!     for each block of 32 tokens: gather φ(q), φ(k), v, gates; the mechanism's block; out · scale
//!     unpack S
//! ```
//!
//! Memory besides tensors and states: for each thread one state and the rows of one block.

use super::block::{BLOCK, Block, Matrix};
use super::tokens::{Sizes, expect};
use super::{DecayForm, FeatureMap, Recurrence, State, StateShape, Tokens};
use crate::cpu::Cpu;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::parallel::for_each_item;
use crate::simd::Level;
use crate::simd::sweep::{Layout, NARROW, padded};
use crate::simd::token::{self, Target, gather, scatter};
use crate::tensor::{Patch, Tensor, TensorMut, TensorRef};
use crate::workspace::Workspace;
use std::slice::ChunksExactMut;

/// So few tokens are computed on the state as it lies.
const IN_PLACE: usize = 3;

/// A mechanism that runs over tensors: forward, backward, and token by token.
///
/// Causal by nature: each token reads what it and those before it wrote.
#[derive(Debug, Clone, PartialEq)]
pub struct Recurrent<R> {
    pub(super) mechanism: R,
    cpu: Option<Cpu>,
}

/// Where forward writes.
#[derive(Debug)]
pub struct Results<'a, E> {
    /// Outputs, `[B, T, H, Dv]`.
    pub out: TensorMut<'a, E>,
    /// For delta rules, what each key read before its token wrote, `[B, T, H, Dv]`: backward needs it. `None` if there is
    /// no backward.
    pub reads: Option<TensorMut<'a, f32>>,
}

impl<R: Recurrence> Recurrent<R> {
    /// A mechanism on all threads with the fastest instructions.
    pub fn new(mechanism: R) -> Recurrent<R> {
        Recurrent { mechanism, cpu: None }
    }

    /// Which instructions and threads to use, instead of [`Cpu::detect`].
    pub fn cpu(self, cpu: Cpu) -> Recurrent<R> {
        Recurrent { cpu: Some(cpu), ..self }
    }

    /// The mechanism.
    pub fn mechanism(&self) -> &R {
        &self.mechanism
    }

    /// What instructions to use, and `floats` numbers for each thread that `units` of work are worth.
    pub(super) fn scratches<'w>(
        &self,
        workspace: &'w mut Workspace,
        units: usize,
        floats: usize,
    ) -> Result<(Level, ChunksExactMut<'w, f32>)> {
        let cpu = self.cpu.map_or_else(Cpu::detect, Ok)?;
        let threads = cpu.threads.count().min(units).max(1);
        workspace.reserve(4 * threads * floats);
        Ok((cpu.level, workspace.floats(threads * floats)?.chunks_exact_mut(floats)))
    }

    /// The states with which these tokens' sequences begin: zeros. Allocates them.
    ///
    /// # Errors
    /// If the tokens do not fit together or the mechanism.
    pub fn state<E: Element>(&self, tokens: &Tokens<'_, E>) -> Result<State> {
        let sizes = self.check(tokens)?;
        State::zeros(sizes.state(), self.mechanism.form().normaliser)
    }

    pub(super) fn check<'a, E: Element>(&self, tokens: &Tokens<'a, E>) -> Result<Sizes<'a>> {
        let sizes = tokens.check(self.mechanism.form(), self.mechanism.scale())?;
        self.mechanism.check(sizes.heads)?;
        Ok(sizes)
    }

    /// The outputs `[B, T, H, Dv]` of tokens that follow on `state`, which is carried on. Allocates the outputs.
    ///
    /// One token or a million: the same bits, however a sequence is cut into calls.
    ///
    /// # Errors
    /// Those of [`Recurrent::forward_into`].
    pub fn forward<E: Element>(
        &self,
        tokens: &Tokens<'_, E>,
        state: &mut State,
    ) -> Result<Tensor<E>> {
        let mut out = Tensor::zeros(tokens.v.shape())?;
        let results = Results { out: out.view_mut(), reads: None };
        self.forward_into(tokens, results, state, &mut Workspace::new())?;
        Ok(out)
    }

    /// The same without allocating, but for a workspace that has to grow.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`], [`Error::HeadGrouping`], [`Error::InvalidParameter`], [`Error::LengthMismatch`],
    /// [`Error::StateShape`], [`Error::SimdUnavailable`]. Nothing is written then.
    pub fn forward_into<E: Element>(
        &self,
        tokens: &Tokens<'_, E>,
        results: Results<'_, E>,
        state: &mut State,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let sizes = self.check(tokens)?;
        let form = self.mechanism.form();
        let Results { out, reads } = results;
        expect("outputs", tokens.v.shape(), out.shape())?;
        if let Some(reads) = &reads {
            expect("reads of keys", tokens.v.shape(), reads.shape())?;
            if !form.beta {
                let (what, expected) = ("reads of keys", "none, since this is no delta rule");
                return Err(Error::InvalidParameter { what, expected, got: "some".into() });
            }
        }
        state.check(sizes.state(), form.normaliser)?;
        let units = sizes.spans.count() * sizes.heads;
        let (level, scratches) = self.scratches(workspace, units, Scratch::floats(&sizes))?;
        let engine = Engine { mechanism: &self.mechanism, tokens, sizes, level };
        let mut reads = reads.map(|reads| reads.into_patches(sizes.spans, 1));
        let patches = out.into_patches(sizes.spans, 1).zip(state.units_mut(1));
        let items = patches.enumerate().map(move |(index, (out, (matrix, key_sum)))| {
            let reads = reads.as_mut().and_then(Iterator::next);
            Unit { index, out, reads, matrix, key_sum }
        });
        for_each_item(items, scratches, |unit, floats| engine.unit(unit, floats));
        Ok(())
    }
}

impl Sizes<'_> {
    /// The shape of the states.
    pub(super) fn state(&self) -> StateShape {
        StateShape {
            sequences: self.spans.count(),
            heads: self.heads,
            key_dim: self.key_dim,
            value_dim: self.value_dim,
        }
    }

    /// Where a state whose rows are key channels lies, and its transpose.
    pub(super) fn layouts(&self) -> (Layout, Layout) {
        let packed = |rows, columns| Layout::packed(rows, columns, NARROW);
        (packed(self.key_dim, self.value_dim), packed(self.value_dim, self.key_dim))
    }

    /// Numbers of a padded key and of a padded value.
    pub(super) fn strides(&self) -> (usize, usize) {
        (padded(self.key_dim), padded(self.value_dim))
    }
}

/// One sequence of one head.
struct Unit<'a, E> {
    index: usize,
    out: Patch<'a, E>,
    reads: Option<Patch<'a, f32>>,
    matrix: &'a mut [f32],
    key_sum: &'a mut [f32],
}

/// Tokens of a head, by absolute position.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    pub(super) batch: usize,
    pub(super) first: usize,
    pub(super) len: usize,
    pub(super) head: usize,
}

/// A call whose shapes have been checked.
pub(super) struct Engine<'a, 'b, R, E> {
    pub(super) mechanism: &'a R,
    pub(super) tokens: &'a Tokens<'b, E>,
    pub(super) sizes: Sizes<'b>,
    pub(super) level: Level,
}

/// The rows of a block of tokens.
pub(super) struct Gathered<'a> {
    pub(super) q: &'a mut [f32],
    pub(super) k: &'a mut [f32],
    pub(super) v: &'a mut [f32],
    pub(super) decay: &'a mut [f32],
    pub(super) beta: &'a mut [f32],
}

/// Takes the first `n` numbers of what is left.
pub(super) fn take<'a>(floats: &mut &'a mut [f32], n: usize) -> &'a mut [f32] {
    let (own, rest) = std::mem::take(floats).split_at_mut(n);
    *floats = rest;
    own
}

impl<'a> Gathered<'a> {
    pub(super) fn floats(sizes: &Sizes<'_>) -> usize {
        let (keys, values) = sizes.strides();
        BLOCK * (2 * keys + values + padded(sizes.decay_dim.unwrap_or(1)) + 1)
    }

    pub(super) fn take(floats: &mut &'a mut [f32], sizes: &Sizes<'_>) -> Gathered<'a> {
        let (keys, values) = sizes.strides();
        Gathered {
            q: take(floats, BLOCK * keys),
            k: take(floats, BLOCK * keys),
            v: take(floats, BLOCK * values),
            decay: take(floats, BLOCK * padded(sizes.decay_dim.unwrap_or(1))),
            beta: take(floats, BLOCK),
        }
    }
}

/// What a thread writes to while it computes a unit.
struct Scratch<'a> {
    rows: Gathered<'a>,
    out: &'a mut [f32],
    reads: &'a mut [f32],
    factors: &'a mut [f32],
    z: &'a mut [f32],
    state: &'a mut [f32],
}

impl<'a> Scratch<'a> {
    fn floats(sizes: &Sizes<'_>) -> usize {
        let (keys, values) = sizes.strides();
        Gathered::floats(sizes) + BLOCK * (2 * values + 1) + keys + sizes.key_dim * values
    }

    fn take(mut floats: &'a mut [f32], sizes: &Sizes<'_>) -> Scratch<'a> {
        let (keys, values) = sizes.strides();
        Scratch {
            state: take(&mut floats, sizes.key_dim * values),
            rows: Gathered::take(&mut floats, sizes),
            out: take(&mut floats, BLOCK * values),
            reads: take(&mut floats, BLOCK * values),
            factors: take(&mut floats, BLOCK),
            z: take(&mut floats, keys),
        }
    }
}

impl<R: Recurrence, E: Element> Engine<'_, '_, R, E> {
    fn unit(&self, mut unit: Unit<'_, E>, floats: &mut [f32]) {
        let Sizes { heads, key_dim, value_dim, .. } = self.sizes;
        let (keys, values) = self.sizes.strides();
        let (batch, span) = self.sizes.spans.get(unit.index / heads);
        let scratch = Scratch::take(floats, &self.sizes);
        let Scratch { mut rows, out, reads, factors, z, state } = scratch;
        let in_place = span.len() <= IN_PLACE && values == value_dim;
        let layout = match in_place {
            true => Layout::dense(key_dim, value_dim),
            false => Layout::packed(key_dim, value_dim, NARROW),
        };
        if !in_place {
            layout.pack(unit.matrix, value_dim, state);
        }
        z.fill(0.0);
        z[..unit.key_sum.len()].copy_from_slice(unit.key_sum);
        for first in span.clone().step_by(BLOCK) {
            let len = BLOCK.min(span.end - first);
            self.gather(&mut rows, Place { batch, first, len, head: unit.index % heads });
            factors[..len].fill(1.0);
            self.mechanism.block(&mut Block {
                level: self.level,
                len,
                strides: (keys, values),
                q: &rows.q[..len * keys],
                k: &rows.k[..len * keys],
                v: &rows.v[..len * values],
                decay: rows.decay,
                beta: &rows.beta[..len],
                state: Matrix {
                    data: if in_place { &mut *unit.matrix } else { &mut *state },
                    layout,
                },
                z,
                out: &mut out[..len * values],
                factors: &mut factors[..len],
                reads: &mut reads[..len * values],
            });
            let to = Target { patch: &mut unit.out, first: first - span.start, head: 0 };
            let (out, factors) = (&out[..len * values], &factors[..len]);
            scatter(self.level, out, factors, self.sizes.scale, to);
            if let Some(patch) = &mut unit.reads {
                for t in 0..len {
                    let to = patch.row(first - span.start + t, 0);
                    to.copy_from_slice(&reads[t * values..][..value_dim]);
                }
            }
        }
        if !in_place {
            layout.unpack(state, unit.matrix, value_dim);
        }
        unit.key_sum.copy_from_slice(&z[..unit.key_sum.len()]);
    }

    /// The mapped rows of a block of tokens.
    pub(super) fn gather(&self, rows: &mut Gathered<'_>, place: Place) {
        self.gather_queries(rows, place);
        self.gather_keys(rows, place);
        let Place { batch, first, len, head } = place;
        let range = first..first + len;
        if let Some(log_decay) = self.tokens.log_decay {
            let log_decay = log_decay.head(batch, head).slice(range.clone());
            match self.mechanism.form().decay {
                DecayForm::Scalar => (0..len).for_each(|t| {
                    // In f64, since an error is multiplied along the sequence.
                    rows.decay[t] = f64::from(log_decay.row(t)[0]).exp() as f32;
                }),
                _ => gather(self.level, log_decay, FeatureMap::Exp, rows.decay),
            }
        } else if let Some(decay) = self.mechanism.fixed_decay(head) {
            rows.decay[..len].fill(decay);
        }
        if let Some(beta) = self.tokens.beta {
            let beta = beta.head(batch, head).slice(range);
            (0..len).for_each(|t| rows.beta[t] = beta.row(t)[0]);
        }
    }

    pub(super) fn gather_queries(&self, rows: &mut Gathered<'_>, place: Place) {
        let Place { batch, first, len, head } = place;
        let q = self.tokens.q.head(batch, self.group(head)).slice(first..first + len);
        gather(self.level, q, self.mechanism.form().map, rows.q);
    }

    /// Keys and values; those of absent tokens are zeros.
    pub(super) fn gather_keys(&self, rows: &mut Gathered<'_>, place: Place) {
        let Place { batch, first, len, head } = place;
        let Tokens { k, v, .. } = *self.tokens;
        let range = first..first + len;
        let map = self.mechanism.form().map;
        let keys = k.head(batch, self.group(head)).slice(range.clone());
        gather(self.level, keys, map, rows.k);
        let values = v.head(batch, head).slice(range.clone());
        gather(self.level, values, FeatureMap::Identity, rows.v);
        let (keys, values) = self.sizes.strides();
        for t in (0..len).filter(|t| !self.is_present(batch, first + t)) {
            rows.k[t * keys..(t + 1) * keys].fill(0.0);
            rows.v[t * values..(t + 1) * values].fill(0.0);
        }
    }

    /// The gradient of outputs times the scale.
    pub(super) fn gather_upstream(&self, d_out: TensorRef<'_, E>, place: Place, g: &mut [f32]) {
        let Place { batch, first, len, head } = place;
        let d_out = d_out.head(batch, head).slice(first..first + len);
        gather(self.level, d_out, FeatureMap::Identity, g);
        let scale = self.sizes.scale;
        if scale != 1.0 {
            let g = &mut g[..len * self.sizes.strides().1];
            token::scale(self.level, scale, g);
        }
    }

    /// The query and key head that a value head reads.
    fn group(&self, head: usize) -> usize {
        head * self.sizes.groups / self.sizes.heads
    }

    /// Whether a key and a value count.
    pub(super) fn is_present(&self, batch: usize, token: usize) -> bool {
        let at = batch * self.tokens.k.shape().seq + token;
        self.tokens.present.is_none_or(|present| present[at])
    }
}
