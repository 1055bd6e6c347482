//! Native Sparse Attention against its definition in f64, branch by branch, and its choices against a search in f64.

mod support;

use foveal::mask::{Dense, Extent, Pattern, Site};
use foveal::plan::{Backward, Inputs};
use foveal::reference::{Input, Options, attention, attention_backward};
use foveal::sparse::{
    BlockChoices, Branches, NativeForward, NativeSizes, NativeSparse, StateHeads,
};
use foveal::{Cpu, Error, Level, Mask, Scale, Shape, Tensor, Threads};
use std::num::NonZeroUsize;
use support::attention::shape;
use support::backward::Call;
use support::golden::cases;
use support::sizes::Sizes;
use support::sparse::{inputs, wide};
use support::{Random, cpus, differences};

const DIM: usize = 6;

fn one() -> Cpu {
    Cpu { level: Level::detect().unwrap(), threads: Threads::ONE }
}

fn layer([length, stride, block, top, window]: [usize; 5]) -> NativeSparse {
    NativeSparse::new(NativeSizes { length, stride, block, top, window }).unwrap().cpu(one())
}

/// Layers of several kinds: pooled without overlap, with overlap, blocks below a length, a window of one.
const KINDS: [[usize; 5]; 5] =
    [[4, 4, 4, 4, 5], [6, 2, 4, 5, 3], [8, 4, 4, 3, 9], [1, 1, 1, 6, 1], [3, 3, 9, 4, 40]];

/// Queries, keys and values of each branch, in the order of gates, and gates.
#[derive(Clone)]
struct Case {
    kind: [usize; 5],
    calls: [Call<f32>; 3],
    gates: Tensor<f32>,
}

type Result = (NativeForward<f32>, Branches<Backward<f32>>, Tensor<f32>);

impl Case {
    fn random(kind: [usize; 5], batch: usize, lengths: [usize; 2], heads: [usize; 2]) -> Case {
        let ([queries, keys], [heads, kv_heads]) = (lengths, heads);
        let sizes = Sizes { batch, queries, keys, heads, kv_heads, dim: DIM, value_dim: 4 };
        let compressed = Sizes { keys: layer(kind).compressed_tokens(keys), ..sizes };
        let seed = (keys * 3 + queries) as u64;
        let calls = [(compressed, 1), (sizes, 2), (sizes, 3)]
            .map(|(sizes, n)| Call { d_lse: None, ..Call::random(sizes, seed + n) });
        let shape = Shape { batch, seq: queries, heads, dim: 3 };
        Case { kind, calls, gates: Random::new(seed).tensor(shape, 1.0) }
    }

