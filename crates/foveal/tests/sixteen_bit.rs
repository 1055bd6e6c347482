//! Attention in f16 and bf16 against the definition in f64 on the same rounded inputs. The yardstick is the plain
//! computation in the same type: products summed in f32 and rounded, a softmax of them rounded, and its product with
//! the values rounded. Errors are at most twice its errors, on every level, in both phases.

mod support;

use foveal::cache::{ContiguousCache, KvStore};
use foveal::mask::{Band, Dense, Documents, Extent, Site};
use foveal::reference::{Input, Options, attention_with};
use foveal::{
    Attention, Cpu, Dropout, Element, Level, MAX_GENERATED_ROWS, Mask, Scale, Shape, Tensor,
    Threads, Workspace,
};
use half::{bf16, f16};
use std::num::NonZeroUsize;
use support::attention::{Problem, bucketed_problems, packed_problems, problems};
use support::{Random, cpus, error, tokens};

/// The attention of rounded inputs as it is defined, and the largest error of the plain computation in `E`.
struct Yardstick {
    out: Vec<f64>,
    lse: Vec<f64>,
    /// Relative to 1 + the largest number, as [`error`] gives it.
    plain: f64,
}

impl Yardstick {
    fn new<E: Element>([q, k, v]: [&Tensor<E>; 3], options: &Options<'_>) -> Yardstick {
        let wide = |x: &Tensor<E>| -> Vec<f64> {
            x.as_slice().iter().map(|x| x.to_f32().into()).collect()
        };
        let data = [wide(q), wide(k), wide(v)];
        let shapes = [q.shape(), k.shape(), v.shape()];
        let inputs = [0, 1, 2].map(|n| Input { data: &data[n], shape: shapes[n] });
        let result = attention_with(inputs, options).unwrap();
        let plain = plain([q, k, v], options);
        let plain = error(&plain, &result.out);
        Yardstick { out: result.out, lse: result.lse, plain }
    }

    fn check<E: Element>(&self, what: &str, out: &Tensor<E>, lse: &Tensor<f32>, lse_bound: f64) {
        let got: Vec<f32> = out.as_slice().iter().map(|x| x.to_f32()).collect();
        let worst = error(&got, &self.out);
        // Where the plain computation happens to be exact, nothing but rounding of f32 is left.
        let bound = 2.0 * self.plain.max(1e-6);
        assert!(worst <= bound, "{what}: output off by {worst:e}, plainly by {:e}", self.plain);
        let worst = error(lse.as_slice(), &self.lse);
        assert!(worst <= lse_bound, "{what}: log-sum-exp off by {worst:e}");
    }
}

/// Row by row in the type itself.
fn plain<E: Element>([q, k, v]: [&Tensor<E>; 3], options: &Options<'_>) -> Vec<f32> {
    let round = |x: f64| f64::from(E::from_f32(x as f32).to_f32());
    let Shape { batch, seq, heads, dim: _ } = q.shape();
    let (keys, width) = (k.shape().seq, v.shape().dim);
    let group = heads / k.shape().heads.max(1);
    let mut out = vec![0.0; batch * seq * heads * width];
    let rows =
        (0..batch).flat_map(|b| (0..seq).flat_map(move |i| (0..heads).map(move |h| (b, i, h))));
    for ((batch, i, head), out) in rows.zip(out.chunks_exact_mut(width)) {
        let at = Site { batch, q_head: head, kv_head: head / group };
        let position = i as isize + keys as isize - seq as isize;
        let query = q.view().row(batch, i, head);
        let score = |j: usize| {
            let key = k.view().row(batch, j, at.kv_head);
            let dot: f32 = query.iter().zip(key).map(|(a, b)| a.to_f32() * b.to_f32()).sum();
            let mut score = round(round(dot.into()) * options.scale);
            if let Some(cap) = options.softcap {
                score = round(cap * (score / cap).tanh());
            }
            round(score + options.bias.map_or(0.0, |bias| bias(at, i, j)))
        };
        let seen: Vec<usize> =
            (0..keys).filter(|&j| options.mask.allows(at, position, j)).collect();
        let scores: Vec<f64> = seen.iter().map(|&j| score(j)).collect();
        let sink = options.sinks.map(|sinks| sinks[head]);
        let max = scores.iter().copied().chain(sink).fold(f64::NEG_INFINITY, f64::max);
        if max == f64::NEG_INFINITY {
            continue;
        }
        let sum: f64 = scores.iter().copied().chain(sink).map(|s| (s - max).exp()).sum();
        let kept = |j: usize| options.dropout.map_or(1.0, |dropout| dropout(at, i, j));
        let weights = seen.iter().zip(&scores).map(|(&j, s)| (s - max).exp() / sum * kept(j));
        let weights: Vec<f32> = weights.map(|weight| round(weight) as f32).collect();
        for (d, out) in out.iter_mut().enumerate() {
            let value = |&j: &usize| v.view().row(batch, j, at.kv_head)[d].to_f32();
            let products = seen.iter().zip(&weights).map(|(j, weight)| weight * value(j));
            *out = round(products.sum::<f32>().into()) as f32;
        }
    }
    out
}

