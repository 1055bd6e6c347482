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
