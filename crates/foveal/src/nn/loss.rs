//! Cross-entropy of rows of logits, and its gradient in their place: no probability is stored besides.
//!
//! ```text
//! y = c tanh(z / c)                                            capped logits, where there is a cap; else y = z
//! loss = Σ_r log Σ_v e^y_v − (1 − ε) y_t − ε/V Σ_v y_v         t: the row's target; ε: label smoothing
//! dz_v = f (e^(y_v − lse) − (1 − ε) [v = t] − ε/V) (1 − (y_v / c)²)
//! ```
//!
//! Each row costs one exponential a logit without gradient, two with it. Sums run in f64 over blocks of 1024. Label smoothing:
//! Szegedy et al. 2016, §7; Vaswani et al. 2017, §5.4. The cap: Gemma 2, 2024, §2.

use super::softmax::statistics;
use super::{finite_positive, same_length};
use crate::cpu::Cpu;
use crate::error::{Error, Result};
use crate::simd::norm::sum;
use crate::simd::{Level, loss, nn};

/// The target of a row that has none: it adds nothing to the loss, and its gradient is zero.
pub const IGNORED: u32 = u32::MAX;

/// What is computed of rows of logits.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct CrossEntropy {
    /// ε: the part of a target's weight that all tokens share; 0 to 1, without 1.
    pub smoothing: f32,
    /// c, or `None` where logits are as they come.
    pub cap: Option<f32>,
    /// f: what gradients are multiplied by; `None` where none are wanted, and logits mean nothing afterwards.
    pub gradient: Option<f32>,
}

/// Rows that a thread takes at a time.
const ROWS: usize = 16;

/// The sum of the losses of rows `logits`, `[targets, V]`, whose gradient takes the place of the logits.
///
/// The same numbers give the same bits for every number of threads. A row whose logits are not finite gives a loss and a
/// gradient of NaN.
///
/// # Errors
/// [`Error::LengthMismatch`] unless logits are whole rows, one a target; [`Error::OutOfRange`] for a target that is no
/// token; [`Error::InvalidParameter`] for a smoothing outside 0 to 1 and a cap that is not above 0. Nothing is written
/// then.
///
/// ```
/// use foveal::Cpu;
/// use foveal::nn::{CrossEntropy, IGNORED, cross_entropy};
///
/// let mut logits = [0.0, 0.0, 5.0, -5.0];
/// let wanted = CrossEntropy { gradient: Some(1.0), ..CrossEntropy::default() };
/// let loss = cross_entropy(wanted, &mut logits, &[1, IGNORED], Cpu::detect()?)?;
/// assert!((loss - 2f64.ln()).abs() < 1e-6);
/// assert_eq!(logits, [0.5, -0.5, 0.0, 0.0]);
/// # Ok::<(), foveal::Error>(())
/// ```
pub fn cross_entropy(
    wanted: CrossEntropy,
    logits: &mut [f32],
    targets: &[u32],
    cpu: Cpu,
) -> Result<f64> {
    let vocab = logits.len() / targets.len().max(1);
    same_length("logits of all targets", vocab * targets.len(), logits.len())?;
    check(wanted, targets, vocab)?;
    if logits.is_empty() {
        return Ok(0.0);
    }
    let mut losses = vec![0.0; targets.len()];
    let rows =
        logits.chunks_mut(ROWS * vocab).zip(targets.chunks(ROWS)).zip(losses.chunks_mut(ROWS));
    cpu.for_each(rows, |((logits, targets), losses)| {
        let rows = logits.chunks_exact_mut(vocab).zip(targets).zip(losses);
        rows.for_each(|((row, &target), loss)| *loss = wanted.row(row, target, cpu.level));
    });
    Ok(losses.iter().sum())
}

fn check(wanted: CrossEntropy, targets: &[u32], vocab: usize) -> Result<()> {
    let beyond = |&&target: &&u32| target != IGNORED && target as usize >= vocab;
    if let Some(&found) = targets.iter().find(beyond) {
        return Err(Error::OutOfRange { what: "target", got: found as usize, limit: vocab });
    }
    if !(0.0..1.0).contains(&wanted.smoothing) {
        let (what, expected) = ("label smoothing", "0 to 1, without 1");
        let got = wanted.smoothing.to_string();
        return Err(Error::InvalidParameter { what, expected, got });
    }
    wanted.cap.map_or(Ok(()), |cap| finite_positive("cap of logits", cap))
}

impl CrossEntropy {
    /// The loss of one row, whose gradient takes its place.
    fn row(&self, row: &mut [f32], target: u32, level: Level) -> f64 {
        if target == IGNORED {
            row.fill(0.0);
            return 0.0;
        }
        if let Some(cap) = self.cap {
            nn::softcap(level, row, cap);
        }
        let Some((largest, total)) = statistics(row, level) else {
            row.fill(f32::NAN);
            return f64::NAN;
        };
        let (vocab, own) = (row.len() as f32, row[target as usize]);
        let log_sum = f64::from(largest) + total.ln();
        let shared = match self.smoothing > 0.0 {
            true => f64::from(self.smoothing) * f64::from(sum(level, row)) / f64::from(vocab),
            false => 0.0,
        };
        let kept = 1.0 - self.smoothing;
        if let Some(factor) = self.gradient {
            let inverse_cap = self.cap.map_or(0.0, |cap| 1.0 / cap);
            let slope = 1.0 - (own * inverse_cap) * (own * inverse_cap);
            let gradient = loss::Gradient {
                largest,
                inverse: (1.0 / total) as f32,
                share: self.smoothing / vocab,
                factor,
                inverse_cap,
            };
            loss::gradient(level, row, gradient);
            row[target as usize] -= kept * factor * slope;
        }
        log_sum - f64::from(kept) * f64::from(own) - shared
    }
}
