//! Prompts that states read as a whole: near to whole sequences, the same bits however they are cut into calls, and a
//! state behind them that is the one of tokens read one by one.

mod support;

use foveal::plan::Inputs;
use foveal::sparse::{
    Branches, Combine, Factors, Moba, NativeSizes, NativeSparse, SparseTransformer, StateHeads,
    SubBlocks, Window,
};
use foveal::{Cpu, Error, Forward, Level, Shape, Tensor, TensorRef, Threads};
use std::ops::Range;
use support::backward::Call;
use support::cpus;
use support::sizes::Sizes;

fn one() -> Cpu {
    Cpu { level: Level::detect().unwrap(), threads: Threads::ONE }
}

fn heads(call: &Call<f32>) -> StateHeads {
    let [q, k, v] = [&call.q, &call.k, &call.v].map(Tensor::shape);
    StateHeads { heads: q.heads, kv_heads: k.heads, key_dim: k.dim, value_dim: v.dim }
}

fn call(tokens: usize, heads: usize, kv_heads: usize, dim: usize) -> Call<f32> {
    let sizes =
        Sizes { batch: 1, queries: tokens, keys: tokens, heads, kv_heads, dim, value_dim: dim + 1 };
    Call { d_lse: None, ..Call::random(sizes, tokens as u64) }
}

fn of(call: &Call<f32>, range: Range<usize>) -> Inputs<'_, f32, f32> {
    let rows = |x| support::tokens(x, range.clone());
    Inputs { q: rows(&call.q), k: rows(&call.k), v: rows(&call.v) }
}

/// A sequence's output and log-sum-exp, token by token.
type Rows = Vec<(Vec<f32>, Vec<f32>)>;

fn push(rows: &mut Rows, forward: &Forward<f32>) {
    for t in 0..forward.out.shape().seq {
        let all = |x: &Tensor<f32>| {
            (0..x.shape().heads).flat_map(|h| x.view().row(0, t, h).to_vec()).collect()
        };
        rows.push((all(&forward.out), all(&forward.lse)));
    }
}

fn near(a: &Rows, b: &Rows, what: &str) {
    assert_eq!(a.len(), b.len());
    for (t, (a, b)) in a.iter().zip(b).enumerate() {
        for (a, b) in [(&a.0, &b.0), (&a.1, &b.1)] {
            for (a, b) in a.iter().zip(b) {
                assert!(a == b || (a - b).abs() < 1e-5, "{what}, token {t}: {a} {b}");
            }
        }
    }
}

/// The ranges of a text that is cut at multiples of a length.
fn cuts(tokens: usize, step: usize) -> impl Iterator<Item = Range<usize>> {
    (0..tokens).step_by(step).map(move |start| start..(start + step).min(tokens))
}

const COMBINES: [Combine; 4] = [
    Combine::Merged,
    Combine::PerHead,
    Combine::Interleaved { layer: 0 },
    Combine::Interleaved { layer: 1 },
];

fn check_transformer(layer: SparseTransformer, call: &Call<f32>, steps: &[usize], what: &str) {
    let tokens = call.q.shape().seq;
    let mut expected = vec![];
    push(&mut expected, &layer.forward(of(call, 0..tokens)).unwrap());
    let mut first: Option<Rows> = None;
    for &step in steps {
        let mut state = layer.state(heads(call)).unwrap();
        let mut single = layer.state(heads(call)).unwrap();
        let mut got = vec![];
        for range in cuts(tokens, step) {
            push(&mut got, &state.prompt(of(call, range.clone())).unwrap());
            let Inputs { k, v, .. } = of(call, range.clone());
            single.append(k, v).unwrap();
            assert_eq!(
                (state.tokens(), state.entries()),
                (single.tokens(), single.entries()),
                "{what}, {range:?}"
            );
            // What is generated behind it finds the same keys.
            let q = of(call, range.end - 1..range.end).q;
            assert_eq!(state.attend(q).unwrap(), single.attend(q).unwrap(), "{what}, {range:?}");
        }
        near(&got, &expected, what);
        assert!(got == *first.get_or_insert_with(|| got.clone()), "{what}, {step}");
    }
}

