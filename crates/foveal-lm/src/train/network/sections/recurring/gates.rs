//! What tokens bring to a recurrence besides queries, keys and values: decays and writing strengths.
//!
//! ```text
//! log a = −exp(a_log) softplus(x W_a + b)     log a = ln σ(x W_a₁ W_a₂ + b) / τ     β = c σ(x W_β)
//! ```
//!
//! Sources: [`foveal::nn::decay_gate`] and its neighbours. Kept for backward: what the functions were given.

use std::ops::Range;

use foveal::Gradient;
use foveal::nn::{self, DecayGate, DecayGateGradients};

use super::SectionPlace;
use crate::Error;
use crate::config::Mechanism;
use crate::mixer::TAU;
use crate::train::network::tools::{Projected, Tools, range};

/// The gates of a mechanism.
#[derive(Debug)]
pub(super) struct Gates {
    decay: Option<Decay>,
    /// With the most that a strength can be.
    strength: Option<(Projected, f32)>,
}

#[derive(Debug)]
enum Decay {
    /// A number a head.
    Softplus { projection: Projected, a_log: Range<usize>, bias: Range<usize> },
    /// A number a key channel.
    Sigmoid { down: Projected, up: Projected },
}

/// Gates of all tokens; empty where there are none.
#[derive(Debug, Default)]
pub(super) struct GateRows {
    pub(super) log_decay: Vec<f32>,
    pub(super) beta: Vec<f32>,
    /// Arguments of the functions that gave them.
    plain: [Vec<f32>; 2],
    /// What lies between two matrices.
    between: Vec<f32>,
}

impl GateRows {
    /// Gives the buffers back.
    pub(super) fn give(self, tools: &mut Tools<'_>) {
        let GateRows { log_decay, beta, plain: [decays, strengths], between } = self;
        for buffer in [log_decay, beta, decays, strengths, between] {
            tools.pool.give(buffer);
        }
    }
}

impl Gates {
    pub(super) fn new(mechanism: &Mechanism, place: SectionPlace<'_>) -> Result<Gates, Error> {
        let (width, dim) = (place.config.width, place.config.attention.head_dim);
        let heads = place.heads;
        let projected = |part: &str, shape, biased| {
            Projected::new(place.ranges, &place.name(part), shape, biased)
        };
        let own = |part: &str| range(place.ranges, &place.name(part));
        let softplus = || -> Result<_, Error> {
            let projection = projected("decay_proj", [heads, width], false)?;
            Ok(Some(Decay::Softplus { projection, a_log: own("a_log")?, bias: own("dt_bias")? }))
        };
        let strength = |negative: bool| -> Result<_, Error> {
            let projection = projected("beta_proj", [heads, width], false)?;
            Ok(Some((projection, if negative { 2.0 } else { 1.0 })))
        };
        Ok(match *mechanism {
            Mechanism::ScalarDecay { .. } => Gates { decay: softplus()?, strength: None },
            Mechanism::Gla { rank } => {
                let down = projected("decay_down", [rank, width], false)?;
                let up = projected("decay_up", [heads * dim, rank], true)?;
                Gates { decay: Some(Decay::Sigmoid { down, up }), strength: None }
            }
            Mechanism::Delta { negative_eigenvalues, .. } => {
                Gates { decay: None, strength: strength(negative_eigenvalues)? }
            }
            Mechanism::GatedDelta { negative_eigenvalues, .. } => {
                Gates { decay: softplus()?, strength: strength(negative_eigenvalues)? }
            }
            _ => Gates { decay: None, strength: None },
        })
    }

    /// Numbers of a token's decay for one head: 1, or one a key channel; `None` without decays.
    pub(super) fn decay_dim(&self, dim: usize) -> Option<usize> {
        self.decay.as_ref().map(|decay| match decay {
            Decay::Softplus { .. } => 1,
            Decay::Sigmoid { .. } => dim,
        })
    }

    /// Whether tokens bring writing strengths.
    pub(super) fn has_strength(&self) -> bool {
        self.strength.is_some()
    }

