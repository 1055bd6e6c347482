//! Performer: golden vectors, the definition in f64, differences of it, and what random features promise.

mod support;

use foveal::linear::{
    Draw, Favor, Gradients, RandomFeatures, Recurrence, Recurrent, Stabiliser, State, Tokens,
    Upstream,
};
use foveal::{Attention, Cpu, Element, Error, Level, Shape, Tensor, Threads, Workspace};
use half::{bf16, f16};
use std::num::NonZeroUsize;
use support::golden::{Array, Case, cases};
use support::linear::{Call, Part, Sizes, Wide, states};
use support::{Random, cpus, error};

const DIM: usize = 5;
const SIZES: Sizes = Sizes { batch: 2, seq: 9, groups: 1, heads: 2, key_dim: DIM, value_dim: 3 };

fn close(what: &str, got: &[f32], expected: &[f64], bound: f64) {
    let error = error(got, expected);
    assert!(error <= bound, "{what}: error {error:e} > {bound:e}");
}

fn wide<E: Element>(x: &[E]) -> Vec<f64> {
    x.iter().map(|x| f64::from(x.to_f32())).collect()
}

fn drawn(count: usize, dim: usize, seed: u64) -> RandomFeatures {
    RandomFeatures::new(Draw::Orthogonal, count, dim, seed).unwrap()
}

/// Every kernel and stabiliser, on some numbers of features.
fn mechanisms(dim: usize) -> Vec<(String, Favor)> {
    let mut all = vec![];
    for count in [1, 7, 16, 40] {
        let plain = Favor::new(drawn(count, dim, 1));
        let published = Stabiliser::Published { keys: 0.5, epsilon: 1e-3 };
        for (name, favor) in [
            ("by queries", plain.clone()),
            ("not stabilised", plain.clone().stabiliser(Stabiliser::None)),
            ("published", plain.clone().stabiliser(published).normaliser(1e-6)),
            // Differences of 1/φ need φ far from 0.
            ("rectified", plain.clone().relu(0.1)),
        ] {
            all.push((format!("{name}, {count} features"), favor));
        }
    }
    all
}

#[test]
fn block_is_step() {
    let mut random = Random::new(1);
    for (name, favor) in mechanisms(DIM) {
        for (seq, value_dim) in [(0, 3), (1, 1), (7, 3), (33, 18), (66, 4)] {
            let sizes = Sizes { seq, value_dim, ..SIZES };
            let call: Call<f32> = Call::random(&favor, sizes, &mut random);
            let (expected, last) = call.widen().forward(&favor);
            for cpu in cpus() {
                let (out, _, state) = call.forward(&favor, cpu);
                let what = format!("{name} {} {seq} tokens", cpu.level);
                close(&format!("{what} out"), out.as_slice(), &expected, 3e-6);
                close(&format!("{what} matrices"), state.matrices(), &last.matrices, 3e-6);
                close(&format!("{what} sums"), state.key_sums(), &last.key_sums, 3e-6);
            }
        }
    }
}

#[test]
fn backward_is_the_derivative() {
    let mut random = Random::new(2);
    for (name, favor) in mechanisms(DIM) {
        if name.starts_with("published") {
            // Its largest product counts as a constant: golden vectors hold it to that.
            continue;
        }
        for (seq, absent) in [(1, 9), (9, 2), (35, 4)] {
            let mut call: Call<f32> = Call::random(&favor, Sizes { seq, ..SIZES }, &mut random);
            call.present = Some((0..2 * seq).map(|t| t % 10 != absent).collect());
            let (d_out, d_final) = (wide(call.d_out.as_slice()), states(&call.d_final));
            let parts = [Part::Q, Part::K, Part::V, Part::Matrices, Part::KeySums];
            let expected =
                parts.map(|part| call.widen().gradient(&favor, part, (&d_out, &d_final)));
            for cpu in cpus() {
                let (own, d_state) = call.backward(&favor, cpu);
                let got = [
                    own.d_q.as_slice(),
                    own.d_k.as_slice(),
                    own.d_v.as_slice(),
                    d_state.matrices(),
                    d_state.key_sums(),
                ];
                for ((part, got), expected) in parts.iter().zip(got).zip(&expected) {
                    let what = format!("{name} {} {seq} tokens d {part:?}", cpu.level);
                    close(&what, got, expected, 1e-5);
                }
            }
        }
    }
}

