//! What results may not depend on.

use super::support::backward::Call;
use super::support::sizes::Sizes;
use super::support::{Random, cpus, tokens};
use super::{Encoding, backward, forward};
use foveal::cache::{ContiguousCache, KvStore};
use foveal::{Attention, Cpu, Level, Mask, Shape, Tensor, Threads, Workspace};
use std::num::NonZeroUsize;

const SIZES: Sizes =
    Sizes { batch: 2, queries: 310, keys: 620, heads: 4, kv_heads: 2, dim: 12, value_dim: 9 };

fn threads(level: Level, n: usize) -> Cpu {
    Cpu { level, threads: Threads::at_most(NonZeroUsize::new(n).unwrap()) }
}

fn masks() -> [Mask; 3] {
    [Mask::causal(), Mask::window(310), Mask::band(Some(400), Some(20))]
}

#[test]
fn threads_change_no_bit() {
    for sizes in
        [SIZES, Sizes { batch: 1, kv_heads: 1, ..SIZES }, Sizes { batch: 5, queries: 40, ..SIZES }]
    {
        let call = Call::<f32>::random(sizes, 3);
        let encoding = Encoding::random(500, sizes, 4);
        for mask in masks() {
            for level in Level::available() {
                let attention =
                    Attention::new().mask(mask.clone()).relative_encoding(encoding.view());
                let one = attention.clone().cpu(threads(level, 1));
                let (out, d) = (forward(&one, &call, false), backward(&one, &call, &encoding));
                for n in [2, 3, 5] {
                    let many = attention.clone().cpu(threads(level, n));
                    assert_eq!(forward(&many, &call, false), out, "{level} {mask} {n} threads");
                    assert_eq!(backward(&many, &call, &encoding), d, "{level} {mask} {n} threads");
                }
            }
        }
    }
}

/// The numbers of one sequence.
fn sequence(x: &Tensor<f32>, batch: usize) -> Tensor<f32> {
    let shape = Shape { batch: 1, ..x.shape() };
    let len = shape.checked_len().unwrap();
    Tensor::from_vec(x.as_slice()[batch * len..(batch + 1) * len].to_vec(), shape).unwrap()
}

#[test]
fn the_rest_of_the_batch_changes_no_bit_of_a_sequence() {
    let call = Call::<f32>::random(SIZES, 5);
    let encoding = Encoding::random(620, SIZES, 6);
    let attention = Attention::new().mask(Mask::causal()).relative_encoding(encoding.view());
    let (all, d_all) = (forward(&attention, &call, false), backward(&attention, &call, &encoding));
    let mut joined = vec![0.0; d_all.d_keys.len()];
    for b in 0..SIZES.batch {
        let [q, k, v, d_out] = [&call.q, &call.k, &call.v, &call.d_out].map(|x| sequence(x, b));
        let d_lse = call.d_lse.as_ref().map(|x| sequence(x, b));
        let call = Call { q, k, v, d_out, d_lse };
        let (one, d) = (forward(&attention, &call, false), backward(&attention, &call, &encoding));
        assert_eq!(one.out, sequence(&all.out, b));
        let own = |all: &[f32], n: usize| all[b * n..(b + 1) * n].to_vec();
        assert_eq!(d.d_q, own(&d_all.d_q, d.d_q.len()));
        assert_eq!(d.d_k, own(&d_all.d_k, d.d_k.len()));
        assert_eq!(d.d_v, own(&d_all.d_v, d.d_v.len()));
        joined.iter_mut().zip(&d.d_keys).for_each(|(sum, x)| *sum += x);
    }
    for (joined, all) in joined.iter().zip(&d_all.d_keys) {
        assert!((joined - all).abs() <= 1e-5 * (1.0 + all.abs()), "{joined} {all}");
    }
}

