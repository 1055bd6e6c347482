//! The driver of gradients: passes over each sequence, forwards with the state and backwards with its gradient.
//!
//! ```text
//! for each sequence and some neighbouring query/key heads with their value heads (shared out over threads):
//!     First, for delta rules    blocks backwards, with dS
//!     Ahead                     blocks forwards, with Sᵀ from the initial state       → dφ(q)
//!     Back                      blocks backwards, with dS and dSᵀ                     → dφ(k), dv
//! ```
//!
//! The state is made again, not stored: each product of a gradient with a state is a read of a sweep, of the state or
//! of its transpose. Gradients of the logarithms of decays are sums over the rest of the sequence,
//!
//! ```text
//! d log a_t = Σ_{i≥t} (q_i ∘ dq_i − k_i ∘ dk_i) + rowsum(dS_T ∘ S_T)         (one number: summed over channels)
//! ```
//!
//! taken in f64, so that no state has to be undone. All heads of a unit go through a block before the next one, as forward.
//! Memory besides tensors: for each thread the rows of one block, and for each of its heads three states and what
//! [`Recurrence::kept`] says for each token of a sequence.

use super::block::{BLOCK, BlockGradient, Matrix, Pass, Step, Written};
use super::driver::{NEAR, Recurrent, scratches, together};
use super::gather::{Engine, Gathered, Place, Role, take};
use super::tokens::{Sizes, expect};
use super::{DecayForm, FeatureMap, Recurrence, State, Tokens};
use crate::element::Element;
use crate::error::{Error, Result};
use crate::parallel::for_each_item;
use crate::simd::Level;
use crate::simd::near::Near;
use crate::simd::sweep::padded;
use crate::simd::token::{Target, accumulate_rows, copy_rows, derive, gather};
use crate::tensor::{Patch, Shape, Tensor, TensorMut, TensorRef};
use crate::workspace::Workspace;

/// Where gradients are written, all `f32`. What was there is overwritten.
#[derive(Debug)]
pub struct Gradients<'a> {
    /// Of the queries, `[B, T, G, Dk]`: the sum over the value heads that read them.
    pub d_q: TensorMut<'a, f32>,
    /// Of the keys, `[B, T, G, Dk]`, likewise.
    pub d_k: TensorMut<'a, f32>,
    /// Of the values, `[B, T, H, Dv]`.
    pub d_v: TensorMut<'a, f32>,
    /// Of the logarithms of decays, in their shape, where tokens bring some and it is wanted.
    pub d_log_decay: Option<TensorMut<'a, f32>>,
    /// Of the writing strengths, `[B, T, H, 1]`, likewise.
    pub d_beta: Option<TensorMut<'a, f32>>,
}

/// The gradients that [`Recurrent::backward`] allocates.
#[derive(Debug, Clone, PartialEq)]
pub struct RecurrentBackward {
    /// Of the queries.
    pub d_q: Tensor<f32>,
    /// Of the keys.
    pub d_k: Tensor<f32>,
    /// Of the values.
    pub d_v: Tensor<f32>,
    /// Of the logarithms of decays, if tokens bring some.
    pub d_log_decay: Option<Tensor<f32>>,
    /// Of the writing strengths, if tokens bring some.
    pub d_beta: Option<Tensor<f32>>,
}

/// What forward was given and what comes from above.
#[derive(Debug, Clone, Copy)]
pub struct Upstream<'a, E> {
    /// The gradient of the outputs, `[B, T, H, Dv]`.
    pub d_out: TensorRef<'a, E>,
    /// The states with which forward began.
    pub initial: &'a State,
    /// For delta rules, what forward wrote to [`Results::reads`](super::Results::reads).
    pub reads: Option<TensorRef<'a, f32>>,
}

impl<R: Recurrence> Recurrent<R> {
    /// The gradients of a loss. `d_state` comes in as the gradient of the final states and goes out as that of the
    /// initial ones. Allocates the gradients.
    ///
    /// # Errors
    /// Those of [`Recurrent::backward_into`].
    pub fn backward<E: Element>(
        &self,
        tokens: &Tokens<'_, E>,
        upstream: Upstream<'_, E>,
        d_state: &mut State,
    ) -> Result<RecurrentBackward> {
        let zeros = |x: Option<TensorRef<'_, f32>>| x.map(|x| Tensor::zeros(x.shape())).transpose();
        let mut d_q = Tensor::zeros(tokens.q.shape())?;
        let mut d_k = Tensor::zeros(tokens.k.shape())?;
        let mut d_v = Tensor::zeros(tokens.v.shape())?;
        let mut d_log_decay = zeros(tokens.log_decay)?;
        let mut d_beta = zeros(tokens.beta)?;
        let gradients = Gradients {
            d_q: d_q.view_mut(),
            d_k: d_k.view_mut(),
            d_v: d_v.view_mut(),
            d_log_decay: d_log_decay.as_mut().map(Tensor::view_mut),
            d_beta: d_beta.as_mut().map(Tensor::view_mut),
        };
        self.backward_into(tokens, upstream, gradients, d_state, &mut Workspace::new())?;
        Ok(RecurrentBackward { d_q, d_k, d_v, d_log_decay, d_beta })
    }