/// Both phases of a call, the second if it has few enough rows.
fn run<E: Element>(
    attention: &Attention<'_>,
    [q, k, v]: [&Tensor<E>; 3],
) -> Vec<(Tensor<E>, Tensor<f32>)> {
    let mut results = vec![attention.forward(q.view(), k.view(), v.view()).unwrap()];
    if q.shape().seq <= MAX_GENERATED_ROWS {
        results.push(attention.decode(q.view(), k.view(), v.view()).unwrap());
    }
    results.into_iter().map(|result| (result.out, result.lse)).collect()
}

fn golden<E: Element>(problem: &Problem) {
    let [q, k, v] = problem.inputs.each_ref().map(|(shape, data)| {
        let data = data.iter().map(|&x| E::from_f32(x as f32)).collect();
        Tensor::<E>::from_vec(data, *shape).unwrap()
    });
    let terms = &problem.terms;
    let sinks: Option<Vec<f64>> =
        terms.sinks.as_ref().map(|sinks| sinks.iter().map(|&x| x.into()).collect());
    let extent = problem.extent();
    let bias = |at: Site, row: usize, j: usize| terms.added(extent, at, row, j);
    let (_, mask) = &problem.masks[0];
    let options = Options {
        softcap: terms.softcap.map(f64::from),
        bias: Some(&bias),
        sinks: sinks.as_deref(),
        ..Options::new(problem.scale, mask)
    };
    let yardstick = Yardstick::new([&q, &k, &v], &options);
    let lse_bound = problem.case.tolerance("f32");
    for (form, mask) in &problem.masks {
        for cpu in cpus() {
            let attention = Attention::new().scale(Scale::Value(problem.scale as f32));
            let attention = terms.describe(attention.mask(mask.clone()).cpu(cpu));
            for (phase, (out, lse)) in run(&attention, [&q, &k, &v]).iter().enumerate() {
                let name = &problem.case.name;
                let what = format!("{name} {form} {} {} phase {phase}", E::DTYPE, cpu.level);
                yardstick.check(&what, out, lse, lse_bound);
            }
        }
    }
}

#[test]
fn golden_calls() {
    let more = [packed_problems(), bucketed_problems()];
    for problem in problems().iter().chain(more.iter().flatten()) {
        golden::<bf16>(problem);
        golden::<f16>(problem);
    }
}

fn tensors<E: Element>(q: Shape, k: Shape, value_dim: usize) -> [Tensor<E>; 3] {
    let mut random = Random::new((q.seq * 31 + k.seq * 7 + q.dim) as u64);
    let v = Shape { dim: value_dim, ..k };
    [random.tensor(q, 2.0), random.tensor(k, 2.0), random.tensor(v, 1.0)]
}