/// A prompt in one call and in calls of other lengths, over tensors and over a cache.
#[test]
fn cuts_of_a_prompt_change_no_bit() {
    let sizes = Sizes { batch: 1, queries: 600, keys: 600, kv_heads: 4, ..SIZES };
    let call = Call::<f32>::random(sizes, 7);
    let encoding = Encoding::random(400, sizes, 8);
    for mask in [Mask::causal(), Mask::window(200)] {
        for cpu in cpus() {
            let attention =
                Attention::new().mask(mask.clone()).relative_encoding(encoding.view()).cpu(cpu);
            let whole = forward(&attention, &call, false);
            for cuts in [&[600][..], &[1, 2, 97, 200, 300], &[256, 344], &[70; 9]] {
                let mut cache = ContiguousCache::<f32>::new(4, (12, 9), 600).unwrap();
                let mut first = 0;
                for &n in cuts {
                    let range = first..(first + n).min(600);
                    let [k, v] = [&call.k, &call.v].map(|x| tokens(x, range.clone()));
                    cache.append(k, v).unwrap();
                    let q = tokens(&call.q, range.clone());
                    let k = Shape { seq: range.end, ..call.k.shape() };
                    let plan = attention.plan(q.shape(), k, Shape { dim: 9, ..k }).unwrap();
                    let mut out = Tensor::<f32>::zeros(plan.out_shape()).unwrap();
                    let mut workspace = Workspace::for_plan(&plan);
                    workspace.poison();
                    let stores: [&dyn KvStore; 1] = [&cache];
                    plan.forward_cached(q, &stores, (out.view_mut(), None), &mut workspace)
                        .unwrap();
                    let expected = tokens(&whole.out, range.clone());
                    for (i, h) in (0..range.len()).flat_map(|i| (0..4).map(move |h| (i, h))) {
                        let (got, expected) = (out.view().row(0, i, h), expected.row(0, i, h));
                        assert_eq!(got, expected, "{mask} {} {cuts:?} {range:?} {i}", cpu.level);
                    }
                    first = range.end;
                }
            }
        }
    }
}

/// Generated rows over a cache: together, and one by one.
#[test]
fn generated_rows_that_share_a_call_keep_their_bits() {
    let sizes = Sizes { batch: 1, queries: 20, keys: 700, ..SIZES };
    let call = Call::<f32>::random(sizes, 9);
    for distances in [1, 300, 700] {
        let encoding = Encoding::random(distances, sizes, 10);
        for cpu in cpus() {
            let attention =
                Attention::new().mask(Mask::causal()).relative_encoding(encoding.view()).cpu(cpu);
            let all = forward(&attention, &call, true);
            for i in 0..sizes.queries {
                let end = sizes.keys - sizes.queries + i + 1;
                let copy = |x: &Tensor<f32>, range: std::ops::Range<usize>| {
                    let Shape { heads, dim, .. } = x.shape();
                    let part =
                        x.as_slice()[range.start * heads * dim..range.end * heads * dim].to_vec();
                    Tensor::from_vec(part, Shape { seq: range.len(), ..x.shape() }).unwrap()
                };
                let one = Call {
                    q: copy(&call.q, i..i + 1),
                    k: copy(&call.k, 0..end),
                    v: copy(&call.v, 0..end),
                    ..call.clone()
                };
                let one = forward(&attention, &one, true);
                assert_eq!(one.out, copy(&all.out, i..i + 1), "{} {distances} {i}", cpu.level);
            }
        }
    }
}

/// Without anything by distance it is exact attention: the bits of scores that are finished with a bias of zeros, and the
/// plain ones within a rounding of a logit.
#[test]
fn zeros_by_distance_are_exact_attention() {
    let sizes = Sizes { batch: 1, kv_heads: 4, ..SIZES };
    let call = Call::<f32>::random(sizes, 11);
    let encoding = Encoding::zeros(sizes.keys, sizes);
    let shape = Shape { batch: 1, seq: 1, heads: 1, dim: sizes.keys };
    let zeros = Tensor::<f32>::zeros(shape).unwrap();
    for mask in masks() {
        for cpu in cpus() {
            let exact = Attention::new().mask(mask.clone()).cpu(cpu);
            let relative = exact.clone().relative_encoding(encoding.view());
            let got = forward(&relative, &call, false);
            let biased = exact.clone().bias(zeros.view());
            assert_eq!(got, forward(&biased, &call, false), "{mask} {}", cpu.level);
            let plain = forward(&exact, &call, false);
            for (a, b) in got.out.as_slice().iter().zip(plain.out.as_slice()) {
                assert!((a - b).abs() <= 2e-6, "{mask} {}: {a} {b}", cpu.level);
            }
            let (d, expected) = (backward(&relative, &call, &encoding), call.run(&biased));
            assert_eq!((d.d_k, d.d_v), (expected.d_k, expected.d_v), "{mask} {}", cpu.level);
            assert_eq!(d.d_q, expected.d_q, "{mask} {}", cpu.level);
        }
    }
}

