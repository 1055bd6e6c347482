//! The driver of all recurrences: splits a call into sequences and heads, gathers tokens, keeps states.
//!
//! ```text
//! for each sequence and some neighbouring heads (shared out over threads):
//!     pack their S into panels, or leave them in place for a few tokens
//!     for each block of 32 tokens, for each head: gather φ(q), φ(k), v, gates; the mechanism's block; out · scale
//!     unpack S
//! ```
//!
//! Rows of other heads lie between those of one: a block is read for all heads at once, since memory is fast only from
//! end to end, and states wait in the second level of cache. No bit of a head depends on which others it goes with.
//! Memory besides tensors and states: for each thread the states of its heads and the rows of one block.

use super::block::{BLOCK, Block, Matrix, Step};
use super::gather::{Engine, Gathered, Mapped, Place, take};
use super::tokens::{Sizes, expect};
use super::{Recurrence, State, StateShape, Tokens};
use crate::cpu::Cpu;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::parallel::for_each_item;
use crate::simd::Level;
use crate::simd::near::Near;
use crate::simd::sweep::{Layout, NARROW, padded};
use crate::simd::token::{Target, scatter};
use crate::tensor::{Patch, Tensor, TensorMut};
use crate::workspace::Workspace;
use std::slice::ChunksExactMut;

/// So few tokens, of one block at most, are computed on the state as it lies: to pack it costs more than packed rows save.
const IN_PLACE: usize = 31;
/// Bytes of the states that a thread goes through for each block: half of a second level of cache.
pub(super) const NEAR: usize = 1 << 19;

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

    /// The instructions and threads of a call.
    pub(super) fn machine(&self) -> Result<Cpu> {
        self.cpu.map_or_else(Cpu::detect, Ok)
    }

    /// The states with which these tokens' sequences begin: zeros. Allocates them.
    ///
    /// # Errors
    /// If the tokens do not fit together or the mechanism.
    pub fn state<E: Element>(&self, tokens: &Tokens<'_, E>) -> Result<State> {
        let sizes = self.check(tokens)?;
        State::zeros(sizes.state(), self.mechanism.form().sums)
    }

    pub(super) fn check<'a, E: Element>(&self, tokens: &Tokens<'a, E>) -> Result<Sizes<'a>> {
        let sizes = tokens.check(self.mechanism.form(), self.mechanism.scale())?;
        self.mechanism.check(sizes.heads)?;
        let key_dim = self.mechanism.mapped_dim(sizes.input_dim)?;
        Ok(Sizes { key_dim, ..sizes })
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
        expect("outputs", tokens.v.shape(), results.out.shape())?;
        if let Some(reads) = &results.reads {
            expect("reads of keys", tokens.v.shape(), reads.shape())?;
            if !form.beta {
                let (what, expected) = ("reads of keys", "none, since this is no delta rule");
                return Err(Error::InvalidParameter { what, expected, got: "some".into() });
            }
        }
        state.check(sizes.state(), form.sums)?;
        let engine = Engine { mechanism: &self.mechanism, tokens, sizes, queries: None };
        self.run(&engine, results, state, workspace)
    }

    /// A call that has been checked.
    pub(super) fn run<E: Element>(
        &self,
        engine: &Engine<'_, '_, R, E>,
        results: Results<'_, E>,
        state: &mut State,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let (sizes, Results { out, reads }) = (engine.sizes, results);
        let cpu = self.machine()?;
        let bytes = 4 * sizes.key_dim * sizes.strides().1;
        let each = together(sizes.heads, sizes.spans.count(), cpu.threads.count(), NEAR / bytes);
        let units = sizes.spans.count() * (sizes.heads / each);
        let scratches = scratches(workspace, cpu, units, Scratch::floats(&sizes, each))?;
        let mut reads = reads.map(|reads| reads.into_patches(sizes.spans, each));
        let patches = out.into_patches(engine.query_spans()?, each).zip(state.units_mut(each));
        let items = patches.enumerate().map(move |(index, (out, (matrices, key_sums)))| {
            let reads = reads.as_mut().and_then(Iterator::next);
            Unit { index, each, out, reads, matrices, key_sums }
        });
        for_each_item(items, scratches, |unit, floats| {
            Forward { engine, level: cpu.level }.unit(unit, floats)
        });
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

/// `floats` numbers for each thread that `units` of work are worth.
pub(crate) fn scratches(
    workspace: &mut Workspace,
    cpu: Cpu,
    units: usize,
    floats: usize,
) -> Result<ChunksExactMut<'_, f32>> {
    let threads = cpu.threads.count().min(units).max(1);
    workspace.reserve(4 * threads * floats);
    Ok(workspace.floats(threads * floats)?.chunks_exact_mut(floats))
}

