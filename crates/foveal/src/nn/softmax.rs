//! Softmax and its logarithm over one row of logits, as sampling needs them.
//!
//! Both subtract the largest logit first; the sum runs in f64 over blocks of 1024. Logits of −∞ get
//! probability 0. If every logit is −∞, or one is NaN or +∞, the row is NaN.

use crate::simd::{Level, nn};

/// logits ← exp(logit) / Σ exp(logits). An empty row stays so.
///
/// The relative error of a probability is at most 1e-6 (those below 2⁻¹²⁶ of the largest are 0).
pub fn softmax(logits: &mut [f32], level: Level) {
    let Some((largest, sum)) = statistics(logits, level) else { return logits.fill(f32::NAN) };
    nn::exp_scaled(level, logits, largest, (1.0 / sum) as f32);
}

/// logits ← logit − log Σ exp(logits). An empty row stays so.
///
/// The absolute error is at most 5e-7 + 2⁻²³ · (largest magnitude of logits and results).
pub fn log_softmax(logits: &mut [f32], level: Level) {
    let Some((largest, sum)) = statistics(logits, level) else { return logits.fill(f32::NAN) };
    nn::shift_down(level, logits, largest);
    nn::shift_down(level, logits, sum.ln() as f32);
}

/// The largest logit, and the sum of exponentials relative to it; `None` if they are not finite.
pub(super) fn statistics(logits: &[f32], level: Level) -> Option<(f32, f64)> {
    let largest = nn::largest(level, logits);
    if !largest.is_finite() {
        return None;
    }
    let sum = nn::sum_exp(level, logits, largest);
    sum.is_finite().then_some((largest, sum))
}
