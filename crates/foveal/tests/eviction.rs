//! Eviction: the golden choices of H2O and SnapKV, caches that keep a choice, and scores along a generation.

mod support;

use foveal::cache::eviction::{Pooling, RunningScores, Scores, SnapKv, snap_kv};
use foveal::cache::{ContiguousCache, KvRows, KvStore};
use foveal::inspect::{Forwarded, Per};
use foveal::{Attention, Error, Mask, Scale, Shape, Tensor, TensorMut, TensorRef, Workspace};
use support::golden::cases;
use support::{Random, cpus, error, tokens};

/// Output and column sums of all rows over a store, as generated rows.
fn attend(
    attention: &Attention,
    q: TensorRef<'_, f32>,
    store: &dyn KvStore,
) -> (Vec<f32>, Tensor<f32>) {
    let kv = Shape {
        batch: 1,
        seq: store.end() - store.start(),
        heads: store.kv_heads(),
        dim: store.dims().0,
    };
    let plan = attention.plan_decode(q.shape(), kv, Shape { dim: store.dims().1, ..kv }).unwrap();
    let mut out = vec![f32::NAN; plan.out_shape().checked_len().unwrap()];
    let mut lse = vec![f32::NAN; q.shape().per_row().checked_len().unwrap()];
    let mut workspace = Workspace::for_plan(&plan);
    let outputs = (
        TensorMut::new(&mut out, plan.out_shape()).unwrap(),
        Some(TensorMut::new(&mut lse, q.shape().per_row()).unwrap()),
    );
    plan.forward_cached(q, &[store], outputs, &mut workspace).unwrap();
    let stores = [store];
    let of = Forwarded::cached(q, &stores, TensorRef::new(&lse, q.shape().per_row()).unwrap());
    let sums = plan.column_sums(of, 0..q.shape().seq, Per::KvHead).unwrap();
    (out, sums)
}

#[test]
fn golden_choices() {
    for case in cases("eviction") {
        let tensor = |name: &str| {
            let array = case.tensor(name);
            Tensor::from_vec(array.to_f32(), support::attention::shape(array)).unwrap()
        };
        let (q, k) = (tensor("q"), tensor("k"));
        let Shape { seq, heads, dim, .. } = q.shape();
        for cpu in cpus() {
            let scale = Scale::Value(case.number("scale") as f32);
            let attention = Attention::new().mask(Mask::causal()).scale(scale).cpu(cpu);
            let mut cache = ContiguousCache::<f32>::new(heads, (dim, dim), seq).unwrap();
            cache.append(k.view(), k.view()).unwrap();
            let mut scores = Scores::new(heads);
            if case.name == "h2o_selection" {
                scores.add(attend(&attention, q.view(), &cache).1.view()).unwrap();
                let (heavy, recent) =
                    (case.number("heavy") as usize, case.number("recent") as usize);
                let kept = scores.heavy_hitters(heavy, recent);
                let golden = case.tensor("heavy").indices();
                for (kept, golden) in kept.iter().zip(golden.chunks(heavy)) {
                    assert_eq!(kept[..heavy], *golden);
                    assert!(kept[heavy..].iter().copied().eq(seq - recent..seq));
                }
            } else {
                let [capacity, window, kernel] =
                    ["capacity", "window", "kernel"].map(|name| case.number(name) as usize);
                let last = tokens(&q, seq - window..seq);
                scores.add(attend(&attention, last, &cache).1.view()).unwrap();
                let keep = SnapKv { capacity, window, kernel, pooling: Pooling::Average };
                let kept = snap_kv(&scores, keep).unwrap();
                let golden = case.tensor("selected").indices();
                for (kept, golden) in kept.iter().zip(golden.chunks(capacity - window)) {
                    assert_eq!(kept[..capacity - window], *golden);
                    assert!(kept[capacity - window..].iter().copied().eq(seq - window..seq));
                }
            }
        }
    }
}

