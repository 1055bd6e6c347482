//! The definitions in f64: every mechanism, one token after the other, in plain loops.
//!
//! What the kernels are measured against; gradients are held to differences of it.

use super::gather::Role;
use super::{Recurrence, StateShape};
use crate::exact::reference::Input;
use crate::problem::Scale;

/// The state of one head.
#[derive(Debug, Clone, PartialEq)]
pub struct Memory {
    /// S, one row of values for each key channel.
    pub matrix: Vec<f64>,
    /// z, one number for each sum and key channel; empty without any.
    pub key_sum: Vec<f64>,
    /// Numbers of a row.
    pub value_dim: usize,
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
    /// `[sequence][head][sum][key]`, or empty.
    pub key_sums: Vec<f64>,
}

impl States {
    /// States that have seen nothing.
    pub fn zeros(shape: StateShape, sums: usize) -> States {
        let keys = shape.sequences * shape.heads * shape.key_dim;
        States { matrices: vec![0.0; keys * shape.value_dim], key_sums: vec![0.0; sums * keys] }
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
    run(mechanism, sequences, states, false)
}

/// The outputs `[B, T, H, Dv]` of queries that read what all keys have written: those are tokens without queries, and
/// queries come after them as tokens without keys.
///
/// # Panics
/// If shapes do not fit together.
pub fn forward_bidirectional<R: Recurrence>(
    mechanism: &R,
    sequences: &Sequences<'_>,
    states: &mut States,
) -> Vec<f64> {
    run(mechanism, sequences, states, true)
}

fn run<R: Recurrence>(
    mechanism: &R,
    sequences: &Sequences<'_>,
    states: &mut States,
    bidirectional: bool,
) -> Vec<f64> {
    let (q, v) = (sequences.q.shape, sequences.v.shape);
    let mut out = vec![0.0; q.batch * q.seq * v.heads * v.dim];
    let scale = match mechanism.scale() {
        Scale::InverseSqrtDim => (q.dim as f64).powf(-0.5),
        Scale::Value(scale) => f64::from(scale),
    };
    let whole: Vec<(usize, std::ops::Range<usize>)> = match sequences.cuts {
        Some(cuts) => cuts.windows(2).map(|cut| (0, cut[0]..cut[1])).collect(),
        None => (0..v.batch).map(|batch| (batch, 0..v.seq)).collect(),
    };
    let rows = mechanism.mapped_dim(q.dim).expect("keys as the mechanism takes them");
    let (size, sums) = (rows * v.dim, mechanism.form().sums * rows);
    for (n, (b, tokens)) in whole.into_iter().enumerate() {
        let steps: Vec<(Option<usize>, Option<usize>)> = match bidirectional {
            false => tokens.map(|t| (Some(t), Some(t))).collect(),
            true => {
                let queries = (0..q.seq).map(|t| (Some(t), None));
                tokens.map(|t| (None, Some(t))).chain(queries).collect()
            }
        };
        for h in 0..v.heads {
            let unit = n * v.heads + h;
            let mut memory = Memory {
                matrix: states.matrices[unit * size..(unit + 1) * size].to_vec(),
                key_sum: states.key_sums[unit * sums..(unit + 1) * sums].to_vec(),
                value_dim: v.dim,
            };
            for &(query, key) in &steps {
                let Numbers { q: mapped, k, v: value, decay, beta } =
                    sequences.numbers(mechanism, (b, h), query, key);
                let token = Token { q: &mapped, k: &k, v: &value, decay: &decay, beta };
                let mut row = vec![0.0; v.dim];
                mechanism.step(&mut memory, &token, &mut row);
                if let Some(t) = query {
                    let at = ((b * q.seq + t) * v.heads + h) * v.dim;
                    let out = &mut out[at..at + v.dim];
                    out.iter_mut().zip(&row).for_each(|(out, x)| *out = x * scale);
                }
            }
            states.matrices[unit * size..(unit + 1) * size].copy_from_slice(&memory.matrix);
            states.key_sums[unit * sums..(unit + 1) * sums].copy_from_slice(&memory.key_sum);
        }
    }
    out
}

/// What a token brings.
struct Numbers {
    q: Vec<f64>,
    k: Vec<f64>,
    v: Vec<f64>,
    decay: Vec<f64>,
    beta: f64,
}

impl Sequences<'_> {
    /// The numbers of a token of a sequence and value head: of its query, and of its key, value and gates.
    fn numbers<R: Recurrence>(
        &self,
        mechanism: &R,
        (b, h): (usize, usize),
        query: Option<usize>,
        key: Option<usize>,
    ) -> Numbers {
        let row = |input: Input<'_>, t: usize, h: usize| {
            let at = ((b * input.shape.seq + t) * input.shape.heads + h) * input.shape.dim;
            input.data[at..at + input.shape.dim].to_vec()
        };
        let (form, group) = (mechanism.form(), h * self.q.shape.heads / self.v.shape.heads);
        let mapped = |role, x: Vec<f64>| match mechanism.row_maps() {
            Some(maps) => maps.define(role, &x),
            None => x.into_iter().map(|x| form.map.apply(x)).collect(),
        };
        let rows = mechanism.mapped_dim(self.q.shape.dim).expect("checked before");
        let here = |t: &usize| self.present.is_none_or(|present| present[b * self.k.shape.seq + t]);
        let (key, decay) = (key.filter(here), key);
        let fixed = mechanism.fixed_decay(h).map(|a| vec![f64::from(a)]);
        let given = self.log_decay.zip(decay).map(|(input, t)| row(input, t, h));
        let given = given.map(|log| log.iter().map(|x| x.exp()).collect());
        let absent = vec![f64::from(form.absent); rows];
        Numbers {
            q: query.map_or(vec![0.0; rows], |t| mapped(Role::Query, row(self.q, t, group))),
            k: key.map_or(absent, |t| mapped(Role::Key, row(self.k, t, group))),
            v: key.map_or(vec![0.0; self.v.shape.dim], |t| row(self.v, t, h)),
            decay: fixed.or(given).unwrap_or_default(),
            beta: self.beta.zip(decay).map_or(1.0, |(input, t)| row(input, t, h)[0]),
        }
    }
}