/// A memory in front of a segment is nothing but keys: the segment's rows are those of one long call.
#[test]
fn a_segment_over_its_memory_is_the_end_of_a_long_prompt() {
    let sizes = Sizes { batch: 1, queries: 500, keys: 500, ..SIZES };
    let call = Call::<f32>::random(sizes, 12);
    let encoding = Encoding::random(500, sizes, 13);
    let attention = Attention::new().mask(Mask::window(180)).relative_encoding(encoding.view());
    let whole = forward(&attention, &call, false);
    // A window of 180 reaches back to key 500 − 100 − 179.
    let (first, memory) = (400, 179);
    let copy = |x: &Tensor<f32>, start: usize| {
        let Shape { heads, dim, .. } = x.shape();
        let part = x.as_slice()[start * heads * dim..].to_vec();
        Tensor::from_vec(part, Shape { seq: 500 - start, ..x.shape() }).unwrap()
    };
    let start = first - memory;
    let (q, k, v) = (copy(&call.q, first), copy(&call.k, start), copy(&call.v, start));
    let segment = forward(&attention, &Call { q, k, v, ..call.clone() }, false);
    for (a, b) in segment.out.as_slice().iter().zip(copy(&whole.out, first).as_slice()) {
        assert!((a - b).abs() <= 1e-6, "{a} {b}");
    }
}

/// Row `i` sees a key at distance `p` if that is in the window and there is one.
#[test]
fn a_nan_by_distance_reaches_the_rows_that_see_it() {
    let sizes = Sizes { batch: 1, queries: 150, keys: 300, kv_heads: 4, ..SIZES };
    let clean = Encoding::random(300, sizes, 14);
    let call = Call::<f32>::random(sizes, 15);
    let (p, head) = (180, 1);
    let mut encoding = clean.clone();
    let mut keys = encoding.keys.clone().into_vec();
    keys[(p * sizes.heads + head) * sizes.dim + 3] = f32::NAN;
    encoding.keys = Tensor::from_vec(keys, encoding.keys.shape()).unwrap();
    for mask in [Mask::causal(), Mask::window(170)] {
        let attention = Attention::new().mask(mask.clone());
        let [bad, good] =
            [&encoding, &clean].map(|x| attention.clone().relative_encoding(x.view()));
        let (got, expected) = (forward(&bad, &call, false), forward(&good, &call, false));
        let (d, d_good) = (backward(&bad, &call, &encoding), backward(&good, &call, &clean));
        for (i, h) in (0..sizes.queries).flat_map(|i| (0..sizes.heads).map(move |h| (i, h))) {
            let reached = h == head && i + 150 >= p && mask.to_string().contains("causal");
            let (got, expected) =
                (got.out.view().row(0, i, h)[0], expected.out.view().row(0, i, h)[0]);
            assert_eq!(got.is_nan(), reached, "{mask} {i} {h}");
            assert!(reached || got == expected, "{mask} {i} {h}");
            let at = (i * sizes.heads + h) * sizes.dim;
            assert_eq!(d.d_q[at].is_nan(), reached, "{mask} {i} {h}");
            assert!(reached || (d.d_q[at] - d_good.d_q[at]).abs() < 1e-5, "{mask} {i} {h}");
        }
        for (n, (got, expected)) in d.d_content_bias.iter().zip(&d_good.d_content_bias).enumerate()
        {
            let reached = n / sizes.dim == head && mask.to_string().contains("causal");
            assert_eq!(got.is_nan(), reached, "{mask} {n}");
            assert!(reached || (got - expected).abs() < 2e-5, "{mask} {n}: {got} {expected}");
        }
        for (n, (got, expected)) in d.d_keys.iter().zip(&d_good.d_keys).enumerate() {
            if n / sizes.dim % sizes.heads != head {
                assert_eq!(got, expected, "{mask} {n}");
            }
        }
    }
}

