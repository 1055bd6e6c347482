//! The definitions in f64: every mechanism, one token after the other, in plain loops.
//!
//! What the kernels are measured against; gradients are held to differences of it.

use super::{Recurrence, StateShape};
use crate::exact::reference::Input;
use crate::problem::Scale;

/// The state of one head.
#[derive(Debug, Clone, PartialEq)]
pub struct Memory {
    /// S, one row of values for each key channel.
    pub matrix: Vec<f64>,
    /// z, one number for each key channel; empty without a normaliser.
    pub key_sum: Vec<f64>,
    value_dim: usize,
}

impl Memory {
    /// S ← S + k vᵀ.
    pub fn write(&mut self, k: &[f64], v: &[f64]) {
        for (row, k) in self.matrix.chunks_exact_mut(self.value_dim).zip(k) {
            row.iter_mut().zip(v).for_each(|(s, v)| *s += k * v);
        }
    }

    /// out = Sᵀ q.
    pub fn read(&self, q: &[f64], out: &mut [f64]) {
        out.fill(0.0);
        for (row, q) in self.matrix.chunks_exact(self.value_dim).zip(q) {
            out.iter_mut().zip(row).for_each(|(o, s)| *o += q * s);
        }
    }

    /// S ← diag(a) S; one number for all rows, or one for each.
    pub fn decay(&mut self, a: &[f64]) {
        for (n, row) in self.matrix.chunks_exact_mut(self.value_dim).enumerate() {
            let a = a[n.min(a.len() - 1)];
            row.iter_mut().for_each(|s| *s *= a);
        }
    }
}

/// One token of one head, after feature map and padding.
#[derive(Debug, Clone, Copy)]
pub struct Token<'a> {
    /// Mapped query.
    pub q: &'a [f64],
    /// Mapped key.
    pub k: &'a [f64],
    /// Value.
    pub v: &'a [f64],
    /// What the state is multiplied by: one number, or one a key channel; empty if the mechanism has none.
    pub decay: &'a [f64],
    /// Writing strength.
    pub beta: f64,
}

/// What [`forward`] reads; the shapes are those of [`Tokens`](super::Tokens).
#[derive(Debug, Clone, Copy)]
pub struct Sequences<'a> {
    /// Queries.
    pub q: Input<'a>,
    /// Keys.
    pub k: Input<'a>,
    /// Values.
    pub v: Input<'a>,
    /// Logarithms of decays.
    pub log_decay: Option<Input<'a>>,
    /// Writing strengths.
    pub beta: Option<Input<'a>>,
    /// Which tokens are real.
    pub present: Option<&'a [bool]>,
    /// Where packed sequences begin and end.
    pub cuts: Option<&'a [usize]>,
}

/// The states of all sequences and heads.
#[derive(Debug, Clone, PartialEq)]
pub struct States {
    /// `[sequence][head][key][value]`.
    pub matrices: Vec<f64>,
    /// `[sequence][head][key]`, or empty.
    pub key_sums: Vec<f64>,
}

impl States {
    /// States that have seen nothing.
    pub fn zeros(shape: StateShape, normaliser: bool) -> States {
        let keys = shape.sequences * shape.heads * shape.key_dim;
        States {
            matrices: vec![0.0; keys * shape.value_dim],
            key_sums: vec![0.0; if normaliser { keys } else { 0 }],
        }
    }
}

/// The outputs `[B, T, H, Dv]`; states are carried on.
///
/// # Panics
/// If shapes do not fit together.
pub fn forward<R: Recurrence>(
    mechanism: &R,
    sequences: &Sequences<'_>,
    states: &mut States,
) -> Vec<f64> {
    let (q, v) = (sequences.q.shape, sequences.v.shape);
    let mut out = vec![0.0; sequences.v.data.len()];
    let form = mechanism.form();
    let scale = match mechanism.scale() {
        Scale::InverseSqrtDim => (q.dim as f64).powf(-0.5),
        Scale::Value(scale) => f64::from(scale),
    };
    let whole: Vec<(usize, std::ops::Range<usize>)> = match sequences.cuts {
        Some(cuts) => cuts.windows(2).map(|cut| (0, cut[0]..cut[1])).collect(),
        None => (0..q.batch).map(|batch| (batch, 0..q.seq)).collect(),
    };
    let row = |input: Input<'_>, b: usize, t: usize, h: usize| {
        let at = ((b * input.shape.seq + t) * input.shape.heads + h) * input.shape.dim;
        input.data[at..at + input.shape.dim].to_vec()
    };
    for (n, (b, tokens)) in whole.into_iter().enumerate() {
        for h in 0..v.heads {
            let unit = n * v.heads + h;
            let (size, keys) = (q.dim * v.dim, if form.normaliser { q.dim } else { 0 });
            let mut memory = Memory {
                matrix: states.matrices[unit * size..(unit + 1) * size].to_vec(),
                key_sum: states.key_sums[unit * keys..(unit + 1) * keys].to_vec(),
                value_dim: v.dim,
            };
            for t in tokens.clone() {
                let group = h * q.heads / v.heads;
                let map = |x: f64| form.map.apply(x);
                let here = sequences.present.is_none_or(|present| present[b * q.seq + t]);
                let zero_unless = |x: Vec<f64>| if here { x } else { vec![0.0; x.len()] };
                let fixed = mechanism.fixed_decay(h).map(|a| vec![f64::from(a)]);
                let given = sequences.log_decay.map(|input| row(input, b, t, h));
                let given = given.map(|log| log.iter().map(|x| x.exp()).collect());
                let token = Token {
                    q: &row(sequences.q, b, t, group).into_iter().map(map).collect::<Vec<_>>(),
                    k: &zero_unless(row(sequences.k, b, t, group).into_iter().map(map).collect()),
                    v: &zero_unless(row(sequences.v, b, t, h)),
                    decay: &fixed.or(given).unwrap_or_default(),
                    beta: sequences.beta.map_or(1.0, |input| row(input, b, t, h)[0]),
                };
                let at = ((b * v.seq + t) * v.heads + h) * v.dim;
                let out = &mut out[at..at + v.dim];
                mechanism.step(&mut memory, &token, out);
                out.iter_mut().for_each(|o| *o *= scale);
            }
            states.matrices[unit * size..(unit + 1) * size].copy_from_slice(&memory.matrix);
            states.key_sums[unit * keys..(unit + 1) * keys].copy_from_slice(&memory.key_sum);
        }
    }
    out
}
