//! The rotary embeddings of a model's layers; layers with equal ones share them.

use std::sync::Arc;

use foveal::position::{Layout, Rope, Scaling};

use crate::Error;
use crate::config::{ModelConfig, RopeConfig, RopeLayout, RopeScaling};

/// The rotary embeddings made so far.
#[derive(Debug)]
pub(crate) struct Ropes<'a> {
    config: &'a ModelConfig,
    made: Vec<(&'a RopeConfig, Arc<Rope>)>,
}

impl<'a> Ropes<'a> {
    pub(crate) fn new(config: &'a ModelConfig) -> Ropes<'a> {
        Ropes { config, made: Vec::new() }
    }

    /// The embedding of a layer.
    pub(crate) fn layer(&mut self, layer: usize) -> Result<Arc<Rope>, Error> {
        let wanted = &self.config.layers[layer].rope;
        if let Some((_, rope)) = self.made.iter().find(|(made, _)| *made == wanted) {
            return Ok(rope.clone());
        }
        let rope = Arc::new(self.make(wanted)?);
        self.made.push((wanted, rope.clone()));
        Ok(rope)
    }

    fn make(&self, rope: &RopeConfig) -> Result<Rope, Error> {
        let attention = &self.config.attention;
        let layout = match attention.rope_layout {
            RopeLayout::HalfSplit => Layout::HalfSplit,
            RopeLayout::Interleaved => Layout::Interleaved,
        };
        let scaling = match &rope.scaling {
            RopeScaling::None => Scaling::None,
            _ => Scaling::None,
        };
        Ok(Rope::new(attention.head_dim, rope.base, scaling, layout)?)
    }
}
