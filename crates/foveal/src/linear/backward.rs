//! The driver of gradients: passes over each sequence, forwards with the state and backwards with its gradient.
//!
//! ```text
//! for each sequence and query/key head (shared out over threads), for each of its value heads:
//!     First, for delta rules    tokens backwards, with dS
//!     Ahead                     tokens forwards, with Sᵀ from the initial state       → dφ(q)
//!     Back                      tokens backwards, with dS and dSᵀ                     → dφ(k), dv
//! ```
//!
//! The state is made again, not stored: each product of a gradient with a state is a read of a sweep, of the state or
//! of its transpose. Gradients of the logarithms of decays are sums over the rest of the sequence,
//!
//! ```text
//! d log a_t = Σ_{i≥t} (q_i ∘ dq_i − k_i ∘ dk_i) + rowsum(dS_T ∘ S_T)         (one number: summed over channels)
//! ```
//!
//! taken in f64, so that no state has to be undone. Memory besides tensors: for each thread three states, the rows of one
//! block, and what [`Recurrence::kept`] says for each token of a sequence.

use super::block::{BLOCK, BlockGradient, Matrix, Pass, Written};
use super::driver::{Engine, Gathered, Place, Recurrent, scratches, take};
use super::tokens::{Sizes, expect};
use super::{DecayForm, FeatureMap, Recurrence, State, Tokens};
use crate::element::Element;
use crate::error::{Error, Result};
use crate::parallel::for_each_item;
use crate::simd::sweep::padded;
use crate::simd::token::{Target, accumulate_rows, derive, gather};
use crate::tensor::{Patch, Shape, Tensor, TensorMut, TensorRef};
use crate::workspace::Workspace;
use std::ops::Range;

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
        upstream.initial.check(sizes.state(), form.normaliser)?;
        d_state.check(sizes.state(), form.normaliser)?;
        let units = sizes.spans.count() * sizes.groups;
        let longest = (0..sizes.spans.count()).map(|n| sizes.spans.get(n).1.len()).max();
        let kept = self.mechanism.kept(sizes.key_dim, sizes.value_dim);
        let blocks = longest.unwrap_or(0).div_ceil(BLOCK);
        let floats = Scratch::floats(&sizes, blocks * BLOCK * kept);
        let cpu = self.machine()?;
        let (level, scratches) = (cpu.level, scratches(workspace, cpu, units, floats)?);
        let engine = Engine { mechanism: &self.mechanism, tokens, sizes, level };
        let (spans, each) = (sizes.spans, sizes.heads / sizes.groups);
        let Gradients { d_q, d_k, d_v, d_log_decay, d_beta } = gradients;
        let keys = d_q.into_patches(spans, 1).zip(d_k.into_patches(spans, 1));
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
        let work = Backward { engine, upstream, kept };
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

/// One sequence of one query/key head with the value heads that read it.
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
    z: &'a mut [f32],
    dz: &'a mut [f32],
    spare: &'a mut [f32],
    /// The sum of a decay's gradient over later tokens, as pairs of f32 that add up to an f64's worth of digits.
    suffix: [&'a mut [f32]; 2],
    ahead: &'a mut [f32],
    back: &'a mut [f32],
    back_transposed: &'a mut [f32],
    kept: &'a mut [f32],
}

impl<'a> Scratch<'a> {
    fn floats(sizes: &Sizes<'_>, kept: usize) -> usize {
        let (keys, values) = sizes.strides();
        let decay = padded(sizes.decay_dim.unwrap_or(1));
        let rows = Gathered::floats(sizes) + BLOCK * (2 * keys + 3 * values + decay + 1);
        let states = 2 * keys * sizes.value_dim + values * sizes.key_dim;
        rows + 3 * keys + 2 * decay + states + kept
    }