/// A range of the tokens of a call of one sequence.
fn part(call: &Call<f32>, range: std::ops::Range<usize>, initial: State) -> Call<f32> {
    let cut = |x: &Tensor<f32>| {
        let Shape { heads, dim, .. } = x.shape();
        let width = heads * dim;
        let data = x.as_slice()[range.start * width..range.end * width].to_vec();
        Tensor::from_vec(data, Shape { seq: range.len(), ..x.shape() }).unwrap()
    };
    Call {
        q: cut(&call.q),
        k: cut(&call.k),
        v: cut(&call.v),
        d_out: cut(&call.d_out),
        initial,
        ..call.clone()
    }
}

#[test]
fn what_is_decoded_is_what_a_prompt_gives() {
    let mut random = Random::new(3);
    for (count, dim) in [(40, 16), (256, 64), (33, 5)] {
        let favor = Favor::new(drawn(count, dim, 2));
        let sizes = Sizes { batch: 1, seq: 75, key_dim: dim, value_dim: 16, ..SIZES };
        let call: Call<f32> = Call::random(&favor, sizes, &mut random);
        for cpu in cpus() {
            let (whole, _, last) = call.forward(&favor, cpu);
            for step in [1, 2, 3, 5, 32, 64] {
                let (mut state, mut pieces) = (call.initial.clone(), vec![]);
                for first in (0..75).step_by(step) {
                    let piece = part(&call, first..75.min(first + step), state);
                    let (out, _, next) = piece.forward(&favor, cpu);
                    pieces.extend(out.into_vec());
                    state = next;
                }
                assert_eq!(pieces, whole.as_slice(), "{} pieces of {step}", cpu.level);
                assert_eq!(state, last, "{} pieces of {step}", cpu.level);
            }
        }
    }
}

#[test]
fn no_output_depends_on_later_tokens() {
    let favor = Favor::new(drawn(24, DIM, 3));
    let sizes = Sizes { batch: 1, seq: 20, ..SIZES };
    let call: Call<f32> = Call::random(&favor, sizes, &mut Random::new(4));
    for cpu in cpus() {
        let whole = call.forward(&favor, cpu).0;
        for t in 0..20 {
            let mut other = call.clone();
            for (x, width) in [(&mut other.q, DIM), (&mut other.k, DIM), (&mut other.v, 6)] {
                let mut data = x.as_slice().to_vec();
                // A largest key would move if it were asked for.
                data[t * width..].iter_mut().for_each(|x| *x *= 100.0);
                *x = Tensor::from_vec(data, x.shape()).unwrap();
            }
            let mixed = other.forward(&favor, cpu).0;
            assert_eq!(whole.as_slice()[..6 * t], mixed.as_slice()[..6 * t], "{} {t}", cpu.level);
        }
    }
}

#[test]
fn threads_give_the_same_bits() {
    let favor = Favor::new(drawn(40, 20, 4));
    let sizes = Sizes { batch: 3, seq: 40, groups: 2, heads: 4, key_dim: 20, value_dim: 33 };
    let call: Call<f32> = Call::random(&favor, sizes, &mut Random::new(5));
    let pool = rayon::ThreadPoolBuilder::new().num_threads(4).build().unwrap();
    for level in Level::available() {
        let run = |threads| {
            let threads = Threads::at_most(NonZeroUsize::new(threads).unwrap());
            let cpu = Cpu { level, threads };
            pool.install(|| {
                let (out, _, state) = call.forward(&favor, cpu);
                (out, state, call.backward(&favor, cpu))
            })
        };
        let one = run(1);
        assert!((2..=4).all(|threads| run(threads) == one), "{level}");
    }
}

fn sixteen_bits<E: Element>(bound: f64) {
    let favor = Favor::new(drawn(40, 20, 5));
    let sizes = Sizes { batch: 1, seq: 30, key_dim: 20, value_dim: 18, ..SIZES };
    let call: Call<E> = Call::random(&favor, sizes, &mut Random::new(6));
    let (expected, last) = call.widen().forward(&favor);
    for cpu in cpus() {
        let (out, _, state) = call.forward(&favor, cpu);
        let out: Vec<f32> = out.as_slice().iter().map(|x| x.to_f32()).collect();
        close(&E::DTYPE.to_string(), &out, &expected, bound);
        close(&E::DTYPE.to_string(), state.matrices(), &last.matrices, 3e-6);
    }
}

