//! Gradients of what scores are made of besides queries and keys, and through it: cap, biases, sinks, dropout.
//! The engine against the definition in f64, and the definition against finite differences.

mod support;

use foveal::mask::Site;
use foveal::position::{RelativeBias, Slopes};
use foveal::reference::{Derivatives, Input, Options, attention_backward, attention_with};
use foveal::{Attention, Cpu, Dropout, Level, Mask, Shape, Tensor, Threads};
use std::num::NonZeroUsize;
use support::backward::{Call, Wanted, gather};
use support::sizes::Sizes;
use support::{Random, error};

const SIZES: Sizes =
    Sizes { batch: 2, queries: 310, keys: 270, heads: 4, kv_heads: 2, dim: 12, value_dim: 9 };
const BUCKETS: usize = 16;
const CAP: f32 = 1.5;
const DROPOUT: Dropout = Dropout { rate: 0.3, seed: 11 };

/// Numbers of all terms; the bias has some extents of 1.
struct Terms {
    bias: Tensor<f32>,
    slopes: Vec<f32>,
    table: Vec<f32>,
    sinks: Vec<f32>,
}

impl Terms {
    fn random(shape: Shape) -> Terms {
        let mut random = Random::new(99);
        let heads = SIZES.heads;
        Terms {
            bias: random.tensor(shape, 1.0),
            slopes: (0..heads).map(|_| random.number() * 0.02).collect(),
            table: (0..BUCKETS * heads).map(|_| random.number()).collect(),
            sinks: (0..heads).map(|_| random.number()).collect(),
        }
    }

    fn relative(&self) -> RelativeBias<'_> {
        RelativeBias::bidirectional(&self.table, SIZES.heads, 60).unwrap()
    }

    fn attention(&self) -> Attention<'_> {
        Attention::new()
            .softcap(CAP)
            .bias(self.bias.view())
            .alibi(Slopes::Given(&self.slopes))
            .relative_bias(self.relative())
            .sinks(&self.sinks)
            .dropout(DROPOUT)
    }

    fn wanted(&self) -> Wanted {
        Wanted {
            bias: Some(self.bias.shape()),
            slopes: self.slopes.len(),
            table: self.table.len(),
            sinks: self.sinks.len(),
        }
    }

    /// The place of a row's number in the bias.
    fn place(&self, [batch, i, head, j]: [usize; 4]) -> usize {
        let shape = self.bias.shape();
        let own = |index, extent| if extent == 1 { 0 } else { index };
        let (batch, i) = (own(batch, shape.batch), own(i, shape.seq));
        ((batch * shape.seq + i) * shape.heads + own(head, shape.heads)) * shape.dim + j
    }

    fn added(&self, at: Site, i: usize, j: usize) -> f64 {
        let bias = self.bias.as_slice()[self.place([at.batch, i, at.q_head, j])];
        let bucket = self.relative().bucket(behind(i, j));
        let table = self.table[bucket * SIZES.heads + at.q_head];
        let slope = f64::from(self.slopes[at.q_head]) * behind(i, j).abs() as f64;
        f64::from(bias) + f64::from(table) - slope
    }

    fn define(&self, call: &Call<f32>, mask: &Mask) -> Derivatives {
        let sinks: Vec<f64> = self.sinks.iter().map(|&x| x.into()).collect();
        let options = Options {
            softcap: Some(CAP.into()),
            bias: Some(&|at, i, j| self.added(at, i, j)),
            sinks: Some(&sinks),
            dropout: Some(&|at: Site, i, j| {
                let position = behind(i, j) + j as isize;
                DROPOUT.factor((at.batch, at.q_head), position, j).into()
            }),
            ..Options::new(1.0 / (SIZES.dim as f64).sqrt(), mask)
        };
        call.define(&options)
    }
}

/// Positions from a key to a query.
fn behind(i: usize, j: usize) -> isize {
    (i + SIZES.keys) as isize - (SIZES.queries + j) as isize
}

fn threads(n: usize) -> Threads {
    Threads::at_most(NonZeroUsize::new(n).unwrap())
}

