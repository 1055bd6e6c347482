//! Causal attention with the weights of a model's file.

use std::ops::Range;

use foveal::position::{Rope, RopeTable};
use foveal::{Mask, Scale};

use super::{AttentionParameters, Bound, Inputs, MultiHeadAttention, Saved, Source, Views};
use crate::Error;
use crate::linear::Run;
use crate::mixer::{CacheOptions, LayerState};
use crate::names::{Part, Parts};
use crate::norm::Norm;
use crate::weights::Weight;

/// One layer's attention: what it computes, its weights as their file stores them, and its positions.
#[derive(Clone, Debug)]
pub struct GroupedQueryAttention {
    layer: MultiHeadAttention,
    parameters: AttentionParameters<Weight, Vec<f32>>,
    /// Which of the model's rotary embeddings.
    rope: usize,
}

/// Scratch memory that the attention layers of a model share.
#[derive(Debug, Default)]
pub(crate) struct Activations {
    /// The rotations of the call's positions, for each of the model's rotary embeddings.
    rotations: Vec<RopeTable>,
    scratch: Saved,
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
        index: usize,
        rope: usize,
    ) -> Result<GroupedQueryAttention, Error> {
        let model = parts.config();
        let config = model.attention;
        let (width, q_dim, kv_dim) = (model.width, config.q_dim(), config.kv_dim());
        let reach = model.reach(&model.layers[index]);
        let norm = |part| {
            let norm = config.qk_norm.then(|| parts.norm(index, part, config.head_dim));
            norm.map(|norm| norm.map(Norm::into_weight)).transpose()
        };
        let linear = |part, shape, biased| parts.linear(index, part, shape, biased);
        let parameters = AttentionParameters {
            query: linear(Part::Query, [q_dim, width], config.qkv_bias)?,
            key: linear(Part::Key, [kv_dim, width], config.qkv_bias)?,
            value: linear(Part::Value, [kv_dim, width], config.qkv_bias)?,
            output: linear(Part::AttentionOutput, [width, q_dim], config.output_bias)?,
            query_norm: norm(Part::QueryNorm)?,
            key_norm: norm(Part::KeyNorm)?,
            sinks: config.sinks.then(|| parts.sinks(index)).transpose()?,
        };
        let layer = MultiHeadAttention {
            width,
            key_width: width,
            value_width: width,
            heads: config.heads,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
            scale: Scale::Value(config.scale),
            softcap: config.softcap,
            mask: Mask::window(reach),
            reach: Some(reach),
            norm_epsilon: model.norm_epsilon,
        };
        Ok(GroupedQueryAttention { layer, parameters, rope })
    }

    /// A state that holds no tokens; it grows as they come.
    pub(crate) fn state(&self, options: &CacheOptions, reach: usize) -> Result<LayerState, Error> {
        let state = self.layer.state_in(options.storage)?;
        Ok(if self.layer.reach == Some(reach) { state } else { state.with_reach(reach) })
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
        let Activations { rotations, scratch } = activations;
        let rotation = Some(&rotations[self.rope]);
        let inputs = Inputs { x, source: Source::Own, rotation };
        let seen = state.reach().map(|reach| MultiHeadAttention {
            mask: Mask::window(reach),
            reach: Some(reach),
            ..self.layer.clone()
        });
        let layer = seen.as_ref().unwrap_or(&self.layer);
        let bound = Bound { layer, parameters: self.views()? };
        bound.forward(inputs, y, std::slice::from_mut(state), scratch, run)
    }

    fn views(&self) -> Result<Views<'_>, Error> {
        let AttentionParameters { query, key, value, output, query_norm, key_norm, sinks } =
            &self.parameters;
        Ok(Views {
            query: query.view()?,
            key: key.view()?,
            value: value.view()?,
            output: output.view()?,
            query_norm: query_norm.as_deref(),
            key_norm: key_norm.as_deref(),
            sinks: sinks.as_deref(),
        })
    }
}

#[cfg(test)]
mod tests;
