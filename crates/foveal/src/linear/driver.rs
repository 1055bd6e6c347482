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

use super::block::{BLOCK, Block, Matrix};
use super::tokens::{Sizes, expect};
use super::{DecayForm, FeatureMap, Recurrence, State, StateShape, Tokens};
use crate::cpu::Cpu;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::parallel::for_each_item;
use crate::simd::Level;
use crate::simd::near::Near;
use crate::simd::sweep::{Layout, NARROW, TokenRows, padded};
use crate::simd::token::{self, Target, gather, scatter};
use crate::tensor::{Patch, Rows, Tensor, TensorMut, TensorRef};
use crate::workspace::Workspace;
use std::ops::Range;
use std::slice::ChunksExactMut;

/// So few tokens are computed on the state as it lies.
const IN_PLACE: usize = 3;
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
        let cpu = self.machine()?;
        let bytes = 4 * sizes.key_dim * sizes.strides().1;
        let each = together(sizes.heads, sizes.spans.count(), cpu.threads.count(), NEAR / bytes);
        let units = sizes.spans.count() * (sizes.heads / each);
        let scratches = scratches(workspace, cpu, units, Scratch::floats(&sizes, each))?;
        let engine = Engine { mechanism: &self.mechanism, tokens, sizes, level: cpu.level };
        let mut reads = reads.map(|reads| reads.into_patches(sizes.spans, each));
        let patches = out.into_patches(sizes.spans, each).zip(state.units_mut(each));
        let items = patches.enumerate().map(move |(index, (out, (matrices, key_sums)))| {
            let reads = reads.as_mut().and_then(Iterator::next);
            Unit { index, each, out, reads, matrices, key_sums }
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
pub(crate) fn take<'a>(floats: &mut &'a mut [f32], n: usize) -> &'a mut [f32] {
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

/// The rows of a block of tokens, in scratch or where the tensors lie.
struct Mapped<'a> {
    q: TokenRows<'a>,
    k: TokenRows<'a>,
    v: TokenRows<'a>,
}

/// Rows that need no map, no widening and no padding, as they lie.
fn in_place<E: Element>(rows: Rows<'_, E>, map: FeatureMap) -> Option<TokenRows<'_>> {
    let ready = map == FeatureMap::Identity && rows.width() == padded(rows.width());
    let rows = rows.as_f32().filter(|_| ready)?;
    Some(TokenRows { data: rows.as_slice(), stride: rows.stride() })
}

/// What a thread writes to while it computes a unit.
struct Scratch<'a> {
    rows: Gathered<'a>,
    out: &'a mut [f32],
    reads: &'a mut [f32],
    factors: &'a mut [f32],
    /// Of each head: the sum of keys.
    sums: &'a mut [f32],
    /// Of each head, packed.
    states: &'a mut [f32],
}

impl<'a> Scratch<'a> {
    fn floats(sizes: &Sizes<'_>, each: usize) -> usize {
        let (keys, values) = sizes.strides();
        let heads = each * (keys + sizes.key_dim * values);
        Gathered::floats(sizes) + BLOCK * (2 * values + 1) + heads
    }

    fn take(mut floats: &'a mut [f32], sizes: &Sizes<'_>, each: usize) -> Scratch<'a> {
        let (keys, values) = sizes.strides();
        Scratch {
            states: take(&mut floats, each * sizes.key_dim * values),
            rows: Gathered::take(&mut floats, sizes),
            out: take(&mut floats, BLOCK * values),
            reads: take(&mut floats, BLOCK * values),
            factors: take(&mut floats, BLOCK),
            sums: take(&mut floats, each * keys),
        }
    }
}

