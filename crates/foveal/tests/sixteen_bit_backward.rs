//! Gradients of f16 and bf16 against the definition in f64 on the same rounded inputs, by two measures, on every level.
//!
//! The yardstick: at most three times the error of the plain computation in the same type, every matrix rounded to it.
//! And number by number what rounding may do, with u for the rounding of results, w for that of weights that go into
//! products (u where bf16 is multiplied in pairs; at most that elsewhere):
//!
//! ```text
//! δO ≤ u |O| + w Σ p |v|       δD ≤ Σ |dO| δO         |δdV| ≤ u |dV| + w Σ_i p |dO|
//! |δdQ| ≤ u |dQ| + scale Σ_j (w |ds| + p δD) |k|      |δdK| ≤ u |dK| + scale Σ_i (w |ds| + p δD) |q|
//! ```

mod support;

use foveal::mask::Site;
use foveal::reference::{Derivatives, Options};
use foveal::{Attention, Cpu, DType, Dropout, Element, Level, Mask, Scale, Shape, Tensor, Threads};
use half::{bf16, f16};
use support::backward::{Call, Wanted};
use support::sizes::{Sizes, masks, random_mask};
use support::{cpus, error};

/// What is left to rounding of f32, relative to 1 + the largest number of a gradient; with every term at once.
const SLACK: f64 = 5e-6;

/// Gradients as they are defined, by the plain computation, and how far each number may be off.
struct Truth {
    derivatives: Derivatives,
    plain: [Vec<f32>; 3],
    bounds: [Vec<f64>; 3],
}

/// One query row in f64.
struct Row<'a, E> {
    call: &'a Call<E>,
    options: &'a Options<'a>,
    at: Site,
    i: usize,
    seen: Vec<usize>,
}

fn wide<E: Element>(row: &[E]) -> Vec<f64> {
    row.iter().map(|x| x.to_f32().into()).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add(to: &mut [f64], factor: f64, from: &[f64]) {
    to.iter_mut().zip(from).for_each(|(to, from)| *to += factor * from);
}

/// Of a row: weights after dropout, gradients of scores before and the derivative of the cap.
struct Weights {
    p: Vec<f64>,
    kept: Vec<f64>,
    d_s: Vec<f64>,
    bend: Vec<f64>,
}

impl<E: Element> Row<'_, E> {
    fn key(&self, j: usize) -> Vec<f64> {
        wide(self.call.k.view().row(self.at.batch, j, self.at.kv_head))
    }

    fn value(&self, j: usize) -> Vec<f64> {
        wide(self.call.v.view().row(self.at.batch, j, self.at.kv_head))
    }

    fn query(&self) -> Vec<f64> {
        wide(self.call.q.view().row(self.at.batch, self.i, self.at.q_head))
    }

    fn d_out(&self) -> Vec<f64> {
        wide(self.call.d_out.view().row(self.at.batch, self.i, self.at.q_head))
    }

    /// What the formulas make of the row, each matrix rounded by `round`.
    fn weights(&self, round: &dyn Fn(f64) -> f64) -> Weights {
        let (options, at) = (self.options, self.at);
        let (query, d_out) = (self.query(), self.d_out());
        let mut bend = vec![];
        let mut score = |j: usize| {
            let score = round(round(dot(&query, &self.key(j))) * options.scale);
            let tanh = options.softcap.map_or(0.0, |cap| (score / cap).tanh());
            bend.push(1.0 - tanh * tanh);
            let score = options.softcap.map_or(score, |cap| round(cap * tanh));
            round(score + options.bias.map_or(0.0, |bias| bias(at, self.i, j)))
        };
        let scores: Vec<f64> = self.seen.iter().map(|&j| score(j)).collect();
        let sink = options.sinks.map(|sinks| sinks[at.q_head]);
        let max = scores.iter().copied().chain(sink).fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = scores.iter().copied().chain(sink).map(|s| (s - max).exp()).sum();
        let p: Vec<f64> = scores.iter().map(|s| round((s - max).exp() / sum)).collect();
        let kept: Vec<f64> = self
            .seen
            .iter()
            .map(|&j| options.dropout.map_or(1.0, |dropout| dropout(at, self.i, j)))
            .collect();
        let d_p: Vec<f64> = (self.seen.iter().zip(&kept))
            .map(|(&j, kept)| kept * round(dot(&d_out, &self.value(j))))
            .collect();
        let d_lse = self
            .call
            .d_lse
            .as_ref()
            .map_or(0.0, |d_lse| f64::from(d_lse.view().row(at.batch, self.i, at.q_head)[0]));
        let delta = dot(&p, &d_p) - d_lse;
        let d_s = p.iter().zip(&d_p).map(|(p, d_p)| round(p * (d_p - delta))).collect();
        Weights { p, kept, d_s, bend }
    }

    /// How far D of the row may be off.
    fn delta_bound(&self, weights: &Weights, u: f64) -> f64 {
        let (mut out, mut sizes) = (vec![0.0; self.call.v.shape().dim], vec![]);
        sizes.clone_from(&out);
        for (n, &j) in self.seen.iter().enumerate() {
            let value = self.value(j);
            let p = weights.p[n] * weights.kept[n];
            add(&mut out, p, &value);
            add(&mut sizes, p, &value.iter().map(|x| x.abs()).collect::<Vec<_>>());
        }
        let d_out = self.d_out();
        (0..out.len()).map(|d| d_out[d].abs() * u * (out[d].abs() + sizes[d])).sum()
    }
}

