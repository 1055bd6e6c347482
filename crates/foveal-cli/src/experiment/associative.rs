//! E4: pairs written into a memory and read back, without any training.
//!
//! ```text
//! linear   S ← S + k vᵀ            delta   S ← S + k (v − Sᵀ k)ᵀ            softmax   Σ_j softmax_j(100 q·k_j) v_j
//! recall = mean cosine(read(k_i), v_i)
//! ```
//!
//! Schlag, Irie and Schmidhuber 2021, arXiv:2102.11174; Yang et al. 2024, arXiv:2406.06484.

use anyhow::bail;
use foveal::linear::FeatureMap;
use foveal::linear::{Delta, Linear, Recurrence, Recurrent, Tokens};
use foveal::testing::normal;
use foveal::{Attention, Scale, Shape, Tensor};

use super::cell::Cell;
use super::judge::{Check, Judgement, Sample, Table, digits};
use super::results::Results;
use super::{Models, Numbers};
use crate::plot::{Axis, Plot, Series};

/// What scores of attention are multiplied by.
const SHARPNESS: f32 = 100.0;

pub(super) fn run(cell: &Cell, _: &Models) -> anyhow::Result<Numbers> {
    let (pairs, dim) = (cell.count("pairs")?, cell.count("dim")?);
    let shape = Shape { batch: 1, seq: pairs, heads: 1, dim };
    let seed = 100 * cell.seed()?;
    let keys = unit_rows(normal(shape, seed)?)?;
    let signs = |seed| -> anyhow::Result<Tensor<f32>> {
        let numbers = normal(shape, seed)?;
        Ok(Tensor::from_vec(numbers.as_slice().iter().map(|x| x.signum()).collect(), shape)?)
    };
    let (first, second) = (signs(seed + 1)?, signs(seed + 2)?);
    let overwrite = cell.word("test")? == "overwrite";
    let values: Vec<&Tensor<f32>> = match overwrite {
        true => vec![&first, &second],
        false => vec![&first; cell.count("passes")?],
    };
    let written_keys = repeated(&vec![&keys; values.len()])?;
    let written = (&written_keys, &repeated(&values)?);
    let read = match cell.word("mechanism")? {
        "linear" => {
            let layer = Linear::new().map(FeatureMap::Identity).normaliser(None);
            recalled(layer, written, &keys)?
        }
        "delta" => recalled(Delta::new().scale(Scale::Value(1.0)), written, &keys)?,
        "softmax" => {
            let attention = Attention::new().scale(Scale::Value(SHARPNESS));
            attention.forward(keys.view(), written.0.view(), written.1.view())?.out
        }
        other => bail!("there is no memory {other:?}"),
    };
    let newest = if overwrite { &second } else { &first };
    let mut numbers = Numbers::from([("recall".to_owned(), cosine(&read, newest))]);
    if overwrite {
        numbers.insert("old".to_owned(), cosine(&read, &first));
    }
    Ok(numbers)
}

fn unit_rows(mut x: Tensor<f32>) -> anyhow::Result<Tensor<f32>> {
    let Shape { seq, .. } = x.shape();
    let mut view = x.view_mut();
    for i in 0..seq {
        let row = view.row_mut(0, i, 0);
        let length = row.iter().map(|x| x * x).sum::<f32>().sqrt();
        row.iter_mut().for_each(|x| *x /= length);
    }
    Ok(x)
}

/// Tensors one after the other.
fn repeated(all: &[&Tensor<f32>]) -> anyhow::Result<Tensor<f32>> {
    let numbers: Vec<f32> = all.iter().flat_map(|one| one.as_slice()).copied().collect();
    let one = all[0].shape();
    Ok(Tensor::from_vec(numbers, Shape { seq: one.seq * all.len(), ..one })?)
}

/// Writes pairs and reads with keys.
fn recalled(
    mechanism: impl Recurrence,
    (keys, values): (&Tensor<f32>, &Tensor<f32>),
    queries: &Tensor<f32>,
) -> anyhow::Result<Tensor<f32>> {
    let has_strength = mechanism.form().beta;
    let layer = Recurrent::new(mechanism);
    let strengths = |tokens: &Tensor<f32>, strength: f32| {
        let shape = tokens.shape().per_row();
        Tensor::from_vec(vec![strength; shape.seq], shape)
    };
    let (write, read) = (strengths(keys, 1.0)?, strengths(queries, 0.0)?);
    let mut tokens = Tokens::new(keys.view(), keys.view(), values.view());
    if has_strength {
        tokens = tokens.beta(write.view());
    }
    let mut state = layer.state(&tokens)?;
    layer.forward(&tokens, &mut state)?;
    // Tokens that write nothing.
    let nothing = Tensor::zeros(queries.shape())?;
    let mut tokens = Tokens::new(queries.view(), nothing.view(), nothing.view());
    if has_strength {
        tokens = tokens.beta(read.view());
    }
    Ok(layer.forward(&tokens, &mut state)?)
}

