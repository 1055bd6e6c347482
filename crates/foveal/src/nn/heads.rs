//! What is done to each head's vector before and after a state: length 1, and a gated norm.
//!
//! ```text
//! length 1      y = r x                   r = 1 / √(Σ x² + ε)        dx = r dy − r³ ⟨x, dy⟩ x
//! gate after    y = RMSNorm(x) silu(g)                               (RetNet, GLA, Gated DeltaNet)
//! gate before   y = RMSNorm(x silu(g))                               (Mamba-2)
//! ```
//!
//! A row is one head of one token, so that a norm's group is a head. Yang et al. 2024, arXiv:2412.06464, section 3.4; Dao and
//! Gu 2024, arXiv:2405.21060, section 7.

use super::norm::{
    NormBackward, NormGradients, RmsNorm, rms_norm, rms_norm_backward, rms_norm_in_place,
};
use super::same_length;
use crate::error::{Error, Result};
use crate::gradient::Gradient;
use crate::simd::row::{blend, dot};
use crate::simd::{Level, gate, nn, token};
use crate::workspace::Workspace;

/// Makes every row of `width` numbers as long as 1, but for ε.
///
/// # Errors
/// [`Error::InvalidParameter`] unless ε is finite and not negative; [`Error::LengthMismatch`] unless rows are whole.
pub fn l2_norm(rows: &mut [f32], width: usize, epsilon: f32, level: Level) -> Result<()> {
    check(rows.len(), width, epsilon)?;
    for row in rows.chunks_exact_mut(width.max(1)) {
        token::scale(level, 1.0 / (nn::sum_squares(level, row) + epsilon).sqrt(), row);
    }
    Ok(())
}

/// The gradient of [`l2_norm`]: `d`, that of its results, becomes that of the rows `x` it was given.
///
/// # Errors
/// Those of [`l2_norm`].
pub fn l2_norm_backward(
    x: &[f32],
    width: usize,
    epsilon: f32,
    d: &mut [f32],
    level: Level,
) -> Result<()> {
    check(x.len(), width, epsilon)?;
    same_length("gradient of rows of length 1", x.len(), d.len())?;
    for (x, d) in x.chunks_exact(width.max(1)).zip(d.chunks_exact_mut(width.max(1))) {
        let r = 1.0 / (nn::sum_squares(level, x) + epsilon).sqrt();
        // r x first: r³ alone may overflow.
        let along = r * dot(level, x, d);
        blend(level, d, r, x, -(r * r) * along);
    }
    Ok(())
}

fn check(len: usize, width: usize, epsilon: f32) -> Result<()> {
    if !(0.0..f32::INFINITY).contains(&epsilon) {
        let (what, expected) = ("epsilon of rows of length 1", "a finite number ≥ 0");
        return Err(Error::InvalidParameter { what, expected, got: epsilon.to_string() });
    }
    let whole = len.checked_div(width).map_or(0, |rows| rows * width);
    same_length("whole rows of heads", whole, len)
}

/// Where the gate stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GateOrder {
    /// What is normalised is gated.
    After,
    /// What is gated is normalised.
    Before,
}

/// An RMSNorm of every head with a gate; the weight is shared by the heads.
#[derive(Debug, Clone, Copy)]
pub struct GatedNorm<'a> {
    /// The norm.
    pub norm: RmsNorm<'a>,
    /// Where the gate stands.
    pub order: GateOrder,
}

/// What was normalised and gated, `[rows, D]` each, and the gradient of the results.
#[derive(Debug, Clone, Copy)]
pub struct GatedNormBackward<'a> {
    /// What was normalised.
    pub x: &'a [f32],
    /// Gates, before SiLU.
    pub gate: &'a [f32],
    /// The gradient of the results.
    pub d_y: &'a [f32],
}

/// Where the gradients of a gated norm go.
#[derive(Debug)]
pub struct GatedNormGradients<'a> {
    /// Of what was normalised, `[rows, D]`; overwritten.
    pub d_x: &'a mut [f32],
    /// Of the gates, `[rows, D]`; overwritten.
    pub d_gate: &'a mut [f32],
    /// Of the norm's weight, `[D]`.
    pub d_weight: Gradient<&'a mut [f32]>,
}