/// Where the sums of a call's rows go.
struct Sums {
    plain: [Vec<f64>; 3],
    bounds: [Vec<f64>; 3],
}

impl Sums {
    fn new<E: Element>(call: &Call<E>) -> Sums {
        let zeros = [&call.q, &call.k, &call.v].map(|x| vec![0.0; x.as_slice().len()]);
        Sums { plain: zeros.clone(), bounds: zeros }
    }

    fn add_row<E: Element>(&mut self, row: &Row<'_, E>, u: f64) {
        let round = |x: f64| f64::from(E::from_f32(x as f32).to_f32());
        let (plain, exact) = (row.weights(&round), row.weights(&|x| x));
        let delta = row.delta_bound(&exact, u);
        let (q, k, v) = (row.call.q.shape(), row.call.k.shape(), row.call.v.shape());
        let Site { batch, q_head, kv_head } = row.at;
        let own = ((batch * q.seq + row.i) * q.heads + q_head) * q.dim;
        let abs = |x: Vec<f64>| x.iter().map(|x| x.abs()).collect::<Vec<f64>>();
        let scale = row.options.scale;
        for (n, &j) in row.seen.iter().enumerate() {
            let (key, value) = (row.key(j), row.value(j));
            let at = (batch * k.seq + j) * k.heads + kv_head;
            let d_s = round(plain.d_s[n] * plain.bend[n] * scale);
            let p = round(plain.p[n] * plain.kept[n]);
            let [d_q, d_k, d_v] = &mut self.plain;
            add(&mut d_q[own..][..q.dim], d_s, &key);
            add(&mut d_k[at * k.dim..][..k.dim], d_s, &row.query());
            add(&mut d_v[at * v.dim..][..v.dim], p, &row.d_out());
            let d_s = scale.abs() * exact.bend[n] * (u * exact.d_s[n].abs() + exact.p[n] * delta);
            let p = u * exact.p[n] * exact.kept[n];
            let [d_q, d_k, d_v] = &mut self.bounds;
            add(&mut d_q[own..][..q.dim], d_s, &abs(key));
            add(&mut d_k[at * k.dim..][..k.dim], d_s, &abs(row.query()));
            add(&mut d_v[at * v.dim..][..value.len()], p, &abs(row.d_out()));
        }
    }
}