/// How many of `heads` one thread takes through a sequence together: a divisor, at most `near`, that leaves work for all
/// threads if any does.
pub(super) fn together(heads: usize, sequences: usize, threads: usize, near: usize) -> usize {
    let enough = |each: usize| sequences * (heads / each) >= threads.min(sequences * heads);
    let fits = |each: &usize| heads.is_multiple_of(*each) && *each <= near.max(1);
    (1..=heads).rev().filter(fits).find(|&each| enough(each)).unwrap_or(1)
}

/// Neighbouring heads of one sequence.
struct Unit<'a, E> {
    index: usize,
    /// Heads.
    each: usize,
    out: Patch<'a, E>,
    reads: Option<Patch<'a, f32>>,
    matrices: &'a mut [f32],
    key_sums: &'a mut [f32],
}

/// What a thread writes to while it computes a unit.
struct Scratch<'a> {
    rows: Gathered<'a>,
    out: &'a mut [f32],
    reads: &'a mut [f32],
    factors: &'a mut [f32],
    /// Rows that a mechanism makes for itself.
    made: [&'a mut [f32]; 3],
    /// Of each head: sums of keys.
    sums: &'a mut [f32],
    /// Of each head, packed.
    states: &'a mut [f32],
}

impl<'a> Scratch<'a> {
    fn floats(sizes: &Sizes<'_>, each: usize) -> usize {
        let (keys, values) = sizes.strides();
        let heads = each * (sizes.sums * keys + sizes.key_dim * values);
        Gathered::floats(sizes) + BLOCK * (2 * values + 3 * keys + 1) + heads
    }

    fn take(mut floats: &'a mut [f32], sizes: &Sizes<'_>, each: usize) -> Scratch<'a> {
        let (keys, values) = sizes.strides();
        Scratch {
            states: take(&mut floats, each * sizes.key_dim * values),
            rows: Gathered::take(&mut floats, sizes),
            out: take(&mut floats, BLOCK * values),
            reads: take(&mut floats, BLOCK * values),
            factors: take(&mut floats, BLOCK),
            made: [0; 3].map(|_| take(&mut floats, BLOCK * keys)),
            sums: take(&mut floats, each * sizes.sums * keys),
        }
    }
}

/// A call on the instructions of a level.
struct Forward<'a, 'b, 'c, R, E> {
    engine: &'a Engine<'b, 'c, R, E>,
    level: Level,
}

