//! Which keys a cache keeps: those that got most weight, and the newest.
//!
//! ```text
//! H2O      score_j = Σ_i P_ij over all queries so far           keep the R newest and the H largest of the others
//! SnapKV   score_j = Σ_i P_ij over the last W queries           keep the W newest and of the prefix the C − W largest
//!          smoothed over neighbours (kernel k, stride 1)
//! ```
//!
//! Scores are those of a key/value head: the weights of all query heads that read it are summed, so that a group keeps
//! sharing (the SnapKV code chooses for each query head, which takes that away). They come from
//! [`Plan::column_sums`] with [`Per::KvHead`](crate::inspect::Per::KvHead), or call by call from [`RunningScores`]. Choices are in ascending order; of equal scores
//! the older key stays. [`ContiguousCache::retain`](super::ContiguousCache::retain) gives up the rest; keys keep the rotation of their first position.
//! StreamingLLM needs no scores: [`Mask::streaming`](crate::Mask::streaming). Approximate by nature: what is given up is not seen again.
//! Zhang et al. 2023; Li et al. 2024.

use crate::element::Element;
use crate::error::{Error, Result};
use crate::inspect::Forwarded;
use crate::plan::Plan;
use crate::tensor::{Shape, TensorRef};
use std::ops::Range;

/// How [`snap_kv`] smooths scores over neighbours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pooling {
    /// The mean of a window; neighbours that do not exist count as 0.
    Average,
    /// The largest of a window.
    Max,
}

/// What [`snap_kv`] keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SnapKv {
    /// C: keys that are kept in all.
    pub capacity: usize,
    /// W: the newest keys, all of which are kept.
    pub window: usize,
    /// k: an odd number of neighbours, the key itself included.
    pub kernel: usize,
    /// How neighbours are joined.
    pub pooling: Pooling,
}

/// The weight that the keys of one sequence have got, for each key/value head.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Scores {
    heads: Vec<Vec<f64>>,
}

impl Scores {
    /// Scores of `kv_heads` heads that hold nothing yet.
    pub fn new(kv_heads: usize) -> Scores {
        Scores { heads: vec![vec![]; kv_heads] }
    }

    /// Adds column sums `[1, S, KV, 1]` of one or more further queries; keys beyond those known are new.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] for another batch, other heads or fewer keys than are known.
    pub fn add(&mut self, sums: TensorRef<'_, f32>) -> Result<()> {
        let got = sums.shape();
        let known = self.heads.first().map_or(0, Vec::len);
        let seq = got.seq.max(known);
        let expected = Shape { batch: 1, seq, heads: self.heads.len(), dim: 1 };
        if got != expected {
            let what = "column sums of a sequence for each key/value head";
            return Err(Error::ShapeMismatch { what, expected, got });
        }
        for (head, scores) in self.heads.iter_mut().enumerate() {
            scores.resize(seq, 0.0);
            for (j, score) in scores.iter_mut().enumerate() {
                *score += f64::from(sums.row(0, j, head)[0]);
            }
        }
        Ok(())
    }

    /// The scores of a head's keys.
    pub fn of(&self, head: usize) -> Option<&[f64]> {
        self.heads.get(head).map(Vec::as_slice)
    }

    /// H2O's choice for each head: the `recent` newest keys and the `heavy` largest scores among the others.
    pub fn heavy_hitters(&self, heavy: usize, recent: usize) -> Vec<Vec<usize>> {
        let choose = |scores: &Vec<f64>| {
            let older = scores.len() - recent.min(scores.len());
            let mut kept = largest(&scores[..older], heavy);
            kept.extend(older..scores.len());
            kept
        };
        self.heads.iter().map(choose).collect()
    }

    /// Gives up the scores of all keys but the chosen ones, as [`super::ContiguousCache::retain`] gives up the keys.
    ///
    /// # Errors
    /// Those of [`super::ContiguousCache::retain`]; nothing has changed then.
    pub fn retain(&mut self, kept: &[Vec<usize>]) -> Result<()> {
        let known = self.heads.first().map_or(0, Vec::len);
        check_kept(kept, self.heads.len(), known)?;
        for (scores, kept) in self.heads.iter_mut().zip(kept) {
            *scores = kept.iter().map(|&j| scores[j]).collect();
        }
        Ok(())
    }
}

/// The weight that the keys of one sequence have got, kept for each query head and row after row in f64: whatever calls
/// the rows came in, scores have the same bits.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct RunningScores {
    kv_heads: usize,
    /// A sum for each key held, for each query head.
    heads: Vec<Vec<f64>>,
}

impl RunningScores {
    /// Scores of `heads` query heads that read `kv_heads` key/value heads, and hold nothing yet.
    ///
    /// # Errors
    /// [`Error::HeadGrouping`] unless the query heads fall into groups of one size.
    pub fn new(heads: usize, kv_heads: usize) -> Result<RunningScores> {
        match heads.checked_rem(kv_heads) {
            Some(0) => Ok(RunningScores { kv_heads, heads: vec![vec![]; heads] }),
            _ => Err(Error::HeadGrouping { heads, kv_heads }),
        }
    }

    /// Adds the weights of a range of the query rows that `plan` was run with; keys beyond those known are new.
    ///
    /// # Errors
    /// Those of [`Plan::column_sums`]; [`Error::ShapeMismatch`] for another batch than one sequence, other heads or fewer
    /// keys than are known. Nothing has changed then.
    pub fn add<E: Element, K: Element>(
        &mut self,
        plan: &Plan<'_>,
        of: Forwarded<'_, E, K>,
        rows: Range<usize>,
    ) -> Result<()> {
        let known = self.known();
        let got = Shape { seq: of.held(), ..of.q.shape() };
        let expected = Shape { batch: 1, seq: got.seq.max(known), heads: self.heads.len(), ..got };
        if got != expected {
            let what = "keys held and heads of one sequence with running scores";
            return Err(Error::ShapeMismatch { what, expected, got });
        }
        self.heads.iter_mut().for_each(|sums| sums.resize(got.seq, 0.0));
        let result = plan.add_columns(of, rows, &mut self.heads);
        if result.is_err() {
            self.heads.iter_mut().for_each(|sums| sums.truncate(known));
        }
        result
    }

