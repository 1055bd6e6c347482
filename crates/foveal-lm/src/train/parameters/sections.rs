//! What the mechanisms learn that a configuration names: the table of `docs/mixers.md`, with initial values.

use super::Group;
use super::initial::Initial;
use super::layout::Declared;
use crate::config::{Mechanism, ModelConfig, SectionConfig};

/// The parameters of a section whose tensors are called as `name` has it.
pub(super) fn declared(
    section: &SectionConfig,
    config: &ModelConfig,
    name: &dyn Fn(&str) -> String,
) -> Vec<Declared> {
    let (width, dim, heads) = (config.width, config.attention.head_dim, section.heads);
    let tensors = Tensors { name, width, heads, dim };
    match section.mechanism {
        Mechanism::NativeSparse { .. } => {
            vec![tensors.matrix("gate_proj.weight", [3 * heads, width])]
        }
        Mechanism::Longformer { global_projections: true, .. } => {
            let global = |name, heads| tensors.matrix(name, [heads * dim, width]);
            vec![
                global("q_global.weight", heads),
                global("k_global.weight", section.kv_heads),
                global("v_global.weight", section.kv_heads),
            ]
        }
        Mechanism::Linformer { rank, shared } => {
            let matrix = |name| {
                let matrix = tensors.matrix(name, [rank, config.context]);
                Declared { initial: Initial::Normal(1.0 / (rank as f32).sqrt()), ..matrix }
            };
            let both = [matrix("e_proj.weight"), matrix("f_proj.weight")];
            both.into_iter().take(if shared { 1 } else { 2 }).collect()
        }
        Mechanism::Retention {} => tensors.gated(),
        Mechanism::ScalarDecay { conv } => {
            let decay = tensors.decay();
            tensors.gated().into_iter().chain(decay).chain(tensors.convolutions(conv)).collect()
        }
        Mechanism::Gla { rank } => {
            let down = tensors.matrix("decay_down.weight", [rank, width]);
            let up = tensors.matrix("decay_up.weight", [heads * dim, rank]);
            let bias = tensors.vector("decay_up.bias", heads * dim, Initial::Constant(0.0));
            tensors.gated().into_iter().chain([down, up, bias]).collect()
        }
        Mechanism::Delta { conv, .. } => {
            let strength = tensors.matrix("beta_proj.weight", [heads, width]);
            let convolutions = tensors.convolutions(conv);
            tensors.gated().into_iter().chain([strength]).chain(convolutions).collect()
        }
        Mechanism::GatedDelta { conv, .. } => {
            let strength = tensors.matrix("beta_proj.weight", [heads, width]);
            let (decay, convolutions) = (tensors.decay(), tensors.convolutions(conv));
            let gated = tensors.gated().into_iter();
            gated.chain([strength]).chain(decay).chain(convolutions).collect()
        }
        Mechanism::TransformerXl { .. } => {
            let bias = |name| tensors.vector(name, heads * dim, Initial::Constant(0.0));
            let distances = tensors.matrix("r_proj.weight", [heads * dim, width]);
            vec![distances, bias("content_bias"), bias("position_bias")]
        }
        Mechanism::Infini { .. } => vec![tensors.memory_gate()],
        Mechanism::Memorizing { .. } => {
            // With 1, as published, cosines of -1 to 1 weigh keys all but alike for thousands of steps of AdamW.
            let scale = Initial::Constant((dim as f32).sqrt());
            let scale = tensors.vector("scale", heads, scale);
            vec![tensors.memory_gate(), scale]
        }
        _ => vec![],
    }
}

/// The tensors of one section.
struct Tensors<'a> {
    name: &'a dyn Fn(&str) -> String,
    width: usize,
    heads: usize,
    dim: usize,
}

impl Tensors<'_> {
    fn matrix(&self, name: &str, shape: [usize; 2]) -> Declared {
        Declared::matrix((self.name)(name), shape)
    }

    fn vector(&self, name: &str, len: usize, initial: Initial) -> Declared {
        Declared::vector((self.name)(name), len, initial)
    }

    /// An output gate with its norm.
    fn gated(&self) -> Vec<Declared> {
        let gate = self.matrix("gate_proj.weight", [self.heads * self.dim, self.width]);
        vec![gate, self.vector("norm.weight", self.dim, Initial::Constant(1.0))]
    }

    /// A decay by softplus.
    fn decay(&self) -> Vec<Declared> {
        let steps = Initial::SoftplusOfLogUniform(0.001, 0.1);
        vec![
            self.matrix("decay_proj.weight", [self.heads, self.width]),
            self.vector("a_log", self.heads, Initial::LogOfUniform(1.0, 16.0)),
            self.vector("dt_bias", self.heads, steps),
        ]
    }

    fn convolutions(&self, taps: usize) -> Vec<Declared> {
        let names = if taps == 0 { &[][..] } else { &["q_conv", "k_conv", "v_conv"] };
        let bound = 1.0 / (taps as f32).sqrt();
        let one = |name: &&str| {
            let channels = self.heads * self.dim;
            let name = format!("{name}.weight");
            let declared = self.vector(&name, channels, Initial::Uniform(bound));
            Declared { shape: vec![channels, 1, taps], ..declared }
        };
        names.iter().map(one).collect()
    }

    /// The gate of a memory, a number a head.
    fn memory_gate(&self) -> Declared {
        let gate = self.vector("gate", self.heads, Initial::Constant(0.0));
        Declared { group: Group::Gate, ..gate }
    }
}
