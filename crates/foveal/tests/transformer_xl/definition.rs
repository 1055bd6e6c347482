//! The engine against the definition, and the definition against itself.

use super::support::backward::Call;
use super::support::sizes::{Sizes, masks};
use super::support::{Random, cpus, error};
use super::{Encoding, backward, check_backward, define, forward};
use foveal::inspect::Forwarded;
use foveal::mask::Pattern;
use foveal::reference::{
    Derivatives, Input, Options, Relative, attention_backward, attention_with,
};
use foveal::{Attention, Element, Mask, Scale, Shape};
use half::{bf16, f16};

fn sizes(batch: usize, [queries, keys]: [usize; 2], heads: [usize; 2], dims: [usize; 2]) -> Sizes {
    let [[heads, kv_heads], [dim, value_dim]] = [heads, dims];
    Sizes { batch, queries, keys, heads, kv_heads, dim, value_dim }
}

/// Both phases and gradients at every level.
fn check<E: Element>(
    sizes: Sizes,
    distances: usize,
    (mask, scale, softcap): (&Mask, f32, Option<f32>),
    bounds: [f64; 4],
) {
    let call = Call::<E>::random(sizes, (sizes.queries * 1000 + sizes.keys) as u64);
    let encoding = Encoding::random(distances, sizes, 5);
    let mut attention = Attention::new()
        .mask(mask.clone())
        .scale(Scale::Value(scale))
        .relative_encoding(encoding.view());
    if let Some(cap) = softcap {
        attention = attention.softcap(cap);
    }
    encoding.wide(|relative| {
        let options = Options {
            relative: Some(relative),
            softcap: softcap.map(f64::from),
            ..Options::new(scale.into(), mask)
        };
        let (out, lse) = define(&call, &options);
        for cpu in cpus() {
            let attention = attention.clone().cpu(cpu);
            let what = format!("{sizes:?}, {distances} distances, {mask}, {scale}, {}", cpu.level);
            for decode in [false, true].into_iter().filter(|decode| !decode || sizes.queries <= 64)
            {
                let got = forward(&attention, &call, decode);
                let wide: Vec<f32> = got.out.as_slice().iter().map(|x| x.to_f32()).collect();
                let worst = error(&wide, &out);
                assert!(worst <= bounds[0], "{what}, {decode}: output off by {worst:e}");
                let worst = error(got.lse.as_slice(), &lse);
                assert!(worst <= bounds[1], "{what}, {decode}: log-sum-exp off by {worst:e}");
            }
            let got = backward(&attention, &call, &encoding);
            check_backward(&what, &got, (&call, &options), [bounds[2], bounds[3]]);
        }
    });
}

/// Of output, log-sum-exp, gradients in the storage type, and gradients of the encoding.
const F32: [f64; 4] = [1e-6, 1e-6, 5e-6, 5e-6];

#[test]
fn all_small_segments_and_memories() {
    for queries in 0..=6 {
        for memory in [0, 1, 2, 3, 5, 17] {
            let sizes = sizes(2, [queries, queries + memory], [2, 1], [3, 2]);
            for distances in [1, 4, sizes.keys.max(1)] {
                check::<f32>(sizes, distances, (&Mask::causal(), 0.7, None), F32);
            }
            let window = Mask::window(memory.max(2));
            check::<f32>(sizes, sizes.keys.max(1), (&window, 0.7, None), F32);
        }
    }
}

#[test]
fn more_queries_than_keys() {
    for mask in [Mask::causal(), Mask::full(), Mask::window(2)] {
        let sizes = sizes(1, [7, 3], [2, 2], [4, 4]);
        check::<f32>(sizes, 3, (&mask, 0.5, None), F32);
        check::<f32>(Sizes { keys: 0, ..sizes }, 3, (&mask, 0.5, None), F32);
    }
}