    fn inputs(&self) -> Branches<Inputs<'_, f32, f32>> {
        let [compressed, selected, window] = self.calls.each_ref().map(inputs);
        Branches { compressed, selected, window }
    }

    fn run(&self, layer: &NativeSparse) -> Result {
        let forward = layer.forward(self.inputs(), self.gates.view()).unwrap();
        let d_out = self.calls[0].d_out.view();
        let (d, d_gates) =
            layer.backward(self.inputs(), self.gates.view(), &forward, d_out).unwrap();
        (forward, d, d_gates)
    }

    /// What each branch may see, as written in the paper.
    fn masks(&self, choices: &BlockChoices) -> [Mask; 3] {
        let [length, stride, block, _, window] = self.kind;
        let (q, k) = (self.calls[1].q.shape(), self.calls[1].k.shape());
        let compressed = self.calls[0].k.shape().seq;
        let mut visible = [vec![], vec![], vec![]];
        for (b, head) in (0..q.batch).flat_map(|b| (0..q.heads).map(move |h| (b, h))) {
            for row in 0..q.seq {
                let position = (row + k.seq) as isize - q.seq as isize;
                visible[0].extend(
                    (0..compressed).map(|n| (n * stride + length) as isize <= position + 1),
                );
                let mut blocks: Vec<isize> =
                    choices.of(b, head * k.heads / q.heads, row).map(|n| n as isize).collect();
                let own = position.div_euclid(block as isize);
                blocks.extend([0, own - 1, own]);
                let keys = 0..k.seq as isize;
                visible[1].extend(
                    keys.clone().map(|j| j <= position && blocks.contains(&(j / block as isize))),
                );
                visible[2].extend(keys.map(|j| j <= position && position - j < window as isize));
            }
        }
        let mut keys = [compressed, k.seq, k.seq].into_iter();
        visible.map(|visible| {
            let keys = keys.next().unwrap();
            let extent = Extent { batch: q.batch, heads: q.heads, queries: q.seq, keys };
            Dense::new(&visible, extent).unwrap().into()
        })
    }

    /// Queries, keys and values of each branch, and at last the gates.
    fn numbers(&self) -> [Vec<f64>; 10] {
        let of = |n: usize| {
            let call = &self.calls[n];
            [&call.q, &call.k, &call.v].map(wide)
        };
        let mut all = (0..3).flat_map(of).chain([wide(&self.gates)]);
        std::array::from_fn(|_| all.next().unwrap())
    }

    /// The output for [`Case::numbers`], and their gradients, as they are defined.
    fn define(&self, numbers: &[Vec<f64>; 10], masks: &[Mask; 3]) -> (Vec<f64>, [Vec<f64>; 10]) {
        let (gates, d_out) = (&numbers[9], wide(&self.calls[0].d_out));
        let dim = self.calls[0].d_out.shape().dim;
        let mut out = vec![0.0; d_out.len()];
        let mut d_gates = vec![0.0; gates.len()];
        let scale = 1.0 / (DIM as f64).sqrt();
        let mut all: [Vec<f64>; 10] = Default::default();
        for n in 0..3 {
            let (call, data) = (&self.calls[n], &numbers[3 * n..]);
            let shapes = [call.q.shape(), call.k.shape(), call.v.shape()];
            let input = |x: usize| Input { data: &data[x], shape: shapes[x] };
            let inputs = [input(0), input(1), input(2)];
            let part = attention(inputs, scale, &masks[n]).unwrap().out;
            let mut gated = d_out.clone();
            for (row, gate) in gates.chunks(3).map(|gates| gates[n]).enumerate() {
                for x in row * dim..(row + 1) * dim {
                    out[x] += gate * part[x];
                    d_gates[row * 3 + n] += d_out[x] * part[x];
                    gated[x] *= gate;
                }
            }
            let shape = call.d_out.shape();
            let zeros = vec![0.0; gates.len() / 3];
            let upstream =
                [Input { data: &gated, shape }, Input { data: &zeros, shape: shape.per_row() }];
            let options = Options::new(scale, &masks[n]);
            let d = attention_backward(inputs, &options, upstream).unwrap();
            all[3 * n..3 * n + 3].clone_from_slice(&[d.d_q, d.d_k, d.d_v]);
        }
        all[9] = d_gates;
        (out, all)
    }

    #[track_caller]
    fn check(&self, (forward, d, d_gates): &Result, bound: f64) {
        let (out, expected) = self.define(&self.numbers(), &self.masks(&forward.choices));
        let what = format!("{:?}, queries {}", self.kind, self.calls[1].q.shape());
        let worst = support::error(forward.out.as_slice(), &out);
        assert!(worst < bound, "{what}: {worst:e}");
        for (n, (got, expected)) in gradients(d, d_gates).into_iter().zip(&expected).enumerate() {
            let worst = support::error(got.as_slice(), expected);
            assert!(worst < bound, "{what}, gradient {n}: {worst:e}");
        }
    }
}

/// In the order of [`Case::numbers`].
fn gradients<'a>(
    d: &'a Branches<Backward<f32>>,
    d_gates: &'a Tensor<f32>,
) -> [&'a Tensor<f32>; 10] {
    let [a, b, c] = [&d.compressed, &d.selected, &d.window].map(|d| [&d.d_q, &d.d_k, &d.d_v]);
    [a[0], a[1], a[2], b[0], b[1], b[2], c[0], c[1], c[2], d_gates]
}

#[test]
fn every_small_size_agrees_with_the_definition() {
    for kind in KINDS {
        for lengths in (0..=40).map(|n| [n, n]).chain([[1, 17], [5, 33], [9, 4], [3, 0]]) {
            for heads in [[2, 2], [4, 2]] {
                let case = Case::random(kind, 2, lengths, heads);
                case.check(&case.run(&layer(kind)), 5e-6);
            }
        }
    }
}

