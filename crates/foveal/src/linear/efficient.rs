//! Efficient Attention: softmax over the channels of each query, and in each channel over the keys.
//!
//! ```text
//! p_t = softmax(q_t)      S_t = Σ_{j≤t} exp(k_j) v_jᵀ      z_t = Σ_{j≤t} exp(k_j)      o_t = S_tᵀ (p_t / z_t)
//! ```
//!
//! As published, for all keys ([`Recurrent::forward_bidirectional`](super::Recurrent::forward_bidirectional)), o = p Kᵀ V with
//! the softmax of each channel of the keys along the sequence; the causal form is the same over the keys so far, so that
//! denominators belong to channels and move with the token. No scale.
//!
//! Sums of a channel are in units of 2^(24 e), whose e is the largest ⌊k / (24 ln 2)⌉ so far: no key overflows, the unit
//! changes exactly, and rarely. The state holds z and e for each channel (`[sum][key]`: z, then e). e is a whole number
//! and has no gradient. A channel that has seen no key contributes 0. Gradients, from the last token to the first:
//!
//! ```text
//! dp = (S g) / z      dq = p ∘ (dp − ⟨p, dp⟩)      dS = Σ_{i≥t} (p_i / z_i) g_iᵀ      dz = −Σ_{i≥t} (p_i / z_i) ∘ dp_i
//! dw = dS v + dz      dk = w ∘ dw                  dv = dSᵀ w                        w = exp(k)
//! ```
//!
//! Cost: that of [`Linear`](super::Linear) and two exponentials a key channel. Shen et al. 2021, "Efficient Attention",
//! arXiv:1812.01243, section 3.2 (not causal).

use super::bidirectional::AnyOrder;
use super::block::Step;
use super::reference::{Memory, Token};
use super::{Block, BlockGradient, Form, Pass, Recurrence, Written};
use crate::simd::efficient::{self, KeyGradients, QueryGradients, Weigh, softmax_rows};
use crate::simd::sweep::{Decay, TokenRows, padded};

/// Efficient Attention, causal or not.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Efficient {}

impl Efficient {
    /// As published; there is nothing to choose.
    pub fn new() -> Efficient {
        Efficient::default()
    }
}

impl AnyOrder for Efficient {}

impl Recurrence for Efficient {
    fn form(&self) -> Form {
        Form { sums: 2, absent: f32::NEG_INFINITY, ..Form::default() }
    }

    fn step(&self, memory: &mut Memory, token: &Token<'_>, out: &mut [f64]) {
        let unit = 24.0 * std::f64::consts::LN_2;
        let most = token.q.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = token.q.iter().map(|q| (q - most).exp()).sum();
        let (z, e) = memory.key_sum.split_at_mut(token.k.len());
        out.fill(0.0);
        for (c, row) in memory.matrix.chunks_exact_mut(memory.value_dim).enumerate() {
            let (k, held) = (token.k[c], e[c].round());
            let next = match z[c] == 0.0 {
                true => (k / unit).round(),
                false => held.max((k / unit).round()),
            };
            let keep = if z[c] == 0.0 { 1.0 } else { (24.0 * (held - next)).exp2() };
            let weight = if k == f64::NEG_INFINITY { 0.0 } else { (k - unit * next).exp() };
            row.iter_mut().zip(token.v).for_each(|(s, v)| *s = *s * keep + weight * v);
            z[c] = z[c] * keep + weight;
            e[c] = if z[c] == 0.0 { 0.0 } else { next };
            if z[c] > 0.0 {
                let p = (token.q[c] - most).exp() / sum / z[c];
                out.iter_mut().zip(row).for_each(|(o, s)| *o += p * *s);
            }
        }
    }

    fn block(&self, block: &mut Block<'_>) {
        let (level, stride) = (block.level, block.strides.0);
        let width = block.state.layout.rows;
        let [queries, weights, keep] = std::mem::take(&mut block.made);
        match block.step {
            Step::Write => queries.fill(0.0),
            _ => softmax_rows(level, block.q, width, queries),
        }
        let weigh =
            Weigh { k: block.k, width, sums: block.z, weights, keep, queries, inverses: &mut [] };
        let changed = efficient::weigh(level, weigh);
        let [queries, weights, keep] =
            [&*queries, &*weights, &*keep].map(|data| TokenRows { data, stride });
        block.write_and_read_rows(queries, weights, decay(changed, Decay::RowUnits(keep)));
    }

    fn backward(&self, pass: Pass, block: &mut BlockGradient<'_>) -> Written {
        match pass {
            Pass::First | Pass::Ahead => {
                ahead(block);
                Written { q: true, ..Written::default() }
            }
            Pass::Back => {
                back(block);
                Written { k: true, v: true, ..Written::default() }
            }
        }
    }

    fn kept(&self, key_dim: usize, _value_dim: usize) -> usize {
        // w, a, p / z, and the gradient of z from the token's own query.
        4 * padded(key_dim)
    }
}

/// A unit that has not changed is a decay of 1.
fn decay(changed: bool, decay: Decay<'_>) -> Decay<'_> {
    if changed { decay } else { Decay::None }
}

/// The four rows of each token.
fn rows(kept: &mut [f32]) -> [&mut [f32]; 4] {
    let (first, last) = kept.split_at_mut(kept.len() / 2);
    let (weights, keep) = first.split_at_mut(first.len() / 2);
    let (queries, d_own) = last.split_at_mut(last.len() / 2);
    [weights, keep, queries, d_own]
}

fn ahead(block: &mut BlockGradient<'_>) {
    let (level, stride) = (block.level, block.strides.0);
    let width = block.back.layout.rows;
    let [weights, keep, queries, inverses] = rows(std::mem::take(&mut block.kept));
    let keys = |data| TokenRows { data, stride };
    match block.step {
        Step::Write => queries.fill(0.0),
        _ => softmax_rows(level, keys(block.q), width, queries),
    }
    // The softmax of queries, in a place that the pass does not write to otherwise.
    block.d_k.copy_from_slice(queries);
    let (k, sums) = (keys(block.k), &mut *block.sums.0);
    let changed =
        efficient::weigh(level, Weigh { k, width, sums, weights, keep, queries, inverses });
    block.read_gradient_of_query_rows(weights, decay(changed, Decay::ColumnUnits(keys(keep))));
    if block.step == Step::Write {
        return inverses.fill(0.0);
    }
    let (softmax, d_q) = (&*block.d_k, &mut *block.d_q);
    efficient::query_gradients(level, QueryGradients { stride, softmax, queries, inverses, d_q });
}

fn back(block: &mut BlockGradient<'_>) {
    let stride = block.strides.0;
    let [weights, keep, queries, d_own] = rows(std::mem::take(&mut block.kept));
    let changed = keep.iter().any(|&a| a != 1.0);
    let keep_rows = TokenRows { data: keep, stride };
    let decays = [Decay::RowUnits(keep_rows), Decay::ColumnUnits(keep_rows)];
    let [by_row, by_column] = decays.map(|by| decay(changed, by));
    block.read_gradients_of_written_rows((queries, weights), by_row, by_column);
    let (d_z, d_e) = block.sums.1.split_at_mut(stride);
    d_e.fill(0.0);
    let (d_k, keep) = (&mut *block.d_k, keep_rows.data);
    efficient::key_gradients(block.level, KeyGradients { weights, keep, d_own, d_z, d_k });
}