#[test]
fn f16_and_bf16_are_rounded_once() {
    sixteen_bits::<f16>(5e-4);
    sixteen_bits::<bf16>(4e-3);
}

#[test]
fn packed_sequences_are_apart_and_absent_tokens_write_nothing() {
    let favor = Favor::new(drawn(24, DIM, 6));
    let mut random = Random::new(7);
    let sizes = Sizes { batch: 1, ..SIZES };
    let mut call: Call<f32> =
        Call::random(&favor, sizes, &mut random).packed(vec![0, 3, 3, 4, 9], &mut random);
    call.present = Some((0..9).map(|t| t % 4 != 1).collect());
    let (expected, last) = call.widen().forward(&favor);
    let mut poisoned = call.clone();
    let mut keys = call.k.as_slice().to_vec();
    keys[DIM..2 * DIM].fill(f32::NAN);
    poisoned.k = Tensor::from_vec(keys, call.k.shape()).unwrap();
    for cpu in cpus() {
        let (out, _, state) = call.forward(&favor, cpu);
        close("out", out.as_slice(), &expected, 3e-6);
        close("state", state.matrices(), &last.matrices, 3e-6);
        assert_eq!(poisoned.forward(&favor, cpu).0, out);
        assert_eq!(poisoned.backward(&favor, cpu), call.backward(&favor, cpu));
    }
}

/// Outputs and gradients of one head on all keys or causally.
struct Answer {
    out: Vec<f32>,
    d_q: Tensor<f32>,
    d_k: Tensor<f32>,
    d_v: Tensor<f32>,
}

fn answer(
    recurrent: &Recurrent<Favor>,
    x: &[Tensor<f32>; 4],
    initial: &State,
    all: bool,
) -> Answer {
    let [q, k, v, d_out] = x;
    let tokens = Tokens::new(q.view(), k.view(), v.view());
    let mut state = initial.clone();
    let out = match all {
        true => recurrent.forward_bidirectional(&tokens, &mut state).unwrap(),
        false => recurrent.forward(&tokens, &mut state).unwrap(),
    };
    let [mut d_q, mut d_k, mut d_v] =
        [q, k, v].map(|x| Tensor::from_vec(vec![f32::NAN; x.as_slice().len()], x.shape()).unwrap());
    let to = Gradients {
        d_q: d_q.view_mut(),
        d_k: d_k.view_mut(),
        d_v: d_v.view_mut(),
        d_log_decay: None,
        d_beta: None,
    };
    let mut d_state = State::zeros(initial.shape(), 1).unwrap();
    let (upstream, mut workspace) = (Upstream::new(d_out.view(), initial), Workspace::new());
    match all {
        true => recurrent.backward_bidirectional_into(
            &tokens,
            upstream,
            to,
            &mut d_state,
            &mut workspace,
        ),
        false => recurrent.backward_into(&tokens, upstream, to, &mut d_state, &mut workspace),
    }
    .unwrap();
    Answer { out: out.into_vec(), d_q, d_k, d_v }
}

/// One head of one sequence of an array.
fn head(array: &Array, b: usize, h: usize) -> Array {
    let [_, seq, heads, dim] = array.shape[..] else { panic!("no tokens") };
    let row = |t: usize| &array.data[((b * seq + t) * heads + h) * dim..][..dim];
    Array { shape: vec![1, seq, 1, dim], data: (0..seq).flat_map(row).copied().collect() }
}

fn tensor(array: &Array) -> Tensor<f32> {
    let [batch, seq, heads, dim] = array.shape[..] else { panic!("no tokens") };
    Tensor::from_vec(array.to_f32(), Shape { batch, seq, heads, dim }).unwrap()
}

/// The mechanism of a case for one head, and what its state begins with: the published stabiliser takes the largest product
/// of all keys of a head, and the published causal denominator adds its ε to the sum of keys.
fn published(case: &Case, keys: &Tensor<f32>) -> (Favor, f32) {
    let projection = case.tensor("projection");
    let features = RandomFeatures::given(&projection.to_f32(), projection.shape[1]).unwrap();
    let epsilon = case.number("feature_eps") as f32;
    let (formula, below) =
        (case.options["features"].as_str().unwrap(), case.options["denominator"].as_str().unwrap());
    let in_state = below.contains("(z + eps)");
    let of_denominator = case.number("denominator_eps") as f32;
    let (outside, inside) = if in_state { (0.0, of_denominator) } else { (of_denominator, 0.0) };
    let favor = Favor::new(features).normaliser(outside);
    let favor = match formula {
        formula if formula.starts_with("relu") => favor.relu(epsilon),
        formula if formula.contains("max") => {
            let largest = favor.largest_product(keys.view()).unwrap();
            favor.stabiliser(Stabiliser::Published { keys: largest, epsilon })
        }
        _ => favor.stabiliser(Stabiliser::None),
    };
    (favor, inside)
}