    fn take(mut floats: &'a mut [f32], sizes: &Sizes<'_>) -> Scratch<'a> {
        let (keys, values) = sizes.strides();
        let decay = padded(sizes.decay_dim.unwrap_or(1));
        let floats = &mut floats;
        Scratch {
            ahead: take(floats, keys * sizes.value_dim),
            back_transposed: take(floats, keys * sizes.value_dim),
            back: take(floats, values * sizes.key_dim),
            rows: Gathered::take(floats, sizes),
            g: take(floats, BLOCK * values),
            reads: take(floats, BLOCK * values),
            d_q: take(floats, BLOCK * keys),
            d_k: take(floats, BLOCK * keys),
            d_v: take(floats, BLOCK * values),
            d_decay: take(floats, BLOCK * decay),
            d_beta: take(floats, BLOCK),
            z: take(floats, keys),
            dz: take(floats, keys),
            spare: take(floats, keys),
            suffix: [take(floats, decay), take(floats, decay)],
            kept: std::mem::take(floats),
        }
    }
}

struct Backward<'a, 'b, R, E> {
    engine: Engine<'a, 'b, R, E>,
    upstream: Upstream<'a, E>,
    kept: usize,
}

impl<R: Recurrence, E: Element> Backward<'_, '_, R, E> {
    fn unit(&self, mut unit: Unit<'_>, floats: &mut [f32]) {
        let Sizes { spans, groups, heads, .. } = self.engine.sizes;
        let (batch, span) = spans.get(unit.index / groups);
        for t in 0..span.len() {
            unit.d_q.row(t, 0).fill(0.0);
            unit.d_k.row(t, 0).fill(0.0);
        }
        let each = heads / groups;
        for own in 0..each {
            let head = unit.index % groups * each + own;
            let place = Place { batch, first: span.start, len: span.len(), head };
            self.head(&mut unit, own, place, Scratch::take(floats, &self.engine.sizes));
        }
    }

    /// All passes of the `own`-th value head of a unit.
    fn head(&self, unit: &mut Unit<'_>, own: usize, place: Place, mut scratch: Scratch<'_>) {
        let Sizes { key_dim, value_dim, .. } = self.engine.sizes;
        let size = key_dim * value_dim;
        let of = |n: usize| own * n..(own + 1) * n;
        let matrix = &unit.initial.0[of(size)];
        let d_matrix = &mut unit.d_state.0[of(size)];
        let sums = if unit.initial.1.is_empty() { 0 } else { key_dim };
        let (rows, transposed) = self.engine.sizes.layouts();
        transposed.pack_transposed(matrix, scratch.ahead);
        transposed.pack_transposed(d_matrix, scratch.back_transposed);
        rows.pack(d_matrix, value_dim, scratch.back);
        for (padded, own) in [
            (&mut scratch.z, &unit.initial.1[of(sums)]),
            (&mut scratch.dz, &unit.d_state.1[of(sums)]),
        ] {
            padded.fill(0.0);
            padded[..sums].copy_from_slice(own);
        }
        let blocks = place.len.div_ceil(BLOCK);
        for &pass in self.engine.mechanism.passes() {
            for n in 0..blocks {
                let n = if pass == Pass::Ahead { n } else { blocks - 1 - n };
                let tokens = n * BLOCK..place.len.min((n + 1) * BLOCK);
                self.block(pass, unit, (own, place, tokens), &mut scratch);
            }
            if pass == Pass::Ahead {
                self.start_suffix(&unit.d_state.0[of(size)], &mut scratch);
            }
        }
        rows.unpack(scratch.back, &mut unit.d_state.0[of(size)], value_dim);
        unit.d_state.1[of(sums)].copy_from_slice(&scratch.dz[..sums]);
    }

