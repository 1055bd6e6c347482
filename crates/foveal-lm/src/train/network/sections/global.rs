//! Longformer's global tokens with projections of their own.
//!
//! ```text
//! row g of a global token    softmax over tokens (all, or those up to g) of scale ⟨q'_g, k'_j⟩, times v'_j
//! q', k', v' = x W'          normed and rotated as the layer's other queries and keys are
//! backward                   such rows send nothing to the layer's own queries, keys and values
//! ```
//!
//! Other rows see global tokens by the layer's own keys and values. Positions are counted in the call: a segment sees itself.
//! Beltagy et al. 2020 (arXiv:2004.05150), section 3.1. In bf16 projections are rounded, scores of these few rows are not.

use foveal::{Attention, Dropout, Gradient, Scale, Shape, Tensor, TensorMut, TensorRef, plan};

use super::SectionPlace;
use super::exact::Exact;
use crate::Error;
use crate::config::Mechanism;
use crate::train::network::carried::SectionCarried;
use crate::train::network::place_seed;
use crate::train::network::section::{
    Positions, SectionCall, SectionGradients, SectionSaved, SectionUpstream, TrainedSection, taken,
};
use crate::train::network::tools::{Projected, Tools};

/// What such a section computes.
#[derive(Debug)]
pub(super) struct Global {
    /// All other rows.
    local: Exact,
    query: Projected,
    key: Projected,
    value: Projected,
    /// Ascending.
    positions: Vec<usize>,
    causal: bool,
    scale: Scale,
    heads: usize,
    kv_heads: usize,
    dim: usize,
}

/// The rows of a call that take part.
#[derive(Clone, Debug)]
struct Taking {
    sequences: usize,
    tokens: usize,
    /// Global tokens of each sequence.
    rows: Vec<usize>,
    /// Tokens from the first on that they see.
    keys: usize,
}

/// Queries of global tokens, and the keys and values that they see: `[sequences, rows or keys, heads, dim]`.
#[derive(Debug)]
struct Made {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    /// Queries and keys before their norms.
    unnormed: Option<[Vec<f32>; 2]>,
}

struct Saved {
    local: SectionSaved,
    /// With the log-sum-exp of each row, `[sequences, rows, heads]`.
    own: Option<(Made, Vec<f32>)>,
}

impl Global {
    /// `None` for other mechanisms.
    pub(super) fn new(
        mechanism: &Mechanism,
        place: SectionPlace<'_>,
    ) -> Result<Option<Global>, Error> {
        let Mechanism::Longformer { global, global_projections: true, .. } = mechanism else {
            return Ok(None);
        };
        let (heads, kv_heads) = (place.heads, place.kv_heads);
        let (width, dim) = (place.config.width, place.config.attention.head_dim);
        let projected = |name: &str, heads: usize| {
            Projected::new(place.ranges, &place.name(name), [heads * dim, width], false)
        };
        let mut positions = global.clone();
        positions.sort_unstable();
        positions.dedup();
        Ok(Some(Global {
            local: Exact::new(mechanism, place)?,
            query: projected("q_global", heads)?,
            key: projected("k_global", kv_heads)?,
            value: projected("v_global", kv_heads)?,
            positions,
            causal: place.causal,
            scale: place.scale(),
            heads,
            kv_heads,
            dim,
        }))
    }

    fn taking(&self, call: &SectionCall<'_>) -> Taking {
        let Shape { batch: sequences, seq: tokens, .. } = call.q.shape();
        let rows: Vec<usize> =
            self.positions.iter().copied().filter(|&position| position < tokens).collect();
        let last = rows.last().map_or(0, |last| last + 1);
        let keys = if self.causal || rows.is_empty() { last } else { tokens };
        Taking { sequences, tokens, rows, keys }
    }

    /// Tokens that row `g` sees.
    fn seen(&self, of: &Taking, g: usize) -> usize {
        if self.causal { g + 1 } else { of.tokens }
    }