#[test]
fn golden_vectors() {
    for case in cases("favor_plus") {
        let causal = case.options["causal"].as_bool().unwrap();
        let (shape, tolerance) = (&case.tensor("q").shape, case.tolerance("f32"));
        for (b, h) in (0..shape[0]).flat_map(|b| (0..shape[2]).map(move |h| (b, h))) {
            let own = |name: &str| head(case.tensor(name), b, h);
            let x = ["q", "k", "v", "d_out"].map(|name| tensor(&own(name)));
            let (favor, inside) = published(&case, &x[1]);
            for cpu in cpus() {
                let recurrent = Recurrent::new(favor.clone()).cpu(cpu);
                let tokens = Tokens::new(x[0].view(), x[1].view(), x[2].view());
                let mut initial = recurrent.state(&tokens).unwrap();
                initial.key_sums_mut().fill(inside);
                let Answer { out, d_q, d_k, d_v } = answer(&recurrent, &x, &initial, !causal);
                let answers = [
                    ("out", wide(&out)),
                    ("grad.q", wide(d_q.as_slice())),
                    ("grad.k", wide(d_k.as_slice())),
                    ("grad.v", wide(d_v.as_slice())),
                ];
                for (name, got) in answers {
                    let what = format!("{} {name} ({b}, {h}) {}", case.name, cpu.level);
                    support::golden::check(&what, &got, &own(name).data, tolerance);
                }
                keys_are_their_features(&case, &recurrent, &x, &own("phi_k"));
            }
        }
    }
}

/// What one key writes to the sum of keys is its features.
fn keys_are_their_features(
    case: &Case,
    recurrent: &Recurrent<Favor>,
    x: &[Tensor<f32>; 4],
    expected: &Array,
) {
    let count = expected.shape[3];
    for t in 0..expected.shape[1] {
        let one = t..t + 1;
        let [q, k, v, _] = x.each_ref().map(|x| support::tokens(x, one.clone()));
        let tokens = Tokens::new(q, k, v);
        let mut state = recurrent.state(&tokens).unwrap();
        recurrent.forward(&tokens, &mut state).unwrap();
        let expected = &expected.data[t * count..(t + 1) * count];
        let what = format!("{} features of key {t}", case.name);
        support::golden::check(&what, &wide(state.key_sums()), expected, case.tolerance("f32"));
    }
}

/// The mean square error of estimated attention over all keys, relative to exact softmax.
fn mean_square_error(draw: Draw, count: usize, cpu: Cpu) -> f64 {
    const DRAWS: u64 = 100;
    let shape = Shape { batch: 1, seq: 32, heads: 1, dim: 16 };
    let mut random = Random::new(8);
    // Small enough that errors are: the law is one of small errors.
    let [q, k, v]: [Tensor<f32>; 3] = [0.5, 0.5, 1.0].map(|scale| random.tensor(shape, scale));
    let exact = Attention::new().forward(q.view(), k.view(), v.view()).unwrap().out;
    let tokens = Tokens::new(q.view(), k.view(), v.view());
    let mut sum = 0.0;
    for seed in 0..DRAWS {
        let features = RandomFeatures::new(draw, count, 16, seed).unwrap();
        let recurrent = Recurrent::new(Favor::new(features)).cpu(cpu);
        let mut state = recurrent.state(&tokens).unwrap();
        let out = recurrent.forward_bidirectional(&tokens, &mut state).unwrap();
        let pairs = out.as_slice().iter().zip(exact.as_slice());
        sum += pairs.map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
    }
    sum / (DRAWS as f64 * exact.as_slice().len() as f64)
}

