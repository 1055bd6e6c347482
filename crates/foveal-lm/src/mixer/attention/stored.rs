//! Causal attention with the weights of a model's file.

use foveal::cache::Rolling;
use foveal::position::{Rope, RopeTable};
use foveal::{Cpu, Mask, Scale};

use super::attended::Attended;
use super::{AttentionParameters, Bound, Inputs, MultiHeadAttention, Saved, Source, Views};
use crate::Error;
use crate::config::Reach;
use crate::linear::Run;
use crate::mixer::trace::Trace;
use crate::mixer::{CacheOptions, LayerState, latent, sections};
use crate::names::{Part, Parts};
use crate::norm::Norm;
use crate::weights::Weight;

/// A layer's parameters as their file stores them.
pub(in crate::mixer) type StoredParameters = AttentionParameters<Weight, Vec<f32>>;

/// One layer's attention: what it computes, its weights as their file stores them, and its positions.
#[derive(Clone, Debug)]
pub struct GroupedQueryAttention {
    layer: MultiHeadAttention,
    parameters: StoredParameters,
    /// Which of the model's rotary embeddings.
    rope: usize,
}

/// Scratch memory that the attention layers of a model share.
#[derive(Debug, Default)]
pub(crate) struct Activations {
    /// The rotations of the call's positions, for each of the model's rotary embeddings.
    pub(in crate::mixer) rotations: Vec<RopeTable>,
    /// The same for queries towards the first tokens of a rolling state; empty for other states.
    capped: Vec<RopeTable>,
    scratch: Saved,
    pub(in crate::mixer) latent: latent::Activations,
    pub(in crate::mixer) sections: sections::Activations,
    /// What the next layer is given is kept here, if somebody wants to see its weights later.
    pub(in crate::mixer) trace: Option<Trace>,
}

impl Activations {
    /// Whether calls leave what an observer needs.
    pub(crate) fn observe(&mut self, observed: bool) {
        self.scratch.observed = observed;
    }

    /// Where the next layer leaves what it is given.
    pub(crate) fn trace(&mut self) -> &mut Option<Trace> {
        &mut self.trace
    }

    /// Prepares the rotations of the tokens at `positions`, for queries to a rolling state as well.
    pub(crate) fn set_positions(
        &mut self,
        ropes: &[Rope],
        positions: &[usize],
        rolling: Option<Rolling>,
    ) -> Result<(), Error> {
        set_positions(&mut self.rotations, ropes, &positions.iter().copied())?;
        match rolling {
            Some(rolling) => {
                let places = positions.iter().map(|&position| rolling.query_position(position));
                set_positions(&mut self.capped, ropes, &places)
            }
            None => {
                self.capped.clear();
                Ok(())
            }
        }
    }
}

fn set_positions(
    tables: &mut Vec<RopeTable>,
    ropes: &[Rope],
    positions: &(impl ExactSizeIterator<Item = usize> + Clone),
) -> Result<(), Error> {
    if tables.iter().map(RopeTable::rope).ne(ropes) {
        let made = ropes.iter().map(|rope| rope.table(positions.clone()));
        *tables = made.collect::<Result<_, _>>()?;
        return Ok(());
    }
    for table in tables {
        table.set_positions(positions.clone())?;
    }
    Ok(())
}

impl GroupedQueryAttention {
    pub(crate) fn new(
        parts: &Parts<'_>,
        index: usize,
        rope: usize,
    ) -> Result<GroupedQueryAttention, Error> {
        let model = parts.config();
        let config = model.attention;
        let (width, reach) = (model.width, model.reach(&model.layers[index]));
        let parameters = StoredParameters::read(parts, index)?;
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
    ///
    /// Of `reach` tokens at most the newest is seen. What `options` say about the keys to keep is for layers without a
    /// window of their own that is as short.
    pub(crate) fn state(
        &self,
        options: &CacheOptions,
        (own, reach): (Reach, usize),
    ) -> Result<LayerState, Error> {
        let (storage, sizes) = (options.storage, self.layer.sizes());
        let kept = options.keep.budget();
        if kept.is_some_and(|kept| own == Reach::Full || reach > kept) {
            return LayerState::keeping(options, sizes);
        }
        match self.layer.reach == Some(reach) {
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
        activations: &mut Activations,
        run: &mut Run<'_>,
    ) -> Result<(), Error> {
        let Activations { rotations, capped, scratch, .. } = activations;
        let rotation = Some(&rotations[self.rope]);
        let inputs = Inputs { x, source: Source::Own, rotation };
        let seen = states.first().and_then(|state| self.seen_by(state));
        let layer = seen.as_ref().unwrap_or(&self.layer);
        let capped = capped.get(self.rope);
        let bound = Bound { layer, parameters: self.parameters.views()?, capped };
        bound.forward(inputs, y, states, scratch, run)
    }

    /// What [`GroupedQueryAttention::forward`] has just done, if `activations` were observed.
    pub(crate) fn attended<'a>(
        &'a self,
        state: &'a LayerState,
        activations: &'a Activations,
        cpu: Cpu,
    ) -> Attended<'a> {
        let layer = self.seen_by(state).unwrap_or_else(|| self.layer.clone());
        let sinks = self.parameters.sinks.as_deref();
        Attended { layer, sinks, saved: &activations.scratch, state, cpu }
    }

    /// The layer as a state has it that has a sight of its own.
    fn seen_by(&self, state: &LayerState) -> Option<MultiHeadAttention> {
        let (mask, reach) = state.sight()?;
        Some(MultiHeadAttention { mask, reach, ..self.layer.clone() })
    }

    /// How many of the newest tokens a query sees at most, unless the state says otherwise.
    pub(crate) fn reach(&self) -> Option<usize> {
        self.layer.reach
    }
}

impl StoredParameters {
    /// What the file has for a layer.
    pub(in crate::mixer) fn read(
        parts: &Parts<'_>,
        layer: usize,
    ) -> Result<StoredParameters, Error> {
        let (config, width) = (parts.config().attention, parts.config().width);
        let (q_dim, kv_dim) = (config.q_dim(), config.kv_dim());
        let norm = |part| {
            let norm = config.qk_norm.then(|| parts.norm(layer, part, config.head_dim));
            norm.map(|norm| norm.map(Norm::into_weight)).transpose()
        };
        let linear = |part, shape, biased| parts.linear(layer, part, shape, biased);
        Ok(StoredParameters {
            query: linear(Part::Query, [q_dim, width], config.qkv_bias)?,
            key: linear(Part::Key, [kv_dim, width], config.qkv_bias)?,
            value: linear(Part::Value, [kv_dim, width], config.qkv_bias)?,
            output: linear(Part::AttentionOutput, [width, q_dim], config.output_bias)?,
            query_norm: norm(Part::QueryNorm)?,
            key_norm: norm(Part::KeyNorm)?,
            sinks: config.sinks.then(|| parts.sinks(layer)).transpose()?,
        })
    }

    /// The parameters as kernels read them.
    pub(in crate::mixer) fn views(&self) -> Result<Views<'_>, Error> {
        let StoredParameters { query, key, value, output, query_norm, key_norm, sinks } = self;
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
