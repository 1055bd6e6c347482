//! The definitions in f64, in plain loops: what the kernels are measured against, and what gradients are differences of.

use super::infini::{Empty, Update};
use crate::error::Result;
use crate::exact::reference::{Input, Partial, attention};
use crate::linear::FeatureMap;
use crate::mask::Mask;
use crate::tensor::Shape;

/// What [`infini`] reads; shapes are those of [`Tokens`](super::infini::Tokens).
#[derive(Debug, Clone, Copy)]
pub struct Segments<'a> {
    /// Queries and keys without positions, and values.
    pub plain: [Input<'a>; 3],
    /// Queries and keys as local attention reads them.
    pub local: [Input<'a>; 2],
    /// β of each query head.
    pub gate: &'a [f64],
    /// Tokens of a segment.
    pub segment: usize,
    /// What scores are multiplied by.
    pub scale: f64,
    /// What a segment adds.
    pub update: Update,
    /// What the gate does while a memory holds nothing.
    pub empty: Empty,
}

/// The memories of all sequences and key/value heads.
#[derive(Debug, Clone, PartialEq)]
pub struct Memories {
    /// `[sequence][kv head][key][value]`.
    pub matrices: Vec<f64>,
    /// `[sequence][kv head][key]`.
    pub key_sums: Vec<f64>,
}

/// What one mapped row reads of a memory; zeros if that holds nothing.
fn read(row: &[f64], matrix: &[f64], sums: &[f64], value_dim: usize) -> Vec<f64> {
    let den: f64 = row.iter().zip(sums).map(|(x, z)| x * z).sum();
    let mut out = vec![0.0; value_dim];
    if den != 0.0 {
        for (x, row) in row.iter().zip(matrix.chunks_exact(value_dim)) {
            out.iter_mut().zip(row).for_each(|(o, m)| *o += x * m / den);
        }
    }
    out
}

/// The tokens of a range, copied.
fn cut(x: &Input<'_>, batch: usize, tokens: std::ops::Range<usize>) -> (Vec<f64>, Shape) {
    let Shape { seq, heads, dim, .. } = x.shape;
    let (row, shape) = (heads * dim, Shape { batch: 1, seq: tokens.len(), ..x.shape });
    let own = (batch * seq + tokens.start) * row..(batch * seq + tokens.end) * row;
    (x.data[own].to_vec(), shape)
}

/// Infini-attention, segment by segment. Returns the outputs and leaves the final memories. Allocates.
///
/// # Errors
/// Those of [`attention`].
pub fn infini(call: &Segments<'_>, memories: &mut Memories) -> Result<Vec<f64>> {
    let [q, k, v] = call.plain;
    let (out, group) = (Shape { dim: v.shape.dim, ..q.shape }, q.shape.heads / k.shape.heads);
    let mut result = vec![0.0; out.batch * out.seq * out.heads * out.dim];
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    for batch in 0..out.batch {
        for start in (0..out.seq).step_by(call.segment) {
            let tokens = start..out.seq.min(start.saturating_add(call.segment));
            let own = [call.local[0], call.local[1], v].map(|x| cut(&x, batch, tokens.clone()));
            let inputs = [0, 1, 2].map(|n| Input { data: &own[n].0, shape: own[n].1 });
            let Partial { out: local, .. } = attention(inputs, call.scale, &Mask::causal())?;
            for h in 0..out.heads {
                let (matrix, sums) = memories.of(batch * k.shape.heads + h / group, &k, &v);
                let nothing = sums.iter().all(|&z| z == 0.0);
                let g = sigmoid(call.gate[h]);
                let (g, keep) = match nothing && call.empty == Empty::Bypassed {
                    true => (0.0, 1.0),
                    false => (g, 1.0 - g),
                };
                for t in tokens.clone() {
                    let read = read(&mapped(&q, [batch, t, h]), matrix, sums, out.dim);
                    let at = ((batch * out.seq + t) * out.heads + h) * out.dim;
                    let near = ((t - start) * out.heads + h) * out.dim;
                    for d in 0..out.dim {
                        result[at + d] = g * read[d] + keep * local[near + d];
                    }
                }
            }
            if tokens.len() == call.segment {
                for h in 0..k.shape.heads {
                    write(call, [batch, start, h], memories);
                }
            }
        }
    }
    Ok(result)
}

impl Memories {
    fn of(&mut self, unit: usize, k: &Input<'_>, v: &Input<'_>) -> (&mut [f64], &mut [f64]) {
        let (keys, values) = (k.shape.dim, v.shape.dim);
        let matrix = &mut self.matrices[unit * keys * values..][..keys * values];
        (matrix, &mut self.key_sums[unit * keys..][..keys])
    }
}

fn row<'a>(x: &Input<'a>, [batch, t, head]: [usize; 3]) -> &'a [f64] {
    let Shape { seq, heads, dim, .. } = x.shape;
    &x.data[((batch * seq + t) * heads + head) * dim..][..dim]
}

