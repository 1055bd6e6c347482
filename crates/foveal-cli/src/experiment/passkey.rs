//! E3: a key in a long text of filler, asked for at its end. E10: what the gates of Infini-attention learn by it.
//!
//! ```text
//! · · · · | s₁ … s₈ · · · · · · · · | s₁ … s₈        after the second | follow the key's symbols
//! depth: the key's place, 0 at the beginning, 1 at the end
//! ```
//!
//! Mohtashami and Jaggi 2023, arXiv:2305.16300; Munkhdalai et al. 2024, arXiv:2404.07143.

use foveal_lm::train::{Group, IGNORED};
use serde_json::json;

use super::cell::Cell;
use super::judge::{Check, Judgement, Sample, Table, lines};
use super::learner::{Examples, Learner, Mixing, Random};
use super::results::Results;
use super::{Models, Numbers};
use crate::plot::{Axis, Plot, Series};

/// Texts of a length and a depth that are tested, so many together.
const TESTED: usize = 48;
const TOGETHER: usize = 8;
/// Lengths of tests, in lengths of training.
const LENGTHS: [usize; 3] = [1, 4, 16];
const DEPTHS: [f64; 5] = [0.0, 0.25, 0.5, 0.75, 1.0];
/// What the first layer sees.
const NEAR: usize = 2;
/// Symbols of a key.
const KEY: usize = 8;
/// The mark, tokens of filler, and symbols.
const MARK: u32 = 0;
const FILLER: usize = 15;
const SYMBOLS: usize = 48;
const VOCAB: usize = 1 + FILLER + SYMBOLS;

/// One text: a key at a depth.
fn text(tokens: usize, depth: f64, random: &mut Random, all: &mut Examples) {
    let symbols = random.different(KEY, SYMBOLS);
    let key: Vec<u32> = symbols.iter().map(|&n| (1 + FILLER + n) as u32).collect();
    // A sentence that comes again and again, from anywhere in it.
    let phase = random.below(FILLER);
    let filler = |n: usize| (1 + (phase + n) % FILLER) as u32;
    let mut own: Vec<u32> = (0..tokens).map(filler).collect();
    let (marked, end) = ([&[MARK], &key[..]].concat(), tokens - KEY - 1);
    let place = (depth * (end - KEY - 1) as f64).round() as usize;
    for start in [place, end] {
        own[start..start + KEY + 1].copy_from_slice(&marked);
    }
    let mut targets = vec![IGNORED; tokens];
    targets[end..end + KEY].copy_from_slice(&key);
    all.sequences += 1;
    all.tokens.extend(own);
    all.targets.extend(targets);
}

/// A mechanism, with windows and memories of the cell's `segment`.
fn mixing(cell: &Cell) -> anyhow::Result<Mixing> {
    let segment = cell.count("segment")?;
    let capacity = LENGTHS[LENGTHS.len() - 1] * cell.count("tokens")?;
    let mixer = match cell.word("mechanism")? {
        "window" => json!({"name": "window", "tokens": segment}),
        "infini" => json!({"name": "infini", "segment": segment}),
        "infini_delta" => json!({"name": "infini", "segment": segment, "update": "delta"}),
        "memorizing" => {
            json!({"name": "memorizing", "segment": segment, "top": 16, "capacity": capacity})
        }
        name => return Mixing::named(cell, name)?.behind_window(cell, NEAR),
    };
    Mixing::Attention(Some(mixer)).behind_window(cell, NEAR)
}

fn learned(cell: &Cell) -> anyhow::Result<(Learner, f64)> {
    let (tokens, batch, seed) = (cell.count("tokens")?, cell.count("batch")?, cell.seed()?);
    anyhow::ensure!(tokens >= 2 * (KEY + 1), "a text of {tokens} tokens has no room for a key");
    let mut learner = Learner::new(cell, &mixing(cell)?, VOCAB)?;
    let mut step = 0;
    let loss = learner.train(|| {
        step += 1;
        let (mut random, mut all) = (Random::new(seed, step), Examples::default());
        for _ in 0..batch {
            // Half of the keys lie right before the question: what to look for is learned there, and how far away after that.
            let depth = if random.below(2) == 0 { 1.0 } else { random.unit() };
            text(tokens, depth, &mut random, &mut all);
        }
        all
    })?;
    Ok((learner, loss))
}

