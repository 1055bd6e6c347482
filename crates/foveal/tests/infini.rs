//! Infini-attention against its definition in f64 and its differences; what bits may not depend on; what is refused.

mod support;

use foveal::linear::{State, StateShape};
use foveal::memory::infini::{Gradients, Infini, InfiniState, Tokens, Upstream};
use foveal::memory::{Empty, Update};
use foveal::sparse::StateHeads;
use foveal::{
    Attention, Cpu, Element, Error, Level, Mask, Phase, Scale, Shape, Tensor, TensorRef, Threads,
    Workspace,
};
use half::{bf16, f16};
use std::num::NonZeroUsize;
use support::infini::{Call, Part, SCALE, Sizes, memories, numbers};
use support::{Random, cpus, error, tokens as cut};

const SMALL: Sizes =
    Sizes { batch: 2, seq: 13, heads: 2, kv_heads: 1, key_dim: 5, value_dim: 7, segment: 4 };

const RULES: [(Update, Empty); 4] = [
    (Update::Linear, Empty::Gated),
    (Update::Delta, Empty::Gated),
    (Update::Linear, Empty::Bypassed),
    (Update::Delta, Empty::Bypassed),
];

/// Lengths around those of segments, segments around those of blocks, dims around those of vectors and panels.
fn sizes() -> Vec<Sizes> {
    let lengths = (0..=13).map(|seq| Sizes { seq, ..SMALL });
    let segments = [1, 2, 31, 32, 33, 64, 66, 67, 1000, usize::MAX];
    let segments = segments.map(|segment| Sizes { seq: 67, segment, ..SMALL });
    let dims = [1, 2, 8, 15, 16, 17, 32, 33, 64];
    let keys = dims.map(|key_dim| Sizes { key_dim, value_dim: 3, ..SMALL });
    let values = dims.map(|value_dim| Sizes { key_dim: 3, value_dim, ..SMALL });
    let heads = [(1, 1), (3, 3), (6, 2), (4, 1)];
    let heads = heads.map(|(heads, kv_heads)| Sizes { heads, kv_heads, ..SMALL });
    let batches = [0, 1, 5].map(|batch| Sizes { batch, ..SMALL });
    lengths.chain(segments).chain(keys).chain(values).chain(heads).chain(batches).collect()
}

fn wide<E: Element>(x: &Tensor<E>) -> Vec<f32> {
    x.as_slice().iter().map(|x| x.to_f32()).collect()
}

fn close(what: &str, got: &[f32], expected: &[f64], bound: f64) {
    let error = error(got, expected);
    assert!(error <= bound, "{what}: error {error:e} > {bound:e}");
}

#[test]
fn outputs_and_memories_are_those_of_the_definition() {
    let mut random = Random::new(1);
    for (n, sizes) in sizes().into_iter().enumerate() {
        for (m, rule) in RULES.into_iter().enumerate() {
            let with = (n % 2 == 0, (n + m) % 3 == 0);
            let call: Call<f32> = Call::random(sizes, rule, with, &mut random);
            let (expected, last) = call.widen().forward();
            for cpu in cpus() {
                let what = format!("{} {sizes:?} {rule:?} {with:?}", cpu.level);
                let (out, memory) = call.forward(cpu);
                close(&format!("{what} out"), out.as_slice(), &expected, 3e-6);
                close(&format!("{what} M"), memory.matrices(), &last.matrices, 3e-6);
                close(&format!("{what} z"), memory.key_sums(), &last.key_sums, 3e-6);
            }
        }
    }
}

