//! Weights made again from the log-sum-exp, against the definition in f64: rows, sums, entropies, means.

mod support;

use foveal::cache::{ContiguousCache, KvStore};
use foveal::inspect::{Forwarded, Grid, Per};
use foveal::mask::Site;
use foveal::plan::Inputs;
use foveal::position::Slopes;
use foveal::reference::{Input, Options, attention_with};
use foveal::{
    Attention, Cpu, Dropout, Element, Error, Mask, Plan, Scale, Shape, Tensor, TensorRef, Threads,
    Workspace,
};
use half::{bf16, f16};
use std::num::NonZeroUsize;
use std::ops::Range;
use support::golden::cases;
use support::{Random, cpus, error, tokens};

/// Weights `[B, T, H, S]` of one call.
struct Weights {
    shape: Shape,
    data: Vec<f64>,
}

impl Weights {
    /// By definition: the outputs of values that are unit vectors.
    fn of<E: Element>(q: &Tensor<E>, k: &Tensor<E>, options: &Options<'_>) -> Weights {
        let wide = |x: &Tensor<E>| -> Vec<f64> {
            x.as_slice().iter().map(|x| f64::from(x.to_f32())).collect()
        };
        let Shape { seq: keys, heads: kv_heads, batch, .. } = k.shape();
        let unit: Vec<f64> = (0..batch * keys * kv_heads * keys)
            .map(|n| f64::from(u8::from(n / (kv_heads * keys) % keys == n % keys)))
            .collect();
        let (q_data, k_data) = (wide(q), wide(k));
        let inputs = [
            Input { data: &q_data, shape: q.shape() },
            Input { data: &k_data, shape: k.shape() },
            Input { data: &unit, shape: Shape { dim: keys, ..k.shape() } },
        ];
        let data = attention_with(inputs, options).unwrap().out;
        Weights { shape: Shape { dim: keys, ..q.shape() }, data }
    }

    fn at(&self, (b, i, h, j): (usize, usize, usize, usize)) -> f64 {
        let Shape { seq, heads, dim, .. } = self.shape;
        self.data[((b * seq + i) * heads + h) * dim + j]
    }

    fn rows(&self, rows: &Range<usize>) -> Vec<f64> {
        let Shape { batch, heads, dim, .. } = self.shape;
        let mut out = vec![];
        for (b, i, h) in axes(batch, rows.clone(), heads) {
            out.extend((0..dim).map(|j| self.at((b, i, h, j))));
        }
        out
    }

    fn column_sums(&self, rows: &Range<usize>, group: usize) -> Vec<f64> {
        let Shape { batch, heads, dim, .. } = self.shape;
        axes(batch, 0..dim, heads / group)
            .map(|(b, j, g)| {
                let heads = g * group..(g + 1) * group;
                let pairs = heads.flat_map(|h| rows.clone().map(move |i| (h, i)));
                pairs.map(|(h, i)| self.at((b, i, h, j))).sum()
            })
            .collect()
    }

    fn entropy(&self, rows: &Range<usize>) -> Vec<f64> {
        let Shape { batch, heads, dim, .. } = self.shape;
        axes(batch, rows.clone(), heads)
            .map(|(b, i, h)| {
                let weights = (0..dim).map(|j| self.at((b, i, h, j)));
                weights.filter(|&p| p > 0.0).map(|p| -p * p.ln()).sum()
            })
            .collect()
    }

    /// Pair by pair, each added to the cell that holds its query and key.
    fn block_means(&self, grid: Grid) -> Vec<f64> {
        let Shape { batch, seq, heads, dim } = self.shape;
        let cells = |length: usize, count: usize| -> Vec<usize> {
            let holds =
                |c: usize, n: usize| length * c / count <= n && n < length * (c + 1) / count;
            (0..length).filter_map(|n| (0..count).find(|&c| holds(c, n))).collect()
        };
        let (row_of, column_of) = (cells(seq, grid.rows), cells(dim, grid.columns));
        let mut means = vec![0.0; batch * grid.rows * heads * grid.columns];
        let mut counts = means.clone();
        for (b, i, h) in axes(batch, 0..row_of.len(), heads) {
            for (j, &column) in column_of.iter().enumerate() {
                let cell = ((b * grid.rows + row_of[i]) * heads + h) * grid.columns + column;
                means[cell] += self.at((b, i, h, j));
                counts[cell] += 1.0;
            }
        }
        means.iter_mut().zip(counts).for_each(|(sum, n)| *sum /= f64::max(n, 1.0));
        means
    }
}

