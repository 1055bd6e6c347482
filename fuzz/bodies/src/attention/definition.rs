//! Attention as it is defined, in f64, and the distance from it that arithmetic in f32 explains.

use foveal::mask::{Pattern, Site};
use foveal::{Element, Mask, TensorRef};

/// Queries, keys and values.
pub(super) type Tensors<'a, E> = [TensorRef<'a, E>; 3];

/// One row of the result.
#[derive(Debug)]
pub(super) struct Row {
    pub(super) out: Vec<f64>,
    pub(super) lse: f64,
    /// The largest score if all products had the same sign: what rounding errors are relative to.
    pub(super) size: f64,
    /// The largest visible value.
    pub(super) value: f64,
}

/// The row of query `t` of a head.
pub(super) fn row<E: Element>(
    [q, k, v]: Tensors<'_, E>,
    mask: &Mask,
    scale: f64,
    (b, t, h): (usize, usize, usize),
) -> Row {
    let kv_head = h / (q.shape().heads / k.shape().heads);
    let at = Site { batch: b, q_head: h, kv_head };
    let i = t as isize + k.shape().seq as isize - q.shape().seq as isize;
    let query = q.row(b, t, h);
    let (mut scores, mut size, mut value) = (vec![], 0.0f64, 0.0f64);
    for j in (0..k.shape().seq).filter(|&j| mask.allows(at, i, j)) {
        let products = query.iter().zip(k.row(b, j, kv_head));
        let (mut dot, mut absolute) = (0.0, 0.0);
        for (x, y) in products {
            let product = scale * f64::from(x.to_f32()) * f64::from(y.to_f32());
            dot += product;
            absolute += product.abs();
        }
        scores.push((j, dot));
        size = size.max(absolute);
        value = v.row(b, j, kv_head).iter().fold(value, |m, x| m.max(f64::from(x.to_f32()).abs()));
    }
    let max = scores.iter().fold(f64::NEG_INFINITY, |m: f64, s| m.max(s.1));
    let sum: f64 = scores.iter().map(|s| (s.1 - max).exp()).sum();
    let mut out = vec![0.0; v.shape().dim];
    for &(j, score) in &scores {
        let weight = (score - max).exp() / sum;
        for (out, x) in out.iter_mut().zip(v.row(b, j, kv_head)) {
            *out += weight * f64::from(x.to_f32());
        }
    }
    let lse = if scores.is_empty() { f64::NEG_INFINITY } else { max + sum.ln() };
    Row { out, lse, size, value }
}

impl Row {
    /// What f32 arithmetic may differ by, relative to the values.
    pub(super) fn error(&self) -> f64 {
        2e-6 * (1.0 + self.size)
    }
}