    fn made(
        &self,
        call: &SectionCall<'_>,
        of: &Taking,
        tools: &mut Tools<'_>,
    ) -> Result<Made, Error> {
        let rows = gathered(call.x, of, &of.rows.iter().copied(), tools);
        let seen = gathered(call.x, of, &(0..of.keys), tools);
        let mut project = |projected: &Projected, x: &[f32]| {
            let count = x.len() / projected.shape.in_features.max(1);
            let mut y = tools.pool.take(count * projected.shape.out_features);
            projected.forward(call.parameters, x, &mut y, tools)?;
            Ok::<_, Error>(y)
        };
        let (mut q, mut k) = (project(&self.query, &rows)?, project(&self.key, &seen)?);
        let v = project(&self.value, &seen)?;
        tools.pool.give(rows);
        tools.pool.give(seen);
        let mut unnormed = None;
        if let Some(norms) = call.norms {
            let plain = [q, k];
            let [mut normed_q, mut normed_k] = plain.each_ref().map(|x| tools.pool.take(x.len()));
            norms[0].forward(call.parameters, &plain[0], &mut normed_q, tools)?;
            norms[1].forward(call.parameters, &plain[1], &mut normed_k, tools)?;
            (q, k) = (normed_q, normed_k);
            unnormed = Some(plain);
        }
        let level = tools.cpu.level;
        let [of_rows, of_keys] = self.tables(call, of)?;
        of_rows.rotate(level, TensorMut::new(&mut q, self.queries(of))?)?;
        of_keys.rotate(level, TensorMut::new(&mut k, self.keys(of))?)?;
        Ok(Made { q, k, v, unnormed })
    }

    /// Rotations of the rows, and of what they see.
    fn tables(
        &self,
        call: &SectionCall<'_>,
        of: &Taking,
    ) -> Result<[foveal::position::RopeTable; 2], Error> {
        let rows: Vec<usize> = of.rows.iter().map(|row| call.start + row).collect();
        Ok([call.rope.table(rows)?, call.rope.table(call.start..call.start + of.keys)?])
    }

    fn queries(&self, of: &Taking) -> Shape {
        Shape { batch: of.sequences, seq: of.rows.len(), heads: self.heads, dim: self.dim }
    }

    fn keys(&self, of: &Taking) -> Shape {
        Shape { batch: of.sequences, seq: of.keys, heads: self.kv_heads, dim: self.dim }
    }