impl<R: Recurrence, E: Element> Engine<'_, '_, R, E> {
    fn unit(&self, mut unit: Unit<'_, E>, floats: &mut [f32]) {
        let Sizes { heads, key_dim, value_dim, .. } = self.sizes;
        let (keys, values) = self.sizes.strides();
        let groups = heads / unit.each;
        let (batch, span) = self.sizes.spans.get(unit.index / groups);
        let mut scratch = Scratch::take(floats, &self.sizes, unit.each);
        let in_place = span.len() <= IN_PLACE && values == value_dim;
        let layout = match in_place {
            true => Layout::dense(key_dim, value_dim),
            false => Layout::packed(key_dim, value_dim, NARROW),
        };
        let (size, sums) = (key_dim * value_dim, unit.key_sums.len() / unit.each);
        if !in_place {
            let states = scratch.states.chunks_exact_mut(key_dim * values);
            for (matrix, state) in unit.matrices.chunks_exact(size).zip(states) {
                layout.pack(matrix, value_dim, state);
            }
        }
        scratch.sums.fill(0.0);
        for (own, z) in scratch.sums.chunks_exact_mut(keys).enumerate() {
            z[..sums].copy_from_slice(&unit.key_sums[own * sums..(own + 1) * sums]);
        }
        for first in span.clone().step_by(BLOCK) {
            let len = BLOCK.min(span.end - first);
            for own in 0..unit.each {
                let head = unit.index % groups * unit.each + own;
                let place = Place { batch, first, len, head };
                self.block(&mut unit, own, place, (&mut scratch, layout));
            }
        }
        if !in_place {
            let states = scratch.states.chunks_exact(key_dim * values);
            for (matrix, state) in unit.matrices.chunks_exact_mut(size).zip(states) {
                layout.unpack(state, matrix, value_dim);
            }
        }
        for (own, z) in scratch.sums.chunks_exact(keys).enumerate() {
            unit.key_sums[own * sums..(own + 1) * sums].copy_from_slice(&z[..sums]);
        }
    }

    /// The rows of the block that comes after this one: of the next head, or of the first one and the next tokens.
    fn near(
        &self,
        unit: &mut Unit<'_, E>,
        own: usize,
        place: Place,
        span: Range<usize>,
    ) -> Option<Near> {
        let Place { batch, first, len, head } = place;
        let (own, first) = match own + 1 < unit.each {
            true => (own + 1, first),
            false => (0, first + len),
        };
        if first >= span.end || span.len() <= IN_PLACE {
            return None;
        }
        let head = head / unit.each * unit.each + own;
        let tokens = first..span.end.min(first + BLOCK);
        let mut near = Near::of(tokens.len());
        self.near_inputs(&mut near, Place { batch, first, len: tokens.len(), head });
        let start = first - span.start;
        near.add(unit.out.row(start, own).as_ptr(), unit.out.stride(), self.sizes.value_dim);
        if let Some(reads) = &mut unit.reads {
            near.add(reads.row(start, own).as_ptr(), reads.stride(), self.sizes.value_dim);
        }
        Some(near)
    }

    /// Adds what a block reads of the tensors of tokens.
    pub(super) fn near_inputs(&self, near: &mut Near, place: Place) {
        let Place { batch, first, len, head } = place;
        let Tokens { q, k, v, log_decay, .. } = *self.tokens;
        let (range, group) = (first..first + len, self.group(head));
        for rows in [q.head(batch, group), k.head(batch, group), v.head(batch, head)] {
            let rows = rows.slice(range.clone());
            near.add(rows.as_ptr(), rows.stride(), rows.width());
        }
        if let Some(log_decay) = log_decay.filter(|x| x.shape().dim > 1) {
            let rows = log_decay.head(batch, head).slice(range);
            near.add(rows.as_ptr(), rows.stride(), rows.width());
        }
    }