#[test]
fn every_level_and_number_of_threads_agrees_over_several_tiles() {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
    for kind in [[32, 16, 64, 6, 100], [16, 16, 16, 9, 300]] {
        let case = Case::random(kind, 2, [700, 700], [4, 2]);
        let mut choices = None;
        for cpu in cpus() {
            let got = case.run(&layer(kind).cpu(cpu));
            case.check(&got, 5e-6);
            // No two levels differ here: no two scores are that near.
            let choices = choices.get_or_insert(got.0.choices.clone());
            assert_eq!(*choices, got.0.choices);
        }
        let with = |threads| {
            let threads = Threads::at_most(NonZeroUsize::new(threads).unwrap());
            case.run(&layer(kind).cpu(Cpu { threads, ..one() }))
        };
        let first = with(1);
        assert!(pool.install(|| with(3)) == first);
    }
}

/// P of a block for a row of a group of heads, in f64.
fn importance(case: &Case, [b, kv, row]: [usize; 3], block: usize) -> f64 {
    let [length, stride, size, ..] = case.kind;
    let call = &case.calls[0];
    let (q, k) = (call.q.shape(), call.k.shape());
    let position = row + case.calls[1].k.shape().seq - q.seq;
    let whole = (0..k.seq).filter(|n| n * stride + length <= position + 1).count();
    let group = q.heads / k.heads;
    let mut sum = 0.0;
    for head in kv * group..(kv + 1) * group {
        let q = call.q.view().row(b, row, head);
        let logit = |n: usize| {
            let pairs = call.k.view().row(b, n, kv).iter().zip(q);
            pairs.map(|(&k, &q)| f64::from(k) * f64::from(q)).sum::<f64>() / (DIM as f64).sqrt()
        };
        let total: f64 = (0..whole).map(|n| logit(n).exp()).sum();
        for (m, o) in (0..size / stride).flat_map(|m| (0..length / stride).map(move |o| (m, o))) {
            let place = (block * size / stride + m) as isize - o as isize;
            if (0..whole as isize).contains(&place) {
                sum += logit(place as usize).exp() / total;
            }
        }
    }
    sum
}

#[test]
fn the_most_important_blocks_are_selected() {
    for (kind, lengths) in [
        ([4, 4, 4, 6, 1], [90, 90]),
        ([8, 2, 4, 5, 1], [31, 120]),
        ([8, 4, 16, 4, 1], [1300, 1300]),
    ] {
        let [_, _, block, top, _] = kind;
        let case = Case::random(kind, 1, lengths, [4, 2]);
        let choices = layer(kind).forward(case.inputs(), case.gates.view()).unwrap().choices;
        for (kv, row) in (0..2).flat_map(|kv| (0..lengths[0]).map(move |row| (kv, row))) {
            let own = (row + lengths[1] - lengths[0]) / block;
            let mut scores: Vec<f64> =
                (1..own.max(2) - 1).map(|n| importance(&case, [0, kv, row], n)).collect();
            let chosen: Vec<usize> = choices.of(0, kv, row).collect();
            assert_eq!(chosen.len(), scores.len().min(top - 3));
            let least = chosen.iter().map(|n| scores[n - 1]).fold(f64::INFINITY, f64::min);
            scores.sort_by(|a, b| b.total_cmp(a));
            // Where two are nearly equal, either may win.
            if let Some(&cut) = scores.get(chosen.len()) {
                assert!(least >= cut - 1e-5, "head {kv}, row {row}: {chosen:?}");
            }
        }
    }
}

#[test]
fn gradients_are_slopes_of_the_definition() {
    let case = Case::random([4, 2, 4, 4, 3], 1, [6, 23], [2, 1]);
    let (forward, d, d_gates) = case.run(&layer(case.kind));
    let masks = case.masks(&forward.choices);
    let d_out = wide(&case.calls[0].d_out);
    let numbers = case.numbers();
    for (n, got) in gradients(&d, &d_gates).into_iter().enumerate() {
        let slopes = differences(&numbers[n], |x| {
            let mut numbers = numbers.clone();
            numbers[n] = x.to_vec();
            let (out, _) = case.define(&numbers, &masks);
            out.iter().zip(&d_out).map(|(out, d)| out * d).sum()
        });
        let worst = support::error(got.as_slice(), &slopes);
        assert!(worst < 5e-6, "gradient {n}: {worst:e}");
    }
}

/// The same tokens in all branches, compressed by their means.
fn pooled(kind: [usize; 5], x: &[Tensor<f32>; 3], gates: &Tensor<f32>) -> NativeForward<f32> {
    let layer = layer(kind);
    let [q, k, v] = x.each_ref().map(Tensor::view);
    let (k_means, v_means) = (layer.pool(k).unwrap(), layer.pool(v).unwrap());
    let tokens = Inputs { q, k, v };
    let compressed = Inputs { q, k: k_means.view(), v: v_means.view() };
    let inputs = Branches { compressed, selected: tokens, window: tokens };
    layer.forward(inputs, gates.view()).unwrap()
}