    /// The same without allocating, but for a workspace that has to grow.
    ///
    /// # Errors
    /// Those of [`Recurrent::forward_into`], for every tensor here. Nothing is written then.
    pub fn backward_into<E: Element>(
        &self,
        tokens: &Tokens<'_, E>,
        upstream: Upstream<'_, E>,
        gradients: Gradients<'_>,
        d_state: &mut State,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let sizes = self.check(tokens)?;
        let form = self.mechanism.form();
        check_upstream(tokens.v.shape(), &upstream, form.beta)?;
        check_gradients(tokens, &gradients)?;
        upstream.initial.check(sizes.state(), form.sums)?;
        d_state.check(sizes.state(), form.sums)?;
        let engine = Engine { mechanism: &self.mechanism, tokens, sizes, queries: None };
        self.run_backward(&engine, upstream, gradients, (d_state, workspace))
    }

    /// A call that has been checked.
    pub(super) fn run_backward<E: Element>(
        &self,
        engine: &Engine<'_, '_, R, E>,
        upstream: Upstream<'_, E>,
        gradients: Gradients<'_>,
        (d_state, workspace): (&mut State, &mut Workspace),
    ) -> Result<()> {
        let sizes = engine.sizes;
        let blocks = (0..sizes.spans.count()).map(|n| engine.blocks(&sizes.spans.get(n).1));
        let kept = self.mechanism.kept(sizes.key_dim, sizes.value_dim);
        let carried = Carried::floats(&sizes, blocks.max().unwrap_or(0) * BLOCK * kept);
        let (cpu, spans) = (self.machine()?, sizes.spans);
        let per = sizes.heads / sizes.groups;
        let near = NEAR / (8 * per * sizes.key_dim * sizes.strides().1);
        let groups = together(sizes.groups, spans.count(), cpu.threads.count(), near);
        let units = spans.count() * (sizes.groups / groups);
        let each = groups * per;
        let floats = Scratch::floats(&sizes) + each * carried;
        let (level, scratches) = (cpu.level, scratches(workspace, cpu, units, floats)?);
        let Gradients { d_q, d_k, d_v, d_log_decay, d_beta } = gradients;
        let queries = engine.query_spans()?;
        let keys = d_q.into_patches(queries, groups).zip(d_k.into_patches(spans, groups));
        let mut decays = d_log_decay.map(|d| d.into_patches(spans, each));
        let mut betas = d_beta.map(|d| d.into_patches(spans, each));
        let states = d_state.units_mut(each).zip(upstream.initial.units(each));
        let rest = d_v.into_patches(spans, each).zip(states);
        let items = keys.zip(rest).enumerate().map(move |(index, ((d_q, d_k), (d_v, states)))| {
            let d_log_decay = decays.as_mut().and_then(Iterator::next);
            let d_beta = betas.as_mut().and_then(Iterator::next);
            let (d_state, initial) = states;
            Unit { index, d_q, d_k, d_v, d_log_decay, d_beta, d_state, initial }
        });
        let work = Backward { engine, level, upstream, kept, carried, each };
        for_each_item(items, scratches, |unit, floats| work.unit(unit, floats));
        Ok(())
    }
}

pub(super) fn check_upstream<E: Element>(
    out: Shape,
    upstream: &Upstream<'_, E>,
    delta: bool,
) -> Result<()> {
    expect("gradient of outputs", out, upstream.d_out.shape())?;
    match (upstream.reads, delta) {
        (Some(reads), true) => expect("reads of keys", out, reads.shape()),
        (None, true) => Err(Error::InvalidParameter {
            what: "reads of keys",
            expected: "those that forward_into wrote",
            got: "none".into(),
        }),
        (Some(_), false) => Err(Error::InvalidParameter {
            what: "reads of keys",
            expected: "none, since this is no delta rule",
            got: "some".into(),
        }),
        (None, false) => Ok(()),
    }
}

