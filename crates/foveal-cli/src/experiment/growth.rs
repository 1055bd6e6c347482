//! E12: time and memory of mechanisms over the length of a text.

use std::time::Instant;

use foveal::linear::{Delta, Linear, Recurrence, Recurrent, Tokens};
use foveal::testing::normal;
use foveal::{Attention, Mask, Shape, Tensor};

use super::cell::Cell;
use super::judge::{Check, Judgement, Sample, Table};
use super::results::Results;
use super::{Models, Numbers};
use crate::compare::kernels::{DIM, HEADS, WINDOW, measure, state_bytes};
use crate::plot::{Axis, Plot, Series, short};

/// Tokens that are read one by one for a time, and how often.
const STEPS: usize = 20;
const ROUNDS: usize = 5;

pub(super) fn run(cell: &Cell, _: &Models) -> anyhow::Result<Numbers> {
    let (name, tokens) = (cell.word("mechanism")?, cell.count("tokens")?);
    let point = measure(name, tokens)?;
    let mut numbers = Numbers::from([
        ("seconds".to_owned(), point.seconds),
        ("left_bytes".to_owned(), state_bytes(name, tokens) as f64),
    ]);
    if let Some(bytes) = point.peak_bytes {
        numbers.insert("peak_bytes".to_owned(), bytes as f64);
    }
    let step = match name {
        "full" => Some(attention_step(tokens)?),
        "window" => Some(attention_step(tokens.min(WINDOW))?),
        "linear" => Some(recurrent_step(Linear::new())?),
        "gated_delta" => Some(recurrent_step(Delta::gated())?),
        _ => None,
    };
    numbers.extend(step.map(|seconds| ("step_seconds".to_owned(), seconds)));
    Ok(numbers)
}

/// The best time of one token.
fn best(mut step: impl FnMut() -> foveal::Result<()>) -> foveal::Result<f64> {
    let mut best = f64::INFINITY;
    for _ in 0..ROUNDS {
        let start = Instant::now();
        for _ in 0..STEPS {
            step()?;
        }
        best = best.min(start.elapsed().as_secs_f64() / STEPS as f64);
    }
    Ok(best)
}

fn shape(tokens: usize) -> Shape {
    Shape { batch: 1, seq: tokens, heads: HEADS, dim: DIM }
}

/// A token's attention to so many keys.
fn attention_step(keys: usize) -> anyhow::Result<f64> {
    let (q, k, v) = (normal(shape(1), 1)?, normal(shape(keys), 2)?, normal(shape(keys), 3)?);
    let attention = Attention::new().mask(Mask::causal());
    Ok(best(|| attention.decode(q.view(), k.view(), v.view()).map(drop))?)
}

/// A token's turn with a state.
fn recurrent_step(mechanism: impl Recurrence) -> anyhow::Result<f64> {
    let (q, k, v) = (normal(shape(1), 1)?, normal(shape(1), 2)?, normal(shape(1), 3)?);
    let row = shape(1).per_row();
    let all = |value: f32| Tensor::from_vec(vec![value; HEADS], row);
    let (decay, beta) = (all(-0.05)?, all(0.01)?);
    let form = mechanism.form();
    let layer = Recurrent::new(mechanism);
    let mut tokens = Tokens::new(q.view(), k.view(), v.view());
    if form.beta {
        tokens = tokens.beta(beta.view()).log_decay(decay.view());
    }
    let mut state = layer.state(&tokens)?;
    Ok(best(|| layer.forward(&tokens, &mut state).map(drop))?)
}

/// A mechanism's numbers over lengths.
fn curve(results: &Results, name: &str, number: &str) -> Vec<(f64, f64)> {
    let point = |tokens: usize| {
        let of = [("mechanism", name), ("tokens", &tokens.to_string())];
        Some((tokens as f64, Sample::of(&results.numbers(&of, number))?.mean))
    };
    results.counts("tokens").into_iter().filter_map(point).collect()
}

/// The slope of the last step, on logarithms.
fn last_slope(curve: &[(f64, f64)]) -> Option<f64> {
    let [.., a, b] = curve else { return None };
    Some((b.1 / a.1).ln() / (b.0 / a.0).ln())
}

/// The first length at which `a` is faster than `b`, and stays so.
fn overtakes(a: &[(f64, f64)], b: &[(f64, f64)]) -> Option<f64> {
    let slower = a.iter().zip(b).rposition(|(a, b)| a.1 >= b.1);
    a.get(slower.map_or(0, |n| n + 1)).map(|point| point.0)
}

