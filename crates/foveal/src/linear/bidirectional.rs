//! Linear attention that is not causal: every query reads what all keys have written.
//!
//! ```text
//! S = S₀ + Σ_j φ(k_j) v_jᵀ      z = z₀ + Σ_j φ(k_j)      o_i = Sᵀ φ(q_i) / (φ(q_i) · z + ε)
//!
//! dφ(q)_i = S g_i + h_i z       dS = dS' + Σ_i φ(q_i) g_iᵀ      dz = dz' + Σ_i h_i φ(q_i)
//! dφ(k)_j = dS v_j + dz         dv_j = dSᵀ φ(k_j)               dS₀ = dS, dz₀ = dz
//! ```
//!
//! with g and h as in [`Linear`]. There may be other numbers of queries than of keys. Cost: 2·Dk·Dv operations for each key
//! and for each query.

use super::backward::{Gradients, Upstream, check_gradients, check_upstream};
use super::block::BLOCK;
use super::driver::{Engine, Gathered, Place, Recurrent, scratches, take};
use super::tokens::{Sizes, expect};
use super::{Linear, Recurrence, State, Tokens};
use crate::element::Element;
use crate::error::{Error, Result};
use crate::parallel::for_each_item;
use crate::simd::row::scale_into;
use crate::simd::sweep::{Decay, Layout, Read, Sweep, TokenRows, Write, sweep};
use crate::simd::token::{
    Features, Normaliser, accumulate, denominators, derive, divide, normalise_keys,
    normalise_queries,
};
use crate::tensor::{Patch, Shape, Spans, Tensor, TensorMut};
use crate::workspace::Workspace;

impl Recurrent<Linear> {
    /// The outputs of queries that read all keys. `state` holds what was written before and after. Allocates the outputs.
    ///
    /// # Errors
    /// Those of [`Recurrent::forward_bidirectional_into`].
    pub fn forward_bidirectional<E: Element>(
        &self,
        tokens: &Tokens<'_, E>,
        state: &mut State,
    ) -> Result<Tensor<E>> {
        let mut out = Tensor::zeros(out_shape(tokens))?;
        self.forward_bidirectional_into(tokens, out.view_mut(), state, &mut Workspace::new())?;
        Ok(out)
    }

    /// The same without allocating, but for a workspace that has to grow.
    ///
    /// # Errors
    /// Those of [`Recurrent::forward_into`]; [`Error::InvalidParameter`] for packed sequences.
    pub fn forward_bidirectional_into<E: Element>(
        &self,
        tokens: &Tokens<'_, E>,
        out: TensorMut<'_, E>,
        state: &mut State,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let sizes = self.check_bidirectional(tokens)?;
        expect("outputs", out_shape(tokens), out.shape())?;
        state.check(sizes.state(), self.mechanism.form().normaliser)?;
        let units = sizes.spans.count() * sizes.heads;
        let cpu = self.machine()?;
        let (level, scratches) =
            (cpu.level, scratches(workspace, cpu, units, Scratch::floats(&sizes))?);
        let engine = Engine { mechanism: &self.mechanism, tokens, sizes, level };
        let queries = Spans::new(tokens.q.shape().batch, tokens.q.shape().seq, None)?;
        let items = out.into_patches(queries, 1).zip(state.units_mut(1)).enumerate();
        for_each_item(items, scratches, |(index, (out, state)), floats| {
            let mut head = Head::new(&engine, index, Scratch::take(floats, &sizes));
            head.forward(out, state);
        });
        Ok(())
    }