pub(super) fn check_gradients<E: Element>(
    tokens: &Tokens<'_, E>,
    gradients: &Gradients<'_>,
) -> Result<()> {
    let Gradients { d_q, d_k, d_v, d_log_decay, d_beta } = gradients;
    expect("gradient of queries", tokens.q.shape(), d_q.shape())?;
    expect("gradient of keys", tokens.k.shape(), d_k.shape())?;
    expect("gradient of values", tokens.v.shape(), d_v.shape())?;
    let gates = [
        ("gradient of decays", tokens.log_decay, d_log_decay),
        ("gradient of writing strengths", tokens.beta, d_beta),
    ];
    for (what, gate, gradient) in gates {
        let Some(gradient) = gradient else { continue };
        match gate {
            Some(gate) => expect(what, gate.shape(), gradient.shape())?,
            None => {
                let (expected, got) = ("none, since tokens bring no such gate", "one".into());
                return Err(Error::InvalidParameter { what, expected, got });
            }
        }
    }
    Ok(())
}

/// One sequence of neighbouring query/key heads with the value heads that read them.
struct Unit<'a> {
    index: usize,
    d_q: Patch<'a, f32>,
    d_k: Patch<'a, f32>,
    d_v: Patch<'a, f32>,
    d_log_decay: Option<Patch<'a, f32>>,
    d_beta: Option<Patch<'a, f32>>,
    d_state: (&'a mut [f32], &'a mut [f32]),
    initial: (&'a [f32], &'a [f32]),
}

/// What a thread writes to while it computes a unit.
struct Scratch<'a> {
    rows: Gathered<'a>,
    g: &'a mut [f32],
    reads: &'a mut [f32],
    d_q: &'a mut [f32],
    d_k: &'a mut [f32],
    d_v: &'a mut [f32],
    d_decay: &'a mut [f32],
    d_beta: &'a mut [f32],
    spare: &'a mut [f32],
    /// Gradients of rows that were mapped as a whole, and what belongs to each of them.
    d_rows: &'a mut [f32],
    row_sums: &'a mut [f32],
}

impl<'a> Scratch<'a> {
    fn floats(sizes: &Sizes<'_>) -> usize {
        let (keys, values) = sizes.strides();
        let decay = padded(sizes.decay_dim.unwrap_or(1));
        let rows = padded(sizes.input_dim) + 1;
        Gathered::floats(sizes) + BLOCK * (2 * keys + 3 * values + decay + 1 + rows) + keys
    }

    fn take(floats: &mut &'a mut [f32], sizes: &Sizes<'_>) -> Scratch<'a> {
        let (keys, values) = sizes.strides();
        let decay = padded(sizes.decay_dim.unwrap_or(1));
        Scratch {
            rows: Gathered::take(floats, sizes),
            g: take(floats, BLOCK * values),
            reads: take(floats, BLOCK * values),
            d_q: take(floats, BLOCK * keys),
            d_k: take(floats, BLOCK * keys),
            d_v: take(floats, BLOCK * values),
            d_decay: take(floats, BLOCK * decay),
            d_beta: take(floats, BLOCK),
            spare: take(floats, keys),
            d_rows: take(floats, BLOCK * padded(sizes.input_dim)),
            row_sums: take(floats, BLOCK),
        }
    }
}

/// What a value head carries from block to block.
struct Carried<'a> {
    z: &'a mut [f32],
    dz: &'a mut [f32],
    /// The sum of a decay's gradient over later tokens, as pairs of f32 that add up to an f64's worth of digits.
    suffix: [&'a mut [f32]; 2],
    ahead: &'a mut [f32],
    back: &'a mut [f32],
    back_transposed: &'a mut [f32],
    kept: &'a mut [f32],
}

impl<'a> Carried<'a> {
    fn floats(sizes: &Sizes<'_>, kept: usize) -> usize {
        let (keys, values) = sizes.strides();
        let states = 2 * keys * sizes.value_dim + values * sizes.key_dim;
        states + 2 * sizes.sums * keys + 2 * padded(sizes.decay_dim.unwrap_or(1)) + kept
    }

