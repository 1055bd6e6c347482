//! Normalisation of every row of D numbers, forward and backward.
//!
//! ```text
//! RMSNorm      y = x̂ w          x̂ = x / √(⟨x²⟩ + ε)
//! LayerNorm    y = x̂ w + b      x̂ = (x − ⟨x⟩) / √(⟨(x − ⟨x⟩)²⟩ + ε)
//! ```
//!
//! ⟨·⟩ is the mean over the row. Each costs a few operations a number and reads its row two to five times, out of
//! the nearest cache; gradients need the row itself and nothing that forward would have to keep.
//!
//! Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019; Ba, Kiros and Hinton, "Layer Normalization",
//! 2016. Gemma's weights are 1 + w: GGUF files hold the sum, and the gradient for it is the gradient for w.

use super::{cleared, same_length};
use crate::error::{Error, Result};
use crate::gradient::Gradient;
use crate::simd::norm::{self, Moments, RowGradient};
use crate::simd::{Level, nn};
use crate::tensor::Rows;

/// The parameters of an RMSNorm.
#[derive(Debug, Clone, Copy)]
pub struct RmsNorm<'a> {
    /// One factor for each of a row's D numbers.
    pub weight: &'a [f32],
    /// ε, added to the mean of squares.
    pub epsilon: f32,
}

/// The parameters of a LayerNorm.
#[derive(Debug, Clone, Copy)]
pub struct LayerNorm<'a> {
    /// One factor for each of a row's D numbers.
    pub weight: &'a [f32],
    /// One addend for each of them, or none.
    pub bias: Option<&'a [f32]>,
    /// ε, added to the variance.
    pub epsilon: f32,
}

/// Rows that were normalised, and the gradient that comes back for the results.
#[derive(Debug, Clone, Copy)]
pub struct NormBackward<'a> {
    /// What was normalised, `[rows, D]`.
    pub x: &'a [f32],
    /// The gradient of the results, `[rows, D]`.
    pub d_y: &'a [f32],
}

/// Where the gradients of a norm go.
#[derive(Debug, Default)]
pub struct NormGradients<'a> {
    /// Of the rows, `[rows, D]`.
    pub d_x: Gradient<&'a mut [f32]>,
    /// Of the weights, `[D]`.
    pub d_weight: Gradient<&'a mut [f32]>,
    /// Of the bias, `[D]`; [`Gradient::Skip`] for a norm without one.
    pub d_bias: Gradient<&'a mut [f32]>,
}

/// Normalises the rows of `x`, `[rows, D]`, into `y` of the same length.
///
/// # Errors
/// [`Error::LengthMismatch`] if `y` has another length, or it is not a whole number of rows.
pub fn rms_norm(norm: RmsNorm<'_>, x: &[f32], y: &mut [f32], level: Level) -> Result<()> {
    same_length("normalised rows", x.len(), y.len())?;
    check_rows(norm.weight.len(), x.len())?;
    y.copy_from_slice(x);
    rms_norm_in_place(norm, y, level)
}

/// [`rms_norm`] with the rows themselves as the result.
///
/// # Errors
/// [`Error::LengthMismatch`] if `rows` is not a whole number of rows.
pub fn rms_norm_in_place(norm: RmsNorm<'_>, rows: &mut [f32], level: Level) -> Result<()> {
    let width = norm.weight.len();
    check_rows(width, rows.len())?;
    for row in rows.chunks_exact_mut(width.max(1)) {
        let factor = root_mean_square(row, norm.epsilon, level).factor;
        nn::scale_by(level, row, factor, norm.weight);
    }
    Ok(())
}

/// The gradients of [`rms_norm`].
///
/// # Errors
/// [`Error::LengthMismatch`] if lengths do not fit each other; [`Error::InvalidParameter`] if the gradient of a
/// bias is asked for. Nothing has been written then.
pub fn rms_norm_backward(
    norm: RmsNorm<'_>,
    rows: NormBackward<'_>,
    gradients: NormGradients<'_>,
    level: Level,
) -> Result<()> {
    let RmsNorm { weight, epsilon } = norm;
    check_gradients(weight.len(), &rows, &gradients)?;
    if gradients.d_bias.place().is_some() {
        return Err(no_bias("RMSNorm"));
    }
    let moments = |row: &[f32]| root_mean_square(row, epsilon, level);
    Backward { weight, centred: false, level }.run(rows, gradients, moments)
}

/// Normalises the rows of `x`, `[rows, D]`, into `y` of the same length.
///
/// # Errors
/// [`Error::LengthMismatch`] if `y` or the bias has another length, or `x` is not a whole number of rows.
pub fn layer_norm(norm: LayerNorm<'_>, x: &[f32], y: &mut [f32], level: Level) -> Result<()> {
    let LayerNorm { weight, bias, epsilon } = norm;
    same_length("normalised rows", x.len(), y.len())?;
    check_rows(weight.len(), x.len())?;
    same_length("bias of a norm", weight.len(), bias.map_or(weight.len(), <[f32]>::len))?;
    y.copy_from_slice(x);
    for row in y.chunks_exact_mut(weight.len().max(1)) {
        let by = mean_and_deviation(row, epsilon, level);
        norm::normalize(level, row, by, weight, bias);
    }
    Ok(())
}

