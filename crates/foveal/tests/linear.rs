//! Recurrences where it is hard: extreme decays, delta rules at the edge of stability, a million tokens, grouped heads,
//! strides; and what calls refuse.

mod support;

use foveal::linear::{
    Delta, FeatureMap, Gradients, Linear, Recurrence, Recurrent, Results, Retention, ScalarDecay,
    State, StateShape, Tokens, Upstream, VectorDecay,
};
use foveal::{Error, Scale, Shape, Strides, Tensor, TensorRef, Workspace};
use support::linear::{Call, Part, Sizes, Wide, states};
use support::{Random, cpus, error};

const SIZES: Sizes = Sizes { batch: 1, seq: 12, groups: 1, heads: 2, key_dim: 6, value_dim: 5 };

fn close(what: &str, got: &[f32], expected: &[f64], bound: f64) {
    let error = error(got, expected);
    assert!(error <= bound, "{what}: error {error:e} > {bound:e}");
}

/// Decays of 10⁻³⁰⁰, 0, nearly 1 and everything between, some in each sequence.
fn extreme<R: Recurrence + Clone>(name: &str, mechanism: &R) {
    const LOGS: [f32; 7] = [-690.776, f32::NEG_INFINITY, 0.0, -87.4, -1e-7, -30.0, -0.5];
    let mut call: Call<f32> = Call::random(mechanism, SIZES, &mut Random::new(1));
    let log_decay = call.log_decay.take().unwrap();
    let data = (0..log_decay.as_slice().len()).map(|n| LOGS[n * 3 % 7]).collect();
    call.log_decay = Some(Tensor::from_vec(data, log_decay.shape()).unwrap());
    let (expected, last) = call.widen().forward(mechanism);
    let d_out: Vec<f64> = call.d_out.as_slice().iter().map(|&x| f64::from(x)).collect();
    let d_final = states(&call.d_final);
    let gradient = |part| call.widen().gradient(mechanism, part, (&d_out, &d_final));
    let (d_k, mut d_log, d_state) =
        (gradient(Part::K), gradient(Part::LogDecay), gradient(Part::Matrices));
    // A difference of infinite logarithms is none; its limit is 0.
    d_log.iter_mut().filter(|x| x.is_nan()).for_each(|x| *x = 0.0);
    for cpu in cpus() {
        let what = format!("{name} {}", cpu.level);
        let (out, _, state) = call.forward(mechanism, cpu);
        close(&what, out.as_slice(), &expected, 3e-6);
        close(&what, state.matrices(), &last.matrices, 3e-6);
        let (gradients, own_d_state) = call.backward(mechanism, cpu);
        close(&what, gradients.d_k.as_slice(), &d_k, 1e-5);
        close(&what, gradients.d_log_decay.unwrap().as_slice(), &d_log, 1e-5);
        close(&what, own_d_state.matrices(), &d_state, 1e-5);
    }
}

#[test]
fn decays_of_any_size_are_stable() {
    extreme("scalar decay", &ScalarDecay::new());
    extreme("gla", &VectorDecay::new());
    extreme("gated delta", &Delta::gated());
}

#[test]
fn a_delta_rule_at_strength_one_replaces_what_its_key_held() {
    for (n, cpu) in cpus().enumerate() {
        let mut random = Random::new(2 + n as u64);
        let shape = Shape { batch: 1, seq: 8, heads: 1, dim: 8 };
        // Token t and t + 4 share a key; keys are orthogonal.
        let keys = (0..64).map(|i| f32::from(i / 8 % 4 == i % 8)).collect();
        let k = Tensor::from_vec(keys, shape).unwrap();
        let v: Tensor<f32> = random.tensor(shape, 1.0);
        let beta = Tensor::from_vec(vec![1.0; 8], shape.per_row()).unwrap();
        let mechanism = Delta::new().scale(Scale::Value(1.0));
        let recurrent = Recurrent::new(mechanism).cpu(cpu);
        let tokens = Tokens::new(k.view(), k.view(), v.view()).beta(beta.view());
        let mut state = recurrent.state(&tokens).unwrap();
        let out = recurrent.forward(&tokens, &mut state).unwrap();
        // Each token reads its own value, and what stays are the second values.
        assert_eq!(out.as_slice(), v.as_slice());
        assert_eq!(state.matrices()[..32], v.as_slice()[32..]);
        assert!(state.matrices()[32..].iter().all(|&x| x == 0.0));
    }
}