    /// The scores of each key/value head: the sums of its group.
    pub fn scores(&self) -> Scores {
        let group = self.heads.len() / self.kv_heads.max(1);
        let joined = |heads: &[Vec<f64>]| {
            let sum = |j| heads.iter().map(|sums| sums[j]).sum();
            (0..self.known()).map(sum).collect()
        };
        Scores { heads: self.heads.chunks(group.max(1)).map(joined).collect() }
    }

    /// Gives up the scores of all keys but those chosen for each key/value head, as [`Scores::retain`].
    ///
    /// # Errors
    /// Those of [`super::ContiguousCache::retain`]; nothing has changed then.
    pub fn retain(&mut self, kept: &[Vec<usize>]) -> Result<()> {
        check_kept(kept, self.kv_heads, self.known())?;
        let group = self.heads.len() / self.kv_heads.max(1);
        for (head, sums) in self.heads.iter_mut().enumerate() {
            *sums = kept[head / group].iter().map(|&j| sums[j]).collect();
        }
        Ok(())
    }

    /// A sum for each key held, of a query head.
    pub fn of(&self, head: usize) -> Option<&[f64]> {
        self.heads.get(head).map(Vec::as_slice)
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.heads.iter_mut().for_each(Vec::clear);
    }

    fn known(&self) -> usize {
        self.heads.first().map_or(0, Vec::len)
    }
}

/// SnapKV's choice for each head, from scores that the last `window` queries gave.
///
/// # Errors
/// [`Error::InvalidParameter`] for an even kernel and a window larger than the capacity.
pub fn snap_kv(scores: &Scores, keep: SnapKv) -> Result<Vec<Vec<usize>>> {
    let SnapKv { capacity, window, kernel, pooling } = keep;
    if kernel.is_multiple_of(2) {
        let (what, expected) = ("kernel of SnapKV", "an odd number");
        return Err(Error::InvalidParameter { what, expected, got: kernel.to_string() });
    }
    if window > capacity {
        let (what, expected) = ("window of SnapKV", "at most the capacity");
        let got = format!("{window} of {capacity}");
        return Err(Error::InvalidParameter { what, expected, got });
    }
    let choose = |scores: &Vec<f64>| {
        let prefix = scores.len() - window.min(scores.len());
        let pooled = pool(&scores[..prefix], kernel, pooling);
        let mut kept = largest(&pooled, capacity - window);
        kept.extend(prefix..scores.len());
        kept
    };
    Ok(scores.heads.iter().map(choose).collect())
}

/// Scores smoothed over windows of `kernel` neighbours.
fn pool(scores: &[f64], kernel: usize, pooling: Pooling) -> Vec<f64> {
    let reach = kernel / 2;
    let window = |j: usize| &scores[j.saturating_sub(reach)..(j + reach + 1).min(scores.len())];
    let join = |j| match pooling {
        Pooling::Average => window(j).iter().sum::<f64>() / kernel as f64,
        Pooling::Max => window(j).iter().copied().fold(f64::NEG_INFINITY, f64::max),
    };
    (0..scores.len()).map(join).collect()
}

/// The places of the `count` largest, in ascending order.
fn largest(scores: &[f64], count: usize) -> Vec<usize> {
    let mut places: Vec<usize> = (0..scores.len()).collect();
    // Stable: of equal ones the first stay.
    places.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
    places.truncate(count);
    places.sort_unstable();
    places
}

/// Refuses choices that are not one ascending list of as many keys for each head.
pub(super) fn check_kept(kept: &[Vec<usize>], heads: usize, held: usize) -> Result<()> {
    if kept.len() != heads {
        let what = "a choice of keys for each key/value head";
        return Err(Error::LengthMismatch { what, expected: heads, got: kept.len() });
    }
    let count = kept.first().map_or(0, Vec::len);
    for choice in kept {
        if choice.len() != count {
            let what = "as many keys kept by each head";
            return Err(Error::LengthMismatch { what, expected: count, got: choice.len() });
        }
        if let Some(&got) = choice.iter().find(|&&j| j >= held) {
            return Err(Error::OutOfRange { what: "kept key", got, limit: held });
        }
        if let Some(pair) = choice.windows(2).find(|pair| pair[0] >= pair[1]) {
            let (what, expected) = ("kept keys", "ascending order, each once");
            let got = format!("{} before {}", pair[0], pair[1]);
            return Err(Error::InvalidParameter { what, expected, got });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pools_by_hand() {
        let scores = [1.0, 4.0, 2.0, 0.0];
        assert_eq!(pool(&scores, 1, Pooling::Max), scores);
        assert_eq!(pool(&scores, 3, Pooling::Max), [4.0, 4.0, 4.0, 2.0]);
        assert_eq!(pool(&scores, 3, Pooling::Average), [5.0 / 3.0, 7.0 / 3.0, 2.0, 2.0 / 3.0]);
        assert_eq!(pool(&[], 3, Pooling::Max), [0.0; 0]);
    }

    #[test]
    fn of_equal_scores_the_older_key_stays() {
        assert_eq!(largest(&[1.0, 3.0, 1.0, 3.0, 1.0], 3), [0, 1, 3]);
        assert_eq!(largest(&[1.0], 3), [0]);
        assert_eq!(largest(&[2.0, f64::NAN], 1), [1]);
    }
}