fn axes(
    batch: usize,
    seq: Range<usize>,
    heads: usize,
) -> impl Iterator<Item = (usize, usize, usize)> {
    (0..batch).flat_map(move |b| seq.clone().flat_map(move |i| (0..heads).map(move |h| (b, i, h))))
}

fn log_sum_exp<E: Element>(plan: &Plan<'_>, q: &Tensor<E>, k: &Tensor<E>) -> Tensor<f32> {
    let mut out = Tensor::zeros(plan.out_shape()).unwrap();
    let mut lse = Tensor::zeros(plan.out_shape().per_row()).unwrap();
    let inputs = Inputs { q: q.view(), k: k.view(), v: k.view() };
    let mut workspace = Workspace::for_plan(plan);
    plan.forward(inputs, out.view_mut(), Some(lse.view_mut()), &mut workspace).unwrap();
    lse
}

/// Requires that everything that can be looked at agrees with the definition.
fn check<E: Element>(
    attention: &Attention<'_>,
    (q, k): (&Tensor<E>, &Tensor<E>),
    expected: &Weights,
    tolerance: f64,
) {
    let plan = attention.plan(q.shape(), k.shape(), k.shape()).unwrap();
    let lse = log_sum_exp(&plan, q, k);
    let of = Forwarded::new(q.view(), k.view(), lse.view());
    let (queries, group) = (q.shape().seq, q.shape().heads / k.shape().heads);
    let require = |what: &str, got: &Tensor<f32>, expected: &[f64], tolerance: f64| {
        let place = || format!("{what} of {:?} {:?} {}", q.shape(), k.shape(), plan.explain());
        let error = error(got.as_slice(), expected);
        assert!(error <= tolerance, "{}: {error:e}", place());
    };
    for rows in [0..queries, queries / 3..queries - queries / 4, queries / 2..queries / 2] {
        let got = plan.probabilities(of, rows.clone()).unwrap();
        require("weights", &got, &expected.rows(&rows), tolerance);
        let got = plan.entropy(of, rows.clone()).unwrap();
        require("entropy", &got, &expected.entropy(&rows), tolerance);
        let got = plan.column_sums(of, rows.clone(), Per::QueryHead).unwrap();
        require("columns", &got, &expected.column_sums(&rows, 1), tolerance);
        let got = plan.column_sums(of, rows.clone(), Per::KvHead).unwrap();
        require("columns of groups", &got, &expected.column_sums(&rows, group), tolerance);
    }
    for (rows, columns) in [(1, 1), (3, 2), (queries + 1, 7), (0, 3), (2, 0)] {
        let grid = Grid { rows, columns };
        let got = plan.block_means(of, grid).unwrap();
        assert_eq!(got.shape(), Shape { seq: rows, dim: columns, ..q.shape() });
        require("means", &got, &expected.block_means(grid), tolerance);
    }
}

fn masks(queries: usize, keys: usize) -> Vec<Mask> {
    let by_head = vec![Mask::causal(), Mask::window(2), Mask::full(), Mask::keys(1..keys)];
    vec![
        Mask::full(),
        Mask::causal(),
        Mask::window(3),
        Mask::streaming(1, 2),
        Mask::key_lengths(&[keys / 2, keys]),
        Mask::per_head(by_head),
        Mask::prefix(queries / 2),
    ]
}