#[test]
fn delta_rules_are_stable_at_strengths_of_zero_one_and_two() {
    for strength in [0.0f32, 1.0, 2.0] {
        let sizes = Sizes { seq: 3000, ..SIZES };
        let mut call: Call<f32> = Call::random(&Delta::new(), sizes, &mut Random::new(3));
        let mut keys = call.k.as_slice().to_vec();
        for key in keys.chunks_mut(sizes.key_dim) {
            let length = key.iter().map(|x| x * x).sum::<f32>().sqrt();
            key.iter_mut().for_each(|x| *x /= length);
        }
        call.k = Tensor::from_vec(keys, call.k.shape()).unwrap();
        let beta = call.beta.take().unwrap();
        let data = vec![strength; beta.as_slice().len()];
        call.beta = Some(Tensor::from_vec(data, beta.shape()).unwrap());
        let (expected, last) = call.widen().forward(&Delta::new());
        for cpu in cpus() {
            let (out, _, state) = call.forward(&Delta::new(), cpu);
            // At 2 nothing is ever forgotten, roundings included.
            close(&format!("{strength}"), out.as_slice(), &expected, 3e-5);
            close(&format!("{strength}"), state.matrices(), &last.matrices, 3e-5);
            let (gradients, d_state) = call.backward(&Delta::new(), cpu);
            let all = [gradients.d_q.as_slice(), gradients.d_k.as_slice(), d_state.matrices()];
            assert!(all.iter().all(|x| x.iter().all(|x| x.is_finite())));
        }
    }
}

/// A million tokens in pieces, with the state carried on: the error against f64.
fn long<R: Recurrence + Clone>(name: &str, mechanism: &R, bound: f64) {
    const PIECES: usize = 50;
    let sizes = Sizes { batch: 1, seq: 20_000, groups: 1, heads: 1, key_dim: 4, value_dim: 4 };
    let mut random = Random::new(4);
    let cpus: Vec<_> = cpus().collect();
    let mut own = vec![];
    let mut wide = None;
    for piece in 0..PIECES {
        let mut call: Call<f32> = Call::random(mechanism, sizes, &mut random);
        if let Some(log_decay) = &mut call.log_decay {
            // A memory of about ten thousand tokens.
            let data = log_decay.as_slice().iter().map(|x| 2e-4 * x).collect();
            *log_decay = Tensor::from_vec(data, log_decay.shape()).unwrap();
        }
        if piece == 0 {
            own = vec![call.initial.clone(); cpus.len()];
            wide = Some(states(&call.initial));
        }
        let reference = Wide { initial: wide.take().unwrap(), ..call.widen() };
        let (expected, last) = reference.forward(mechanism);
        wide = Some(last);
        for (cpu, state) in cpus.iter().zip(&mut own) {
            call.initial = state.clone();
            let (out, _, next) = call.forward(mechanism, *cpu);
            *state = next;
            close(&format!("{name} {} {piece}", cpu.level), out.as_slice(), &expected, bound);
        }
    }
}

#[test]
fn a_million_tokens_stay_accurate() {
    long("linear", &Linear::new(), 1e-5);
    long("gla", &VectorDecay::new(), 3e-5);
    long("gated delta", &Delta::gated(), 3e-5);
}

#[test]
fn value_heads_that_share_a_key_head_add_up_its_gradients() {
    let sizes = Sizes { batch: 2, seq: 37, groups: 2, heads: 6, key_dim: 7, value_dim: 3 };
    let mut random = Random::new(5);
    let call: Call<f32> = Call::random(&Delta::gated(), sizes, &mut random);
    let spread = |x: &Tensor<f32>| {
        let rows = x.as_slice().chunks(7).flat_map(|row| [row; 3].concat());
        Tensor::from_vec(rows.collect(), Shape { heads: 6, ..x.shape() }).unwrap()
    };
    let apart = Call { q: spread(&call.q), k: spread(&call.k), ..call.clone() };
    for cpu in cpus() {
        let mechanism = &Delta::gated();
        assert_eq!(call.forward(mechanism, cpu), apart.forward(mechanism, cpu));
        let (together, d_state) = call.backward(mechanism, cpu);
        let (own, own_d_state) = apart.backward(mechanism, cpu);
        assert_eq!((&together.d_v, d_state), (&own.d_v, own_d_state));
        let sums = |x: &Tensor<f32>| -> Vec<f64> {
            let groups = x.as_slice().chunks(21);
            groups
                .flat_map(|g| (0..7).map(|c| [0, 7, 14].map(|h| f64::from(g[h + c])).iter().sum()))
                .collect()
        };
        close("d_q", together.d_q.as_slice(), &sums(&own.d_q), 1e-6);
        close("d_k", together.d_k.as_slice(), &sums(&own.d_k), 1e-6);
    }
}

