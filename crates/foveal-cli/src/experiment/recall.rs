//! E1: multi-query associative recall.
//!
//! ```text
//! k₁ v₁ k₂ v₂ … kₙ vₙ   · · k₂ · · · k₇ · …        after k₂ follows v₂
//! gap of a key's second place: slot x with probability ∝ x^(a − 1), a = 0.01
//! ```
//!
//! Arora et al. 2023, "Zoology", arXiv:2312.04927.

use std::ops::RangeInclusive;

use foveal_lm::train::IGNORED;

use super::cell::Cell;
use super::judge::{Check, Judgement, Sample, Table};
use super::learner::{Examples, Learner, Mixing, Random};
use super::results::Results;
use super::{Models, Numbers};
use crate::plot::{Axis, Plot, Series};

/// The power of gaps.
const POWER: f64 = 0.01;
/// Texts that are tested.
const TESTED: usize = 512;
/// What the first layer sees.
const NEAR: usize = 2;
/// The filler.
const NOTHING: u32 = 0;

/// Pairs of tests.
const PAIRS: [usize; 4] = [2, 4, 8, 16];

pub(super) fn run(cell: &Cell, _: &Models) -> anyhow::Result<Numbers> {
    let task = Task { tokens: cell.count("tokens")?, vocab: cell.count("vocab")? };
    let most = task.most().min(PAIRS[PAIRS.len() - 1]);
    anyhow::ensure!(most > 0, "no pair fits into {} tokens of {}", task.tokens, task.vocab);
    let seed = cell.seed()?;
    let mixing = Mixing::named(cell, cell.word("mechanism")?)?.behind_window(cell, NEAR)?;
    let mut learner = Learner::new(cell, &mixing, task.vocab)?;
    let (batch, mut step) = (cell.count("batch")?, 0);
    let loss = learner.train(|| {
        step += 1;
        task.examples(batch, 1..=most, &mut Random::new(seed, step))
    })?;
    let parameters = learner.parameters().values().len() as f64;
    let mut numbers =
        Numbers::from([("loss".to_owned(), loss), ("parameters".to_owned(), parameters)]);
    // No step has this number.
    let mut random = Random::new(seed, u64::MAX);
    for pairs in PAIRS.into_iter().filter(|&pairs| pairs <= most) {
        let tested = task.examples(TESTED, pairs..=pairs, &mut random);
        numbers.insert(accuracy(pairs), learner.accuracy(&tested)?);
    }
    Ok(numbers)
}

fn accuracy(pairs: usize) -> String {
    format!("accuracy_{pairs}")
}

/// How texts are made.
struct Task {
    tokens: usize,
    vocab: usize,
}

impl Task {
    /// The most pairs that fit, with room for each key once more, and with other keys.
    fn most(&self) -> usize {
        (self.tokens / 4).min((self.vocab / 2).saturating_sub(1))
    }

    /// Texts with so many pairs each.
    fn examples(
        &self,
        count: usize,
        pairs: RangeInclusive<usize>,
        random: &mut Random,
    ) -> Examples {
        let mut all = Examples { sequences: count, ..Examples::default() };
        let (least, more) = (*pairs.start(), pairs.end() - pairs.start());
        for _ in 0..count {
            let pairs = least + random.below(more + 1);
            self.text(pairs, random, &mut all);
        }
        all
    }

