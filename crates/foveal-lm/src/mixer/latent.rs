//! Multi-head latent attention with the weights of a model's file (DeepSeek-V2, arXiv:2405.04434, §2.1).
//!
//! ```text
//! [c | kᴿ] = x W_DKVᵀ          c ← norm(c)          kᴿ ← rope(kᴿ)           one row [c + r] a token: all that is kept
//! q = x W_Qᵀ, or norm(x W_DQᵀ) W_UQᵀ                q_h = [q_C | rope(q_R)]   [H, n + r]
//! y = concat_h(attention(q_h, rows; W_UK,h, W_UV,h)) W_Oᵀ
//! ```
//!
//! Prompts make keys and values of the rows, generated rows take queries to them: see [`foveal::latent`]. A token
//! costs 2 · (width · (c + r + H v) + H (n + r) · width) operations besides attention, with a query projection of its
//! own rank less.

use foveal::cache::{KvStore, LatentRows};
use foveal::latent::{LatentAttention, LatentCall, LatentDims, LatentForm, LatentScratch};
use foveal::nn::{RmsNorm, rms_norm_in_place};
use foveal::position::RopeTable;
use foveal::{Attention, Mask, Scale, Shape, Strides, TensorMut, TensorRef};

use super::attention;
use super::state::Heads;
use super::trace::{Asked, Weigher, exact};
use super::{CacheOptions, Keep, LayerState};
use crate::Error;
use crate::config::LatentConfig;
use crate::linear::{Linear, Run, forward_together};
use crate::names::{Part, Parts};
use crate::norm::Norm;

/// ε of the norms of compressed rows, whatever that of the other norms.
const EPSILON: f32 = 1e-6;

/// One layer's latent attention: what it computes, its weights as their file stores them, and its positions.
#[derive(Clone, Debug)]
pub(crate) struct MultiHeadLatentAttention {
    dims: LatentDims,
    scale: f32,
    /// How many of the newest tokens a query sees.
    pub(super) reach: usize,
    query: Query,
    /// `[c + r, width]`.
    down: Linear,
    norm: Vec<f32>,
    /// `[H · (n + v), c]`: of each head the rows of keys, then of values.
    up: Linear,
    output: Linear,
    /// Which of the model's rotary embeddings.
    rope: usize,
}

/// How queries `[H, n + r]` are made.
#[derive(Clone, Debug)]
enum Query {
    Direct(Linear),
    LowRank { down: Linear, norm: Vec<f32>, up: Linear },
}

/// Scratch memory of latent attention, shared by the layers of a model.
#[derive(Debug, Default)]
pub(crate) struct Activations {
    compressed: Vec<f32>,
    q: Vec<f32>,
    rows: Vec<f32>,
    mixed: Vec<f32>,
    scratch: LatentScratch,
}

impl MultiHeadLatentAttention {
    pub(crate) fn new(
        parts: &Parts<'_>,
        sizes: LatentConfig,
        layer: usize,
        rope: usize,
    ) -> Result<MultiHeadLatentAttention, Error> {
        let (model, config) = (parts.config(), parts.config().attention);
        let LatentConfig { query_rank, latent, nope, rope: rotated, value } = sizes;
        let dims = LatentDims { heads: config.heads, latent, rope: rotated, nope, value };
        let (width, heads) = (model.width, config.heads);
        let linear = |part, shape, biased| parts.linear(layer, part, shape, biased);
        let norm = |part, dim| parts.norm(layer, part, dim).map(Norm::into_weight);
        let query = match query_rank {
            None => Query::Direct(linear(Part::Query, [config.q_dim(), width], false)?),
            Some(rank) => Query::LowRank {
                down: linear(Part::QueryDown, [rank, width], config.qkv_bias)?,
                norm: norm(Part::QueryDownNorm, rank)?,
                up: linear(Part::QueryUp, [config.q_dim(), rank], false)?,
            },
        };
        Ok(MultiHeadLatentAttention {
            dims,
            scale: config.scale,
            reach: model.reach(&model.layers[layer]),
            query,
            down: linear(Part::LatentDown, [dims.row(), width], config.qkv_bias)?,
            norm: norm(Part::LatentNorm, latent)?,
            up: linear(Part::LatentUp, [heads * (nope + value), latent], false)?,
            output: linear(Part::AttentionOutput, [width, heads * value], config.output_bias)?,
            rope,
        })
    }