fn shapes<E: Element>(q: Shape, k: Shape, value_dim: usize, masks: &[Mask]) {
    let [q, k, v] = tensors::<E>(q, k, value_dim);
    let scale = 1.0 / (q.shape().dim as f64).sqrt();
    for mask in masks {
        let options = Options::new(scale, mask);
        let yardstick = Yardstick::new([&q, &k, &v], &options);
        for cpu in cpus() {
            let attention = Attention::new().mask(mask.clone()).cpu(cpu);
            for (phase, (out, lse)) in run(&attention, [&q, &k, &v]).iter().enumerate() {
                let (q, k) = (q.shape(), k.shape());
                let what = format!("{} {q:?} {k:?} {mask} {} phase {phase}", E::DTYPE, cpu.level);
                yardstick.check(&what, out, lse, 2e-6);
            }
        }
    }
}

#[test]
fn all_small_shapes() {
    for queries in 0..=9 {
        for keys in 0..=9 {
            let n = queries * 3 + keys;
            let dim = [1, 2, 3, 7, 8, 9, 16, 17, 31, 33][n % 10];
            let (heads, kv_heads) = [(1, 1), (2, 1), (2, 2), (6, 3), (12, 1), (26, 2)][n % 6];
            let value_dim = [1, 5, 16, 17, 40][(queries + 2 * keys) % 5];
            let q = Shape { batch: 2, seq: queries, heads, dim };
            let k = Shape { seq: keys, heads: kv_heads, ..q };
            let masks = [Mask::full(), Mask::causal(), Mask::window(3), Mask::window(0)];
            shapes::<bf16>(q, k, value_dim, &masks);
            shapes::<f16>(q, k, value_dim, &masks);
        }
    }
}

#[test]
fn few_rows_over_many_keys() {
    for (n, queries) in [1, 2, 3, 5, 6, 7, 13, 16, 31, 48, 49, 64].into_iter().enumerate() {
        let keys = [300, 257, 511, 290, 1025][n % 5];
        let (heads, kv_heads) = [(4, 1), (2, 2), (8, 2), (13, 1), (5, 1)][n % 5];
        let (dim, value_dim) =
            [(64, 64), (33, 47), (128, 128), (80, 31), (256, 96), (15, 130)][n % 6];
        let q = Shape { batch: 1, seq: queries, heads, dim };
        let k = Shape { seq: keys, heads: kv_heads, ..q };
        let extent = Extent { batch: 1, heads: 1, queries, keys };
        let mut random = Random::new(5);
        let visible: Vec<bool> = (0..queries * keys).map(|_| random.below(3) == 0).collect();
        let causal = Band { behind: None, ahead: Some(0) };
        let starts = [0, queries / 2, queries];
        let documents = Documents::new(&starts, &[0, keys / 3, keys]).unwrap();
        let masks = [
            Mask::causal(),
            Mask::window(37),
            Dense::new(&visible, extent).unwrap().into(),
            documents.within(causal).into(),
        ];
        shapes::<bf16>(q, k, value_dim, &masks);
    }
}

#[test]
fn shapes_beyond_a_tile() {
    for (queries, keys, dim) in [(97, 300, 64), (300, 300, 40), (70, 1100, 129)] {
        let q = Shape { batch: 1, seq: queries, heads: 4, dim };
        let k = Shape { seq: keys, heads: 2, ..q };
        let masks = [Mask::full(), Mask::causal(), Mask::window(130)];
        shapes::<bf16>(q, k, dim, &masks);
        shapes::<f16>(q, k, dim, &masks);
    }
}

#[test]
fn dropped_weights() {
    let shape = Shape { batch: 2, seq: 41, heads: 13, dim: 24 };
    let dropout = Dropout { rate: 0.3, seed: 11 };
    for kv_heads in [1, 13] {
        let keys = Shape { seq: 290, heads: kv_heads, ..shape };
        let [q, k, v] = tensors::<bf16>(shape, keys, 24);
        let mask = Mask::causal();
        let dropped = |at: Site, row: usize, j: usize| -> f64 {
            dropout.factor((at.batch, at.q_head), (row + keys.seq - shape.seq) as isize, j).into()
        };
        let scale = 1.0 / (shape.dim as f64).sqrt();
        let options = Options { dropout: Some(&dropped), ..Options::new(scale, &mask) };
        let yardstick = Yardstick::new([&q, &k, &v], &options);
        for cpu in cpus() {
            let attention = Attention::new().mask(mask.clone()).dropout(dropout).cpu(cpu);
            for (out, lse) in run(&attention, [&q, &k, &v]) {
                yardstick.check(&format!("{kv_heads} {}", cpu.level), &out, &lse, 2e-6);
            }
        }
    }
}

