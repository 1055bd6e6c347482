//! A layer whose heads are mixed by mechanisms that the configuration names, one for all or one for each of its sections.
//!
//! ```text
//! q = norm(x Wqᵀ + bq)   k = norm(x Wkᵀ + bk)   v = x Wvᵀ + bv         for all heads; rotated, but for most recurrences
//! y = concat_s(mechanism_s(q_s, k_s, v_s)) Woᵀ                         s: neighbouring heads
//! ```
//!
//! The projections are those of [`MultiHeadAttention`](super::MultiHeadAttention). What a mechanism keeps of a text is what
//! later queries can see, and no more; those that choose keys read a prompt's chunk as a whole and what is generated a token at a
//! time, and a token costs what its pattern has.

mod across;
mod chosen;
mod core;
mod entries;
mod global;
mod recurrent;
mod rule;
mod state;
mod weigh;

use foveal::nn::{RmsNorm, rms_norm_in_place};
use foveal::position::RopeTable;
use foveal::{Scale, Shape, Strides, TensorMut, TensorRef};

use super::attention::{self, StoredParameters};
use super::state::Heads;
use super::{CacheOptions, Keep, LayerState};
use crate::Error;
use crate::config::ModelConfig;
use crate::linear::{Run, forward_together};
use crate::names::Parts;

use self::core::Core;
pub(crate) use across::{MAX_REACH, MemoryState, segments_mask};
pub(crate) use chosen::{lsh, native_sparse, sparse_transformer};
pub(crate) use entries::Rows;
pub(crate) use rule::{Rule, TAU, UNIT_EPSILON, with_rule};
pub(crate) use state::SectionState;

/// One layer of sections: what it computes, its weights as their file stores them, and its positions.
#[derive(Clone, Debug)]
pub(crate) struct SectionedAttention {
    parameters: StoredParameters,
    norm_epsilon: f32,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    sections: Vec<Section>,
    /// Which of the model's rotary embeddings.
    rope: usize,
}

/// Neighbouring heads.
#[derive(Clone, Debug)]
struct Section {
    /// The first query head, and how many there are.
    heads: (usize, usize),
    /// The same of key/value heads.
    kv_heads: (usize, usize),
    core: Core,
}

/// Scratch memory of such layers.
#[derive(Debug, Default)]
pub(crate) struct Activations {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    /// Queries and keys before rotation, where a section reads both.
    plain: [Vec<f32>; 2],
    mixed: Vec<f32>,
}

impl SectionedAttention {
    pub(crate) fn new(
        parts: &Parts<'_>,
        layer: usize,
        rope: usize,
    ) -> Result<SectionedAttention, Error> {
        let model = parts.config();
        let config = model.attention;
        refuse(model)?;
        let (mut head, mut kv_head, mut sections) = (0, 0, vec![]);
        for (n, section) in model.layers[layer].sections.iter().enumerate() {
            let sizes = Heads {
                heads: section.heads,
                kv_heads: section.kv_heads,
                dims: (config.head_dim, config.head_dim),
            };
            sections.push(Section {
                heads: (head, section.heads),
                kv_heads: (kv_head, section.kv_heads),
                core: Core::new(&section.mechanism, sizes, (parts, layer, n))?,
            });
            head += section.heads;
            kv_head += section.kv_heads;
        }
        Ok(SectionedAttention {
            parameters: StoredParameters::read(parts, layer)?,
            norm_epsilon: model.norm_epsilon,
            heads: config.heads,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
            sections,
            rope,
        })
    }

    /// A state that holds no tokens; it grows as mechanisms need it.
    pub(crate) fn state(&self, options: &CacheOptions) -> Result<LayerState, Error> {
        if options.keep != Keep::All {
            return Err(Error::CacheOptions {
                what: "choice of keys of a mixer that is named",
                found: format!("{:?}", options.keep),
                expected: "all that its mechanism sees".to_owned(),
            });
        }
        let states = self.sections.iter().map(|section| section.core.state(options.storage));
        LayerState::of_sections(states.collect::<Result<_, _>>()?)
    }