/// A cache that keeps a choice has the bits of one that was given only the chosen tokens.
#[test]
fn what_is_kept_is_what_was_chosen() {
    let mut random = Random::new(1);
    let shape = Shape { batch: 1, seq: 600, heads: 2, dim: 5 };
    let (k, v) = (random.tensor::<f32>(shape, 1.0), random.tensor::<f32>(shape, 1.0));
    let mut cache = ContiguousCache::<f32>::new(2, (5, 5), 700).unwrap();
    cache.append(k.view(), v.view()).unwrap();
    cache.forget(256);
    let kept: Vec<Vec<usize>> =
        [3, 7].map(|step| (0..40).map(|n| n * step + step).collect()).to_vec();
    cache.retain(&kept).unwrap();
    assert_eq!((cache.start(), cache.end(), cache.room()), (0, 40, 660));
    for (head, kept) in kept.iter().enumerate() {
        let tile = cache.tile(head, 0..40);
        let (Some(KvRows::F32(keys)), Some(KvRows::F32(values))) =
            (tile.keys.rows(), tile.values.rows())
        else {
            panic!("stored as f32")
        };
        for (n, &j) in kept.iter().enumerate() {
            assert_eq!(keys.row(n), k.view().row(0, 256 + j, head));
            assert_eq!(values.row(n), v.view().row(0, 256 + j, head));
        }
    }
    cache.append(tokens(&k, 0..2), tokens(&v, 0..2)).unwrap();
    assert_eq!(cache.end(), 42);
}

/// Along a generation, scores are the weights that each key has got while it was held: those of an attention in f64 that
/// masks what was given up, for each head by itself.
#[test]
fn heavy_hitters_along_a_generation() {
    const HEAVY: usize = 4;
    const RECENT: usize = 6;
    let mut random = Random::new(2);
    let (steps, kv_heads, group, dim) = (60, 2, 3, 8);
    let q = Shape { batch: 1, seq: steps, heads: kv_heads * group, dim };
    let q = random.tensor::<f32>(q, 3.0);
    let kv = Shape { batch: 1, seq: steps, heads: kv_heads, dim };
    let (k, v) = (random.tensor::<f32>(kv, 2.0), random.tensor::<f32>(kv, 1.0));
    for cpu in cpus() {
        let attention = Attention::new().mask(Mask::causal()).cpu(cpu);
        let mut cache = ContiguousCache::<f32>::new(kv_heads, (dim, dim), steps).unwrap();
        let mut scores = Scores::new(kv_heads);
        // Positions held by each head, with the weight that they have got.
        let mut held: Vec<Vec<(usize, f64)>> = vec![vec![]; kv_heads];
        for t in 0..steps {
            cache.append(tokens(&k, t..t + 1), tokens(&v, t..t + 1)).unwrap();
            let (out, sums) = attend(&attention, tokens(&q, t..t + 1), &cache);
            scores.add(sums.view()).unwrap();
            let mut expected = vec![];
            for (head, held) in held.iter_mut().enumerate() {
                held.push((t, 0.0));
                for g in 0..group {
                    let query = q.view().row(0, t, head * group + g);
                    let score = |j: usize| -> f64 {
                        let key = k.view().row(0, j, head).iter();
                        let dot: f64 =
                            key.zip(query).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                        (dot / (dim as f64).sqrt()).exp()
                    };
                    let weights: Vec<f64> = held.iter().map(|&(j, _)| score(j)).collect();
                    let sum: f64 = weights.iter().sum();
                    let mut row = vec![0.0; dim];
                    for (weight, (j, total)) in weights.iter().zip(held.iter_mut()) {
                        *total += weight / sum;
                        for (o, x) in row.iter_mut().zip(v.view().row(0, *j, head)) {
                            *o += weight / sum * f64::from(*x);
                        }
                    }
                    expected.extend(row);
                }
            }
            assert!(error(&out, &expected) <= 3e-6, "{} {t}", cpu.level);
            for (head, held) in held.iter().enumerate() {
                for (got, (_, expected)) in scores.of(head).unwrap().iter().zip(held) {
                    assert!((got - expected).abs() <= 1e-5 * (1.0 + expected), "{head} {t}");
                }
            }
            let kept = scores.heavy_hitters(HEAVY, RECENT);
            cache.retain(&kept).unwrap();
            scores.retain(&kept).unwrap();
            for (held, kept) in held.iter_mut().zip(&kept) {
                *held = kept.iter().map(|&j| held[j]).collect();
            }
            assert_eq!(cache.end(), (t + 1).min(HEAVY + RECENT));
        }
    }
}

