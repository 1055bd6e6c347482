//! The state of an unfinished softmax, and how two of them become one.
//!
//! ```text
//! m = max s_j      l = Σ e^(s_j − m)      a = Σ e^(s_j − m) v_j
//! merge:  m' = max(m₁, m₂)   l' = l₁ e^(m₁ − m') + l₂ e^(m₂ − m')   a' likewise
//! finish: o = a / l          log-sum-exp = m + ln l
//! ```
//!
//! Merging is associative and commutative up to rounding, and the empty state is its neutral
//! element: tiles, split key ranges, memory reads and sharded sequences are all joined by it (Milakov
//! and Gimelshein 2018; Dao et al. 2022, §3.1). Maxima are kept in base 2, as kernels compute them.

use crate::element::Element;
use crate::simd::{Level, row};
use std::f32::consts::{LN_2, LOG2_E};

/// Running maximum, sum and accumulator of one query row.
///
/// ```
/// use foveal::SoftmaxState;
/// let mut left = SoftmaxState::new(1);
/// left.push(0.0, &[1.0]);
/// let mut right = SoftmaxState::new(1);
/// right.push(0.0, &[3.0]);
/// left.merge(&right);
/// let mut out = [0.0];
/// let lse = left.finish(&mut out);
/// assert_eq!(out, [2.0]);
/// assert!((lse - 2f32.ln()).abs() < 1e-6);
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct SoftmaxState {
    max: f32,
    sum: f32,
    acc: Vec<f32>,
}

impl SoftmaxState {
    /// A row that has seen nothing yet, for values of `dim` numbers. Allocates `dim` floats.
    pub fn new(dim: usize) -> SoftmaxState {
        SoftmaxState { max: f32::NEG_INFINITY, sum: 0.0, acc: vec![0.0; dim] }
    }

    /// The state that finishes as `out` with log-sum-exp `lse`. Allocates.
    pub fn from_output(out: &[f32], lse: f32) -> SoftmaxState {
        let empty = lse == f32::NEG_INFINITY;
        let sum = if empty { 0.0 } else { 1.0 };
        let acc = if empty { vec![0.0; out.len()] } else { out.to_vec() };
        SoftmaxState { max: lse * LOG2_E, sum, acc }
    }

    /// Adds one key by its score (natural logit) and value.
    ///
    /// # Panics
    /// If the value's length is not the state's.
    pub fn push(&mut self, score: f32, value: &[f32]) {
        if score == f32::NEG_INFINITY {
            return;
        }
        self.absorb(score * LOG2_E, 1.0, value);
    }

    /// Joins the keys of another state, disjoint from this one's.
    ///
    /// # Panics
    /// If the states have values of different lengths.
    pub fn merge(&mut self, other: &SoftmaxState) {
        self.absorb(other.max, other.sum, &other.acc);
    }

    /// Writes the attention output and returns the log-sum-exp: zeros and −∞ if nothing was seen.
    ///
    /// # Panics
    /// If `out` does not have the state's length.
    pub fn finish(&self, out: &mut [f32]) -> f32 {
        assert_eq!(out.len(), self.acc.len());
        let factor = reciprocal(self.sum);
        for (out, acc) in out.iter_mut().zip(&self.acc) {
            *out = acc * factor;
        }
        log_sum_exp(self.max, self.sum)
    }

    fn absorb(&mut self, max: f32, sum: f32, acc: &[f32]) {
        assert_eq!(acc.len(), self.acc.len());
        let join = Join::new(self.max, max);
        self.max = join.max;
        self.sum = self.sum * join.keep + sum * join.add;
        for (a, b) in self.acc.iter_mut().zip(acc) {
            *a = *a * join.keep + b * join.add;
        }
    }
}

/// How two partial results are weighed against each other.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Join {
    /// The larger of the two maxima.
    pub(crate) max: f32,
    /// Weight of the first.
    pub(crate) keep: f32,
    /// Weight of the second.
    pub(crate) add: f32,
}

impl Join {
    /// Weights from two maxima in base-2 logits; two empty parts weigh 0 each.
    pub(crate) fn new(first: f32, second: f32) -> Join {
        let max = first.max(second);
        let shift = if max == f32::NEG_INFINITY { 0.0 } else { max };
        Join { max, keep: (first - shift).exp2(), add: (second - shift).exp2() }
    }
}