#[test]
fn later_tokens_change_no_bit_of_earlier_rows_nor_their_choices() {
    for kind in [[8, 4, 16, 5, 20], [16, 16, 16, 4, 1]] {
        let case = Case::random(kind, 1, [300, 300], [2, 2]);
        let Call { q, k, v, .. } = case.calls[1].clone();
        let before = pooled(kind, &[q.clone(), k.clone(), v.clone()], &case.gates);
        for (from, add) in [(1, 3.0), (160, -1.0), (171, f32::NAN), (299, f32::INFINITY)] {
            let changed = [&q, &k, &v].map(|x| {
                let width = x.shape().heads * x.shape().dim;
                let mut data = x.as_slice().to_vec();
                data[from * width..].iter_mut().for_each(|x| *x += add);
                Tensor::from_vec(data, x.shape()).unwrap()
            });
            let after = pooled(kind, &changed, &case.gates);
            for (t, h) in (0..from).flat_map(|t| [(t, 0), (t, 1)]) {
                assert!(after.choices.of(0, h, t).eq(before.choices.of(0, h, t)), "{from}: {t}");
                assert_eq!(after.out.view().row(0, t, h), before.out.view().row(0, t, h));
            }
        }
    }
}

#[test]
fn tokens_made_one_by_one_agree_with_the_prompt() {
    for (kind, tokens, heads) in [
        (KINDS[0], 40, [2, 2]),
        (KINDS[1], 60, [4, 2]),
        (KINDS[3], 25, [2, 1]),
        ([8, 4, 16, 5, 20], 300, [4, 1]),
    ] {
        for cpu in cpus() {
            let case = Case::random(kind, 1, [tokens, tokens], heads);
            let layer = layer(kind).cpu(cpu);
            let expected = layer.forward(case.inputs(), case.gates.view()).unwrap();
            let [heads, kv_heads] = heads;
            let shape = StateHeads { heads, kv_heads, key_dim: DIM, value_dim: 4 };
            let mut state = layer.state(shape).unwrap();
            let append = |state: &mut foveal::sparse::NativeState<f32>, to: usize| {
                let (from, count) = (state.tokens(), layer.compressed_tokens(state.tokens()));
                let more = count..count + state.compressed_by(to - from);
                let [k, v] = [0, 1].map(|which| {
                    let of = |n: usize, range| {
                        let call = &case.calls[n];
                        support::tokens([&call.k, &call.v][which], range)
                    };
                    let compressed = of(0, more.clone());
                    Branches { compressed, selected: of(1, from..to), window: of(2, from..to) }
                });
                state.append(k, v).unwrap();
            };
            append(&mut state, tokens / 2);
            state.clear();
            append(&mut state, tokens / 3);
            for t in tokens / 3..tokens {
                append(&mut state, t + 1);
                assert_eq!(state.tokens(), t + 1);
                let of = |n: usize| support::tokens(&case.calls[n].q, t..t + 1);
                let q = Branches { compressed: of(0), selected: of(1), window: of(2) };
                let got = state.attend(q, support::tokens(&case.gates, t..t + 1)).unwrap();
                for h in 0..heads {
                    let kv = h * kv_heads / heads;
                    assert!(got.choices.of(0, kv, 0).eq(expected.choices.of(0, kv, t)), "{t}");
                    let pair =
                        [(&got.out, 0), (&expected.out, t)].map(|(x, t)| x.view().row(0, t, h));
                    for (a, b) in pair[0].iter().zip(pair[1]) {
                        assert!((a - b).abs() < 1e-5, "{kind:?} token {t} head {h}: {a} {b}");
                    }
                }
            }
        }
    }
}