/// Scores that are kept row by row are those of all rows at once, and have the same bits however rows are cut into calls.
#[test]
fn running_scores_depend_on_no_cut() {
    let mut random = Random::new(4);
    let (seq, heads, kv_heads, dim) = (530, 6, 2, 8);
    let mut tensor = |heads| random.tensor::<f32>(Shape { batch: 1, seq, heads, dim }, 2.0);
    let (q, k, v) = (tensor(heads), tensor(kv_heads), tensor(kv_heads));
    for cpu in cpus() {
        let attention = Attention::new().mask(Mask::causal()).cpu(cpu);
        let run = |lengths: &[usize]| {
            let mut cache = ContiguousCache::<f32>::new(kv_heads, (dim, dim), seq).unwrap();
            let mut scores = RunningScores::new(heads, kv_heads).unwrap();
            let mut joined = Scores::new(kv_heads);
            let (mut at, mut lengths) = (0, lengths.iter().cycle());
            while at < seq {
                let end = (at + lengths.next().unwrap()).min(seq);
                cache.append(tokens(&k, at..end), tokens(&v, at..end)).unwrap();
                let (part, kv) =
                    (tokens(&q, at..end), Shape { seq: end, heads: kv_heads, ..k.shape() });
                let plan = attention.plan(part.shape(), kv, kv).unwrap();
                let mut out = vec![f32::NAN; part.shape().checked_len().unwrap()];
                let rows = part.shape().per_row();
                let mut lse = vec![f32::NAN; rows.checked_len().unwrap()];
                let mut workspace = Workspace::for_plan(&plan);
                let outputs = (
                    TensorMut::new(&mut out, part.shape()).unwrap(),
                    Some(TensorMut::new(&mut lse, rows).unwrap()),
                );
                plan.forward_cached(part, &[&cache], outputs, &mut workspace).unwrap();
                let stores = [&cache as &dyn KvStore];
                let of = Forwarded::cached(part, &stores, TensorRef::new(&lse, rows).unwrap());
                scores.add(&plan, of, 0..end - at).unwrap();
                joined.add(plan.column_sums(of, 0..end - at, Per::KvHead).unwrap().view()).unwrap();
                at = end;
            }
            (scores, joined)
        };
        let (whole, joined) = run(&[seq]);
        for head in 0..kv_heads {
            let pairs = whole.scores();
            let pairs = pairs.of(head).unwrap().iter().zip(joined.of(head).unwrap());
            pairs.for_each(|(a, b)| assert!((a - b).abs() <= 1e-5 * (1.0 + b), "{a} {b}"));
        }
        for lengths in [&[1][..], &[7, 100], &[256], &[300, 13]] {
            assert_eq!(run(lengths).0, whole, "{lengths:?}");
        }
        let mut short = whole.clone();
        short.retain(&[vec![0, 5], vec![1, 9]]).unwrap();
        let first = |head: usize| whole.of(head).unwrap();
        assert_eq!(short.of(2).unwrap(), [first(2)[0], first(2)[5]]);
        assert_eq!(short.of(3).unwrap(), [first(3)[1], first(3)[9]]);
        assert!(short.retain(&[vec![0], vec![2]]).is_err());
        short.clear();
        assert_eq!(short, RunningScores::new(heads, kv_heads).unwrap());
    }
    assert!(matches!(RunningScores::new(3, 2), Err(Error::HeadGrouping { .. })));
    assert!(matches!(RunningScores::new(3, 0), Err(Error::HeadGrouping { .. })));
}

#[test]
fn choices_that_are_none_are_refused() {
    let shape = Shape { batch: 1, seq: 9, heads: 2, dim: 1 };
    let x = Random::new(3).tensor::<f32>(shape, 1.0);
    let mut cache = ContiguousCache::<f32>::new(2, (1, 1), 9).unwrap();
    cache.append(x.view(), x.view()).unwrap();
    let mut scores = Scores::new(2);
    scores.add(x.view()).unwrap();
    let before = scores.clone();
    for kept in [
        vec![vec![1, 2]],
        vec![vec![1, 2], vec![1]],
        vec![vec![1, 2], vec![1, 9]],
        vec![vec![2, 1], vec![1, 2]],
        vec![vec![1, 1], vec![1, 2]],
    ] {
        assert!(cache.retain(&kept).is_err() && scores.retain(&kept).is_err(), "{kept:?}");
    }
    assert_eq!((cache.end(), &scores), (9, &before));
    assert!(matches!(scores.add(tokens(&x, 0..8)), Err(Error::ShapeMismatch { .. })));
    let keep = SnapKv { capacity: 4, window: 2, kernel: 2, pooling: Pooling::Max };
    assert!(matches!(snap_kv(&scores, keep), Err(Error::InvalidParameter { .. })));
    let keep = SnapKv { capacity: 1, kernel: 3, ..keep };
    assert!(matches!(snap_kv(&scores, keep), Err(Error::InvalidParameter { .. })));
    let all = SnapKv { capacity: 100, window: 50, ..keep };
    assert_eq!(snap_kv(&scores, all).unwrap(), vec![(0..9).collect::<Vec<_>>(); 2]);
    assert_eq!(scores.heavy_hitters(3, 100), vec![(0..9).collect::<Vec<_>>(); 2]);
}