/// The mean cosine of rows.
fn cosine(a: &Tensor<f32>, b: &Tensor<f32>) -> f64 {
    let Shape { seq, .. } = a.shape();
    let dot = |x: &[f32], y: &[f32]| -> f64 {
        x.iter().zip(y).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum()
    };
    let one = |i: usize| {
        let (x, y) = (a.view().row(0, i, 0).to_vec(), b.view().row(0, i, 0).to_vec());
        dot(&x, &y) / (dot(&x, &x) * dot(&y, &y)).sqrt().max(1e-30)
    };
    (0..seq).map(one).sum::<f64>() / seq as f64
}

/// The memories as lines: name, mechanism, passes.
const MEMORIES: [(&str, &str, &str); 4] = [
    ("linear", "linear", "1"),
    ("delta, one pass", "delta", "1"),
    ("delta, eight passes", "delta", "8"),
    ("softmax", "softmax", "1"),
];

pub(super) fn judge(results: &Results) -> Judgement {
    let recall = |mechanism: &str, passes: &str, pairs: usize| {
        let pairs = pairs.to_string();
        let of =
            [("mechanism", mechanism), ("passes", passes), ("pairs", &pairs), ("test", "recall")];
        results.numbers(&of, "recall")
    };
    let bound = |mechanism: &str, number: &str| {
        let of = [("mechanism", mechanism), ("pairs", "16"), ("test", "overwrite")];
        results.numbers(&of, number)
    };
    let (new, old) = (bound("linear", "recall"), bound("linear", "old"));
    let sum = Sample::of(&new).zip(Sample::of(&old));
    let sum = sum.map(|(new, old)| ((new.mean - old.mean).abs() < 0.1, format!("{new} and {old}")));
    let sharp = [8, 16, 32, 64].map(|pairs| recall("softmax", "1", pairs)).concat();
    let checks = vec![
        Check::greater(
            "linear recalls 8 pairs better than 64",
            &recall("linear", "1", 8),
            &recall("linear", "1", 64),
        ),
        Check::greater(
            "at 16 pairs, eight passes of the delta rule recall better than linear",
            &recall("delta", "8", 16),
            &recall("linear", "1", 16),
        ),
        Check::greater(
            "at 16 pairs, one pass of the delta rule recalls better than linear",
            &recall("delta", "1", 16),
            &recall("linear", "1", 16),
        ),
        Check::greater(
            "bound twice, the delta rule returns the new value rather than the old",
            &bound("delta", "recall"),
            &bound("delta", "old"),
        ),
        Check::new("bound twice, linear returns as much of both (cosines within 0.1)", sum),
        Check::greater(
            "bound twice, the delta rule returns more of the new value than linear",
            &bound("delta", "recall"),
            &new,
        ),
        Check::within("attention to the pairs is exact", &sharp, 0.999..=1.0001),
    ];
    let counts = results.counts("pairs");
    let line = |(name, mechanism, passes): (&str, &str, &str)| Series {
        name: name.to_owned(),
        points: counts
            .iter()
            .filter_map(|&n| Some((n as f64, Sample::of(&recall(mechanism, passes, n))?.mean)))
            .collect(),
    };
    let plot = Plot {
        title: "Recall of pairs, keys of 32 numbers",
        x: Axis::log("pairs"),
        y: Axis::linear("cosine"),
        series: MEMORIES.map(line).to_vec(),
    };
    let mut head = vec!["memory".to_owned()];
    head.extend(counts.iter().map(|n| format!("{n} pairs")));
    head.extend(["16 bound twice: new", "old"].map(str::to_owned));
    let row = |(name, mechanism, passes): (&str, &str, &str)| {
        let mut row = vec![name.to_owned()];
        let cell =
            |numbers: &[f64]| Sample::of(numbers).map_or("–".to_owned(), |one| digits(one.mean));
        row.extend(counts.iter().map(|&n| cell(&recall(mechanism, passes, n))));
        let twice =
            |number| if passes == "1" { cell(&bound(mechanism, number)) } else { "–".to_owned() };
        row.extend([twice("recall"), twice("old")]);
        row
    };
    Judgement { checks, table: Table { head, rows: MEMORIES.map(row).to_vec() }, plots: vec![plot] }
}
