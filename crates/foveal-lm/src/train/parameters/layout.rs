//! Which parameters a model has, in the order in which they lie.

use super::Group;
use super::initial::Initial;
use super::sections;
use crate::Error;
use crate::config::ModelConfig;
use crate::names::{self, Form, Part, Place};

/// The deviation of a matrix.
const DEVIATION: f32 = 0.02;

/// A tensor that is learned.
#[derive(Clone, Debug)]
pub(crate) struct Declared {
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
    pub(crate) group: Group,
    pub(crate) initial: Initial,
}

impl Declared {
    /// A matrix by its name.
    pub(crate) fn matrix(name: String, shape: [usize; 2]) -> Declared {
        let initial = Initial::Normal(DEVIATION);
        Declared { name, shape: shape.to_vec(), group: Group::Matrix, initial }
    }

    /// A matrix with another deviation.
    pub(crate) fn spread(name: String, shape: [usize; 2], deviation: f32) -> Declared {
        Declared { initial: Initial::Normal(deviation), ..Declared::matrix(name, shape) }
    }

    /// A vector by its name.
    pub(crate) fn vector(name: String, len: usize, initial: Initial) -> Declared {
        Declared { name, shape: vec![len], group: Group::Vector, initial }
    }
}

/// All parameters of a model.
pub(crate) fn declared(config: &ModelConfig) -> Result<Vec<Declared>, Error> {
    if config.attention.latent.is_some() {
        return Err(Error::UnsupportedConfig {
            key: "training".to_owned(),
            found: "a model with latent attention".to_owned(),
        });
    }
    let table = [config.vocab, config.width];
    let lay = Layout { config };
    let mut all = vec![lay.matrix(Place::Embedding, table)];
    (0..config.layers.len()).for_each(|layer| lay.layer(layer, &mut all));
    all.push(lay.norm(Place::FinalNorm, config.width));
    if !config.tied_head {
        all.push(lay.matrix(Place::Head, table));
    }
    Ok(all)
}

struct Layout<'a> {
    config: &'a ModelConfig,
}

impl Layout<'_> {
    fn layer(&self, layer: usize, all: &mut Vec<Declared>) {
        let config = self.config;
        let (width, inner, attention) = (config.width, config.feed_forward, config.attention);
        let (q, kv) = (attention.q_dim(), attention.kv_dim());
        let weight = |part| Place::Layer(layer, part, "weight");
        let matrix = |part, shape| self.matrix(weight(part), shape);
        let norm = |part, len| self.norm(weight(part), len);
        let zeros = |place, len| Declared::vector(self.name(place), len, Initial::Constant(0.0));
        let bias = |part, len| zeros(Place::Layer(layer, part, "bias"), len);
        let residual = DEVIATION / (2.0 * config.layers.len() as f32).sqrt();
        let output =
            |part, shape| Declared { initial: Initial::Normal(residual), ..matrix(part, shape) };
        all.push(norm(Part::AttentionNorm, width));
        let three = [(Part::Query, q), (Part::Key, kv), (Part::Value, kv)];
        all.extend(three.map(|(part, rows)| matrix(part, [rows, width])));
        if attention.qkv_bias {
            all.extend(three.map(|(part, rows)| bias(part, rows)));
        }
        if attention.qk_norm {
            let both = [Part::QueryNorm, Part::KeyNorm];
            all.extend(both.map(|part| norm(part, attention.head_dim)));
        }
        if attention.sinks {
            all.push(zeros(Place::Sinks(layer), attention.heads));
        }
        for (n, section) in config.layers[layer].sections.iter().enumerate() {
            let name = |part: &str| names::section(layer, n, part, Form::HuggingFace);
            all.extend(sections::declared(section, config, &name));
        }
        all.push(output(Part::AttentionOutput, [width, q]));
        if attention.output_bias {
            all.push(bias(Part::AttentionOutput, width));
        }
        if config.post_norms {
            all.push(norm(Part::PostAttentionNorm, width));
        }
        all.push(norm(Part::FeedForwardNorm, width));
        all.extend([Part::Gate, Part::Up].map(|part| matrix(part, [inner, width])));
        all.push(output(Part::Down, [width, inner]));
        if config.post_norms {
            all.push(norm(Part::PostFeedForwardNorm, width));
        }
    }

    fn name(&self, place: Place) -> String {
        place.name(self.config, Form::HuggingFace)
    }

    fn matrix(&self, place: Place, shape: [usize; 2]) -> Declared {
        Declared::matrix(self.name(place), shape)
    }

    fn norm(&self, place: Place, len: usize) -> Declared {
        let initial = Initial::Constant(1.0 - self.config.norm_offset);
        Declared::vector(self.name(place), len, initial)
    }
}