    fn take(mut floats: &'a mut [f32], sizes: &Sizes<'_>) -> Carried<'a> {
        let (keys, values) = sizes.strides();
        let decay = padded(sizes.decay_dim.unwrap_or(1));
        let floats = &mut floats;
        Carried {
            ahead: take(floats, keys * sizes.value_dim),
            back_transposed: take(floats, keys * sizes.value_dim),
            back: take(floats, values * sizes.key_dim),
            z: take(floats, sizes.sums * keys),
            dz: take(floats, sizes.sums * keys),
            suffix: [take(floats, decay), take(floats, decay)],
            kept: std::mem::take(floats),
        }
    }
}

struct Backward<'a, 'b, R, E> {
    engine: &'a Engine<'a, 'b, R, E>,
    level: Level,
    upstream: Upstream<'a, E>,
    /// Numbers a token that a pass keeps.
    kept: usize,
    /// Numbers that a value head carries.
    carried: usize,
    /// Value heads of a unit.
    each: usize,
}

/// A block of a value head of a unit.
#[derive(Debug, Clone, Copy)]
struct Spot {
    pass: Pass,
    /// Which of the unit's value heads.
    own: usize,
    place: Place,
    /// Which block of the sequence.
    n: usize,
    /// Its first row in patches.
    start: usize,
    /// What earlier passes have written to the unit's gradients.
    before: Written,
}

impl<R: Recurrence, E: Element> Backward<'_, '_, R, E> {
    fn unit(&self, mut unit: Unit<'_>, mut floats: &mut [f32]) {
        let sizes = &self.engine.sizes;
        let units = sizes.heads / self.each;
        let (batch, span) = sizes.spans.get(unit.index / units);
        let mut scratch = Scratch::take(&mut floats, sizes);
        for own in 0..self.each {
            self.begin(&unit, own, self.carried(floats, own));
        }
        let head = unit.index % units * self.each;
        let mut before = Written::default();
        for &pass in self.engine.mechanism.passes() {
            let mut written = Written::default();
            let blocks = self.engine.blocks(&span);
            let spot = |n: usize, own: usize| {
                let n = if pass == Pass::Ahead { n } else { blocks - 1 - n };
                let place = self.engine.place((batch, &span), head + own, n);
                Spot { pass, own, place, n, start: place.first - span.start, before }
            };
            for n in 0..blocks {
                for own in 0..self.each {
                    let next = match own + 1 < self.each {
                        true => Some(spot(n, own + 1)),
                        false => (n + 1 < blocks).then(|| spot(n + 1, 0)),
                    };
                    let near = next.map_or([Near::nothing(); 2], |next| {
                        self.near(&mut unit, next, self.carried(floats, next.own).kept, written)
                    });
                    let carried = self.carried(floats, own);
                    written = self.block(&mut unit, spot(n, own), (&mut scratch, carried), near);
                }
            }
            if pass == Pass::Ahead {
                for own in 0..self.each {
                    self.start_suffix(&unit, own, self.carried(floats, own));
                }
            }
            before = before.and(written);
        }
        for own in 0..self.each {
            self.end(&mut unit, own, &self.carried(floats, own));
        }
    }

