//! E9: attention of random features against the attention that it stands for, on queries and keys of a trained model.
//!
//! ```text
//! positive   φ(x) = exp(ωx − |x|²/2) / √m            trigonometric   φ(x) = exp(|x|²/2) [cos ωx, sin ωx] / √m
//! error = ‖O_φ − O‖ / ‖O‖
//! ```
//!
//! Choromanski et al. 2021, arXiv:2009.14794, equations 4 to 6.

use std::path::Path;

use anyhow::{Context, bail, ensure};
use foveal::linear::{Draw, Favor, RandomFeatures, Recurrent, Tokens};
use foveal::{Attention, Mask, Shape, Tensor};
use foveal_lm::config::ModelConfig;
use foveal_lm::tokenizer::Encode;
use foveal_lm::train::Parameters;

use super::cell::Cell;
use super::judge::{Check, Judgement, Sample, Table};
use super::results::Results;
use super::{Models, Numbers};
use crate::plot::{Axis, Plot, Series};
use crate::{source, train};

/// Queries, keys and values of a layer.
struct Layer {
    q: Tensor<f32>,
    k: Tensor<f32>,
    v: Tensor<f32>,
}

pub(super) fn run(cell: &Cell, models: &Models) -> anyhow::Result<Numbers> {
    let model = models.path(cell.word("model")?)?;
    let layer = first_layer(&model, cell.count("tokens")?, cell.number("sharpness")?)?;
    let (count, seed) = (cell.count("features")?, cell.seed()?);
    let exact = Attention::new().mask(Mask::causal());
    let exact = exact.forward(layer.q.view(), layer.k.view(), layer.v.view())?.out;
    let dim = layer.q.shape().dim;
    let found = match cell.word("draw")? {
        "orthogonal" => positive(&layer, RandomFeatures::new(Draw::Orthogonal, count, dim, seed)?)?,
        "independent" => {
            positive(&layer, RandomFeatures::new(Draw::Independent, count, dim, seed)?)?
        }
        "trigonometric" => {
            // Two functions a direction.
            let features = RandomFeatures::new(Draw::Independent, (count / 2).max(1), dim, seed)?;
            trigonometric(&layer, features.directions())
        }
        other => bail!("there are no features {other:?}"),
    };
    Ok(Numbers::from([("error".to_owned(), error(&found, exact.as_slice()))]))
}

fn error(found: &[f32], exact: &[f32]) -> f64 {
    let squares = |pairs: &mut dyn Iterator<Item = f64>| pairs.map(|x| x * x).sum::<f64>();
    let differences = found.iter().zip(exact).map(|(a, b)| f64::from(*a) - f64::from(*b));
    let size = squares(&mut exact.iter().map(|&x| f64::from(x)));
    (squares(&mut differences.into_iter()) / size.max(1e-30)).sqrt()
}

/// The first layer of a Llama on the beginning of the built-in novel, its scores times `sharpness`.
fn first_layer(model: &Path, tokens: usize, sharpness: f64) -> anyhow::Result<Layer> {
    let weights = source::open(Some(model))?;
    let (config, parameters) = Parameters::from_weights(&weights)?;
    let ids = source::tokenizer(Some(model), &weights)?.encode(train::TEXT, Encode::PROMPT)?;
    ensure!(ids.len() >= tokens, "the novel has {} tokens, fewer than {tokens}", ids.len());
    let of = |name: &str| parameters.get(name).with_context(|| format!("the model has no {name}"));
    let (embedding, norm) =
        (of("model.embed_tokens.weight")?, of("model.layers.0.input_layernorm.weight")?);
    let width = config.width;
    let rows: Vec<f32> = ids[..tokens]
        .iter()
        .flat_map(|&id| normed(&embedding[id as usize * width..][..width], norm, &config))
        .collect();
    let project = |name: &str| -> anyhow::Result<Vec<f32>> {
        let matrix = of(&format!("model.layers.0.self_attn.{name}_proj.weight"))?;
        let product = |row: &[f32]| -> Vec<f32> {
            let dot = |w: &[f32]| w.iter().zip(row).map(|(w, x)| w * x).sum();
            matrix.chunks_exact(width).map(dot).collect()
        };
        Ok(rows.chunks_exact(width).flat_map(product).collect())
    };
    let [q, k, v] = ["q", "k", "v"].map(project);
    let (q, k, v) = (q?, k?, v?);
    let (heads, dim) = (config.attention.heads, config.attention.head_dim);
    let kv_heads = k.len() / tokens / dim;
    let shape = Shape { batch: 1, seq: tokens, heads, dim };
    let spread = |x: &[f32]| grouped(x, (kv_heads, heads), dim);
    let base = config.layers.first().map_or(1e4, |layer| layer.rope.base);
    // Queries and keys take a root of it each.
    let factor = sharpness.sqrt() as f32;
    let turned = |mut x: Vec<f32>| {
        rotate(&mut x, (heads, dim), base);
        x.iter_mut().for_each(|x| *x *= factor);
        Tensor::from_vec(x, shape)
    };
    Ok(Layer { q: turned(q)?, k: turned(spread(&k))?, v: Tensor::from_vec(spread(&v), shape)? })
}

