//! Differential attention against golden vectors, finite differences of its definition, and itself.

mod support;

use foveal::cache::{ContiguousCache, KvStore};
use foveal::differential::{Differential, DifferentialBackward, Lambda, Pairs};
use foveal::nn::RmsNorm;
use foveal::reference::{Input, attention};
use foveal::{Attention, Cpu, Element, Error, Mask, Phase, Scale, Shape, Tensor, Threads};
use half::bf16;
use support::golden::{Case, cases, check};
use support::{Random, cpus, tokens};

/// The tensors and vectors of a call, in this order.
const NAMES: [&str; 10] = [
    "q1",
    "q2",
    "k1",
    "k2",
    "v",
    "lambda_q1",
    "lambda_k1",
    "lambda_q2",
    "lambda_k2",
    "norm_weight",
];

/// A call in f64.
#[derive(Debug, Clone)]
struct Call {
    q: Shape,
    k: Shape,
    v: Shape,
    /// By [`NAMES`].
    numbers: [Vec<f64>; 10],
    init: f64,
    scale: f64,
    mask: Mask,
}

const EPSILON: f64 = 1e-5;

impl Call {
    fn random([queries, keys]: [usize; 2], heads: [usize; 2], mask: Mask) -> Call {
        let mut random = Random::new(7);
        let q = Shape { batch: 2, seq: queries, heads: heads[0], dim: 5 };
        let k = Shape { seq: keys, heads: heads[1], ..q };
        let v = Shape { dim: 9, ..k };
        let count = |shape: Shape| shape.checked_len().unwrap();
        let lengths =
            [count(q), count(q), count(k), count(k), count(v), q.dim, q.dim, q.dim, q.dim, v.dim];
        let numbers =
            lengths.map(|len| (0..len).map(|_| f64::from(random.number())).collect::<Vec<_>>());
        Call { q, k, v, numbers, init: 0.5, scale: 0.7, mask }
    }

    fn golden() -> Vec<(Call, Case)> {
        let shape = |case: &Case, name| {
            let &[batch, seq, heads, dim] = &case.tensor(name).shape[..] else { panic!("{name}") };
            Shape { batch, seq, heads, dim }
        };
        let call = |case: &Case| Call {
            q: shape(case, "q1"),
            k: shape(case, "k1"),
            v: shape(case, "v"),
            numbers: NAMES.map(|name| case.tensor(name).data.clone()),
            init: case.number("lambda_init"),
            scale: case.number("scale"),
            mask: Mask::causal(),
        };
        let pair = |case| (call(&case), case);
        cases("differential").into_iter().map(pair).collect()
    }

    fn out(&self) -> Shape {
        Shape { dim: self.v.dim, ..self.q }
    }

    /// The output as it is defined.
    fn define(&self) -> Vec<f64> {
        let dot = |a: usize, b: usize| -> f64 {
            self.numbers[a].iter().zip(&self.numbers[b]).map(|(a, b)| a * b).sum()
        };
        let lambda = dot(5, 6).exp() - dot(7, 8).exp() + self.init;
        let map = |n: usize| {
            let input = |at: usize, shape| Input { data: &self.numbers[at], shape };
            let inputs = [input(n, self.q), input(2 + n, self.k), input(4, self.v)];
            attention(inputs, self.scale, &self.mask).unwrap().out
        };
        let (first, second) = (map(0), map(1));
        let x: Vec<f64> = first.iter().zip(&second).map(|(a, b)| a - lambda * b).collect();
        let normal = |row: &[f64]| -> Vec<f64> {
            let mean = row.iter().map(|x| x * x).sum::<f64>() / row.len() as f64;
            let factor = (1.0 - self.init) / (mean + EPSILON).sqrt();
            row.iter().zip(&self.numbers[9]).map(|(x, weight)| x * factor * weight).collect()
        };
        x.chunks_exact(self.v.dim).flat_map(normal).collect()
    }

    /// Central differences of ⟨d_out, out⟩.
    fn differences(&self, d_out: &[f64]) -> [Vec<f64>; 10] {
        let loss = |call: &Call| -> f64 {
            call.define().iter().zip(d_out).map(|(out, d_out)| out * d_out).sum()
        };
        let step = 1e-5;
        std::array::from_fn(|which| {
            let moved = |n: usize, by: f64| {
                let mut call = self.clone();
                call.numbers[which][n] += by;
                loss(&call)
            };
            let difference = |n| (moved(n, step) - moved(n, -step)) / (2.0 * step);
            (0..self.numbers[which].len()).map(difference).collect()
        })
    }