/// Turning the queries around is exact, and a scale of 0 makes an average.
#[test]
fn any_scale() {
    let shape = Shape { batch: 1, seq: 9, heads: 2, dim: 7 };
    let [q, k, v] = tensors::<bf16>(shape, Shape { seq: 70, heads: 1, ..shape }, 8);
    for scale in [1.0f32, -0.7, 0.0] {
        let (mask, wide) = (Mask::causal(), f64::from(scale));
        let options = Options::new(wide, &mask);
        let yardstick = Yardstick::new([&q, &k, &v], &options);
        for cpu in cpus() {
            let attention =
                Attention::new().mask(Mask::causal()).scale(Scale::Value(scale)).cpu(cpu);
            for (out, lse) in run(&attention, [&q, &k, &v]) {
                yardstick.check(&format!("scale {scale} {}", cpu.level), &out, &lse, 2e-6);
            }
        }
    }
}

/// Whatever queries are multiplied by when they are copied, NaN and infinities among them are not lost.
#[test]
fn bad_queries_reach_their_rows_at_any_scale() {
    let shape = Shape { batch: 1, seq: 3, heads: 2, dim: 7 };
    for keys in [20, 70] {
        let [q, k, v] = tensors::<bf16>(shape, Shape { seq: keys, heads: 1, ..shape }, 8);
        for (scale, bad) in
            [1.0, -1.0, 0.0].into_iter().zip([f32::NAN, f32::NEG_INFINITY, f32::NAN])
        {
            let mut queries = q.as_slice().to_vec();
            // Query 1 of head 0, in either half of a pair.
            queries[14 + usize::from(keys == 20)] = bf16::from_f32(bad);
            let queries = Tensor::from_vec(queries, shape).unwrap();
            for cpu in cpus() {
                let attention = Attention::new().scale(Scale::Value(scale)).cpu(cpu);
                for (phase, (out, _)) in run(&attention, [&queries, &k, &v]).iter().enumerate() {
                    for (n, out) in out.as_slice().chunks(8).enumerate() {
                        let finite = out.iter().all(|x| x.to_f32().is_finite());
                        assert_eq!(finite, n != 2, "{} {scale} {keys} {phase} {n}", cpu.level);
                    }
                }
            }
        }
    }
}

/// A prompt's bits do not depend on how it is cut, short pieces included, nor a row's on its company or on threads.
#[test]
fn bits_depend_on_nothing_else() {
    for (heads, kv_heads, dim) in [(4, 2, 24), (2, 2, 33), (13, 1, 40)] {
        let shape = Shape { batch: 1, seq: 320, heads, dim };
        let [q, k, v] = tensors::<bf16>(shape, Shape { heads: kv_heads, ..shape }, dim);
        for Cpu { level, .. } in cpus() {
            let with = |threads: usize| {
                let threads = Threads::at_most(NonZeroUsize::new(threads).unwrap());
                Attention::new().mask(Mask::causal()).cpu(Cpu { level, threads })
            };
            let whole = with(1).forward(q.view(), k.view(), v.view()).unwrap();
            assert_eq!(whole, with(3).forward(q.view(), k.view(), v.view()).unwrap());
            let last = tokens(&q, 300..320);
            let rows = with(1).decode(last, k.view(), v.view()).unwrap();
            assert_eq!(rows, with(2).decode(last, k.view(), v.view()).unwrap());
            let mut cache = ContiguousCache::<bf16>::new(kv_heads, (dim, dim), 320).unwrap();
            let (mut pieces, mut single) = (vec![], vec![]);
            let cuts = [0, 1, 50, 64, 257, 300, 310, 320];
            for piece in cuts.windows(2).map(|cut| cut[0]..cut[1]) {
                cache.append(tokens(&k, piece.clone()), tokens(&v, piece.clone())).unwrap();
                let run = |generated: bool, rows: std::ops::Range<usize>| {
                    let queries = tokens(&q, rows);
                    let kv = Shape { seq: piece.end, heads: kv_heads, ..shape };
                    let attention = with(1);
                    let plan = match generated {
                        true => attention.plan_decode(queries.shape(), kv, kv),
                        false => attention.plan(queries.shape(), kv, kv),
                    };
                    let plan = plan.unwrap();
                    let poison = vec![bf16::NAN; queries.shape().checked_len().unwrap()];
                    let mut out = Tensor::from_vec(poison, queries.shape()).unwrap();
                    let mut workspace = Workspace::for_plan(&plan);
                    workspace.poison();
                    let stores: [&dyn KvStore; 1] = [&cache];
                    plan.forward_cached(queries, &stores, (out.view_mut(), None), &mut workspace)
                        .unwrap();
                    out.into_vec()
                };
                pieces.extend(run(false, piece.clone()));
                if piece.start >= 300 {
                    single.extend(run(true, piece.clone()));
                }
            }
            assert_eq!(pieces, whole.out.as_slice(), "{level} {heads} heads");
            assert_eq!(single, rows.out.as_slice(), "{level} {heads} heads");
        }
    }
}

