//! DeltaNet and Gated DeltaNet: a token replaces what its key has read, instead of adding to it.
//!
//! ```text
//! S̄ = a_t S_{t−1}      r_t = S̄ᵀ k_t      u_t = β_t (v_t − r_t)      S_t = S̄ + k_t u_tᵀ      o_t = scale · S_tᵀ q_t
//! ```
//!
//! a_t = exp(log_decay_t), or 1 without gate. Stable for β‖k‖² in [0, 2]: with unit keys at β = 1 the old value is gone.
//! Gradients, backwards from the gradient of S_t that later tokens hand on (`carry`), with g = scale · do:
//!
//! ```text
//! First   dS = carry + q gᵀ      du = dSᵀ k      dv = β du      dr = −β du      dβ = du · (v − r)
//!         carry ← a (dS + k drᵀ)
//! Ahead   dq = S_t g             dk += S̄ dr
//! Back    dk += dS u
//! d log a_t = Σ_{i≥t} (q_i · dq_i − u_i · du_i + r_i · dr_i) + ⟨dS_T, S_T⟩
//! ```
//!
//! The state is never inverted: it is singular at β = 1. Forward hands its reads r_t on to backward. Cost: half as much again as
//! [`Linear`](super::Linear), twice with a gate; three times that backward. Yang et al. 2024, arXiv:2406.06484; Yang,
//! Kautz and Hatamizadeh 2024, arXiv:2412.06464.

use super::reference::{Memory, Token};
use super::{Block, BlockGradient, DecayForm, Form, Pass, Recurrence, Written};
use crate::problem::Scale;
use crate::simd::delta::{self, Ahead, Behind, Rows};
use crate::simd::sweep::{self, Decay, Read, Sweep, TokenRows, Write};
use crate::simd::token;

/// A delta rule, with or without gate.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Delta {
    gated: bool,
    scale: Scale,
}

impl Delta {
    /// Without gate (`delta`); reads are scaled by 1/√(key dim).
    pub fn new() -> Delta {
        Delta::default()
    }

    /// With a decay for each token and head (`gated_delta`).
    pub fn gated() -> Delta {
        Delta { gated: true, ..Delta::default() }
    }

    /// What reads are multiplied by.
    pub fn scale(self, scale: Scale) -> Delta {
        Delta { scale, ..self }
    }
}

impl Recurrence for Delta {
    fn form(&self) -> Form {
        let decay = if self.gated { DecayForm::Scalar } else { DecayForm::None };
        Form { decay, beta: true, ..Form::default() }
    }

    fn scale(&self) -> Scale {
        self.scale
    }

    fn step(&self, memory: &mut Memory, token: &Token<'_>, out: &mut [f64]) {
        if self.gated {
            memory.decay(token.decay);
        }
        memory.read(token.k, out);
        let u: Vec<f64> = token.v.iter().zip(&*out).map(|(v, r)| token.beta * (v - r)).collect();
        memory.write(token.k, &u);
        memory.read(token.q, out);
    }

    fn block(&self, block: &mut Block<'_>) {
        let rows = Rows { q: block.q, k: block.k, v: block.v };
        delta::ahead(
            block.level,
            Ahead {
                state: block.state.data,
                layout: block.state.layout,
                rows,
                decay: self.gated.then_some(block.decay),
                beta: block.beta,
                reads: block.reads,
                out: block.out,
                near: block.near,
            },
        );
    }

    fn backward(&self, pass: Pass, block: &mut BlockGradient<'_>) -> Written {
        match pass {
            Pass::First => {
                self.first(block);
                Written { v: true, beta: true, ..Written::default() }
            }
            Pass::Ahead => {
                self.ahead(block);
                Written { q: true, k: true, ..Written::default() }
            }
            Pass::Back => {
                self.back(block);
                Written { k: true, decay: self.gated, ..Written::default() }
            }
        }
    }

    fn kept(&self, _key_dim: usize, value_dim: usize) -> usize {
        // dr, and what d log a sums up.
        sweep::padded(value_dim) + 1
    }

