//! One decay for each token and head: Mamba-2's state space duality, simple gated linear attention; and RetNet, whose
//! decays belong to heads.
//!
//! ```text
//! S_t = a_t S_{t−1} + k_t v_tᵀ      o_t = scale · S_tᵀ q_t      a_t = exp(log_decay_t), or γ_h
//!
//! dq_t = S_t g_t      dS_t = q_t g_tᵀ + a_{t+1} dS_{t+1}      dk_t = dS_t v_t      dv_t = dS_tᵀ k_t
//! d log a_t = Σ_{i≥t} (q_i · dq_i − k_i · dk_i) + ⟨dS_T, S_T⟩
//! ```
//!
//! with g = scale · do. A decay is a product in f32: one below 10⁻³⁸ is 0. Cost: one multiplication of the state more than
//! [`Linear`](super::Linear). Dao and Gu 2024, arXiv:2405.21060; Sun et al. 2023, arXiv:2307.08621.

use super::reference::{Memory, Token};
use super::{Block, BlockGradient, DecayForm, Form, Pass, Recurrence, Written};
use crate::error::{Error, Result};
use crate::problem::Scale;
use crate::simd::sweep::Decay;
use crate::simd::token;

/// A decay for each token and head. In Mamba-2's words: C is the query, B the key, Δ·x the value, Δ·A the logarithm.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct ScalarDecay {
    scale: Scale,
}

impl ScalarDecay {
    /// Reads are scaled by 1/√(key dim).
    pub fn new() -> ScalarDecay {
        ScalarDecay::default()
    }

    /// What reads are multiplied by; Mamba-2 takes 1.
    pub fn scale(self, scale: Scale) -> ScalarDecay {
        ScalarDecay { scale }
    }
}

impl Recurrence for ScalarDecay {
    fn form(&self) -> Form {
        Form { decay: DecayForm::Scalar, ..Form::default() }
    }

    fn scale(&self) -> Scale {
        self.scale
    }

    fn step(&self, memory: &mut Memory, token: &Token<'_>, out: &mut [f64]) {
        step(memory, token, out);
    }

    fn block(&self, block: &mut Block<'_>) {
        block.write_and_read(Decay::Scalar(block.decay));
    }

    fn backward(&self, pass: Pass, block: &mut BlockGradient<'_>) -> Written {
        let decay = Decay::Scalar(block.decay);
        match pass {
            Pass::First | Pass::Ahead => {
                block.read_gradient_of_queries(decay);
                token::dots(block.level, block.q, block.d_q, block.kept);
                Written { q: true, ..Written::default() }
            }
            Pass::Back => {
                block.read_gradients_of_writes(decay, decay);
                token::dots(block.level, block.k, block.d_k, block.d_beta);
                for (own, written) in block.kept.iter_mut().zip(&*block.d_beta) {
                    *own -= written;
                }
                block.sum_over_later_tokens(1);
                Written { k: true, v: true, decay: true, ..Written::default() }
            }
        }
    }

    fn kept(&self, _key_dim: usize, _value_dim: usize) -> usize {
        1
    }
}

/// A constant decay for each head, without gradient.
#[derive(Debug, Clone, PartialEq)]
pub struct Retention {
    decays: Vec<f32>,
    scale: Scale,
}

impl Retention {
    /// RetNet's decays, γ_h = 1 − 2^(−5−h), and reads scaled by 1/√(key dim).
    pub fn new(heads: usize) -> Retention {
        let decays = (0..heads).map(|h| 1.0 - (-5.0 - h as f32).exp2()).collect();
        Retention { decays, scale: Scale::default() }
    }

    /// Decays of your own, one a head.
    pub fn decays(self, decays: Vec<f32>) -> Retention {
        Retention { decays, ..self }
    }

    /// What reads are multiplied by.
    pub fn scale(self, scale: Scale) -> Retention {
        Retention { scale, ..self }
    }
}

impl Recurrence for Retention {
    fn form(&self) -> Form {
        Form::default()
    }

    fn scale(&self) -> Scale {
        self.scale
    }

    fn check(&self, heads: usize) -> Result<()> {
        if self.decays.len() != heads {
            let (what, expected, got) = ("decays of a retention", heads, self.decays.len());
            return Err(Error::LengthMismatch { what, expected, got });
        }
        match self.decays.iter().find(|decay| !(0.0..=1.0).contains(*decay)) {
            None => Ok(()),
            Some(decay) => {
                let (what, expected) = ("decay of a retention", "0 to 1");
                Err(Error::InvalidParameter { what, expected, got: decay.to_string() })
            }
        }
    }

    fn fixed_decay(&self, head: usize) -> Option<f32> {
        Some(self.decays[head])
    }

    fn step(&self, memory: &mut Memory, token: &Token<'_>, out: &mut [f64]) {
        step(memory, token, out);
    }

    fn block(&self, block: &mut Block<'_>) {
        block.write_and_read(Decay::Scalar(block.decay));
    }

    fn backward(&self, pass: Pass, block: &mut BlockGradient<'_>) -> Written {
        let decay = Decay::Scalar(block.decay);
        match pass {
            Pass::First | Pass::Ahead => {
                block.read_gradient_of_queries(decay);
                Written { q: true, ..Written::default() }
            }
            Pass::Back => {
                block.read_gradients_of_writes(decay, decay);
                Written { k: true, v: true, ..Written::default() }
            }
        }
    }

    fn kept(&self, _key_dim: usize, _value_dim: usize) -> usize {
        0
    }
}

/// Decay, write, read.
pub(super) fn step(memory: &mut Memory, token: &Token<'_>, out: &mut [f64]) {
    memory.decay(token.decay);
    memory.write(token.k, token.v);
    memory.read(token.q, out);
}