impl Truth {
    fn new<E: Element>(call: &Call<E>, options: &Options<'_>) -> Truth {
        let u = match E::DTYPE {
            DType::Bf16 => 2f64.powi(-8),
            _ => 2f64.powi(-11),
        };
        let (q, k) = (call.q.shape(), call.k.shape());
        let mut sums = Sums::new(call);
        for (batch, i) in (0..q.batch).flat_map(|b| (0..q.seq).map(move |i| (b, i))) {
            for q_head in 0..q.heads {
                let at = Site { batch, q_head, kv_head: q_head / (q.heads / k.heads) };
                let position = (i + k.seq) as isize - q.seq as isize;
                let seen = (0..k.seq).filter(|&j| options.mask.allows(at, position, j)).collect();
                sums.add_row(&Row { call, options, at, i, seen }, u);
            }
        }
        let derivatives = call.define(options);
        let Derivatives { d_q, d_k, d_v, .. } = &derivatives;
        let mut bounds = sums.bounds;
        for (bounds, exact) in bounds.iter_mut().zip([d_q, d_k, d_v]) {
            let size = exact.iter().fold(0.0, |m: f64, x| m.max(x.abs()));
            for (bound, x) in bounds.iter_mut().zip(exact) {
                // The last rounding is of a number that may be off already.
                *bound = *bound * (1.0 + u) + u * x.abs() + SLACK * (1.0 + size);
            }
        }
        let round = |x: Vec<f64>| x.iter().map(|&x| E::from_f32(x as f32).to_f32()).collect();
        Truth { derivatives, plain: sums.plain.map(round), bounds }
    }

    /// Holds every number to its bound; returns the largest errors, ours and the plain computation's.
    fn errors<E: Element>(
        &self,
        what: &str,
        call: &Call<E>,
        attention: &Attention<'_>,
    ) -> [(f64, f64); 3] {
        let got = call.run(attention);
        let all = got.beside(&self.derivatives);
        std::array::from_fn(|which| {
            let (name, got, expected) = &all[which];
            for (n, ((&got, expected), bound)) in
                got.iter().zip(*expected).zip(&self.bounds[which]).enumerate()
            {
                let off = (f64::from(got) - expected).abs();
                assert!(off <= *bound, "{what}: {name}, number {n} off by {off:e} of {bound:e}");
            }
            (error(got, expected), error(&self.plain[which], expected))
        })
    }

    fn check<E: Element>(&self, what: &str, call: &Call<E>, attention: &Attention<'_>) {
        yardstick(what, self.errors(what, call, attention));
    }
}

/// At most three times the plain computation's errors; where those happen to be none, nothing but rounding of f32.
fn yardstick(what: &str, errors: [(f64, f64); 3]) {
    for (name, (own, plain)) in ["dQ", "dK", "dV"].iter().zip(errors) {
        let most = 3.0 * plain.max(2e-6);
        assert!(own <= most, "{what}: {name} off by {own:e}, plainly by {plain:e}");
    }
}

/// Errors on every level.
fn errors<E: Element>(sizes: Sizes, mask: &Mask) -> Vec<[(f64, f64); 3]> {
    let call = Call::<E>::random(sizes, sizes.queries as u64 * 31 + sizes.keys as u64);
    let truth = Truth::new(&call, &Options::new(1.0 / (sizes.dim as f64).sqrt(), mask));
    cpus()
        .map(|cpu| {
            let what = format!("{} {sizes:?} {mask} {}", E::DTYPE, cpu.level);
            truth.errors(&what, &call, &Attention::new().mask(mask.clone()).cpu(cpu))
        })
        .collect()
}

fn check<E: Element>(sizes: Sizes, mask: &Mask) {
    for (cpu, errors) in cpus().zip(errors::<E>(sizes, mask)) {
        yardstick(&format!("{} {sizes:?} {mask} {}", E::DTYPE, cpu.level), errors);
    }
}

/// A handful of numbers is rounded by luck: the yardstick is for all small calls together.
fn small_shapes<E: Element>() {
    let mut worst = vec![[(0.0f64, 0.0f64); 3]; cpus().count()];
    for (queries, keys) in (0..=9).flat_map(|queries| (0..=9).map(move |keys| (queries, keys))) {
        let dim = [1, 2, 3, 7, 8, 9, 16, 17, 31, 33][(queries * 3 + keys) % 10];
        let (heads, kv_heads) = [(1, 1), (2, 1), (2, 2), (6, 3), (6, 2)][(queries + keys) % 5];
        let value_dim = [1, 5, 16, 17, 40][(queries + 2 * keys) % 5];
        let sizes = Sizes { batch: 2, queries, keys, heads, kv_heads, dim, value_dim };
        for mask in masks(sizes) {
            for (worst, errors) in worst.iter_mut().zip(errors::<E>(sizes, &mask)) {
                for (worst, error) in worst.iter_mut().zip(errors) {
                    *worst = (worst.0.max(error.0), worst.1.max(error.1));
                }
            }
        }
    }
    for (cpu, errors) in cpus().zip(worst) {
        yardstick(&format!("{} {}", E::DTYPE, cpu.level), errors);
    }
}

