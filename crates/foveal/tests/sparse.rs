//! The Sparse Transformer against the definition under a dense mask: all small sizes, all ways to combine, all
//! levels; what results may not depend on; what is refused.

mod support;

use foveal::mask::{Pattern, Site};
use foveal::plan::Backward;
use foveal::sparse::{Combine, Factors, SparseTransformer, StateHeads, SubBlocks, Window};
use foveal::{Cpu, Element, Error, Forward, Level, Scale, Shape, Tensor, Threads};
use half::bf16;
use std::num::NonZeroUsize;
use support::backward::Call;
use support::cpus;
use support::sizes::Sizes;
use support::sparse::{assert_like, dense, inputs, run, sees, worst_error};

const COMBINES: [Combine; 4] = [
    Combine::Merged,
    Combine::PerHead,
    Combine::Interleaved { layer: 0 },
    Combine::Interleaved { layer: 1 },
];

/// All patterns with strides up to `most`.
fn factors(most: usize) -> Vec<Factors> {
    let mut all = vec![];
    for stride in 1..=most {
        all.extend([Window::Paper, Window::Code].map(|window| Factors::Strided { stride, window }));
        for summary in 1..=stride {
            let fit = stride / summary;
            let same = (0..fit).map(SubBlocks::Same);
            for sub_blocks in same.chain((2..=fit.min(3)).map(SubBlocks::Cycle)) {
                all.push(Factors::Fixed { stride, summary, sub_blocks });
            }
        }
    }
    all
}

fn layers(most: usize) -> impl Iterator<Item = (SparseTransformer, Factors, Combine)> {
    factors(most).into_iter().flat_map(|factors| {
        COMBINES.map(|combine| {
            (SparseTransformer::new(factors).unwrap().combine(combine), factors, combine)
        })
    })
}

fn one() -> Cpu {
    Cpu { level: Level::detect().unwrap(), threads: Threads::ONE }
}

fn sizes(queries: usize, keys: usize, heads: usize, kv_heads: usize) -> Sizes {
    Sizes { batch: 1, queries, keys, heads, kv_heads, dim: 3, value_dim: 2 }
}

#[test]
fn the_mask_is_the_published_index_sets() {
    for (layer, factors, combine) in layers(8) {
        for (i, j, q_head) in
            (0..30).flat_map(|i| (0..30).flat_map(move |j| (0..4).map(move |h| (i, j, h))))
        {
            let site = Site { batch: 0, q_head, kv_head: 0 };
            let expected = j <= i && sees(factors, combine, q_head, i, j);
            let got = layer.mask().allows(site, i as isize, j);
            assert_eq!(got, expected, "{factors:?} {combine:?} head {q_head}: {i} {j}");
        }
    }
}

#[test]
fn every_small_size_agrees_with_the_dense_mask() {
    for (layer, factors, combine) in layers(7) {
        let layer = layer.cpu(one());
        for n in 0..=40 {
            let call = Call { d_lse: None, ..Call::<f32>::random(sizes(n, n, 2, 2), n as u64) };
            let mask = dense([2, n, n], |head, i, j| sees(factors, combine, head, i, j));
            let worst = worst_error(&run(&layer, &call), &call, &mask);
            assert!(worst < 3e-6, "{factors:?} {combine:?}, {n} tokens: {worst:e}");
        }
    }
}

#[test]
fn other_numbers_of_queries_than_keys_and_grouped_heads_agree_with_the_dense_mask() {
    for (layer, factors, combine) in layers(5) {
        for (n, [queries, keys]) in
            [[1, 19], [5, 18], [7, 26], [13, 14], [9, 4], [3, 0], [0, 5]].into_iter().enumerate()
        {
            for (heads, kv_heads) in [(6, 2), (3, 1)] {
                let sizes = Sizes { batch: 2, ..sizes(queries, keys, heads, kv_heads) };
                let call = Call { d_lse: None, ..Call::<f32>::random(sizes, n as u64) };
                let mask = dense([heads, queries, keys], |h, i, j| sees(factors, combine, h, i, j));
                let worst = worst_error(&run(&layer.cpu(one()), &call), &call, &mask);
                assert!(worst < 3e-6, "{factors:?} {combine:?}, {sizes:?}: {worst:e}");
            }
        }
    }
}