fn all_small_sizes<E: Element>(tolerance: f64) {
    let mut random = Random::new(11);
    for (queries, keys) in
        [0, 1, 2, 5, 6, 7, 9].into_iter().flat_map(|t| [0, 1, 2, 8, 9].map(|s| (t, s)))
    {
        for (mask, kv_heads) in masks(queries, keys).into_iter().zip([1, 2, 4].repeat(3)) {
            let shape = Shape { batch: 2, seq: queries, heads: 4, dim: 3 };
            let q = random.tensor::<E>(shape, 2.0);
            let k = random.tensor::<E>(Shape { seq: keys, heads: kv_heads, ..shape }, 2.0);
            let expected = Weights::of(&q, &k, &Options::new(0.5, &mask));
            let attention = Attention::new().mask(mask).scale(Scale::Value(0.5));
            for cpu in cpus() {
                check(&attention.clone().cpu(cpu), (&q, &k), &expected, tolerance);
            }
        }
    }
}

#[test]
fn all_small_sizes_of_f32() {
    all_small_sizes::<f32>(2e-6);
}

/// Inputs are what they are; nothing else is 16-bit.
#[test]
fn all_small_sizes_of_16_bits() {
    all_small_sizes::<f16>(2e-6);
    all_small_sizes::<bf16>(2e-6);
}

#[test]
fn sizes_around_tiles() {
    let mut random = Random::new(12);
    for (queries, keys, dim) in [(60, 255, 16), (49, 257, 17), (300, 300, 5), (3, 600, 64)] {
        for (mask, kv_heads) in masks(queries, keys).into_iter().zip([1, 2, 4].repeat(3)) {
            let shape = Shape { batch: 2, seq: queries, heads: 4, dim };
            let q = random.tensor::<f32>(shape, 2.0);
            let k = random.tensor::<f32>(Shape { seq: keys, heads: kv_heads, ..shape }, 2.0);
            let expected = Weights::of(&q, &k, &Options::new(-0.3, &mask));
            let attention = Attention::new().mask(mask).scale(Scale::Value(-0.3));
            for cpu in cpus() {
                check(&attention.clone().cpu(cpu), (&q, &k), &expected, 5e-6);
            }
        }
    }
}

/// Cap, biases and sinks count; dropout does not.
#[test]
fn terms_count() {
    let mut random = Random::new(13);
    let (queries, keys, heads) = (50, 270, 4);
    let shape = Shape { batch: 2, seq: queries, heads, dim: 8 };
    let q = random.tensor::<f32>(shape, 4.0);
    let k = random.tensor::<f32>(Shape { seq: keys, heads: 2, ..shape }, 4.0);
    let bias = random.tensor::<f32>(Shape { batch: 1, dim: keys, ..shape }, 2.0);
    let sinks = [0.5f32, -1.0, 3.0, 8.0];
    let mask = Mask::window(100);
    let added = |at: Site, row: usize, j: usize| {
        let distance = (row + keys - queries) as isize - j as isize;
        let slope = f64::from(Slopes::Standard.of(at.q_head, heads));
        f64::from(bias.view().row(0, row, at.q_head)[j]) - slope * distance.abs() as f64
    };
    let expected = Weights::of(
        &q,
        &k,
        &Options {
            softcap: Some(2.5),
            bias: Some(&added),
            sinks: Some(&sinks.map(f64::from)),
            ..Options::new(0.5, &mask)
        },
    );
    for cpu in cpus() {
        let attention = Attention::new()
            .mask(mask.clone())
            .scale(Scale::Value(0.5))
            .softcap(2.5)
            .bias(bias.view())
            .alibi(Slopes::Standard)
            .sinks(&sinks)
            .dropout(Dropout { rate: 0.5, seed: 1 })
            .cpu(cpu);
        check(&attention, (&q, &k), &expected, 5e-6);
    }
}