    fn attention(
        &self,
        call: &SectionCall<'_>,
        sequence: usize,
        tools: &Tools<'_>,
    ) -> Attention<'static> {
        let attention = Attention::new().scale(self.scale).cpu(tools.cpu);
        match call.dropout {
            Some(Dropout { rate, seed }) => {
                let seed = place_seed(seed, 1 + sequence as u64);
                attention.dropout(Dropout { rate, seed })
            }
            None => attention,
        }
    }

    /// Row `n` of a sequence, and what it sees.
    fn inputs<'a>(
        &self,
        made: &'a Made,
        of: &Taking,
        (sequence, n): (usize, usize),
    ) -> Result<plan::Inputs<'a, f32, f32>, Error> {
        let (row, token) = (self.heads * self.dim, self.kv_heads * self.dim);
        let seen = self.seen(of, of.rows[n]);
        let q = Shape { batch: 1, seq: 1, heads: self.heads, dim: self.dim };
        let k = Shape { seq: seen, heads: self.kv_heads, ..q };
        let keys = sequence * of.keys * token..(sequence * of.keys + seen) * token;
        Ok(plan::Inputs {
            q: TensorRef::new(&made.q[(sequence * of.rows.len() + n) * row..][..row], q)?,
            k: TensorRef::new(&made.k[keys.clone()], k)?,
            v: TensorRef::new(&made.v[keys], k)?,
        })
    }

    /// The gradients of queries, keys and values of global rows.
    fn made_backward(
        &self,
        call: &SectionCall<'_>,
        of: &Taking,
        (made, lse): (&Made, &[f32]),
        upstream: SectionUpstream<'_>,
        tools: &mut Tools<'_>,
    ) -> Result<[Vec<f32>; 3], Error> {
        let mut d_q = tools.pool.take(made.q.len());
        let mut d_k = tools.pool.zeros(made.k.len());
        let mut d_v = tools.pool.zeros(made.v.len());
        let token = self.kv_heads * self.dim;
        for (sequence, n, g) in of.all() {
            let inputs = self.inputs(made, of, (sequence, n))?;
            let (q, k) = (inputs.q.shape(), inputs.k.shape());
            let attention = self.attention(call, sequence, tools);
            let plan = attention.plan(q, k, k)?;
            tools.workspace.reserve(plan.backward_workspace_bytes::<f32>());
            let place = sequence * of.rows.len() + n;
            let [out, d_out] = [upstream.out, upstream.d_out].map(|x| row_of(x, (sequence, g)));
            let saved = plan::Saved {
                out: TensorRef::new(&out, q)?,
                lse: TensorRef::new(&lse[place * self.heads..][..self.heads], q.per_row())?,
            };
            let own_q = &mut d_q[place * self.heads * self.dim..][..self.heads * self.dim];
            let (mut own_k, mut own_v) = (Tensor::zeros(k)?, Tensor::zeros(k)?);
            let places = plan::Gradients {
                d_q: TensorMut::new(own_q, q)?,
                d_k: own_k.view_mut(),
                d_v: own_v.view_mut(),
                terms: plan::TermGradients::default(),
            };
            let given = plan::Upstream { d_out: TensorRef::new(&d_out, q)?, d_lse: None };
            plan.backward(inputs, saved, given, places, tools.workspace)?;
            let keys = sequence * of.keys * token..(sequence * of.keys + k.seq) * token;
            tools.add(&mut d_k[keys.clone()], own_k.as_slice())?;
            tools.add(&mut d_v[keys], own_v.as_slice())?;
        }
        Ok([d_q, d_k, d_v])
    }

    /// From the gradients of queries, keys and values to those of the layer's inputs and of the projections.
    fn project_backward(
        &self,
        call: &SectionCall<'_>,
        of: &Taking,
        (made, [mut d_q, mut d_k, d_v]): (&Made, [Vec<f32>; 3]),
        (d_x, gradients): (&mut [f32], &mut [f32]),
        tools: &mut Tools<'_>,
    ) -> Result<(), Error> {
        let level = tools.cpu.level;
        let [of_rows, of_keys] = self.tables(call, of)?;
        of_rows.rotate_gradient(level, TensorMut::new(&mut d_q, self.queries(of))?)?;
        of_keys.rotate_gradient(level, TensorMut::new(&mut d_k, self.keys(of))?)?;
        if let (Some(norms), Some(unnormed)) = (call.norms, &made.unnormed) {
            for ((norm, x), d) in norms.iter().zip(unnormed).zip([&mut d_q, &mut d_k]) {
                let mut d_plain = tools.pool.zeros(x.len());
                norm.backward((call.parameters, gradients), (x, d), &mut d_plain, tools)?;
                tools.pool.give(std::mem::replace(d, d_plain));
            }
        }
        let rows = gathered(call.x, of, &of.rows.iter().copied(), tools);
        let seen = gathered(call.x, of, &(0..of.keys), tools);
        let mut d_rows = tools.pool.take(rows.len());
        let mut d_seen = tools.pool.take(seen.len());
        let arenas = (call.parameters, &mut *gradients);
        self.query.backward(arenas, (&rows, &d_q), Gradient::Write(&mut d_rows), tools)?;
        let arenas = (call.parameters, &mut *gradients);
        self.key.backward(arenas, (&seen, &d_k), Gradient::Write(&mut d_seen), tools)?;
        let arenas = (call.parameters, gradients);
        self.value.backward(arenas, (&seen, &d_v), Gradient::Add(&mut d_seen), tools)?;
        scattered(&d_rows, of, &of.rows.iter().copied(), d_x, tools)?;
        scattered(&d_seen, of, &(0..of.keys), d_x, tools)?;
        let buffers = [rows, seen, d_rows, d_seen, d_q, d_k, d_v];
        buffers.into_iter().for_each(|buffer| tools.pool.give(buffer));
        Ok(())
    }
}

impl Taking {
    /// Sequence, number and token of all global rows.
    fn all(&self) -> impl Iterator<Item = (usize, usize, usize)> {
        let rows = |sequence| {
            let rows = self.rows.iter().enumerate();
            rows.map(move |(n, &g)| (sequence, n, g))
        };
        (0..self.sequences).flat_map(rows)
    }
}

/// A token's numbers of all heads.
fn row_of(x: TensorRef<'_, f32>, (sequence, token): (usize, usize)) -> Vec<f32> {
    (0..x.shape().heads).flat_map(|head| x.row(sequence, token, head).to_vec()).collect()
}

/// Some rows of each sequence of `x`, `[sequences, tokens, width]`.
fn gathered(
    x: &[f32],
    of: &Taking,
    rows: &(impl Iterator<Item = usize> + Clone),
    tools: &mut Tools<'_>,
) -> Vec<f32> {
    let width = x.len() / (of.sequences * of.tokens).max(1);
    let mut all = tools.pool.take(of.sequences * rows.clone().count() * width);
    let from = (0..of.sequences).flat_map(|s| rows.clone().map(move |row| s * of.tokens + row));
    for (to, from) in all.chunks_exact_mut(width.max(1)).zip(from) {
        to.copy_from_slice(&x[from * width..][..width]);
    }
    all
}