    fn text(&self, pairs: usize, random: &mut Random, all: &mut Examples) {
        let half = self.vocab / 2;
        let keys: Vec<u32> =
            random.different(pairs, half - 1).iter().map(|&n| 1 + n as u32).collect();
        let values: Vec<u32> = keys.iter().map(|_| (half + random.below(half)) as u32).collect();
        let mut tokens = vec![NOTHING; self.tokens];
        let mut targets = vec![IGNORED; self.tokens];
        for (n, (&key, &value)) in keys.iter().zip(&values).enumerate() {
            tokens[2 * n] = key;
            tokens[2 * n + 1] = value;
        }
        let mut slots: Vec<usize> = (0..(self.tokens - 2 * pairs) / 2).collect();
        for (&key, &value) in keys.iter().zip(&values) {
            let weight = |slot: usize| (slot as f64 + 1.0).powf(POWER - 1.0);
            let sum: f64 = slots.iter().map(|&slot| weight(slot)).sum();
            let mut at = random.unit() * sum;
            let chosen = slots.iter().position(|&slot| {
                at -= weight(slot);
                at <= 0.0
            });
            let slot = slots.swap_remove(chosen.unwrap_or(slots.len() - 1));
            let place = 2 * pairs + 2 * slot;
            tokens[place] = key;
            targets[place] = value;
        }
        all.tokens.extend(tokens);
        all.targets.extend(targets);
    }
}

pub(super) fn judge(results: &Results) -> Judgement {
    let of = |mechanism: &str, pairs: usize| {
        results.numbers(&[("mechanism", mechanism)], &accuracy(pairs))
    };
    let [few, _, _, many] = PAIRS;
    let better = |a: &str, b: &str| {
        let words = format!("{a} recalls {many} pairs better than {b}");
        Check::greater(&words, &of(a, many), &of(b, many))
    };
    let checks = vec![
        Check::within("full recalls 2 pairs", &of("full", few), 0.95..=1.0),
        Check::within("full recalls 16 pairs", &of("full", many), 0.95..=1.0),
        better("full", "linear"),
        better("full", "window"),
        better("full", "lstm"),
        better("gated_delta", "linear"),
        better("retention", "linear"),
        Check::greater(
            "linear recalls 2 pairs better than 16",
            &of("linear", few),
            &of("linear", many),
        ),
    ];
    let names = results.values("mechanism");
    let sample = |name: &String, pairs: usize| Sample::of(&of(name, pairs));
    let row = |name: &String| {
        let text = |pairs| Sample::words(&of(name, pairs));
        std::iter::once(name.clone()).chain(PAIRS.map(text)).collect()
    };
    let head = std::iter::once("attention".to_owned());
    let head = head.chain(PAIRS.map(|pairs| format!("{pairs} pairs"))).collect();
    let line = |name: &String| {
        let point = |pairs| Some((pairs as f64, sample(name, pairs)?.mean));
        Series { name: name.clone(), points: PAIRS.into_iter().filter_map(point).collect() }
    };
    let plot = Plot {
        title: "Recall of pairs",
        x: Axis::log("pairs"),
        y: Axis::linear("accuracy"),
        series: names.iter().map(line).collect(),
    };
    let table = Table { head, rows: names.iter().map(row).collect() };
    Judgement { checks, table, plots: vec![plot] }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_comes_twice_and_is_to_be_followed_by_its_value() {
        let task = Task { tokens: 64, vocab: 64 };
        let all = task.examples(20, 8..=8, &mut Random::new(1, 1));
        for (tokens, targets) in all.tokens.chunks(64).zip(all.targets.chunks(64)) {
            for (place, &target) in targets.iter().enumerate().filter(|(_, t)| **t != IGNORED) {
                let first = tokens.iter().position(|&token| token == tokens[place]).unwrap();
                assert!(first < 16 && first % 2 == 0 && place >= 16);
                assert_eq!(tokens[first + 1], target);
            }
            assert_eq!(targets.iter().filter(|&&target| target != IGNORED).count(), 8);
        }
        let mixed = task.examples(50, 1..=task.most(), &mut Random::new(1, 2));
        let keys = |targets: &[u32]| targets.iter().filter(|&&target| target != IGNORED).count();
        let counts: Vec<usize> = mixed.targets.chunks(64).map(keys).collect();
        assert_eq!((counts.iter().max(), counts.iter().min()), (Some(&16), Some(&1)));
    }
}
