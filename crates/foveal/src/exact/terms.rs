//! What is done to scores between the product and the values: cap, biases, sinks, dropout.
//!
//! ```text
//! s_ij = scale ⟨q_i, k_j⟩        s ← cap · tanh(s / cap)        s ← s + bias_ij − slope_h |i − j| + table[bucket(i − j), h]
//! (with a relative encoding:  s_ij = scale (⟨q_i + u_h, k_j⟩ + ⟨q_i + v_h, r_h(i − j)⟩))
//! mask: s ← −∞                   lse_i = ln(Σ_j e^(s_ij) + e^(sink_h))
//! P_ij = e^(s_ij − lse_i)        o_i = Σ_j P_ij Z_ij v_j,   Z ∈ {0, 1/keep}
//! ```
//!
//! Soft cap: Gemma 2 (2024), §2. Linear biases: Press et al. 2022. Bucketed biases: Raffel et al. 2020. Sinks:
//! gpt-oss (2025). Dropout: Vaswani et al. 2017, §5.4, with random bits that depend on nothing but seed, sequence,
//! head and the two positions, so that a backward pass makes them again.

use super::Factor;
use crate::element::DType;
use crate::error::{Error, Result};
use crate::position::{RelativeBias, RelativeEncoding, Slopes};
use crate::random::mix;
use crate::simd::Level;
use crate::simd::product::Form;
use crate::simd::terms::{GroupTerms, RowDropout, RowTerms, drop_row, finish_group};
use crate::simd::tile::{GROUP, KEY_TILE, Visible};
use crate::tensor::{Shape, TensorRef};
use std::fmt;
use std::ops::Range;

/// Weights that are left out at random while a model is trained.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dropout {
    /// The part of the weights that is left out, in `0.0..1.0`. The others are divided by `1 − rate`.
    pub rate: f32,
    /// What the choice depends on, with sequence, head and positions: the same seed, the same choice.
    pub seed: u64,
}

impl Dropout {
    /// What weight (`i`, `j`) of a query head is multiplied by: 0 or 1 / (1 − rate). Positions are absolute.
    pub fn factor(&self, (batch, head): (usize, usize), i: isize, j: usize) -> f32 {
        let row = self.row((batch, head), i);
        if row.keeps(j) { row.factor } else { 0.0 }
    }

    /// What is dropped of a row.
    pub(crate) fn row(&self, (batch, head): (usize, usize), i: isize) -> RowDropout {
        let at = [batch as u64, head as u64, i as u64];
        let key = at.into_iter().fold(mix(self.seed), |key, x| mix(key ^ x));
        let keep = 1.0 - f64::from(self.rate);
        RowDropout {
            keys: [key as u32, (key >> 32) as u32],
            first: 0,
            most: ((keep * (1u64 << 32) as f64) as u64 - 1) as u32,
            factor: (1.0 / keep) as f32,
        }
    }
}

/// The terms of a call.
#[derive(Debug, Clone, Default)]
pub(crate) struct Terms<'a> {
    pub(crate) softcap: Option<f32>,
    /// `[batch, queries, heads, keys]`; extents of 1 are shared.
    pub(crate) bias: Option<TensorRef<'a, f32>>,
    pub(crate) alibi: Option<Slopes<'a>>,
    pub(crate) relative: Option<RelativeBias<'a>>,
    pub(crate) encoding: Option<RelativeEncoding<'a>>,
    /// One logit for each query head.
    pub(crate) sinks: Option<&'a [f32]>,
    pub(crate) dropout: Option<Dropout>,
}

/// A query row of a call.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RowSite {
    pub(crate) batch: usize,
    pub(crate) head: usize,
    /// Its number among the call's queries.
    pub(crate) query: usize,
    pub(crate) position: isize,
}