    /// One block of the `own`-th head of a unit, `start` tokens after its beginning.
    fn block(
        &self,
        unit: &mut Unit<'_, E>,
        own: usize,
        place: Place,
        (scratch, layout): (&mut Scratch<'_>, Layout),
    ) {
        let span = self.sizes.spans.get(unit.index / (self.sizes.heads / unit.each)).1;
        let start = place.first - span.start;
        let near = self.near(unit, own, place, span);
        let Sizes { key_dim, value_dim, .. } = self.sizes;
        let (keys, values) = self.sizes.strides();
        let len = place.len;
        let Scratch { rows: Gathered { q, k, v, decay, beta }, out, reads, factors, sums, states } =
            scratch;
        self.gather_gates((decay, beta), place);
        let Mapped { q, k, v } = self.mapped((q, k, v), place);
        factors[..len].fill(1.0);
        let data = match layout.row_stride {
            Some(_) => &mut unit.matrices[own * key_dim * value_dim..][..key_dim * value_dim],
            None => &mut states[own * key_dim * values..][..key_dim * values],
        };
        self.mechanism.block(&mut Block {
            level: self.level,
            len,
            strides: (keys, values),
            q,
            k,
            v,
            decay,
            beta: &beta[..len],
            state: Matrix { data, layout },
            z: &mut sums[own * keys..][..keys],
            out: &mut out[..len * values],
            factors: &mut factors[..len],
            reads: &mut reads[..len * values],
            near: near.as_ref(),
        });
        let to = Target { patch: &mut unit.out, first: start, head: own };
        scatter(self.level, &out[..len * values], &factors[..len], self.sizes.scale, to);
        if let Some(patch) = &mut unit.reads {
            for t in 0..len {
                let to = patch.row(start + t, own);
                to.copy_from_slice(&reads[t * values..][..value_dim]);
            }
        }
    }

    /// The mapped rows of a block of tokens.
    pub(super) fn gather(&self, rows: &mut Gathered<'_>, place: Place) {
        self.gather_queries(rows, place);
        self.gather_keys((rows.k, rows.v), place);
        self.gather_gates((rows.decay, rows.beta), place);
    }

    fn gather_gates(&self, (decay, beta): (&mut [f32], &mut [f32]), place: Place) {
        let Place { batch, first, len, head } = place;
        let range = first..first + len;
        if let Some(log_decay) = self.tokens.log_decay {
            let log_decay = log_decay.head(batch, head).slice(range.clone());
            match self.mechanism.form().decay {
                DecayForm::Scalar => (0..len).for_each(|t| {
                    // In f64, since an error is multiplied along the sequence.
                    decay[t] = f64::from(log_decay.row(t)[0]).exp() as f32;
                }),
                _ => gather(self.level, log_decay, FeatureMap::Exp, decay),
            }
        } else if let Some(fixed) = self.mechanism.fixed_decay(head) {
            decay[..len].fill(fixed);
        }
        if let Some(given) = self.tokens.beta {
            let given = given.head(batch, head).slice(range);
            (0..len).for_each(|t| beta[t] = given.row(t)[0]);
        }
    }

    /// The rows of a block of tokens: where they lie, or mapped and gathered.
    fn mapped<'r>(
        &'r self,
        (q, k, v): (&'r mut [f32], &'r mut [f32], &'r mut [f32]),
        place: Place,
    ) -> Mapped<'r> {
        let Place { batch, first, len, head } = place;
        let (map, range, group) = (self.mechanism.form().map, first..first + len, self.group(head));
        let rows = |tensor: TensorRef<'r, E>, head| tensor.head(batch, head).slice(range.clone());
        let own = (rows(self.tokens.k, group), rows(self.tokens.v, head));
        let queries = rows(self.tokens.q, group);
        let q = in_place(queries, map).unwrap_or_else(|| {
            gather(self.level, queries, map, q);
            TokenRows { data: q, stride: self.sizes.strides().0 }
        });
        let lie = |rows, map| in_place(rows, map).filter(|_| self.tokens.present.is_none());
        let k = lie(own.0, map).unwrap_or_else(|| {
            self.gather_present(own.0, map, place, k);
            TokenRows { data: k, stride: self.sizes.strides().0 }
        });
        let v = lie(own.1, FeatureMap::Identity).unwrap_or_else(|| {
            self.gather_present(own.1, FeatureMap::Identity, place, v);
            TokenRows { data: v, stride: self.sizes.strides().1 }
        });
        Mapped { q, k, v }
    }

    pub(super) fn gather_queries(&self, rows: &mut Gathered<'_>, place: Place) {
        let Place { batch, first, len, head } = place;
        let q = self.tokens.q.head(batch, self.group(head)).slice(first..first + len);
        gather(self.level, q, self.mechanism.form().map, rows.q);
    }

    /// Keys and values; those of absent tokens are zeros.
    pub(super) fn gather_keys(&self, (to_k, to_v): (&mut [f32], &mut [f32]), place: Place) {
        let Place { batch, first, len, head } = place;
        let range = first..first + len;
        let map = self.mechanism.form().map;
        let keys = self.tokens.k.head(batch, self.group(head)).slice(range.clone());
        self.gather_present(keys, map, place, to_k);
        let values = self.tokens.v.head(batch, head).slice(range);
        self.gather_present(values, FeatureMap::Identity, place, to_v);
    }

    /// Rows, with zeros for those of absent tokens.
    fn gather_present(&self, rows: Rows<'_, E>, map: FeatureMap, place: Place, to: &mut [f32]) {
        gather(self.level, rows, map, to);
        let stride = padded(rows.width());
        for t in (0..place.len).filter(|t| !self.is_present(place.batch, place.first + t)) {
            to[t * stride..(t + 1) * stride].fill(0.0);
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