#[test]
fn the_sparse_transformer_reads_prompts_as_a_whole() {
    let fixed = |stride, summary, sub_blocks| Factors::Fixed { stride, summary, sub_blocks };
    let strided = |stride, window| Factors::Strided { stride, window };
    let factors = [
        strided(1, Window::Paper),
        strided(5, Window::Paper),
        strided(6, Window::Code),
        strided(1 << 40, Window::Code),
        fixed(1, 1, SubBlocks::Same(0)),
        fixed(5, 2, SubBlocks::Same(1)),
        fixed(7, 2, SubBlocks::Cycle(3)),
        fixed(6, 6, SubBlocks::Same(0)),
        fixed(1 << 40, 1, SubBlocks::Cycle(2)),
    ];
    for factors in factors {
        for combine in COMBINES {
            let layer = SparseTransformer::new(factors).unwrap().combine(combine).cpu(one());
            for (heads, kv_heads) in [(1, 1), (6, 2)] {
                let what = format!("{factors:?} {combine:?} {heads}/{kv_heads}");
                check_transformer(layer, &call(40, heads, kv_heads, 3), &[40, 1, 7, 6], &what);
            }
        }
    }
}

#[test]
fn long_prompts_have_the_same_bits_on_every_level() {
    for factors in [
        Factors::Strided { stride: 37, window: Window::Paper },
        Factors::Strided { stride: 2, window: Window::Code },
        Factors::Fixed { stride: 300, summary: 70, sub_blocks: SubBlocks::Cycle(2) },
        Factors::Fixed { stride: 9, summary: 4, sub_blocks: SubBlocks::Same(0) },
    ] {
        for combine in COMBINES {
            for cpu in cpus() {
                let layer = SparseTransformer::new(factors).unwrap().combine(combine).cpu(cpu);
                let what = format!("{factors:?} {combine:?} {}", cpu.level);
                check_transformer(layer, &call(900, 2, 1, 8), &[900, 512, 131], &what);
            }
        }
    }
}

#[test]
fn moba_reads_prompts_as_a_whole() {
    for (tokens, block, top) in [(40, 1, 3), (40, 4, 1), (40, 7, 3), (900, 40, 4), (900, 300, 2)] {
        for cpu in cpus() {
            let call = call(tokens, 4, 2, 6);
            let layer = Moba::new(block, top).unwrap().cpu(cpu);
            let choices = layer.choose(call.q.view(), call.k.view()).unwrap();
            let mut expected = vec![];
            push(&mut expected, &layer.forward(of(&call, 0..tokens), &choices).unwrap());
            let mut first: Option<Rows> = None;
            for step in [900, 512, 131, 7, 1].into_iter().filter(|&step| step * 60 > tokens) {
                let mut state = layer.state(heads(&call)).unwrap();
                let mut got = vec![];
                for range in cuts(tokens, step) {
                    push(&mut got, &state.prompt(of(&call, range)).unwrap());
                }
                assert_eq!(state.tokens(), tokens);
                near(&got, &expected, &format!("blocks of {block}"));
                assert!(got == *first.get_or_insert_with(|| got.clone()), "{block}, {step}");
            }
        }
    }
}

/// Tokens from one on, and the compressed ones that they bring.
fn native<'a>(
    layer: &NativeSparse,
    call: &'a Call<f32>,
    compressed: &'a [Tensor<f32>; 2],
    range: Range<usize>,
) -> Branches<Inputs<'a, f32, f32>> {
    let own = of(call, range.clone());
    let whole = [range.start, range.end].map(|end| layer.compressed_tokens(end));
    let [k, v] = compressed.each_ref().map(|x| support::tokens(x, whole[0]..whole[1]));
    Branches { compressed: Inputs { k, v, ..own }, selected: own, window: own }
}

