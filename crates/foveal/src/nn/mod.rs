//! The other parts of a transformer layer, on plain slices of f32: normalisation, gates, short convolutions, residual
//! sums, the softmax of a row of logits, and cross-entropy; and the step of an optimizer.
//!
//! Every operator works in place or into a given slice and allocates nothing (but a number a row for a loss); a row's bits do not
//! depend on the rows beside it. Embeddings are rows of a stored matrix: [`crate::projection::embed`].

mod activation;
mod conv;
mod dropout;
mod gate;
mod heads;
mod loss;
mod norm;
mod optimizer;
mod softmax;

pub use activation::{
    GateGradient, add, gelu_gate, gelu_gate_gradient, silu_gate, silu_gate_gradient, softcap,
};
pub use conv::{ConvBackward, ConvGradients, ShortConv, short_conv, short_conv_backward};
pub use dropout::dropout;
pub use gate::{
    DecayGate, DecayGateGradients, decay_gate, decay_gate_backward, log_sigmoid,
    log_sigmoid_backward, sigmoid, sigmoid_backward,
};
pub use heads::{
    GateOrder, GatedNorm, GatedNormBackward, GatedNormGradients, gated_norm, gated_norm_backward,
    l2_norm, l2_norm_backward,
};
pub use loss::{CrossEntropy, IGNORED, cross_entropy};
pub use norm::{
    LayerNorm, NormBackward, NormGradients, RmsNorm, layer_norm, layer_norm_backward, rms_norm,
    rms_norm_backward, rms_norm_in_place,
};
pub use optimizer::{AdamW, adamw, sum_of_squares};
pub use softmax::{log_softmax, softmax};

use crate::error::{Error, Result};
use crate::gradient::Gradient;

fn same_length(what: &'static str, expected: usize, got: usize) -> Result<()> {
    if expected == got { Ok(()) } else { Err(Error::LengthMismatch { what, expected, got }) }
}

fn finite_positive(what: &'static str, x: f32) -> Result<()> {
    let (expected, got) = ("a finite number above 0", x.to_string());
    let fits = x.is_finite() && x > 0.0;
    if fits { Ok(()) } else { Err(Error::InvalidParameter { what, expected, got }) }
}

/// A place to add to.
fn cleared(gradient: Gradient<&mut [f32]>) -> Option<&mut [f32]> {
    let (place, add) = gradient.into_place()?;
    if !add {
        place.fill(0.0);
    }
    Some(place)
}
