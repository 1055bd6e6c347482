//! E1: multi-query associative recall.
//!
//! ```text
//! k₁ v₁ k₂ v₂ … kₙ vₙ   · · k₂ · · · k₇ · …        after k₂ follows v₂
//! gap of a key's second place: slot x with probability ∝ x^(a − 1), a = 0.01
//! ```
//!
//! Arora et al. 2023, "Zoology", arXiv:2312.04927.

use foveal_lm::train::IGNORED;

use super::cell::Cell;
use super::judge::{Check, Judgement, cross, lines};
use super::learner::{Examples, Learner, Random};
use super::results::Results;
use super::{Models, Numbers};
use crate::plot::{Axis, Plot};

/// The power of gaps.
const POWER: f64 = 0.01;
/// Texts that are tested.
const TESTED: usize = 512;
/// The filler.
const NOTHING: u32 = 0;

pub(super) fn run(cell: &Cell, _: &Models) -> anyhow::Result<Numbers> {
    let task = Task {
        pairs: cell.count("pairs")?,
        tokens: cell.count("tokens")?,
        vocab: cell.count("vocab")?,
    };
    task.check()?;
    let seed = cell.seed()?;
    let mut learner = Learner::new(cell, cell.word("mechanism")?, task.vocab)?;
    let (batch, mut step) = (cell.count("batch")?, 0);
    let loss = learner.train(|| {
        step += 1;
        task.examples(batch, &mut Random::new(seed, step))
    })?;
    // No step has this number.
    let tested = task.examples(TESTED, &mut Random::new(seed, u64::MAX));
    Ok(Numbers::from([
        ("accuracy".to_owned(), learner.accuracy(&tested)?),
        ("loss".to_owned(), loss),
        ("parameters".to_owned(), learner.parameters().values().len() as f64),
    ]))
}

/// How texts are made.
struct Task {
    pairs: usize,
    tokens: usize,
    vocab: usize,
}

impl Task {
    fn check(&self) -> anyhow::Result<()> {
        let fits = 4 * self.pairs <= self.tokens && self.pairs < self.vocab / 2;
        anyhow::ensure!(fits, "{} pairs do not fit into {} tokens", self.pairs, self.tokens);
        Ok(())
    }

    fn examples(&self, count: usize, random: &mut Random) -> Examples {
        let mut all = Examples { sequences: count, ..Examples::default() };
        for _ in 0..count {
            self.text(random, &mut all);
        }
        all
    }

    fn text(&self, random: &mut Random, all: &mut Examples) {
        let half = self.vocab / 2;
        let keys: Vec<u32> =
            random.different(self.pairs, half - 1).iter().map(|&n| 1 + n as u32).collect();
        let values: Vec<u32> = keys.iter().map(|_| (half + random.below(half)) as u32).collect();
        let mut tokens = vec![NOTHING; self.tokens];
        let mut targets = vec![IGNORED; self.tokens];
        for (n, (&key, &value)) in keys.iter().zip(&values).enumerate() {
            tokens[2 * n] = key;
            tokens[2 * n + 1] = value;
        }
        let mut slots: Vec<usize> = (0..(self.tokens - 2 * self.pairs) / 2).collect();
        for (&key, &value) in keys.iter().zip(&values) {
            let weight = |slot: usize| (slot as f64 + 1.0).powf(POWER - 1.0);
            let sum: f64 = slots.iter().map(|&slot| weight(slot)).sum();
            let mut at = random.unit() * sum;
            let chosen = slots.iter().position(|&slot| {
                at -= weight(slot);
                at <= 0.0
            });
            let slot = slots.swap_remove(chosen.unwrap_or(slots.len() - 1));
            let place = 2 * self.pairs + 2 * slot;
            tokens[place] = key;
            targets[place] = value;
        }
        all.tokens.extend(tokens);
        all.targets.extend(targets);
    }
}

pub(super) fn judge(results: &Results) -> Judgement {
    let counts = results.counts("pairs");
    let of = |mechanism: &str, pairs: Option<&usize>| {
        let pairs = pairs.map_or_else(String::new, usize::to_string);
        results.numbers(&[("mechanism", mechanism), ("pairs", &pairs)], "accuracy")
    };
    let (few, many) = (counts.first(), counts.last());
    let checks = vec![
        Check::within("full recalls the fewest pairs", &of("full", few), 0.95..=1.0),
        Check::within("full recalls the most pairs", &of("full", many), 0.95..=1.0),
        Check::greater(
            "full recalls the most pairs better than linear",
            &of("full", many),
            &of("linear", many),
        ),
        Check::greater(
            "the gated delta rule recalls the most pairs better than linear",
            &of("gated_delta", many),
            &of("linear", many),
        ),
        Check::greater(
            "retention recalls the most pairs better than linear",
            &of("retention", many),
            &of("linear", many),
        ),
        Check::greater(
            "full recalls the most pairs better than a window",
            &of("full", many),
            &of("window", many),
        ),
        Check::greater(
            "linear recalls the fewest pairs better than the most",
            &of("linear", few),
            &of("linear", many),
        ),
    ];
    let plot = Plot {
        title: "Recall of pairs",
        x: Axis::log("pairs"),
        y: Axis::linear("accuracy"),
        series: lines(results, ["mechanism", "pairs"], "accuracy"),
    };
    Judgement {
        checks,
        table: cross(results, ["mechanism", "pairs"], "accuracy"),
        plots: vec![plot],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_comes_twice_and_is_to_be_followed_by_its_value() {
        let task = Task { pairs: 8, tokens: 64, vocab: 64 };
        let all = task.examples(20, &mut Random::new(1, 1));
        for (tokens, targets) in all.tokens.chunks(64).zip(all.targets.chunks(64)) {
            for (place, &target) in targets.iter().enumerate().filter(|(_, t)| **t != IGNORED) {
                let first = tokens.iter().position(|&token| token == tokens[place]).unwrap();
                assert!(first < 16 && first % 2 == 0 && place >= 16);
                assert_eq!(tokens[first + 1], target);
            }
            assert_eq!(targets.iter().filter(|&&target| target != IGNORED).count(), 8);
        }
        assert!(Task { pairs: 17, tokens: 64, vocab: 64 }.check().is_err());
    }
}
