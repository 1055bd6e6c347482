//! The other parts of a transformer layer, on plain slices of f32: normalisation, gates, residual
//! sums, and the softmax of a row of logits.
//!
//! Every operator works in place or into a given slice and allocates nothing; a row's bits do not
//! depend on the rows beside it. Embeddings are rows of a stored matrix: [`crate::projection::embed`].

mod activation;
mod norm;
mod softmax;

pub use activation::{add, gelu_gate, silu_gate, softcap};
pub use norm::{
    LayerNorm, NormBackward, NormGradients, RmsNorm, layer_norm, layer_norm_backward, rms_norm,
    rms_norm_backward, rms_norm_in_place,
};
pub use softmax::{log_softmax, softmax};

use crate::error::{Error, Result};

fn same_length(what: &'static str, expected: usize, got: usize) -> Result<()> {
    if expected == got { Ok(()) } else { Err(Error::LengthMismatch { what, expected, got }) }
}
