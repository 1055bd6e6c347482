//! E2: a string, a mark, and the string again.
//!
//! ```text
//! s₁ s₂ … sₙ | s₁ s₂ … sₙ        after | and after each of the second string's symbols follows the next
//! ```
//!
//! Olsson et al. 2022, "In-context learning and induction heads"; Jelassi et al. 2024, arXiv:2402.01032.

use foveal_lm::train::IGNORED;

use super::cell::Cell;
use super::judge::{Check, Judgement, Sample, Table};
use super::learner::{Examples, Learner, Mixing, Random};
use super::results::Results;
use super::{Models, Numbers};
use crate::plot::{Axis, Plot, Series};

/// Strings that are tested.
const TESTED: usize = 512;
/// What fills the rest of a text, and the mark; symbols come behind.
const NOTHING: u32 = 0;
const MARK: u32 = 1;

pub(super) fn run(cell: &Cell, _: &Models) -> anyhow::Result<Numbers> {
    let (tokens, vocab) = (cell.count("tokens")?, cell.count("vocab")?);
    let longest = (tokens - 1) / 2;
    anyhow::ensure!(longest <= vocab - 2, "{longest} different symbols of {}", vocab - 2);
    let seed = cell.seed()?;
    let mut learner = Learner::new(cell, &Mixing::named(cell, cell.word("mechanism")?)?, vocab)?;
    let (batch, mut step) = (cell.count("batch")?, 0);
    let loss = learner.train(|| {
        step += 1;
        examples(batch, (tokens, vocab), &mut Random::new(seed, step))
    })?;
    let tested = examples(TESTED, (tokens, vocab), &mut Random::new(seed, u64::MAX));
    Ok(Numbers::from([
        ("accuracy".to_owned(), learner.accuracy(&tested)?),
        ("loss".to_owned(), loss),
        ("parameters".to_owned(), learner.parameters().values().len() as f64),
    ]))
}

fn examples(count: usize, (tokens, vocab): (usize, usize), random: &mut Random) -> Examples {
    let mut all = Examples { sequences: count, ..Examples::default() };
    let longest = (tokens - 1) / 2;
    for _ in 0..count {
        let length = longest / 2 + random.below(longest - longest / 2 + 1);
        let symbols = random.different(length, vocab - 2);
        let string: Vec<u32> = symbols.iter().map(|&n| MARK + 1 + n as u32).collect();
        let text: Vec<u32> = [&string[..], &[MARK], &string].concat();
        // What precedes is as likely to be nothing as what follows: places alone give nothing away.
        let before = random.below(tokens - text.len() + 1);
        let mut own = vec![NOTHING; tokens];
        own[before..before + text.len()].copy_from_slice(&text);
        let mut targets = vec![IGNORED; tokens];
        let mark = before + length;
        targets[mark..mark + length].copy_from_slice(&string);
        all.tokens.extend(own);
        all.targets.extend(targets);
    }
    all
}

/// What is compared: name, mechanism, layers.
fn kinds(results: &Results) -> Vec<(String, String, String)> {
    let mut kinds = vec![];
    for mechanism in results.values("mechanism") {
        for layers in results.counts("layers") {
            let kind =
                (format!("{mechanism}, {layers} layers"), mechanism.clone(), layers.to_string());
            let of = [("mechanism", kind.1.as_str()), ("layers", kind.2.as_str())];
            if results.of(&of).next().is_some() {
                kinds.push(kind);
            }
        }
    }
    kinds
}

pub(super) fn judge(results: &Results) -> Judgement {
    let of = |mechanism: &str, layers: &str| {
        results.numbers(&[("mechanism", mechanism), ("layers", layers)], "accuracy")
    };
    let full = of("full", "2");
    let checks = vec![
        Check::within("two layers of full attention copy", &full, 0.95..=1.0),
        Check::greater(
            "two layers of full attention copy better than one",
            &full,
            &of("full", "1"),
        ),
        Check::greater("full copies better than linear", &full, &of("linear", "2")),
        Check::greater("full copies better than a window", &full, &of("window", "2")),
        Check::greater(
            "the gated delta rule copies better than linear",
            &of("gated_delta", "2"),
            &of("linear", "2"),
        ),
    ];
    let kinds = kinds(results);
    let numbers = |kind: &(String, String, String), number: &str| {
        Sample::of(&results.numbers(&[("mechanism", &kind.1), ("layers", &kind.2)], number))
    };
    let row = |kind: &(String, String, String)| {
        let cell = |number| numbers(kind, number).map_or("–".to_owned(), |one| one.to_string());
        vec![kind.0.clone(), cell("accuracy"), cell("loss"), cell("parameters")]
    };
    let head = ["attention", "accuracy", "loss, nats", "parameters"].map(str::to_owned).to_vec();
    let point = |(n, kind): (usize, &(String, String, String))| {
        let points = numbers(kind, "accuracy").map(|one| vec![(n as f64 + 1.0, one.mean)]);
        Series { name: kind.0.clone(), points: points.unwrap_or_default() }
    };
    let plot = Plot {
        title: "Copying a string",
        x: Axis::linear("attention, in the order of the legend"),
        y: Axis::linear("accuracy"),
        series: kinds.iter().enumerate().map(point).collect(),
    };
    let table = Table { head, rows: kinds.iter().map(row).collect() };
    Judgement { checks, table, plots: vec![plot] }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_string_is_the_first() {
        let all = examples(50, (21, 20), &mut Random::new(3, 1));
        for (tokens, targets) in all.tokens.chunks(21).zip(all.targets.chunks(21)) {
            let mark = tokens.iter().position(|&token| token == MARK).unwrap();
            let wanted: Vec<u32> =
                targets.iter().copied().filter(|&target| target != IGNORED).collect();
            assert!((5..=10).contains(&wanted.len()));
            assert_eq!(tokens[mark - wanted.len()..mark], wanted);
            assert_eq!(tokens[mark + 1..=mark + wanted.len()], wanted);
            assert_eq!(targets[mark], wanted[0]);
        }
    }
}
