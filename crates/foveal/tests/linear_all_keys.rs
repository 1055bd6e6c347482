//! Linear attention in which every query reads all keys.

mod support;

use foveal::linear::{
    AnyOrder, Efficient, FeatureMap, Gradients, Linear, Recurrent, State, Tokens, Upstream,
};
use foveal::{Cpu, Error, Level, Shape, Tensor, Threads, Workspace};
use std::num::NonZeroUsize;
use support::linear::{Call, Part, Sizes, Wide, states};
use support::{Random, cpus, error};

const SIZES: Sizes = Sizes { batch: 2, seq: 0, groups: 1, heads: 2, key_dim: 5, value_dim: 3 };

fn close(what: &str, got: &[f32], expected: &[f64], bound: f64) {
    let error = error(got, expected);
    assert!(error <= bound, "{what}: error {error:e} > {bound:e}");
}

/// Runs a law for each mechanism.
macro_rules! every_mechanism {
    ($law:ident) => {
        $law("linear", &Linear::new());
        $law("linear, not normalised", &Linear::new().map(FeatureMap::Identity).normaliser(None));
        $law("efficient", &Efficient::new());
    };
}

/// A call of some keys and other queries.
fn cross<R: AnyOrder>(
    mechanism: &R,
    sizes: Sizes,
    queries: usize,
    random: &mut Random,
) -> Call<f32> {
    let mut call: Call<f32> = Call::random(mechanism, sizes, random);
    call.q = random.tensor(Shape { seq: queries, ..call.q.shape() }, 1.0);
    call.d_out = random.tensor(Shape { seq: queries, ..call.v.shape() }, 1.0);
    call
}

fn nan(shape: Shape) -> Tensor<f32> {
    Tensor::from_vec(vec![f32::NAN; shape.checked_len().unwrap()], shape).unwrap()
}

fn poisoned() -> Workspace {
    let mut workspace = Workspace::new();
    workspace.reserve(1 << 18);
    workspace.poison();
    workspace
}

fn run<R: AnyOrder + Clone>(call: &Call<f32>, mechanism: &R, cpu: Cpu) -> (Tensor<f32>, State) {
    let recurrent = Recurrent::new(mechanism.clone()).cpu(cpu);
    let (mut out, mut state) = (nan(call.d_out.shape()), call.initial.clone());
    let (tokens, mut workspace) = (call.tokens(), poisoned());
    recurrent
        .forward_bidirectional_into(&tokens, out.view_mut(), &mut state, &mut workspace)
        .unwrap();
    (out, state)
}

fn gradients<R: AnyOrder + Clone>(
    call: &Call<f32>,
    mechanism: &R,
    cpu: Cpu,
) -> ([Tensor<f32>; 3], State) {
    let recurrent = Recurrent::new(mechanism.clone()).cpu(cpu);
    let [mut d_q, mut d_k, mut d_v] = [&call.q, &call.k, &call.v].map(|x| nan(x.shape()));
    let to = Gradients {
        d_q: d_q.view_mut(),
        d_k: d_k.view_mut(),
        d_v: d_v.view_mut(),
        d_log_decay: None,
        d_beta: None,
    };
    let upstream = Upstream::new(call.d_out.view(), &call.initial);
    let mut d_state = call.d_final.clone();
    recurrent
        .backward_bidirectional_into(&call.tokens(), upstream, to, &mut d_state, &mut poisoned())
        .unwrap();
    ([d_q, d_k, d_v], d_state)
}

fn lengths() -> impl Iterator<Item = (usize, usize)> {
    [(0, 1), (1, 0), (1, 1), (2, 5), (7, 3), (31, 33), (32, 32), (33, 64), (70, 9)].into_iter()
}

fn the_fast_form_is_the_definition<R: AnyOrder + Clone>(name: &str, mechanism: &R) {
    let mut random = Random::new(1);
    for (seq, queries) in lengths() {
        for (key_dim, value_dim) in [(1, 1), (5, 3), (16, 16), (33, 18)] {
            let sizes = Sizes { seq, key_dim, value_dim, ..SIZES };
            let call = cross(mechanism, sizes, queries, &mut random);
            let wide = Wide { all_keys: true, ..call.widen() };
            let (expected, last) = wide.forward(mechanism);
            for cpu in cpus() {
                let (out, state) = run(&call, mechanism, cpu);
                let what = format!("{name} {} {seq} keys {queries} queries", cpu.level);
                close(&format!("{what} out"), out.as_slice(), &expected, 3e-6);
                close(&format!("{what} state"), state.matrices(), &last.matrices, 3e-6);
                close(&format!("{what} sums"), state.key_sums(), &last.key_sums, 3e-6);
            }
        }
    }
}

#[test]
fn queries_read_all_keys() {
    every_mechanism!(the_fast_form_is_the_definition);
}

fn gradients_are_differences<R: AnyOrder + Clone>(name: &str, mechanism: &R) {
    let mut random = Random::new(2);
    for (seq, queries) in lengths() {
        let mut call = cross(mechanism, Sizes { seq, ..SIZES }, queries, &mut random);
        call.present = Some((0..2 * seq).map(|t| t % 5 != 2).collect());
        let wide = Wide { all_keys: true, ..call.widen() };
        let d_out: Vec<f64> = call.d_out.as_slice().iter().map(|&x| f64::from(x)).collect();
        let d_final = states(&call.d_final);
        let parts = [Part::Q, Part::K, Part::V, Part::Matrices, Part::KeySums];
        let expected = parts.map(|part| wide.gradient(mechanism, part, (&d_out, &d_final)));
        for cpu in cpus() {
            let ([d_q, d_k, d_v], d_state) = gradients(&call, mechanism, cpu);
            let got = [
                d_q.as_slice(),
                d_k.as_slice(),
                d_v.as_slice(),
                d_state.matrices(),
                d_state.key_sums(),
            ];
            for ((part, got), expected) in parts.iter().zip(got).zip(&expected) {
                let what = format!("{name} {} {seq} keys {queries} queries", cpu.level);
                close(&format!("{what} d {part:?}"), got, expected, 1e-5);
            }
        }
    }
}

