//! MoBA against the definition under the mask of its choices, and its choices against a search in f64.

mod support;

use foveal::mask::{Dense, Extent, Pattern, Site};
use foveal::plan::{Backward, Inputs};
use foveal::reference::{Input, attention};
use foveal::sparse::{BlockChoices, Moba, StateHeads};
use foveal::{Attention, Cpu, Error, Forward, Level, Mask, Scale, Shape, Tensor, Threads};
use std::num::NonZeroUsize;
use support::attention::shape;
use support::backward::Call;
use support::golden::cases;
use support::sizes::Sizes;
use support::sparse::{inputs, wide, worst_error};
use support::{cpus, differences};

fn one() -> Cpu {
    Cpu { level: Level::detect().unwrap(), threads: Threads::ONE }
}

fn sizes(batch: usize, [queries, keys]: [usize; 2], [heads, kv_heads]: [usize; 2]) -> Sizes {
    Sizes { batch, queries, keys, heads, kv_heads, dim: 6, value_dim: 4 }
}

fn run(layer: &Moba, call: &Call<f32>, choices: &BlockChoices) -> (Forward<f32>, Backward<f32>) {
    let forward = layer.forward(inputs(call), choices).unwrap();
    let backward = layer.backward(inputs(call), choices, &forward, call.d_out.view()).unwrap();
    (forward, backward)
}

/// The pairs that choices allow.
fn mask(call: &Call<f32>, choices: &BlockChoices, block: usize) -> Mask {
    let (q, keys) = (call.q.shape(), call.k.shape().seq);
    let mut visible = vec![];
    for (b, head) in (0..q.batch).flat_map(|b| (0..q.heads).map(move |h| (b, h))) {
        for row in 0..q.seq {
            let position = (row + keys).checked_sub(q.seq);
            let chosen: Vec<usize> = choices.of(b, head, row).collect();
            visible.extend((0..keys).map(|j| {
                position.is_some_and(|i| {
                    j <= i && (i / block == j / block || chosen.contains(&(j / block)))
                })
            }));
        }
    }
    let extent = Extent { batch: q.batch, heads: q.heads, queries: q.seq, keys };
    Dense::new(&visible, extent).unwrap().into()
}

#[test]
fn every_small_size_agrees_with_the_definition() {
    for (block, top) in [1, 2, 3, 5, 9].into_iter().flat_map(|b| [(b, 1), (b, 2), (b, 4)]) {
        let layer = Moba::new(block, top).unwrap().cpu(one());
        for lengths in (0..=40).map(|n| [n, n]).chain([[1, 17], [5, 23], [9, 4], [3, 0]]) {
            for heads in [[2, 2], [4, 2]] {
                let call = Call { d_lse: None, ..Call::random(sizes(2, lengths, heads), 1) };
                let choices = layer.choose(call.q.view(), call.k.view()).unwrap();
                let got = run(&layer, &call, &choices);
                let worst = worst_error(&got, &call, &mask(&call, &choices, block));
                assert!(worst < 5e-6, "{block} {top} {lengths:?} {heads:?}: {worst:e}");
            }
        }
    }
}

#[test]
fn the_mask_is_the_pairs_of_the_definition() {
    for lengths in [[30, 30], [7, 33], [9, 4]] {
        let call = Call::<f32>::random(sizes(2, lengths, [4, 2]), 5);
        let layer = Moba::new(4, 3).unwrap().cpu(one());
        let choices = layer.choose(call.q.view(), call.k.view()).unwrap();
        let (got, expected) = (layer.mask(&choices, lengths[1]), mask(&call, &choices, 4));
        for (batch, q_head) in (0..2).flat_map(|b| (0..4).map(move |h| (b, h))) {
            let site = Site { batch, q_head, kv_head: q_head / 2 };
            for (row, j) in (0..lengths[0]).flat_map(|i| (0..lengths[1]).map(move |j| (i, j))) {
                let i = row as isize + lengths[1] as isize - lengths[0] as isize;
                assert_eq!(got.allows(site, i, j), expected.allows(site, i, j), "{site:?} {i} {j}");
            }
        }
        let attend = |call: &Call<f32>| {
            let attention = Attention::new().mask(got.clone());
            attention.forward(call.q.view(), call.k.view(), call.v.view())
        };
        assert!(attend(&call).is_ok());
        let other = Call::random(sizes(2, [lengths[0], 34], [4, 2]), 5);
        assert!(matches!(attend(&other), Err(Error::MaskShape { .. })));
    }
}