    /// The gradients of a loss; the arguments are those of [`Recurrent::backward_into`].
    ///
    /// # Errors
    /// Those of [`Recurrent::backward_into`]; [`Error::InvalidParameter`] for packed sequences.
    pub fn backward_bidirectional_into<E: Element>(
        &self,
        tokens: &Tokens<'_, E>,
        upstream: Upstream<'_, E>,
        gradients: Gradients<'_>,
        d_state: &mut State,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let sizes = self.check_bidirectional(tokens)?;
        let normaliser = self.mechanism.form().normaliser;
        check_upstream(out_shape(tokens), &upstream, false)?;
        check_gradients(tokens, &gradients)?;
        upstream.initial.check(sizes.state(), normaliser)?;
        d_state.check(sizes.state(), normaliser)?;
        let units = sizes.spans.count() * sizes.groups;
        let cpu = self.machine()?;
        let (level, scratches) =
            (cpu.level, scratches(workspace, cpu, units, Scratch::floats(&sizes))?);
        let engine = Engine { mechanism: &self.mechanism, tokens, sizes, level };
        let queries = Spans::new(tokens.q.shape().batch, tokens.q.shape().seq, None)?;
        let each = sizes.heads / sizes.groups;
        let Gradients { d_q, d_k, d_v, .. } = gradients;
        let d_keys = d_k.into_patches(sizes.spans, 1).zip(d_v.into_patches(sizes.spans, each));
        let states = d_state.units_mut(each).zip(upstream.initial.units(each));
        let items = d_q.into_patches(queries, 1).zip(d_keys).zip(states).enumerate();
        for_each_item(
            items,
            scratches,
            |(index, ((mut d_q, (mut d_k, mut d_v)), states)), floats| {
                (0..tokens.q.shape().seq).for_each(|t| d_q.row(t, 0).fill(0.0));
                (0..tokens.k.shape().seq).for_each(|t| d_k.row(t, 0).fill(0.0));
                let (d_state, initial) = states;
                let (size, sums) = (sizes.key_dim * sizes.value_dim, initial.1.len() / each);
                for own in 0..each {
                    let scratch = Scratch::take(floats, &sizes);
                    let mut head = Head::new(&engine, index * each + own, scratch);
                    let of = |n: usize| own * n..(own + 1) * n;
                    head.remember(&initial.0[of(size)], &initial.1[of(sums)]);
                    let d_state = (&mut d_state.0[of(size)], &mut d_state.1[of(sums)]);
                    head.backward_queries(&upstream, &mut d_q, d_state);
                    head.backward_keys(&mut d_k, (&mut d_v, own));
                }
            },
        );
        Ok(())
    }

    fn check_bidirectional<'a, E: Element>(&self, tokens: &Tokens<'a, E>) -> Result<Sizes<'a>> {
        if let Some(cuts) = tokens.cuts {
            return Err(Error::InvalidParameter {
                what: "cuts of packed sequences",
                expected: "none, since every query reads all keys; use a batch",
                got: format!("{cuts:?}"),
            });
        }
        let q = tokens.q.shape();
        let keys = Shape { seq: tokens.k.shape().seq, ..q };
        // Queries are checked but for their number: keys stand in for them.
        expect("keys, but for their number the shape of queries", keys, tokens.k.shape())?;
        self.check(&Tokens { q: tokens.k, ..*tokens })
    }
}

fn out_shape<E: Element>(tokens: &Tokens<'_, E>) -> Shape {
    Shape { seq: tokens.q.shape().seq, ..tokens.v.shape() }
}

/// What a thread writes to while it computes a head.
struct Scratch<'a> {
    rows: Gathered<'a>,
    zeros: &'a mut [f32],
    g: &'a mut [f32],
    out: &'a mut [f32],
    features: &'a mut [f32],
    den: &'a mut [f32],
    h: &'a mut [f32],
    z: &'a mut [f32],
    dz: &'a mut [f32],
    states: States<'a>,
}

/// The state or its gradient, and transposes of both.
struct States<'a> {
    matrix: &'a mut [f32],
    transposed: &'a mut [f32],
    back: &'a mut [f32],
}

impl<'a> Scratch<'a> {
    fn floats(sizes: &Sizes<'_>) -> usize {
        let (keys, values) = sizes.strides();
        let rows = Gathered::floats(sizes) + BLOCK * (2 * keys + 2 * values + 2);
        rows + 2 * keys + values * sizes.key_dim + 2 * keys * sizes.value_dim
    }

    fn take(mut floats: &'a mut [f32], sizes: &Sizes<'_>) -> Scratch<'a> {
        let (keys, values) = sizes.strides();
        let floats = &mut floats;
        let scratch = Scratch {
            states: States {
                matrix: take(floats, values * sizes.key_dim),
                transposed: take(floats, keys * sizes.value_dim),
                back: take(floats, keys * sizes.value_dim),
            },
            rows: Gathered::take(floats, sizes),
            zeros: take(floats, BLOCK * keys),
            g: take(floats, BLOCK * values),
            out: take(floats, BLOCK * values),
            features: take(floats, BLOCK * keys),
            den: take(floats, BLOCK),
            h: take(floats, BLOCK),
            z: take(floats, keys),
            dz: take(floats, keys),
        };
        scratch.zeros.fill(0.0);
        scratch
    }
}

/// One head of one sequence.
struct Head<'a, 'b, E> {
    engine: &'a Engine<'a, 'b, Linear, E>,
    place: Place,
    epsilon: Option<f32>,
    scratch: Scratch<'a>,
}

