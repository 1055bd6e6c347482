//! The gradients of attention as they are defined, in f64.
//!
//! ```text
//! p_j = e^(s_j − lse)     dp_j = z_j ⟨dO, v_j⟩     D = Σ p_j dp_j     ds_j = p_j (dp_j − D + dlse)
//! dv_j = Σ p_j z_j dO     dbias_j = ds_j           dsink = p_sink (dlse − D)
//! da_j = scale ds_j cap'(scale a_j)                dq = Σ da_j k_j             dk_j = Σ da_j q
//! with a relative encoding:  dq = Σ da_j (k_j + r(i − j))    dk_j = Σ da_j (q + u)    dr(p) = Σ da_j (q + v), i − j = p
//!                            du = Σ da_j k_j                 dv = Σ da_j r(i − j)
//! ```
//!
//! A row whose log-sum-exp is −∞ has no gradients.

use super::{Input, Options, check};
use crate::error::Result;
use crate::mask::Site;
use crate::tensor::Shape;

/// Gradients of a loss with respect to what [`super::attention_with`] is given. Row-major.
#[derive(Debug, Clone, PartialEq)]
pub struct Derivatives {
    /// `[batch, queries, heads, dim]`.
    pub d_q: Vec<f64>,
    /// `[batch, keys, kv heads, dim]`.
    pub d_k: Vec<f64>,
    /// `[batch, keys, kv heads, value dim]`.
    pub d_v: Vec<f64>,
    /// With respect to scores after cap and bias: `[batch, queries, heads, keys]`, zero where masked. That of a bias
    /// is its sum over the axes that the bias shares.
    pub d_scores: Vec<f64>,
    /// `[heads]`; zeros without sinks.
    pub d_sinks: Vec<f64>,
    /// `[1, distances, heads, dim]`; empty without a relative encoding.
    pub d_relative_keys: Vec<f64>,
    /// `[heads, dim]`, likewise.
    pub d_content_bias: Vec<f64>,
    /// `[heads, dim]`, likewise.
    pub d_position_bias: Vec<f64>,
}