    fn tensors<E: Element>(&self) -> Tensors<E> {
        let narrow = |at: usize| self.numbers[at].iter().map(|&x| E::from_f32(x as f32)).collect();
        let tensor = |at, shape| Tensor::from_vec(narrow(at), shape).unwrap();
        Tensors {
            q: [tensor(0, self.q), tensor(1, self.q)],
            k: [tensor(2, self.k), tensor(3, self.k)],
            v: tensor(4, self.v),
            vectors: [5, 6, 7, 8, 9].map(|at| self.numbers[at].iter().map(|&x| x as f32).collect()),
        }
    }

    fn attention(&self, cpu: Cpu) -> Attention<'static> {
        let scale = Scale::Value(self.scale as f32);
        Attention::new().mask(self.mask.clone()).scale(scale).cpu(cpu)
    }
}

/// A call's numbers as the engine takes them.
#[derive(Debug)]
struct Tensors<E> {
    q: [Tensor<E>; 2],
    k: [Tensor<E>; 2],
    v: Tensor<E>,
    vectors: [Vec<f32>; 5],
}

impl<E: Element> Tensors<E> {
    fn layer<'a>(&'a self, attention: &'a Attention<'a>, init: f64) -> Differential<'a> {
        let [q1, k1, q2, k2, weight] = self.vectors.each_ref().map(Vec::as_slice);
        Differential {
            attention,
            lambda: Lambda { first: [q1, k1], second: [q2, k2], init: init as f32 },
            norm: RmsNorm { weight, epsilon: EPSILON as f32 },
        }
    }

    fn pairs(&self) -> Pairs<'_, E> {
        let [q, k] = [&self.q, &self.k].map(|both| both.each_ref().map(Tensor::view));
        Pairs { q, k, v: self.v.view() }
    }
}

fn wide<E: Element>(x: &[E]) -> Vec<f64> {
    x.iter().map(|x| f64::from(x.to_f32())).collect()
}

/// Gradients by [`NAMES`].
fn listed<E: Element>(gradients: &DifferentialBackward<E>) -> [Vec<f64>; 10] {
    let DifferentialBackward { d_q, d_k, d_v, d_lambda, d_weight } = gradients;
    let [q1, q2, k1, k2, v] = [&d_q[0], &d_q[1], &d_k[0], &d_k[1], d_v].map(|x| wide(x.as_slice()));
    let [a, b, c, d] =
        [&d_lambda.first[0], &d_lambda.first[1], &d_lambda.second[0], &d_lambda.second[1]]
            .map(|x| wide(x));
    [q1, q2, k1, k2, v, a, b, c, d, wide(d_weight)]
}

#[test]
fn golden_vectors() {
    for (call, case) in Call::golden() {
        check(&case.name, &call.define(), &case.tensor("out").data, case.tolerance("f64"));
        let tensors = call.tensors::<f32>();
        for cpu in cpus() {
            let attention = call.attention(cpu);
            let layer = tensors.layer(&attention, call.init);
            let tolerance = case.tolerance("f32");
            check(
                "lambda",
                &[f64::from(layer.lambda.value().unwrap())],
                &[case.number("lambda")],
                tolerance,
            );
            let init = Lambda::init_at(case.number("depth") as usize);
            check("init", &[f64::from(init)], &[case.number("lambda_init")], tolerance);
            let forward = layer.forward(tensors.pairs()).unwrap();
            case.check("out", &wide(forward.out.as_slice()), tolerance);
            let d_out = case.tensor("d_out").to_f32();
            let d_out = Tensor::from_vec(d_out, call.out()).unwrap();
            let gradients = layer.backward(tensors.pairs(), &forward, d_out.view()).unwrap();
            for (name, got) in NAMES.iter().zip(&listed(&gradients)) {
                case.check(&format!("grad.{name}"), got, tolerance);
            }
        }
    }
}

/// Calls with grouped heads, masks and rows that see nothing.
fn calls() -> Vec<Call> {
    vec![
        Call::random([4, 6], [4, 2], Mask::causal()),
        Call::random([5, 3], [2, 1], Mask::window(2)),
        Call::random([3, 3], [1, 1], Mask::full()),
    ]
}

#[test]
fn gradients_are_finite_differences_of_the_definition() {
    for call in calls() {
        let d_out: Vec<f64> = {
            let mut random = Random::new(3);
            (0..call.out().checked_len().unwrap()).map(|_| f64::from(random.number())).collect()
        };
        let expected = call.differences(&d_out);
        let d_out =
            Tensor::from_vec(d_out.iter().map(|&x| x as f32).collect(), call.out()).unwrap();
        let tensors = call.tensors::<f32>();
        for cpu in cpus() {
            let attention = call.attention(cpu);
            let layer = tensors.layer(&attention, call.init);
            let forward = layer.forward(tensors.pairs()).unwrap();
            check("out", &wide(forward.out.as_slice()), &call.define(), 2e-6);
            let gradients = layer.backward(tensors.pairs(), &forward, d_out.view()).unwrap();
            for ((name, got), expected) in NAMES.iter().zip(&listed(&gradients)).zip(&expected) {
                check(name, got, expected, 5e-6);
            }
        }
    }
}

