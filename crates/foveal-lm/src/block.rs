//! A layer: attention and a gated feed-forward network, each on a normalised input and added to the stream.
//!
//! ```text
//! x ← x + post₁(attention(norm₁(x)))
//! x ← x + post₂(down(activation(gate(h)) · up(h)))      h = norm₂(x)
//! ```
//!
//! The post-norms are Gemma's; other models have none.

use foveal::cache::Rolling;
use foveal::position::Rope;
use foveal::{Cpu, nn};

use crate::Error;
use crate::config::Activation;
use crate::linear::{Linear, Run, forward_together};
use crate::mixer::{Attended, LayerState, StoredMixer, Trace, attention};
use crate::names::{Part, Parts};
use crate::norm::Norm;

/// One layer's parameters.
#[derive(Clone, Debug)]
pub(crate) struct Block {
    attention_norm: Norm,
    pub(crate) mixer: StoredMixer,
    post_attention_norm: Option<Norm>,
    feed_forward_norm: Norm,
    gate: Linear,
    up: Linear,
    down: Linear,
    activation: Activation,
    post_feed_forward_norm: Option<Norm>,
}

/// Activations of a layer, one row a token; layers share them.
#[derive(Debug, Default)]
pub(crate) struct Activations {
    attention: attention::Activations,
    normed: Vec<f32>,
    added: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
}

impl Block {
    pub(crate) fn new(parts: &Parts<'_>, layer: usize, rope: usize) -> Result<Block, Error> {
        let config = parts.config();
        let (width, inner) = (config.width, config.feed_forward);
        let post_norm = |part| {
            let norm = config.post_norms.then(|| parts.norm(layer, part, width));
            norm.transpose()
        };
        Ok(Block {
            attention_norm: parts.norm(layer, Part::AttentionNorm, width)?,
            mixer: StoredMixer::new(parts, layer, rope)?,
            post_attention_norm: post_norm(Part::PostAttentionNorm)?,
            feed_forward_norm: parts.norm(layer, Part::FeedForwardNorm, width)?,
            gate: parts.linear(layer, Part::Gate, [inner, width], false)?,
            up: parts.linear(layer, Part::Up, [inner, width], false)?,
            down: parts.linear(layer, Part::Down, [width, inner], false)?,
            activation: config.activation,
            post_feed_forward_norm: post_norm(Part::PostFeedForwardNorm)?,
        })
    }

    /// Runs the layer on the tokens `x`, `[sequences, tokens, width]`, in place.
    pub(crate) fn forward(
        &self,
        x: &mut [f32],
        states: &mut [LayerState],
        activations: &mut Activations,
        run: &mut Run<'_>,
    ) -> Result<(), Error> {
        let Activations { attention, normed, added, .. } = activations;
        normed.resize(x.len(), 0.0);
        added.resize(x.len(), 0.0);
        self.attention_norm.forward(x, normed, run.cpu)?;
        self.mixer.forward(normed, added, states, attention, run)?;
        add(x, added, self.post_attention_norm.as_ref(), run.cpu)?;
        self.feed_forward(x, activations, run)
    }

    /// What the layer's attention has just done, if `activations` were observed.
    pub(crate) fn attended<'a>(
        &'a self,
        state: &'a LayerState,
        activations: &'a Activations,
        cpu: Cpu,
    ) -> Result<Attended<'a>, Error> {
        self.mixer.attended(state, &activations.attention, cpu)
    }

    fn feed_forward(
        &self,
        x: &mut [f32],
        activations: &mut Activations,
        run: &mut Run<'_>,
    ) -> Result<(), Error> {
        let Activations { normed, added, gate, up, .. } = activations;
        let inner = x.len() / self.gate.in_features() * self.gate.out_features();
        gate.resize(inner, 0.0);
        up.resize(inner, 0.0);
        self.feed_forward_norm.forward(x, normed, run.cpu)?;
        let both = [(self.gate.view()?, &mut gate[..]), (self.up.view()?, &mut up[..])];
        forward_together(normed, both, run)?;
        match self.activation {
            Activation::Silu => nn::silu_gate(gate, up, run.cpu.level)?,
            Activation::GeluTanh => nn::gelu_gate(gate, up, run.cpu.level)?,
        }
        self.down.forward(gate, added, run)?;
        add(x, added, self.post_feed_forward_norm.as_ref(), run.cpu)
    }
}

/// `x += y`, with `y` normalised first if there is a norm.
fn add(x: &mut [f32], y: &mut [f32], norm: Option<&Norm>, cpu: Cpu) -> Result<(), Error> {
    if let Some(norm) = norm {
        norm.forward_in_place(y, cpu)?;
    }
    Ok(nn::add(x, y, cpu.level)?)
}

impl Activations {
    /// Whether calls leave what an observer needs.
    pub(crate) fn observe(&mut self, observed: bool) {
        self.attention.observe(observed);
    }

    /// Where the next layer leaves what it is given.
    pub(crate) fn trace(&mut self) -> &mut Option<Trace> {
        self.attention.trace()
    }

    /// Prepares the rotations of the tokens at `positions`, of one sequence, or one token of each; for queries to rolling
    /// states as well.
    pub(crate) fn set_positions(
        &mut self,
        ropes: &[Rope],
        positions: &[usize],
        rolling: Option<Rolling>,
    ) -> Result<(), Error> {
        self.attention.set_positions(ropes, positions, rolling)
    }
}