impl Terms<'_> {
    /// Whether a head's terms depend on its number, or on the number of heads.
    pub(crate) fn by_head(&self) -> bool {
        let Terms { softcap: _, bias, alibi, relative, encoding, sinks, dropout } = self;
        let biased = bias.is_some() || alibi.is_some() || relative.is_some();
        biased || encoding.is_some() || sinks.is_some() || dropout.is_some()
    }

    /// Whether something depends on where queries and keys are.
    pub(crate) fn by_position(&self) -> bool {
        let Terms { bias, alibi, relative, encoding, dropout, .. } = self;
        let biased = bias.is_some() || alibi.is_some() || relative.is_some();
        biased || encoding.is_some() || dropout.is_some()
    }

    /// Refuses numbers that do not fit queries `q` and `keys` keys.
    pub(crate) fn check(&self, q: Shape, keys: usize) -> Result<()> {
        let invalid = |what, expected, got: f32| {
            Err(Error::InvalidParameter { what, expected, got: got.to_string() })
        };
        if let Some(cap) = self.softcap.filter(|cap| !(cap.is_finite() && *cap > 0.0)) {
            return invalid("softcap", "a finite number above 0", cap);
        }
        if let Some(Dropout { rate, .. }) = self.dropout
            && !(0.0..1.0).contains(&rate)
        {
            return invalid("dropout rate", "0 to 1, without 1", rate);
        }
        if let Some(bias) = self.bias {
            let got = bias.shape();
            let one = |extent: usize, full: usize| if extent == 1 { 1 } else { full };
            let expected = Shape {
                batch: one(got.batch, q.batch),
                seq: one(got.seq, q.seq),
                heads: one(got.heads, q.heads),
                dim: keys,
            };
            if got != expected {
                let what =
                    "a bias is [batch, queries, heads, keys], the first three of the call or 1";
                return Err(Error::ShapeMismatch { what, expected, got });
            }
        }
        if let Some(encoding) = &self.encoding {
            let got = encoding.shape();
            let expected = Shape { heads: q.heads, dim: q.dim, ..got };
            if got != expected {
                let what = "keys by distance are [1, distances, query heads, key dimension]";
                return Err(Error::ShapeMismatch { what, expected, got });
            }
        }
        let slopes = match self.alibi {
            Some(Slopes::Given(slopes)) => Some(slopes.len()),
            _ => None,
        };
        let relative = self.relative.as_ref().map(RelativeBias::heads);
        for (what, got) in [
            ("ALiBi slopes, one a query head", slopes),
            ("sinks, one a query head", self.sinks.map(<[f32]>::len)),
            ("columns of the relative bias table, one a query head", relative),
        ] {
            if let Some(got) = got.filter(|&got| got != q.heads) {
                return Err(Error::LengthMismatch { what, expected: q.heads, got });
            }
        }
        Ok(())
    }

    /// Refuses a cache that has grown beyond a dense bias.
    pub(crate) fn check_end(&self, end: usize) -> Result<()> {
        match self.bias.map(|bias| bias.shape().dim) {
            Some(limit) if limit < end => Err(Error::OutOfRange {
                what: "the newest key of a cache, for a bias,",
                got: end - 1,
                limit,
            }),
            _ => Ok(()),
        }
    }

    /// Whether products go into the softmax as they are.
    pub(crate) fn plain(&self) -> bool {
        self.softcap.is_none()
            && self.bias.is_none()
            && self.alibi.is_none()
            && self.relative.is_none()
            && self.encoding.is_none()
    }

    /// How products of factors of these storage types are computed. Queries that an encoding moves are numbers.
    pub(crate) fn form(&self, level: Level, factors: [DType; 2]) -> Form {
        if self.encoding.is_some() { Form::Numbers(level) } else { Form::of(level, factors) }
    }

    /// The sink of a head as a logit in base 2; −∞ is none.
    pub(crate) fn sink(&self, head: usize) -> f32 {
        self.sinks.map_or(f32::NEG_INFINITY, |sinks| sinks[head] * std::f32::consts::LOG2_E)
    }

    /// The slope of a head; 0 is none.
    pub(crate) fn slope(&self, head: usize, heads: usize) -> f32 {
        self.alibi.map_or(0.0, |slopes| slopes.of(head, heads))
    }

    /// Leaves out weights `[row][KEY_TILE]` of a group's rows for the keys at `positions`, if the call has
    /// dropout.
    pub(crate) fn drop(
        &self,
        level: Level,
        rows: impl Iterator<Item = RowSite>,
        positions: &Range<usize>,
        weights: &mut [f32],
    ) {
        let Some(dropout) = self.dropout else { return };
        for (at, weights) in rows.zip(weights.chunks_exact_mut(KEY_TILE)) {
            let row = dropout.row((at.batch, at.head), at.position);
            let row = RowDropout { first: positions.start, ..row };
            drop_row(level, row, &mut weights[..positions.len()]);
        }
    }
}