#[test]
fn gradients_are_slopes_of_the_definition() {
    let call = Call { d_lse: None, ..Call::<f32>::random(sizes(1, [11, 14], [2, 1]), 6) };
    let layer = Moba::new(3, 3).unwrap().cpu(one());
    let choices = layer.choose(call.q.view(), call.k.view()).unwrap();
    let mask = mask(&call, &choices, 3);
    let (_, backward) = run(&layer, &call, &choices);
    let shapes = [call.q.shape(), call.k.shape(), call.v.shape()];
    let (data, d_out) = ([&call.q, &call.k, &call.v].map(wide), wide(&call.d_out));
    for (which, got) in [&backward.d_q, &backward.d_k, &backward.d_v].into_iter().enumerate() {
        let slopes = differences(&data[which], |x| {
            let input = |n: usize| {
                let data = if n == which { x } else { &data[n] };
                Input { data, shape: shapes[n] }
            };
            let scale = 1.0 / 6f64.sqrt();
            let out = attention([input(0), input(1), input(2)], scale, &mask).unwrap().out;
            out.iter().zip(&d_out).map(|(out, d)| out * d).sum()
        });
        let worst = support::error(got.as_slice(), &slopes);
        assert!(worst < 5e-6, "gradient {which}: {worst:e}");
    }
}

#[test]
fn tokens_made_one_by_one_agree_with_the_prompt() {
    for (block, top, heads) in [(1, 3, [2, 2]), (4, 3, [4, 2]), (7, 2, [2, 1]), (64, 4, [2, 2])] {
        for (cpu, tokens) in cpus().flat_map(|cpu| [1, 30, 300].map(|tokens| (cpu, tokens))) {
            let layer = Moba::new(block, top).unwrap().cpu(cpu);
            let call = Call::<f32>::random(sizes(1, [tokens, tokens], heads), 7);
            let choices = layer.choose(call.q.view(), call.k.view()).unwrap();
            let expected = layer.forward(inputs(&call), &choices).unwrap();
            let [heads, kv_heads] = heads;
            let shape = StateHeads { heads, kv_heads, key_dim: 6, value_dim: 4 };
            let mut state = layer.state(shape).unwrap();
            let empty = state.attend(support::tokens(&call.q, 0..1)).unwrap();
            assert!(empty.lse.as_slice().iter().all(|&lse| lse == f32::NEG_INFINITY));
            let wrong = state.append(call.q.view(), call.v.view());
            assert_eq!(wrong.is_err(), heads != kv_heads);
            state.clear();
            let prompt = tokens / 2;
            let [k, v] = [&call.k, &call.v].map(|x| support::tokens(x, 0..prompt));
            state.append(k, v).unwrap();
            for t in prompt..tokens {
                let [q, k, v] = [&call.q, &call.k, &call.v].map(|x| support::tokens(x, t..t + 1));
                state.append(k, v).unwrap();
                assert_eq!(state.tokens(), t + 1);
                let got = state.attend(q).unwrap();
                for h in 0..heads {
                    let row = |x: &Forward<f32>, t| {
                        let out = x.out.view().row(0, t, h).to_vec();
                        [out, vec![x.lse.view().row(0, t, h)[0]]].concat()
                    };
                    for (a, b) in row(&got, 0).iter().zip(row(&expected, t)) {
                        assert!((a - b).abs() < 1e-5, "{block} {top} token {t} head {h}: {a} {b}");
                    }
                }
            }
        }
    }
}

