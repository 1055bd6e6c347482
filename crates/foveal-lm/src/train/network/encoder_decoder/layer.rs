//! The parts of a layer: attention, a feed-forward network, a norm; each with its backward pass.

use std::ops::Range;

use foveal::nn::{LayerNorm, NormBackward, NormGradients, layer_norm, layer_norm_backward};
use foveal::{Gradient, Mask, Scale};

use super::EncoderDecoderConfig;
use crate::Error;
use crate::mixer::{
    Affine, AttentionParameters, Inputs, LayerState, MultiHeadAttention, Saved, Source, Upstream,
};
use crate::train::network::tools::{Projected, Ranges, Tools, range};
use crate::train::parameters::{Declared, Initial};

const EPSILON: f32 = 1e-5;

/// Declares the parameters of a layer.
pub(super) fn declared(
    config: &EncoderDecoderConfig,
    across: bool,
    prefix: &str,
    all: &mut Vec<Declared>,
) {
    let (width, inner) = (config.width, config.inner);
    let attention = |name: &str, all: &mut Vec<Declared>| {
        for part in PARTS {
            declare_linear([width, width], &format!("{prefix}.{name}.{part}"), all);
        }
        declare_norm(width, &format!("{prefix}.{name}_layer_norm"), all);
    };
    attention("self_attn", all);
    if across {
        attention("encoder_attn", all);
    }
    declare_linear([inner, width], &format!("{prefix}.fc1"), all);
    declare_linear([width, inner], &format!("{prefix}.fc2"), all);
    declare_norm(width, &format!("{prefix}.final_layer_norm"), all);
}

/// A matrix and its bias.
fn declare_linear(shape: [usize; 2], name: &str, all: &mut Vec<Declared>) {
    all.push(Declared::matrix(format!("{name}.weight"), shape));
    all.push(Declared::vector(format!("{name}.bias"), shape[0], Initial::Constant(0.0)));
}

/// The weights and the bias of a LayerNorm.
pub(super) fn declare_norm(width: usize, name: &str, all: &mut Vec<Declared>) {
    all.push(Declared::vector(format!("{name}.weight"), width, Initial::Constant(1.0)));
    all.push(Declared::vector(format!("{name}.bias"), width, Initial::Constant(0.0)));
}

/// The projections of an attention, in the order in which they lie.
const PARTS: [&str; 4] = ["q_proj", "k_proj", "v_proj", "out_proj"];

/// Attention to the own text or to another.
#[derive(Debug)]
pub(super) struct Attending {
    layer: MultiHeadAttention,
    /// All of its parameters, side by side.
    range: Range<usize>,
}

impl Attending {
    pub(super) fn new(
        config: &EncoderDecoderConfig,
        ranges: &Ranges,
        name: &str,
        causal: bool,
    ) -> Result<Attending, Error> {
        let (width, heads) = (config.width, config.heads);
        let layer = MultiHeadAttention {
            width,
            key_width: width,
            value_width: width,
            heads,
            kv_heads: heads,
            head_dim: width / heads,
            scale: Scale::InverseSqrtDim,
            softcap: None,
            mask: if causal { Mask::causal() } else { Mask::full() },
            reach: None,
            norm_epsilon: EPSILON,
        };
        let first = range(ranges, &format!("{name}.{}.weight", PARTS[0]))?;
        let last = range(ranges, &format!("{name}.{}.bias", PARTS[3]))?;
        Ok(Attending { layer, range: first.start..last.end })
    }

    fn parameters<'a>(&self, parameters: &'a [f32]) -> AttentionParameters<&'a [f32]> {
        let width = self.layer.width;
        let mut parts = parameters[self.range.clone()].chunks_exact((width + 1) * width);
        let mut next = || {
            let (weight, bias) = parts.next().unwrap_or_default().split_at(width * width);
            Affine { weight, bias: Some(bias) }
        };
        let [query, key, value, output] = [0; 4].map(|_| next());
        AttentionParameters { query, key, value, output, ..AttentionParameters::default() }
    }

    fn places<'a>(&self, gradients: &'a mut [f32]) -> AttentionParameters<&'a mut [f32]> {
        let width = self.layer.width;
        let mut parts = gradients[self.range.clone()].chunks_exact_mut((width + 1) * width);
        let mut next = || {
            let (weight, bias) = parts.next().unwrap_or_default().split_at_mut(width * width);
            Affine { weight, bias: Some(bias) }
        };
        let [query, key, value, output] = [0; 4].map(|_| next());
        AttentionParameters {
            query,
            key,
            value,
            output,
            query_norm: None,
            key_norm: None,
            sinks: None,
        }
    }

    /// What rows `x` see of themselves, or of `source`.
    pub(super) fn forward(
        &self,
        parameters: &[f32],
        (x, source): (&[f32], Option<&[f32]>),
        sequences: usize,
        tools: &mut Tools<'_>,
    ) -> Result<(Vec<f32>, Saved), Error> {
        let states = (0..sequences).map(|_| self.layer.state());
        let mut states = states.collect::<Result<Vec<LayerState>, Error>>()?;
        let source = match source {
            Some(rows) => Source::Other { keys: rows, values: rows },
            None => Source::Own,
        };
        let inputs = Inputs { x, source, rotation: None };
        let parameters = self.parameters(parameters);
        self.layer.forward(&parameters, inputs, &mut states, &mut tools.run())
    }

    /// The gradient of its rows; that of the source's is added to `d_source`.
    pub(super) fn backward(
        &self,
        (parameters, gradients): (&[f32], &mut [f32]),
        (saved, d_y): (&Saved, &[f32]),
        d_source: Option<&mut [f32]>,
        tools: &mut Tools<'_>,
    ) -> Result<Vec<f32>, Error> {
        let upstream = Upstream { d_y, d_state: None };
        let mut places = self.places(gradients);
        let parameters = self.parameters(parameters);
        let d = self.layer.backward(&parameters, saved, upstream, &mut places, &mut tools.run())?;
        if let (Some(sum), Some(both)) = (d_source, d.d_source) {
            both.iter().try_for_each(|d| tools.add(sum, d))?;
        }
        Ok(d.d_x)
    }
}

