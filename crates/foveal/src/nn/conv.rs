//! Short causal convolutions along tokens, each channel for itself.
//!
//! ```text
//! u_t = Σ_{i<K} w_i ∘ x_{t−K+1+i} + b        y_t = u_t, or silu(u_t)        K = 2 … 8
//!
//! g_t = dy_t ∘ silu′(u_t)      dx_t = Σ_i w_i ∘ g_{t+K−1−i}      dw_i = Σ_t g_t ∘ x_{t−K+1+i}      db = Σ_t g_t
//! ```
//!
//! The state is the last K−1 inputs, zeros at first: a prompt, pieces of it and single tokens give the same bits. Cost: 2·K
//! operations a number. Before queries, keys and values in Mamba (Gu and Dao 2023, section 3.4), DeltaNet (Yang et al. 2024,
//! section 3.3) and Gated DeltaNet, with K = 4 and SiLU.

use super::same_length;
use crate::error::{Error, Result};
use crate::gradient::Gradient;
use crate::simd::Level;
use crate::simd::conv::{self, ConvolveBackward, Taps};
use std::ops::RangeInclusive;

/// The taps that a convolution may have.
const TAPS: RangeInclusive<usize> = 2..=8;

/// The parameters of a short convolution.
#[derive(Debug, Clone, Copy)]
pub struct ShortConv<'a> {
    /// w, `[K, channels]`: tap by tap, that of the oldest input first (the transpose of what a depthwise `Conv1d` holds).
    pub weight: &'a [f32],
    /// b, one number a channel, or none.
    pub bias: Option<&'a [f32]>,
    /// Channels.
    pub channels: usize,
    /// Whether SiLU follows.
    pub silu: bool,
}

/// What a convolution was given, and the gradient of its results.
#[derive(Debug, Clone, Copy)]
pub struct ConvBackward<'a> {
    /// Inputs, `[T, channels]`.
    pub x: &'a [f32],
    /// The state before them, `[K − 1, channels]`.
    pub initial: &'a [f32],
    /// The gradient of the results, `[T, channels]`.
    pub d_y: &'a [f32],
}

/// Where the gradients of a convolution go.
#[derive(Debug, Default)]
pub struct ConvGradients<'a> {
    /// Of the inputs, `[T, channels]`.
    pub d_x: Gradient<&'a mut [f32]>,
    /// Of the taps, `[K, channels]`.
    pub d_weight: Gradient<&'a mut [f32]>,
    /// Of the bias; [`Gradient::Skip`] for a convolution without one.
    pub d_bias: Gradient<&'a mut [f32]>,
}

impl<'a> ShortConv<'a> {
    /// Numbers of a state: the last K − 1 inputs, the oldest first.
    ///
    /// # Errors
    /// [`Error::InvalidParameter`] unless there are 2 to 8 taps; [`Error::LengthMismatch`] unless taps and bias have all
    /// channels.
    pub fn state_len(&self) -> Result<usize> {
        Ok(self.check()?.1 - self.channels)
    }

    /// The parameters as kernels take them, and how many numbers the taps are.
    fn check(&self) -> Result<(Taps<'a>, usize)> {
        let ShortConv { weight, bias, channels, silu } = *self;
        let kernel = weight.len() / channels.max(1);
        if channels == 0 || !TAPS.contains(&kernel) {
            return Err(Error::InvalidParameter {
                what: "taps of a short convolution",
                expected: "2 to 8 for each of one or more channels",
                got: format!("{} numbers for {channels} channels", weight.len()),
            });
        }
        same_length("taps of a short convolution", kernel * channels, weight.len())?;
        same_length("bias of a short convolution", channels, bias.map_or(channels, <[f32]>::len))?;
        Ok((Taps { weight, bias, channels, silu }, weight.len()))
    }

    fn check_rows(&self, what: &'static str, got: usize) -> Result<()> {
        same_length(what, got / self.channels * self.channels, got)
    }
}

/// The results `[T, channels]` of inputs `[T, channels]` that follow on `state`, which is carried on.
///
/// # Errors
/// Those of [`ShortConv::state_len`]; [`Error::LengthMismatch`] for rows or a state of other lengths. Nothing is written
/// then.
pub fn short_conv(
    conv: ShortConv<'_>,
    x: &[f32],
    state: &mut [f32],
    y: &mut [f32],
    level: Level,
) -> Result<()> {
    let (taps, numbers) = conv.check()?;
    conv.check_rows("whole rows to convolve", x.len())?;
    same_length("convolved rows", x.len(), y.len())?;
    same_length("state of a short convolution", numbers - conv.channels, state.len())?;
    conv::convolve(level, taps, x, state, y);
    Ok(())
}

/// The gradients of [`short_conv`]. `d_state` comes in as the gradient of the state after the tokens and goes out as that of
/// the state before them.
///
/// # Errors
/// Those of [`short_conv`]; [`Error::InvalidParameter`] if the gradient of a bias is asked for that there is not. Nothing is
/// written then.
pub fn short_conv_backward(
    conv: ShortConv<'_>,
    rows: ConvBackward<'_>,
    gradients: ConvGradients<'_>,
    d_state: &mut [f32],
    level: Level,
) -> Result<()> {
    let (taps, numbers) = conv.check()?;
    let ConvBackward { x, initial, d_y } = rows;
    let ConvGradients { d_x, d_weight, d_bias } = gradients;
    conv.check_rows("whole rows that were convolved", x.len())?;
    let state = numbers - conv.channels;
    let length =
        |place: &Gradient<&mut [f32]>, expected| place.place().map_or(expected, |p| p.len());
    for (what, expected, got) in [
        ("gradient of convolved rows", x.len(), d_y.len()),
        ("state of a short convolution", state, initial.len()),
        ("gradient of a convolution's state", state, d_state.len()),
        ("gradient of rows to convolve", x.len(), length(&d_x, x.len())),
        ("gradient of a convolution's taps", numbers, length(&d_weight, numbers)),
        ("gradient of a convolution's bias", conv.channels, length(&d_bias, conv.channels)),
    ] {
        same_length(what, expected, got)?;
    }
    if conv.bias.is_none() && d_bias.place().is_some() {
        let (what, expected) =
            ("gradient of a convolution's bias", "Gradient::Skip: it has no bias");
        return Err(Error::InvalidParameter { what, expected, got: "a place for it".into() });
    }
    let cleared = super::cleared;
    let (d_weight, d_bias) = (cleared(d_weight), cleared(d_bias));
    let d_x = d_x.into_place();
    conv::convolve_backward(
        level,
        taps,
        ConvolveBackward { x, initial, d_y, d_state, d_x, d_weight, d_bias },
    );
    Ok(())
}