#[test]
fn all_small_shapes() {
    small_shapes::<bf16>();
    small_shapes::<f16>();
}

#[test]
fn shapes_around_every_block_size() {
    for (n, (queries, keys)) in
        [(5, 63), (7, 65), (95, 31), (97, 257), (193, 300), (289, 40), (13, 700), (133, 290)]
            .into_iter()
            .enumerate()
    {
        let dim = [64, 80, 33, 128, 15, 72, 1, 130][n];
        let value_dim = [63, 48, 128, 80, 31, 257, 33, 40][n];
        let (heads, kv_heads) = [(4, 2), (1, 1), (3, 1), (2, 2)][n % 4];
        let sizes = Sizes { batch: 1, queries, keys, heads, kv_heads, dim, value_dim };
        for mask in [Mask::full(), Mask::causal(), Mask::window(37), random_mask(sizes, 3)] {
            check::<bf16>(sizes, &mask);
        }
        check::<f16>(sizes, &Mask::causal());
    }
}

#[test]
fn any_scale() {
    let sizes =
        Sizes { batch: 1, queries: 9, keys: 70, heads: 2, kv_heads: 1, dim: 7, value_dim: 8 };
    let call = Call::<bf16>::random(sizes, 5);
    for scale in [1.0f32, -0.7, 0.0] {
        let mask = Mask::causal();
        let truth = Truth::new(&call, &Options::new(scale.into(), &mask));
        for cpu in cpus() {
            let attention = Attention::new().mask(mask.clone()).cpu(cpu);
            let attention = attention.scale(Scale::Value(scale));
            truth.check(&format!("scale {scale} {}", cpu.level), &call, &attention);
        }
    }
}

/// Cap, bias, sinks and dropout at once.
fn terms<E: Element>(sizes: Sizes, mask: &Mask) {
    let call = Call::<E>::random(sizes, 12);
    let q = call.q.shape();
    let shape = Shape { batch: 1, seq: 1, heads: q.heads, dim: sizes.keys };
    let bias: Tensor<f32> = support::Random::new(3).tensor(shape, 1.0);
    let sinks: Vec<f32> = (0..q.heads).map(|head| head as f32 * 0.5 - 1.0).collect();
    let wide_sinks: Vec<f64> = sinks.iter().map(|&x| x.into()).collect();
    let dropout = Dropout { rate: 0.3, seed: 11 };
    let dropped = |at: Site, row: usize, j: usize| -> f64 {
        let position = (row + sizes.keys) as isize - q.seq as isize;
        dropout.factor((at.batch, at.q_head), position, j).into()
    };
    let options = Options {
        softcap: Some(1.5),
        bias: Some(&|at: Site, _, j| bias.view().row(0, 0, at.q_head)[j].into()),
        sinks: Some(&wide_sinks),
        dropout: Some(&dropped),
        ..Options::new(1.0 / (sizes.dim as f64).sqrt(), mask)
    };
    let truth = Truth::new(&call, &options);
    for cpu in cpus() {
        let attention = Attention::new().mask(mask.clone()).cpu(cpu);
        let attention = attention.softcap(1.5).bias(bias.view()).sinks(&sinks).dropout(dropout);
        let what = format!("{} {sizes:?} {mask} {}", E::DTYPE, cpu.level);
        truth.check(&what, &call, &attention);
    }
}

#[test]
fn every_term_at_once() {
    let sizes =
        Sizes { batch: 2, queries: 110, keys: 270, heads: 4, kv_heads: 2, dim: 12, value_dim: 9 };
    for mask in [Mask::causal(), Mask::full(), Mask::band(Some(150), Some(20))] {
        terms::<bf16>(sizes, &mask);
    }
    terms::<f16>(sizes, &Mask::causal());
    terms::<bf16>(Sizes { queries: 3, keys: 5, ..sizes }, &Mask::full());
}