/// Patterns over several tiles.
fn large() -> impl Iterator<Item = (SparseTransformer, Factors, Combine)> {
    let fixed = |sub_blocks| Factors::Fixed { stride: 37, summary: 5, sub_blocks };
    let factors = [
        Factors::Strided { stride: 37, window: Window::Paper },
        Factors::Strided { stride: 64, window: Window::Code },
        fixed(SubBlocks::Same(1)),
        fixed(SubBlocks::Cycle(3)),
    ];
    let with = |factors| {
        COMBINES.map(|combine| {
            (SparseTransformer::new(factors).unwrap().combine(combine), factors, combine)
        })
    };
    factors.into_iter().flat_map(with)
}

const LARGE: Sizes =
    Sizes { batch: 2, queries: 531, keys: 700, heads: 4, kv_heads: 2, dim: 20, value_dim: 24 };

#[test]
fn every_level_agrees_with_the_dense_mask_over_several_tiles() {
    for (layer, factors, combine) in large() {
        let Sizes { queries, keys, heads, .. } = LARGE;
        let call = Call { d_lse: None, ..Call::<f32>::random(LARGE, 5) };
        let mask = dense([heads, queries, keys], |h, i, j| sees(factors, combine, h, i, j));
        for cpu in cpus() {
            let worst = worst_error(&run(&layer.cpu(cpu), &call), &call, &mask);
            assert!(worst < 5e-6, "{factors:?} {combine:?} {}: {worst:e}", cpu.level);
        }
    }
}

#[test]
fn sixteen_bits_are_rounded_and_no_more() {
    for (layer, factors, combine) in large() {
        let Sizes { queries, keys, heads, .. } = LARGE;
        let call = Call { d_lse: None, ..Call::<bf16>::random(LARGE, 6) };
        let mask = dense([heads, queries, keys], |h, i, j| sees(factors, combine, h, i, j));
        for cpu in cpus() {
            let worst = worst_error(&run(&layer.cpu(cpu), &call), &call, &mask);
            assert!(worst < 1e-2, "{factors:?} {combine:?} {}: {worst:e}", cpu.level);
        }
    }
}

#[test]
fn many_thousand_tokens_gathered_by_and_by_agree_with_the_mask() {
    let fixed = |sub_blocks| Factors::Fixed { stride: 70, summary: 3, sub_blocks };
    for (factors, layer) in [
        (Factors::Strided { stride: 70, window: Window::Paper }, 0),
        (Factors::Strided { stride: 70, window: Window::Paper }, 1),
        (fixed(SubBlocks::Same(0)), 0),
        (fixed(SubBlocks::Same(1)), 1),
    ] {
        let mut sparse = SparseTransformer::new(factors).unwrap().cpu(one());
        if layer == 1 {
            sparse = sparse.combine(Combine::Interleaved { layer });
        }
        let call = Call { d_lse: None, ..Call::<f32>::random(sizes(9000, 9100, 1, 1), 12) };
        let exact = foveal::Attention::new().mask(sparse.mask()).cpu(one());
        assert_like(&run(&sparse, &call), &call, &exact, &format!("{factors:?} {layer}"));
    }
}

fn bits<E: Element>((forward, backward): &(Forward<E>, Backward<E>)) -> Vec<u32> {
    let all = [&forward.out, &backward.d_q, &backward.d_k, &backward.d_v];
    let numbers = all.into_iter().flat_map(|x| x.as_slice().iter().map(|x| x.to_f32().to_bits()));
    numbers.chain(forward.lse.as_slice().iter().map(|x| x.to_bits())).collect()
}

#[test]
fn bits_do_not_depend_on_threads() {
    for (layer, factors, combine) in large() {
        let call = Call { d_lse: None, ..Call::<f32>::random(LARGE, 7) };
        let with = |threads| {
            let threads = Threads::at_most(NonZeroUsize::new(threads).unwrap());
            bits(&run(&layer.cpu(Cpu { threads, ..one() }), &call))
        };
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        let first = with(1);
        for threads in [2, 3] {
            let got = pool.install(|| with(threads));
            assert!(got == first, "{factors:?} {combine:?}: {threads} threads");
        }
    }
}

/// A tensor whose tokens from `from` on are others.
fn changed(x: &Tensor<f32>, from: usize, add: f32) -> Tensor<f32> {
    let Shape { seq, heads, dim, .. } = x.shape();
    let mut data = x.as_slice().to_vec();
    for sequence in data.chunks_mut(seq * heads * dim) {
        sequence[from * heads * dim..].iter_mut().for_each(|x| *x += add);
    }
    Tensor::from_vec(data, x.shape()).unwrap()
}