fn gradients_are_differences(sizes: Sizes, rule: (Update, Empty), with: (bool, bool)) {
    let mut random = Random::new(2);
    let call: Call<f32> = Call::random(sizes, rule, with, &mut random);
    let (d_out, d_final) = (numbers(call.d_out.as_slice()), memories(&call.d_final));
    let difference = |part| call.widen().gradient(part, (&d_out, &d_final));
    // An empty memory is no inner point: with any z, however small, it reads M / z.
    let memory =
        if with.0 { [Part::Matrices, Part::KeySums].map(difference) } else { [vec![], vec![]] };
    let parts = [Part::Q, Part::K, Part::V, Part::Gate, Part::RotatedQ, Part::RotatedK];
    let expected = parts.map(difference);
    for cpu in cpus() {
        let (d, d_memory) = call.backward(cpu);
        let what = format!("{} {sizes:?} {rule:?} {with:?}", cpu.level);
        let (turned_q, turned_k) = d.d_rotated.unzip();
        let or_none = |x: Option<Tensor<f32>>| x.map_or(vec![], Tensor::into_vec);
        let got = [
            d.d_q.into_vec(),
            d.d_k.into_vec(),
            d.d_v.into_vec(),
            d.d_gate,
            or_none(turned_q),
            or_none(turned_k),
        ];
        for ((part, got), expected) in parts.iter().zip(&got).zip(&expected) {
            close(&format!("{what} d {part:?}"), got, expected, 1e-5);
        }
        if with.0 {
            close(&format!("{what} d M"), d_memory.matrices(), &memory[0], 1e-5);
            close(&format!("{what} d z"), d_memory.key_sums(), &memory[1], 1e-5);
        }
        assert!(d_memory.matrices().iter().all(|x| x.is_finite()), "{what}");
    }
}

#[test]
fn gradients_are_those_of_differences() {
    for rule in RULES {
        for with in [(false, false), (true, false), (false, true), (true, true)] {
            gradients_are_differences(SMALL, rule, with);
        }
    }
    let delta = (Update::Delta, Empty::Gated);
    for seq in [0, 1, 3, 4, 5, 8] {
        gradients_are_differences(Sizes { seq, ..SMALL }, delta, (true, true));
    }
    let blocks = Sizes { batch: 1, seq: 71, heads: 1, key_dim: 2, value_dim: 2, ..SMALL };
    gradients_are_differences(Sizes { segment: 35, ..blocks }, delta, (false, false));
    gradients_are_differences(Sizes { segment: 1, seq: 9, ..blocks }, delta, (true, false));
    for (key_dim, value_dim) in [(1, 1), (16, 3), (17, 18)] {
        let sizes = Sizes { batch: 1, seq: 8, segment: 3, key_dim, value_dim, ..SMALL };
        gradients_are_differences(sizes, delta, (true, false));
    }
    let grouped = Sizes { heads: 6, kv_heads: 2, batch: 1, ..SMALL };
    gradients_are_differences(grouped, delta, (false, true));
}

/// With many segments each of which is read and corrected, gradients stay those of the definition.
#[test]
fn gradients_go_through_many_segments() {
    let sizes = Sizes { batch: 1, seq: 60, segment: 2, key_dim: 3, value_dim: 2, ..SMALL };
    gradients_are_differences(sizes, (Update::Delta, Empty::Gated), (false, false));
    gradients_are_differences(sizes, (Update::Linear, Empty::Gated), (false, false));
}

#[test]
fn one_segment_is_gated_local_attention() {
    let sizes = Sizes { seq: 40, segment: 64, heads: 4, kv_heads: 2, ..SMALL };
    for rule in RULES {
        let call: Call<f32> = Call::random(sizes, rule, (false, false), &mut Random::new(3));
        for cpu in cpus() {
            let attention =
                Attention::new().mask(Mask::causal()).scale(Scale::Value(SCALE)).cpu(cpu);
            let local = attention.forward(call.q.view(), call.k.view(), call.v.view()).unwrap();
            let (out, memory) = call.forward(cpu);
            let dim = sizes.value_dim;
            let rows = out.as_slice().chunks(dim).zip(local.out.as_slice().chunks(dim));
            for (n, (row, local)) in rows.enumerate() {
                let keep = match rule.1 {
                    Empty::Bypassed => 1.0,
                    _ => {
                        let beta = f64::from(call.gate[n % sizes.heads]);
                        (1.0 - 1.0 / (1.0 + (-beta).exp())) as f32
                    }
                };
                for (got, local) in row.iter().zip(local) {
                    assert!(
                        (got - keep * local).abs() <= 1e-7 * local.abs(),
                        "{got} {keep} {local}"
                    );
                }
            }
            assert!(memory.key_sums().iter().all(|&z| z == 0.0), "a part of a segment was written");
        }
    }
}

fn at_most(level: Level, threads: usize) -> Cpu {
    Cpu { level, threads: Threads::at_most(NonZeroUsize::new(threads).unwrap()) }
}

