//! The mechanisms by name, as training computes them.

mod chosen;
mod exact;
mod global;
mod infini;
mod linear;
mod linformer;
mod memorizing;
mod recurring;
mod rounded;
mod transformer_xl;

use foveal::Scale;

use super::section::TrainedSection;
use super::tools::Ranges;
use crate::Error;
use crate::config::{Mechanism, ModelConfig, Reach, SectionConfig};
use crate::mixer::Rule;
use crate::names::{self, Form};

/// Where a section stands, and what of the model it needs to know.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SectionPlace<'a> {
    pub(crate) config: &'a ModelConfig,
    /// Whether tokens see those before them only.
    pub(crate) causal: bool,
    /// Where parameters lie.
    pub(crate) ranges: &'a Ranges,
    pub(crate) layer: usize,
    /// Its number in the layer.
    pub(crate) section: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
}

impl SectionPlace<'_> {
    /// What scores are multiplied by.
    pub(crate) fn scale(&self) -> Scale {
        Scale::Value(self.config.attention.scale)
    }

    /// The full name of a tensor of this section: `gate_proj.weight`, `a_log`.
    pub(crate) fn name(&self, tensor: &str) -> String {
        let SectionPlace { layer, section, .. } = self;
        names::section(*layer, *section, tensor, Form::HuggingFace)
    }
}

/// The attention of a layer's family, over all of its heads.
pub(super) fn of_family(place: SectionPlace<'_>) -> Result<Box<dyn TrainedSection>, Error> {
    let config = place.config;
    let reach = match config.layers[place.layer].reach {
        Reach::Full => None,
        Reach::Window(width) => Some(width),
    };
    Ok(Box::new(exact::Exact::of_family(place, reach)?))
}

/// A mechanism that the configuration names.
pub(super) fn named(
    section: &SectionConfig,
    place: SectionPlace<'_>,
) -> Result<Box<dyn TrainedSection>, Error> {
    let name = section.mechanism.name();
    if !place.causal && !WITHOUT_ORDER.contains(&name) {
        return Err(Error::MaskedMechanism { name });
    }
    if let Some(chosen) = chosen::Chosen::new(&section.mechanism, place)? {
        return Ok(Box::new(chosen));
    }
    if let Some(global) = global::Global::new(&section.mechanism, place)? {
        return Ok(Box::new(global));
    }
    Ok(match &section.mechanism {
        Mechanism::Full {}
        | Mechanism::Window { .. }
        | Mechanism::Longformer { .. }
        | Mechanism::Bigbird { .. } => Box::new(exact::Exact::new(&section.mechanism, place)?),
        Mechanism::Linear { .. }
        | Mechanism::Performer { .. }
        | Mechanism::Efficient {}
        | Mechanism::Retention {}
        | Mechanism::ScalarDecay { .. }
        | Mechanism::Gla { .. }
        | Mechanism::Delta { .. }
        | Mechanism::GatedDelta { .. } => recurrence(&section.mechanism, place)?,
        &Mechanism::Linformer { rank, shared } => {
            Box::new(linformer::Mixtures::new(rank, shared, place)?)
        }
        Mechanism::TransformerXl { .. } => {
            Box::new(transformer_xl::TransformerXl::new(&section.mechanism, place)?)
        }
        Mechanism::Infini { .. } => Box::new(infini::Compressed::new(&section.mechanism, place)?),
        Mechanism::Memorizing { .. } => {
            Box::new(memorizing::Remembered::new(&section.mechanism, place)?)
        }
        _ => return Err(Error::UntrainedMechanism { name }),
    })
}

/// A recurrence, with the parts that its layer puts around it.
fn recurrence(
    mechanism: &Mechanism,
    place: SectionPlace<'_>,
) -> Result<Box<dyn TrainedSection>, Error> {
    let (heads, dim) = ((place.heads, place.kv_heads), place.config.attention.head_dim);
    let rule = Rule::new(mechanism, heads, dim)?.ok_or(Error::SectionState)?;
    if let Some(kernel) = linear::kernel(&rule, place) {
        return Ok(kernel);
    }
    Ok(Box::new(recurring::Recurring::new(mechanism, rule, place)?))
}

/// Mechanisms through which tokens may see later ones.
const WITHOUT_ORDER: [&str; 8] =
    ["full", "window", "longformer", "bigbird", "linear", "performer", "efficient", "linformer"];
