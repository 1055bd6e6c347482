//! Gated activations and the residual sum.
//!
//! Shazeer, "GLU Variants Improve Transformer", 2020: SwiGLU is silu(g) · u with
//! silu(g) = g / (1 + e^−g); GEGLU is gelu(g) · u, here with
//! gelu(g) = ½ g (1 + tanh(√(2/π) (g + 0.044715 g³))).
//!
//! The gate's relative error is at most 1e-6, plus, for GELU of strongly negative g, that of its
//! argument: 6e-8 · |z| with z what the tanh takes.

use super::same_length;
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

/// x ← x + y: the residual sum.
///
/// # Errors
/// [`crate::Error::LengthMismatch`] if the lengths differ.
pub fn add(x: &mut [f32], y: &[f32], level: Level) -> Result<()> {
    same_length("residual sum", x.len(), y.len())?;
    nn::add(level, x, y);
    Ok(())
}