fn checks(results: &Results) -> Vec<Check> {
    let seconds = |name: &str| curve(results, name, "seconds");
    let mut checks = vec![];
    for (name, power, slack) in [
        ("full", 2.0, 0.2),
        ("window", 1.0, 0.15),
        ("sparse_transformer", 1.5, 0.2),
        ("linear", 1.0, 0.15),
        ("gated_delta", 1.0, 0.15),
        ("infini", 1.0, 0.15),
    ] {
        let slope = last_slope(&seconds(name));
        let words = format!("time of {name} grows with the power {power}");
        checks.push(Check::new(
            &words,
            slope.map(|s| ((s - power).abs() <= slack, format!("{s:.2}"))),
        ));
    }
    let (full, linear) = (seconds("full"), seconds("linear"));
    let known = !full.is_empty() && !linear.is_empty();
    let at = overtakes(&linear, &full);
    let words = at.map_or("not at these lengths".to_owned(), |at| format!("from {at} tokens on"));
    let found = known.then(|| (at.is_some_and(|at| at <= 256.0), words));
    checks.push(Check::new("linear overtakes full near the size of a head, by 256 tokens", found));
    let unfused = seconds("unfused");
    let at = overtakes(&full, &unfused);
    let words = at.map_or("not at these lengths".to_owned(), |at| format!("from {at} tokens on"));
    let found =
        (!unfused.is_empty() && !full.is_empty()).then(|| (at.is_some_and(|at| at <= 32.0), words));
    checks.push(Check::new("full is faster than the unfused computation at every length", found));
    for name in ["linear", "gated_delta"] {
        let steps = curve(results, name, "step_seconds");
        let ends = steps.first().zip(steps.last());
        let ratio = ends.map(|(first, last)| last.1 / first.1);
        let words =
            format!("a token of {name} takes as long after the longest text as after the shortest");
        checks.push(Check::new(
            &words,
            ratio.map(|r| ((0.5..1.5).contains(&r), format!("{r:.2} times"))),
        ));
    }
    checks
}

pub(super) fn judge(results: &Results) -> Judgement {
    let names = results.values("mechanism");
    let lines = |number: &str, factor: f64| -> Vec<Series> {
        let line = |name: &String| {
            let points = curve(results, name, number);
            let points = points.into_iter().map(|(x, y)| (x, (factor * y).max(1e-9))).collect();
            Series { name: name.clone(), points }
        };
        names.iter().map(line).filter(|line| !line.points.is_empty()).collect()
    };
    let plot = |title, y, series| Plot { title, x: Axis::log("tokens"), y: Axis::log(y), series };
    let plots = vec![
        plot("Reading a text", "milliseconds", lines("seconds", 1e3)),
        plot("One token behind it", "microseconds", lines("step_seconds", 1e6)),
        plot("Memory at its peak beyond the text", "KiB", lines("peak_bytes", 1.0 / 1024.0)),
        plot("What the text leaves behind", "KiB", lines("left_bytes", 1.0 / 1024.0)),
    ];
    let counts = results.counts("tokens");
    let mut head = vec!["ms for tokens".to_owned()];
    head.extend(counts.iter().map(usize::to_string));
    head.push("slope".to_owned());
    let row = |name: &String| {
        let own = curve(results, name, "seconds");
        let at = |&tokens: &usize| {
            let point = own.iter().find(|point| point.0 == tokens as f64);
            point.map_or("–".to_owned(), |point| short(1e3 * point.1))
        };
        let slope = last_slope(&own).map_or("–".to_owned(), |slope| format!("{slope:.2}"));
        let cells: Vec<String> = counts.iter().map(at).collect();
        std::iter::once(name.clone()).chain(cells).chain([slope]).collect()
    };
    let table = Table { head, rows: names.iter().map(row).collect() };
    Judgement { checks: checks(results), table, plots }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slopes_and_overtakings_are_those_of_the_curves() {
        let square: Vec<(f64, f64)> = [64.0, 128.0, 256.0].map(|n: f64| (n, n * n)).to_vec();
        let line: Vec<(f64, f64)> = [64.0, 128.0, 256.0].map(|n: f64| (n, 100.0 * n)).to_vec();
        assert_eq!(last_slope(&square), Some(2.0));
        assert_eq!(last_slope(&square[..1]), None);
        assert_eq!(overtakes(&line, &square), Some(128.0));
        assert_eq!(overtakes(&square, &line), None);
        assert_eq!(overtakes(&square[..1], &line), Some(64.0));
    }
}
