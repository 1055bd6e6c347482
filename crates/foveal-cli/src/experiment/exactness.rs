//! E11: the same attention computed in two ways.

use anyhow::bail;
use foveal::cache::{KvStore, LatentCache};
use foveal::latent::{LatentAttention, LatentCall, LatentDims, LatentForm, LatentScratch};
use foveal::linear::reference::{Sequences, States, forward};
use foveal::linear::{DecayForm, Delta, Linear, Recurrence, Recurrent, Tokens, VectorDecay};
use foveal::plan::Inputs;
use foveal::projection::{Matrix, MatrixShape};
use foveal::reference::{Input, attention};
use foveal::sparse::{Factors, Moba, SparseTransformer, Window};
use foveal::testing::normal;
use foveal::{Attention, Mask, Phase, Shape, SoftmaxState, Tensor, TensorRef, Workspace};

use super::cell::Cell;
use super::judge::{Check, Judgement, cross};
use super::results::Results;
use super::{Models, Numbers};
use crate::plot::{Axis, Plot, Series};

const HEADS: usize = 4;
/// Keys of the window.
const WINDOW: usize = 33;
/// Parts into which keys are split.
const PARTS: usize = 4;
/// The largest difference that counts as none.
const BOUND: f64 = 1e-5;

/// Random tokens.
struct Text {
    q: Tensor<f32>,
    k: Tensor<f32>,
    v: Tensor<f32>,
    /// Logarithms of decays, of a head and of each of its channels.
    decay: [Tensor<f32>; 2],
    beta: Tensor<f32>,
}

impl Text {
    fn new(tokens: usize, dim: usize, seed: u64) -> foveal::Result<Text> {
        let shape = Shape { batch: 1, seq: tokens, heads: HEADS, dim };
        let of = |n: u64| normal(shape, 100 * seed + n);
        let mapped = |shape: Shape, n: u64, f: fn(f32) -> f32| {
            let x = normal(shape, 100 * seed + n)?;
            Tensor::from_vec(x.as_slice().iter().map(|&x| f(x)).collect(), shape)
        };
        let decay = |x: f32| -0.1 * x.abs();
        let row = shape.per_row();
        Ok(Text {
            q: of(1)?,
            // Short keys, so that a delta rule stays where it is.
            k: mapped(shape, 2, |x| 0.2 * x)?,
            v: of(3)?,
            decay: [mapped(row, 4, decay)?, mapped(shape, 5, decay)?],
            beta: mapped(row, 6, |x| 1.0 / (1.0 + x.exp()))?,
        })
    }

    fn inputs(&self) -> Inputs<'_, f32, f32> {
        Inputs { q: self.q.view(), k: self.k.view(), v: self.v.view() }
    }
}