#[test]
fn errors_fall_as_the_root_of_the_number_of_features_and_orthogonal_ones_are_smaller() {
    let cpu = cpus().last().unwrap();
    let mut last = [None; 2];
    for count in [64, 256, 1024] {
        let errors =
            [Draw::Independent, Draw::Orthogonal].map(|draw| mean_square_error(draw, count, cpu));
        assert!(errors[1] < errors[0], "{count} features: {errors:?}");
        for (last, error) in last.iter_mut().zip(errors) {
            // Four times the features, a quarter of the mean square; estimates of it vary by a tenth or two.
            let ratio = last.map_or(0.25, |last: f64| error / last);
            assert!((0.16..0.36).contains(&ratio), "{count} features: {ratio}");
            *last = Some(error);
        }
    }
}

#[test]
fn products_of_features_are_unbiased_exponentials() {
    const DRAWS: u64 = 400;
    let (dim, count) = (8, 32);
    let mut random = Random::new(9);
    let shape = Shape { batch: 1, seq: 1, heads: 1, dim };
    let [x, y]: [Tensor<f32>; 2] = [0; 2].map(|_| random.tensor(shape, 1.0));
    let products = x.as_slice().iter().zip(y.as_slice()).map(|(x, y)| f64::from(x * y));
    let exact = (products.sum::<f64>() / (dim as f64).sqrt()).exp();
    for draw in [Draw::Orthogonal, Draw::Independent] {
        let estimates: Vec<f64> = (0..DRAWS)
            .map(|seed| {
                let features = RandomFeatures::new(draw, count, dim, seed).unwrap();
                let favor = Favor::new(features).stabiliser(Stabiliser::None);
                let recurrent = Recurrent::new(favor);
                let features = |x: &Tensor<f32>| {
                    let tokens = Tokens::new(x.view(), x.view(), x.view());
                    let mut state = recurrent.state(&tokens).unwrap();
                    recurrent.forward(&tokens, &mut state).unwrap();
                    wide(state.key_sums())
                };
                features(&x).iter().zip(features(&y)).map(|(a, b)| a * b).sum()
            })
            .collect();
        let mean = estimates.iter().sum::<f64>() / DRAWS as f64;
        let square = estimates.iter().map(|e| (e - mean).powi(2)).sum::<f64>();
        let deviation = square.sqrt() / DRAWS as f64;
        assert!((mean - exact).abs() < 4.0 * deviation, "{draw:?} {mean} {exact} {deviation}");
    }
}

#[test]
fn orthogonal_directions_are_orthogonal_and_as_long_as_gaussian_rows() {
    let dim = 16;
    let features = drawn(400, dim, 10);
    let rows: Vec<&[f32]> = features.directions().chunks(dim).collect();
    let dot = |a: &[f32], b: &[f32]| -> f64 {
        a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
    };
    for block in rows.chunks(dim) {
        for (i, j) in (0..block.len()).flat_map(|i| (0..i).map(move |j| (i, j))) {
            let lengths = (dot(block[i], block[i]) * dot(block[j], block[j])).sqrt();
            assert!(dot(block[i], block[j]).abs() <= 1e-6 * lengths);
        }
    }
    // χ² with 16 degrees: mean 16, variance 32; of 400 of them, standard errors 0.28 and about 2.9.
    let squares: Vec<f64> = rows.iter().map(|row| dot(row, row)).collect();
    let mean = squares.iter().sum::<f64>() / 400.0;
    let variance = squares.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / 400.0;
    assert!((mean - 16.0).abs() < 1.2 && (variance - 32.0).abs() < 12.0, "{mean} {variance}");
    // No coordinate has a sign: a biased factorisation would give the first one.
    let positive = rows.iter().filter(|row| row[0] > 0.0).count();
    assert!((150..250).contains(&positive), "{positive}");
}

#[test]
fn draws_depend_on_seed_and_number_alone() {
    let first = drawn(24, 8, 11);
    assert_eq!(first, drawn(24, 8, 11));
    assert_ne!(first.directions(), drawn(24, 8, 12).directions());
    let (second, third) = (first.redrawn().unwrap(), first.redrawn().unwrap().redrawn().unwrap());
    assert_eq!(second, first.redrawn().unwrap());
    assert_ne!(second.directions(), first.directions());
    assert_ne!(third.directions(), second.directions());
    // Another seed's draws are others too, whatever their number.
    assert_ne!(drawn(24, 8, 12).redrawn().unwrap().directions(), third.directions());
    let given = RandomFeatures::given(first.directions(), 8).unwrap();
    assert_eq!(given.directions(), first.directions());
    assert!(matches!(given.redrawn(), Err(Error::InvalidParameter { .. })));
    let favor = Favor::new(first).redrawn().unwrap();
    assert_eq!(*favor.features(), second);
}