/// A bias of every shape, whose extents of 1 are shared.
fn bias_shapes() -> impl Iterator<Item = Shape> {
    let Sizes { batch, queries, heads, keys, .. } = SIZES;
    (0..8).map(move |n| Shape {
        batch: if n & 1 == 0 { batch } else { 1 },
        seq: if n & 2 == 0 { queries } else { 1 },
        heads: if n & 4 == 0 { heads } else { 1 },
        dim: keys,
    })
}

#[test]
fn every_term_at_once_under_every_sharing_of_the_bias() {
    let call = Call::<f32>::random(SIZES, 3);
    for (n, shape) in bias_shapes().enumerate() {
        let terms = Terms::random(shape);
        let mask = [Mask::causal(), Mask::full(), Mask::band(Some(150), Some(20))][n % 3].clone();
        let expected = terms.define(&call, &mask);
        let extents = (call.q.shape(), SIZES.keys);
        let sum = |len, place: &dyn Fn([usize; 4]) -> (usize, f64)| {
            gather(&expected.d_scores, extents, len, place)
        };
        let bias = sum(terms.bias.as_slice().len(), &|at| (terms.place(at), 1.0));
        let slopes = sum(SIZES.heads, &|[_, i, head, j]| (head, -(behind(i, j).abs() as f64)));
        let relative = terms.relative();
        let table = sum(terms.table.len(), &|[_, i, head, j]| {
            (relative.bucket(behind(i, j)) * SIZES.heads + head, 1.0)
        });
        for level in Level::available() {
            let attention = terms.attention().mask(mask.clone());
            let one = attention.clone().cpu(Cpu { level, threads: threads(1) });
            let got = call.run_with(&one, terms.wanted());
            let term_gradients = [
                ("dbias", got.d_bias.clone(), &bias[..]),
                ("dslopes", got.d_slopes.clone(), &slopes),
                ("dtable", got.d_table.clone(), &table),
                ("dsinks", got.d_sinks.clone(), &expected.d_sinks),
            ];
            for (what, got, expected) in got.beside(&expected).into_iter().chain(term_gradients) {
                let worst = error(&got, expected);
                assert!(worst <= 5e-6, "{level} {mask} {shape}: {what} off by {worst:e}");
            }
            for n in [2, 3, 5] {
                let many = attention.clone().cpu(Cpu { level, threads: threads(n) });
                assert_eq!(
                    call.run_with(&many, terms.wanted()),
                    got,
                    "{level} {shape} {n} threads"
                );
            }
        }
    }
}

#[test]
fn gradients_that_are_not_asked_for_change_nothing() {
    let call = Call::<f32>::random(SIZES, 4);
    for shape in bias_shapes() {
        let terms = Terms::random(shape);
        let attention = terms.attention().mask(Mask::causal());
        let all = call.run_with(&attention, terms.wanted());
        let none = call.run(&attention);
        assert_eq!((&none.d_q, &none.d_k, &none.d_v), (&all.d_q, &all.d_k, &all.d_v));
        let sinks = call.run_with(&attention, Wanted { bias: None, ..terms.wanted() });
        assert_eq!((&sinks.d_sinks, &sinks.d_table), (&all.d_sinks, &all.d_table));
    }
}

#[test]
fn a_nan_comes_out_of_every_term_that_it_reaches() {
    let clean = Call::<f32>::random(SIZES, 5);
    let terms = Terms::random(Shape { heads: 1, ..bias_shapes().next().unwrap() });
    let attention = terms.attention().mask(Mask::window(40));
    let mut call = clean.clone();
    let (row, head) = (200, 1);
    let mut d_out = call.d_out.clone().into_vec();
    d_out[(row * SIZES.heads + head) * SIZES.value_dim] = f32::NAN;
    call.d_out = Tensor::from_vec(d_out, call.d_out.shape()).unwrap();
    let (got, clean) =
        (call.run_with(&attention, terms.wanted()), clean.run_with(&attention, terms.wanted()));
    for h in 0..SIZES.heads {
        assert_eq!(got.d_slopes[h].is_nan(), h == head);
        assert_eq!(got.d_sinks[h].is_nan(), h == head);
    }
    for (n, (got, clean)) in got.d_bias.iter().zip(&clean.d_bias).enumerate() {
        let (i, j) = (n / SIZES.keys, n % SIZES.keys);
        let seen = i == row && (0..40).contains(&behind(i, j));
        assert_eq!(got.is_nan(), seen, "row {i}, key {j}");
        assert!(seen || (got - clean).abs() < 1e-5, "row {i}, key {j}: {got} {clean}");
    }
}