/// Caches of different lengths, one of which has forgotten its first tile.
#[test]
fn caches_are_looked_at_as_tensors_are() {
    let mut random = Random::new(14);
    let (rows, most, window) = (4, 700, 90);
    let shape = Shape { batch: 1, seq: most, heads: 2, dim: 12 };
    let [k, v] = [0; 2].map(|_| random.tensor::<f32>(shape, 1.0));
    let q = random.tensor::<f32>(Shape { batch: 3, seq: rows, heads: 4, dim: 12 }, 2.0);
    let caches = [700, 3, 400].map(|length| {
        let mut cache = ContiguousCache::<f32>::new(2, (12, 12), 1024).unwrap();
        cache.append(tokens(&k, 0..length), tokens(&v, 0..length)).unwrap();
        cache.forget(length.saturating_sub(window + rows));
        cache
    });
    assert!(caches[0].start() > 0 && caches[2].start() > 0);
    let stores = caches.each_ref().map(|cache| cache as &dyn KvStore);
    for cpu in cpus() {
        let attention = Attention::new().mask(Mask::window(window)).cpu(cpu);
        let kv = Shape { batch: 3, ..shape };
        let plan = attention.plan_decode(q.shape(), kv, kv).unwrap();
        let mut out = Tensor::zeros(plan.out_shape()).unwrap();
        let mut lse = Tensor::zeros(plan.out_shape().per_row()).unwrap();
        let outputs = (out.view_mut(), Some(lse.view_mut()));
        plan.forward_cached(q.view(), &stores, outputs, &mut Workspace::for_plan(&plan)).unwrap();
        let of = Forwarded::cached(q.view(), &stores, lse.view());
        let weights = plan.probabilities(of, 0..rows).unwrap();
        let sums = plan.column_sums(of, 1..rows, Per::KvHead).unwrap();
        let means = plan.block_means(of, Grid { rows: 2, columns: 3 }).unwrap();
        let entropy = plan.entropy(of, 1..rows).unwrap();
        for (b, cache) in caches.iter().enumerate() {
            let held = cache.start()..cache.end();
            let q_shape = Shape { batch: 1, ..q.shape() };
            let len = q_shape.checked_len().unwrap();
            let own = Tensor::from_vec(q.as_slice()[b * len..][..len].to_vec(), q_shape).unwrap();
            let keys = tokens(&k, held.clone());
            let (rows_of, row_len) = (held.clone(), keys.shape().heads * 12);
            let keys = k.as_slice()[rows_of.start * row_len..rows_of.end * row_len].to_vec();
            let keys = Tensor::from_vec(keys, Shape { seq: held.len(), ..shape }).unwrap();
            // The definition numbers keys from the first one held; a window does not notice.
            let scale = 1.0 / 12f64.sqrt();
            let expected = Weights::of(&own, &keys, &Options::new(scale, &Mask::window(window)));
            let mut columns = vec![];
            for (i, h) in (0..rows).flat_map(|i| (0..4).map(move |h| (i, h))) {
                let got = weights.view().row(b, i, h);
                columns.extend_from_slice(&got[..held.len()]);
                assert!(got[held.len()..].iter().all(|&weight| weight == 0.0));
            }
            assert!(error(&columns, &expected.rows(&(0..rows))) < 3e-6);
            let mut got = vec![];
            for (j, g) in (0..most).flat_map(|j| (0..2).map(move |g| (j, g))) {
                let sum = sums.view().row(b, j, g)[0];
                if j < held.len() {
                    got.push(sum);
                } else {
                    assert_eq!(sum, 0.0);
                }
            }
            assert!(error(&got, &expected.column_sums(&(1..rows), 2)) < 3e-6);
            let part = |x: &Tensor<f32>| {
                let len = x.as_slice().len() / 3;
                x.as_slice()[b * len..][..len].to_vec()
            };
            let grid = Grid { rows: 2, columns: 3 };
            assert!(error(&part(&means), &expected.block_means(grid)) < 3e-6);
            assert!(error(&part(&entropy), &expected.entropy(&(1..rows))) < 3e-6);
        }
    }
}

fn same_bits(a: &Tensor<f32>, b: &Tensor<f32>, what: &str) {
    let bits = |x: &Tensor<f32>| x.as_slice().iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(a), bits(b), "{what}");
}