/// One sequence of a call.
fn alone(call: &Call<f32>, batch: usize) -> Call<f32> {
    let part = |x: &Tensor<f32>| {
        let shape = Shape { batch: 1, ..x.shape() };
        let len = shape.checked_len().unwrap();
        Tensor::from_vec(x.as_slice()[batch * len..][..len].to_vec(), shape).unwrap()
    };
    let state = |x: &State| {
        let shape = StateShape { sequences: 1, ..x.shape() };
        let mut own = State::zeros(shape, 1).unwrap();
        let (m, z) = (own.matrices().len(), own.key_sums().len());
        own.matrices_mut().copy_from_slice(&x.matrices()[batch * m..][..m]);
        own.key_sums_mut().copy_from_slice(&x.key_sums()[batch * z..][..z]);
        own
    };
    Call {
        sizes: Sizes { batch: 1, ..call.sizes },
        q: part(&call.q),
        k: part(&call.k),
        v: part(&call.v),
        rotated: call.rotated.as_ref().map(|(q, k)| (part(q), part(k))),
        d_out: part(&call.d_out),
        initial: state(&call.initial),
        d_final: state(&call.d_final),
        ..call.clone()
    }
}

#[test]
fn no_bit_depends_on_threads_or_on_the_batch() {
    for (segment, seq) in [(50, 170), (1, 5), (300, 700)] {
        let sizes = Sizes { batch: 3, seq, segment, heads: 4, kv_heads: 2, ..SMALL };
        let rule = (Update::Delta, Empty::Gated);
        let call: Call<f32> = Call::random(sizes, rule, (true, false), &mut Random::new(4));
        for level in Level::available() {
            let (forward, backward) =
                (call.forward(at_most(level, 1)), call.backward(at_most(level, 1)));
            for threads in [2, 3, 8] {
                assert_eq!(call.forward(at_most(level, threads)), forward, "{level} {threads}");
                assert_eq!(call.backward(at_most(level, threads)), backward, "{level} {threads}");
            }
            for batch in 0..sizes.batch {
                let own = alone(&call, batch);
                let (out, memory) = own.forward(at_most(level, 2));
                let n = out.as_slice().len();
                assert_eq!(out.as_slice(), &forward.0.as_slice()[batch * n..][..n]);
                let n = memory.matrices().len();
                assert_eq!(memory.matrices(), &forward.1.matrices()[batch * n..][..n]);
                let (d, d_memory) = own.backward(at_most(level, 2));
                let n = d.d_k.as_slice().len();
                assert_eq!(d.d_k.as_slice(), &backward.0.d_k.as_slice()[batch * n..][..n]);
                let n = d_memory.matrices().len();
                assert_eq!(d_memory.matrices(), &backward.1.matrices()[batch * n..][..n]);
            }
        }
    }
}

#[test]
fn later_tokens_change_nothing() {
    let sizes = Sizes { batch: 1, seq: 150, segment: 40, ..SMALL };
    let rule = (Update::Delta, Empty::Gated);
    let call: Call<f32> = Call::random(sizes, rule, (false, false), &mut Random::new(5));
    let mut other = call.clone();
    let last = 101;
    for x in [&mut other.q, &mut other.k, &mut other.v] {
        let (shape, mut data) = (x.shape(), x.as_slice().to_vec());
        data[last * shape.heads * shape.dim..].fill(7.0);
        *x = Tensor::from_vec(data, shape).unwrap();
    }
    for cpu in cpus() {
        let (a, b) = (call.forward(cpu).0, other.forward(cpu).0);
        let seen = last * sizes.heads * sizes.value_dim;
        assert_eq!(a.as_slice()[..seen], b.as_slice()[..seen]);
        assert_ne!(a, b);
    }
}

fn state_of<E: Element>(call: &Call<E>, cpu: Cpu) -> InfiniState<E> {
    let Sizes { heads, kv_heads, key_dim, value_dim, .. } = call.sizes;
    let shape = StateHeads { heads, kv_heads, key_dim, value_dim };
    let mut state = call.infini(cpu).state(shape, call.rotated.is_some()).unwrap();
    state.memory_mut().matrices_mut().copy_from_slice(call.initial.matrices());
    state.memory_mut().key_sums_mut().copy_from_slice(call.initial.key_sums());
    state
}