/// A row divided by its size, times what is learned.
fn normed(row: &[f32], weight: &[f32], config: &ModelConfig) -> Vec<f32> {
    let mean = row.iter().map(|x| x * x).sum::<f32>() / row.len() as f32;
    let factor = 1.0 / (mean + config.norm_epsilon).sqrt();
    row.iter().zip(weight).map(|(x, w)| x * factor * w).collect()
}

/// Rows of key/value heads as rows of query heads.
fn grouped(x: &[f32], (kv_heads, heads): (usize, usize), dim: usize) -> Vec<f32> {
    let each = |row: &[f32]| -> Vec<f32> {
        (0..heads).flat_map(|h| row[h * kv_heads / heads * dim..][..dim].to_vec()).collect()
    };
    x.chunks_exact(kv_heads * dim).flat_map(each).collect()
}

/// Turns the halves of each head's rows by the row's position.
fn rotate(x: &mut [f32], (heads, dim): (usize, usize), base: f64) {
    for (n, row) in x.chunks_exact_mut(dim).enumerate() {
        let position = (n / heads) as f64;
        let (first, second) = row.split_at_mut(dim / 2);
        for (i, (a, b)) in first.iter_mut().zip(second).enumerate() {
            let angle = position * base.powf(-2.0 * i as f64 / dim as f64);
            let (sin, cos) = (angle.sin() as f32, angle.cos() as f32);
            (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
        }
    }
}

fn positive(layer: &Layer, features: RandomFeatures) -> anyhow::Result<Vec<f32>> {
    let attention = Recurrent::new(Favor::new(features));
    let tokens = Tokens::new(layer.q.view(), layer.k.view(), layer.v.view());
    Ok(attention.forward(&tokens, &mut attention.state(&tokens)?)?.as_slice().to_vec())
}

/// Weights of sines and cosines, normalised by their sum, whatever its sign.
fn trigonometric(layer: &Layer, directions: &[f32]) -> Vec<f32> {
    let Shape { seq, heads, dim, .. } = layer.q.shape();
    let scale = (dim as f64).powf(-0.25);
    // exp(|x|²/2) [cos ωx, sin ωx] of a row.
    let map = |x: &[f32]| -> Vec<f64> {
        let x: Vec<f64> = x.iter().map(|&x| scale * f64::from(x)).collect();
        let size = (x.iter().map(|x| x * x).sum::<f64>() / 2.0).exp();
        let angle = |w: &[f32]| w.iter().zip(&x).map(|(w, x)| f64::from(*w) * x).sum::<f64>();
        let both = |w: &[f32]| [size * angle(w).cos(), size * angle(w).sin()];
        directions.chunks_exact(dim).flat_map(both).collect()
    };
    let mut out = vec![0.0f32; seq * heads * dim];
    for head in 0..heads {
        let keys: Vec<Vec<f64>> = (0..seq).map(|j| map(layer.k.view().row(0, j, head))).collect();
        for i in 0..seq {
            let q = map(layer.q.view().row(0, i, head));
            let weigh = |k: &Vec<f64>| q.iter().zip(k).map(|(q, k)| q * k).sum::<f64>();
            let weights: Vec<f64> = keys[..=i].iter().map(weigh).collect();
            let sum: f64 = weights.iter().sum();
            for (j, weight) in weights.iter().enumerate() {
                let own = &mut out[(i * heads + head) * dim..][..dim];
                for (o, v) in own.iter_mut().zip(layer.v.view().row(0, j, head)) {
                    *o += (weight / sum) as f32 * v;
                }
            }
        }
    }
    out
}

/// The slope of a line through logarithms.
fn slope(points: &[(f64, f64)]) -> Option<f64> {
    let points: Vec<(f64, f64)> = points.iter().map(|(x, y)| (x.ln(), y.ln())).collect();
    let n = points.len() as f64;
    let mean = points.iter().fold((0.0, 0.0), |m, p| (m.0 + p.0 / n, m.1 + p.1 / n));
    let (up, down) = points.iter().fold((0.0, 0.0), |sum, p| {
        (sum.0 + (p.0 - mean.0) * (p.1 - mean.1), sum.1 + (p.0 - mean.0).powi(2))
    });
    (points.len() > 1).then(|| up / down)
}

/// Scores as they are, and small ones.
const SHARPNESS: [(&str, &str); 2] = [("0.1", "small scores"), ("1.0", "scores of the model")];

pub(super) fn judge(results: &Results) -> Judgement {
    let errors = |sharpness: &str, draw: &str, features: usize| {
        let of = [("sharpness", sharpness), ("draw", draw), ("features", &features.to_string())];
        results.numbers(&of, "error")
    };
    let logarithms = |sharpness: &str, draw: &str, features: usize| -> Vec<f64> {
        errors(sharpness, draw, features).iter().map(|error| error.log10()).collect()
    };
    let curve = |sharpness: &str, draw: &str| -> Vec<(f64, f64)> {
        let point = |n: usize| Some((n as f64, Sample::of(&errors(sharpness, draw, n))?.mean));
        results.counts("features").into_iter().filter_map(point).collect()
    };
    let mut checks = vec![];
    for (sharpness, name) in SHARPNESS {
        let slope = slope(&curve(sharpness, "orthogonal"));
        let words =
            format!("{name}: the error falls with a power between −0.65 and −0.35 of the features");
        let found = slope.map(|s| ((-0.65..=-0.35).contains(&s), format!("{s:.2}")));
        checks.push(Check::new(&words, found));
        let at = |draw: &str| logarithms(sharpness, draw, 256);
        let words =
            format!("{name}: 256 independent features have a larger error than orthogonal ones");
        checks.push(Check::greater(&words, &at("independent"), &at("orthogonal")));
        let words =
            format!("{name}: 256 trigonometric features have a larger error than positive ones");
        checks.push(Check::greater(&words, &at("trigonometric"), &at("independent")));
    }
    let plot = |(title, sharpness): (&'static str, &str)| Plot {
        title,
        x: Axis::log("features"),
        y: Axis::log("relative error of outputs"),
        series: results
            .values("draw")
            .into_iter()
            .map(|draw| Series { points: curve(sharpness, &draw), name: draw })
            .collect(),
    };
    let titles = [
        "Error of attention by random features, scores of the model",
        "Error of attention by random features, small scores",
    ];
    let plots = titles.into_iter().zip(["1.0", "0.1"]).map(plot).collect();
    Judgement { checks, table: table(results, &errors), plots }
}

/// Mean errors: a row for each kind of features and size of scores.
fn table(results: &Results, errors: &dyn Fn(&str, &str, usize) -> Vec<f64>) -> Table {
    let counts = results.counts("features");
    let mut head = vec!["features".to_owned()];
    head.extend(counts.iter().map(usize::to_string));
    let mut rows = vec![];
    for (sharpness, name) in SHARPNESS {
        for draw in results.values("draw") {
            let cell = |&n: &usize| {
                let sample = Sample::of(&errors(sharpness, &draw, n));
                sample.map_or_else(|| "–".to_owned(), |one| one.to_string())
            };
            let cells: Vec<String> = counts.iter().map(cell).collect();
            rows.push(std::iter::once(format!("{draw}, {name}")).chain(cells).collect());
        }
    }
    Table { head, rows }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slope_is_the_power() {
        let points: Vec<(f64, f64)> =
            [1.0, 2.0, 4.0].map(|x: f64| (x, 3.0 * x.powf(-0.5))).to_vec();
        assert!((slope(&points).unwrap() + 0.5).abs() < 1e-12);
        assert_eq!(slope(&points[..1]), None);
    }
}