    /// The gates of all tokens of `x`.
    pub(super) fn forward(
        &self,
        parameters: &[f32],
        x: &[f32],
        tools: &mut Tools<'_>,
    ) -> Result<GateRows, Error> {
        let (mut rows, level) = (GateRows::default(), tools.cpu.level);
        match &self.decay {
            None => {}
            Some(Decay::Softplus { projection, a_log, bias }) => {
                rows.plain[0] = projected(projection, parameters, x, tools)?;
                rows.log_decay = tools.pool.copy(&rows.plain[0]);
                let gate = decay_gate(parameters, (a_log, bias));
                nn::decay_gate(gate, &mut rows.log_decay, level)?;
            }
            Some(Decay::Sigmoid { down, up }) => {
                rows.between = projected(down, parameters, x, tools)?;
                rows.plain[0] = projected(up, parameters, &rows.between, tools)?;
                rows.log_decay = tools.pool.copy(&rows.plain[0]);
                nn::log_sigmoid(&mut rows.log_decay, TAU, level)?;
            }
        }
        if let Some((projection, factor)) = &self.strength {
            rows.plain[1] = projected(projection, parameters, x, tools)?;
            rows.beta = tools.pool.copy(&rows.plain[1]);
            nn::sigmoid(&mut rows.beta, *factor, level)?;
        }
        Ok(rows)
    }

    /// From the gradients of the gates, in whose place others are left, to those of `x` and of parameters.
    pub(super) fn backward(
        &self,
        (parameters, gradients): (&[f32], &mut [f32]),
        (x, rows): (&[f32], &GateRows),
        [d_decay, d_beta]: [&mut [f32]; 2],
        d_x: &mut [f32],
        tools: &mut Tools<'_>,
    ) -> Result<(), Error> {
        let level = tools.cpu.level;
        let [plain_decay, plain_beta] = &rows.plain;
        match &self.decay {
            None => {}
            Some(Decay::Softplus { projection, a_log, bias }) => {
                let mut sums = [a_log, bias].map(|range| vec![0.0; range.len()]);
                let [d_a_log, d_bias] = &mut sums;
                let places = DecayGateGradients {
                    d_a_log: Gradient::Write(d_a_log),
                    d_bias: Gradient::Write(d_bias),
                };
                let gate = decay_gate(parameters, (a_log, bias));
                nn::decay_gate_backward(gate, plain_decay, d_decay, places, level)?;
                for (range, sums) in [a_log, bias].into_iter().zip(&sums) {
                    nn::add(&mut gradients[range.clone()], sums, level)?;
                }
                let arenas = (parameters, &mut *gradients);
                projection.backward(arenas, (x, d_decay), Gradient::Add(&mut *d_x), tools)?;
            }
            Some(Decay::Sigmoid { down, up }) => {
                nn::log_sigmoid_backward(plain_decay, TAU, d_decay, level)?;
                let mut d_between = tools.pool.take(rows.between.len());
                let (arenas, place) =
                    ((parameters, &mut *gradients), Gradient::Write(&mut d_between[..]));
                up.backward(arenas, (&rows.between, d_decay), place, tools)?;
                let arenas = (parameters, &mut *gradients);
                down.backward(arenas, (x, &d_between), Gradient::Add(&mut *d_x), tools)?;
                tools.pool.give(d_between);
            }
        }
        if let Some((projection, factor)) = &self.strength {
            nn::sigmoid_backward(plain_beta, *factor, d_beta, level)?;
            projection.backward((parameters, gradients), (x, d_beta), Gradient::Add(d_x), tools)?;
        }
        Ok(())
    }
}

fn decay_gate<'a>(
    parameters: &'a [f32],
    (a_log, bias): (&Range<usize>, &Range<usize>),
) -> DecayGate<'a> {
    DecayGate { a_log: &parameters[a_log.clone()], bias: &parameters[bias.clone()] }
}

/// All rows of `x` by a projection.
pub(super) fn projected(
    projection: &Projected,
    parameters: &[f32],
    x: &[f32],
    tools: &mut Tools<'_>,
) -> Result<Vec<f32>, Error> {
    let shape = projection.shape;
    let mut y = tools.pool.take(x.len() / shape.in_features.max(1) * shape.out_features);
    projection.forward(parameters, x, &mut y, tools)?;
    Ok(y)
}