pub(super) fn run(cell: &Cell, _: &Models) -> anyhow::Result<Numbers> {
    let text = Text::new(cell.count("tokens")?, cell.count("dim")?, cell.seed()?)?;
    let x = text.inputs();
    let full = Attention::new().mask(Mask::causal());
    let [a, b] = match cell.word("pair")? {
        "full/reference" => {
            both(&full.forward(x.q, x.k, x.v)?.out, defined(&text, &Mask::causal())?)
        }
        "window/reference" => {
            let mask = Mask::window(WINDOW);
            let kernel = Attention::new().mask(mask.clone()).forward(x.q, x.k, x.v)?.out;
            both(&kernel, defined(&text, &mask)?)
        }
        "full/split" => both(&full.forward(x.q, x.k, x.v)?.out, split(&text)?),
        "full/cached" => both(&full.forward(x.q, x.k, x.v)?.out, one_by_one(&text)?),
        "mla absorbed/plain" => latent(&text, cell.seed()?)?,
        "linear/reference" => recurrence(Linear::new(), &text)?,
        "gated_delta/reference" => recurrence(Delta::gated(), &text)?,
        "gla/reference" => recurrence(VectorDecay::new(), &text)?,
        "linear/cached" => stepped(Linear::new(), &text)?,
        "gated_delta/cached" => stepped(Delta::gated(), &text)?,
        "sparse_transformer/pattern" => {
            let stride = x.q.shape().seq.isqrt();
            let layer = SparseTransformer::new(Factors::Strided { stride, window: Window::Paper })?;
            let under = Attention::new().mask(layer.mask()).forward(x.q, x.k, x.v)?.out;
            both(&layer.forward(x)?.out, wide(under.as_slice()))
        }
        "moba/pattern" => {
            let layer = Moba::new(16, 3)?;
            let choices = layer.choose(x.q, x.k)?;
            let mask = layer.mask(&choices, x.k.shape().seq);
            let under = Attention::new().mask(mask).forward(x.q, x.k, x.v)?.out;
            both(&layer.forward(x, &choices)?.out, wide(under.as_slice()))
        }
        other => bail!("there is no pair {other:?}"),
    };
    let largest = a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    anyhow::ensure!(a.len() == b.len() && !a.is_empty(), "outputs of different lengths");
    Ok(Numbers::from([("difference".to_owned(), largest)]))
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

fn both(a: &Tensor<f32>, b: Vec<f64>) -> [Vec<f64>; 2] {
    [wide(a.as_slice()), b]
}

/// The definition, in f64.
fn defined(text: &Text, mask: &Mask) -> anyhow::Result<Vec<f64>> {
    let [q, k, v] = [&text.q, &text.k, &text.v].map(|x| wide(x.as_slice()));
    let shape = text.q.shape();
    let inputs = [&q, &k, &v].map(|data| Input { data, shape });
    Ok(attention(inputs, (shape.dim as f64).powf(-0.5), mask)?.out)
}

/// Parts of the keys, each by itself, joined row by row.
fn split(text: &Text) -> anyhow::Result<Vec<f64>> {
    let Shape { seq, heads, dim, .. } = text.q.shape();
    let mut states = vec![SoftmaxState::new(dim); seq * heads];
    let size = seq.div_ceil(PARTS);
    for first in (0..seq).step_by(size) {
        let keys = first..(first + size).min(seq);
        let x = text.inputs();
        let [k, v] = [x.k, x.v].map(|x| x.tokens(keys.clone()));
        // Rows from the first of these keys on see them up to their own place; later rows see all of them.
        for (rows, mask) in [(keys.clone(), Mask::causal()), (keys.end..seq, Mask::full())] {
            if rows.is_empty() {
                continue;
            }
            let part = Attention::new().mask(mask).forward(x.q.tokens(rows.clone()), k, v)?;
            for (n, i) in rows.enumerate() {
                for head in 0..heads {
                    let (out, lse) = (part.out.view(), part.lse.view());
                    let one =
                        SoftmaxState::from_output(out.row(0, n, head), lse.row(0, n, head)[0]);
                    states[i * heads + head].merge(&one);
                }
            }
        }
    }
    let mut out = vec![0.0; dim];
    let mut all = vec![];
    for state in &states {
        state.finish(&mut out);
        all.extend(wide(&out));
    }
    Ok(all)
}

/// Generated rows, one at a time.
fn one_by_one(text: &Text) -> anyhow::Result<Vec<f64>> {
    let x = text.inputs();
    let mut all = vec![];
    for i in 0..x.q.shape().seq {
        let [k, v] = [x.k, x.v].map(|x| x.tokens(0..i + 1));
        all.extend(wide(Attention::new().decode(x.q.tokens(i..i + 1), k, v)?.out.as_slice()));
    }
    Ok(all)
}

/// Latent attention with its projections absorbed, and without.
fn latent(text: &Text, seed: u64) -> anyhow::Result<[Vec<f64>; 2]> {
    let tokens = text.q.shape().seq;
    let dims = LatentDims { heads: HEADS, latent: 32, rope: 8, nope: 16, value: 16 };
    let row = |dim, heads| Shape { batch: 1, seq: tokens, heads, dim };
    let rows = normal(row(dims.row(), 1), 100 * seed + 7)?;
    let q = normal(row(dims.query(), HEADS), 100 * seed + 8)?;
    let shape = MatrixShape { out_features: HEADS * 32, in_features: dims.latent };
    let up = normal(
        Shape { batch: 1, seq: shape.out_features, heads: 1, dim: dims.latent },
        100 * seed + 9,
    )?;
    // As large as projections of a model are.
    let up: Vec<f32> = up.as_slice().iter().map(|x| x / (dims.latent as f32).sqrt()).collect();
    let layer = LatentAttention::new(
        Attention::new().mask(Mask::causal()),
        dims,
        Matrix::from_floats(shape, &up)?,
    )?;
    let mut cache = LatentCache::<f32>::new((dims.latent, dims.rope), tokens)?;
    cache.append(rows.view())?;
    let out = |form: LatentForm| -> anyhow::Result<Vec<f64>> {
        let mut out = Tensor::zeros(row(dims.value, HEADS))?;
        let stores: [&dyn KvStore; 1] = [&cache];
        let call = LatentCall { q: q.view(), stores: &stores, phase: Phase::Prompt, form };
        let mut scratch = LatentScratch::default();
        layer.forward(call, (out.view_mut(), None), &mut scratch, &mut Workspace::new())?;
        Ok(wide(out.as_slice()))
    };
    Ok([out(LatentForm::Absorbed)?, out(LatentForm::Plain)?])
}

/// The tokens of a recurrence, with what it asks for.
fn tokens<'a>(
    form: foveal::linear::Form,
    text: &'a Text,
    part: std::ops::Range<usize>,
) -> Tokens<'a, f32> {
    let cut = |x: &'a Tensor<f32>| -> TensorRef<'a, f32> { x.view().tokens(part.clone()) };
    let mut tokens = Tokens::new(cut(&text.q), cut(&text.k), cut(&text.v));
    match form.decay {
        DecayForm::None => {}
        DecayForm::Scalar => tokens = tokens.log_decay(cut(&text.decay[0])),
        DecayForm::Vector => tokens = tokens.log_decay(cut(&text.decay[1])),
    }
    if form.beta { tokens.beta(cut(&text.beta)) } else { tokens }
}