    /// A state that holds no tokens; it grows as they come. Of `reach` tokens at most the newest is seen.
    pub(crate) fn state(&self, options: &CacheOptions, reach: usize) -> Result<LayerState, Error> {
        let refuse = |what, found: String, expected: &str| {
            Err(Error::CacheOptions { what, found, expected: expected.to_owned() })
        };
        let storage = options.storage;
        if storage.coded() {
            let found = storage.name().to_owned();
            return refuse("storage of latent attention", found, "f32, f16 or bf16");
        }
        if options.keep != Keep::All {
            // The rotated keys of rows would have to be turned to other places, or picked out head by head.
            let found = format!("{:?}", options.keep);
            return refuse("choice of keys of latent attention", found, "all of them");
        }
        let sizes = Heads { heads: self.dims.heads, kv_heads: 1, dims: (self.dims.row(), 0) };
        match self.reach == reach {
            true => LayerState::new(storage, sizes),
            false => LayerState::within(storage, sizes, reach),
        }
    }

    /// Mixes the tokens `x`, `[sequences, tokens, width]`, into `y` of the same shape, and appends them to the sequences'
    /// states.
    pub(crate) fn forward(
        &self,
        x: &[f32],
        y: &mut [f32],
        states: &mut [LayerState],
        activations: &mut attention::Activations,
        run: &mut Run<'_>,
    ) -> Result<(), Error> {
        let attention::Activations { rotations, latent, trace, .. } = activations;
        let tokens = x.len() / self.down.in_features();
        let shape = Shape {
            batch: states.len(),
            seq: tokens / states.len().max(1),
            heads: 1,
            dim: self.dims.row(),
        };
        self.project(x, tokens, latent, run)?;
        self.rotate(&rotations[self.rope], shape, latent, run)?;
        if let Some(trace) = trace {
            trace.extend(tokens, [&[], &latent.q, &latent.rows], [&[], &[]]);
        }
        let sight = states.first().and_then(LayerState::sight);
        let (mask, reach) = sight.unwrap_or((Mask::window(self.reach), Some(self.reach)));
        let one = Shape { batch: 1, ..shape };
        let nothing = TensorRef::new(&[], Shape { dim: 0, ..one })?;
        for (n, state) in states.iter_mut().enumerate() {
            let len = shape.seq * shape.dim;
            let own = &latent.rows[n * len..(n + 1) * len];
            state.append(reach, TensorRef::new(own, one)?, nothing)?;
        }
        self.attend(states, mask, latent, run)?;
        self.output.forward(&latent.mixed, y, run)
    }

    /// Queries and rows as they are before rotation.
    fn project(
        &self,
        x: &[f32],
        tokens: usize,
        activations: &mut Activations,
        run: &mut Run<'_>,
    ) -> Result<(), Error> {
        let Activations { compressed, q, rows, .. } = activations;
        q.resize(tokens * self.dims.heads * self.dims.query(), 0.0);
        rows.resize(tokens * self.dims.row(), 0.0);
        match &self.query {
            Query::Direct(query) => {
                let both = [(query.view()?, &mut q[..]), (self.down.view()?, &mut rows[..])];
                forward_together(x, both, run)?;
            }
            Query::LowRank { down, norm, up } => {
                compressed.resize(tokens * down.out_features(), 0.0);
                let both =
                    [(down.view()?, &mut compressed[..]), (self.down.view()?, &mut rows[..])];
                forward_together(x, both, run)?;
                let norm = RmsNorm { weight: norm, epsilon: EPSILON };
                rms_norm_in_place(norm, compressed, run.cpu.level)?;
                up.forward(compressed, q, run)?;
            }
        }
        let norm = RmsNorm { weight: &self.norm, epsilon: EPSILON };
        for row in rows.chunks_exact_mut(self.dims.row()) {
            rms_norm_in_place(norm, &mut row[..self.dims.latent], run.cpu.level)?;
        }
        Ok(())
    }