/// The blocks of `seq` tokens: first token and length.
fn blocks(seq: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..seq).step_by(BLOCK).map(move |first| (first, BLOCK.min(seq - first)))
}

impl<'a, 'b, E: Element> Head<'a, 'b, E> {
    fn new(
        engine: &'a Engine<'a, 'b, Linear, E>,
        unit: usize,
        scratch: Scratch<'a>,
    ) -> Head<'a, 'b, E> {
        let heads = engine.sizes.heads;
        let place = Place { batch: unit / heads, head: unit % heads, first: 0, len: 0 };
        Head { engine, place, epsilon: engine.mechanism.epsilon(), scratch }
    }

    fn gather_keys(&mut self, (first, len): (usize, usize)) {
        let Gathered { k, v, .. } = &mut self.scratch.rows;
        self.engine.gather_keys((k, v), Place { first, len, ..self.place });
    }

    fn gather_queries(&mut self, (first, len): (usize, usize)) {
        self.engine.gather_queries(&mut self.scratch.rows, Place { first, len, ..self.place });
    }

    /// z ← z + Σ φ(k) over the block in the rows.
    fn sum_keys(&mut self, len: usize) {
        let Scratch { rows, zeros, den, z, .. } = &mut self.scratch;
        let rows = Features { q: zeros, k: rows.k, stride: self.engine.sizes.strides().0 };
        denominators(self.engine.level, rows, 0.0, z, &mut den[..len]);
    }

    /// den = φ(q) · z + ε for the block in the rows, or ones.
    fn denominators(&mut self, len: usize) {
        let Scratch { rows, zeros, den, z, .. } = &mut self.scratch;
        match self.epsilon {
            Some(epsilon) => {
                let rows = Features { q: rows.q, k: zeros, stride: self.engine.sizes.strides().0 };
                denominators(self.engine.level, rows, epsilon, z, &mut den[..len]);
            }
            None => den[..len].fill(1.0),
        }
    }

    fn forward(&mut self, mut out: Patch<'_, E>, (state, sums): (&mut [f32], &mut [f32])) {
        let (level, value_dim) = (self.engine.level, self.engine.sizes.value_dim);
        let (keys, values) = self.engine.sizes.strides();
        let layout = self.engine.sizes.layouts().0;
        layout.pack(state, value_dim, self.scratch.states.matrix);
        self.scratch.z.fill(0.0);
        self.scratch.z[..sums.len()].copy_from_slice(sums);
        for block in blocks(self.engine.tokens.k.shape().seq) {
            self.gather_keys(block);
            let Scratch { rows, states: States { matrix, .. }, .. } = &mut self.scratch;
            let write = write((rows.k, keys), (rows.v, values));
            sweep(level, plain((matrix, layout), block.1, Some(write), None));
            self.sum_keys(block.1);
        }
        for block in blocks(self.engine.tokens.q.shape().seq) {
            self.gather_queries(block);
            self.denominators(block.1);
            let Scratch { rows, states: States { matrix, .. }, out: read, den, .. } =
                &mut self.scratch;
            let by = TokenRows { data: rows.q, stride: keys };
            sweep(level, plain((matrix, layout), block.1, None, Some(Read { by, out: read })));
            for t in 0..block.1 {
                scale_into(level, &read[t * values..], 1.0 / den[t], out.row(block.0 + t, 0));
            }
        }
        layout.unpack(self.scratch.states.matrix, state, value_dim);
        sums.copy_from_slice(&self.scratch.z[..sums.len()]);
    }

    /// Sᵀ and z after all keys.
    fn remember(&mut self, matrix: &[f32], sums: &[f32]) {
        let (keys, values) = self.engine.sizes.strides();
        let layout = self.engine.sizes.layouts().1;
        layout.pack_transposed(matrix, self.scratch.states.transposed);
        self.scratch.z.fill(0.0);
        self.scratch.z[..sums.len()].copy_from_slice(sums);
        for block in blocks(self.engine.tokens.k.shape().seq) {
            self.gather_keys(block);
            let Scratch { rows, states: States { transposed, .. }, .. } = &mut self.scratch;
            let write = write((rows.v, values), (rows.k, keys));
            let state = (&mut **transposed, layout);
            sweep(self.engine.level, plain(state, block.1, Some(write), None));
            self.sum_keys(block.1);
        }
    }

