//! Laws that every recurrence obeys, each on every level: the fast form is the definition, gradients are its
//! differences, and no bit depends on cuts, threads, strides or the future.
//!
//! A new mechanism is one line in [`every_mechanism`].

mod support;

use foveal::linear::{
    Delta, Efficient, FeatureMap, Linear, Recurrence, Retention, ScalarDecay, State, VectorDecay,
};
use foveal::{Cpu, Element, Level, Tensor, Threads};
use half::{bf16, f16};
use std::num::NonZeroUsize;
use support::linear::{Call, Part, Sizes, states};
use support::{Random, cpus, error};

/// Runs a law for each mechanism: what it is called, the mechanism.
macro_rules! every_mechanism {
    ($law:ident) => {
        $law("linear", &Linear::new());
        $law("linear, not normalised", &Linear::new().map(FeatureMap::Identity).normaliser(None));
        $law("linear of exponentials", &Linear::new().map(FeatureMap::Exp));
        $law(
            "linear of rectified numbers",
            &Linear::new().map(FeatureMap::Relu).normaliser(Some(0.1)),
        );
        $law("retention", &Retention::new(2));
        $law("scalar decay", &ScalarDecay::new());
        $law("gla", &VectorDecay::new());
        $law("delta", &Delta::new());
        $law("gated delta", &Delta::gated());
        $law("efficient", &Efficient::new());
    };
}

const SMALL: Sizes = Sizes { batch: 2, seq: 0, groups: 1, heads: 2, key_dim: 1, value_dim: 1 };

/// Lengths and dims around those of vectors, panels, passes and blocks.
fn sizes() -> impl Iterator<Item = Sizes> {
    let lengths =
        (0..=9).chain([31, 32, 33, 66]).map(|seq| Sizes { seq, key_dim: 5, value_dim: 7, ..SMALL });
    let dims = [1, 2, 3, 8, 15, 16, 17, 32, 33, 64, 65];
    let keys = dims.map(|key_dim| Sizes { seq: 7, key_dim, value_dim: 3, ..SMALL });
    let values = dims.map(|value_dim| Sizes { seq: 7, key_dim: 3, value_dim, ..SMALL });
    let large = [(64, 64), (16, 128), (65, 80), (80, 16)].map(|(key_dim, value_dim)| Sizes {
        batch: 1,
        seq: 37,
        key_dim,
        value_dim,
        ..SMALL
    });
    lengths.chain(keys).chain(values).chain(large)
}

fn wide<E: Element>(x: &[E]) -> Vec<f32> {
    x.iter().map(|x| x.to_f32()).collect()
}

/// Outputs and states against the definition; every call also in pieces.
fn the_fast_form_is_the_definition<R: Recurrence + Clone>(name: &str, mechanism: &R) {
    let mut random = Random::new(1);
    for sizes in sizes() {
        let call: Call<f32> = Call::random(mechanism, sizes, &mut random);
        let (expected, last) = call.widen().forward(mechanism);
        for cpu in cpus() {
            let (out, _, state) = call.forward(mechanism, cpu);
            let what = format!("{name} {} {sizes:?}", cpu.level);
            close(&format!("{what} out"), out.as_slice(), &expected, 3e-6);
            close(&format!("{what} matrices"), state.matrices(), &last.matrices, 3e-6);
            close(&format!("{what} sums"), state.key_sums(), &last.key_sums, 3e-6);
        }
    }
}

fn close(what: &str, got: &[f32], expected: &[f64], bound: f64) {
    let error = error(got, expected);
    assert!(error <= bound, "{what}: error {error:e} > {bound:e}");
}

#[test]
fn block_is_step() {
    every_mechanism!(the_fast_form_is_the_definition);
}

fn gradients_of<R: Recurrence + Clone>(name: &str, mechanism: &R, call: &Call<f32>) {
    let d_out = call.d_out.as_slice().iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
    let d_final = states(&call.d_final);
    let differences = |part| call.widen().gradient(mechanism, part, (&d_out, &d_final));
    let parts =
        [Part::Q, Part::K, Part::V, Part::LogDecay, Part::Beta, Part::Matrices, Part::KeySums];
    let expected = parts.map(differences);
    for cpu in cpus() {
        let (gradients, d_state) = call.backward(mechanism, cpu);
        let of = |x: &Option<Tensor<f32>>| x.as_ref().map_or(vec![], |x| x.as_slice().to_vec());
        let got = [
            gradients.d_q.as_slice().to_vec(),
            gradients.d_k.as_slice().to_vec(),
            gradients.d_v.as_slice().to_vec(),
            of(&gradients.d_log_decay),
            of(&gradients.d_beta),
            d_state.matrices().to_vec(),
            d_state.key_sums().to_vec(),
        ];
        for ((part, got), expected) in parts.iter().zip(&got).zip(&expected) {
            close(&format!("{name} {} d {part:?}", cpu.level), got, expected, 1e-5);
        }
    }
}