    fn rotate(
        &self,
        rotation: &RopeTable,
        rows: Shape,
        activations: &mut Activations,
        run: &Run<'_>,
    ) -> Result<(), Error> {
        let LatentDims { heads, latent, rope, nope, .. } = self.dims;
        for (x, heads, dim, first) in [
            (&mut activations.q, heads, self.dims.query(), nope),
            (&mut activations.rows, 1, self.dims.row(), latent),
        ] {
            let shape = Shape { heads, dim: rope, ..rows };
            let strides = Strides { batch: rows.seq * heads * dim, seq: heads * dim, heads: dim };
            let rotated =
                TensorMut::from_strides(x.get_mut(first..).unwrap_or(&mut []), shape, strides)?;
            rotation.rotate(run.cpu.level, rotated)?;
        }
        Ok(())
    }

    /// Weights on keys that are made of the rows once more, in one piece for all heads.
    pub(crate) fn weigh(
        &self,
        asked: &Asked<'_>,
        weigher: &mut dyn Weigher,
        run: &mut Run<'_>,
    ) -> Result<(), Error> {
        let LatentDims { heads, latent, nope, value, .. } = self.dims;
        let end = asked.rows.end;
        let rows = &asked.trace.k[..end * self.dims.row()];
        let compressed: Vec<f32> =
            rows.chunks_exact(self.dims.row()).flat_map(|row| &row[..latent]).copied().collect();
        let mut made = vec![0.0; end * heads * (nope + value)];
        self.up.forward(&compressed, &mut made, run)?;
        let mut keys = Vec::with_capacity(end * heads * self.dims.query());
        for (row, made) in
            rows.chunks_exact(self.dims.row()).zip(made.chunks_exact(heads * (nope + value)))
        {
            for made in made.chunks_exact(nope + value) {
                keys.extend_from_slice(&made[..nope]);
                keys.extend_from_slice(&row[latent..]);
            }
        }
        let shape = Shape { batch: 1, seq: end, heads, dim: self.dims.query() };
        let q = TensorRef::new(&asked.trace.q[..end * heads * shape.dim], shape)?;
        let k = TensorRef::new(&keys, shape)?;
        let mask = Mask::window(asked.reach);
        let attention = Attention::new().mask(mask).scale(Scale::Value(self.scale)).cpu(run.cpu);
        exact(&attention, [q, k], (asked.rows.clone(), 0), &|_| 1.0, (weigher, run.workspace))
    }

    fn attend(
        &self,
        states: &[LayerState],
        mask: Mask,
        activations: &mut Activations,
        run: &mut Run<'_>,
    ) -> Result<(), Error> {
        let LatentDims { heads, latent, value, .. } = self.dims;
        let Activations { q, mixed, scratch, .. } = activations;
        let tokens = q.len() / (heads * self.dims.query());
        mixed.resize(tokens * heads * value, 0.0);
        let attention = Attention::new().mask(mask).scale(Scale::Value(self.scale)).cpu(run.cpu);
        let layer = LatentAttention::new(attention, self.dims, self.up.view()?.weight)?;
        let rows = states.iter().map(|state| LatentRows::new(state, latent));
        let rows = rows.collect::<Result<Vec<_>, _>>()?;
        let stores: Vec<&dyn KvStore> = rows.iter().map(|rows| rows as _).collect();
        let (batch, dim) = (states.len(), self.dims.query());
        let shape = Shape { batch, seq: tokens / batch.max(1), heads, dim };
        let call = LatentCall {
            q: TensorRef::new(q, shape)?,
            stores: &stores,
            phase: run.phase,
            form: LatentForm::of(run.phase),
        };
        let out = TensorMut::new(mixed, Shape { dim: value, ..shape })?;
        Ok(layer.forward(call, (out, None), scratch, run.workspace)?)
    }
}

#[cfg(test)]
mod tests;