#[test]
fn rows_that_see_nothing_are_zero_and_have_no_gradient() {
    let call = Call::random([5, 3], [2, 1], Mask::causal());
    let tensors = call.tensors::<f32>();
    let attention = call.attention(Cpu::detect().unwrap());
    let layer = tensors.layer(&attention, call.init);
    let forward = layer.forward(tensors.pairs()).unwrap();
    let d_out = Random::new(1).tensor::<f32>(call.out(), 1.0);
    let gradients = layer.backward(tensors.pairs(), &forward, d_out.view()).unwrap();
    for batch in 0..2 {
        for row in 0..2 {
            for head in 0..2 {
                assert!(forward.out.view().row(batch, row, head).iter().all(|&x| x == 0.0));
                for d_q in &gradients.d_q {
                    assert!(d_q.view().row(batch, row, head).iter().all(|&x| x == 0.0));
                }
            }
        }
    }
}

/// Caches whose keys hold both maps' keys.
fn caches<E: Element>(tensors: &Tensors<E>) -> Vec<ContiguousCache<E>> {
    let (k, v) = (tensors.k[0].shape(), tensors.v.shape());
    let both: Vec<E> = tensors.k[0]
        .as_slice()
        .chunks_exact(k.dim)
        .zip(tensors.k[1].as_slice().chunks_exact(k.dim))
        .flat_map(|(first, second)| [first, second].concat())
        .collect();
    let keys = Tensor::from_vec(both, Shape { dim: 2 * k.dim, ..k }).unwrap();
    let part = |x: &Tensor<E>, n: usize| {
        let Shape { seq, heads, dim, .. } = x.shape();
        let shape = Shape { batch: 1, seq, heads, dim };
        let len = seq * heads * dim;
        Tensor::from_vec(x.as_slice()[n * len..(n + 1) * len].to_vec(), shape).unwrap()
    };
    (0..k.batch)
        .map(|n| {
            let mut cache = ContiguousCache::new(k.heads, (2 * k.dim, v.dim), k.seq).unwrap();
            cache.append(part(&keys, n).view(), part(&tensors.v, n).view()).unwrap();
            cache
        })
        .collect()
}

#[test]
fn caches_give_the_bits_of_tensors_and_threads_change_none() {
    let call = Call::random([9, 300], [4, 2], Mask::causal());
    let tensors = call.tensors::<f32>();
    let caches = caches(&tensors);
    let stores: Vec<&dyn KvStore> = caches.iter().map(|cache| cache as _).collect();
    for cpu in cpus() {
        for threads in [Threads::ONE, Threads::at_most(2.try_into().unwrap())] {
            let one = call.attention(cpu);
            let one = tensors.layer(&one, call.init);
            let attention = call.attention(Cpu { threads, ..cpu });
            let layer = tensors.layer(&attention, call.init);
            let q = tensors.q.each_ref().map(Tensor::view);
            let (prompt, generated) =
                (one.forward(tensors.pairs()).unwrap(), one.decode(tensors.pairs()).unwrap());
            assert_eq!(layer.forward(tensors.pairs()).unwrap(), prompt);
            assert_eq!(layer.forward_cached(q, &stores, Phase::Prompt).unwrap(), prompt);
            assert_eq!(layer.forward_cached(q, &stores, Phase::Generated).unwrap(), generated);
            check("decode", &wide(generated.out.as_slice()), &call.define(), 5e-6);
            let d_out = Random::new(1).tensor::<f32>(call.out(), 1.0);
            let gradients = |layer: &Differential<'_>| {
                layer.backward(tensors.pairs(), &prompt, d_out.view()).unwrap()
            };
            assert_eq!(gradients(&layer), gradients(&one));
        }
    }
}

/// The first of two calls with half of the queries gives the first half of the result's bits.
#[test]
fn a_prompt_may_be_cut() {
    let mut call = Call::random([40, 40], [2, 2], Mask::causal());
    call.q.batch = 1;
    (call.k.batch, call.v.batch) = (1, 1);
    for numbers in &mut call.numbers[..5] {
        numbers.truncate(numbers.len() / 2);
    }
    let tensors = call.tensors::<f32>();
    let attention = call.attention(Cpu::detect().unwrap());
    let layer = tensors.layer(&attention, call.init);
    let whole = layer.forward(tensors.pairs()).unwrap();
    let cut = |range: std::ops::Range<usize>| {
        let q = tensors.q.each_ref().map(|q| tokens(q, range.clone()));
        let k = tensors.k.each_ref().map(|k| tokens(k, 0..range.end));
        let v = tokens(&tensors.v, 0..range.end);
        layer.forward(Pairs { q, k, v }).unwrap().out.into_vec()
    };
    assert_eq!([cut(0..13), cut(13..40)].concat(), whole.out.into_vec());
}