#[test]
fn large_inputs_stay_finite() {
    let favor = Favor::new(drawn(64, 16, 13));
    let sizes = Sizes { batch: 1, seq: 40, key_dim: 16, ..SIZES };
    let mut call: Call<f32> = Call::random(&favor, sizes, &mut Random::new(14));
    call.initial.matrices_mut().fill(0.0);
    call.initial.key_sums_mut().fill(0.0);
    for size in [8.0, 30.0, 1000.0] {
        for x in [&mut call.q, &mut call.k] {
            let data = x.as_slice().iter().map(|x| x * size).collect();
            *x = Tensor::from_vec(data, x.shape()).unwrap();
        }
        for cpu in cpus() {
            let (out, _, state) = call.forward(&favor, cpu);
            let (own, _) = call.backward(&favor, cpu);
            let all = [out.as_slice(), state.matrices(), own.d_q.as_slice(), own.d_k.as_slice()];
            assert!(all.iter().all(|x| x.iter().all(|x| x.is_finite())), "{} {size}", cpu.level);
        }
    }
}

#[test]
fn queries_read_all_keys() {
    let mut random = Random::new(15);
    for (name, favor) in mechanisms(DIM) {
        let call: Call<f32> = Call::random(&favor, Sizes { seq: 37, ..SIZES }, &mut random);
        let (expected, last) = Wide { all_keys: true, ..call.widen() }.forward(&favor);
        for cpu in cpus() {
            let recurrent = Recurrent::new(favor.clone()).cpu(cpu);
            let mut state = call.initial.clone();
            let out = recurrent.forward_bidirectional(&call.tokens(), &mut state).unwrap();
            close(&format!("{name} {}", cpu.level), out.as_slice(), &expected, 3e-6);
            close(&format!("{name} {}", cpu.level), state.matrices(), &last.matrices, 3e-6);
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let invalid = |error: Error| matches!(error, Error::InvalidParameter { .. });
    assert!(invalid(RandomFeatures::new(Draw::Orthogonal, 0, 8, 1).unwrap_err()));
    assert!(invalid(RandomFeatures::new(Draw::Independent, 8, 5000, 1).unwrap_err()));
    assert!(invalid(RandomFeatures::given(&[0.0; 3], 0).unwrap_err()));
    let ragged = RandomFeatures::given(&[0.0; 7], 3).unwrap_err();
    assert!(matches!(ragged, Error::LengthMismatch { expected: 6, got: 7, .. }));
    let x: Tensor<f32> = Random::new(1).tensor(Shape { batch: 1, seq: 4, heads: 2, dim: 8 }, 1.0);
    let tokens = Tokens::new(x.view(), x.view(), x.view());
    let refused = |favor: Favor| Recurrent::new(favor).state(&tokens).unwrap_err();
    let other = refused(Favor::new(drawn(16, 9, 1)));
    assert!(matches!(other, Error::LengthMismatch { expected: 9, got: 8, .. }));
    let fits = Favor::new(drawn(16, 8, 1));
    assert_eq!(fits.mapped_dim(8).unwrap(), 16);
    assert!(invalid(refused(fits.clone().normaliser(-1.0))));
    assert!(invalid(refused(fits.clone().relu(f32::NAN))));
    let published = Stabiliser::Published { keys: f32::INFINITY, epsilon: 0.0 };
    assert!(invalid(refused(fits.clone().stabiliser(published))));
    assert!(matches!(
        Favor::new(drawn(16, 9, 1)).largest_product(x.view()),
        Err(Error::LengthMismatch { .. })
    ));
    // A state has one row for each feature.
    let recurrent = Recurrent::new(fits);
    let state = recurrent.state(&tokens).unwrap();
    assert_eq!(state.shape().key_dim, 16);
    let mut other = Recurrent::new(Favor::published(8, 1).unwrap()).state(&tokens).unwrap();
    assert_eq!(other.shape().key_dim, 256);
    let error = recurrent.forward(&tokens, &mut other).unwrap_err();
    assert!(matches!(error, Error::StateShape { .. }), "{error}");
}