#[test]
fn a_nan_in_a_bias_stays_in_its_head() {
    let sizes = Sizes { batch: 2, queries: 20, keys: 40, ..SIZES };
    let call = Call::<f32>::random(sizes, 16);
    for which in 0..2 {
        let mut encoding = Encoding::random(40, sizes, 17);
        let bias =
            if which == 0 { &mut encoding.content_bias } else { &mut encoding.position_bias };
        bias[2 * sizes.dim] = f32::INFINITY;
        let attention = Attention::new().mask(Mask::causal()).relative_encoding(encoding.view());
        let (out, d) =
            (forward(&attention, &call, false).out, backward(&attention, &call, &encoding));
        for (n, x) in out.as_slice().iter().enumerate() {
            assert_eq!(x.is_finite(), n / sizes.value_dim % sizes.heads != 2, "{which} {n} {x}");
        }
        for (n, x) in d.d_q.iter().enumerate() {
            let other = n / sizes.dim % sizes.heads != 2;
            assert!(!other || x.is_finite(), "{which} {n} {x}");
        }
    }
}

/// Keys by distance may lie with any strides.
#[test]
fn strides_of_keys_by_distance_change_nothing() {
    let sizes = Sizes { queries: 60, keys: 130, ..SIZES };
    let call = Call::<f32>::random(sizes, 18);
    let encoding = Encoding::random(130, sizes, 19);
    let mut random = Random::new(20);
    let (heads, dim) = (sizes.heads, sizes.dim);
    // Head by head, with gaps.
    let mut numbers: Vec<f32> = (0..heads * 200 * 16).map(|_| random.number()).collect();
    for (h, p) in (0..heads).flat_map(|h| (0..130).map(move |p| (h, p))) {
        numbers[(h * 200 + p) * 16..][..dim].copy_from_slice(encoding.keys.view().row(0, p, h));
    }
    let strides = foveal::Strides { batch: 0, seq: 16, heads: 200 * 16 };
    let keys = foveal::TensorRef::from_strides(&numbers, encoding.keys.shape(), strides).unwrap();
    let strided = foveal::position::RelativeEncoding::new(
        keys,
        &encoding.content_bias,
        &encoding.position_bias,
    );
    for decode in [false, true] {
        let attention = Attention::new().mask(Mask::causal());
        let [a, b] = [strided.clone().unwrap(), encoding.view()]
            .map(|x| forward(&attention.clone().relative_encoding(x), &call, decode));
        assert_eq!(a, b);
    }
}

/// A cache that forgets what lies behind the memory gives the bits of one that keeps everything, segment by segment.
#[test]
fn a_cache_that_forgets_behind_the_memory_changes_no_bit() {
    let sizes = Sizes { batch: 1, queries: 900, keys: 900, kv_heads: 4, ..SIZES };
    let call = Call::<f32>::random(sizes, 21);
    let (segment, memory) = (60, 200);
    let encoding = Encoding::random(memory, sizes, 22);
    for cpu in cpus() {
        let mask = Mask::window(memory);
        let attention = Attention::new().mask(mask).relative_encoding(encoding.view()).cpu(cpu);
        let [mut kept, mut forgetting] =
            [(); 2].map(|()| ContiguousCache::<f32>::new(4, (12, 9), 900).unwrap());
        for start in (0..900).step_by(segment) {
            let range = start..start + segment;
            let [k, v] = [&call.k, &call.v].map(|x| tokens(x, range.clone()));
            forgetting.forget(start.saturating_sub(memory));
            let q = tokens(&call.q, range.clone());
            let mut results = vec![];
            for cache in [&mut kept, &mut forgetting] {
                cache.append(k, v).unwrap();
                for decode in [false, true] {
                    let k = Shape { seq: range.end, ..call.k.shape() };
                    let v = Shape { dim: 9, ..k };
                    let plan = match decode {
                        true => attention.plan_decode(q.shape(), k, v).unwrap(),
                        false => attention.plan(q.shape(), k, v).unwrap(),
                    };
                    let mut out = Tensor::<f32>::zeros(plan.out_shape()).unwrap();
                    let mut workspace = Workspace::for_plan(&plan);
                    workspace.poison();
                    let stores: [&dyn KvStore; 1] = [&*cache];
                    plan.forward_cached(q, &stores, (out.view_mut(), None), &mut workspace)
                        .unwrap();
                    results.push(out);
                }
            }
            assert_eq!(results[0], results[2], "{} {range:?}", cpu.level);
            assert_eq!(results[1], results[3], "{} {range:?}", cpu.level);
        }
    }
}