#[test]
fn threads_change_no_bit() {
    let mut random = Random::new(15);
    let shape = Shape { batch: 2, seq: 530, heads: 4, dim: 20 };
    let q = random.tensor::<f32>(shape, 2.0);
    let k = random.tensor::<f32>(Shape { heads: 2, ..shape }, 2.0);
    for Cpu { level, .. } in cpus() {
        let mut first: Option<[Tensor<f32>; 4]> = None;
        for threads in [1, 2, 5] {
            let threads = Threads::at_most(NonZeroUsize::new(threads).unwrap());
            let attention = Attention::new().mask(Mask::causal()).cpu(Cpu { level, threads });
            let plan = attention.plan(q.shape(), k.shape(), k.shape()).unwrap();
            let lse = log_sum_exp(&plan, &q, &k);
            let of = Forwarded::new(q.view(), k.view(), lse.view());
            let all = [
                plan.probabilities(of, 100..160).unwrap(),
                plan.column_sums(of, 0..530, Per::KvHead).unwrap(),
                plan.entropy(of, 0..530).unwrap(),
                plan.block_means(of, Grid { rows: 5, columns: 9 }).unwrap(),
            ];
            let first = first.get_or_insert_with(|| all.clone());
            for (a, b) in first.iter().zip(&all) {
                same_bits(a, b, &format!("{level} with {threads:?}"));
            }
        }
    }
}

