//! Gated activations, capped logits and the residual sum.
//!
//! Shazeer, "GLU Variants Improve Transformer", 2020: SwiGLU is silu(g) · u with
//! silu(g) = g / (1 + e^−g); GEGLU is gelu(g) · u, here with
//! gelu(g) = ½ g (1 + tanh(√(2/π) (g + 0.044715 g³))).
//!
//! Capped logits: c · tanh(x / c) (Gemma 2, 2024, §2), with a relative error of at most 6e-7.
//!
//! Gradients take the place of what forward was given, so that a layer needs no memory for them:
//!
//! ```text
//! d_gate = d_h · up · act′(gate)      d_up = d_h · act(gate)      and h = act(gate) · up once more
//! ```
//!
//! The gate's relative error is at most 1e-6, plus, for GELU of strongly negative g, that of its
//! argument: 6e-8 · |z| with z what the tanh takes.

use super::{finite_positive, same_length};
use crate::error::Result;
use crate::simd::{Level, nn};

/// gate ← silu(gate) · up.
///
/// # Errors
/// [`crate::Error::LengthMismatch`] if the lengths differ.
pub fn silu_gate(gate: &mut [f32], up: &[f32], level: Level) -> Result<()> {
    same_length("gate and up", gate.len(), up.len())?;
    nn::silu_gate(level, gate, up);
    Ok(())
}

/// gate ← gelu(gate) · up, in the tanh form.
///
/// # Errors
/// [`crate::Error::LengthMismatch`] if the lengths differ.
pub fn gelu_gate(gate: &mut [f32], up: &[f32], level: Level) -> Result<()> {
    same_length("gate and up", gate.len(), up.len())?;
    nn::gelu_gate(level, gate, up);
    Ok(())
}

/// What forward was given and the gradient of its results; each takes another meaning.
#[derive(Debug)]
pub struct GateGradient<'a> {
    /// In: the gate. Out: its gradient.
    pub gate: &'a mut [f32],
    /// In: what it multiplies. Out: its gradient.
    pub up: &'a mut [f32],
    /// In: the gradient of the results. Out: the results.
    pub d_h: &'a mut [f32],
}

impl<'a> GateGradient<'a> {
    fn checked(self) -> Result<[&'a mut [f32]; 3]> {
        let GateGradient { gate, up, d_h } = self;
        same_length("gate and up", gate.len(), up.len())?;
        same_length("gradient of gated numbers", gate.len(), d_h.len())?;
        Ok([gate, up, d_h])
    }
}

/// The gradients of [`silu_gate`], in place.
///
/// # Errors
/// [`crate::Error::LengthMismatch`] if the lengths differ. Nothing is written then.
pub fn silu_gate_gradient(of: GateGradient<'_>, level: Level) -> Result<()> {
    let [gate, up, d_h] = of.checked()?;
    nn::silu_gate_gradient(level, gate, up, d_h);
    Ok(())
}

/// The gradients of [`gelu_gate`], in place.
///
/// # Errors
/// Those of [`silu_gate_gradient`].
pub fn gelu_gate_gradient(of: GateGradient<'_>, level: Level) -> Result<()> {
    let [gate, up, d_h] = of.checked()?;
    nn::gelu_gate_gradient(level, gate, up, d_h);
    Ok(())
}

/// x ← cap · tanh(x / cap), element by element.
///
/// # Errors
/// [`crate::Error::InvalidParameter`] unless the cap is finite and above 0.
pub fn softcap(x: &mut [f32], cap: f32, level: Level) -> Result<()> {
    finite_positive("cap of logits", cap)?;
    nn::softcap(level, x, cap);
    Ok(())
}

/// x ← x + y: the residual sum.
///
/// # Errors
/// [`crate::Error::LengthMismatch`] if the lengths differ.
pub fn add(x: &mut [f32], y: &[f32], level: Level) -> Result<()> {
    same_length("residual sum", x.len(), y.len())?;
    nn::add(level, x, y);
    Ok(())
}