/// The gradients of a loss whose gradients with respect to the output `[B, T, H, Dv]` and the log-sum-exp
/// `[B, T, H, 1]` are given. Allocates.
///
/// # Errors
/// Those of [`super::attention_with`], and the same for the two gradients.
pub fn attention_backward(
    [q, k, v]: [Input<'_>; 3],
    options: &Options<'_>,
    [d_out, d_lse]: [Input<'_>; 2],
) -> Result<Derivatives> {
    check([q, k, v], options)?;
    d_out.check("gradient of the output", Shape { dim: v.shape.dim, ..q.shape })?;
    d_lse.check("gradient of the log-sum-exp", q.shape.per_row())?;
    let Shape { batch, seq: queries, heads, .. } = q.shape;
    let keys = k.shape.seq;
    let mut derivatives = Derivatives {
        d_q: vec![0.0; q.data.len()],
        d_k: vec![0.0; k.data.len()],
        d_v: vec![0.0; v.data.len()],
        d_scores: vec![0.0; batch * queries * heads * keys],
        d_sinks: vec![0.0; heads],
        d_relative_keys: vec![0.0; options.relative.map_or(0, |x| x.keys.data.len())],
        d_content_bias: vec![0.0; options.relative.map_or(0, |x| x.content_bias.len())],
        d_position_bias: vec![0.0; options.relative.map_or(0, |x| x.position_bias.len())],
    };
    for batch in 0..batch {
        for (row, q_head) in (0..queries).flat_map(|row| (0..heads).map(move |head| (row, head))) {
            let at = Site { batch, q_head, kv_head: q_head / (heads / k.shape.heads) };
            derivatives.add_row([q, k, v, d_out, d_lse], options, (at, row));
        }
    }
    Ok(derivatives)
}

impl Derivatives {
    fn add_row(
        &mut self,
        [q, k, v, d_out, d_lse]: [Input<'_>; 5],
        options: &Options<'_>,
        (at, row): (Site, usize),
    ) {
        let (keys, heads) = (k.shape.seq, q.shape.heads);
        let place = (at.batch * q.shape.seq + row) * heads + at.q_head;
        let i = row as isize + keys as isize - q.shape.seq as isize;
        let query = q.row(at.batch, row, at.q_head);
        let d_out = d_out.row(at.batch, row, at.q_head);
        let seen: Vec<usize> = (0..keys).filter(|&j| options.mask.allows(at, i, j)).collect();
        let product = |j: usize| {
            options.product(at.q_head, i - j as isize, query, k.row(at.batch, j, at.kv_head))
        };
        let scores: Vec<f64> =
            seen.iter().map(|&j| options.score((at, row, j), product(j))).collect();
        let sink = options.sinks.map(|sinks| sinks[at.q_head]);
        let all = scores.iter().chain(&sink);
        let max = all.clone().copied().fold(f64::NEG_INFINITY, f64::max);
        if max == f64::NEG_INFINITY && all.clone().all(|score| !score.is_nan()) {
            return;
        }
        let lse = max + all.map(|score| (score - max).exp()).sum::<f64>().ln();
        let factor = |j| options.dropout.map_or(1.0, |factor| factor(at, row, j));
        let d_weight = |j| factor(j) * dot(d_out, v.row(at.batch, j, at.kv_head));
        let weighed = seen.iter().zip(&scores).map(|(&j, s)| (s - lse).exp() * d_weight(j));
        let delta = weighed.sum::<f64>() - d_lse.data[place];
        for (&j, score) in seen.iter().zip(&scores) {
            let p = (score - lse).exp();
            let d_score = p * (d_weight(j) - delta);
            let scaled = options.scale * product(j);
            let bend = options.softcap.map_or(1.0, |cap| 1.0 - (scaled / cap).tanh().powi(2));
            let d_product = options.scale * d_score * bend;
            let (key, value) =
                (k.offset(at.batch, j, at.kv_head), v.offset(at.batch, j, at.kv_head));
            add(&mut self.d_q[place * query.len()..], d_product, k.row(at.batch, j, at.kv_head));
            add(&mut self.d_k[key..], d_product, query);
            self.add_relative([q, k], options, (at, row, j), d_product);
            add(&mut self.d_v[value..], p * factor(j), d_out);
            self.d_scores[place * keys + j] = d_score;
        }
        self.d_sinks[at.q_head] -= sink.map_or(0.0, |sink| (sink - lse).exp() * delta);
    }
}

impl Derivatives {
    /// What a relative encoding adds to the gradients of a pair's product.
    fn add_relative(
        &mut self,
        [q, k]: [Input<'_>; 2],
        options: &Options<'_>,
        (at, row, j): (Site, usize, usize),
        d_product: f64,
    ) {
        let Some(relative) = &options.relative else { return };
        let (dim, head) = (q.shape.dim, at.q_head);
        let distance = row as isize + k.shape.seq as isize - (q.shape.seq + j) as isize;
        let query = q.offset(at.batch, row, head);
        let key = k.offset(at.batch, j, at.kv_head);
        let by_distance = relative.key(head, distance);
        add(&mut self.d_q[query..], d_product, by_distance);
        add(&mut self.d_k[key..], d_product, relative.content_bias(head));
        let place = relative.keys.offset(0, relative.place(distance), head);
        add(&mut self.d_relative_keys[place..], d_product, &q.data[query..][..dim]);
        add(&mut self.d_relative_keys[place..], d_product, relative.position_bias(head));
        add(&mut self.d_content_bias[head * dim..], d_product, &k.data[key..][..dim]);
        add(&mut self.d_position_bias[head * dim..], d_product, by_distance);
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add(to: &mut [f64], factor: f64, from: &[f64]) {
    to.iter_mut().zip(from).for_each(|(to, from)| *to += factor * from);
}