#[test]
fn every_mask() {
    for (queries, keys) in [(9, 70), (49, 300), (130, 330)] {
        let sizes = sizes(2, [queries, keys], [4, 2], [7, 5]);
        for mask in masks(sizes) {
            check::<f32>(sizes, keys, (&mask, 0.4, None), F32);
        }
    }
}

/// Segments and memories at the edges of tiles of 48 and 96 rows and of 256 keys, with heads of several sizes.
#[test]
fn edges_of_tiles() {
    for ([queries, memory], [dim, value_dim]) in [
        ([47, 209], [16, 16]),
        ([48, 208], [17, 9]),
        ([49, 720], [64, 64]),
        ([95, 1], [1, 1]),
        ([96, 160], [33, 16]),
        ([97, 415], [12, 40]),
        ([150, 0], [8, 8]),
        ([289, 300], [20, 12]),
        ([3, 1021], [64, 32]),
    ] {
        let sizes = sizes(1, [queries, queries + memory], [2, 2], [dim, value_dim]);
        let scale = 1.0 / (dim as f32).sqrt();
        let same_length = Mask::window(memory + 1);
        for (mask, distances) in [
            (&Mask::causal(), sizes.keys),
            (&same_length, sizes.keys),
            (&Mask::causal(), sizes.keys / 3 + 1),
            (&Mask::full(), 2 * sizes.keys),
        ] {
            check::<f32>(sizes, distances, (mask, scale, None), F32);
        }
    }
}

#[test]
fn scales_caps_and_groups() {
    let sizes = sizes(2, [70, 200], [6, 2], [10, 6]);
    for scale in [0.5, -0.5, 0.0] {
        for softcap in [None, Some(1.5)] {
            check::<f32>(sizes, 150, (&Mask::causal(), scale, softcap), F32);
        }
    }
    // From 12 heads a group on, generated tokens take packed tiles.
    let wide = Sizes { heads: 24, batch: 1, queries: 5, keys: 290, ..sizes };
    check::<f32>(wide, 300, (&Mask::causal(), 0.3, None), F32);
}

#[test]
fn sixteen_bits() {
    let sizes = sizes(1, [60, 340], [2, 2], [32, 16]);
    // Gradients in f32 know the output by its rounding to 16 bits, through D.
    for mask in [Mask::causal(), Mask::window(100)] {
        check::<f16>(sizes, 340, (&mask, 0.18, None), [5e-4, 2e-6, 1e-3, 5e-4]);
        check::<bf16>(sizes, 340, (&mask, 0.18, None), [4e-3, 2e-6, 8e-3, 4e-3]);
    }
}

#[test]
fn weights_are_made_again() {
    let sizes = sizes(2, [55, 300], [4, 2], [9, 5]);
    let call = Call::<f32>::random(sizes, 8);
    let encoding = Encoding::random(200, sizes, 9);
    for mask in masks(sizes) {
        encoding.wide(|relative| {
            let options = Options { relative: Some(relative), ..Options::new(1.0 / 3.0, &mask) };
            for cpu in cpus() {
                let attention =
                    Attention::new().mask(mask.clone()).relative_encoding(encoding.view()).cpu(cpu);
                let result = forward(&attention, &call, false);
                let plan = attention.plan(call.q.shape(), call.k.shape(), call.v.shape()).unwrap();
                let of = Forwarded::new(call.q.view(), call.k.view(), result.lse.view());
                let got = plan.probabilities(of, 0..sizes.queries).unwrap();
                let worst = error(got.as_slice(), &weights(&call, &options));
                assert!(worst <= 5e-6, "{mask} {}: off by {worst:e}", cpu.level);
            }
        });
    }
}