#[test]
fn later_tokens_change_no_bit_of_earlier_rows() {
    for (layer, factors, combine) in large() {
        let layer = layer.cpu(one());
        let square = Sizes { queries: 300, keys: 300, ..LARGE };
        let call = Call::<f32>::random(square, 8);
        let before = layer.forward(inputs(&call)).unwrap();
        for (from, add) in [(1, 3.0), (150, -1.0), (185, f32::NAN), (299, f32::INFINITY)] {
            let other = Call {
                q: changed(&call.q, from, add),
                k: changed(&call.k, from, add),
                v: changed(&call.v, from, add),
                ..call.clone()
            };
            let after = layer.forward(inputs(&other)).unwrap();
            for (batch, t, head) in
                (0..2).flat_map(|b| (0..from).flat_map(move |t| (0..4).map(move |h| (b, t, h))))
            {
                let row = |x: &Forward<f32>| {
                    let out = x.out.view().row(batch, t, head).iter().map(|x| x.to_bits());
                    out.chain([x.lse.view().row(batch, t, head)[0].to_bits()]).collect::<Vec<_>>()
                };
                assert_eq!(row(&after), row(&before), "{factors:?} {combine:?} {from}: {t}");
            }
        }
    }
}

#[test]
fn gradients_are_the_slopes_of_the_loss() {
    for (layer, factors, combine) in layers(4).filter(|(_, _, combine)| *combine != COMBINES[2]) {
        let layer = layer.cpu(one()).scale(Scale::Value(0.7));
        let call = Call { d_lse: None, ..Call::<f32>::random(sizes(11, 13, 2, 1), 3) };
        let (_, backward) = run(&layer, &call);
        let loss = |call: &Call<f32>| -> f64 {
            let out = layer.forward(inputs(call)).unwrap().out;
            let products = out.as_slice().iter().zip(call.d_out.as_slice());
            products.map(|(&x, &d)| f64::from(x) * f64::from(d)).sum()
        };
        let gradients = [&backward.d_q, &backward.d_k, &backward.d_v];
        for (which, gradient) in gradients.into_iter().enumerate() {
            // Along a direction of ±1, so that one difference looks at all numbers.
            for seed in 0..3 {
                let mut random = support::Random::new(seed);
                let signs: Vec<f32> = gradient
                    .as_slice()
                    .iter()
                    .map(|_| if random.below(2) == 0 { 1.0 } else { -1.0 })
                    .collect();
                let step = 1.0 / 128.0;
                let moved = |by: f32| {
                    let mut call = call.clone();
                    let x = [&mut call.q, &mut call.k, &mut call.v].into_iter().nth(which).unwrap();
                    let data = x.as_slice().iter().zip(&signs).map(|(x, s)| x + s * by).collect();
                    *x = Tensor::from_vec(data, x.shape()).unwrap();
                    loss(&call)
                };
                // Both differences together cancel the third derivative.
                let slope = |h: f32| (moved(h) - moved(-h)) / (2.0 * f64::from(h));
                let slope = (4.0 * slope(step) - slope(2.0 * step)) / 3.0;
                let along = gradient.as_slice().iter().zip(&signs);
                let expected: f64 = along.map(|(&d, &s)| f64::from(d * s)).sum();
                let bound = 2e-3 * (1.0 + expected.abs());
                assert!(
                    (slope - expected).abs() < bound,
                    "{factors:?} {combine:?} input {which}: {slope} is not {expected}"
                );
            }
        }
    }
}

#[test]
fn bad_parameters_are_refused_with_the_rule() {
    let fixed = |stride, summary, sub_blocks| {
        SparseTransformer::new(Factors::Fixed { stride, summary, sub_blocks })
    };
    let refusals = [
        (SparseTransformer::strided(0), "at least 1"),
        (SparseTransformer::fixed(0, 1), "at least 1"),
        (SparseTransformer::fixed(8, 0), "1 to the stride"),
        (SparseTransformer::fixed(8, 9), "1 to the stride"),
        (fixed(8, 3, SubBlocks::Same(2)), "less than l / c"),
        (fixed(8, 3, SubBlocks::Cycle(3)), "1 to l / c"),
        (fixed(8, 3, SubBlocks::Cycle(0)), "1 to l / c"),
        (fixed(8, 1, SubBlocks::Same(usize::MAX)), "less than l / c"),
    ];
    for (refusal, rule) in refusals {
        let error = refusal.unwrap_err();
        assert!(matches!(error, Error::InvalidParameter { .. }));
        assert!(error.to_string().contains(rule), "{error}");
    }
}

