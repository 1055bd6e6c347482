//! Gated activations, capped logits and the residual sum.
//!
//! Shazeer, "GLU Variants Improve Transformer", 2020: SwiGLU is silu(g) · u with
//! silu(g) = g / (1 + e^−g); GEGLU is gelu(g) · u, here with
//! gelu(g) = ½ g (1 + tanh(√(2/π) (g + 0.044715 g³))).
//!
//! Capped logits: c · tanh(x / c) (Gemma 2, 2024, §2), with a relative error of at most 6e-7.
//!
//! The gate's relative error is at most 1e-6, plus, for GELU of strongly negative g, that of its
//! argument: 6e-8 · |z| with z what the tanh takes.

use super::same_length;
use crate::error::{Error, Result};
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

/// x ← cap · tanh(x / cap), element by element.
///
/// # Errors
/// [`crate::Error::InvalidParameter`] unless the cap is finite and above 0.
pub fn softcap(x: &mut [f32], cap: f32, level: Level) -> Result<()> {
    if !(cap.is_finite() && cap > 0.0) {
        let (what, expected) = ("cap of logits", "a finite number above 0");
        return Err(Error::InvalidParameter { what, expected, got: cap.to_string() });
    }
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