#[test]
fn every_level_and_number_of_threads_agrees_over_several_tiles() {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
    let call = Call { d_lse: None, ..Call::<f32>::random(sizes(2, [700, 700], [4, 2]), 2) };
    let layer = Moba::new(64, 3).unwrap();
    let choices = layer.cpu(one()).choose(call.q.view(), call.k.view()).unwrap();
    let mask = mask(&call, &choices, 64);
    for cpu in cpus() {
        let worst = worst_error(&run(&layer.cpu(cpu), &call, &choices), &call, &mask);
        assert!(worst < 5e-6, "{}: {worst:e}", cpu.level);
    }
    let with = |threads| {
        let threads = Threads::at_most(NonZeroUsize::new(threads).unwrap());
        let layer = layer.cpu(Cpu { threads, ..one() });
        assert_eq!(layer.choose(call.q.view(), call.k.view()).unwrap(), choices);
        run(&layer, &call, &choices)
    };
    let first = with(1);
    assert!(pool.install(|| with(3)) == first);
}

#[test]
fn the_best_blocks_are_chosen() {
    for (block, top, lengths) in [(4, 3, [50, 50]), (7, 5, [20, 90]), (16, 2, [2100, 2100])] {
        let call = Call::<f32>::random(sizes(1, lengths, [4, 2]), 3);
        let layer = Moba::new(block, top).unwrap().cpu(one());
        let choices = layer.choose(call.q.view(), call.k.view()).unwrap();
        for (head, row) in (0..4).flat_map(|head| (0..lengths[0]).map(move |row| (head, row))) {
            let position = row + lengths[1] - lengths[0];
            let q = call.q.view().row(0, row, head);
            let score = |n: usize| -> f64 {
                let keys = (n * block..(n + 1) * block).map(|t| call.k.view().row(0, t, head / 2));
                let sum = keys.map(|k| {
                    k.iter().zip(q).map(|(&k, &q)| f64::from(k) * f64::from(q)).sum::<f64>()
                });
                sum.sum::<f64>() / block as f64
            };
            let mut all: Vec<(usize, f64)> = (0..position / block).map(|n| (n, score(n))).collect();
            all.sort_by(|a, b| b.1.total_cmp(&a.1));
            let chosen: Vec<usize> = choices.of(0, head, row).collect();
            assert_eq!(chosen.len(), all.len().min(top - 1));
            // Where two scores are nearly equal, either may win.
            let cut = all.get(chosen.len()).map_or(f64::NEG_INFINITY, |x| x.1);
            for &block in &chosen {
                assert!(score(block) >= cut - 1e-5, "head {head} row {row}: {chosen:?} of {all:?}");
            }
        }
    }
}

#[test]
fn later_tokens_change_no_bit_of_earlier_rows_nor_their_choices() {
    let call = Call::<f32>::random(sizes(1, [300, 300], [2, 2]), 4);
    let layer = Moba::new(16, 3).unwrap().cpu(one());
    let choices = layer.choose(call.q.view(), call.k.view()).unwrap();
    let before = layer.forward(inputs(&call), &choices).unwrap();
    for from in [1, 160, 171, 299] {
        let changed = |x: &Tensor<f32>| {
            let width = x.shape().heads * x.shape().dim;
            let mut data = x.as_slice().to_vec();
            data[from * width..].iter_mut().for_each(|x| *x = 5.0 - *x);
            Tensor::from_vec(data, x.shape()).unwrap()
        };
        let (q, k, v) = (changed(&call.q), changed(&call.k), changed(&call.v));
        let other = Call { q, k, v, ..call.clone() };
        let again = layer.choose(other.q.view(), other.k.view()).unwrap();
        let after = layer.forward(inputs(&other), &again).unwrap();
        for (t, h) in (0..from).flat_map(|t| [(t, 0), (t, 1)]) {
            assert!(again.of(0, h, t).eq(choices.of(0, h, t)));
            assert_eq!(after.out.view().row(0, t, h), before.out.view().row(0, t, h));
            assert_eq!(after.lse.view().row(0, t, h), before.lse.view().row(0, t, h));
        }
    }
}

