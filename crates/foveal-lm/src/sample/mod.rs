//! Choosing the next token from logits.
//!
//! The steps, in this order, each on what the step before it left over; they are those of llama.cpp's default chain:
//!
//! 1. **repeat penalty** `r`: the logit `x` of a token among the last [`repeat_window`](Sampling::repeat_window) becomes
//!    `x / r` if it is positive, else `x · r` (Keskar et al. 2019, arXiv:1909.05858).
//! 2. **top-k**: the `k` largest.
//! 3. **top-p**: the fewest of the most probable whose probabilities add up to `p` or more (Holtzman et al. 2020,
//!    arXiv:1904.09751).
//! 4. **min-p**: those with at least `min_p` times the probability of the most probable (arXiv:2407.01082).
//! 5. **temperature** `T`: a token is drawn with a probability proportional to `exp(x / T)`; 0 takes the first.
//!
//! Probabilities in steps 3 and 4 are those at temperature 1, renewed over what is left. Equal logits are ordered by
//! token, the lowest first. The same logits and seed give the same tokens on every machine: the generator is a counter
//! under SplitMix64's mixing function (Steele et al. 2014), and the exponential is this module's own.

mod candidates;
mod logprobs;

use std::collections::VecDeque;

use crate::Error;
use candidates::{Candidate, largest, probabilities};
use foveal::random::Random;

pub use logprobs::Logprobs;

/// How tokens are chosen. The default is meant for prose; [`Sampling::greedy`] takes the most probable token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Above 1 flattens, below 1 sharpens, 0 takes the most probable token.
    pub temperature: f32,
    /// How many of the most probable tokens are kept; 0 keeps all.
    pub top_k: usize,
    /// The share of probability that is kept, above 0; 1 keeps all.
    pub top_p: f32,
    /// The least share of the greatest probability that is kept, below 1; 0 keeps all.
    pub min_p: f32,
    /// What logits of recent tokens are divided by, above 0; 1 leaves them.
    pub repeat_penalty: f32,
    /// How many tokens count as recent, the prompt's included.
    pub repeat_window: usize,
    /// The beginning of the random numbers.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Sampling {
        Sampling {
            temperature: 0.8,
            top_k: 40,
            top_p: 0.95,
            min_p: 0.05,
            repeat_penalty: 1.0,
            repeat_window: 64,
            seed: 0,
        }
    }
}

impl Sampling {
    /// The most probable token each time, without a penalty.
    pub fn greedy() -> Sampling {
        Sampling { temperature: 0.0, ..Sampling::default() }
    }

    fn check(&self) -> Result<(), Error> {
        let checks = [
            ("temperature", self.temperature, self.temperature >= 0.0, "0 or more"),
            ("top-p", self.top_p, self.top_p > 0.0 && self.top_p <= 1.0, "above 0 and at most 1"),
            ("min-p", self.min_p, (0.0..1.0).contains(&self.min_p), "at least 0 and below 1"),
            ("repeat penalty", self.repeat_penalty, self.repeat_penalty > 0.0, "above 0"),
        ];
        for (name, found, allowed, expected) in checks {
            if !allowed || !found.is_finite() {
                return Err(Error::Sampling { name, found: found.to_string(), expected });
            }
        }
        Ok(())
    }
}

/// Chooses tokens one after the other; holds the recent tokens and the state of the random numbers.
///
/// ```
/// use foveal_lm::sample::{Sampler, Sampling};
///
/// let mut sampler = Sampler::new(Sampling { seed: 7, ..Sampling::default() })?;
/// let token = sampler.sample(&[0.5, 3.0, -1.0])?;
/// assert!(token < 3);
/// sampler.accept(token);
/// # Ok::<(), foveal_lm::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Sampler {
    sampling: Sampling,
    random: Random,
    recent: VecDeque<u32>,
    logits: Vec<f32>,
    candidates: Vec<Candidate>,
}

impl Sampler {
    /// A sampler that has seen no tokens.
    ///
    /// # Errors
    ///
    /// [`Error::Sampling`] for a parameter outside its range or not finite.
    pub fn new(sampling: Sampling) -> Result<Sampler, Error> {
        sampling.check()?;
        Ok(Sampler {
            sampling,
            random: Random::new(sampling.seed),
            recent: VecDeque::new(),
            logits: Vec::new(),
            candidates: Vec::new(),
        })
    }

    /// Notes a token of the text, for the repeat penalty: each of the prompt, and each one chosen.
    pub fn accept(&mut self, token: u32) {
        if self.sampling.repeat_window == 0 {
            return;
        }
        if self.recent.len() == self.sampling.repeat_window {
            self.recent.pop_front();
        }
        self.recent.push_back(token);
    }

    /// Chooses a token: an index into `logits`. Draws one random number unless the temperature is 0. Allocates on the
    /// first call only.
    ///
    /// # Errors
    ///
    /// [`Error::Logit`] when a logit is NaN or +∞, [`Error::NoCandidate`] when none is above −∞.
    pub fn sample(&mut self, logits: &[f32]) -> Result<u32, Error> {
        let Sampling { temperature, top_k, top_p, min_p, .. } = self.sampling;
        let keep = if temperature == 0.0 { 1 } else { top_k };
        if self.sampling.repeat_penalty == 1.0 {
            largest(logits, keep, &mut self.candidates)?;
        } else {
            self.logits.clear();
            self.logits.extend_from_slice(logits);
            self.penalise();
            largest(&self.logits, keep, &mut self.candidates)?;
        }
        let kept = &mut self.candidates;
        if top_p < 1.0 {
            probabilities(kept, 1.0);
            let mut sum = 0.0;
            let before = kept.iter().take_while(|candidate| {
                let open = sum < f64::from(top_p);
                sum += candidate.probability;
                open
            });
            let count = before.count().max(1);
            kept.truncate(count);
        }
        if min_p > 0.0 {
            probabilities(kept, 1.0);
            let least = kept[0].probability * f64::from(min_p);
            let count = kept.iter().take_while(|candidate| candidate.probability >= least).count();
            kept.truncate(count.max(1));
        }
        self.draw(temperature)
    }

    fn penalise(&mut self) {
        let penalty = self.sampling.repeat_penalty;
        for (index, &token) in self.recent.iter().enumerate() {
            if self.recent.range(..index).any(|&earlier| earlier == token) {
                continue;
            }
            if let Some(logit) = self.logits.get_mut(token as usize) {
                *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
            }
        }
    }

    fn draw(&mut self, temperature: f32) -> Result<u32, Error> {
        if temperature == 0.0 || self.candidates.len() == 1 {
            if temperature != 0.0 {
                self.random.unit();
            }
            return Ok(self.candidates[0].token);
        }
        probabilities(&mut self.candidates, temperature);
        let point = self.random.unit();
        let mut sum = 0.0;
        let drawn = self.candidates.iter().find(|candidate| {
            sum += candidate.probability;
            point < sum
        });
        // The sum may end a rounding error below 1.
        let drawn = drawn.or(self.candidates.iter().rfind(|candidate| candidate.probability > 0.0));
        drawn.map(|candidate| candidate.token).ok_or(Error::NoCandidate)
    }
}

#[cfg(test)]
mod tests;