/// Products by distance of a group of rows: those of row n begin at `first + n * stride`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ByDistance<'a> {
    pub(crate) floats: &'a [f32],
    pub(crate) first: usize,
    pub(crate) stride: usize,
}

impl<'a> ByDistance<'a> {
    fn row(&self, n: usize) -> &'a [f32] {
        &self.floats[self.first + n * self.stride..][..KEY_TILE]
    }
}

/// A group of rows against the keys of a tile, between the product and the softmax.
#[derive(Debug)]
pub(crate) struct Finish<'a> {
    pub(crate) level: Level,
    pub(crate) factor: Factor,
    /// Query heads of the call.
    pub(crate) heads: usize,
    /// The keys of the scores.
    pub(crate) positions: Range<usize>,
    pub(crate) visible: Visible<'a>,
    /// Added to products, where the call has a relative encoding.
    pub(crate) by_distance: Option<ByDistance<'a>>,
    /// `[row][KEY_TILE]`.
    pub(crate) scores: &'a mut [f32],
    /// Out: the largest score of each row, in base 2.
    pub(crate) max: &'a mut [f32; GROUP],
    /// Out: the derivative of the cap, `[row][KEY_TILE]`, if asked for.
    pub(crate) bend: Option<&'a mut [f32]>,
}

impl Terms<'_> {
    /// Turns products into scores, and returns what they are then to be multiplied by to be logits of
    /// base 2. Products of [`Terms::plain`] calls stay as they are.
    pub(crate) fn finish(&self, rows: impl Iterator<Item = RowSite>, finish: Finish<'_>) -> f32 {
        if self.plain() {
            return finish.factor.factor;
        }
        let Finish { level, factor, heads, positions, visible, by_distance, scores, max, bend } =
            finish;
        let mut sums = self.relative.as_ref().map(|_| [[0.0; KEY_TILE]; GROUP]);
        let mut sums = sums.iter_mut().flatten();
        let (mut group, mut n) = ([RowTerms::default(); GROUP], 0);
        // Powers take longer than anything else here, and rows are mostly of one head.
        let mut last = (usize::MAX, 0.0);
        for (at, row) in rows.zip(&mut group) {
            let sum = sums.next().map_or(&mut [][..], |sum| &mut sum[..]);
            if last.0 != at.head {
                last = (at.head, self.slope(at.head, heads));
            }
            *row = RowTerms {
                product: by_distance.map_or(&[][..], |products| products.row(n)),
                slope: last.1,
                distance: (positions.start as isize - at.position) as f32,
                bias: self.row_bias(at, &positions, sum).unwrap_or_default(),
            };
            n += 1;
        }
        let (scale, cap, rows) = (factor.magnitude(), self.softcap, &group[..n]);
        finish_group(level, GroupTerms { scores, visible, scale, cap, rows, max, bend });
        1.0
    }

    /// One score from its product, in natural logits, with the derivative of the cap.
    pub(crate) fn pair(&self, at: RowSite, j: usize, (product, heads): (f64, usize)) -> (f64, f64) {
        let (mut score, mut bend) = (product, 1.0);
        if let Some(cap) = self.softcap.map(f64::from) {
            let tanh = (product / cap).tanh();
            (score, bend) = (cap * tanh, 1.0 - tanh * tanh);
        }
        let distance = at.position - j as isize;
        score -= f64::from(self.slope(at.head, heads)) * distance.unsigned_abs() as f64;
        let mut buffer = [0.0; KEY_TILE];
        let bias = self.row_bias(at, &(j..j + 1), &mut buffer);
        (score + bias.map_or(0.0, |bias| f64::from(bias[0])), bend)
    }

    /// What is added to the scores of a row: the bias where it lies, or the sum of both kinds.
    fn row_bias<'b>(
        &'b self,
        at: RowSite,
        positions: &Range<usize>,
        buffer: &'b mut [f32],
    ) -> Option<&'b [f32]> {
        let shared = |index, extent| if extent == 1 { 0 } else { index };
        let dense = self.bias.as_ref().map(|bias| {
            let Shape { batch, seq, heads, .. } = bias.shape();
            let row =
                bias.row(shared(at.batch, batch), shared(at.query, seq), shared(at.head, heads));
            &row[positions.clone()]
        });
        let Some(relative) = &self.relative else { return dense };
        let sum = &mut buffer[..positions.len()];
        match dense {
            Some(dense) => sum.copy_from_slice(dense),
            None => sum.fill(0.0),
        }
        relative.add(at.head, at.position - positions.start as isize, sum);
        Some(sum)
    }
}