#[test]
fn strides_change_no_bit() {
    let mut random = Random::new(6);
    let call: Call<f32> = Call::random(&Linear::new(), SIZES, &mut random);
    // [heads, seq, dim] in memory, with gaps.
    let (shape, gap) = (call.v.shape(), 3);
    let strides = Strides { batch: 0, seq: 5 + gap, heads: 12 * (5 + gap) };
    let mut memory = vec![f32::NAN; 2 * 12 * (5 + gap)];
    for t in 0..12 {
        for h in 0..2 {
            let at = h * strides.heads + t * strides.seq;
            memory[at..at + 5].copy_from_slice(call.v.view().row(0, t, h));
        }
    }
    let v = TensorRef::from_strides(&memory, shape, strides).unwrap();
    for cpu in cpus() {
        let recurrent = Recurrent::new(Linear::new()).cpu(cpu);
        let (out, _, state) = call.forward(&Linear::new(), cpu);
        let mut own = call.initial.clone();
        let tokens = Tokens { v, ..call.tokens() };
        assert_eq!(recurrent.forward(&tokens, &mut own).unwrap(), out);
        assert_eq!(own, state);
    }
}

#[test]
fn every_query_reads_all_keys_without_causality() {
    let mut random = Random::new(7);
    for (map, epsilon) in [(FeatureMap::EluPlusOne, Some(1e-6)), (FeatureMap::Identity, None)] {
        let mechanism = Linear::new().map(map).normaliser(epsilon);
        let sizes = Sizes { batch: 2, seq: 41, groups: 1, heads: 2, key_dim: 18, value_dim: 5 };
        let call: Call<f32> = Call::random(&mechanism, sizes, &mut random);
        // Query after query behind all keys is the same by the causal definition.
        let wide = call.widen();
        let (_, last) = wide.forward(&mechanism);
        let silent = Wide {
            k: (wide.k.0, vec![f64::NAN; wide.k.1.len()]),
            present: Some(vec![false; 82]),
            initial: last.clone(),
            ..wide.clone()
        };
        let (expected, _) = silent.forward(&mechanism);
        for cpu in cpus() {
            let recurrent = Recurrent::new(mechanism).cpu(cpu);
            let mut state = call.initial.clone();
            let out = recurrent.forward_bidirectional(&call.tokens(), &mut state).unwrap();
            close("out", out.as_slice(), &expected, 3e-6);
            close("state", state.matrices(), &last.matrices, 3e-6);
        }
    }
}

fn tensor(shape: Shape) -> Tensor<f32> {
    Tensor::zeros(shape).unwrap()
}