#[test]
fn sixteen_bits_cost_their_rounding() {
    let call = Call::random([20, 20], [4, 2], Mask::causal());
    let tensors = call.tensors::<bf16>();
    let mut rounded = call.clone();
    let stored = [&tensors.q[0], &tensors.q[1], &tensors.k[0], &tensors.k[1], &tensors.v];
    for (numbers, stored) in rounded.numbers.iter_mut().zip(stored) {
        *numbers = wide(stored.as_slice());
    }
    // P₁V and P₂V, of order 1, are rounded to 2⁻⁹; the difference is divided by its size.
    let expected = rounded.define();
    for cpu in cpus() {
        let attention = call.attention(cpu);
        let layer = tensors.layer(&attention, call.init);
        let got = layer.forward(tensors.pairs()).unwrap();
        check("bf16", &wide(got.out.as_slice()), &expected, 0.02);
        assert_ne!(wide(got.out.as_slice()), expected);
    }
}

#[test]
fn what_does_not_fit_is_named() {
    let call = Call::random([2, 3], [2, 1], Mask::causal());
    let tensors = call.tensors::<f32>();
    let attention = call.attention(Cpu::detect().unwrap());
    let layer = tensors.layer(&attention, call.init);
    let pairs = tensors.pairs();
    let refused = |layer: Differential<'_>, pairs| layer.forward(pairs).unwrap_err();
    let narrow = Tensor::<f32>::zeros(Shape { dim: 4, ..call.q }).unwrap();
    let other = Pairs { q: [pairs.q[0], narrow.view()], ..pairs };
    assert!(matches!(refused(layer, other), Error::ShapeMismatch { .. }));
    let other = Pairs { k: [pairs.k[0], narrow.view()], ..pairs };
    assert!(matches!(refused(layer, other), Error::ShapeMismatch { .. }));
    let norm = RmsNorm { weight: &[1.0; 3], epsilon: 1e-5 };
    assert!(matches!(refused(Differential { norm, ..layer }, pairs), Error::LengthMismatch { .. }));
    for lambda in [
        Lambda { init: 1.5, ..layer.lambda },
        Lambda { init: f32::NAN, ..layer.lambda },
        Lambda { first: [&[40.0], &[40.0]], ..layer.lambda },
    ] {
        let refused = refused(Differential { lambda, ..layer }, pairs);
        assert!(matches!(refused, Error::InvalidParameter { .. }), "{refused}");
    }
    let lambda = Lambda { second: [&[1.0], &[1.0, 2.0]], ..layer.lambda };
    let refused = refused(Differential { lambda, ..layer }, pairs);
    assert!(matches!(refused, Error::LengthMismatch { .. }));
    let cache = ContiguousCache::<f32>::new(1, (5, 9), 0).unwrap();
    let stores: [&dyn KvStore; 2] = [&cache; 2];
    let got = layer.forward_cached(pairs.q, &stores, Phase::Generated).unwrap_err();
    assert!(matches!(got, Error::ShapeMismatch { .. }), "{got}");
    let forward = layer.forward(pairs).unwrap();
    let d_out = Tensor::<f32>::zeros(call.q).unwrap();
    let got = layer.backward(pairs, &forward, d_out.view()).unwrap_err();
    assert!(matches!(got, Error::ShapeMismatch { .. }), "{got}");
}

#[test]
fn nothing_panics_on_what_is_not_finite() {
    let call = Call::random([5, 7], [2, 1], Mask::causal());
    for bad in [f32::NAN, f32::INFINITY, -1e30] {
        for at in 0..5 {
            let mut bent = call.clone();
            bent.numbers[at][3] = f64::from(bad);
            let tensors = bent.tensors::<f32>();
            for cpu in cpus() {
                let attention = bent.attention(cpu);
                let layer = tensors.layer(&attention, bent.init);
                let forward = layer.forward(tensors.pairs()).unwrap();
                let d_out = Random::new(1).tensor::<f32>(bent.out(), 1.0);
                let gradients = layer.backward(tensors.pairs(), &forward, d_out.view()).unwrap();
                // The second sequence has nothing to do with it.
                let second = |x: &Tensor<f32>| x.as_slice()[x.as_slice().len() / 2..].to_vec();
                assert!(second(&forward.out).iter().all(|x| x.is_finite()));
                assert!(second(&gradients.d_v).iter().all(|x| x.is_finite()));
            }
        }
    }
}
