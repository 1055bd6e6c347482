//! Gated Linear Attention: a decay for each token, head and key channel.
//!
//! ```text
//! S_t = diag(a_t) S_{t−1} + k_t v_tᵀ      o_t = scale · S_tᵀ q_t      a_t = exp(log_decay_t) ∈ [0, 1]^Dk
//!
//! dq_t = S_t g_t      dS_t = q_t g_tᵀ + diag(a_{t+1}) dS_{t+1}      dk_t = dS_t v_t      dv_t = dS_tᵀ k_t
//! d log a_t = Σ_{i≥t} (q_i ∘ dq_i − k_i ∘ dk_i) + rowsum(dS_T ∘ S_T)
//! ```
//!
//! with g = scale · do. Nothing is ever divided by a decay: any regime is stable, down to decays of 0. Cost: as
//! [`ScalarDecay`](super::ScalarDecay), and an exponential for each key channel. Yang et al. 2023, arXiv:2312.06635.

use super::reference::{Memory, Token};
use super::{Block, BlockGradient, DecayForm, Form, Pass, Recurrence, Written, scalar_decay};
use crate::problem::Scale;
use crate::simd::sweep::Decay;
use crate::simd::token;

/// A decay for each token, head and key channel.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct VectorDecay {
    scale: Scale,
}

impl VectorDecay {
    /// Reads are scaled by 1/√(key dim).
    pub fn new() -> VectorDecay {
        VectorDecay::default()
    }

    /// What reads are multiplied by.
    pub fn scale(self, scale: Scale) -> VectorDecay {
        VectorDecay { scale }
    }
}

impl Recurrence for VectorDecay {
    fn form(&self) -> Form {
        Form { decay: DecayForm::Vector, ..Form::default() }
    }

    fn scale(&self) -> Scale {
        self.scale
    }

    fn step(&self, memory: &mut Memory, token: &Token<'_>, out: &mut [f64]) {
        scalar_decay::step(memory, token, out);
    }

    fn block(&self, block: &mut Block<'_>) {
        block.write_and_read(Decay::Rows(block.keys(block.decay)));
    }

    fn backward(&self, pass: Pass, block: &mut BlockGradient<'_>) -> Written {
        let decay = block.keys(block.decay);
        match pass {
            Pass::First | Pass::Ahead => {
                block.read_gradient_of_queries(Decay::Columns(decay));
                token::products(block.level, block.q, block.d_q, block.kept);
                Written { q: true, ..Written::default() }
            }
            Pass::Back => {
                block.read_gradients_of_writes(Decay::Rows(decay), Decay::Columns(decay));
                token::less_products(block.level, block.k, block.d_k, block.kept);
                block.sum_over_later_tokens(block.strides.0);
                Written { k: true, v: true, decay: true, ..Written::default() }
            }
        }
    }

    fn kept(&self, key_dim: usize, _value_dim: usize) -> usize {
        crate::simd::sweep::padded(key_dim)
    }
}
