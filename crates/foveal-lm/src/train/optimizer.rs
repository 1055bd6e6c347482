//! AdamW over all parameters of a model: what each group gets, and the limit of a gradient's length.
//!
//! | group | learning rate | decay |
//! |---|---|---|
//! | matrices | η | λ |
//! | norms, biases, sinks, decays | η | 0 |
//! | gates of memories | its own | 0 |
//!
//! ```text
//! g ← g · min(1, c / ‖g‖)
//! ```
//!
//! ‖g‖ is the length over all parameters (Pascanu, Mikolov and Bengio 2013). The step itself is [`foveal::nn::adamw`].

use std::ops::Range;

use foveal::Cpu;
use foveal::nn::{AdamW, adamw, sum_of_squares};

use super::config::OptimizerSection;
use super::{Error, Group, Parameters};

/// The moments of all parameters.
#[derive(Clone, Debug, PartialEq)]
pub struct Optimizer {
    pub(super) first: Vec<f32>,
    pub(super) second: Vec<f32>,
    /// Neighbours of one group.
    runs: Vec<(Range<usize>, Group)>,
}

/// What a step is taken with.
#[derive(Clone, Copy, Debug)]
pub struct Move<'a> {
    /// The settings.
    pub settings: &'a OptimizerSection,
    /// The number of the step, from 1.
    pub step: u64,
    /// The share of the highest learning rates.
    pub share: f64,
    /// The length of the gradient.
    pub length: f64,
}

/// ‖g‖.
pub fn length(gradients: &[f32], cpu: Cpu) -> f64 {
    sum_of_squares(gradients, cpu).sqrt()
}

impl Optimizer {
    /// Nothing has moved yet. Allocates as much as the parameters take, twice.
    pub fn new(parameters: &Parameters) -> Optimizer {
        let mut runs: Vec<(Range<usize>, Group)> = vec![];
        for entry in parameters.entries() {
            match runs.last_mut() {
                Some((run, group)) if *group == entry.group && run.end == entry.range.start => {
                    run.end = entry.range.end;
                }
                _ => runs.push((entry.range.clone(), entry.group)),
            }
        }
        Optimizer { first: parameters.zeros(), second: parameters.zeros(), runs }
    }

    /// Moves `parameters` against `gradients`.
    ///
    /// # Errors
    ///
    /// [`Error::Model`] with what the kernel refuses.
    pub fn step(
        &mut self,
        by: &Move<'_>,
        parameters: &mut Parameters,
        gradients: &[f32],
        cpu: Cpu,
    ) -> Result<(), Error> {
        let settings = by.settings;
        let clip = settings.clip > 0.0 && by.length > settings.clip;
        let gradient_factor = if clip { settings.clip / by.length } else { 1.0 };
        let values = parameters.values_mut();
        for (run, group) in &self.runs {
            let (rate, weight_decay) = match group {
                Group::Matrix => (settings.learning_rate, settings.weight_decay),
                Group::Vector => (settings.learning_rate, 0.0),
                Group::Gate => (settings.gate_learning_rate(), 0.0),
            };
            let step = AdamW {
                step: by.step,
                learning_rate: by.share * rate,
                betas: settings.betas,
                epsilon: settings.epsilon,
                weight_decay,
                gradient_factor,
            };
            let moments = [&mut self.first[run.clone()], &mut self.second[run.clone()]];
            adamw(step, &mut values[run.clone()], &gradients[run.clone()], moments, cpu)?;
        }
        Ok(())
    }
}