/// The outputs of calls of so many tokens.
fn in_pieces<E: Element>(
    call: &Call<E>,
    state: &mut InfiniState<E>,
    pieces: impl IntoIterator<Item = usize>,
    phase: Phase,
) -> Vec<E> {
    let (mut out, mut at) = (vec![], 0);
    for n in pieces {
        let own = at..at + n;
        let of = |x| cut(x, own.clone());
        let mut tokens = Tokens::new(of(&call.q), of(&call.k), of(&call.v), &call.gate);
        if let Some((q, k)) = &call.rotated {
            tokens = tokens.rotated(of(q), of(k));
        }
        out.extend_from_slice(state.forward(&tokens, phase).unwrap().as_slice());
        at += n;
        assert_eq!(state.tokens(), at);
        assert_eq!(state.open(), at % call.sizes.segment);
    }
    assert_eq!(at, call.sizes.seq);
    out
}

fn streams<E: Element + PartialEq>(sizes: Sizes, with: (bool, bool), bound: f64) {
    let mut random = Random::new(6);
    for rule in RULES {
        let call: Call<E> = Call::random(sizes, rule, with, &mut random);
        for cpu in cpus() {
            let (whole, memory) = call.forward(cpu);
            let expected = numbers(&wide(&whole));
            let seq = sizes.seq;
            let what = format!("{} {sizes:?} {rule:?} {with:?}", cpu.level);
            let mut one_by_one = None;
            for pieces in [vec![1; seq], vec![seq], vec![seq / 3, seq - seq / 3], {
                let mut pieces = vec![5; seq / 5];
                pieces.push(seq % 5);
                pieces
            }] {
                let mut state = state_of(&call, cpu);
                let out = in_pieces(&call, &mut state, pieces.iter().copied(), Phase::Prompt);
                assert!(out == whole.as_slice(), "{what}: a prompt in pieces {pieces:?}");
                assert_eq!(state.memory(), &memory, "{what}");
                if pieces.iter().all(|&n| n <= 64) {
                    state.clear();
                    state.memory_mut().matrices_mut().copy_from_slice(call.initial.matrices());
                    state.memory_mut().key_sums_mut().copy_from_slice(call.initial.key_sums());
                    let out = in_pieces(&call, &mut state, pieces, Phase::Generated);
                    assert_eq!(state.memory(), &memory, "{what}: generated");
                    let got: Vec<f32> = out.iter().map(|x| x.to_f32()).collect();
                    close(&format!("{what}: generated"), &got, &expected, bound);
                    assert!(
                        *one_by_one.get_or_insert(out.clone()) == out,
                        "{what}: generated bits"
                    );
                }
            }
        }
    }
}

#[test]
fn token_by_token_is_the_whole_call() {
    let one = Sizes { batch: 1, ..SMALL };
    for with in [(false, false), (true, true)] {
        streams::<f32>(one, with, 1e-6);
        streams::<f32>(Sizes { seq: 100, segment: 33, value_dim: 32, ..one }, with, 1e-6);
        streams::<f32>(
            Sizes { seq: 64, segment: 32, key_dim: 16, value_dim: 16, ..one },
            with,
            1e-6,
        );
        streams::<f32>(Sizes { seq: 7, segment: 1, ..one }, with, 1e-6);
    }
    streams::<f32>(Sizes { seq: 700, segment: 290, ..one }, (true, false), 1e-6);
    streams::<bf16>(Sizes { seq: 90, segment: 40, ..one }, (false, true), 0.02);
    streams::<f16>(Sizes { seq: 90, segment: 40, ..one }, (false, false), 0.002);
}

fn sixteen_bits<E: Element>(bound: f64) {
    let sizes = Sizes { seq: 70, segment: 20, heads: 4, kv_heads: 2, ..SMALL };
    for rule in RULES {
        let call: Call<E> = Call::random(sizes, rule, (true, false), &mut Random::new(7));
        let (expected, last) = call.widen().forward();
        // What f32 gives for the same numbers.
        let x = |x: &Tensor<E>| Tensor::from_vec(wide(x), x.shape()).unwrap();
        let same = Call::<f32> {
            sizes,
            update: rule.0,
            empty: rule.1,
            q: x(&call.q),
            k: x(&call.k),
            v: x(&call.v),
            rotated: None,
            gate: call.gate.clone(),
            d_out: x(&call.d_out),
            initial: call.initial.clone(),
            d_final: call.d_final.clone(),
        };
        for cpu in cpus() {
            let (out, memory) = call.forward(cpu);
            close(&format!("{} out", cpu.level), &wide(&out), &expected, bound);
            close("M", memory.matrices(), &last.matrices, 3e-6);
            let (d, d_memory) = call.backward(cpu);
            let (exact, exact_memory) = same.backward(cpu);
            for (got, exact) in [(&d.d_q, &exact.d_q), (&d.d_k, &exact.d_k), (&d.d_v, &exact.d_v)] {
                close("gradient", &wide(got), &numbers(exact.as_slice()), bound);
            }
            close("d gate", &d.d_gate, &numbers(&exact.d_gate), bound);
            close("d M", d_memory.matrices(), &numbers(exact_memory.matrices()), 3e-6);
        }
    }
}