impl<R: Recurrence, E: Element> Forward<'_, '_, '_, R, E> {
    fn unit(&self, mut unit: Unit<'_, E>, floats: &mut [f32]) {
        let (engine, sizes) = (self.engine, &self.engine.sizes);
        let Sizes { heads, key_dim, value_dim, .. } = *sizes;
        let (keys, values) = sizes.strides();
        let groups = heads / unit.each;
        let (batch, span) = sizes.spans.get(unit.index / groups);
        let mut scratch = Scratch::take(floats, sizes, unit.each);
        let in_place = engine.tokens_of(&span) <= IN_PLACE && values == value_dim;
        let layout = match in_place {
            true => Layout::dense(key_dim, value_dim),
            false => Layout::packed(key_dim, value_dim, NARROW),
        };
        let size = key_dim * value_dim;
        if !in_place {
            let states = scratch.states.chunks_exact_mut(key_dim * values);
            for (matrix, state) in unit.matrices.chunks_exact(size).zip(states) {
                layout.pack(matrix, value_dim, state);
            }
        }
        scratch.sums.fill(0.0);
        let all = scratch.sums.chunks_exact_mut(keys).zip(unit.key_sums.chunks_exact(key_dim));
        all.for_each(|(padded, sums)| padded[..key_dim].copy_from_slice(sums));
        let head = unit.index % groups * unit.each;
        for n in 0..engine.blocks(&span) {
            for own in 0..unit.each {
                let next = match own + 1 < unit.each {
                    true => Some((own + 1, n)),
                    false => (n + 1 < engine.blocks(&span)).then_some((0, n + 1)),
                };
                let near = next.filter(|_| engine.tokens_of(&span) > IN_PLACE).map(|(own, n)| {
                    let place = engine.place((batch, &span), head + own, n);
                    self.near(&mut unit, own, place, span.start)
                });
                let place = engine.place((batch, &span), head + own, n);
                let own = Spot { own, place, start: place.first - span.start, near };
                self.block(&mut unit, own, (&mut scratch, layout));
            }
        }
        if !in_place {
            let states = scratch.states.chunks_exact(key_dim * values);
            for (matrix, state) in unit.matrices.chunks_exact_mut(size).zip(states) {
                layout.unpack(state, matrix, value_dim);
            }
        }
        let all = scratch.sums.chunks_exact(keys).zip(unit.key_sums.chunks_exact_mut(key_dim));
        all.for_each(|(padded, sums)| sums.copy_from_slice(&padded[..key_dim]));
    }

    /// The rows of a block.
    fn near(&self, unit: &mut Unit<'_, E>, own: usize, place: Place, start: usize) -> Near {
        let mut near = Near::of(place.len);
        self.engine.near_inputs(&mut near, place);
        let (first, width) = (place.first - start, self.engine.sizes.value_dim);
        if place.step != Step::Write {
            near.add(unit.out.row(first, own).as_ptr(), unit.out.stride(), width);
        }
        if let Some(reads) = &mut unit.reads {
            near.add(reads.row(first, own).as_ptr(), reads.stride(), width);
        }
        near
    }

    /// One block of a head of a unit.
    fn block(
        &self,
        unit: &mut Unit<'_, E>,
        spot: Spot,
        (scratch, layout): (&mut Scratch<'_>, Layout),
    ) {
        let (engine, Spot { own, place, start, near }) = (self.engine, spot);
        let Sizes { key_dim, value_dim, scale, sums: each, .. } = engine.sizes;
        let (keys, values) = engine.sizes.strides();
        let len = place.len;
        let Scratch { rows, out, reads, factors, made, sums, states } = scratch;
        let Gathered { q, k, v, decay, beta, raw } = rows;
        engine.gather_gates(self.level, (decay, beta), place);
        let Mapped { q, k, v } = engine.mapped(self.level, (q, k, v), raw, place);
        factors[..len].fill(1.0);
        let data = match layout.row_stride {
            Some(_) => &mut unit.matrices[own * key_dim * value_dim..][..key_dim * value_dim],
            None => &mut states[own * key_dim * values..][..key_dim * values],
        };
        engine.mechanism.block(&mut Block {
            level: self.level,
            step: place.step,
            len,
            strides: (keys, values),
            q,
            k,
            v,
            decay,
            beta: &beta[..len],
            state: Matrix { data, layout },
            z: &mut sums[own * each * keys..][..each * keys],
            out: &mut out[..len * values],
            factors: &mut factors[..len],
            reads: &mut reads[..len * values],
            made: made.each_mut().map(|rows| &mut rows[..len * keys]),
            near: near.as_ref(),
        });
        if place.step != Step::Write {
            let to = Target { patch: &mut unit.out, first: start, head: own };
            scatter(self.level, &out[..len * values], &factors[..len], scale, to);
        }
        if let Some(patch) = &mut unit.reads {
            for t in 0..len {
                let to = patch.row(start + t, own);
                to.copy_from_slice(&reads[t * values..][..value_dim]);
            }
        }
    }
}

/// A block of a head of a unit.
struct Spot {
    /// Which of the unit's heads.
    own: usize,
    place: Place,
    /// Tokens before it.
    start: usize,
    /// What comes after it: the same tokens of the next head, or the next ones of the first.
    near: Option<Near>,
}