#[test]
fn a_state_refuses_other_shapes_and_stays_as_it_was() {
    let layer = layer([4, 2, 4, 4, 3]);
    let shape = StateHeads { heads: 2, kv_heads: 1, key_dim: DIM, value_dim: DIM };
    let mut state = layer.state::<f32>(shape).unwrap();
    let zeros = |seq, heads, dim| Tensor::zeros(Shape { batch: 1, seq, heads, dim }).unwrap();
    let (x, two, three) = (zeros(6, 1, DIM), zeros(2, 1, DIM), zeros(3, 1, DIM));
    let good = Branches { compressed: two.view(), selected: x.view(), window: x.view() };
    for bad in [
        Branches { compressed: three.view(), ..good },
        Branches { window: three.view(), ..good },
        Branches { selected: three.view(), ..good },
    ] {
        assert!(matches!(state.append(bad, bad), Err(Error::ShapeMismatch { .. })));
        assert_eq!(state.tokens(), 0);
    }
    let q = zeros(1, 2, DIM);
    let q = Branches { compressed: q.view(), selected: q.view(), window: q.view() };
    let gates = zeros(1, 2, 3);
    let empty = state.attend(q, gates.view()).unwrap_err();
    assert!(empty.to_string().contains("at least 1"), "{empty}");
    state.append(good, good).unwrap();
    assert!(state.attend(q, gates.view()).is_ok());
    assert!(matches!(state.attend(q, zeros(1, 2, 2).view()), Err(Error::ShapeMismatch { .. })));
}

#[test]
fn the_mask_is_selection_and_window() {
    let case = Case::random([4, 2, 4, 5, 3], 2, [9, 37], [4, 2]);
    let layer = layer(case.kind);
    let choices = layer.forward(case.inputs(), case.gates.view()).unwrap().choices;
    let ([_, selected, window], mask) = (case.masks(&choices), layer.mask(&choices, 37));
    for (batch, q_head) in (0..2).flat_map(|b| (0..4).map(move |h| (b, h))) {
        let site = Site { batch, q_head, kv_head: q_head / 2 };
        for (i, j) in (28..37).flat_map(|i| (0..37).map(move |j| (i, j))) {
            let expected = selected.allows(site, i, j) || window.allows(site, i, j);
            assert_eq!(mask.allows(site, i, j), expected, "{site:?} {i} {j}");
        }
    }
}

#[test]
fn pooled_tokens_are_means_and_their_gradient_is_its_transpose() {
    for kind in KINDS {
        for tokens in 0..=20 {
            let layer = layer(kind);
            let [length, stride, ..] = kind;
            let shape = Shape { batch: 2, seq: tokens, heads: 3, dim: 5 };
            let x: Tensor<f32> = Random::new(1).tensor(shape, 1.0);
            let got = layer.pool(x.view()).unwrap();
            let count = (0..tokens).filter(|n| n % stride == 0 && n + length <= tokens).count();
            assert_eq!(got.shape(), Shape { seq: count, ..shape });
            let d: Tensor<f32> = Random::new(2).tensor(got.shape(), 1.0);
            let d_x = layer.pool_backward(d.view(), tokens).unwrap();
            let mut expected = vec![0.0f64; d_x.as_slice().len()];
            for (b, n, h) in
                (0..2).flat_map(|b| (0..count).flat_map(move |n| (0..3).map(move |h| (b, n, h))))
            {
                for c in 0..5 {
                    let mut mean = 0.0;
                    for t in n * stride..n * stride + length {
                        mean += f64::from(x.view().row(b, t, h)[c]) / length as f64;
                        expected[((b * tokens + t) * 3 + h) * 5 + c] +=
                            f64::from(d.view().row(b, n, h)[c]) / length as f64;
                    }
                    assert!((f64::from(got.view().row(b, n, h)[c]) - mean).abs() < 1e-7);
                }
            }
            assert!(support::error(d_x.as_slice(), &expected) < 1e-7);
            let other = layer.pool_backward(d.view(), tokens + stride * 40);
            assert!(matches!(other, Err(Error::ShapeMismatch { .. })));
        }
    }
}