fn gradients_are_differences<R: Recurrence + Clone>(name: &str, mechanism: &R) {
    let mut random = Random::new(2);
    let some = [(1, 1, 1), (2, 3, 5), (5, 4, 2), (9, 17, 3), (4, 3, 18), (35, 2, 3)];
    for (seq, key_dim, value_dim) in some {
        let sizes = Sizes { seq, key_dim, value_dim, ..SMALL };
        let call = Call::random(mechanism, sizes, &mut random);
        gradients_of(&format!("{name} {sizes:?}"), mechanism, &call);
    }
}

#[test]
fn backward_is_the_derivative() {
    every_mechanism!(gradients_are_differences);
}

fn packed_and_padded<R: Recurrence + Clone>(name: &str, mechanism: &R) {
    let mut random = Random::new(3);
    let sizes = Sizes { batch: 1, seq: 9, groups: 1, heads: 2, key_dim: 3, value_dim: 4 };
    let cuts = vec![0, 3, 3, 4, 9];
    let mut call: Call<f32> = Call::random(mechanism, sizes, &mut random).packed(cuts, &mut random);
    // What a token that is not there holds does not count.
    call.present = Some((0..9).map(|t| t % 4 != 1).collect());
    let (expected, last) = call.widen().forward(mechanism);
    for cpu in cpus() {
        let (out, _, state) = call.forward(mechanism, cpu);
        let what = format!("{name} {}", cpu.level);
        close(&format!("{what} out"), out.as_slice(), &expected, 3e-6);
        close(&format!("{what} state"), state.matrices(), &last.matrices, 3e-6);
    }
    gradients_of(&format!("{name} packed"), mechanism, &call);
}

#[test]
fn packed_sequences_are_apart_and_absent_tokens_write_nothing() {
    every_mechanism!(packed_and_padded);
}

fn absent_keys_do_not_reach<R: Recurrence + Clone>(name: &str, mechanism: &R) {
    let mut random = Random::new(4);
    let sizes = Sizes { seq: 6, key_dim: 5, value_dim: 4, batch: 1, heads: 2, groups: 2 };
    let mut call: Call<f32> = Call::random(mechanism, sizes, &mut random);
    call.present = Some(vec![true, true, false, true, true, true]);
    let mut other = call.clone();
    let poison = |x: &Tensor<f32>, dim: usize| {
        let mut data = x.as_slice().to_vec();
        data[4 * dim..6 * dim].fill(f32::NAN);
        Tensor::from_vec(data, x.shape()).unwrap()
    };
    (other.k, other.v) = (poison(&call.k, 5), poison(&call.v, 4));
    for cpu in cpus() {
        assert_eq!(call.forward(mechanism, cpu).0, other.forward(mechanism, cpu).0, "{name}");
        assert_eq!(call.backward(mechanism, cpu), other.backward(mechanism, cpu), "{name}");
    }
}

#[test]
fn nan_in_an_absent_key_or_value_reaches_nothing() {
    every_mechanism!(absent_keys_do_not_reach);
}

/// The tokens of a range as a call of their own.
fn part<E: Element>(call: &Call<E>, range: std::ops::Range<usize>, initial: State) -> Call<E> {
    fn cut<E: Element>(x: &Tensor<E>, range: std::ops::Range<usize>) -> Tensor<E> {
        let view = support::tokens(x, range);
        let data = (0..view.shape().seq)
            .flat_map(|t| (0..view.shape().heads).flat_map(move |h| view.row(0, t, h).to_vec()));
        Tensor::from_vec(data.collect(), view.shape()).unwrap()
    }
    let gate = |x: &Option<Tensor<f32>>| x.as_ref().map(|x| cut(x, range.clone()));
    Call {
        q: cut(&call.q, range.clone()),
        k: cut(&call.k, range.clone()),
        v: cut(&call.v, range.clone()),
        log_decay: gate(&call.log_decay),
        beta: gate(&call.beta),
        present: None,
        cuts: None,
        d_out: cut(&call.d_out, range.clone()),
        initial,
        d_final: call.d_final.clone(),
    }
}