/// The share of a key's symbols that is found, in texts of a length with the key at a depth.
fn found(
    learner: &mut Learner,
    (tokens, depth): (usize, f64),
    random: &mut Random,
) -> anyhow::Result<f64> {
    let mut sum = 0.0;
    for _ in 0..TESTED / TOGETHER {
        let mut all = Examples::default();
        (0..TOGETHER).for_each(|_| text(tokens, depth, random, &mut all));
        sum += learner.accuracy(&all)?;
    }
    Ok(sum / (TESTED / TOGETHER) as f64)
}

/// How far gates are from the middle, from 0 to ½: the mean over heads of |σ(gate) − ½|.
fn moved(learner: &Learner) -> Option<f64> {
    let parameters = learner.parameters();
    let gates = parameters.entries().iter().filter(|entry| entry.group == Group::Gate);
    let gates: Vec<f64> = gates
        .flat_map(|entry| &parameters.values()[entry.range.clone()])
        .map(|&gate| (1.0 / (1.0 + (-f64::from(gate)).exp()) - 0.5).abs())
        .collect();
    Some(Sample::of(&gates)?.mean)
}

pub(super) fn run(cell: &Cell, _: &Models) -> anyhow::Result<Numbers> {
    let (mut learner, loss) = learned(cell)?;
    let tokens = cell.count("tokens")?;
    let mut numbers = Numbers::from([("loss".to_owned(), loss)]);
    // No step has this number.
    let mut random = Random::new(cell.seed()?, u64::MAX);
    for times in LENGTHS {
        let at = |depth| found(&mut learner, (times * tokens, depth), &mut random);
        let each = DEPTHS.map(at).into_iter().collect::<Result<Vec<f64>, _>>()?;
        for (depth, found) in DEPTHS.iter().zip(&each) {
            numbers.insert(format!("accuracy_{times} at {depth}"), *found);
        }
        let mean = each.iter().sum::<f64>() / each.len() as f64;
        numbers.insert(format!("accuracy_{times}"), mean);
    }
    numbers.extend(moved(&learner).map(|moved| ("moved".to_owned(), moved)));
    Ok(numbers)
}

pub(super) fn judge(results: &Results) -> Judgement {
    let of = |mechanism: &str, number: &str| results.numbers(&[("mechanism", mechanism)], number);
    let longest = format!("accuracy_{}", LENGTHS[LENGTHS.len() - 1]);
    let beyond = |mechanism: &str| of(mechanism, &longest);
    let near = |mechanism: &str| of(mechanism, "accuracy_1");
    let checks = vec![
        Check::within("full finds keys at the length of training", &near("full"), 0.95..=1.0),
        Check::within(
            "a window finds keys in less than half of the places",
            &near("window"),
            0.0..=0.5,
        ),
        Check::greater(
            "Infini-attention finds more than a window at the length of training",
            &near("infini"),
            &near("window"),
        ),
        Check::greater(
            "at 16 times the length, Infini-attention finds more than a window",
            &beyond("infini"),
            &beyond("window"),
        ),
        Check::within(
            "at 16 times the length, a memory of all keys finds them",
            &beyond("memorizing"),
            0.95..=1.0,
        ),
        Check::greater(
            "at 16 times the length, a memory of all keys finds more than full",
            &beyond("memorizing"),
            &beyond("full"),
        ),
        Check::greater(
            "at 16 times the length, the delta update finds more than the linear one",
            &beyond("infini_delta"),
            &beyond("infini"),
        ),
        Check::greater(
            "full finds more than an LSTM at the length of training",
            &near("full"),
            &near("lstm"),
        ),
    ];
    let names = results.values("mechanism");
    let mean = |numbers: &[f64]| Sample::of(numbers).map(|one| one.mean);
    let mut head = vec!["attention".to_owned()];
    head.extend(LENGTHS.map(|times| format!("length × {times}")));
    head.push("gates from ½".to_owned());
    let row = |name: &String| {
        let lengths = LENGTHS.map(|times| Sample::words(&of(name, &format!("accuracy_{times}"))));
        let all = std::iter::once(name.clone()).chain(lengths);
        all.chain([Sample::words(&of(name, "moved"))]).collect()
    };
    let line = |name: &String| Series {
        name: name.clone(),
        points: DEPTHS
            .iter()
            .filter_map(|depth| Some((*depth, mean(&of(name, &format!("accuracy_4 at {depth}")))?)))
            .collect(),
    };
    let plot = Plot {
        title: "Keys that are found, at 4 times the length of training",
        x: Axis::linear("depth of the key"),
        y: Axis::linear("share of symbols"),
        series: names.iter().map(line).collect(),
    };
    let table = Table { head, rows: names.iter().map(row).collect() };
    Judgement { checks, table, plots: vec![plot] }
}