#[test]
fn calls_that_do_not_fit_together_are_refused() {
    let shape = Shape { batch: 1, seq: 4, heads: 2, dim: 8 };
    let (x, other) = (tensor(shape), tensor(Shape { dim: 9, ..shape }));
    let (three, gate) = (tensor(Shape { heads: 3, ..shape }), tensor(shape.per_row()));
    let plain = Tokens::new(x.view(), x.view(), x.view());
    let linear = Recurrent::new(Linear::new());
    let refused = |tokens: &Tokens<'_, f32>| linear.state(tokens).unwrap_err();
    let keys = Tokens { k: other.view(), ..plain };
    assert!(matches!(refused(&keys), Error::ShapeMismatch { .. }));
    let heads = Tokens { v: three.view(), ..plain };
    assert!(matches!(refused(&heads), Error::HeadGrouping { heads: 3, kv_heads: 2 }));
    let invalid = |error: Error| matches!(error, Error::InvalidParameter { .. });
    assert!(invalid(refused(&plain.log_decay(gate.view()))));
    assert!(invalid(refused(&plain.beta(gate.view()))));
    assert!(matches!(
        refused(&plain.present(&[true; 3])),
        Error::LengthMismatch { expected: 4, .. }
    ));
    for cuts in [&[0, 3][..], &[0, 3, 2, 4], &[1, 4], &[]] {
        assert!(invalid(refused(&plain.cuts(cuts))), "{cuts:?}");
    }
    let none = tensor(Shape { dim: 0, ..shape });
    assert!(invalid(refused(&Tokens::new(none.view(), none.view(), none.view()))));
    let normalised = Recurrent::new(Linear::new().map(FeatureMap::Identity));
    assert!(invalid(normalised.state(&plain).unwrap_err()));
    let negative = Recurrent::new(Linear::new().normaliser(Some(-1.0)));
    assert!(invalid(negative.state(&plain).unwrap_err()));
    assert!(invalid(Recurrent::new(ScalarDecay::new()).state(&plain).unwrap_err()));
    let scale = Recurrent::new(VectorDecay::new().scale(Scale::Value(f32::NAN)));
    assert!(invalid(scale.state(&plain.log_decay(x.view())).unwrap_err()));
    let retention = Recurrent::new(Retention::new(3)).state(&plain).unwrap_err();
    assert!(matches!(retention, Error::LengthMismatch { expected: 2, got: 3, .. }));
    let growing = Recurrent::new(Retention::new(2).decays(vec![0.5, 1.5]));
    assert!(invalid(growing.state(&plain).unwrap_err()));
    let packed =
        linear.forward_bidirectional(&plain.cuts(&[0, 4]), &mut linear.state(&plain).unwrap());
    assert!(invalid(packed.unwrap_err()));
}

#[test]
fn states_and_gradients_of_other_shapes_are_refused() {
    let shape = Shape { batch: 1, seq: 4, heads: 2, dim: 8 };
    let (x, gate) = (tensor(shape), tensor(shape.per_row()));
    let tokens = Tokens::new(x.view(), x.view(), x.view());
    let linear = Recurrent::new(Linear::new());
    let own = linear.state(&tokens).unwrap();
    let without = State::zeros(own.shape(), 0).unwrap();
    let larger = State::zeros(StateShape { heads: 3, ..own.shape() }, 1).unwrap();
    for mut state in [without, larger] {
        let error = linear.forward(&tokens, &mut state).unwrap_err();
        assert!(matches!(error, Error::StateShape { .. }), "{error}");
    }
    let huge = StateShape { sequences: usize::MAX, ..own.shape() };
    assert!(matches!(State::zeros(huge, 1), Err(Error::StateShape { .. })));
    let delta = Recurrent::new(Delta::new());
    let tokens = tokens.beta(gate.view());
    let initial = delta.state(&tokens).unwrap();
    let without_reads = Upstream::new(x.view(), &initial);
    let error = delta.backward(&tokens, without_reads, &mut initial.clone()).unwrap_err();
    assert!(matches!(error, Error::InvalidParameter { what: "reads of keys", .. }), "{error}");
    let plain = Tokens::new(x.view(), x.view(), x.view());
    let (mut out, mut reads) = (tensor(shape), tensor(shape));
    let results = Results { out: out.view_mut(), reads: Some(reads.view_mut()) };
    let error = linear.forward_into(&plain, results, &mut own.clone(), &mut Workspace::new());
    assert!(matches!(error, Err(Error::InvalidParameter { what: "reads of keys", .. })));
    let [mut a, mut b, mut c] = [tensor(shape), tensor(shape), tensor(shape)];
    let mut d = tensor(shape.per_row());
    let gradients = Gradients {
        d_q: a.view_mut(),
        d_k: b.view_mut(),
        d_v: c.view_mut(),
        d_log_decay: Some(d.view_mut()),
        d_beta: None,
    };
    let upstream = Upstream::new(x.view(), &own);
    let mut d_state = own.clone();
    let error =
        linear.backward_into(&plain, upstream, gradients, &mut d_state, &mut Workspace::new());
    assert!(matches!(error, Err(Error::InvalidParameter { what: "gradient of decays", .. })));
}
