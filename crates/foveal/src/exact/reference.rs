//! Softmax attention as it is defined, in f64: loops without tiles, for tests and for reading.
//!
//! ```text
//! s_j = cap(scale · a_j) + bias_j  for every j that the row may see
//! a_j = ⟨q, k_j⟩, or with a relative encoding ⟨q + u, k_j⟩ + ⟨q + v, r(i − j)⟩
//! lse = ln (Σ e^(s_j) + e^sink)      o = Σ e^(s_j − lse) z_j v_j
//! ```
//!
//! A row that may see nothing gives 0 and −∞. NaN and ∞ go where the formulas take them: a NaN score or
//! one of +∞ makes its row NaN, a score of −∞ weighs 0, and a weight of 0 times a NaN or infinite value
//! that the row may see is NaN. What a row may not see is never read. Vaswani et al. 2017, §3.2.

use crate::error::{Error, Result};
use crate::mask::{Extent, Pattern, Site};
use crate::tensor::Shape;

mod backward;

pub use backward::{Derivatives, attention_backward};

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
        &self.data[self.offset(batch, seq, head)..][..self.shape.dim]
    }

    fn offset(&self, batch: usize, seq: usize, head: usize) -> usize {
        let Shape { seq: tokens, heads, dim, .. } = self.shape;
        ((batch * tokens + seq) * heads + head) * dim
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

/// The relative encoding of Transformer-XL: see [`RelativeEncoding`](crate::position::RelativeEncoding).
#[derive(Debug, Clone, Copy)]
pub struct Relative<'a> {
    /// r, `[1, distances, heads, dim]`; distances beyond the ends take the ends.
    pub keys: Input<'a>,
    /// u, `[heads, dim]`.
    pub content_bias: &'a [f64],
    /// v, `[heads, dim]`.
    pub position_bias: &'a [f64],
}

impl<'a> Relative<'a> {
    fn place(&self, distance: isize) -> usize {
        distance.clamp(0, self.keys.shape.seq as isize - 1) as usize
    }

    fn key(&self, head: usize, distance: isize) -> &'a [f64] {
        self.keys.row(0, self.place(distance), head)
    }

    fn content_bias(&self, head: usize) -> &'a [f64] {
        let dim = self.keys.shape.dim;
        &self.content_bias[head * dim..][..dim]
    }

    fn position_bias(&self, head: usize) -> &'a [f64] {
        let dim = self.keys.shape.dim;
        &self.position_bias[head * dim..][..dim]
    }

    fn check(&self, q: Shape) -> Result<()> {
        let seq = self.keys.shape.seq.max(1);
        self.keys.check("keys by distance", Shape { batch: 1, seq, ..q })?;
        let expected = q.heads * q.dim;
        for (what, bias) in
            [("content bias", self.content_bias), ("position bias", self.position_bias)]
        {
            if bias.len() != expected {
                return Err(Error::LengthMismatch { what, expected, got: bias.len() });
            }
        }
        Ok(())
    }
}

/// What a definition is given besides queries, keys and values. Rows and keys are numbered from 0.
#[derive(Clone, Copy)]
pub struct Options<'a> {
    /// What products are multiplied by.
    pub scale: f64,
    /// Who may see whom.
    pub mask: &'a dyn Pattern,
    /// Scores become cap · tanh(score / cap).
    pub softcap: Option<f64>,
    /// What is added to the score of (site, row, key), after the cap.
    pub bias: Option<&'a dyn Fn(Site, usize, usize) -> f64>,
    /// A second product of queries, with keys by distance.
    pub relative: Option<Relative<'a>>,
    /// A logit for each query head without a value.
    pub sinks: Option<&'a [f64]>,
    /// What the weight of (site, row, key) is multiplied by.
    pub dropout: Option<&'a dyn Fn(Site, usize, usize) -> f64>,
}

impl<'a> Options<'a> {
    /// A scale, a mask and nothing else.
    pub fn new(scale: f64, mask: &'a dyn Pattern) -> Options<'a> {
        let (softcap, bias, relative) = (None, None, None);
        Options { scale, mask, softcap, bias, relative, sinks: None, dropout: None }
    }

    /// The product of a query with a key that lies `distance` behind it.
    fn product(&self, head: usize, distance: isize, query: &[f64], key: &[f64]) -> f64 {
        match &self.relative {
            None => query.iter().zip(key).map(|(q, k)| q * k).sum(),
            Some(relative) => {
                let rows = query.iter().zip(relative.content_bias(head)).zip(key);
                let content: f64 = rows.map(|((q, u), k)| (q + u) * k).sum();
                let rows = query.iter().zip(relative.position_bias(head));
                let key = relative.key(head, distance);
                content + rows.zip(key).map(|((q, v), r)| (q + v) * r).sum::<f64>()
            }
        }
    }

    fn score(&self, (at, row, j): (Site, usize, usize), product: f64) -> f64 {
        let score = self.scale * product;
        let score = self.softcap.map_or(score, |cap| cap * (score / cap).tanh());
        score + self.bias.map_or(0.0, |bias| bias(at, row, j))
    }
}

impl std::fmt::Debug for Options<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Options { scale, mask, softcap, sinks, .. } = self;
        write!(f, "Options {{ {scale}, {mask:?}, softcap {softcap:?}, sinks {sinks:?}, .. }}")
    }
}

