//! A layer's gated feed-forward network.
//!
//! ```text
//! y = W_d (act(g) · u)      [g, u] = x [W_g, W_u]ᵀ          gate and up are one matrix to kernels
//! ```
//!
//! Kept for backward: g and u, whose gradients take their place; their product is made again.

use foveal::Gradient;
use foveal::nn::{self, GateGradient};

use super::tools::{Projected, Ranges, Tools};
use crate::Error;
use crate::config::{Activation, ModelConfig};

/// Rows that are gated at a time.
const ROWS: usize = 8;

/// What a feed-forward network computes.
#[derive(Debug)]
pub(super) struct FeedForward {
    gate_up: Projected,
    down: Projected,
    inner: usize,
    activation: Activation,
}

impl FeedForward {
    pub(super) fn new(
        config: &ModelConfig,
        ranges: &Ranges,
        layer: usize,
    ) -> Result<FeedForward, Error> {
        let (width, inner) = (config.width, config.feed_forward);
        let projected = |name: &str, shape| {
            Projected::new(ranges, &format!("model.layers.{layer}.mlp.{name}"), shape, false)
        };
        let up = projected("up_proj", [inner, width])?;
        Ok(FeedForward {
            gate_up: projected("gate_proj", [inner, width])?.with(&up)?,
            down: projected("down_proj", [width, inner])?,
            inner,
            activation: config.activation,
        })
    }

    /// From the normalised rows `x` to `y`; returns g and u, `[rows, 2 · inner]`.
    pub(super) fn forward(
        &self,
        parameters: &[f32],
        (x, y): (&[f32], &mut [f32]),
        tools: &mut Tools<'_>,
    ) -> Result<Vec<f32>, Error> {
        let inner = self.inner;
        let rows = x.len() / self.gate_up.shape.in_features.max(1);
        let mut gate_up = tools.pool.take(rows * 2 * inner);
        self.gate_up.forward(parameters, x, &mut gate_up, tools)?;
        let mut gated = tools.pool.take(rows * inner);
        let (level, activation) = (tools.cpu.level, self.activation);
        let pieces = gate_up.chunks(ROWS * 2 * inner).zip(gated.chunks_mut(ROWS * inner));
        tools.cpu.for_each(pieces, |(gate_up, gated)| {
            for (both, gated) in gate_up.chunks_exact(2 * inner).zip(gated.chunks_exact_mut(inner))
            {
                let (gate, up) = both.split_at(inner);
                gated.copy_from_slice(gate);
                let gating = match activation {
                    Activation::Silu => nn::silu_gate(gated, up, level),
                    Activation::GeluTanh => nn::gelu_gate(gated, up, level),
                };
                gating.expect("halves of a row");
            }
        });
        self.down.forward(parameters, &gated, y, tools)?;
        tools.pool.give(gated);
        Ok(gate_up)
    }

    /// From the gradient of the results to that of `x`, which is written to `d_x`. Takes what forward returned.
    pub(super) fn backward(
        &self,
        (parameters, gradients): (&[f32], &mut [f32]),
        (x, d_y): (&[f32], &[f32]),
        mut gate_up: Vec<f32>,
        d_x: &mut [f32],
        tools: &mut Tools<'_>,
    ) -> Result<(), Error> {
        let inner = self.inner;
        let mut d = tools.pool.take(gate_up.len() / 2);
        self.down.input_gradient(parameters, d_y, Gradient::Write(&mut d), tools)?;
        let (level, activation) = (tools.cpu.level, self.activation);
        let pieces = gate_up.chunks_mut(ROWS * 2 * inner).zip(d.chunks_mut(ROWS * inner));
        tools.cpu.for_each(pieces, |(gate_up, d)| {
            for (both, d_h) in gate_up.chunks_exact_mut(2 * inner).zip(d.chunks_exact_mut(inner)) {
                let (gate, up) = both.split_at_mut(inner);
                let of = GateGradient { gate, up, d_h };
                let gating = match activation {
                    Activation::Silu => nn::silu_gate_gradient(of, level),
                    Activation::GeluTanh => nn::gelu_gate_gradient(of, level),
                };
                gating.expect("halves of a row");
            }
        });
        // What `d` holds now are the gated numbers themselves.
        self.down.weight_gradient((parameters, &mut *gradients), (&d, d_y), tools)?;
        tools.pool.give(d);
        self.gate_up.weight_gradient((parameters, gradients), (x, &gate_up), tools)?;
        self.gate_up.input_gradient(parameters, &gate_up, Gradient::Write(d_x), tools)?;
        tools.pool.give(gate_up);
        Ok(())
    }
}