/// A loss over both results of a small attention with every term.
struct Small {
    inputs: Vec<(Shape, Vec<f64>)>,
    bias: Vec<f64>,
    sinks: Vec<f64>,
    upstream: [Vec<f64>; 2],
}

impl Small {
    fn new() -> Small {
        let mut random = Random::new(21);
        let q = Shape { batch: 2, seq: 5, heads: 4, dim: 3 };
        let k = Shape { seq: 4, heads: 2, ..q };
        let v = Shape { dim: 2, ..k };
        let mut numbers = |n: usize| (0..n).map(|_| f64::from(random.number())).collect::<Vec<_>>();
        let inputs = [q, k, v].map(|s| (s, numbers(s.checked_len().unwrap())));
        Small {
            inputs: inputs.to_vec(),
            bias: numbers(2 * 5 * 4 * 4),
            sinks: numbers(4),
            upstream: [numbers(2 * 5 * 4 * 2), numbers(2 * 5 * 4)],
        }
    }

    fn with<R>(&self, mask: &Mask, run: impl FnOnce([Input<'_>; 3], &Options<'_>) -> R) -> R {
        let inputs = [0, 1, 2].map(|n| Input { data: &self.inputs[n].1, shape: self.inputs[n].0 });
        let bias =
            |at: Site, i: usize, j: usize| self.bias[((at.batch * 5 + i) * 4 + at.q_head) * 4 + j];
        let dropout = |at: Site, i: usize, j: usize| {
            if (at.q_head + i + 2 * j).is_multiple_of(4) { 0.0 } else { 4.0 / 3.0 }
        };
        let options = Options {
            softcap: Some(0.9),
            bias: Some(&bias),
            sinks: Some(&self.sinks),
            dropout: Some(&dropout),
            ..Options::new(0.8, mask)
        };
        run(inputs, &options)
    }

    fn loss(&self, mask: &Mask) -> f64 {
        let result = self.with(mask, |inputs, options| attention_with(inputs, options).unwrap());
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        dot(&result.out, &self.upstream[0]) + dot(&result.lse, &self.upstream[1])
    }

    fn derivatives(&self, mask: &Mask) -> Derivatives {
        let q = self.inputs[0].0;
        let d_out = Input { data: &self.upstream[0], shape: Shape { dim: 2, ..q } };
        let d_lse = Input { data: &self.upstream[1], shape: q.per_row() };
        self.with(mask, |inputs, options| {
            attention_backward(inputs, options, [d_out, d_lse]).unwrap()
        })
    }

    fn numbers(&mut self, which: usize) -> &mut [f64] {
        match which {
            0..3 => &mut self.inputs[which].1,
            3 => &mut self.bias,
            _ => &mut self.sinks,
        }
    }
}

#[test]
fn the_definition_agrees_with_finite_differences() {
    // Five queries over four keys: under the causal mask the first row sees nothing but its sink.
    for mask in [Mask::full(), Mask::causal(), Mask::window(2)] {
        let mut small = Small::new();
        let d = small.derivatives(&mask);
        for (which, gradient) in [d.d_q, d.d_k, d.d_v, d.d_scores, d.d_sinks].iter().enumerate() {
            assert_eq!(gradient.len(), small.numbers(which).len());
            for (n, &got) in gradient.iter().enumerate() {
                let step = 1e-5;
                let mut moved = |by: f64| {
                    small.numbers(which)[n] += by;
                    small.loss(&mask)
                };
                let (above, below) = (moved(step), moved(-2.0 * step));
                moved(step);
                let expected = (above - below) / (2.0 * step);
                assert!((got - expected).abs() < 1e-8, "{mask} {which} {n}: {got} {expected}");
            }
        }
    }
}