#[test]
fn gradients_of_all_keys_are_differences() {
    every_mechanism!(gradients_are_differences);
}

fn threads_change_no_bit<R: AnyOrder + Clone>(name: &str, mechanism: &R) {
    let sizes = Sizes { batch: 3, seq: 45, groups: 2, heads: 4, key_dim: 20, value_dim: 33 };
    let call = cross(mechanism, sizes, 37, &mut Random::new(3));
    let pool = rayon::ThreadPoolBuilder::new().num_threads(4).build().unwrap();
    for level in Level::available() {
        let all = |threads| {
            let cpu = Cpu { level, threads: Threads::at_most(NonZeroUsize::new(threads).unwrap()) };
            pool.install(|| (run(&call, mechanism, cpu), gradients(&call, mechanism, cpu)))
        };
        let one = all(1);
        for threads in [2, 3, 4] {
            assert_eq!(all(threads), one, "{name} {level} {threads} threads");
        }
    }
}

#[test]
fn threads_give_the_same_bits() {
    every_mechanism!(threads_change_no_bit);
}

/// Keys of any size, and channels that have seen nothing.
#[test]
fn efficient_attention_takes_keys_of_any_size() {
    const KEYS: [f32; 9] = [0.5, -200.0, 90.0, 1e4, -3e3, 1e4, f32::NEG_INFINITY, 40.0, -1e-30];
    let mechanism = Efficient::new();
    let sizes = Sizes { batch: 1, seq: 9, heads: 1, ..SIZES };
    let mut call: Call<f32> = Call::random(&mechanism, sizes, &mut Random::new(4));
    call.initial.matrices_mut().fill(0.0);
    call.initial.key_sums_mut().fill(0.0);
    let channel = |c: usize, t: usize| match c {
        // A channel that sees nothing until its last key.
        4 if t < 8 => f32::NEG_INFINITY,
        _ => KEYS[(2 * t + c) % 9],
    };
    let keys = (0..45).map(|n| channel(n % 5, n / 5)).collect();
    call.k = Tensor::from_vec(keys, call.k.shape()).unwrap();
    for all_keys in [false, true] {
        let (expected, last) = Wide { all_keys, ..call.widen() }.forward(&mechanism);
        for cpu in cpus() {
            let (out, state) = match all_keys {
                true => run(&call, &mechanism, cpu),
                false => {
                    let (out, _, state) = call.forward(&mechanism, cpu);
                    (out, state)
                }
            };
            close("out", out.as_slice(), &expected, 3e-6);
            // e^(k − e u) with k of 10⁴: half a unit in the last place of k is 5e-4.
            close("sums", state.key_sums(), &last.key_sums, 1e-5);
            let (backward, _) = call.backward(&mechanism, cpu);
            let all = [&backward.d_q, &backward.d_k, &backward.d_v];
            assert!(all.iter().all(|x| x.as_slice().iter().all(|x| x.is_finite())));
        }
    }
}

#[test]
fn adding_a_number_to_a_channel_of_all_keys_changes_nothing() {
    let mechanism = Efficient::new();
    let sizes = Sizes { batch: 1, seq: 40, heads: 1, ..SIZES };
    let mut call: Call<f32> = Call::random(&mechanism, sizes, &mut Random::new(5));
    call.initial.matrices_mut().fill(0.0);
    call.initial.key_sums_mut().fill(0.0);
    let mut moved = call.clone();
    let numbers = call.k.as_slice().iter().enumerate();
    let added = numbers.map(|(n, k)| k + [0.0, 64.0, -32.0, 512.0, -1024.0][n % 5]).collect();
    moved.k = Tensor::from_vec(added, call.k.shape()).unwrap();
    for cpu in cpus() {
        let (a, b) = (call.forward(&mechanism, cpu).0, moved.forward(&mechanism, cpu).0);
        let expected: Vec<f64> = a.as_slice().iter().map(|&x| f64::from(x)).collect();
        // Sums with 1024 keep 13 bits behind the point.
        close("moved", b.as_slice(), &expected, 1e-4);
    }
}

#[test]
fn calls_on_all_keys_that_do_not_fit_are_refused() {
    let shape = Shape { batch: 1, seq: 4, heads: 2, dim: 8 };
    let (x, dims) = (nan(shape), nan(Shape { dim: 9, ..shape }));
    let recurrent = Recurrent::new(Efficient::new());
    let tokens = Tokens::new(x.view(), x.view(), x.view());
    let mut state = recurrent.state_bidirectional(&tokens).unwrap();
    let packed = recurrent.forward_bidirectional(&tokens.cuts(&[0, 4]), &mut state);
    assert!(matches!(packed, Err(Error::InvalidParameter { .. })));
    let other = Tokens { q: dims.view(), ..tokens };
    let refused = recurrent.forward_bidirectional(&other, &mut state);
    assert!(matches!(refused, Err(Error::ShapeMismatch { .. })));
    let mut small = State::zeros(state.shape(), 1).unwrap();
    let refused = recurrent.forward_bidirectional(&tokens, &mut small);
    assert!(matches!(refused, Err(Error::StateShape { .. })));
}