/// Adds rows to where [`gathered`] takes them.
fn scattered(
    d_rows: &[f32],
    of: &Taking,
    rows: &(impl Iterator<Item = usize> + Clone),
    d_x: &mut [f32],
    tools: &Tools<'_>,
) -> Result<(), Error> {
    let width = d_x.len() / (of.sequences * of.tokens).max(1);
    let to = (0..of.sequences).flat_map(|s| rows.clone().map(move |row| s * of.tokens + row));
    for (from, to) in d_rows.chunks_exact(width.max(1)).zip(to) {
        foveal::nn::add(&mut d_x[to * width..][..width], from, tools.cpu.level)?;
    }
    Ok(())
}

impl TrainedSection for Global {
    fn positions(&self) -> Positions {
        self.local.positions()
    }

    fn forward(
        &self,
        call: SectionCall<'_>,
        carried: Option<&mut SectionCarried>,
        mut out: TensorMut<'_, f32>,
        tools: &mut Tools<'_>,
    ) -> Result<SectionSaved, Error> {
        let local = self.local.forward(call, carried, out.reborrow(), tools)?;
        let of = self.taking(&call);
        if of.rows.is_empty() {
            return Ok(Box::new(Saved { local, own: None }));
        }
        let made = self.made(&call, &of, tools)?;
        let mut lse = vec![0.0; of.sequences * of.rows.len() * self.heads];
        for (sequence, n, g) in of.all() {
            let inputs = self.inputs(&made, &of, (sequence, n))?;
            let attention = self.attention(&call, sequence, tools);
            let plan = attention.plan(inputs.q.shape(), inputs.k.shape(), inputs.v.shape())?;
            tools.workspace.reserve(plan.workspace_bytes());
            let mut row = Tensor::zeros(plan.out_shape())?;
            let own = &mut lse[(sequence * of.rows.len() + n) * self.heads..][..self.heads];
            let own = TensorMut::new(own, plan.out_shape().per_row())?;
            plan.forward(inputs, row.view_mut(), Some(own), tools.workspace)?;
            for head in 0..self.heads {
                out.row_mut(sequence, g, head).copy_from_slice(row.view().row(0, 0, head));
            }
        }
        if call.keep {
            return Ok(Box::new(Saved { local, own: Some((made, lse)) }));
        }
        let Made { q, k, v, unnormed } = made;
        [q, k, v]
            .into_iter()
            .chain(unnormed.into_iter().flatten())
            .for_each(|x| tools.pool.give(x));
        Ok(Box::new(Saved { local, own: None }))
    }

    fn backward(
        &self,
        call: SectionCall<'_>,
        saved: SectionSaved,
        upstream: SectionUpstream<'_>,
        gradients: SectionGradients<'_>,
        tools: &mut Tools<'_>,
    ) -> Result<(), Error> {
        let Saved { local, own } = taken(saved)?;
        let Some((made, lse)) = own else {
            return self.local.backward(call, local, upstream, gradients, tools);
        };
        let of = self.taking(&call);
        let shape = upstream.d_out.shape();
        // Global rows come from nothing that the layer's own queries gave.
        let mut others = Tensor::zeros(shape)?;
        let mut view = others.view_mut();
        for (sequence, token) in (0..of.sequences).flat_map(|s| (0..of.tokens).map(move |t| (s, t)))
        {
            if of.rows.binary_search(&token).is_err() {
                for head in 0..shape.heads {
                    let from = upstream.d_out.row(sequence, token, head);
                    view.row_mut(sequence, token, head).copy_from_slice(from);
                }
            }
        }
        let SectionGradients { d_q, d_k, d_v, d_plain, d_x, gradients } = gradients;
        let rest = SectionUpstream { out: upstream.out, d_out: others.view() };
        let places =
            SectionGradients { d_q, d_k, d_v, d_plain, d_x: &mut *d_x, gradients: &mut *gradients };
        self.local.backward(call, local, rest, places, tools)?;
        let d = self.made_backward(&call, &of, (&made, &lse), upstream, tools)?;
        self.project_backward(&call, &of, (&made, d), (d_x, gradients), tools)?;
        let Made { q, k, v, unnormed } = made;
        [q, k, v]
            .into_iter()
            .chain(unnormed.into_iter().flatten())
            .for_each(|x| tools.pool.give(x));
        Ok(())
    }
}
