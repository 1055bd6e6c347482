//! A step of AdamW, and the length of a gradient.
//!
//! ```text
//! m ← β₁ m + (1 − β₁) g        v ← β₂ v + (1 − β₂) g²        g: the gradient times a factor
//! p ← (1 − η λ) p − η m / (1 − β₁ᵗ) / (√v / √(1 − β₂ᵗ) + ε)
//! ```
//!
//! η is the learning rate, λ the weight decay, t the number of the step, from 1. One pass reads and writes each number
//! once: 28 bytes a parameter. Elements do not depend on each other, and sums are cut at fixed places, so bits do not
//! depend on threads.
//!
//! Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019; Kingma and Ba, "Adam", 2015.

use super::same_length;
use crate::cpu::Cpu;
use crate::error::{Error, Result};
use crate::parallel::for_each_item;
use crate::simd::{nn, optimizer};

/// Numbers that a thread takes at a time.
const PART: usize = 1 << 15;
/// Sums of a sum.
const SUMS: usize = 64;
/// Numbers that are summed in f32 before f64 takes them.
const BLOCK: usize = 4096;

/// What a step of AdamW does.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// The number of the step, from 1.
    pub step: u64,
    /// η.
    pub learning_rate: f64,
    /// β₁ and β₂, at least 0 and below 1.
    pub betas: [f64; 2],
    /// ε, above 0.
    pub epsilon: f64,
    /// λ.
    pub weight_decay: f64,
    /// What gradients are multiplied by first: to clip them, or to take a mean.
    pub gradient_factor: f64,
}

impl AdamW {
    fn check(&self) -> Result<()> {
        let refuse = |what, expected, got: f64| {
            Err(Error::InvalidParameter { what, expected, got: got.to_string() })
        };
        if self.step == 0 {
            return refuse("the step of AdamW", "1 or more", 0.0);
        }
        if let Some(&beta) = self.betas.iter().find(|beta| !(0.0..1.0).contains(*beta)) {
            return refuse("a beta of AdamW", "at least 0 and below 1", beta);
        }
        if !(self.epsilon > 0.0 && self.epsilon.is_finite()) {
            return refuse("epsilon of AdamW", "a finite number above 0", self.epsilon);
        }
        let others = [self.learning_rate, self.weight_decay, self.gradient_factor];
        match others.into_iter().find(|x| !x.is_finite()) {
            Some(found) => refuse("a factor of AdamW", "a finite number", found),
            None => Ok(()),
        }
    }

    fn factors(&self) -> optimizer::Factors {
        let left = self.betas.map(|beta| 1.0 - beta.powf(self.step as f64));
        optimizer::Factors {
            gradient: self.gradient_factor as f32,
            fresh: self.betas.map(|beta| (1.0 - beta) as f32),
            keep: (1.0 - self.learning_rate * self.weight_decay) as f32,
            rate: (-self.learning_rate / left[0]) as f32,
            root: (1.0 / left[1].sqrt()) as f32,
            epsilon: self.epsilon as f32,
        }
    }
}

/// One step, in place. `moments` are m and v, zeros before the first step.
///
/// # Errors
/// [`Error::LengthMismatch`] if the lengths differ, [`Error::InvalidParameter`] for a step 0, betas outside 0…1, and what
/// is not finite.
pub fn adamw(
    step: AdamW,
    parameters: &mut [f32],
    gradients: &[f32],
    moments: [&mut [f32]; 2],
    cpu: Cpu,
) -> Result<()> {
    step.check()?;
    let [first, second] = moments;
    for got in [gradients.len(), first.len(), second.len()] {
        same_length("parameters, gradients and moments", parameters.len(), got)?;
    }
    let factors = step.factors();
    let moments = first.chunks_mut(PART).zip(second.chunks_mut(PART));
    let parts = parameters.chunks_mut(PART).zip(gradients.chunks(PART)).zip(moments);
    let threads = cpu.threads.count().min(parts.len());
    for_each_item(parts, (0..threads).map(|_| ()), |((p, g), (m, v)), ()| {
        optimizer::adamw(cpu.level, factors, p, g, m, v);
    });
    Ok(())
}

/// Σ x², with the same bits for any number of threads. Infinite where a square is beyond f32.
pub fn sum_of_squares(x: &[f32], cpu: Cpu) -> f64 {
    let part = x.len().div_ceil(SUMS).next_multiple_of(BLOCK).max(BLOCK);
    let mut sums = [0.0; SUMS];
    let parts = x.chunks(part).zip(sums.iter_mut());
    let threads = cpu.threads.count().min(parts.len());
    for_each_item(parts, (0..threads).map(|_| ()), |(x, sum), ()| {
        *sum = x.chunks(BLOCK).map(|x| f64::from(nn::sum_squares(cpu.level, x))).sum();
    });
    sums.iter().sum()
}