    /// rowsum(dS_T ∘ S_T), from the gradient of the final state and the state after the last token.
    fn start_suffix(&self, d_matrix: &[f32], scratch: &mut Scratch<'_>) {
        let (form, transposed) =
            (self.engine.mechanism.form().decay, self.engine.sizes.layouts().1);
        let Scratch { suffix: [high, low], ahead, .. } = scratch;
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

    /// One pass over one block of a head.
    fn block(
        &self,
        pass: Pass,
        unit: &mut Unit<'_>,
        (own, place, tokens): (usize, Place, Range<usize>),
        scratch: &mut Scratch<'_>,
    ) {
        let engine = &self.engine;
        let (keys, values) = engine.sizes.strides();
        let decay = padded(engine.sizes.decay_dim.unwrap_or(1));
        let len = tokens.len();
        let here = Place { first: place.first + tokens.start, len, ..place };
        engine.gather(&mut scratch.rows, here);
        engine.gather_upstream(self.upstream.d_out, here, scratch.g);
        if let Some(reads) = self.upstream.reads {
            let reads = reads.head(here.batch, here.head).slice(here.first..here.first + len);
            gather(engine.level, reads, FeatureMap::Identity, scratch.reads);
        }
        let (rows, transposed) = self.engine.sizes.layouts();
        let written = engine.mechanism.backward(
            pass,
            &mut BlockGradient {
                level: engine.level,
                len,
                strides: (keys, values),
                q: &scratch.rows.q[..len * keys],
                k: &scratch.rows.k[..len * keys],
                v: &scratch.rows.v[..len * values],
                g: &mut scratch.g[..len * values],
                decay: scratch.rows.decay,
                beta: &scratch.rows.beta[..len],
                reads: &scratch.reads[..len * values],
                kept: &mut scratch.kept[tokens.start * self.kept..][..len * self.kept],
                ahead: Matrix { data: scratch.ahead, layout: transposed },
                back: Matrix { data: scratch.back, layout: rows },
                back_transposed: Matrix { data: scratch.back_transposed, layout: transposed },
                sums: (scratch.z, scratch.dz),
                spare: scratch.spare,
                d_q: &mut scratch.d_q[..len * keys],
                d_k: &mut scratch.d_k[..len * keys],
                d_v: &mut scratch.d_v[..len * values],
                d_decay: &mut scratch.d_decay[..len * decay],
                d_beta: &mut scratch.d_beta[..len],
                suffix: scratch.suffix.each_mut().map(|suffix| &mut **suffix),
            },
        );
        self.scatter(written, unit, (own, here, tokens.start), scratch);
    }

    /// Adds or copies what a pass has written to the gradients.
    fn scatter(
        &self,
        written: Written,
        unit: &mut Unit<'_>,
        (own, place, start): (usize, Place, usize),
        scratch: &mut Scratch<'_>,
    ) {
        let engine = &self.engine;
        let (level, map) = (engine.level, engine.mechanism.form().map);
        let (keys, values) = engine.sizes.strides();
        let Scratch { rows, d_q, d_k, d_v, d_decay, d_beta, .. } = scratch;
        let Place { batch, first, len, .. } = place;
        if written.q {
            derive(level, map, &rows.q[..len * keys], &mut d_q[..len * keys]);
        }
        if written.k {
            derive(level, map, &rows.k[..len * keys], &mut d_k[..len * keys]);
        }
        for t in (0..len).filter(|t| !engine.is_present(batch, first + t)) {
            d_k[t * keys..(t + 1) * keys].fill(0.0);
            d_v[t * values..(t + 1) * values].fill(0.0);
        }
        if written.q {
            let to = Target { patch: &mut unit.d_q, first: start, head: 0 };
            accumulate_rows(level, d_q, keys, len, to);
        }
        if written.k {
            let to = Target { patch: &mut unit.d_k, first: start, head: 0 };
            accumulate_rows(level, d_k, keys, len, to);
        }
        let decay = padded(engine.sizes.decay_dim.unwrap_or(1));
        for t in 0..len {
            let at = start + t;
            if written.v {
                let to = unit.d_v.row(at, own);
                to.copy_from_slice(&d_v[t * values..][..to.len()]);
            }
            if let Some(patch) = unit.d_log_decay.as_mut().filter(|_| written.decay) {
                let to = patch.row(at, own);
                to.copy_from_slice(&d_decay[t * decay..][..to.len()]);
            }
            if let Some(patch) = unit.d_beta.as_mut().filter(|_| written.beta) {
                patch.row(at, own)[0] = d_beta[t];
            }
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