    fn passes(&self) -> &'static [Pass] {
        &[Pass::First, Pass::Ahead, Pass::Back]
    }
}

impl Delta {
    fn first(&self, block: &mut BlockGradient<'_>) {
        let (level, (keys, values)) = (block.level, block.strides);
        let rows = |data, stride| TokenRows { data, stride };
        // q · k of each token, in a place that the pass does not write to otherwise.
        token::dots(level, block.q, block.k, block.d_beta);
        let (d_r, terms) = block.kept.split_at_mut(block.len * values);
        delta::behind(
            level,
            Behind {
                state: block.back.data,
                layout: block.back.layout,
                rows: Rows {
                    q: rows(block.q, keys),
                    k: rows(block.k, keys),
                    v: rows(block.g, values),
                },
                decay: self.gated.then_some(block.decay),
                beta: block.beta,
                products: block.d_beta,
                out: d_r,
                near: Some(&block.near[0].with(block.near[1])),
            },
        );
        let numbers = terms.iter_mut().zip(block.d_beta.iter_mut()).zip(block.beta);
        for (t, ((term, d_beta), &beta)) in numbers.enumerate() {
            let row = t * values..(t + 1) * values;
            let gradients = (&mut d_r[row.clone()], &mut block.d_v[row.clone()]);
            let own = (&block.v[row.clone()], &block.reads[row]);
            (*d_beta, *term) = delta::split(level, beta, own, gradients);
        }
    }

    /// u = β (v − r) of the block, in place of dv.
    fn writes(block: &mut BlockGradient<'_>) {
        let values = block.strides.1;
        for (t, &beta) in block.beta.iter().enumerate() {
            let row = t * values..(t + 1) * values;
            let u = &mut block.d_v[row.clone()];
            for ((u, v), r) in u.iter_mut().zip(&block.v[row.clone()]).zip(&block.reads[row]) {
                *u = beta * (v - r);
            }
        }
    }

    fn decay<'a>(&self, block: &BlockGradient<'a>) -> Decay<'a> {
        if self.gated { Decay::Scalar(block.decay) } else { Decay::None }
    }

    fn ahead(&self, block: &mut BlockGradient<'_>) {
        Delta::writes(block);
        let (keys, values) = block.strides;
        let rows = |data, stride| TokenRows { data, stride };
        let decay = self.decay(block);
        let (d_r, terms) = block.kept.split_at_mut(block.len * values);
        let write = Write { rows: rows(block.d_v, values), columns: rows(block.k, keys) };
        let read = Read { by: rows(block.g, values), out: block.d_q };
        let before = Read { by: rows(d_r, values), out: block.d_k };
        let plain = block.ahead.sweep(block.len, Some(write), Some(read));
        sweep::sweep(
            block.level,
            Sweep {
                decay,
                before: Some(before),
                near: Some(&block.near[0].with(block.near[1])),
                ..plain
            },
        );
        token::dots(block.level, block.q, block.d_q, block.d_beta);
        terms.iter_mut().zip(&*block.d_beta).for_each(|(term, own)| *term += own);
    }

    fn back(&self, block: &mut BlockGradient<'_>) {
        Delta::writes(block);
        let (keys, values) = block.strides;
        let rows = |data, stride| TokenRows { data, stride };
        let decay = self.decay(block);
        let (d_r, terms) = block.kept.split_at_mut(block.len * values);
        let write = Write { rows: rows(block.g, values), columns: rows(block.q, keys) };
        let read = Read { by: rows(block.d_v, values), out: block.d_k };
        let after = Write { rows: rows(d_r, values), columns: rows(block.k, keys) };
        let plain = block.back_transposed.sweep(block.len, Some(write), Some(read));
        sweep::sweep(
            block.level,
            Sweep {
                decay,
                reverse: true,
                after: Some(after),
                near: Some(&block.near[0].with(block.near[1])),
                ..plain
            },
        );
        if self.gated {
            let [high, low] = &mut block.suffix;
            token::sum_later(block.level, terms, 1, [high, low], block.d_decay);
        }
    }
}