fn cuts_change_no_bit<R: Recurrence + Clone>(name: &str, mechanism: &R) {
    let mut random = Random::new(5);
    for (key_dim, value_dim) in [(64, 64), (24, 20), (128, 32), (7, 100)] {
        let sizes = Sizes { batch: 1, seq: 75, groups: 1, heads: 2, key_dim, value_dim };
        let call: Call<f32> = Call::random(mechanism, sizes, &mut random);
        for cpu in cpus() {
            let (whole, _, last) = call.forward(mechanism, cpu);
            for step in [1, 2, 3, 5, 32, 64] {
                let mut state = call.initial.clone();
                let mut pieces = vec![];
                for first in (0..75).step_by(step) {
                    let piece = part(&call, first..75.min(first + step), state);
                    let (out, _, next) = piece.forward(mechanism, cpu);
                    pieces.extend(out.into_vec());
                    state = next;
                }
                assert_eq!(pieces, whole.as_slice(), "{name} {} pieces of {step}", cpu.level);
                assert_eq!(state, last, "{name} {} pieces of {step}", cpu.level);
            }
        }
    }
}

#[test]
fn pieces_and_single_tokens_give_the_bits_of_the_whole() {
    every_mechanism!(cuts_change_no_bit);
}

fn threads_change_no_bit<R: Recurrence + Clone>(name: &str, mechanism: &R) {
    let mut random = Random::new(6);
    let sizes = Sizes { batch: 3, seq: 40, groups: 2, heads: 2, key_dim: 20, value_dim: 33 };
    let call: Call<f32> = Call::random(mechanism, sizes, &mut random);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(4).build().unwrap();
    for level in Level::available() {
        let run = |threads| {
            let threads = Threads::at_most(NonZeroUsize::new(threads).unwrap());
            let cpu = Cpu { level, threads };
            pool.install(|| (call.forward(mechanism, cpu), call.backward(mechanism, cpu)))
        };
        let ((one_out, _, one_state), one_backward) = run(1);
        for threads in [2, 3, 4] {
            let ((out, _, state), backward) = run(threads);
            assert_eq!((&out, &state), (&one_out, &one_state), "{name} {level} {threads} threads");
            assert_eq!(backward, one_backward, "{name} {level} {threads} threads");
        }
    }
}

#[test]
fn threads_give_the_same_bits() {
    every_mechanism!(threads_change_no_bit);
}

fn the_future_does_not_leak<R: Recurrence + Clone>(name: &str, mechanism: &R) {
    let mut random = Random::new(7);
    let sizes = Sizes { batch: 1, seq: 20, groups: 1, heads: 2, key_dim: 9, value_dim: 6 };
    let call: Call<f32> = Call::random(mechanism, sizes, &mut random);
    let other: Call<f32> = Call::random(mechanism, sizes, &mut random);
    for t in 0..20 {
        let (old, new) =
            (part(&call, 0..t, call.initial.clone()), part(&other, t..20, call.initial.clone()));
        let join = |a: &Tensor<f32>, b: &Tensor<f32>| {
            let shape = foveal::Shape { seq: 20, ..a.shape() };
            Tensor::from_vec([a.as_slice(), b.as_slice()].concat(), shape).unwrap()
        };
        let gate = |a: &Option<Tensor<f32>>, b: &Option<Tensor<f32>>| {
            a.as_ref().zip(b.as_ref()).map(|(a, b)| join(a, b))
        };
        let mixed = Call {
            q: join(&old.q, &new.q),
            k: join(&old.k, &new.k),
            v: join(&old.v, &new.v),
            log_decay: gate(&old.log_decay, &new.log_decay),
            beta: gate(&old.beta, &new.beta),
            ..call.clone()
        };
        for cpu in cpus() {
            let (whole, mixed) = (call.forward(mechanism, cpu).0, mixed.forward(mechanism, cpu).0);
            assert_eq!(
                whole.as_slice()[..t * 12],
                mixed.as_slice()[..t * 12],
                "{name} {} {t}",
                cpu.level
            );
        }
    }
}

#[test]
fn no_output_depends_on_later_tokens() {
    every_mechanism!(the_future_does_not_leak);
}

fn sixteen_bits_are_storage<R: Recurrence + Clone>(name: &str, mechanism: &R) {
    fn check<E: Element, R: Recurrence + Clone>(name: &str, mechanism: &R, bound: f64) {
        let sizes = Sizes { batch: 1, seq: 30, groups: 1, heads: 2, key_dim: 20, value_dim: 18 };
        let call: Call<E> = Call::random(mechanism, sizes, &mut Random::new(8));
        let (expected, last) = call.widen().forward(mechanism);
        for cpu in cpus() {
            let (out, _, state) = call.forward(mechanism, cpu);
            close(&format!("{name} {} out", E::DTYPE), &wide(out.as_slice()), &expected, bound);
            close(&format!("{name} {} state", E::DTYPE), state.matrices(), &last.matrices, 3e-6);
        }
    }
    check::<f16, R>(name, mechanism, 5e-4);
    check::<bf16, R>(name, mechanism, 4e-3);
}

#[test]
fn f16_and_bf16_are_rounded_once() {
    every_mechanism!(sixteen_bits_are_storage);
}