#[test]
fn huge_strides_are_no_trouble() {
    for stride in [usize::MAX, usize::MAX / 2, 1 << 40] {
        for factors in [
            Factors::Strided { stride, window: Window::Paper },
            Factors::Strided { stride, window: Window::Code },
            Factors::Fixed { stride, summary: stride, sub_blocks: SubBlocks::Same(0) },
            Factors::Fixed { stride, summary: 1, sub_blocks: SubBlocks::Same(stride - 1) },
            Factors::Fixed { stride, summary: 1, sub_blocks: SubBlocks::Cycle(2) },
        ] {
            for combine in COMBINES {
                let layer = SparseTransformer::new(factors).unwrap().combine(combine).cpu(one());
                for [queries, keys] in [[9, 9], [3, 9], [9, 3]] {
                    let call =
                        Call { d_lse: None, ..Call::<f32>::random(sizes(queries, keys, 2, 2), 1) };
                    let mask = dense([2, queries, keys], |h, i, j| sees(factors, combine, h, i, j));
                    let worst = worst_error(&run(&layer, &call), &call, &mask);
                    assert!(worst < 3e-6, "{factors:?} {combine:?}: {worst:e}");
                }
            }
        }
    }
}

#[test]
fn shapes_that_do_not_fit_are_refused() {
    let layer = SparseTransformer::strided(3).unwrap();
    let call = Call::<f32>::random(sizes(9, 9, 2, 2), 1);
    let other = Call::<f32>::random(sizes(9, 8, 2, 2), 1);
    let mixed = foveal::plan::Inputs { v: other.v.view(), ..inputs(&call) };
    assert!(matches!(layer.forward(mixed), Err(Error::ShapeMismatch { .. })));
    let forward = layer.forward(inputs(&call)).unwrap();
    let short = Call::<f32>::random(sizes(8, 9, 2, 2), 1);
    let refused = layer.backward(inputs(&call), &forward, short.d_out.view());
    assert!(matches!(refused, Err(Error::ShapeMismatch { .. })));
    let forward = layer.forward(inputs(&short)).unwrap();
    let refused = layer.backward(inputs(&call), &forward, call.d_out.view());
    assert!(matches!(refused, Err(Error::ShapeMismatch { .. })));
}

/// Rows of a tensor of one sequence.
fn rows(x: &Tensor<f32>, range: std::ops::Range<usize>) -> foveal::TensorRef<'_, f32> {
    support::tokens(x, range)
}

/// Entries that a state holds for its newest token, from what it is said to hold.
fn held(factors: Factors, combine: Combine, heads: usize, tokens: usize) -> usize {
    let newest = tokens - 1;
    let seen = |token: usize| {
        (0..heads).any(|head| {
            // Some query from the newest on sees it.
            let stride = match factors {
                Factors::Strided { stride, .. } | Factors::Fixed { stride, .. } => stride,
            };
            (newest..newest + 2 * stride + 2).any(|i| sees(factors, combine, head, i, token))
        })
    };
    (0..tokens).filter(|&token| seen(token)).count()
}