/// A NaN in a key reaches the weights of the rows that may see it, at the keys that they may see.
#[test]
fn what_is_not_finite_stays_where_it_is_seen() {
    let mut random = Random::new(16);
    let (queries, bad) = (300, 270);
    let shape = Shape { batch: 1, seq: queries, heads: 1, dim: 8 };
    let q = random.tensor::<f32>(shape, 1.0);
    let clean = random.tensor::<f32>(shape, 1.0);
    let mut numbers = clean.as_slice().to_vec();
    numbers[bad * 8 + 3] = f32::NAN;
    let k = Tensor::from_vec(numbers, shape).unwrap();
    for cpu in cpus() {
        let attention = Attention::new().mask(Mask::causal()).cpu(cpu);
        let plan = attention.plan(shape, shape, shape).unwrap();
        let [got, expected] = [&k, &clean].map(|k| {
            let lse = log_sum_exp(&plan, &q, k);
            let of = Forwarded::new(q.view(), k.view(), lse.view());
            (plan.probabilities(of, 0..queries).unwrap(), plan.entropy(of, 0..queries).unwrap())
        });
        for i in 0..queries {
            for j in 0..queries {
                let (got, expected) =
                    (got.0.view().row(0, i, 0)[j], expected.0.view().row(0, i, 0)[j]);
                match (i < bad, j > i) {
                    (true, _) => assert_eq!(got, expected, "({i}, {j})"),
                    (false, true) => assert_eq!(got, 0.0, "({i}, {j})"),
                    (false, false) => assert!(got.is_nan(), "({i}, {j})"),
                }
            }
            let (got, expected) = (got.1.view().row(0, i, 0)[0], expected.1.view().row(0, i, 0)[0]);
            assert!(if i < bad { got == expected } else { got.is_nan() }, "entropy {i}");
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let q = Tensor::<f32>::zeros(Shape { batch: 1, seq: 5, heads: 2, dim: 4 }).unwrap();
    let lse = Tensor::<f32>::zeros(q.shape().per_row()).unwrap();
    let other = Tensor::<f32>::zeros(Shape { seq: 6, ..q.shape() }).unwrap();
    let attention = Attention::new();
    let plan = attention.plan(q.shape(), q.shape(), q.shape()).unwrap();
    let of = Forwarded::new(q.view(), q.view(), lse.view());
    assert!(plan.entropy(of, 0..5).is_ok());
    let mismatch = |of: Forwarded<'_, f32, f32>| {
        matches!(plan.entropy(of, 0..5), Err(Error::ShapeMismatch { .. }))
    };
    assert!(mismatch(Forwarded::new(other.view(), q.view(), lse.view())));
    assert!(mismatch(Forwarded::new(q.view(), other.view(), lse.view())));
    assert!(mismatch(Forwarded::new(q.view(), q.view(), q.view())));
    assert!(mismatch(Forwarded::cached(q.view(), &[], lse.view())));
    #[allow(clippy::reversed_empty_ranges)]
    for rows in [0..6, 4..3, 6..6] {
        let refused = [
            plan.probabilities(of, rows.clone()).err(),
            plan.entropy(of, rows.clone()).err(),
            plan.column_sums(of, rows.clone(), Per::QueryHead).err(),
        ];
        for error in refused {
            assert!(matches!(error, Some(Error::InvalidParameter { .. })), "{rows:?}: {error:?}");
        }
    }
    let huge = Grid { rows: usize::MAX, columns: usize::MAX };
    assert!(matches!(plan.block_means(of, huge), Err(Error::ShapeOverflow { .. })));
    let unfit = Attention::new().mask(Mask::per_head(vec![Mask::full()]));
    let plan = unfit.plan(q.shape(), q.shape(), q.shape()).unwrap();
    assert!(matches!(plan.entropy(of, 0..5), Err(Error::MaskShape { .. })));
}

/// The scores by which H2O and SnapKV choose the keys that a cache keeps.
#[test]
fn golden_scores_of_eviction() {
    for case in cases("eviction") {
        let tensor = |name: &str| {
            let array = case.tensor(name);
            Tensor::from_vec(array.to_f32(), support::attention::shape(array)).unwrap()
        };
        let (q, k) = (tensor("q"), tensor("k"));
        let (tokens, heads) = (q.shape().seq, q.shape().heads);
        let prefix = case.tensor("scores").shape[2];
        let window = case.options["window"].as_u64().map(|window| window as usize);
        let rows = tokens - window.unwrap_or(tokens)..tokens;
        for cpu in cpus() {
            let scale = Scale::Value(case.number("scale") as f32);
            let attention = Attention::new().mask(Mask::causal()).scale(scale).cpu(cpu);
            let plan = attention.plan(q.shape(), k.shape(), k.shape()).unwrap();
            let lse = log_sum_exp(&plan, &q, &k);
            let of = Forwarded::new(q.view(), k.view(), lse.view());
            let sums = plan.column_sums(of, rows.clone(), Per::QueryHead).unwrap();
            let by_head: Vec<f64> = (0..heads)
                .flat_map(|h| (0..prefix).map(move |j| (j, h)))
                .map(|(j, h)| f64::from(sums.view().row(0, j, h)[0]))
                .collect();
            case.check("scores", &by_head, case.tolerance("f32"));
        }
    }
}

/// The rows that are asked for, wherever they are, are the rows of all.
#[test]
fn rows_do_not_depend_on_the_others() {
    let mut random = Random::new(17);
    let shape = Shape { batch: 1, seq: 200, heads: 2, dim: 10 };
    let (q, k) = (random.tensor::<f32>(shape, 2.0), random.tensor::<f32>(shape, 2.0));
    for cpu in cpus() {
        let attention = Attention::new().mask(Mask::causal()).cpu(cpu);
        let plan = attention.plan(shape, shape, shape).unwrap();
        let lse = log_sum_exp(&plan, &q, &k);
        let of = Forwarded::new(q.view(), k.view(), lse.view());
        let all = plan.probabilities(of, 0..200).unwrap();
        for rows in [0..1, 47..50, 130..193] {
            let some = plan.probabilities(of, rows.clone()).unwrap();
            let expected: TensorRef<'_, f32> = tokens(&all, rows.clone());
            for (n, h) in (0..rows.len()).flat_map(|n| (0..2).map(move |h| (n, h))) {
                assert_eq!(some.view().row(0, n, h), expected.row(0, n, h), "{rows:?} {n} {h}");
            }
        }
    }
}
