//! The rotary embeddings of a model's layers; layers with equal ones share them.

use foveal::position::{self, Rope};

use crate::Error;
use crate::config::{ModelConfig, RopeConfig, RopeLayout, RopeScaling};

/// The rotary embeddings made so far.
#[derive(Debug)]
pub(crate) struct Ropes<'a> {
    config: &'a ModelConfig,
    wanted: Vec<&'a RopeConfig>,
    made: Vec<Rope>,
}

impl<'a> Ropes<'a> {
    pub(crate) fn new(config: &'a ModelConfig) -> Ropes<'a> {
        Ropes { config, wanted: Vec::new(), made: Vec::new() }
    }

    /// The embedding of a layer, by its place in [`Ropes::into_all`].
    pub(crate) fn layer(&mut self, layer: usize) -> Result<usize, Error> {
        let wanted = &self.config.layers[layer].rope;
        if let Some(place) = self.wanted.iter().position(|made| *made == wanted) {
            return Ok(place);
        }
        self.made.push(self.make(wanted)?);
        self.wanted.push(wanted);
        Ok(self.made.len() - 1)
    }

    /// All embeddings that layers asked for.
    pub(crate) fn into_all(self) -> Vec<Rope> {
        self.made
    }

    fn make(&self, rope: &RopeConfig) -> Result<Rope, Error> {
        let attention = &self.config.attention;
        let layout = match attention.rope_layout {
            RopeLayout::HalfSplit => position::RopeLayout::HalfSplit,
            RopeLayout::Interleaved => position::RopeLayout::Interleaved,
        };
        let scaling = scaling(&rope.scaling);
        let theta = rope.base;
        let config = position::RopeConfig {
            theta,
            scaling,
            ..position::RopeConfig::new(attention.rotary_dim(), layout)
        };
        let made = Rope::new(config)?;
        match &rope.scaling {
            RopeScaling::Divisors(divisors) => Ok(made.with_frequency_factors(divisors)?),
            _ => Ok(made),
        }
    }
}

/// The scaling as kernels know it; divisors of a file's own come on top.
pub(crate) fn scaling(scaling: &RopeScaling) -> position::RopeScaling {
    match *scaling {
        RopeScaling::None | RopeScaling::Divisors(_) => position::RopeScaling::None,
        RopeScaling::Linear { factor } => position::RopeScaling::Linear { factor },
        RopeScaling::Llama3 { factor, low, high, original_context } => {
            position::RopeScaling::Llama3 {
                factor,
                low_freq_factor: low,
                high_freq_factor: high,
                original_context: original_context as f64,
            }
        }
        RopeScaling::Yarn(yarn) => position::RopeScaling::Yarn(yarn),
    }
}