/// Weights as outputs for values that are rows of the identity.
fn weights(call: &Call<f32>, options: &Options<'_>) -> Vec<f64> {
    let (q, k) = (call.q.shape(), call.k.shape());
    let wide = |x: &[f32]| -> Vec<f64> { x.iter().map(|&x| x.into()).collect() };
    let [queries, keys] = [&call.q, &call.k].map(|x| wide(x.as_slice()));
    let identity: Vec<f64> = (0..k.batch * k.seq * k.heads * k.seq)
        .map(|n| f64::from(u8::from(n / k.seq / k.heads % k.seq == n % k.seq)))
        .collect();
    let inputs = [
        Input { data: &queries, shape: q },
        Input { data: &keys, shape: k },
        Input { data: &identity, shape: Shape { dim: k.seq, ..k } },
    ];
    attention_with(inputs, options).unwrap().out
}

/// A loss over both results of a small attention.
struct Small {
    /// Queries, keys, values, keys by distance, u, v.
    numbers: [Vec<f64>; 6],
    upstream: [Vec<f64>; 2],
}

const Q: Shape = Shape { batch: 2, seq: 3, heads: 4, dim: 3 };
const K: Shape = Shape { seq: 5, heads: 2, ..Q };
const V: Shape = Shape { dim: 2, ..K };
const R: Shape = Shape { batch: 1, seq: 4, ..Q };

impl Small {
    fn new() -> Small {
        let mut random = Random::new(21);
        let mut numbers = |n: usize| (0..n).map(|_| f64::from(random.number())).collect::<Vec<_>>();
        let biases = Q.heads * Q.dim;
        let lengths = [Q, K, V, R].map(|shape| shape.checked_len().unwrap());
        let [q, k, v, r] = lengths;
        Small {
            numbers: [q, k, v, r, biases, biases].map(&mut numbers),
            upstream: [2 * 3 * 4 * 2, 2 * 3 * 4].map(numbers),
        }
    }

    fn with<T>(
        &self,
        mask: &dyn Pattern,
        run: impl FnOnce([Input<'_>; 3], &Options<'_>) -> T,
    ) -> T {
        let [q, k, v, r, u, w] = &self.numbers;
        let inputs = [(q, Q), (k, K), (v, V)].map(|(data, shape)| Input { data, shape });
        let keys = Input { data: r, shape: R };
        let relative = Some(Relative { keys, content_bias: u, position_bias: w });
        run(inputs, &Options { relative, softcap: Some(0.9), ..Options::new(0.8, mask) })
    }

    fn loss(&self, mask: &Mask) -> f64 {
        let result = self.with(mask, |inputs, options| attention_with(inputs, options).unwrap());
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        dot(&result.out, &self.upstream[0]) + dot(&result.lse, &self.upstream[1])
    }

    fn derivatives(&self, mask: &Mask) -> Derivatives {
        let d_out = Input { data: &self.upstream[0], shape: Shape { dim: 2, ..Q } };
        let d_lse = Input { data: &self.upstream[1], shape: Q.per_row() };
        self.with(mask, |inputs, options| {
            attention_backward(inputs, options, [d_out, d_lse]).unwrap()
        })
    }
}

#[test]
fn the_definition_agrees_with_finite_differences() {
    // Of five keys and four distances, the oldest are clamped; under the full mask those ahead are, too.
    for mask in [Mask::full(), Mask::causal(), Mask::window(2)] {
        let mut small = Small::new();
        let d = small.derivatives(&mask);
        let all = [d.d_q, d.d_k, d.d_v, d.d_relative_keys, d.d_content_bias, d.d_position_bias];
        for (which, gradient) in all.iter().enumerate() {
            assert_eq!(gradient.len(), small.numbers[which].len());
            for (n, &got) in gradient.iter().enumerate() {
                let step = 1e-5;
                let mut moved = |by: f64| {
                    small.numbers[which][n] += by;
                    small.loss(&mask)
                };
                let (above, below) = (moved(step), moved(-2.0 * step));
                moved(step);
                let expected = (above - below) / (2.0 * step);
                assert!((got - expected).abs() < 1e-8, "{mask} {which} {n}: {got} {expected}");
            }
        }
    }
}
