//! Masks as cases name them: who sees whom, and how many pairs that is.

use crate::data::splitmix;
use foveal::Mask;
use foveal::mask::{Dense, Extent};
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// A mask of a case; the JSON form is that of the peers' protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum MaskSpec {
    Full,
    Causal,
    /// Causal, given as a matrix of bools.
    #[serde(rename = "causal-mask")]
    CausalMask,
    /// So many keys, the query's own position included.
    Window(usize),
    /// So many of 256 keys, by the generator.
    Random(u64),
}

impl std::fmt::Display for MaskSpec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            MaskSpec::Full => f.write_str("full"),
            MaskSpec::Causal => f.write_str("causal"),
            MaskSpec::CausalMask => f.write_str("causalmask"),
            MaskSpec::Window(keys) => write!(f, "window{keys}"),
            MaskSpec::Random(keep) => write!(f, "random{keep}"),
        }
    }
}

/// A mask for `queries` rows over `keys` keys.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sight {
    pub(crate) mask: MaskSpec,
    pub(crate) queries: usize,
    pub(crate) keys: usize,
    /// The generator's, for random masks.
    pub(crate) seed: u64,
}

impl Sight {
    /// A range that holds every key that row `i` may see.
    pub(crate) fn range(&self, i: usize) -> Range<usize> {
        let end = (i + 1 + self.keys).saturating_sub(self.queries);
        match self.mask {
            MaskSpec::Full | MaskSpec::Random(_) => 0..self.keys,
            MaskSpec::Causal | MaskSpec::CausalMask => 0..end,
            MaskSpec::Window(width) => end.saturating_sub(width)..end,
        }
    }

    /// Whether row `i` may see key `j`.
    pub(crate) fn allows(&self, i: usize, j: usize) -> bool {
        let drawn = match self.mask {
            MaskSpec::Random(keep) => splitmix(self.seed, i * self.keys + j) >> 56 < keep,
            _ => true,
        };
        drawn && self.range(i).contains(&j)
    }

    /// Visible (query, key) pairs.
    pub(crate) fn pairs(&self) -> usize {
        let row = |i| match self.mask {
            MaskSpec::Random(_) => (0..self.keys).filter(|&j| self.allows(i, j)).count(),
            _ => self.range(i).len(),
        };
        (0..self.queries).map(row).sum()
    }

    /// Keys that some row may see, taking ranges for what they hold.
    pub(crate) fn keys_read(&self) -> usize {
        let first = self.range(0).start;
        self.range(self.queries - 1).end - first
    }

    /// The engine's form of it.
    pub(crate) fn build(&self) -> foveal::Result<Mask> {
        Ok(match self.mask {
            MaskSpec::Full => Mask::full(),
            MaskSpec::Causal => Mask::causal(),
            MaskSpec::Window(width) => Mask::window(width),
            MaskSpec::Random(_) | MaskSpec::CausalMask => {
                let Sight { queries, keys, .. } = *self;
                let pairs = (0..queries).flat_map(|i| (0..keys).map(move |j| (i, j)));
                let visible: Vec<bool> = pairs.map(|(i, j)| self.allows(i, j)).collect();
                Dense::new(&visible, Extent { batch: 1, heads: 1, queries, keys })?.into()
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_those_of_the_definition() {
        let masks = [
            MaskSpec::Full,
            MaskSpec::Causal,
            MaskSpec::CausalMask,
            MaskSpec::Window(3),
            MaskSpec::Random(100),
        ];
        for mask in masks {
            for (queries, keys) in [(1, 1), (1, 9), (5, 9), (9, 9), (9, 5)] {
                let sight = Sight { mask, queries, keys, seed: 3 };
                let all = (0..queries).flat_map(|i| (0..keys).map(move |j| (i, j)));
                let pairs = all.filter(|&(i, j)| sight.allows(i, j)).count();
                assert_eq!(sight.pairs(), pairs, "{mask} {queries} {keys}");
            }
        }
    }
}
