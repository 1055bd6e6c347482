//! A layer's token mixing with the weights of a model's file, whichever kind it is.

use foveal::Cpu;

use super::attention::{self, GroupedQueryAttention};
use super::latent::MultiHeadLatentAttention;
use super::sections::SectionedAttention;
use super::trace::{Asked, Weigher};
use super::{Attended, CacheOptions, LayerState, Run};
use crate::Error;
use crate::config::Reach;
use crate::names::Parts;

/// One layer's mixer.
#[derive(Clone, Debug)]
pub(crate) enum StoredMixer {
    Grouped(GroupedQueryAttention),
    Latent(MultiHeadLatentAttention),
    Sectioned(SectionedAttention),
}

impl StoredMixer {
    pub(crate) fn new(parts: &Parts<'_>, layer: usize, rope: usize) -> Result<StoredMixer, Error> {
        if !parts.config().layers[layer].sections.is_empty() {
            return Ok(StoredMixer::Sectioned(SectionedAttention::new(parts, layer, rope)?));
        }
        Ok(match parts.config().attention.latent {
            None => StoredMixer::Grouped(GroupedQueryAttention::new(parts, layer, rope)?),
            Some(sizes) => {
                StoredMixer::Latent(MultiHeadLatentAttention::new(parts, sizes, layer, rope)?)
            }
        })
    }

    /// A state that holds no tokens; it grows as they come.
    ///
    /// Of `reach` tokens at most the newest is seen; `own` is what the layer itself says.
    pub(crate) fn state(
        &self,
        options: &CacheOptions,
        (own, reach): (Reach, usize),
    ) -> Result<LayerState, Error> {
        match self {
            StoredMixer::Grouped(mixer) => mixer.state(options, (own, reach)),
            StoredMixer::Latent(mixer) => mixer.state(options, reach),
            StoredMixer::Sectioned(mixer) => mixer.state(options),
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
        match self {
            StoredMixer::Grouped(mixer) => mixer.forward(x, y, states, activations, run),
            StoredMixer::Latent(mixer) => mixer.forward(x, y, states, activations, run),
            StoredMixer::Sectioned(mixer) => mixer.forward(x, y, states, activations, run),
        }
    }

    /// How many of the newest tokens a query sees at most, unless the state says otherwise.
    pub(crate) fn reach(&self) -> Option<usize> {
        match self {
            StoredMixer::Grouped(mixer) => mixer.reach(),
            StoredMixer::Latent(mixer) => Some(mixer.reach),
            StoredMixer::Sectioned(_) => None,
        }
    }

    /// Whether a state holds what it holds of a text of `position` tokens.
    pub(crate) fn is_at(&self, state: &LayerState, position: usize) -> bool {
        let more = match self {
            StoredMixer::Sectioned(mixer) => mixer.sees_all(state, position),
            _ => true,
        };
        more && state.is_at(self.reach(), position)
    }

    /// Whether weights are made of a [`Trace`], as no state keeps what it takes.
    pub(crate) fn traced(&self) -> bool {
        !matches!(self, StoredMixer::Grouped(_))
    }

    /// What weights there are of queries of a text, all that a layer was given of which is in the trace.
    pub(crate) fn weigh(
        &self,
        asked: &Asked<'_>,
        weigher: &mut dyn Weigher,
        run: &mut Run<'_>,
    ) -> Result<(), Error> {
        match self {
            StoredMixer::Grouped(_) => Ok(()),
            StoredMixer::Latent(mixer) => mixer.weigh(asked, weigher, run),
            StoredMixer::Sectioned(mixer) => mixer.weigh(asked, weigher, run),
        }
    }

    /// Heads of each section, and whether their weights are those of a recurrence.
    pub(crate) fn kinds(&self) -> Vec<(usize, bool)> {
        match self {
            StoredMixer::Grouped(_) | StoredMixer::Latent(_) => vec![],
            StoredMixer::Sectioned(mixer) => mixer.kinds().collect(),
        }
    }

    /// What [`StoredMixer::forward`] has just done, if `activations` were observed.
    pub(crate) fn attended<'a>(
        &'a self,
        state: &'a LayerState,
        activations: &'a attention::Activations,
        cpu: Cpu,
    ) -> Result<Attended<'a>, Error> {
        match self {
            StoredMixer::Grouped(mixer) => Ok(mixer.attended(state, activations, cpu)),
            StoredMixer::Latent(_) | StoredMixer::Sectioned(_) => Err(Error::ObservedMixer),
        }
    }
}
