//! What heads do as a rule: at the token before, at the first one, at equal ones, near or far, one or many.
//!
//! ```text
//! previous = P_{i,i−1}      first = P_{i,0}      same = Σ_{j<i, t_j = t_i} P_ij      own = P_ii
//! spread = −Σ_j P_ij ln P_ij / ln(i + 1)         distance = Σ_j (i − j) P_ij / i     means over rows i ≥ 1
//! ```
//!
//! Of texts of more than [`ROWS`] tokens, so many rows are looked at, spread evenly: cost and memory stay those of rows.

use std::ops::Range;

use crate::Error;
use crate::mixer::Attended;
use crate::model::Observer;

/// Rows that are looked at.
const ROWS: usize = 160;

/// What a head does, on average: shares of weight from 0 to 1.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Habits {
    /// Weight on the token before.
    pub previous: f32,
    /// Weight on the first token, where heads rest that have nothing to do.
    pub first: f32,
    /// Weight on earlier tokens that are the same.
    pub same: f32,
    /// Weight on the token itself.
    pub own: f32,
    /// Entropy over that of equal weights: 0 for one token, 1 for all.
    pub spread: f32,
    /// Mean distance over the greatest: 0 for the token itself, 1 for the first.
    pub distance: f32,
}

impl Habits {
    /// What one row of weights says: those on the keys at `keys`, of the token at position `i ≥ 1`.
    pub(super) fn of_row(
        weights: &[f32],
        keys: &Range<usize>,
        (tokens, i): (&[u32], usize),
    ) -> Habits {
        let at = |j: usize| if keys.contains(&j) { weights[j - keys.start] } else { 0.0 };
        let (mut same, mut entropy, mut distance) = (0.0, 0.0, 0.0);
        for (j, &w) in keys.clone().zip(weights).take_while(|(j, _)| *j <= i) {
            let w = f64::from(w);
            if w > 0.0 {
                entropy -= w * w.ln();
                distance += w * (i - j) as f64;
            }
            if j < i && tokens[j] == tokens[i] {
                same += w;
            }
        }
        Habits {
            previous: at(i - 1),
            first: at(0),
            same: same as f32,
            own: at(i),
            spread: (entropy / (i as f64 + 1.0).ln()) as f32,
            distance: (distance / i as f64) as f32,
        }
    }

    pub(super) fn add(&mut self, row: &Habits, share: f32) {
        for (sum, x) in [
            (&mut self.previous, row.previous),
            (&mut self.first, row.first),
            (&mut self.same, row.same),
            (&mut self.own, row.own),
            (&mut self.spread, row.spread),
            (&mut self.distance, row.distance),
        ] {
            *sum += share * x;
        }
    }
}

/// The rows of a text of `length` tokens that are looked at: none of the first token.
pub(super) fn rows(length: usize) -> Vec<usize> {
    let count = length.saturating_sub(1).min(ROWS);
    (0..count).map(|n| 1 + n * (length - 1) / count).collect()
}

/// Collects the habits of all heads.
pub(super) struct Watching<'a> {
    pub(super) tokens: &'a [u32],
    pub(super) rows: &'a [usize],
    /// For each layer, its heads'.
    pub(super) habits: &'a mut Vec<Vec<Habits>>,
}

impl Observer for Watching<'_> {
    fn attention(&mut self, layer: usize, attended: &Attended<'_>) -> Result<(), Error> {
        if layer == self.habits.len() {
            self.habits.push(vec![Habits::default(); attended.heads()]);
        }
        let (queries, keys) = (attended.queries(), attended.keys());
        let share = 1.0 / self.rows.len().max(1) as f32;
        for &i in self.rows.iter().filter(|row| queries.contains(row)) {
            let weights = attended.weights(i..i + 1)?;
            for (h, habits) in self.habits[layer].iter_mut().enumerate() {
                let row = weights.view().row(0, 0, h);
                habits.add(&Habits::of_row(row, &keys, (self.tokens, i)), share);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_says_what_its_formulas_say() {
        let tokens = [5, 6, 5, 7, 5];
        let found = Habits::of_row(&[0.1, 0.2, 0.3, 0.0, 0.4], &(0..5), (&tokens, 4));
        assert_eq!((found.previous, found.first, found.own), (0.0, 0.1, 0.4));
        assert!((found.same - 0.4).abs() < 1e-6);
        let entropy: f32 = [0.1f32, 0.2, 0.3, 0.4].iter().map(|w| -w * w.ln()).sum();
        assert!((found.spread - entropy / 5f32.ln()).abs() < 1e-6);
        assert!((found.distance - (0.4 + 0.6 + 0.6) / 4.0).abs() < 1e-6);
        // A window has left the first tokens behind.
        let near = Habits::of_row(&[0.75, 0.25], &(3..5), (&tokens, 4));
        assert_eq!((near.previous, near.first, near.own, near.same), (0.75, 0.0, 0.25, 0.0));
    }

    #[test]
    fn rows_are_spread_and_all_of_short_texts() {
        assert!(rows(0).is_empty() && rows(1).is_empty());
        assert_eq!(rows(5), [1, 2, 3, 4]);
        let many = rows(2000);
        assert_eq!((many.len(), many[0]), (ROWS, 1));
        assert!(many.windows(2).all(|two| two[0] < two[1]) && many[ROWS - 1] < 2000);
    }
}