#[test]
fn tokens_made_one_by_one_agree_with_the_prompt_and_only_what_is_needed_is_held() {
    for (layer, factors, combine) in layers(6) {
        let layer = layer.cpu(one());
        for (heads, kv_heads, prompt) in [(1, 1, 0), (2, 2, 1), (6, 2, 6), (2, 1, 17)] {
            let tokens = 40;
            let call = Call::<f32>::random(sizes(tokens, tokens, heads, kv_heads), 9);
            let expected = layer.forward(inputs(&call)).unwrap();
            let shape = StateHeads { heads, kv_heads, key_dim: 3, value_dim: 2 };
            let mut state = layer.state(shape).unwrap();
            state.append(rows(&call.k, 0..prompt), rows(&call.v, 0..prompt)).unwrap();
            for t in prompt..tokens {
                let own = t..t + 1;
                state.append(rows(&call.k, own.clone()), rows(&call.v, own.clone())).unwrap();
                let got = state.attend(rows(&call.q, own)).unwrap();
                let what = format!("{factors:?} {combine:?} {heads}/{kv_heads}, token {t}");
                for h in 0..heads {
                    let (got_lse, lse) =
                        (got.lse.view().row(0, 0, h)[0], expected.lse.view().row(0, t, h)[0]);
                    assert!(
                        got_lse == lse || (got_lse - lse).abs() < 1e-5,
                        "{what}: {got_lse} {lse}"
                    );
                    let pair = [got.out.view().row(0, 0, h), expected.out.view().row(0, t, h)];
                    for (a, b) in pair[0].iter().zip(pair[1]) {
                        assert!((a - b).abs() < 1e-5, "{what}: {a} {b}");
                    }
                }
                assert_eq!(state.tokens(), t + 1);
                assert_eq!(state.entries(), held(factors, combine, heads, t + 1), "{what}");
            }
        }
    }
}

#[test]
fn a_fixed_state_holds_a_block_and_its_summaries() {
    let layer = SparseTransformer::fixed(16, 3).unwrap().cpu(one());
    let shape = StateHeads { heads: 2, kv_heads: 1, key_dim: 3, value_dim: 2 };
    let call = Call::<f32>::random(sizes(200, 200, 2, 1), 4);
    let mut state = layer.state(shape).unwrap();
    for t in 0..200 {
        state.append(rows(&call.k, t..t + 1), rows(&call.v, t..t + 1)).unwrap();
        assert_eq!(state.entries(), 3 * (t / 16) + t % 16 + 1);
        assert!(state.entries() <= 16 + 3 * (t / 16));
    }
    state.clear();
    assert_eq!((state.tokens(), state.entries()), (0, 0));
}

#[test]
fn a_state_has_the_same_bits_however_tokens_were_appended() {
    for (layer, factors, combine) in large() {
        for cpu in cpus() {
            let layer = layer.cpu(cpu);
            let shape = StateHeads { heads: 4, kv_heads: 2, key_dim: 20, value_dim: 24 };
            let square = Sizes { batch: 1, queries: 300, keys: 300, ..LARGE };
            let call = Call::<f32>::random(square, 10);
            let mut answers = vec![];
            for step in [1, 7, 300] {
                let mut state = layer.state(shape).unwrap();
                for start in (0..300).step_by(step) {
                    let own = start..(start + step).min(300);
                    state.append(rows(&call.k, own.clone()), rows(&call.v, own)).unwrap();
                }
                let got = state.attend(rows(&call.q, 299..300)).unwrap();
                let bits = |x: &Tensor<f32>| -> Vec<u32> {
                    x.as_slice().iter().map(|x| x.to_bits()).collect()
                };
                answers.push((bits(&got.out), bits(&got.lse)));
            }
            assert!(answers.windows(2).all(|x| x[0] == x[1]), "{factors:?} {combine:?}");
        }
    }
}

#[test]
fn a_state_refuses_other_shapes_and_stays_as_it_was() {
    let layer = SparseTransformer::strided(3).unwrap();
    let shape = StateHeads { heads: 2, kv_heads: 2, key_dim: 3, value_dim: 2 };
    let mut state = layer.state(shape).unwrap();
    let call = Call::<f32>::random(sizes(4, 4, 2, 2), 1);
    let one_head = Call::<f32>::random(sizes(4, 4, 1, 1), 1);
    let refused = [
        state.append(one_head.k.view(), one_head.v.view()),
        state.append(call.k.view(), one_head.v.view()),
        state.attend(call.q.view()).map(|_| ()),
    ];
    assert!(refused.iter().all(|x| matches!(x, Err(Error::ShapeMismatch { .. }))), "{refused:?}");
    assert_eq!((state.tokens(), state.entries()), (0, 0));
    let nothing = state.attend(rows(&call.q, 0..1)).unwrap();
    assert!(nothing.out.as_slice().iter().all(|&x| x == 0.0));
    assert!(nothing.lse.as_slice().iter().all(|&x| x == f32::NEG_INFINITY));
    let uneven = StateHeads { heads: 3, ..shape };
    assert!(matches!(layer.state::<f32>(uneven), Err(Error::HeadGrouping { .. })));
}