#[test]
fn native_sparse_attention_reads_prompts_as_a_whole() {
    for (tokens, [length, stride, block, top, window]) in [
        (40, [1, 1, 1, 3, 1]),
        (40, [4, 2, 4, 4, 7]),
        (40, [6, 3, 3, 5, 100]),
        (900, [16, 8, 16, 5, 70]),
        (900, [32, 32, 64, 4, 300]),
    ] {
        for cpu in cpus() {
            let call = call(tokens, 4, 2, 6);
            let sizes = NativeSizes { length, stride, block, top, window };
            let layer = NativeSparse::new(sizes).unwrap().cpu(cpu);
            let compressed = [&call.k, &call.v].map(|x| layer.pool(x.view()).unwrap());
            let shape = Shape { dim: 3, ..call.q.shape() };
            let gates: Tensor<f32> = support::Random::new(5).tensor(shape, 1.0);
            let all = native(&layer, &call, &compressed, 0..tokens);
            let expected = layer.forward(all, gates.view()).unwrap();
            let mut first = None;
            for step in [900, 512, 131, 7, 1].into_iter().filter(|&step| step * 60 > tokens) {
                let mut state = layer.state(heads(&call)).unwrap();
                let mut got = vec![];
                for range in cuts(tokens, step) {
                    let own = native(&layer, &call, &compressed, range.clone());
                    let given = state.prompt(own, support::tokens(&gates, range.clone())).unwrap();
                    for (at, t) in range.enumerate() {
                        for kv in 0..2 {
                            let own = given.choices.of(0, kv, at);
                            assert!(own.eq(expected.choices.of(0, kv, t)), "{sizes:?}, token {t}");
                        }
                        for h in 0..4 {
                            got.extend_from_slice(given.out.view().row(0, at, h));
                        }
                    }
                }
                let worst = got.iter().zip(expected.out.as_slice()).map(|(a, b)| (a - b).abs());
                assert!(worst.fold(0.0, f32::max) < 1e-5, "{sizes:?}");
                assert!(got == *first.get_or_insert_with(|| got.clone()), "{sizes:?}, {step}");
            }
        }
    }
}

#[test]
fn prompts_that_do_not_fit_are_refused_and_leave_the_state_alone() {
    let (fits, other) = (call(9, 2, 2, 3), call(8, 2, 2, 3));
    let mixed = Inputs { q: other.q.view(), ..of(&fits, 0..9) };
    let mut transformer = SparseTransformer::fixed(4, 1).unwrap().state(heads(&fits)).unwrap();
    let mut moba = Moba::new(4, 2).unwrap().state(heads(&fits)).unwrap();
    let layer = NativeSparse::new(NativeSizes::default()).unwrap();
    let mut native = layer.state(heads(&fits)).unwrap();
    let nothing: TensorRef<'_, f32> = support::tokens(&fits.k, 0..0);
    let values: TensorRef<'_, f32> = support::tokens(&fits.v, 0..0);
    let own = of(&fits, 0..9);
    let compressed = Inputs { k: nothing, v: values, ..own };
    let gates = Tensor::zeros(Shape { dim: 3, ..fits.q.shape() }).unwrap();
    let few = support::tokens(&gates, 0..8);
    let all = Branches { compressed, selected: own, window: own };
    let refused = [
        transformer.prompt(mixed).map(|_| ()),
        moba.prompt(mixed).map(|_| ()),
        native.prompt(Branches { window: mixed, ..all }, gates.view()).map(|_| ()),
        native.prompt(Branches { compressed: own, ..all }, gates.view()).map(|_| ()),
        native.prompt(all, few).map(|_| ()),
    ];
    assert!(refused.iter().all(|x| matches!(x, Err(Error::ShapeMismatch { .. }))), "{refused:?}");
    assert_eq!((transformer.tokens(), moba.tokens(), native.tokens()), (0, 0, 0));
}
