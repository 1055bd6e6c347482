//! Causal attention with query heads grouped over key/value heads (Ainslie et al. 2023, arXiv:2305.13245).
//!
//! ```text
//! q = rope(norm(x Wqᵀ))   k = rope(norm(x Wkᵀ))   v = x Wvᵀ        x [T, width], q [T, H, D], k v [T, KV, D]
//! y = concat_h(softmax(scale · q_h K_gᵀ) V_g) Woᵀ                  g = h / (H / KV)
//! ```
//!
//! The norms of queries and keys are Qwen 3's and Gemma 3's; other models have none. Keys are stored rotated. A query
//! sees the newest `reach` tokens, its own included.

use std::ops::Range;

use foveal::cache::KvStore;
use foveal::position::{Rope, RopeTable};
use foveal::{Attention, Cpu, Mask, Phase, Scale, Shape, TensorMut, TensorRef, cache};

use super::LayerState;
use crate::Error;
use crate::config::AttentionConfig;
use crate::linear::{Linear, Run, forward_together};
use crate::names::{Part, Parts};
use crate::norm::Norm;

/// One layer's attention: its projections, its positions and its reach.
#[derive(Clone, Debug)]
pub struct GroupedQueryAttention {
    config: AttentionConfig,
    reach: usize,
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
    query_norm: Option<Norm>,
    key_norm: Option<Norm>,
    /// Which of the model's rotary embeddings.
    rope: usize,
    attention: Attention<'static>,
}

/// Activations of an attention layer, one row a token.
#[derive(Debug, Default)]
pub(crate) struct Activations {
    /// The rotations of the call's positions, for each of the model's rotary embeddings.
    rotations: Vec<RopeTable>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    mixed: Vec<f32>,
}

impl Activations {
    pub(crate) fn set_positions(
        &mut self,
        ropes: &[Rope],
        positions: Range<usize>,
    ) -> Result<(), Error> {
        if self.rotations.iter().map(RopeTable::rope).ne(ropes) {
            let tables = ropes.iter().map(|rope| rope.table(positions.clone()));
            self.rotations = tables.collect::<Result<_, _>>()?;
            return Ok(());
        }
        for table in &mut self.rotations {
            table.set_positions(positions.clone())?;
        }
        Ok(())
    }
}

impl GroupedQueryAttention {
    pub(crate) fn new(
        parts: &Parts<'_>,
        layer: usize,
        rope: usize,
        cpu: Cpu,
    ) -> Result<GroupedQueryAttention, Error> {
        let model = parts.config();
        let config = model.attention;
        let (width, q_dim, kv_dim) = (model.width, config.q_dim(), config.kv_dim());
        let reach = model.reach(&model.layers[layer]);
        let norm = |part| {
            let norm = config.qk_norm.then(|| parts.norm(layer, part, config.head_dim));
            norm.transpose()
        };
        Ok(GroupedQueryAttention {
            config,
            reach,
            query: parts.linear(layer, Part::Query, [q_dim, width], config.qkv_bias)?,
            key: parts.linear(layer, Part::Key, [kv_dim, width], config.qkv_bias)?,
            value: parts.linear(layer, Part::Value, [kv_dim, width], config.qkv_bias)?,
            output: parts.linear(
                layer,
                Part::AttentionOutput,
                [width, q_dim],
                config.output_bias,
            )?,
            query_norm: norm(Part::QueryNorm)?,
            key_norm: norm(Part::KeyNorm)?,
            rope,
            attention: Attention::new()
                .mask(Mask::window(reach))
                .scale(Scale::Value(config.scale))
                .cpu(cpu),
        })
    }

    /// A state that holds no tokens; it grows as they come.
    pub(crate) fn state(&self) -> Result<LayerState, Error> {
        let AttentionConfig { kv_heads, head_dim, .. } = self.config;
        Ok(LayerState::new(kv_heads, (head_dim, head_dim), 0)?)
    }

    /// Gives up what no query from `position` on can see, and makes room for `tokens` more.
    ///
    /// The room doubles, up to what is ever held: the reach, the tile that is being filled and the one being left.
    fn make_room(&self, state: &mut LayerState, tokens: usize) -> Result<(), Error> {
        let position = state.end();
        state.forget((position + 1).saturating_sub(self.reach));
        if state.room() < tokens {
            let needed = position - state.start() + tokens;
            let most = self.reach.saturating_add(2 * cache::TILE);
            let doubled = needed.next_power_of_two().max(cache::TILE);
            state.grow(doubled.min(most).max(needed))?;
        }
        Ok(())
    }

    /// Mixes the tokens `x`, `[tokens, width]`, into `y` of the same shape, and appends them to `state`.
    pub(crate) fn forward(
        &self,
        x: &[f32],
        y: &mut [f32],
        state: &mut LayerState,
        activations: &mut Activations,
        run: &mut Run<'_>,
    ) -> Result<(), Error> {
        let Activations { rotations, q, k, v, mixed } = activations;
        let AttentionConfig { heads, kv_heads, head_dim, .. } = self.config;
        let tokens = x.len() / self.query.in_features();
        let shape = |heads| Shape { batch: 1, seq: tokens, heads, dim: head_dim };
        for (buffer, len) in [
            (&mut *q, self.config.q_dim()),
            (k, self.config.kv_dim()),
            (v, self.config.kv_dim()),
            (mixed, self.config.q_dim()),
        ] {
            buffer.resize(tokens * len, 0.0);
        }

        let all = [(&self.query, &mut q[..]), (&self.key, &mut k[..]), (&self.value, &mut v[..])];
        forward_together(x, all, run)?;
        if let (Some(query_norm), Some(key_norm)) = (&self.query_norm, &self.key_norm) {
            query_norm.forward_in_place(q, run.cpu)?;
            key_norm.forward_in_place(k, run.cpu)?;
        }
        let rotation = &rotations[self.rope];
        rotation.rotate(run.cpu.level, TensorMut::new(q, shape(heads))?)?;
        rotation.rotate(run.cpu.level, TensorMut::new(k, shape(kv_heads))?)?;

        self.make_room(state, tokens)?;
        let (k, v) = (TensorRef::new(k, shape(kv_heads))?, TensorRef::new(v, shape(kv_heads))?);
        state.append(k, v)?;
        let q = TensorRef::new(q, shape(heads))?;
        self.attend(q, state, TensorMut::new(mixed, shape(heads))?, run)?;
        self.output.forward(mixed, y, run)
    }

    fn attend(
        &self,
        q: TensorRef<'_, f32>,
        state: &LayerState,
        out: TensorMut<'_, f32>,
        run: &mut Run<'_>,
    ) -> Result<(), Error> {
        let held = state.end() - state.start();
        let keys = Shape { seq: held, heads: self.config.kv_heads, ..q.shape() };
        let plan = match run.phase {
            Phase::Prompt => self.attention.plan(q.shape(), keys, keys)?,
            Phase::Generated => self.attention.plan_decode(q.shape(), keys, keys)?,
        };
        run.workspace.reserve(plan.workspace_bytes());
        plan.forward_cached(q, &[state], (out, None), run.workspace)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests;