#[test]
fn native_sparse_agrees_with_its_golden_vectors() {
    for case in cases("native_sparse") {
        let tensor = |name: &str| {
            Tensor::from_vec(case.tensor(name).to_f32(), shape(case.tensor(name))).unwrap()
        };
        let [q, gates, d_out] = ["q", "gates", "d_out"].map(tensor);
        let [k_cmp, v_cmp, k_slc, v_slc, k_win, v_win] =
            ["k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win"].map(tensor);
        let of = |k, v| Inputs { q: q.view(), k, v };
        let inputs = Branches {
            compressed: of(k_cmp.view(), v_cmp.view()),
            selected: of(k_slc.view(), v_slc.view()),
            window: of(k_win.view(), v_win.view()),
        };
        let kind = ["length", "stride", "block", "top", "window"].map(|x| case.number(x) as usize);
        let golden = case.tensor("choices");
        for cpu in cpus() {
            let layer = layer(kind).cpu(cpu).scale(Scale::Value(case.number("scale") as f32));
            let forward = layer.forward(inputs, gates.view()).unwrap();
            let [_, heads, queries, most] = golden.shape[..] else { panic!("{:?}", golden.shape) };
            for (n, expected) in golden.data.chunks(most).enumerate() {
                let (b, head, row) = (n / queries / heads, n / queries % heads, n % queries);
                let chosen = forward.choices.of(b, head, row).map(|n| n as f64);
                assert!(chosen.eq(expected.iter().copied().filter(|&n| n >= 0.0)), "{}", case.name);
            }
            let (d, d_gates) =
                layer.backward(inputs, gates.view(), &forward, d_out.view()).unwrap();
            let all = [&d.compressed, &d.selected, &d.window].map(|d| wide(&d.d_q));
            let d_q: Vec<f64> = (0..all[0].len()).map(|n| all.iter().map(|d| d[n]).sum()).collect();
            let tolerance = case.tolerance("f32");
            case.check("grad.q", &d_q, tolerance);
            for (name, got) in [
                ("out", &forward.out),
                ("grad.gates", &d_gates),
                ("grad.k_cmp", &d.compressed.d_k),
                ("grad.v_cmp", &d.compressed.d_v),
                ("grad.k_slc", &d.selected.d_k),
                ("grad.v_slc", &d.selected.d_v),
                ("grad.k_win", &d.window.d_k),
                ("grad.v_win", &d.window.d_v),
            ] {
                case.check(name, &wide(got), tolerance);
            }
        }
    }
}

#[test]
fn bad_parameters_and_choices_are_refused_with_the_rule() {
    let good = NativeSizes { length: 4, stride: 2, block: 4, top: 4, window: 3 };
    for (sizes, rule) in [
        (NativeSizes { stride: 0, ..good }, "at least 1"),
        (NativeSizes { length: 0, ..good }, "a multiple of their stride"),
        (NativeSizes { length: 5, ..good }, "a multiple of their stride"),
        (NativeSizes { block: 0, ..good }, "a multiple of the stride"),
        (NativeSizes { block: 3, ..good }, "a multiple of the stride"),
        (NativeSizes { top: 2, ..good }, "at least 3"),
        (NativeSizes { window: 0, ..good }, "at least 1"),
    ] {
        let error = NativeSparse::new(sizes).unwrap_err();
        assert!(error.to_string().contains(rule), "{error}");
    }
    assert!(NativeSparse::new(NativeSizes::default()).is_ok());
    let case = Case::random([4, 2, 4, 5, 3], 1, [20, 20], [2, 1]);
    let layer = layer(case.kind);
    let with = |last: [Option<u32>; 2]| {
        let mut choices = vec![None; 40];
        choices[38..].copy_from_slice(&last);
        let choices = BlockChoices::given([1, 1, 20], 2, &choices).unwrap();
        layer.forward_with(case.inputs(), case.gates.view(), choices)
    };
    // The last row's own block is 4.
    assert!(with([Some(1), Some(2)]).is_ok());
    for bad in [[Some(0), None], [Some(3), None], [Some(9), None], [Some(1), Some(1)]] {
        let error = with(bad).unwrap_err();
        assert!(error.to_string().contains("between the first and the one before"), "{error}");
    }
    let other = BlockChoices::given([1, 2, 20], 1, &[None; 40]).unwrap();
    let refused = layer.forward_with(case.inputs(), case.gates.view(), other);
    assert!(matches!(refused, Err(Error::ShapeMismatch { .. })));
    let more = Case::random(case.kind, 1, [20, 22], [2, 1]);
    let mixed = Branches { compressed: more.inputs().compressed, ..case.inputs() };
    let refused = layer.forward(mixed, case.gates.view());
    assert!(matches!(refused, Err(Error::ShapeMismatch { .. })));
    let refused = layer.forward(case.inputs(), case.calls[0].d_out.view());
    assert!(matches!(refused, Err(Error::ShapeMismatch { .. })));
    let forward = layer.forward(case.inputs(), case.gates.view()).unwrap();
    let refused = layer.backward(case.inputs(), case.gates.view(), &forward, case.gates.view());
    assert!(matches!(refused, Err(Error::ShapeMismatch { .. })));
}
