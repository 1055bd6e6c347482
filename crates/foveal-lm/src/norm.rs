//! Root-mean-square norms with their weights: `y = x / √(mean(x²) + ε) · w` (Zhang and Sennrich 2019).

use foveal::Cpu;
use foveal::nn::{RmsNorm, rms_norm, rms_norm_in_place};

use crate::Error;

/// The weights of a norm over rows of `weight.len()` numbers.
#[derive(Clone, Debug)]
pub(crate) struct Norm {
    weight: Vec<f32>,
    epsilon: f32,
}

impl Norm {
    pub(crate) fn new(weight: Vec<f32>, epsilon: f32) -> Norm {
        Norm { weight, epsilon }
    }

    pub(crate) fn into_weight(self) -> Vec<f32> {
        self.weight
    }

    fn parameters(&self) -> RmsNorm<'_> {
        RmsNorm { weight: &self.weight, epsilon: self.epsilon }
    }

    /// Normalises each row of `x` into `y`.
    pub(crate) fn forward(&self, x: &[f32], y: &mut [f32], cpu: Cpu) -> Result<(), Error> {
        Ok(rms_norm(self.parameters(), x, y, cpu.level)?)
    }

    /// Normalises each row of `x` in place.
    pub(crate) fn forward_in_place(&self, x: &mut [f32], cpu: Cpu) -> Result<(), Error> {
        Ok(rms_norm_in_place(self.parameters(), x, cpu.level)?)
    }
}