/// Gradients of terms are sums of dS before it is rounded. (Without gradients of the output there is no D, which would
/// hold the rounding of the output that forward left.)
#[test]
fn gradients_of_terms_are_not_rounded() {
    let sizes =
        Sizes { batch: 1, queries: 97, keys: 130, heads: 2, kv_heads: 1, dim: 12, value_dim: 9 };
    let call = Call::<bf16>::random(sizes, 4);
    let zeros = vec![bf16::ZERO; call.d_out.as_slice().len()];
    let call = Call { d_out: Tensor::from_vec(zeros, call.d_out.shape()).unwrap(), ..call };
    let shape = Shape { batch: 1, seq: 97, heads: 2, dim: 130 };
    let bias: Tensor<f32> = support::Random::new(3).tensor(shape, 1.0);
    let mask = Mask::causal();
    let options = Options {
        bias: Some(&|at: Site, i, j| bias.view().row(0, i, at.q_head)[j].into()),
        ..Options::new(1.0 / (sizes.dim as f64).sqrt(), &mask)
    };
    let expected = call.define(&options).d_scores;
    for cpu in cpus() {
        let attention = Attention::new().mask(mask.clone()).bias(bias.view()).cpu(cpu);
        let got = call.run_with(&attention, Wanted { bias: Some(shape), ..Wanted::default() });
        let worst = error(&got.d_bias, &expected);
        assert!(worst <= 3e-6, "{}: dbias off by {worst:e}", cpu.level);
    }
}

/// Finite numbers that a row may not see change no bit of its gradient, neighbours of a pair included.
#[test]
fn what_a_row_may_not_see() {
    for (dim, value_dim) in [(24, 33), (7, 16)] {
        let shape = Shape { batch: 1, seq: 300, heads: 2, dim };
        let sizes =
            Sizes { batch: 1, queries: 300, keys: 300, heads: 2, kv_heads: 2, dim, value_dim };
        let call = Call::<bf16>::random(sizes, 9);
        let spoiled = |x: &Tensor<bf16>, first: usize, with: f32| {
            let mut data = x.as_slice().to_vec();
            data[first * 2 * x.shape().dim..].fill(bf16::from_f32(with));
            Tensor::from_vec(data, x.shape()).unwrap()
        };
        for cpu in cpus() {
            let attention = Attention::new().mask(Mask::causal()).cpu(cpu);
            let clean = call.run(&attention);
            for first in [1, 6, 95, 96, 255, 256, 299] {
                let later = Call {
                    k: spoiled(&call.k, first, 1e4),
                    v: spoiled(&call.v, first, 1e15),
                    ..call.clone()
                };
                let (got, seen) = (later.run(&attention), first * shape.heads * dim);
                assert_eq!(got.d_q[..seen], clean.d_q[..seen], "{} {first}", cpu.level);
                assert_ne!(got.d_q[seen..], clean.d_q[seen..], "{} {first}", cpu.level);
            }
        }
    }
}

/// f32 and f16 take the same code on the last two levels; bf16 does not.
#[test]
fn pairs_are_for_bf16_alone() {
    let (Ok(numbers), Ok(pairs)) = (Level::named("avx512"), Level::named("avx512bf16")) else {
        return;
    };
    let sizes =
        Sizes { batch: 1, queries: 60, keys: 300, heads: 4, kv_heads: 1, dim: 64, value_dim: 64 };
    fn same<E: Element + PartialEq>(sizes: Sizes, levels: [Level; 2]) -> bool {
        let call = Call::<E>::random(sizes, 6);
        let [a, b] = levels
            .map(|level| call.run(&Attention::new().cpu(Cpu { level, threads: Threads::ONE })));
        a == b
    }
    assert!(same::<f32>(sizes, [numbers, pairs]) && same::<f16>(sizes, [numbers, pairs]));
    assert!(!same::<bf16>(sizes, [numbers, pairs]));
}
