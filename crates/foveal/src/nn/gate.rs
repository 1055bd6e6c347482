//! Gates of layers with a state: writing strengths, decays, and output gates with their gradients.
//!
//! ```text
//! strength    β = c σ(x)                                          c = 1, or 2 for negative eigenvalues (DeltaNet)
//! decay       log a = ln σ(x) / τ                                 τ = 16 (GLA, Yang et al. 2023, section 4.4)
//! decay       log a = −exp(a_log) softplus(x + b)                 (Mamba-2; Gated DeltaNet, Yang et al. 2024)
//! output      y = u silu(g)                                       (RetNet, GLA, Gated DeltaNet)
//! ```
//!
//! Values are within a relative 1e-6 of the formulas, for arguments down to −87 (below, e^x counts as 0).

use super::{cleared, same_length};
use crate::error::{Error, Result};
use crate::gradient::Gradient;
use crate::simd::Level;
use crate::simd::gate::{self, DecaySums};

/// x ← factor · σ(x).
///
/// # Errors
/// [`Error::InvalidParameter`] unless the factor is finite.
pub fn sigmoid(x: &mut [f32], factor: f32, level: Level) -> Result<()> {
    finite("factor of a sigmoid", factor)?;
    gate::sigmoid(level, factor, x);
    Ok(())
}

/// The gradient of [`sigmoid`]: `d`, that of its results, becomes that of its arguments `x`.
///
/// # Errors
/// Those of [`sigmoid`]; [`Error::LengthMismatch`].
pub fn sigmoid_backward(x: &[f32], factor: f32, d: &mut [f32], level: Level) -> Result<()> {
    finite("factor of a sigmoid", factor)?;
    same_length("gradient of a sigmoid", x.len(), d.len())?;
    gate::sigmoid_backward(level, factor, x, d);
    Ok(())
}

/// x ← ln σ(x) / τ: logarithms of decays.
///
/// # Errors
/// [`Error::InvalidParameter`] unless τ is finite and above 0.
pub fn log_sigmoid(x: &mut [f32], tau: f32, level: Level) -> Result<()> {
    gate::log_sigmoid(level, inverse(tau)?, x);
    Ok(())
}

/// The gradient of [`log_sigmoid`]: `d`, that of its results, becomes that of its arguments `x`.
///
/// # Errors
/// Those of [`log_sigmoid`]; [`Error::LengthMismatch`].
pub fn log_sigmoid_backward(x: &[f32], tau: f32, d: &mut [f32], level: Level) -> Result<()> {
    let factor = inverse(tau)?;
    same_length("gradient of a logarithm of sigmoids", x.len(), d.len())?;
    gate::log_sigmoid_backward(level, factor, x, d);
    Ok(())
}

/// The parameters of a decay by softplus, one of each a head.
#[derive(Debug, Clone, Copy)]
pub struct DecayGate<'a> {
    /// The logarithm of the rate.
    pub a_log: &'a [f32],
    /// Added to arguments (`dt_bias`).
    pub bias: &'a [f32],
}

/// Where the gradients of a [`DecayGate`] go, one number a head.
#[derive(Debug, Default)]
pub struct DecayGateGradients<'a> {
    /// Of the logarithm of the rate.
    pub d_a_log: Gradient<&'a mut [f32]>,
    /// Of what is added to arguments.
    pub d_bias: Gradient<&'a mut [f32]>,
}

impl DecayGate<'_> {
    fn check(&self, what: &'static str, numbers: usize) -> Result<usize> {
        let heads = self.a_log.len();
        same_length("bias of a decay", heads, self.bias.len())?;
        same_length(what, numbers / heads.max(1) * heads, numbers)?;
        Ok(heads.max(1))
    }
}

/// x ← −exp(a_log) softplus(x + b), for rows `[T, heads]`: logarithms of decays.
///
/// # Errors
/// [`Error::LengthMismatch`] unless parameters have one number a head and rows are whole.
pub fn decay_gate(gate: DecayGate<'_>, x: &mut [f32], level: Level) -> Result<()> {
    let heads = gate.check("whole rows of decays", x.len())?;
    x.chunks_exact_mut(heads).for_each(|row| gate::decay(level, gate.a_log, gate.bias, row));
    Ok(())
}

/// The gradients of [`decay_gate`]: `d`, that of its results, becomes that of its arguments `x`. Sums over tokens are taken
/// in f32, from the first to the last.
///
/// # Errors
/// Those of [`decay_gate`]; [`Error::LengthMismatch`] for gradients of other lengths. Nothing is written then.
pub fn decay_gate_backward(
    gate: DecayGate<'_>,
    x: &[f32],
    d: &mut [f32],
    gradients: DecayGateGradients<'_>,
    level: Level,
) -> Result<()> {
    let heads = gate.check("whole rows of decays", x.len())?;
    same_length("gradient of decays", x.len(), d.len())?;
    let DecayGateGradients { d_a_log, d_bias } = gradients;
    for (what, place) in
        [("gradient of a decay's rate", &d_a_log), ("gradient of a decay's bias", &d_bias)]
    {
        let expected = gate.a_log.len();
        same_length(what, expected, place.place().map_or(expected, |place| place.len()))?;
    }
    let (mut d_a_log, mut d_bias) = (cleared(d_a_log), cleared(d_bias));
    for (x, d) in x.chunks_exact(heads).zip(d.chunks_exact_mut(heads)) {
        let sums = DecaySums {
            d_a_log: d_a_log.as_deref_mut().unwrap_or_default(),
            d_bias: d_bias.as_deref_mut().unwrap_or_default(),
        };
        gate::decay_backward(level, gate.a_log, gate.bias, x, d, sums);
    }
    Ok(())
}

fn finite(what: &'static str, x: f32) -> Result<()> {
    let (expected, got) = ("a finite number", x.to_string());
    if x.is_finite() { Ok(()) } else { Err(Error::InvalidParameter { what, expected, got }) }
}

fn inverse(tau: f32) -> Result<f32> {
    if tau.is_finite() && tau > 0.0 {
        return Ok(1.0 / tau);
    }
    let (what, expected) = ("tau of a decay by sigmoid", "a finite number above 0");
    Err(Error::InvalidParameter { what, expected, got: tau.to_string() })
}