/// [`attention_with`] a scale and a mask only.
///
/// # Errors
/// Those of [`attention_with`].
pub fn attention(inputs: [Input<'_>; 3], scale: f64, mask: &dyn Pattern) -> Result<Partial> {
    attention_with(inputs, &Options::new(scale, mask))
}

/// Attention of queries `[B, T, H, Dk]` over keys `[B, S, KV, Dk]` and values `[B, S, KV, Dv]`. Query
/// head `h` reads key/value head `h / (H / KV)`; query row `i` is at position `i + S − T`. Allocates.
///
/// # Errors
/// [`Error::ShapeMismatch`], [`Error::BufferLength`], [`Error::HeadGrouping`], [`Error::LengthMismatch`] for
/// sinks, and what the mask refuses.
pub fn attention_with([q, k, v]: [Input<'_>; 3], options: &Options<'_>) -> Result<Partial> {
    check([q, k, v], options)?;
    let Shape { batch, seq: queries, heads, .. } = q.shape;
    let keys = k.shape.seq;
    let mut result = Partial { out: vec![], lse: vec![] };
    for batch in 0..batch {
        for (row, q_head) in (0..queries).flat_map(|row| (0..heads).map(move |head| (row, head))) {
            let at = Site { batch, q_head, kv_head: q_head / (heads / k.shape.heads) };
            let i = row as isize + keys as isize - queries as isize;
            let mut seen = Row::default();
            for j in (0..keys).filter(|&j| options.mask.allows(at, i, j)) {
                let (query, key) = (q.row(batch, row, q_head), k.row(batch, j, at.kv_head));
                let product = options.product(q_head, i - j as isize, query, key);
                seen.scores.push(options.score((at, row, j), product));
                seen.factors.push(options.dropout.map_or(1.0, |factor| factor(at, row, j)));
                seen.values.push(v.row(batch, j, at.kv_head));
            }
            seen.sink = options.sinks.map(|sinks| sinks[q_head]);
            result.push(&seen, v.shape.dim);
        }
    }
    Ok(result)
}

fn check([q, k, v]: [Input<'_>; 3], options: &Options<'_>) -> Result<()> {
    q.check("queries", Shape { batch: k.shape.batch, dim: k.shape.dim, ..q.shape })?;
    k.check("keys", k.shape)?;
    v.check("values", Shape { dim: v.shape.dim, ..k.shape })?;
    let (heads, kv_heads) = (q.shape.heads, k.shape.heads);
    if kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
        return Err(Error::HeadGrouping { heads, kv_heads });
    }
    if let Some(relative) = &options.relative {
        relative.check(q.shape)?;
    }
    if let Some(sinks) = options.sinks.filter(|sinks| sinks.len() != heads) {
        let what = "sinks, one a query head";
        return Err(Error::LengthMismatch { what, expected: heads, got: sinks.len() });
    }
    let Shape { batch, seq: queries, .. } = q.shape;
    options.mask.check(Extent { batch, heads, queries, keys: k.shape.seq })
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
        let mut seen = Row::default();
        for part in parts.iter().filter(|part| part.lse[row] != f64::NEG_INFINITY) {
            seen.scores.push(part.lse[row]);
            seen.factors.push(1.0);
            seen.values.push(&part.out[row * dim..][..dim]);
        }
        merged.push(&seen, dim);
    }
    Ok(merged)
}

/// What one row sees.
#[derive(Default)]
struct Row<'a> {
    scores: Vec<f64>,
    factors: Vec<f64>,
    values: Vec<&'a [f64]>,
    sink: Option<f64>,
}

impl Partial {
    /// Adds the row whose values are weighed by the softmax of its scores.
    fn push(&mut self, row: &Row<'_>, dim: usize) {
        let scores = row.scores.iter().chain(&row.sink);
        let max = scores.clone().copied().fold(f64::NEG_INFINITY, f64::max);
        // Where all scores are −∞ their weights are 0, not e^(−∞ + ∞).
        let shift = if max == f64::NEG_INFINITY { 0.0 } else { max };
        let sum: f64 = scores.map(|score| (score - shift).exp()).sum();
        let total = if sum == 0.0 { 1.0 } else { sum };
        self.lse.push(shift + sum.ln());
        self.out.extend((0..dim).map(|d| {
            let seen = row.scores.iter().zip(&row.factors).zip(&row.values);
            seen.fold(0.0, |sum, ((score, factor), value)| {
                sum + (score - shift).exp() / total * factor * value[d]
            })
        }));
    }
}