/// σ of a row.
fn mapped(x: &Input<'_>, at: [usize; 3]) -> Vec<f64> {
    row(x, at).iter().map(|&x| FeatureMap::EluPlusOne.apply(x)).collect()
}

/// The whole segment at once, by the memory before it.
fn write(call: &Segments<'_>, [batch, start, h]: [usize; 3], memories: &mut Memories) {
    let [_, k, v] = call.plain;
    let (matrix, sums) = memories.of(batch * k.shape.heads + h, &k, &v);
    let before = (matrix.to_vec(), sums.to_vec());
    for t in start..start + call.segment {
        let key = mapped(&k, [batch, t, h]);
        let mut value = row(&v, [batch, t, h]).to_vec();
        if call.update == Update::Delta {
            let own = read(&key, &before.0, &before.1, v.shape.dim);
            value.iter_mut().zip(own).for_each(|(v, r)| *v -= r);
        }
        for (x, row) in key.iter().zip(matrix.chunks_exact_mut(v.shape.dim)) {
            row.iter_mut().zip(&value).for_each(|(m, v)| *m += x * v);
        }
        sums.iter_mut().zip(&key).for_each(|(z, x)| *z += x);
    }
}

/// What [`memorizing`] reads; shapes are those of [`Tokens`](super::memorizing::Tokens), for any number of sequences.
#[derive(Debug, Clone, Copy)]
pub struct Memorized<'a> {
    /// Queries, keys and values.
    pub tokens: [Input<'a>; 3],
    /// Keys and values as later segments remember them: the same, or constants where differences are taken.
    pub past: [Input<'a>; 2],
    /// β of each query head.
    pub gate: &'a [f64],
    /// s of each query head.
    pub scale: &'a [f64],
    /// Bias of local attention, `[segment][heads][window]`.
    pub bias: Option<&'a [f64]>,
    /// Entries that are retrieved, where differences are taken; found otherwise. `[batch][token][head][top]`.
    pub selected: Option<&'a [Option<usize>]>,
    /// Tokens of a segment.
    pub segment: usize,
    /// Entries of a query.
    pub top: usize,
    /// Tokens that are remembered.
    pub capacity: usize,
    /// Whether local attention sees the segment before.
    pub previous: bool,
}

/// What [`memorizing`] gives, row-major.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Retrieved {
    /// Outputs.
    pub out: Vec<f64>,
    /// Local attention.
    pub local: Vec<f64>,
    /// Attention to what was retrieved.
    pub memory: Vec<f64>,
    /// Positions of what was retrieved, best first.
    pub selected: Vec<Option<usize>>,
}

/// The Memorizing Transformer's attention from the beginning of a document on, query by query. Allocates.
pub fn memorizing(call: &Memorized<'_>) -> Retrieved {
    let [q, _, v] = call.tokens;
    let mut result = Retrieved::default();
    for batch in 0..q.shape.batch {
        for t in 0..q.shape.seq {
            for head in 0..q.shape.heads {
                let site = Site { call, batch, t, head };
                let local = site.local();
                let selected = site.selected();
                let memory = site.retrieve(&selected);
                let g = 1.0 / (1.0 + (-call.gate[head]).exp());
                let mixed = memory.iter().zip(&local).map(|(m, l)| g * m + (1.0 - g) * l);
                result.out.extend(mixed);
                result.local.extend(local);
                result.memory.extend(memory);
                result.selected.extend(selected);
            }
        }
    }
    debug_assert_eq!(result.out.len() * q.shape.dim, q.data.len() * v.shape.dim);
    result
}