    fn carried<'f>(&self, floats: &'f mut [f32], own: usize) -> Carried<'f> {
        Carried::take(&mut floats[own * self.carried..][..self.carried], &self.engine.sizes)
    }

    /// The initial state and the gradient of the final one, packed.
    fn begin(&self, unit: &Unit<'_>, own: usize, carried: Carried<'_>) {
        let Sizes { key_dim, value_dim, .. } = self.engine.sizes;
        let of = own * key_dim * value_dim..(own + 1) * key_dim * value_dim;
        let (initial, d_final) = (&unit.initial.0[of.clone()], &unit.d_state.0[of]);
        let (rows, transposed) = self.engine.sizes.layouts();
        transposed.pack_transposed(initial, carried.ahead);
        transposed.pack_transposed(d_final, carried.back_transposed);
        rows.pack(d_final, value_dim, carried.back);
        let (stride, each) = (self.engine.sizes.strides().0, self.engine.sizes.sums * key_dim);
        for (padded, all) in [(carried.z, unit.initial.1), (carried.dz, &*unit.d_state.1)] {
            padded.fill(0.0);
            let own = all[own * each..][..each].chunks_exact(key_dim);
            let rows = padded.chunks_exact_mut(stride).zip(own);
            rows.for_each(|(padded, sums)| padded[..key_dim].copy_from_slice(sums));
        }
    }

    /// The gradient of the initial state.
    fn end(&self, unit: &mut Unit<'_>, own: usize, carried: &Carried<'_>) {
        let Sizes { key_dim, value_dim, .. } = self.engine.sizes;
        let size = key_dim * value_dim;
        let d_matrix = &mut unit.d_state.0[own * size..][..size];
        self.engine.sizes.layouts().0.unpack(carried.back, d_matrix, value_dim);
        let (stride, each) = (self.engine.sizes.strides().0, self.engine.sizes.sums * key_dim);
        let own = unit.d_state.1[own * each..][..each].chunks_exact_mut(key_dim);
        let rows = carried.dz.chunks_exact(stride).zip(own);
        rows.for_each(|(padded, sums)| sums.copy_from_slice(&padded[..key_dim]));
    }

    /// rowsum(dS_T ∘ S_T), from the gradient of the final state and the state after the last token.
    fn start_suffix(&self, unit: &Unit<'_>, own: usize, carried: Carried<'_>) {
        let (form, transposed) =
            (self.engine.mechanism.form().decay, self.engine.sizes.layouts().1);
        let Carried { suffix: [high, low], ahead, .. } = carried;
        let size = self.engine.sizes.key_dim * self.engine.sizes.value_dim;
        let d_matrix = &unit.d_state.0[own * size..][..size];
        high.fill(0.0);
        low.fill(0.0);
        let rows = d_matrix.chunks_exact(self.engine.sizes.value_dim).enumerate();
        let sums = rows.map(|(c, row)| transposed.dot_transposed_column(ahead, c, row));
        match form {
            DecayForm::None => {}
            DecayForm::Scalar => split(sums.sum(), &mut high[0], &mut low[0]),
            DecayForm::Vector => sums.enumerate().for_each(|(c, sum)| {
                split(sum, &mut high[c], &mut low[c]);
            }),
        }
    }

    /// The rows that a block reads, and those that it writes to if it writes what the one before it wrote.
    fn near(&self, unit: &mut Unit<'_>, next: Spot, kept: &[f32], written: Written) -> [Near; 2] {
        let Spot { own, place: Place { batch, first, len, head, step }, start, .. } = next;
        let Sizes { heads, groups, input_dim, value_dim, decay_dim, .. } = self.engine.sizes;
        let (mut read, mut write) = (Near::of(len), Near::of(len));
        self.engine.near_inputs(&mut read, next.place);
        if step != Step::Write {
            let rows = self.upstream.d_out.head(batch, head).slice(first..first + len);
            read.add(rows.as_ptr(), rows.stride(), rows.width());
        }
        if let Some(reads) = self.upstream.reads {
            let rows = reads.head(batch, head).slice(first..first + len);
            read.add(rows.as_ptr(), rows.stride(), rows.width());
        }
        if next.pass != self.engine.mechanism.passes()[0] {
            read.add(kept[next.n * BLOCK * self.kept..].as_ptr(), self.kept, self.kept);
        }
        let group = own / (heads / groups);
        let patches = [
            (written.q && step != Step::Write, Some(&mut unit.d_q), group, input_dim),
            (written.k && step != Step::Read, Some(&mut unit.d_k), group, input_dim),
            (written.v && step != Step::Read, Some(&mut unit.d_v), own, value_dim),
            (written.decay, unit.d_log_decay.as_mut(), own, decay_dim.unwrap_or(1)),
        ];
        for (wanted, patch, head, width) in patches {
            if let Some(patch) = patch.filter(|_| wanted) {
                write.add(patch.row(start, head).as_ptr(), patch.stride(), width);
            }
        }
        [read, write]
    }

    /// One pass over one block of a head; returns what it has written.
    fn block(
        &self,
        unit: &mut Unit<'_>,
        spot: Spot,
        (scratch, carried): (&mut Scratch<'_>, Carried<'_>),
        near: [Near; 2],
    ) -> Written {
        let (engine, level) = (self.engine, self.level);
        let (keys, values) = engine.sizes.strides();
        let decay = padded(engine.sizes.decay_dim.unwrap_or(1));
        let Place { batch, first, len, head, step } = spot.place;
        engine.gather(level, &mut scratch.rows, spot.place);
        engine.gather_upstream(level, self.upstream.d_out, spot.place, scratch.g);
        if let Some(reads) = self.upstream.reads {
            let reads = reads.head(batch, head).slice(first..first + len);
            gather(level, reads, FeatureMap::Identity, scratch.reads);
        }
        let (rows, transposed) = engine.sizes.layouts();
        let Carried { z, dz, suffix, ahead, back, back_transposed, kept } = carried;
        let written = engine.mechanism.backward(
            spot.pass,
            &mut BlockGradient {
                level,
                step,
                len,
                strides: (keys, values),
                q: &scratch.rows.q[..len * keys],
                k: &scratch.rows.k[..len * keys],
                v: &scratch.rows.v[..len * values],
                g: &mut scratch.g[..len * values],
                decay: scratch.rows.decay,
                beta: &scratch.rows.beta[..len],
                reads: &scratch.reads[..len * values],
                kept: &mut kept[spot.n * BLOCK * self.kept..][..len * self.kept],
                ahead: Matrix { data: ahead, layout: transposed },
                back: Matrix { data: back, layout: rows },
                back_transposed: Matrix { data: back_transposed, layout: transposed },
                sums: (z, dz),
                spare: scratch.spare,
                d_q: &mut scratch.d_q[..len * keys],
                d_k: &mut scratch.d_k[..len * keys],
                d_v: &mut scratch.d_v[..len * values],
                d_decay: &mut scratch.d_decay[..len * decay],
                d_beta: &mut scratch.d_beta[..len],
                suffix,
                near: near.each_ref(),
            },
        );
        self.scatter(written, unit, spot, scratch);
        written
    }

    /// Adds or copies what a pass has written to the gradients.
    fn scatter(
        &self,
        written: Written,
        unit: &mut Unit<'_>,
        spot: Spot,
        scratch: &mut Scratch<'_>,
    ) {
        let (engine, level) = (self.engine, self.level);
        let map = engine.mechanism.form().map;
        let (keys, values) = engine.sizes.strides();
        let Scratch { rows, d_q, d_k, d_v, d_decay, d_beta, d_rows, row_sums, .. } = scratch;
        let Spot { own, place: Place { batch, first, len, step, .. }, start, before, .. } = spot;
        let (queries, keys_too) = (step != Step::Write, step != Step::Read);
        for t in
            (0..if keys_too { len } else { 0 }).filter(|t| !engine.is_present(batch, first + t))
        {
            d_k[t * keys..(t + 1) * keys].fill(0.0);
            d_v[t * values..(t + 1) * values].fill(0.0);
        }
        let per = engine.sizes.heads / engine.sizes.groups;
        let (raw, inputs) = (&mut *rows.raw, padded(engine.sizes.input_dim));
        let features = [
            (Role::Query, written.q && queries, before.q, &*rows.q, &mut *d_q, &mut unit.d_q),
            (Role::Key, written.k && keys_too, before.k, &*rows.k, &mut *d_k, &mut unit.d_k),
        ];
        for (role, written, before, mapped, gradient, patch) in features {
            if !written {
                continue;
            }
            let (mapped, gradient) = (&mapped[..len * keys], &mut gradient[..len * keys]);
            let (gradient, keys) = match engine.mechanism.row_maps() {
                None => {
                    derive(level, map, mapped, gradient);
                    (&*gradient, keys)
                }
                Some(maps) => {
                    let x = engine.raw_rows(level, role, spot.place, raw);
                    let to = (&mut row_sums[..len], &mut d_rows[..len * inputs]);
                    maps.derive(level, role, x, (mapped, gradient), to);
                    if role == Role::Key {
                        engine.leave_out_absent(d_rows, inputs, 0.0, spot.place);
                    }
                    (&d_rows[..len * inputs], inputs)
                }
            };
            let to = Target { patch, first: start, head: own / per };
            match before || own % per > 0 {
                true => accumulate_rows(level, gradient, keys, len, to),
                false => copy_rows(gradient, keys, len, to),
            }
        }
        let decay = padded(engine.sizes.decay_dim.unwrap_or(1));
        if written.v && keys_too {
            let to = Target { patch: &mut unit.d_v, first: start, head: own };
            copy_rows(d_v, values, len, to);
        }
        if let Some(patch) = unit.d_log_decay.as_mut().filter(|_| written.decay) {
            copy_rows(d_decay, decay, len, Target { patch, first: start, head: own });
        }
        if let Some(patch) = unit.d_beta.as_mut().filter(|_| written.beta) {
            copy_rows(d_beta, 1, len, Target { patch, first: start, head: own });
        }
    }
}

/// A number in two parts whose sum has the digits of an f64 that counts.
fn split(x: f64, high: &mut f32, low: &mut f32) {
    *high = x as f32;
    *low = (x - f64::from(*high)) as f32;
}

impl<'a, E: Element> Upstream<'a, E> {
    /// Without reads, for mechanisms that are no delta rules.
    pub fn new(d_out: TensorRef<'a, E>, initial: &'a State) -> Upstream<'a, E> {
        Upstream { d_out, initial, reads: None }
    }
}