pub(super) fn judge_gates(results: &Results) -> Judgement {
    let (rates, segments) = (results.counts("gate_rate"), results.counts("segments"));
    let ends = |counts: &[usize]| {
        let text = |count: Option<&usize>| count.map_or_else(String::new, usize::to_string);
        (text(counts.first()), text(counts.last()))
    };
    let ((slow, fast), (few, many)) = (ends(&rates), ends(&segments));
    let of = |rate: &str, segments: &str, number: &str| {
        results.numbers(&[("gate_rate", rate), ("segments", segments)], number)
    };
    let checks = vec![
        Check::within(
            "at the rate of all else, gates stay within 0.1 of ½",
            &of(&slow, &many, "moved"),
            0.0..=0.1,
        ),
        Check::greater(
            "at 30 times the rate, gates move further",
            &of(&fast, &many, "moved"),
            &of(&slow, &many, "moved"),
        ),
        Check::greater(
            "at 30 times the rate, more is found at 4 times the length",
            &of(&fast, &many, "accuracy_4"),
            &of(&slow, &many, "accuracy_4"),
        ),
        Check::greater(
            "training on more segments finds more at 4 times the length",
            &of(&fast, &many, "accuracy_4"),
            &of(&fast, &few, "accuracy_4"),
        ),
    ];
    let head = ["gate rate", "segments", "gates from ½", "found at length × 1", "× 4", "× 16"];
    let row = |rate: &String, segments: &String| {
        let numbers = ["moved", "accuracy_1", "accuracy_4", "accuracy_16"]
            .map(|number| Sample::words(&of(rate, segments, number)));
        [format!("× {rate}"), segments.clone()].into_iter().chain(numbers).collect()
    };
    let [rates, segments] = [&rates, &segments]
        .map(|counts| counts.iter().map(usize::to_string).collect::<Vec<String>>());
    let rows = rates.iter().flat_map(|rate| segments.iter().map(move |one| row(rate, one)));
    let plot = Plot {
        title: "How far gates move",
        x: Axis::log("gate learning rate, times that of all else"),
        y: Axis::linear("mean of |σ(gate) − ½|"),
        series: lines(results, ["segments", "gate_rate"], "moved"),
    };
    let table = Table { head: head.map(str::to_owned).to_vec(), rows: rows.collect() };
    Judgement { checks, table, plots: vec![plot] }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_lies_at_its_depth_and_is_asked_for_at_the_end() {
        for (depth, place) in [(0.0, 0), (0.5, 23), (1.0, 46)] {
            let mut all = Examples::default();
            text(64, depth, &mut Random::new(1, 1), &mut all);
            let marks: Vec<usize> = (0..64).filter(|&n| all.tokens[n] == MARK).collect();
            assert_eq!(marks, [place, 55]);
            assert_eq!(all.tokens[place..place + 9], all.tokens[55..]);
            assert_eq!(all.targets[55..63], all.tokens[56..]);
            assert_eq!(all.targets.iter().filter(|&&target| target != IGNORED).count(), KEY);
            assert!(all.tokens.iter().all(|&token| (token as usize) < VOCAB));
        }
    }
}
