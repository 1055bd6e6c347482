//! Results before times: sampled rows of an output against the definition in f64.
//!
//! ```text
//! o = Σ_j softmax_j(scale · ⟨q, k_j⟩) v_j
//! ```

use crate::data::{Inputs, SEED, splitmix};
use crate::mask::Sight;
use anyhow::ensure;
use foveal::Shape;

/// Rows that are compared.
const SAMPLES: usize = 16;

/// Rows of the right output.
#[derive(Debug)]
pub(crate) struct Expected {
    shape: Shape,
    rows: Vec<Row>,
}

#[derive(Debug)]
struct Row {
    /// Its number in row-major `[batch, seq, heads]` order.
    index: usize,
    numbers: Vec<f64>,
}

impl Expected {
    /// Computes the first row, the last one, and others drawn from all.
    pub(crate) fn new(inputs: &Inputs, sight: &Sight) -> Expected {
        let shape = inputs.q.shape();
        let all = shape.batch * shape.seq * shape.heads;
        let drawn = (0..SAMPLES - 2).map(|n| (splitmix(SEED + 5, n) % all as u64) as usize);
        let mut picked: Vec<usize> = drawn.chain([0, all - 1]).collect();
        picked.sort_unstable();
        picked.dedup();
        let row = |index| Row { index, numbers: attend(inputs, sight, index) };
        Expected { shape, rows: picked.into_iter().map(row).collect() }
    }

    /// Refuses an output `[batch, seq, heads, dim]` with an error above `bound`, relative to the row's
    /// largest number.
    pub(crate) fn check(&self, out: &[f32], bound: f64) -> anyhow::Result<()> {
        let len = self.shape.checked_len();
        ensure!(len == Some(out.len()), "an output of {} numbers instead of {len:?}", out.len());
        for Row { index, numbers } in &self.rows {
            let got = &out[index * self.shape.dim..][..self.shape.dim];
            let size = numbers.iter().fold(0.0, |most: f64, x| most.max(x.abs()));
            for (d, (&got, expected)) in got.iter().zip(numbers).enumerate() {
                let error = (f64::from(got) - expected).abs();
                ensure!(
                    error <= bound * size,
                    "row {index}, number {d} is {got}, expected {expected}: off by {:.1e} of {bound:.1e}",
                    error / size
                );
            }
        }
        Ok(())
    }
}

fn attend(inputs: &Inputs, sight: &Sight, index: usize) -> Vec<f64> {
    let Inputs { q, k, v } = inputs;
    let Shape { seq, heads, dim, .. } = q.shape();
    let (batch, i, head) = (index / heads / seq, index / heads % seq, index % heads);
    let group = heads / k.shape().heads;
    let query = q.view().row(batch, i, head);
    let scale = 1.0 / (dim as f64).sqrt();
    let seen: Vec<usize> = sight.range(i).filter(|&j| sight.allows(i, j)).collect();
    let score = |&j: &usize| {
        let pairs = query.iter().zip(k.view().row(batch, j, head / group));
        scale * pairs.map(|(&q, &k)| f64::from(q) * f64::from(k)).sum::<f64>()
    };
    let scores: Vec<f64> = seen.iter().map(score).collect();
    let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = scores.iter().map(|score| (score - largest).exp()).sum();
    let mut out = vec![0.0; dim];
    for (&j, score) in seen.iter().zip(&scores) {
        let weight = (score - largest).exp() / sum;
        let value = v.view().row(batch, j, head / group);
        out.iter_mut().zip(value).for_each(|(out, &v)| *out += weight * f64::from(v));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::case::AttentionCase;
    use crate::mask::MaskSpec;

    #[test]
    fn one_wrong_number_is_refused() {
        let case = AttentionCase { seq_q: 3, seq_k: 3, dim: 4, ..AttentionCase::smallest() };
        let inputs = Inputs::new(&case).unwrap();
        let sight = Sight { mask: MaskSpec::Causal, queries: 3, keys: 3, seed: 0 };
        let expected = Expected::new(&inputs, &sight);
        let mut out: Vec<f32> = (0..3)
            .flat_map(|row| attend(&inputs, &sight, row))
            .map(|number| number as f32)
            .collect();
        expected.check(&out, 1e-6).unwrap();
        // The first row sees one key: its result is that key's value.
        assert_eq!(out[..4], inputs.v.as_slice()[..4]);
        out[11] += 1e-3;
        assert!(expected.check(&out, 1e-6).is_err());
        out[11] = f32::NAN;
        assert!(expected.check(&out, 1e-6).is_err());
        assert!(expected.check(&out[1..], 1e-6).is_err());
    }
}