/// Normalises and gates rows `[rows, D]` into `y` of the same length.
///
/// # Errors
/// [`Error::LengthMismatch`] for other lengths of gates or results, or rows that are not whole.
pub fn gated_norm(
    norm: GatedNorm<'_>,
    x: &[f32],
    gate: &[f32],
    y: &mut [f32],
    level: Level,
) -> Result<()> {
    same_length("gates of normalised rows", x.len(), gate.len())?;
    same_length("normalised rows", x.len(), y.len())?;
    match norm.order {
        GateOrder::After => {
            rms_norm(norm.norm, x, y, level)?;
            gate::multiply_silu(level, y, gate);
        }
        GateOrder::Before => {
            check(x.len(), norm.norm.weight.len(), 0.0)?;
            y.copy_from_slice(x);
            gate::multiply_silu(level, y, gate);
            rms_norm_in_place(norm.norm, y, level)?;
        }
    }
    Ok(())
}

/// Rows whose gradients are made at a time: as many as norms sum up at a time.
const BLOCK: usize = 64;

/// The gradients of [`gated_norm`]. Allocates nothing but a workspace that has to grow.
///
/// # Errors
/// [`Error::LengthMismatch`] if lengths do not fit. Nothing is written then.
pub fn gated_norm_backward(
    norm: GatedNorm<'_>,
    rows: GatedNormBackward<'_>,
    gradients: GatedNormGradients<'_>,
    workspace: &mut Workspace,
    level: Level,
) -> Result<()> {
    let GatedNormBackward { x, gate, d_y } = rows;
    let GatedNormGradients { d_x, d_gate, d_weight } = gradients;
    let width = norm.norm.weight.len();
    for (what, expected, got) in [
        ("gates of normalised rows", x.len(), gate.len()),
        ("gradient of normalised rows", x.len(), d_y.len()),
        ("gradient of rows to normalise", x.len(), d_x.len()),
        ("gradient of gates", x.len(), d_gate.len()),
        ("gradient of a norm's weight", width, d_weight.place().map_or(width, |x| x.len())),
    ] {
        same_length(what, expected, got)?;
    }
    check(x.len(), width, 0.0)?;
    workspace.reserve(4 * BLOCK * width);
    let scratch = workspace.floats(BLOCK * width)?;
    let mut d_weight = super::cleared(d_weight);
    let numbers = (BLOCK * width).max(1);
    let blocks = d_x.chunks_mut(numbers).zip(d_gate.chunks_mut(numbers)).enumerate();
    for (n, (d_x, d_gate)) in blocks {
        let of = |all: &'_ [f32]| n * numbers..all.len().min((n + 1) * numbers);
        let (x, gate, d_y) = (&x[of(x)], &gate[of(gate)], &d_y[of(d_y)]);
        let scratch = &mut scratch[..x.len()];
        let d_weight = d_weight.as_deref_mut().map_or(Gradient::Skip, Gradient::Add);
        let block = Block { norm: norm.norm, x, gate, d_y, level };
        match norm.order {
            GateOrder::After => block.after(d_x, d_gate, d_weight, scratch)?,
            GateOrder::Before => block.before(d_x, d_gate, d_weight, scratch)?,
        }
    }
    Ok(())
}

/// Some rows.
struct Block<'a> {
    norm: RmsNorm<'a>,
    x: &'a [f32],
    gate: &'a [f32],
    d_y: &'a [f32],
    level: Level,
}

impl Block<'_> {
    fn after(
        &self,
        d_x: &mut [f32],
        d_gate: &mut [f32],
        d_weight: Gradient<&mut [f32]>,
        scratch: &mut [f32],
    ) -> Result<()> {
        rms_norm(self.norm, self.x, d_gate, self.level)?;
        scratch.copy_from_slice(self.d_y);
        gate::silu_backward(self.level, self.gate, d_gate, scratch);
        let rows = NormBackward { x: self.x, d_y: scratch };
        let gradients =
            NormGradients { d_x: Gradient::Write(d_x), d_weight, d_bias: Gradient::Skip };
        rms_norm_backward(self.norm, rows, gradients, self.level)
    }

    fn before(
        &self,
        d_x: &mut [f32],
        d_gate: &mut [f32],
        d_weight: Gradient<&mut [f32]>,
        scratch: &mut [f32],
    ) -> Result<()> {
        scratch.copy_from_slice(self.x);
        gate::multiply_silu(self.level, scratch, self.gate);
        let rows = NormBackward { x: scratch, d_y: self.d_y };
        let d_x_place = Gradient::Write(&mut *d_x);
        let gradients = NormGradients { d_x: d_x_place, d_weight, d_bias: Gradient::Skip };
        rms_norm_backward(self.norm, rows, gradients, self.level)?;
        d_gate.copy_from_slice(self.x);
        gate::silu_backward(self.level, self.gate, d_gate, d_x);
        Ok(())
    }
}
