//! The Linear Transformer: kernel feature maps, nothing forgotten, outputs normalised or not.
//!
//! ```text
//! S_t = S_{t−1} + φ(k_t) v_tᵀ      z_t = z_{t−1} + φ(k_t)      o_t = S_tᵀ φ(q_t) / (φ(q_t) · z_t + ε)
//! ```
//!
//! Gradients, with g = do / den and h = −(φ(q) · S g) / den:
//!
//! ```text
//! dφ(q)_t = S_t g_t + h_t z_t      C_t = Σ_{i≥t} φ(q_i) g_iᵀ      c_t = Σ_{i≥t} h_i φ(q_i)
//! dφ(k)_t = C_t v_t + c_t          dv_t = C_tᵀ φ(k_t)
//! ```
//!
//! Katharopoulos et al. 2020, "Transformers are RNNs", arXiv:2006.16236.

use super::block::Step;
use super::reference::{Memory, Token};
use super::{Block, BlockGradient, FeatureMap, Form, Pass, Recurrence, Written};
use crate::error::{Error, Result};
use crate::simd::sweep::Decay;
use crate::simd::token::{self, Normaliser};

/// The Linear Transformer's attention.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Linear {
    map: FeatureMap,
    epsilon: Option<f32>,
}

impl Default for Linear {
    fn default() -> Linear {
        Linear { map: FeatureMap::EluPlusOne, epsilon: Some(1e-6) }
    }
}

impl Linear {
    /// As published: φ(x) = elu(x) + 1, normalised, with ε = 10⁻⁶.
    pub fn new() -> Linear {
        Linear::default()
    }

    /// Another map of queries and keys.
    pub fn map(self, map: FeatureMap) -> Linear {
        Linear { map, ..self }
    }

    /// What is added to the denominator; `None` for no denominator at all.
    pub fn normaliser(self, epsilon: Option<f32>) -> Linear {
        Linear { epsilon, ..self }
    }
}

impl Recurrence for Linear {
    fn form(&self) -> Form {
        Form { map: self.map, sums: usize::from(self.epsilon.is_some()), ..Form::default() }
    }

    fn check(&self, _heads: usize) -> Result<()> {
        let refuse = |what, expected, got| Err(Error::InvalidParameter { what, expected, got });
        match self.epsilon {
            Some(epsilon) if !(0.0..f32::INFINITY).contains(&epsilon) => {
                refuse("epsilon of the normaliser", "a finite number ≥ 0", epsilon.to_string())
            }
            Some(_) if self.map == FeatureMap::Identity => refuse(
                "feature map of a normalised linear attention",
                "a map to numbers that are not negative, since their sum is divided by",
                format!("{:?}", self.map),
            ),
            _ => Ok(()),
        }
    }

    fn step(&self, memory: &mut Memory, token: &Token<'_>, out: &mut [f64]) {
        memory.write(token.k, token.v);
        memory.read(token.q, out);
        if let Some(epsilon) = self.epsilon {
            let mut denominator = f64::from(epsilon);
            for ((z, k), q) in memory.key_sum.iter_mut().zip(token.k).zip(token.q) {
                *z += k;
                denominator += *z * q;
            }
            out.iter_mut().for_each(|o| *o /= denominator);
        }
    }

    fn block(&self, block: &mut Block<'_>) {
        block.write_and_read(Decay::None);
        if let Some(epsilon) = self.epsilon {
            let rows = block.features();
            token::denominators(block.level, rows, epsilon, block.z, block.factors);
            block.factors.iter_mut().for_each(|x| *x = 1.0 / *x);
        }
    }

    fn backward(&self, pass: Pass, block: &mut BlockGradient<'_>) -> Written {
        match pass {
            Pass::First | Pass::Ahead => {
                self.ahead(block);
                Written { q: true, ..Written::default() }
            }
            Pass::Back => {
                self.back(block);
                Written { k: true, v: true, ..Written::default() }
            }
        }
    }

    fn kept(&self, _key_dim: usize, _value_dim: usize) -> usize {
        if self.epsilon.is_some() { 2 } else { 0 }
    }
}

impl Linear {
    fn ahead(&self, block: &mut BlockGradient<'_>) {
        let Some(epsilon) = self.epsilon else {
            return block.read_gradient_of_queries(Decay::None);
        };
        let (level, rows) = (block.level, block.features());
        if block.step == Step::Write {
            let (den, h) = block.kept.split_at_mut(block.len);
            token::denominators(level, rows, epsilon, block.sums.0, den);
            den.fill(1.0);
            h.fill(0.0);
            return block.read_gradient_of_queries(Decay::None);
        }
        block.spare.copy_from_slice(block.sums.0);
        let den = &mut block.kept[..block.len];
        token::denominators(level, rows, epsilon, block.spare, den);
        token::divide(level, den, block.g);
        block.read_gradient_of_queries(Decay::None);
        let (den, h) = block.kept.split_at_mut(block.len);
        token::normalise_queries(level, rows, Normaliser { den, h }, block.sums.0, block.d_q);
    }

    fn back(&self, block: &mut BlockGradient<'_>) {
        if self.epsilon.is_none() {
            return block.read_gradients_of_writes(Decay::None, Decay::None);
        }
        token::divide(block.level, &block.kept[..block.len], block.g);
        block.read_gradients_of_writes(Decay::None, Decay::None);
        let h = &block.kept[block.len..];
        token::normalise_keys(block.level, block.q, h, block.sums.1, block.d_k);
    }
}