/// One query.
struct Site<'a> {
    call: &'a Memorized<'a>,
    batch: usize,
    t: usize,
    head: usize,
}

impl Site<'_> {
    fn unit(&self, x: &Input<'_>, t: usize, head: usize) -> Vec<f64> {
        let row = row(x, [self.batch, t, head]);
        let norm = (row.iter().map(|x| x * x).sum::<f64>() + 1e-6).sqrt();
        row.iter().map(|x| x / norm).collect()
    }

    fn kv_head(&self) -> usize {
        self.head * self.call.tokens[1].shape.heads / self.call.tokens[0].shape.heads
    }

    fn start(&self) -> usize {
        self.t / self.call.segment * self.call.segment
    }

    /// q̂ · k̂ of a token as its own segment knows it, or as the past does.
    fn product(&self, j: usize, past: bool) -> f64 {
        let keys = if past { &self.call.past[0] } else { &self.call.tokens[1] };
        let q = self.unit(&self.call.tokens[0], self.t, self.head);
        let k = self.unit(keys, j, self.kv_head());
        q.iter().zip(&k).map(|(a, b)| a * b).sum()
    }

    /// Σ softmax(|s| score) value.
    fn softmax(&self, seen: &[(f64, &[f64])]) -> Vec<f64> {
        let mut out = vec![0.0; self.call.tokens[2].shape.dim];
        let scale = self.call.scale[self.head].abs();
        let max = seen.iter().fold(f64::NEG_INFINITY, |max, x| max.max(scale * x.0));
        let sum: f64 = seen.iter().map(|x| (scale * x.0 - max).exp()).sum();
        for (score, value) in seen {
            let weight = (scale * score - max).exp() / sum;
            out.iter_mut().zip(*value).for_each(|(o, v)| *o += weight * v);
        }
        out
    }

    fn local(&self) -> Vec<f64> {
        let Memorized { segment, previous, bias, .. } = *self.call;
        let start = self.start();
        let first = if previous { start.saturating_sub(segment) } else { start };
        let window = if previous { 2 * segment } else { segment };
        let heads = self.call.tokens[0].shape.heads;
        let seen: Vec<_> = (first..=self.t)
            .map(|j| {
                let past = j < start;
                let values = if past { &self.call.past[1] } else { &self.call.tokens[2] };
                let column = j + window - segment - start;
                let row_of = ((self.t - start) * heads + self.head) * window;
                let bias = bias.map_or(0.0, |bias| bias[row_of + column]);
                let value = row(values, [self.batch, j, self.kv_head()]);
                (self.product(j, past) + bias, value)
            })
            .collect();
        self.softmax(&seen)
    }

    /// The entries of this query, best first.
    fn selected(&self) -> Vec<Option<usize>> {
        let Memorized { top, capacity, selected, .. } = *self.call;
        if let Some(selected) = selected {
            let Shape { seq, heads, .. } = self.call.tokens[0].shape;
            let at = ((self.batch * seq + self.t) * heads + self.head) * top;
            return selected[at..at + top].to_vec();
        }
        let start = self.start();
        let mut scores: Vec<(f64, usize)> =
            (start.saturating_sub(capacity)..start).map(|j| (self.product(j, true), j)).collect();
        scores.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        (0..top).map(|n| scores.get(n).map(|x| x.1)).collect()
    }

    fn retrieve(&self, selected: &[Option<usize>]) -> Vec<f64> {
        let seen: Vec<_> = selected
            .iter()
            .flatten()
            .map(|&j| {
                let value = row(&self.call.past[1], [self.batch, j, self.kv_head()]);
                (self.product(j, true), value)
            })
            .collect();
        self.softmax(&seen)
    }
}