#[test]
fn numbers_of_16_bits_are_rounded_twice() {
    sixteen_bits::<bf16>(2f64.powi(-7));
    sixteen_bits::<f16>(2f64.powi(-10));
}

/// A hundred thousand tokens: the memory and what is read of it are as exact as after one segment.
#[test]
fn sums_do_not_lose_digits_over_many_segments() {
    let sizes =
        Sizes { batch: 1, seq: 100_000, segment: 100, heads: 1, key_dim: 2, value_dim: 2, ..SMALL };
    let rule = (Update::Linear, Empty::Gated);
    let call: Call<f32> = Call::random(sizes, rule, (false, false), &mut Random::new(8));
    let (expected, last) = call.widen().forward();
    for cpu in cpus() {
        let (out, memory) = call.forward(cpu);
        close("out", out.as_slice(), &expected, 3e-6);
        close("M", memory.matrices(), &last.matrices, 3e-6);
        close("z", memory.key_sums(), &last.key_sums, 3e-6);
    }
}

#[test]
fn a_state_takes_the_bytes_of_its_formula() {
    let shape = StateHeads { heads: 8, kv_heads: 2, key_dim: 24, value_dim: 40 };
    let infini = Infini::new(100).unwrap();
    let memory = 4 * 2 * 24 * (40 + 1);
    let state: InfiniState<f32> = infini.state(shape, false).unwrap();
    assert_eq!(state.bytes(), memory + 4 * 100 * 2 * (24 + 40));
    let mut state: InfiniState<bf16> = infini.state(shape, true).unwrap();
    let bytes = memory + 2 * 100 * 2 * (2 * 24 + 40);
    assert_eq!(state.bytes(), bytes);
    let q = Tensor::zeros(Shape { batch: 1, seq: 350, heads: 8, dim: 24 }).unwrap();
    let k = Tensor::zeros(Shape { batch: 1, seq: 350, heads: 2, dim: 24 }).unwrap();
    let v = Tensor::zeros(Shape { batch: 1, seq: 350, heads: 2, dim: 40 }).unwrap();
    let tokens = Tokens::new(q.view(), k.view(), v.view(), &[0.0; 8]);
    let tokens = tokens.rotated(q.view(), k.view());
    state.forward(&tokens, Phase::Prompt).unwrap();
    assert_eq!((state.bytes(), state.tokens(), state.open()), (bytes, 350, 50));
    state.clear();
    assert_eq!((state.tokens(), state.open()), (0, 0));
    assert!(state.memory().key_sums().iter().all(|&z| z == 0.0));
}

#[test]
fn what_does_not_fit_is_refused_and_nothing_written() {
    assert!(matches!(Infini::new(0), Err(Error::InvalidParameter { .. })));
    let shape = Shape { batch: 1, seq: 6, heads: 4, dim: 8 };
    let (q, k) =
        (Tensor::<f32>::zeros(shape).unwrap(), Tensor::zeros(Shape { heads: 2, ..shape }).unwrap());
    let (q, k): (TensorRef<'_, f32>, TensorRef<'_, f32>) = (q.view(), k.view());
    let short = Tensor::<f32>::zeros(Shape { seq: 5, heads: 2, ..shape }).unwrap();
    let infini = Infini::new(2).unwrap();
    let good = Tokens::new(q, k, k, &[0.0; 4]);
    let memory = infini.memory(&good).unwrap();
    let run = |tokens: &Tokens<'_, f32>| infini.forward(tokens, &mut memory.clone()).unwrap_err();
    assert!(matches!(
        run(&Tokens::new(q, k, k, &[0.0; 3])),
        Error::LengthMismatch { expected: 4, got: 3, .. }
    ));
    assert!(matches!(
        run(&Tokens::new(q, short.view(), short.view(), &[0.0; 4])),
        Error::ShapeMismatch { .. }
    ));
    assert!(matches!(run(&good.rotated(k, k)), Error::ShapeMismatch { .. }));
    let three = q.shape();
    let odd = Tensor::<f32>::zeros(Shape { heads: 3, ..three }).unwrap();
    assert!(matches!(run(&Tokens::new(odd.view(), k, k, &[0.0; 3])), Error::HeadGrouping { .. }));
    let infinite = infini.clone().scale(Scale::Value(f32::INFINITY));
    assert!(matches!(infinite.memory(&good), Err(Error::InvalidParameter { .. })));
    let other = State::zeros(StateShape { heads: 4, ..memory.shape() }, 1).unwrap();
    let bare = State::zeros(memory.shape(), 0).unwrap();
    for mut wrong in [other, bare] {
        let before = wrong.clone();
        assert!(matches!(infini.forward(&good, &mut wrong), Err(Error::StateShape { .. })));
        let upstream = Upstream { d_out: q, initial: &wrong };
        let refused = infini.backward(&good, upstream, &mut memory.clone());
        assert!(matches!(refused, Err(Error::StateShape { .. })));
        assert_eq!(wrong, before);
    }
    gradients_that_do_not_fit(&infini, &good, &memory);
}