impl fmt::Display for Terms<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut words = vec![];
        words.extend(self.softcap.map(|cap| format!("softcap {cap}")));
        words.extend(self.bias.map(|_| "bias".to_owned()));
        words.extend(self.alibi.map(|_| "ALiBi".to_owned()));
        let buckets = self.relative.as_ref().map(RelativeBias::buckets);
        words.extend(buckets.map(|buckets| format!("relative bias in {buckets} buckets")));
        let distances = self.encoding.map(|encoding| encoding.shape().seq);
        words.extend(distances.map(|n| format!("relative encoding of {n} distances")));
        words.extend(self.sinks.map(|_| "sinks".to_owned()));
        words.extend(self.dropout.map(|dropout| format!("dropout {}", dropout.rate)));
        f.write_str(if words.is_empty() { "none" } else { "" })?;
        f.write_str(&words.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::Dropout;

    #[test]
    fn dropout_is_even_and_depends_on_everything() {
        let dropout = Dropout { rate: 0.25, seed: 7 };
        let kept = |dropout: Dropout, batch, head, i: isize| -> Vec<bool> {
            (0..4000).map(|j| dropout.factor((batch, head), i, j) > 0.0).collect()
        };
        let base = kept(dropout, 0, 0, 5);
        for other in [
            kept(Dropout { seed: 8, ..dropout }, 0, 0, 5),
            kept(dropout, 1, 0, 5),
            kept(dropout, 0, 1, 5),
            kept(dropout, 0, 0, 6),
            kept(dropout, 0, 0, -5),
        ] {
            let both = base.iter().zip(&other).filter(|(a, b)| **a && **b).count();
            // Independent: 0.75² of 4000 = 2250, standard deviation 31.
            assert!((2100..2400).contains(&both), "{both}");
        }
        let all = Dropout { rate: 0.0, seed: 7 };
        assert_eq!(all.row((0, 0), 5).most, u32::MAX);
        let rarely = Dropout { rate: 1.0 - f32::EPSILON / 2.0, seed: 7 };
        assert_eq!(rarely.row((0, 0), 5).most, 255);
        let count = base.iter().filter(|&&kept| kept).count();
        assert!((2880..3120).contains(&count), "{count}");
        assert!(
            (dropout.factor((0, 0), 5, base.iter().position(|&k| k).unwrap()) - 4.0 / 3.0).abs()
                < 1e-6
        );
    }
}
