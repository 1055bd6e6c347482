//! Softmax attention as it is defined, in f64: loops without tiles, for tests and for reading.
//!
//! ```text
//! s_j = scale · ⟨q, k_j⟩  for every j that the row may see
//! lse = ln Σ e^(s_j)      o = Σ e^(s_j − lse) v_j
//! ```
//!
//! A row that may see nothing gives 0 and −∞. NaN and ∞ go where the formulas take them: a NaN score or
//! one of +∞ makes its row NaN, a score of −∞ weighs 0, and a weight of 0 times a NaN or infinite value
//! that the row may see is NaN. What a row may not see is never read. Vaswani et al. 2017, §3.2.

use crate::error::{Error, Result};
use crate::mask::{Extent, Pattern, Site};
use crate::tensor::Shape;

/// Numbers `[batch, seq, heads, dim]`, row-major.
#[derive(Debug, Clone, Copy)]
pub struct Input<'a> {
    /// The numbers.
    pub data: &'a [f64],
    /// Their extents.
    pub shape: Shape,
}

impl<'a> Input<'a> {
    fn row(&self, batch: usize, seq: usize, head: usize) -> &'a [f64] {
        let Shape { seq: tokens, heads, dim, .. } = self.shape;
        &self.data[((batch * tokens + seq) * heads + head) * dim..][..dim]
    }

    fn check(&self, what: &'static str, like: Shape) -> Result<()> {
        let (expected, got) = (like, self.shape);
        if expected != got {
            return Err(Error::ShapeMismatch { what, expected, got });
        }
        let shape = self.shape;
        let expected = shape.checked_len().ok_or(Error::ShapeOverflow { what, shape })?;
        let got = self.data.len();
        if got == expected { Ok(()) } else { Err(Error::BufferLength { what, expected, got }) }
    }
}

/// An output and its log-sum-exp, of all keys or of some of them.
#[derive(Debug, Clone, PartialEq)]
pub struct Partial {
    /// `[batch, seq, heads, value dim]`, row-major.
    pub out: Vec<f64>,
    /// `[batch, seq, heads]`, natural logarithm.
    pub lse: Vec<f64>,
}

/// Attention of queries `[B, T, H, Dk]` over keys `[B, S, KV, Dk]` and values `[B, S, KV, Dv]`. Query
/// head `h` reads key/value head `h / (H / KV)`; query row `i` is at position `i + S − T`. Allocates.
///
/// # Errors
/// [`Error::ShapeMismatch`], [`Error::BufferLength`], [`Error::HeadGrouping`], and what the mask refuses.
pub fn attention([q, k, v]: [Input<'_>; 3], scale: f64, mask: &dyn Pattern) -> Result<Partial> {
    q.check("queries", Shape { batch: k.shape.batch, dim: k.shape.dim, ..q.shape })?;
    k.check("keys", k.shape)?;
    v.check("values", Shape { dim: v.shape.dim, ..k.shape })?;
    let (heads, kv_heads) = (q.shape.heads, k.shape.heads);
    if kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
        return Err(Error::HeadGrouping { heads, kv_heads });
    }
    let Shape { batch, seq: queries, .. } = q.shape;
    let keys = k.shape.seq;
    mask.check(Extent { batch, heads, queries, keys })?;
    let mut result = Partial { out: vec![], lse: vec![] };
    for batch in 0..batch {
        for (row, q_head) in (0..queries).flat_map(|row| (0..heads).map(move |head| (row, head))) {
            let at = Site { batch, q_head, kv_head: q_head / (heads / kv_heads) };
            let i = row as isize + keys as isize - queries as isize;
            let seen = (0..keys).filter(|&j| mask.allows(at, i, j));
            let (scores, values): (Vec<f64>, Vec<_>) = seen
                .map(|j| {
                    let pairs = q.row(batch, row, q_head).iter().zip(k.row(batch, j, at.kv_head));
                    let product: f64 = pairs.map(|(q, k)| q * k).sum();
                    (scale * product, v.row(batch, j, at.kv_head))
                })
                .unzip();
            result.push(&scores, &values, v.shape.dim);
        }
    }
    Ok(result)
}

/// Joins results over disjoint sets of keys. One part, or a row that is empty in all but one, comes back
/// unchanged up to rounding. Allocates.
///
/// # Errors
/// [`Error::BufferLength`] unless all parts have the first one's sizes, a whole number of values a row.
pub fn merge(parts: &[Partial]) -> Result<Partial> {
    let Some(first) = parts.first() else { return Ok(Partial { out: vec![], lse: vec![] }) };
    let (rows, dim) = (first.lse.len(), first.out.len() / first.lse.len().max(1));
    for part in parts {
        let (expected, got) = (rows * (dim + 1), part.lse.len() + part.out.len());
        if part.lse.len() != rows || expected != got {
            return Err(Error::BufferLength { what: "partial result", expected, got });
        }
    }
    let mut merged = Partial { out: vec![], lse: vec![] };
    for row in 0..rows {
        let held = parts.iter().filter(|part| part.lse[row] != f64::NEG_INFINITY);
        let (scores, values): (Vec<f64>, Vec<_>) =
            held.map(|part| (part.lse[row], &part.out[row * dim..][..dim])).unzip();
        merged.push(&scores, &values, dim);
    }
    Ok(merged)
}

impl Partial {
    /// Adds the row whose values are weighed by the softmax of its scores.
    fn push(&mut self, scores: &[f64], values: &[&[f64]], dim: usize) {
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        // Where all scores are −∞ their weights are 0, not e^(−∞ + ∞).
        let shift = if max == f64::NEG_INFINITY { 0.0 } else { max };
        let weights: Vec<f64> = scores.iter().map(|score| (score - shift).exp()).collect();
        let sum: f64 = weights.iter().sum();
        let total = if sum == 0.0 { 1.0 } else { sum };
        self.lse.push(shift + sum.ln());
        self.out.extend((0..dim).map(|d| {
            weights
                .iter()
                .zip(values)
                .fold(0.0, |sum, (weight, value)| sum + weight / total * value[d])
        }));
    }
}