/// Blocks of a recurrence against its definition in f64.
fn recurrence(mechanism: impl Recurrence, text: &Text) -> anyhow::Result<[Vec<f64>; 2]> {
    let form = mechanism.form();
    let layer = Recurrent::new(mechanism);
    let own = tokens(form, text, 0..text.q.shape().seq);
    let mut state = layer.state(&own)?;
    let kernel = layer.forward(&own, &mut state)?;
    let all = [&text.q, &text.k, &text.v, &text.decay[0], &text.decay[1], &text.beta];
    let numbers = all.map(|x| (wide(x.as_slice()), x.shape()));
    let input = |n: usize| Input { data: &numbers[n].0, shape: numbers[n].1 };
    let sequences = Sequences {
        q: input(0),
        k: input(1),
        v: input(2),
        log_decay: match form.decay {
            DecayForm::None => None,
            DecayForm::Scalar => Some(input(3)),
            DecayForm::Vector => Some(input(4)),
        },
        beta: form.beta.then(|| input(5)),
        present: None,
        cuts: None,
    };
    let mut states = States::zeros(state.shape(), form.sums);
    let defined = forward(layer.mechanism(), &sequences, &mut states);
    Ok(both(&kernel, defined))
}

/// A recurrence on the whole text, and token by token.
fn stepped(mechanism: impl Recurrence, text: &Text) -> anyhow::Result<[Vec<f64>; 2]> {
    let form = mechanism.form();
    let layer = Recurrent::new(mechanism);
    let seq = text.q.shape().seq;
    let whole = tokens(form, text, 0..seq);
    let kernel = layer.forward(&whole, &mut layer.state(&whole)?)?;
    let mut state = layer.state(&tokens(form, text, 0..1))?;
    let mut all = vec![];
    for i in 0..seq {
        let one = layer.forward(&tokens(form, text, i..i + 1), &mut state)?;
        all.extend(wide(one.as_slice()));
    }
    Ok(both(&kernel, all))
}

pub(super) fn judge(results: &Results) -> Judgement {
    let check = |pair: &String| {
        let largest =
            results.numbers(&[("pair", pair)], "difference").into_iter().fold(0.0, f64::max);
        Check::new(pair, Some((largest < BOUND, format!("{largest:.1e} at most"))))
    };
    let pairs = results.values("pair");
    let line = |pair: &String| {
        let points = results.counts("tokens").into_iter().filter_map(|tokens| {
            let of = [("pair", pair.as_str()), ("tokens", &tokens.to_string())];
            let largest = results.numbers(&of, "difference").into_iter().reduce(f64::max)?;
            Some((tokens as f64, largest.max(1e-9)))
        });
        Series { name: pair.clone(), points: points.collect() }
    };
    let plot = Plot {
        title: "The largest difference of two ways",
        x: Axis::log("tokens"),
        y: Axis::log("absolute difference"),
        series: pairs.iter().map(line).collect(),
    };
    let checks = pairs.iter().map(check).collect();
    Judgement { checks, table: cross(results, ["pair", "tokens"], "difference"), plots: vec![plot] }
}