/// Two projections with max(0, ·) between them.
#[derive(Debug)]
pub(super) struct Feeding {
    first: Projected,
    second: Projected,
}

impl Feeding {
    pub(super) fn new(
        config: &EncoderDecoderConfig,
        ranges: &Ranges,
        prefix: &str,
    ) -> Result<Feeding, Error> {
        let (width, inner) = (config.width, config.inner);
        Ok(Feeding {
            first: Projected::new(ranges, &format!("{prefix}.fc1"), [inner, width], true)?,
            second: Projected::new(ranges, &format!("{prefix}.fc2"), [width, inner], true)?,
        })
    }

    /// The results, and the inner rows.
    pub(super) fn forward(
        &self,
        parameters: &[f32],
        x: &[f32],
        tools: &mut Tools<'_>,
    ) -> Result<[Vec<f32>; 2], Error> {
        let width = self.second.shape.out_features;
        let mut inner = vec![0.0; x.len() / width * self.first.shape.out_features];
        self.first.forward(parameters, x, &mut inner, tools)?;
        // Not `max`, which would make a NaN 0.
        inner.iter_mut().filter(|x| **x < 0.0).for_each(|x| *x = 0.0);
        let mut y = vec![0.0; x.len()];
        self.second.forward(parameters, &inner, &mut y, tools)?;
        Ok([y, inner])
    }

    /// The gradient of its rows.
    pub(super) fn backward(
        &self,
        (parameters, gradients): (&[f32], &mut [f32]),
        (x, inner): (&[f32], &[f32]),
        d_y: &[f32],
        tools: &mut Tools<'_>,
    ) -> Result<Vec<f32>, Error> {
        let (mut d_inner, mut d_x) = (vec![0.0; inner.len()], vec![0.0; x.len()]);
        let arenas = (parameters, &mut *gradients);
        self.second.backward(arenas, (inner, d_y), Gradient::Write(&mut d_inner), tools)?;
        let below = d_inner.iter_mut().zip(inner).filter(|(_, x)| **x == 0.0);
        below.for_each(|(d, _)| *d = 0.0);
        self.first.backward(
            (parameters, gradients),
            (x, &d_inner),
            Gradient::Write(&mut d_x),
            tools,
        )?;
        Ok(d_x)
    }
}

/// A LayerNorm.
#[derive(Debug)]
pub(super) struct Normal {
    weight: Range<usize>,
    bias: Range<usize>,
}

impl Normal {
    pub(super) fn new(ranges: &Ranges, name: &str) -> Result<Normal, Error> {
        Ok(Normal {
            weight: range(ranges, &format!("{name}.weight"))?,
            bias: range(ranges, &format!("{name}.bias"))?,
        })
    }

    fn view<'a>(&self, parameters: &'a [f32]) -> LayerNorm<'a> {
        LayerNorm {
            weight: &parameters[self.weight.clone()],
            bias: Some(&parameters[self.bias.clone()]),
            epsilon: EPSILON,
        }
    }

    pub(super) fn forward(
        &self,
        parameters: &[f32],
        x: &[f32],
        tools: &Tools<'_>,
    ) -> Result<Vec<f32>, Error> {
        let mut y = vec![0.0; x.len()];
        layer_norm(self.view(parameters), x, &mut y, tools.cpu.level)?;
        Ok(y)
    }

    /// The gradient of its rows.
    pub(super) fn backward(
        &self,
        (parameters, gradients): (&[f32], &mut [f32]),
        (x, d_y): (&[f32], &[f32]),
        tools: &Tools<'_>,
    ) -> Result<Vec<f32>, Error> {
        let mut d_x = vec![0.0; x.len()];
        // The bias lies behind the weights.
        let both = &mut gradients[self.weight.start..self.bias.end];
        let (d_weight, d_bias) = both.split_at_mut(self.weight.len());
        let places = NormGradients {
            d_x: Gradient::Write(&mut d_x),
            d_weight: Gradient::Add(d_weight),
            d_bias: Gradient::Add(d_bias),
        };
        let rows = NormBackward { x, d_y };
        layer_norm_backward(self.view(parameters), rows, places, tools.cpu.level)?;
        Ok(d_x)
    }
}