    /// Whether the stores of a state at `position` hold all that their sections see.
    pub(crate) fn sees_all(&self, state: &LayerState, position: usize) -> bool {
        let sections = self.sections.iter().enumerate();
        let own = |(n, section): (usize, &Section)| (state.section(n), section.core.reach());
        sections.map(own).all(|own| match own {
            (Some(SectionState::Keys(store)), reach) => store.is_at(reach, position),
            (state, _) => state.is_some(),
        })
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
        let attention::Activations { rotations, sections: scratch, trace, .. } = activations;
        let Activations { q, k, v, plain, mixed } = scratch;
        let parameters = self.parameters.views()?;
        let rows = x.len() / parameters.query.weight.shape().in_features;
        let call = [states.len(), rows / states.len().max(1)];
        q.resize(rows * self.heads * self.head_dim, 0.0);
        k.resize(rows * self.kv_heads * self.head_dim, 0.0);
        v.resize(k.len(), 0.0);
        mixed.resize(q.len(), 0.0);
        let three = [(parameters.query, &mut q[..]), (parameters.key, k), (parameters.value, v)];
        forward_together(x, three, run)?;
        for (weight, rows) in [(parameters.query_norm, &mut *q), (parameters.key_norm, &mut *k)] {
            let Some(weight) = weight else { continue };
            rms_norm_in_place(self.norm(weight), rows, run.cpu.level)?;
        }
        let both = self.sections.iter().any(|section| section.core.reads_both());
        if both {
            plain[0].clone_from(q);
            plain[1].clone_from(k);
        }
        self.rotate(&rotations[self.rope], call, [q, k], run)?;
        if let Some(trace) = trace {
            let plain = plain.each_ref().map(|x| if both { &x[..] } else { &[] });
            trace.extend(rows, [x, q, k], plain);
        }
        // What is not rotated lies as it was.
        let plain = if both { [&plain[0], &plain[1]] } else { [&*q, &*k] };
        for (n, section) in self.sections.iter().enumerate() {
            let tokens = core::SectionTokens {
                x,
                q: self.view(q, call, self.heads, section.heads)?,
                k: self.view(k, call, self.kv_heads, section.kv_heads)?,
                v: self.view(v, call, self.kv_heads, section.kv_heads)?,
                plain: [
                    self.view(plain[0], call, self.heads, section.heads)?,
                    self.view(plain[1], call, self.kv_heads, section.kv_heads)?,
                ],
            };
            let (shape, strides, first) = self.place(call, self.heads, section.heads);
            let mut out = TensorMut::from_strides(&mut mixed[first..], shape, strides)?;
            section.core.forward((states, n), tokens, out.reborrow(), run)?;
            if let Some(globals) = section.core.globals() {
                let norms = [parameters.query_norm, parameters.key_norm]
                    .map(|weight| weight.map(|weight| self.norm(weight)));
                let around = (norms, &rotations[self.rope]);
                let projected = globals.project(x, call, around, run)?;
                let to = (section.core.scale(), out);
                globals.forward((states, n), &projected, to, run)?;
            }
        }
        forward_together(mixed, [(parameters.output, y)], run)
    }

    fn norm<'a>(&self, weight: &'a [f32]) -> RmsNorm<'a> {
        RmsNorm { weight, epsilon: self.norm_epsilon }
    }

    fn rotate(
        &self,
        rotation: &RopeTable,
        call: [usize; 2],
        [q, k]: [&mut Vec<f32>; 2],
        run: &Run<'_>,
    ) -> Result<(), Error> {
        for section in self.sections.iter().filter(|section| section.core.rotated()) {
            for (x, heads, own) in
                [(&mut *q, self.heads, section.heads), (&mut *k, self.kv_heads, section.kv_heads)]
            {
                let (shape, strides, first) = self.place(call, heads, own);
                let x = x.get_mut(first..).unwrap_or(&mut []);
                rotation.rotate(run.cpu.level, TensorMut::from_strides(x, shape, strides)?)?;
            }
        }
        Ok(())
    }

    /// Shape, strides and first number of some of all `heads` heads.
    fn place(
        &self,
        [batch, seq]: [usize; 2],
        heads: usize,
        (first, own): (usize, usize),
    ) -> (Shape, Strides, usize) {
        let dim = self.head_dim;
        let strides = Strides { batch: seq * heads * dim, seq: heads * dim, heads: dim };
        (Shape { batch, seq, heads: own, dim }, strides, first * dim)
    }

    fn view<'a>(
        &self,
        x: &'a [f32],
        call: [usize; 2],
        heads: usize,
        own: (usize, usize),
    ) -> Result<TensorRef<'a, f32>, Error> {
        let (shape, strides, first) = self.place(call, heads, own);
        Ok(TensorRef::from_strides(x.get(first..).unwrap_or(&[]), shape, strides)?)
    }
}

/// Refuses families whose attention has more than the mechanisms compute.
pub(crate) fn refuse(model: &ModelConfig) -> Result<(), Error> {
    let config = model.attention;
    let more = [
        ("a softcap of scores", config.softcap.is_some()),
        ("sinks", config.sinks),
        ("latent attention", config.latent.is_some()),
    ];
    match more.into_iter().find(|(_, there)| *there) {
        Some((what, _)) => Err(Error::UnsupportedConfig {
            key: "\"foveal\" mixer".to_owned(),
            found: format!("one for a family with {what}"),
        }),
        None => Ok(()),
    }
}

/// What scores are multiplied by.
fn scale(parts: &Parts<'_>) -> Scale {
    Scale::Value(parts.config().attention.scale)
}
