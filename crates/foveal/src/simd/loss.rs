//! Kernels of losses and of what training drops: gradients of logits in their place, random zeros.

use super::nn::{load, store};
use super::{Simd, dispatch, math};

/// What the gradient of a row of logits is made of.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Gradient {
    /// The largest logit.
    pub(crate) largest: f32,
    /// 1 / Σ e^(y − largest).
    pub(crate) inverse: f32,
    /// What is taken off each probability.
    pub(crate) share: f32,
    pub(crate) factor: f32,
    /// 1 / c, or 0 without a cap.
    pub(crate) inverse_cap: f32,
}

dispatch! {
    /// `y = factor · (e^(y − largest) · inverse − share) · (1 − (y · inverse_cap)²)`.
    pub(crate) fn gradient(y: &mut [f32], of: Gradient) = gradient_kernel
}

#[inline(always)]
fn gradient_kernel<S: Simd>(s: S, y: &mut [f32], of: Gradient) {
    let capped = of.inverse_cap != 0.0;
    let [largest, inverse, share, factor, inverse_cap] =
        [of.largest, of.inverse, of.share, of.factor, of.inverse_cap].map(|x| s.splat(x));
    for at in (0..y.len()).step_by(S::LANES) {
        let own = load(s, y, at);
        let probability = s.mul(math::exp(s, s.sub(own, largest)), inverse);
        let gradient = s.mul(s.sub(probability, share), factor);
        // Without a cap, a logit may be −∞, which times 0 is no number.
        let gradient = match capped {
            true => {
                let bent = s.mul(own, inverse_cap);
                s.mul(gradient, s.sub(s.splat(1.0), s.mul(bent, bent)))
            }
            false => gradient,
        };
        store(s, y, at, gradient);
    }
}