/// What a row may not see does not reach it, neighbours of a pair included.
#[test]
fn bad_numbers_stay_where_they_may_be_seen() {
    for (heads, kv_heads, dim) in [(4, 2, 24), (2, 2, 33), (13, 1, 40)] {
        let shape = Shape { batch: 1, seq: 300, heads, dim };
        let kv = Shape { heads: kv_heads, ..shape };
        let [q, k, v] = tensors::<bf16>(shape, kv, dim);
        let spoiled = |x: &Tensor<bf16>, first: usize, with: f32| {
            let mut data = x.as_slice().to_vec();
            data[first * kv_heads * dim..].fill(bf16::from_f32(with));
            Tensor::from_vec(data, kv).unwrap()
        };
        for cpu in cpus() {
            let attention = Attention::new().mask(Mask::causal()).cpu(cpu);
            let clean = run_at(&attention, [&q, &k, &v]);
            for first in [1, 7, 255, 256, 299] {
                for with in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e30] {
                    for [k, v] in [[&spoiled(&k, first, with), &v], [&k, &spoiled(&v, first, with)]]
                    {
                        for (phase, (got, clean)) in
                            run_at(&attention, [&q, k, v]).iter().zip(&clean).enumerate()
                        {
                            let at = (first.saturating_sub(phase * 280)) * heads * dim;
                            let what =
                                format!("{} from {first} on {with} phase {phase}", cpu.level);
                            assert_eq!(got[..at], clean[..at], "{what}");
                            let seen = got[at..].iter().all(|x| x.to_f32().is_finite());
                            assert!(with.is_finite() || !seen, "{what}: nothing arrived");
                        }
                    }
                }
            }
        }
    }
}

/// The whole prompt, and its last 20 rows as generated ones.
fn run_at(attention: &Attention<'_>, [q, k, v]: [&Tensor<bf16>; 3]) -> [Vec<bf16>; 2] {
    let prompt = attention.forward(q.view(), k.view(), v.view()).unwrap();
    let rows = attention.decode(tokens(q, 280..300), k.view(), v.view()).unwrap();
    [prompt.out.into_vec(), rows.out.into_vec()]
}

/// f32 and f16 take the same code on the last two levels; bf16 does not.
#[test]
fn pairs_are_for_bf16_alone() {
    let (Ok(numbers), Ok(pairs)) = (Level::named("avx512"), Level::named("avx512bf16")) else {
        return;
    };
    fn same<E: Element + PartialEq>([a, b]: [Level; 2]) -> bool {
        let shape = Shape { batch: 1, seq: 60, heads: 4, dim: 64 };
        let [q, k, v] = tensors::<E>(shape, Shape { seq: 300, heads: 1, ..shape }, 64);
        let on =
            |level| run(&Attention::new().cpu(Cpu { level, threads: Threads::ONE }), [&q, &k, &v]);
        on(a).iter().zip(&on(b)).all(|(a, b)| a == b)
    }
    assert!(same::<f32>([numbers, pairs]) && same::<f16>([numbers, pairs]));
    assert!(!same::<bf16>([numbers, pairs]));
}