/// Joins the finished result of other keys, output and log-sum-exp, to one of a row. Returns the others' weight.
pub(crate) fn join_rows<E: Element>(
    level: Level,
    (out, lse): (&mut [E], &mut f32),
    (other, other_lse): (&[E], f32),
) -> f32 {
    if other_lse == f32::NEG_INFINITY {
        return 0.0;
    }
    if *lse == f32::NEG_INFINITY {
        out.copy_from_slice(other);
        *lse = other_lse;
        return 1.0;
    }
    let join = Join::new(*lse * LOG2_E, other_lse * LOG2_E);
    let sum = join.keep + join.add;
    let share = reciprocal(sum);
    row::blend(level, out, join.keep * share, other, join.add * share);
    *lse = log_sum_exp(join.max, sum);
    join.add * share
}

/// What accumulators are multiplied by in the end: 1 / sum, and 0 where nothing was seen.
pub(crate) fn reciprocal(sum: f32) -> f32 {
    if sum == 0.0 { 0.0 } else { 1.0 / sum }
}

/// The natural log-sum-exp from a base-2 maximum and the sum relative to it.
pub(crate) fn log_sum_exp(max: f32, sum: f32) -> f32 {
    if sum == 0.0 { f32::NEG_INFINITY } else { (max + sum.log2()) * LN_2 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(scores: &[f32], values: &[[f32; 2]]) -> SoftmaxState {
        let mut state = SoftmaxState::new(2);
        scores.iter().zip(values).for_each(|(&s, v)| state.push(s, v));
        state
    }

    fn close(a: &SoftmaxState, b: &SoftmaxState) {
        let (mut x, mut y) = ([f32::NAN; 2], [f32::NAN; 2]);
        let (l, m) = (a.finish(&mut x), b.finish(&mut y));
        assert!(l == m || (l - m).abs() <= 1e-6 * (1.0 + m.abs()), "{l} {m}");
        for (x, y) in x.iter().zip(&y) {
            assert!((x - y).abs() <= 1e-6 * (1.0 + y.abs()), "{x} {y}");
        }
    }

    #[test]
    fn merge_is_associative_and_commutative_with_the_empty_state_as_neutral() {
        let a = state(&[1.0, -3.0, 80.0], &[[1.0, 2.0], [3.0, -4.0], [0.5, 0.25]]);
        let b = state(&[79.0, 2.0], &[[-1.0, 7.0], [9.0, 9.0]]);
        let c = state(&[-1e4], &[[5.0, 5.0]]);
        let empty = SoftmaxState::new(2);
        let join = |x: &SoftmaxState, y: &SoftmaxState| {
            let mut z = x.clone();
            z.merge(y);
            z
        };
        close(&join(&join(&a, &b), &c), &join(&a, &join(&b, &c)));
        close(&join(&a, &b), &join(&b, &a));
        close(&join(&a, &empty), &a);
        close(&join(&empty, &a), &a);
        let mut out = [f32::NAN; 2];
        assert_eq!(join(&empty, &empty).finish(&mut out), f32::NEG_INFINITY);
        assert_eq!(out, [0.0, 0.0]);
    }

    #[test]
    fn huge_logits_do_not_overflow() {
        let s = state(&[1e4, 1e4, -1e4], &[[1.0, 0.0], [3.0, 0.0], [1e9, 1e9]]);
        let mut out = [f32::NAN; 2];
        let lse = s.finish(&mut out);
        assert_eq!(out, [2.0, 0.0]);
        assert!((lse - (1e4 + 2f32.ln())).abs() < 2e-3);
    }

    #[test]
    fn a_finished_part_merges_like_the_state_it_came_from() {
        let a = state(&[1.0, 2.0], &[[1.0, 2.0], [3.0, 4.0]]);
        let b = state(&[0.5], &[[7.0, 8.0]]);
        let mut out = [0.0; 2];
        let lse = a.finish(&mut out);
        let mut through_output = SoftmaxState::from_output(&out, lse);
        through_output.merge(&b);
        let mut direct = a.clone();
        direct.merge(&b);
        close(&through_output, &direct);
    }
}