/// The gradients of [`layer_norm`].
///
/// # Errors
/// [`Error::LengthMismatch`] if lengths do not fit each other; [`Error::InvalidParameter`] if the gradient of a
/// bias is asked for that the norm does not have. Nothing has been written then.
pub fn layer_norm_backward(
    norm: LayerNorm<'_>,
    rows: NormBackward<'_>,
    gradients: NormGradients<'_>,
    level: Level,
) -> Result<()> {
    let LayerNorm { weight, bias, epsilon } = norm;
    check_gradients(weight.len(), &rows, &gradients)?;
    if bias.is_none() && gradients.d_bias.place().is_some() {
        return Err(no_bias("LayerNorm"));
    }
    let moments = |row: &[f32]| mean_and_deviation(row, epsilon, level);
    Backward { weight, centred: true, level }.run(rows, gradients, moments)
}

fn root_mean_square(row: &[f32], epsilon: f32, level: Level) -> Moments {
    let mean = nn::sum_squares(level, row) / row.len() as f32;
    Moments { mean: 0.0, factor: 1.0 / (mean + epsilon).sqrt() }
}

fn mean_and_deviation(row: &[f32], epsilon: f32, level: Level) -> Moments {
    let mean = norm::sum(level, row) / row.len() as f32;
    let variance = norm::sum_squares_around(level, row, mean) / row.len() as f32;
    Moments { mean, factor: 1.0 / (variance + epsilon).sqrt() }
}

/// Rows whose moments are kept at a time: sums over rows start anew for each such block.
const BLOCK: usize = 64;

#[derive(Clone, Copy)]
struct Backward<'a> {
    weight: &'a [f32],
    centred: bool,
    level: Level,
}

impl Backward<'_> {
    fn run(
        &self,
        rows: NormBackward<'_>,
        gradients: NormGradients<'_>,
        moments: impl Fn(&[f32]) -> Moments,
    ) -> Result<()> {
        let NormGradients { d_x, d_weight, d_bias } = gradients;
        let (mut d_x, mut d_weight, mut d_bias) =
            (d_x.into_place(), cleared(d_weight), cleared(d_bias));
        let (Backward { weight, centred, level }, width) = (*self, self.weight.len());
        let blocks = rows.x.chunks(BLOCK * width.max(1)).zip(rows.d_y.chunks(BLOCK * width.max(1)));
        for (block, (x, d_y)) in blocks.enumerate() {
            let count = x.len() / width;
            let mut by = [Moments::default(); BLOCK];
            for (by, x) in by.iter_mut().zip(x.chunks_exact(width)) {
                *by = moments(x);
            }
            if let Some((d_x, add)) = &mut d_x {
                let d_x = d_x[block * BLOCK * width..].chunks_exact_mut(width);
                let rows = x.chunks_exact(width).zip(d_y.chunks_exact(width));
                for (((x, d_y), d_x), &by) in rows.zip(d_x).zip(&by) {
                    let row = RowGradient { x, d_y, weight, by };
                    norm::input_gradient(level, row, centred, d_x, *add);
                }
            }
            let (x, d_y) =
                (Rows::new(x, width, count, width)?, Rows::new(d_y, width, count, width)?);
            if let Some(d_weight) = &mut d_weight {
                norm::add_weight_gradient(level, x, d_y, &by[..count], d_weight);
            }
            if let Some(d_bias) = &mut d_bias {
                norm::add_column_sums(level, d_y, d_bias);
            }
        }
        Ok(())
    }
}

fn check_gradients(
    width: usize,
    rows: &NormBackward<'_>,
    gradients: &NormGradients<'_>,
) -> Result<()> {
    check_rows(width, rows.x.len())?;
    same_length("gradient of normalised rows", rows.x.len(), rows.d_y.len())?;
    for (what, expected, place) in [
        ("gradient of rows to normalise", rows.x.len(), &gradients.d_x),
        ("gradient of a norm's weight", width, &gradients.d_weight),
        ("gradient of a norm's bias", width, &gradients.d_bias),
    ] {
        same_length(what, expected, place.place().map_or(expected, |place| place.len()))?;
    }
    Ok(())
}

fn no_bias(norm: &str) -> Error {
    let (what, expected) = ("gradient of a norm's bias", "Gradient::Skip: the norm has no bias");
    Error::InvalidParameter { what, expected, got: format!("a place for it, for a {norm}") }
}

fn check_rows(width: usize, got: usize) -> Result<()> {
    if got.is_multiple_of(width) {
        return Ok(());
    }
    let expected = got.checked_div(width).map_or(0, |rows| rows * width);
    Err(Error::LengthMismatch { what: "whole rows to normalise", expected, got })
}