fn gradients_that_do_not_fit(infini: &Infini, good: &Tokens<'_, f32>, memory: &State) {
    let (q, k) = (good.q.shape(), good.k.shape());
    let upstream = Upstream { d_out: good.q, initial: memory };
    let run = |gates: usize, turned: bool, tokens: &Tokens<'_, f32>| {
        let [mut d_q, mut d_k, mut d_v] = [q, k, k].map(|shape| Tensor::zeros(shape).unwrap());
        let [mut turned_q, mut turned_k] = [q, k].map(|shape| Tensor::zeros(shape).unwrap());
        let mut d_gate = vec![9.0; gates];
        let to = Gradients {
            d_q: d_q.view_mut(),
            d_k: d_k.view_mut(),
            d_v: d_v.view_mut(),
            d_gate: &mut d_gate,
            d_rotated: turned.then(|| (turned_q.view_mut(), turned_k.view_mut())),
        };
        let mut workspace = Workspace::new();
        let result =
            infini.backward_into(tokens, upstream, to, &mut memory.clone(), &mut workspace);
        assert!(
            result.is_ok() || d_gate.iter().all(|&x| x == 9.0),
            "written before it was refused"
        );
        result
    };
    assert!(run(4, false, good).is_ok());
    assert!(matches!(run(3, false, good), Err(Error::LengthMismatch { .. })));
    assert!(matches!(run(4, true, good), Err(Error::InvalidParameter { .. })));
    let rotated = good.rotated(good.q, good.k);
    assert!(matches!(run(4, false, &rotated), Err(Error::InvalidParameter { .. })));
    assert!(run(4, true, &rotated).is_ok());
}

#[test]
fn a_state_refuses_what_it_was_not_made_for() {
    let shape = StateHeads { heads: 4, kv_heads: 2, key_dim: 8, value_dim: 8 };
    let infini = Infini::new(4).unwrap();
    let mut state: InfiniState<f32> = infini.state(shape, false).unwrap();
    let odd = StateHeads { heads: 3, ..shape };
    assert!(matches!(infini.state::<f32>(odd, false), Err(Error::HeadGrouping { .. })));
    let huge = Infini::new(usize::MAX).unwrap();
    assert!(matches!(huge.state::<f32>(shape, false), Err(Error::ShapeOverflow { .. })));
    let q = Tensor::<f32>::zeros(Shape { batch: 1, seq: 65, heads: 4, dim: 8 }).unwrap();
    let k = Tensor::<f32>::zeros(Shape { batch: 1, seq: 65, heads: 2, dim: 8 }).unwrap();
    let (q, k) = (q.view(), k.view());
    let tokens = Tokens::new(q, k, k, &[0.0; 4]);
    let refused = state.forward(&tokens, Phase::Generated);
    assert!(matches!(refused, Err(Error::TooManyRows { got: 65, .. })));
    let refused = state.forward(&tokens.rotated(q, k), Phase::Prompt);
    assert!(matches!(refused, Err(Error::InvalidParameter { .. })));
    let refused = state.forward(&Tokens::new(k, k, k, &[0.0; 2]), Phase::Prompt);
    assert!(matches!(refused, Err(Error::ShapeMismatch { .. })));
    assert_eq!((state.tokens(), state.open()), (0, 0));
    assert!(state.forward(&tokens, Phase::Prompt).is_ok());
}