    /// dφ(q) and what queries add to dS and dz.
    fn backward_queries(
        &mut self,
        upstream: &Upstream<'_, E>,
        d_q: &mut Patch<'_, f32>,
        (d_state, d_sums): (&mut [f32], &mut [f32]),
    ) {
        let (engine, (layout, transposed)) = (self.engine, self.engine.sizes.layouts());
        let (keys, values) = engine.sizes.strides();
        layout.pack(d_state, engine.sizes.value_dim, self.scratch.states.matrix);
        transposed.pack_transposed(d_state, self.scratch.states.back);
        self.scratch.dz.fill(0.0);
        self.scratch.dz[..d_sums.len()].copy_from_slice(d_sums);
        for block in blocks(engine.tokens.q.shape().seq) {
            let len = block.1;
            self.gather_queries(block);
            self.denominators(len);
            let place = Place { first: block.0, len, ..self.place };
            engine.gather_upstream(upstream.d_out, place, self.scratch.g);
            let Scratch { rows, zeros, g, den, h, features, z, dz, states, .. } = &mut self.scratch;
            let States { matrix, transposed: ahead, back } = states;
            let (den, h) = (&den[..len], &mut h[..len]);
            divide(engine.level, den, &mut g[..len * values]);
            let by = TokenRows { data: g, stride: values };
            sweep(
                engine.level,
                plain((ahead, transposed), len, None, Some(Read { by, out: features })),
            );
            if self.epsilon.is_some() {
                let rows = Features { q: rows.q, k: zeros, stride: keys };
                normalise_queries(engine.level, rows, Normaliser { den, h }, z, features);
            }
            let product = write((rows.q, keys), (g, values));
            sweep(engine.level, plain((matrix, layout), len, Some(product), None));
            let product = write((g, values), (rows.q, keys));
            sweep(engine.level, plain((back, transposed), len, Some(product), None));
            derive(
                engine.level,
                engine.mechanism.form().map,
                &rows.q[..len * keys],
                &mut features[..len * keys],
            );
            for t in 0..len {
                accumulate(engine.level, &features[t * keys..], d_q.row(block.0 + t, 0));
            }
            if self.epsilon.is_some() {
                // Only the sum is wanted: what it adds to rows goes nowhere.
                normalise_keys(engine.level, rows.q, h, dz, features);
            }
        }
        layout.unpack(self.scratch.states.matrix, d_state, engine.sizes.value_dim);
        d_sums.copy_from_slice(&self.scratch.dz[..d_sums.len()]);
    }

    /// dφ(k) and dv from dS and dz.
    fn backward_keys(
        &mut self,
        d_k: &mut Patch<'_, f32>,
        (d_v, own): (&mut Patch<'_, f32>, usize),
    ) {
        let (engine, (layout, transposed)) = (self.engine, self.engine.sizes.layouts());
        let (keys, values) = engine.sizes.strides();
        let map = engine.mechanism.form().map;
        for block in blocks(engine.tokens.k.shape().seq) {
            let len = block.1;
            self.gather_keys(block);
            let Scratch { rows, out, features, dz, states, .. } = &mut self.scratch;
            let States { matrix, back, .. } = states;
            let by = TokenRows { data: rows.k, stride: keys };
            sweep(engine.level, plain((matrix, layout), len, None, Some(Read { by, out })));
            let by = TokenRows { data: rows.v, stride: values };
            sweep(
                engine.level,
                plain((back, transposed), len, None, Some(Read { by, out: features })),
            );
            for t in 0..len {
                accumulate(engine.level, dz, &mut features[t * keys..(t + 1) * keys]);
            }
            derive(engine.level, map, &rows.k[..len * keys], &mut features[..len * keys]);
            for t in 0..len {
                let at = block.0 + t;
                let here = engine.is_present(self.place.batch, at);
                let d_v = d_v.row(at, own);
                if here {
                    accumulate(engine.level, &features[t * keys..], d_k.row(at, 0));
                    d_v.copy_from_slice(&out[t * values..][..d_v.len()]);
                } else {
                    d_v.fill(0.0);
                }
            }
        }
    }
}

/// An outer product for each token, of rows with their strides.
pub(crate) fn write<'a>(rows: (&'a [f32], usize), columns: (&'a [f32], usize)) -> Write<'a> {
    let of = |(data, stride)| TokenRows { data, stride };
    Write { rows: of(rows), columns: of(columns) }
}

/// A sweep without decay.
pub(crate) fn plain<'a>(
    (state, layout): (&'a mut [f32], Layout),
    tokens: usize,
    write: Option<Write<'a>>,
    read: Option<Read<'a>>,
) -> Sweep<'a> {
    let decay = Decay::None;
    Sweep {
        state,
        layout,
        tokens,
        reverse: false,
        decay,
        before: None,
        write,
        read,
        after: None,
        near: None,
    }
}