#[test]
fn moba_agrees_with_its_golden_vectors() {
    for case in cases("moba") {
        let tensor = |name: &str| {
            Tensor::from_vec(case.tensor(name).to_f32(), shape(case.tensor(name))).unwrap()
        };
        let [q, k, v, d_out] = ["q", "k", "v", "d_out"].map(tensor);
        let inputs = Inputs { q: q.view(), k: k.view(), v: v.view() };
        let size = |name: &str| case.number(name) as usize;
        let golden = case.tensor("choices");
        for cpu in cpus() {
            let layer = Moba::new(size("block"), size("top")).unwrap().cpu(cpu);
            let layer = layer.scale(Scale::Value(case.number("scale") as f32));
            let choices = layer.choose(q.view(), k.view()).unwrap();
            let [_, heads, queries, most] = golden.shape[..] else { panic!("{:?}", golden.shape) };
            for (n, expected) in golden.data.chunks(most.max(1)).enumerate() {
                let (b, head, row) = (n / queries / heads, n / queries % heads, n % queries);
                let chosen = choices.of(b, head, row).map(|n| n as f64);
                assert!(chosen.eq(expected.iter().copied().filter(|&n| n >= 0.0)), "{}", case.name);
            }
            let forward = layer.forward(inputs, &choices).unwrap();
            let backward = layer.backward(inputs, &choices, &forward, d_out.view()).unwrap();
            for (name, got) in [
                ("out", &forward.out),
                ("lse", &forward.lse),
                ("grad.q", &backward.d_q),
                ("grad.k", &backward.d_k),
                ("grad.v", &backward.d_v),
            ] {
                case.check(name, &wide(got), case.tolerance("f32"));
            }
        }
    }
}

#[test]
fn bad_parameters_and_choices_are_refused_with_the_rule() {
    for (block, top) in [(0, 1), (4, 0)] {
        let error = Moba::new(block, top).unwrap_err();
        assert!(error.to_string().contains("at least 1"), "{error}");
    }
    let call = Call::<f32>::random(sizes(1, [6, 6], [1, 1]), 1);
    let layer = Moba::new(2, 3).unwrap();
    let given = |choices: &[Option<u32>]| BlockChoices::given([1, 1, 6], 2, choices).unwrap();
    let mut choices = vec![None; 12];
    assert!(layer.forward(inputs(&call), &given(&choices)).is_ok());
    for bad in [[Some(2), None], [Some(9), None], [Some(1), Some(1)]] {
        choices[10..].copy_from_slice(&bad);
        let error = layer.forward(inputs(&call), &given(&choices)).unwrap_err();
        assert!(error.to_string().contains("blocks before the row's own, each once"), "{error}");
    }
    choices[10..].copy_from_slice(&[Some(1), Some(0)]);
    assert!(layer.forward(inputs(&call), &given(&choices)).is_ok());
    let short = BlockChoices::given([1, 1, 6], 2, &[None; 11]);
    assert!(matches!(short, Err(Error::BufferLength { expected: 12, got: 11, .. })));
    let other = BlockChoices::given([1, 1, 5], 2, &[None; 10]).unwrap();
    assert!(matches!(layer.forward(inputs(&call), &other), Err(Error::ShapeMismatch { .. })));
    let wrong = Tensor::<f32>::zeros(Shape { batch: 1, seq: 6, heads: 1, dim: 5 }).unwrap();
    assert!(matches!(layer.choose(call.q.view(), wrong.view()), Err(Error::ShapeMismatch { .. })));
}
