//! Coded keys and values: the golden codes, the codes that a cache holds, and attention over them.

mod support;

use foveal::cache::codes::{Bits, GROUP, Scaling};
use foveal::cache::{
    ContiguousCache, KvKeys, KvRows, KvStore, KvValues, QuantizedCache, TILE, pieces,
};
use foveal::differential::{Differential, Lambda};
use foveal::inspect::{Forwarded, Per};
use foveal::nn::RmsNorm;
use foveal::reference::{Input, Partial};
use foveal::{
    Attention, Cpu, Element, Error, Mask, Phase, Plan, Shape, Tensor, TensorMut, TensorRef,
    Threads, Workspace,
};
use half::{bf16, f16};
use std::num::NonZeroUsize;
use support::golden::{Case, cases};
use support::{Random, cpus, error, tokens};

const BITS: [Bits; 2] = [Bits::Eight, Bits::Four];

fn extremes(x: &[f32]) -> (f32, f32) {
    x.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(a, b), &x| (a.min(x), b.max(x)))
}

/// The places of each group's numbers in a golden tensor `[batch, seq, heads, dim]`.
fn groups(case: &Case) -> Vec<Vec<usize>> {
    let shape = &case.tensor("x").shape;
    let (size, by_channel) = (case.number("group") as usize, case.tensors.contains_key("q"));
    let [b, t, h, d] = [shape[0], shape[1], shape[2], shape[3]];
    let at = move |b, s, head, c| ((b * t + s) * h + head) * d + c;
    let (outer, inner) = if by_channel { (t / size, d) } else { (t, d / size) };
    let mut groups = vec![];
    for n in 0..b * outer * h * inner {
        let (b, o, head, i) =
            (n / (outer * h * inner), n / (h * inner) % outer, n / inner % h, n % inner);
        groups.push(match by_channel {
            true => (0..size).map(|k| at(b, o * size + k, head, i)).collect(),
            false => (0..size).map(|k| at(b, o, head, i * size + k)).collect(),
        });
    }
    groups
}

/// How far a coded number may be from the number: half a step, and at the ends of the range what rounding the scale and the
/// minimum to f16 takes away from it.
fn reach(scaling: Scaling, bits: u32) -> f64 {
    let (scale, min) = (f64::from(scaling.scale.to_f32()), f64::from(scaling.min.to_f32()));
    let steps = f64::from((1 << bits) - 1);
    // Below the normal numbers f16 has a fixed distance.
    let rounding = |x: f64| (x.abs() / 2048.0).max(2f64.powi(-25));
    (scale / 2.0).max(steps * rounding(scale) + rounding(min)) + scale * 1e-6 + min.abs() * 1e-7
}

#[test]
fn golden_codes() {
    for case in cases("kv_quantisation") {
        let (bits, x) = (case.number("bits") as u32, case.tensor("x").to_f32());
        let (mut numbers, mut far) = (vec![0.0f64; x.len()], 0.0f64);
        for group in groups(&case) {
            let (min, max) = extremes(&group.iter().map(|&n| x[n]).collect::<Vec<_>>());
            let scaling = Scaling::between(min, max, bits).unwrap();
            let (scale, min) = (f64::from(scaling.scale.to_f32()), f64::from(scaling.min.to_f32()));
            for n in group {
                let code = scaling.code(x[n], bits);
                let place = (f64::from(x[n]) - min) / scale + 0.5;
                let expected = place.floor().clamp(0.0, f64::from((1 << bits) - 1));
                let tie = (place - place.round()).abs() < 1e-6;
                assert!(
                    tie || f64::from(code) == expected,
                    "{}: code {code}, {expected}",
                    case.name
                );
                numbers[n] = f64::from(scaling.number(code));
                assert!((numbers[n] - f64::from(x[n])).abs() <= reach(scaling, bits));
                // The golden scale and minimum are not rounded: they may be half a step off as well.
                let golden = case.tensor("dequantised").data[n];
                let bound = reach(scaling, bits) + scale / 2.0 * 1.001;
                assert!((numbers[n] - golden).abs() <= bound);
                far = far.max(bound);
            }
        }
        products(&case, &numbers, far);
    }
}

/// Scores and outputs of the golden definition within what the numbers may differ by.
fn products(case: &Case, numbers: &[f64], far: f64) {
    let shape = &case.tensor("x").shape;
    let [t, h, d] = [shape[1], shape[2], shape[3]];
    let x = |b: usize, s: usize, head: usize, c: usize| numbers[((b * t + s) * h + head) * d + c];
    let by_channel = case.tensors.contains_key("q");
    let (factors, expected) = match by_channel {
        true => (case.tensor("q"), case.tensor("scores")),
        false => (case.tensor("weights"), case.tensor("out")),
    };
    let rows = if by_channel { factors.shape[1] } else { factors.shape[2] };
    for n in 0..expected.data.len() {
        let (mut sum, mut size) = (0.0, 0.0);
        let last = *expected.shape.last().unwrap();
        let (batch, z) = (n / (h * rows * last), n % last);
        for k in 0..if by_channel { d } else { t } {
            let (factor, number) = match by_channel {
                true => {
                    let (head, row) = (n / (rows * last) % h, n / last % rows);
                    let q = factors.data[((batch * rows + row) * h + head) * d + k];
                    (q, x(batch, z, head, k))
                }
                false => {
                    let (row, head) = (n / (h * last) % rows, n / last % h);
                    let p = factors.data[((batch * h + head) * rows + row) * t + k];
                    (p, x(batch, k, head, z))
                }
            };
            sum += factor * number;
            size += factor.abs();
        }
        let (got, want) = (sum, expected.data[n]);
        assert!((got - want).abs() <= far * size * 1.000_001, "{}: {got}, {want}", case.name);
    }
}

/// Random numbers of which some channels and some tokens are much larger, some groups constant.
fn outliers(random: &mut Random, shape: Shape) -> Tensor<f32> {
    let Shape { heads, dim, .. } = shape;
    let mut x = random.tensor::<f32>(shape, 1.0).into_vec();
    for (n, x) in x.iter_mut().enumerate() {
        let (t, c) = (n / (heads * dim), n % dim);
        match (t % 97, c % 11) {
            (_, 3) => *x = 20.0 + *x * 4.0,
            (5, _) => *x *= 9.0,
            (_, 7) if t < 300 => *x = -0.25,
            _ => {}
        }
    }
    Tensor::from_vec(x, shape).unwrap()
}

fn rounded(x: f32) -> f32 {
    bf16::from_f32(x).to_f32()
}

/// The numbers that a store stands for, `[1, held, heads, dim]` of keys and of values.
fn held(store: &dyn KvStore) -> [Tensor<f32>; 2] {
    let (key_dim, value_dim) = store.dims();
    let shape =
        |dim| Shape { batch: 1, seq: store.end() - store.start(), heads: store.kv_heads(), dim };
    let (mut keys, mut values) = (vec![], vec![]);
    for position in store.start()..store.end() {
        for head in 0..store.kv_heads() {
            let start = position / TILE * TILE;
            let tile = store.tile(head, start..(start + TILE).min(store.end()));
            let t = position - start;
            match tile.keys {
                KvKeys::Rows(KvRows::Bf16(rows)) => {
                    keys.extend(rows.row(t).iter().map(|x| x.to_f32()));
                }
                KvKeys::Channels(codes) => {
                    keys.extend((0..key_dim).map(|c| codes.number(t, c)));
                }
                other => panic!("{other:?}"),
            }
            match tile.values {
                KvValues::Rows(KvRows::Bf16(rows)) => {
                    values.extend(rows.row(t).iter().map(|x| x.to_f32()));
                }
                KvValues::Tokens(codes) => {
                    values.extend((0..value_dim).map(|c| codes.number(t, c)));
                }
                other => panic!("{other:?}"),
            }
        }
    }
    [
        Tensor::from_vec(keys, shape(key_dim)).unwrap(),
        Tensor::from_vec(values, shape(value_dim)).unwrap(),
    ]
}

fn quantized(bits: Bits, k: &Tensor<f32>, v: &Tensor<f32>) -> QuantizedCache {
    let (Shape { seq, heads, dim, .. }, value_dim) = (k.shape(), v.shape().dim);
    let mut cache = QuantizedCache::new(bits, heads, (dim, value_dim), seq).unwrap();
    cache.append(k.view(), v.view()).unwrap();
    cache
}

/// Codes are those of the definition, in every width; the newest tokens are bf16.
#[test]
fn a_cache_holds_the_codes_of_the_definition() {
    let mut random = Random::new(1);
    for (bits, (key_dim, value_dim)) in BITS
        .into_iter()
        .flat_map(|bits| [(1, 1), (24, 16), (64, 80), (130, 63), (3, 200)].map(|dims| (bits, dims)))
    {
        let shape = Shape { batch: 1, seq: 3 * TILE + 5, heads: 2, dim: key_dim };
        let k = outliers(&mut random, shape);
        let v = outliers(&mut random, Shape { dim: value_dim, ..shape });
        let cache = quantized(bits, &k, &v);
        let [keys, values] = held(&cache);
        let count = bits.count() as u32;
        let coded = 2 * TILE;
        let numbers = |x: &Tensor<f32>, places: &[(usize, usize, usize)]| -> Vec<f32> {
            places.iter().map(|&(t, h, c)| rounded(x.view().row(0, t, h)[c])).collect()
        };
        let check = |x: &Tensor<f32>, got: &Tensor<f32>, places: &[(usize, usize, usize)]| {
            let x = numbers(x, places);
            let (min, max) = extremes(&x);
            let scaling = Scaling::between(min, max, count).unwrap();
            for (&(t, h, c), x) in places.iter().zip(x) {
                let expected = scaling.number(scaling.code(x, count));
                assert_eq!(got.view().row(0, t, h)[c], expected, "{bits:?} {t} {h} {c}");
            }
        };
        for (t, h) in (0..coded).flat_map(|t| [(t, 0), (t, 1)]) {
            for first in (0..value_dim).step_by(GROUP) {
                let channels = first..(first + GROUP).min(value_dim);
                check(&v, &values, &channels.map(|c| (t, h, c)).collect::<Vec<_>>());
            }
            if t % GROUP == 0 {
                for c in 0..key_dim {
                    let tokens = t..t + GROUP;
                    check(&k, &keys, &tokens.map(|t| (t, h, c)).collect::<Vec<_>>());
                }
            }
        }
        for (t, h) in (coded..shape.seq).flat_map(|t| [(t, 0), (t, 1)]) {
            let row = |x: &Tensor<f32>| x.view().row(0, t, h).iter().map(|x| rounded(*x)).collect();
            let (k, v): (Vec<f32>, Vec<f32>) = (row(&k), row(&v));
            assert_eq!((keys.view().row(0, t, h), values.view().row(0, t, h)), (&k[..], &v[..]));
        }
    }
}

/// What is held depends on nothing but the tokens.
#[test]
fn tokens_may_come_one_by_one() {
    let mut random = Random::new(2);
    let shape = Shape { batch: 1, seq: 4 * TILE + 1, heads: 1, dim: 5 };
    let (k, v) = (outliers(&mut random, shape), outliers(&mut random, shape));
    for bits in BITS {
        let mut one = QuantizedCache::new(bits, 1, (5, 5), shape.seq).unwrap();
        for end in 1..=shape.seq {
            one.append(tokens(&k, end - 1..end), tokens(&v, end - 1..end)).unwrap();
            if [1, TILE, TILE + 1, 2 * TILE + 1, 3 * TILE, shape.seq].contains(&end) {
                let mut all = QuantizedCache::new(bits, 1, (5, 5), 0).unwrap();
                all.grow(end).unwrap();
                all.append(tokens(&k, 0..end), tokens(&v, 0..end)).unwrap();
                assert_eq!(held(&one), held(&all), "{end}");
                assert_eq!((one.bytes(), one.end()), (all.bytes(), end));
            }
        }
    }
}

#[test]
fn bytes_are_those_of_the_formula() {
    let shape = Shape { batch: 1, seq: 4 * TILE + 7, heads: 2, dim: 128 };
    let x = Random::new(3).tensor::<f32>(shape, 1.0);
    for (bits, per_number) in [(Bits::Eight, 8.5), (Bits::Four, 4.5)] {
        let coded = 3.0 * TILE as f64 * per_number / 8.0;
        let recent = (TILE + 7) as f64 * 2.0;
        assert_eq!(quantized(bits, &x, &x).bytes() as f64, (coded + recent) * 2.0 * 2.0 * 128.0);
    }
}

#[test]
fn forgetting_keeps_the_rest() {
    let mut random = Random::new(4);
    let shape = Shape { batch: 1, seq: 6 * TILE + 9, heads: 2, dim: 6 };
    let (k, v) = (outliers(&mut random, shape), outliers(&mut random, shape));
    let mut cache = QuantizedCache::new(Bits::Four, 2, (6, 6), 4 * TILE).unwrap();
    let whole = held(&quantized(Bits::Four, &k, &v));
    for piece in pieces(0..shape.seq) {
        cache.forget(piece.start.saturating_sub(2 * TILE + 3));
        cache.append(tokens(&k, piece.clone()), tokens(&v, piece)).unwrap();
    }
    let start = 3 * TILE;
    assert_eq!((cache.start(), cache.end(), cache.room()), (start, shape.seq, TILE - 9));
    let rest = start..shape.seq;
    for (got, whole) in held(&cache).iter().zip(&whole) {
        assert_eq!(got.as_slice(), flat(tokens(whole, rest.clone())));
    }
    cache.forget(5 * TILE + 1);
    assert_eq!((cache.start(), cache.end()), (5 * TILE, shape.seq));
    cache.forget(usize::MAX);
    assert_eq!((cache.start(), cache.end()), (6 * TILE, shape.seq));
    cache.clear();
    cache.append(tokens(&k, 0..4 * TILE), tokens(&v, 0..4 * TILE)).unwrap();
    assert_eq!(held(&cache)[0].as_slice()[..600], whole[0].as_slice()[..600]);
}

fn flat(x: TensorRef<'_, f32>) -> Vec<f32> {
    let Shape { seq, heads, .. } = x.shape();
    (0..seq * heads).flat_map(|n| x.row(0, n / heads, n % heads).to_vec()).collect()
}

#[test]
fn what_codes_can_not_stand_for_is_refused() {
    let shape = Shape { batch: 1, seq: 3, heads: 1, dim: 4 };
    let fine = Tensor::<f32>::zeros(shape).unwrap();
    let mut cache = QuantizedCache::new(Bits::Eight, 1, (4, 4), 5).unwrap();
    cache.append(fine.view(), fine.view()).unwrap();
    for bad in [f32::NAN, f32::INFINITY, -65408.0, f32::MAX] {
        let mut data = vec![0.0; 12];
        data[7] = bad;
        let bad = Tensor::from_vec(data, shape).unwrap();
        let refused = [
            cache.append(tokens(&bad, 0..2), tokens(&fine, 0..2)),
            cache.append(tokens(&fine, 0..2), tokens(&bad, 0..2)),
        ];
        assert!(refused.iter().all(|r| matches!(r, Err(Error::InvalidParameter { .. }))));
    }
    let refused = cache.append(fine.view(), fine.view());
    assert_eq!(refused, Err(Error::CacheFull { len: 3, capacity: 5, appended: 3 }));
    let other = Tensor::<f32>::zeros(Shape { dim: 5, ..shape }).unwrap();
    let refused = cache.append(fine.view(), other.view());
    assert!(matches!(refused, Err(Error::ShapeMismatch { .. })));
    assert_eq!((cache.end(), held(&cache)[0].as_slice()), (3, fine.as_slice()));
    for sizes in [(usize::MAX, 4, 5), (1, usize::MAX, 5), (1, 4, usize::MAX), (1 << 40, 1 << 20, 9)]
    {
        let refused = QuantizedCache::new(Bits::Four, sizes.0, (sizes.1, 4), sizes.2);
        assert!(matches!(refused, Err(Error::ShapeOverflow { .. })), "{sizes:?}");
    }
    for (min, max, bits) in [(1.0, 0.0, 8), (f32::NAN, 0.0, 8), (0.0, 65505.0, 4), (0.0, 1.0, 1)] {
        assert!(Scaling::between(min, max, bits).is_err());
    }
}

/// Attention over a store, with a poisoned workspace and output.
fn attend<E: Element>(plan: &Plan<'_>, q: TensorRef<'_, E>, stores: &[&dyn KvStore]) -> Vec<f32> {
    let shape = plan.out_shape();
    let mut out = vec![E::from_f32(f32::NAN); shape.checked_len().unwrap()];
    let mut workspace = Workspace::for_plan(plan);
    workspace.poison();
    let outputs = (TensorMut::new(&mut out, shape).unwrap(), None);
    plan.forward_cached(q, stores, outputs, &mut workspace).unwrap();
    out.iter().map(|x| x.to_f32()).collect()
}

fn planned<'a>(
    attention: &'a Attention,
    phase: Phase,
    [q, kv]: [Shape; 2],
    width: usize,
) -> Plan<'a> {
    let v = Shape { dim: width, ..kv };
    match phase {
        Phase::Prompt => attention.plan(q, kv, v).unwrap(),
        Phase::Generated => attention.plan_decode(q, kv, v).unwrap(),
    }
}

fn wide(x: &Tensor<f32>) -> Vec<f64> {
    x.as_slice().iter().map(|x| f64::from(*x)).collect()
}

fn exact(q: &Tensor<f32>, k: &Tensor<f32>, v: &Tensor<f32>, mask: &Mask) -> Vec<f64> {
    let data = [q, k, v].map(wide);
    let shapes = [q, k, v].map(|x| x.shape());
    let input = |n: usize| Input { data: &data[n], shape: shapes[n] };
    let scale = 1.0 / (q.shape().dim as f64).sqrt();
    let Partial { out, .. } =
        foveal::reference::attention([input(0), input(1), input(2)], scale, mask).unwrap();
    out
}

/// Both phases, all levels, groups of 1, 3, 7 and 16 heads, any widths: the definition on the numbers that codes stand for.
#[test]
fn attention_over_codes_is_that_over_their_numbers() {
    let mut random = Random::new(5);
    for (n, (group, key_dim, value_dim, rows)) in
        [(1, 64, 64, 1), (3, 40, 80, 2), (7, 130, 24, 1), (16, 24, 130, 3), (2, 128, 192, 5)]
            .into_iter()
            .enumerate()
    {
        let kv = Shape { batch: 1, seq: 3 * TILE + 7, heads: 2, dim: key_dim };
        let q = Shape { batch: 1, seq: rows, heads: 2 * group, dim: key_dim };
        let (k, v) =
            (outliers(&mut random, kv), outliers(&mut random, Shape { dim: value_dim, ..kv }));
        let narrow = random.tensor::<bf16>(q, 0.5);
        let data = narrow.as_slice().iter().map(|x| x.to_f32()).collect();
        let q = Tensor::from_vec(data, q).unwrap();
        let mask = if n % 2 == 0 { Mask::causal() } else { Mask::window(TILE + 100) };
        for bits in BITS {
            let cache = quantized(bits, &k, &v);
            let [keys, values] = held(&cache);
            let expected = exact(&q, &keys, &values, &mask);
            for (cpu, phase) in
                cpus().flat_map(|cpu| [(cpu, Phase::Prompt), (cpu, Phase::Generated)])
            {
                let attention = Attention::new().mask(mask.clone()).cpu(cpu);
                let plan = planned(&attention, phase, [q.shape(), kv], value_dim);
                let what = format!("{bits:?} {phase:?} {} {group}", cpu.level);
                let got = error(&attend(&plan, q.view(), &[&cache]), &expected);
                assert!(got <= 5e-6, "{what}: {got:e}");
                let got = error(&attend(&plan, narrow.view(), &[&cache]), &expected);
                assert!(got <= 8e-3, "{what} of bf16: {got:e}");
            }
        }
    }
}

/// How far outputs may be from those of the numbers that were appended: scores move by the products of queries and errors
/// of keys, weights by the exponential of twice that, outputs by the weights and by the errors of values.
#[test]
fn the_error_of_codes_is_bounded() {
    let mut random = Random::new(6);
    let kv = Shape { batch: 1, seq: 4 * TILE, heads: 1, dim: 32 };
    let (k, v) = (random.tensor::<f32>(kv, 2.0), random.tensor::<f32>(kv, 1.0));
    let q = random.tensor::<f32>(Shape { seq: 4, ..kv }, 1.0);
    let mut errors = vec![];
    for bits in BITS {
        let cache = quantized(bits, &k, &v);
        let count = bits.count() as u32;
        let [keys, values] = held(&cache);
        let far = |a: &Tensor<f32>, b: &Tensor<f32>, range: f32| {
            let step = Scaling::between(-range, range, count).unwrap();
            let bound = reach(step, count) + f64::from(range) / 256.0;
            for (a, b) in a.as_slice().iter().zip(b.as_slice()) {
                assert!(f64::from((a - b).abs()) <= bound, "{a} {b} {bound}");
            }
            bound
        };
        let (key_error, value_error) = (far(&keys, &k, 2.0), far(&values, &v, 1.0));
        let mask = Mask::causal();
        let plain = exact(&q, &k, &v, &mask);
        for cpu in cpus() {
            let attention = Attention::new().mask(mask.clone()).cpu(cpu);
            let plan = planned(&attention, Phase::Generated, [q.shape(), kv], 32);
            let got = attend(&plan, q.view(), &[&cache]);
            let mut worst = 0.0f64;
            for (n, (got, plain)) in got.iter().zip(&plain).enumerate() {
                let row = q.view().row(0, n / 32, 0);
                let moved =
                    row.iter().map(|q| f64::from(q.abs())).sum::<f64>() * key_error / 32f64.sqrt();
                let bound = ((2.0 * moved).exp() - 1.0) + value_error + 1e-5;
                let off = (f64::from(*got) - plain).abs();
                assert!(off <= bound, "{bits:?} {off} {bound}");
                worst = worst.max(off);
            }
            errors.push((bits, worst));
        }
    }
    // Finer codes are closer by about the ratio of their steps.
    let worst = |bits| errors.iter().filter(|e| e.0 == bits).fold(0.0, |m: f64, e| m.max(e.1));
    assert!(worst(Bits::Eight) < worst(Bits::Four) / 4.0, "{errors:?}");
}

/// Threads, what else is in the batch (of any store), and how many rows share a call.
#[test]
fn bits_do_not_depend_on_company() {
    let mut random = Random::new(7);
    let kv = Shape { batch: 1, seq: 3 * TILE + 30, heads: 2, dim: 40 };
    let (k, v) = (outliers(&mut random, kv), outliers(&mut random, kv));
    let short = Shape { seq: 20, ..kv };
    let (few_k, few_v) = (tokens(&k, 0..20), tokens(&v, 0..20));
    let mut plain = ContiguousCache::<bf16>::new(2, (40, 40), 20).unwrap();
    plain.append(few_k, few_v).unwrap();
    let mut half = ContiguousCache::<f16>::new(2, (40, 40), 20).unwrap();
    half.append(few_k, few_v).unwrap();
    let (eight, four) = (quantized(Bits::Eight, &k, &v), quantized(Bits::Four, &k, &v));
    let mut few = QuantizedCache::new(Bits::Four, 2, (40, 40), 20).unwrap();
    few.append(few_k, few_v).unwrap();
    let stores: [&dyn KvStore; 5] = [&eight, &plain, &four, &half, &few];
    assert_eq!(short.seq, plain.end());
    for (heads, cpu, phase) in [2, 6, 24].into_iter().flat_map(|heads| {
        cpus()
            .flat_map(move |cpu| [Phase::Prompt, Phase::Generated].map(|phase| (heads, cpu, phase)))
    }) {
        let q = random.tensor::<bf16>(Shape { batch: 5, seq: 4, heads, dim: 40 }, 1.0);
        let run = |threads: usize, range: std::ops::Range<usize>, rows: std::ops::Range<usize>| {
            let threads = Threads::at_most(NonZeroUsize::new(threads).unwrap());
            let attention = Attention::new().cpu(Cpu { threads, ..cpu });
            let shape = Shape { batch: range.len(), seq: rows.len(), heads, dim: 40 };
            let row = heads * 40;
            let own =
                |b: usize| &q.as_slice()[(b * 4 + rows.start) * row..(b * 4 + rows.end) * row];
            let data: Vec<bf16> = range.clone().flat_map(|b| own(b).to_vec()).collect();
            let plan = planned(&attention, phase, [shape, Shape { batch: range.len(), ..kv }], 40);
            attend(&plan, TensorRef::new(&data, shape).unwrap(), &stores[range])
        };
        let all = run(1, 0..5, 0..4);
        assert_eq!(all, run(3, 0..5, 0..4));
        let alone: Vec<f32> = (0..5).flat_map(|b| run(1, b..b + 1, 0..4)).collect();
        assert_eq!(all, alone, "{} {phase:?} {heads}", cpu.level);
        let by_row: Vec<f32> = (0..4).flat_map(|r| run(1, 0..1, r..r + 1)).collect();
        assert_eq!(all[..by_row.len()], by_row, "{} {phase:?} {heads}", cpu.level);
    }
}

/// However a prompt is cut, as long as no piece crosses a multiple of a tile.
#[test]
fn how_a_prompt_is_cut() {
    let mut random = Random::new(8);
    let shape = Shape { batch: 1, seq: 3 * TILE + 40, heads: 2, dim: 24 };
    let [q, k, v] = [(); 3].map(|()| outliers(&mut random, shape));
    for (bits, cpu) in BITS.into_iter().flat_map(|bits| cpus().map(move |cpu| (bits, cpu))) {
        let attention = Attention::new().mask(Mask::causal()).cpu(cpu);
        let in_pieces = |cuts: &[usize]| {
            let mut cache = QuantizedCache::new(bits, 2, (24, 24), shape.seq).unwrap();
            let mut out = vec![];
            for piece in cuts.windows(2).flat_map(|cut| pieces(cut[0]..cut[1])) {
                let q = tokens(&q, piece.clone());
                cache.append(tokens(&k, piece.clone()), tokens(&v, piece)).unwrap();
                let plan = planned(&attention, Phase::Prompt, [q.shape(), shape], 24);
                out.extend(attend(&plan, q, &[&cache]));
            }
            out
        };
        let whole = in_pieces(&[0, shape.seq]);
        for cuts in [&[0, 1, 300, 301, shape.seq][..], &[0, 255, 257, 513, 700, shape.seq]] {
            assert_eq!(in_pieces(cuts), whole, "{} {cuts:?}", cpu.level);
        }
    }
}

/// A query that is not finite reaches its own row only, and weights are looked at through codes.
#[test]
fn rows_keep_to_themselves() {
    let mut random = Random::new(9);
    let kv = Shape { batch: 1, seq: 3 * TILE + 1, heads: 1, dim: 16 };
    let (k, v) = (random.tensor::<f32>(kv, 1.0), random.tensor::<f32>(kv, 1.0));
    let cache = quantized(Bits::Eight, &k, &v);
    let shape = Shape { seq: 3, heads: 2, ..kv };
    let mut q = random.tensor::<f32>(shape, 1.0).into_vec();
    let clean = Tensor::from_vec(q.clone(), shape).unwrap();
    q[16] = f32::NAN;
    let dirty = Tensor::from_vec(q, shape).unwrap();
    for (cpu, phase) in cpus().flat_map(|cpu| [(cpu, Phase::Prompt), (cpu, Phase::Generated)]) {
        let attention = Attention::new().mask(Mask::causal()).cpu(cpu);
        let plan = planned(&attention, phase, [shape, kv], 16);
        let (a, b) =
            (attend(&plan, clean.view(), &[&cache]), attend(&plan, dirty.view(), &[&cache]));
        assert!(b[16..32].iter().all(|x| x.is_nan()));
        assert_eq!((&a[..16], &a[32..]), (&b[..16], &b[32..]), "{} {phase:?}", cpu.level);
        let mut lse = vec![f32::NAN; 6];
        let mut out = vec![f32::NAN; a.len()];
        let outputs = (
            TensorMut::new(&mut out, shape).unwrap(),
            Some(TensorMut::new(&mut lse, shape.per_row()).unwrap()),
        );
        let mut workspace = Workspace::for_plan(&plan);
        let stores: [&dyn KvStore; 1] = [&cache];
        plan.forward_cached(clean.view(), &stores, outputs, &mut workspace).unwrap();
        let lse = TensorRef::new(&lse, shape.per_row()).unwrap();
        let of = Forwarded::cached(clean.view(), &stores, lse);
        let sums = plan.column_sums(of, 0..3, Per::KvHead).unwrap();
        let total: f32 = sums.as_slice().iter().sum();
        assert!((total - 6.0).abs() < 1e-4, "{total}");
    }
}

/// Both maps of differential attention look at half of the channels each.
#[test]
fn differential_attention_reads_halves_of_codes() {
    let mut random = Random::new(10);
    let kv = Shape { batch: 1, seq: 3 * TILE + 4, heads: 2, dim: 2 * 20 };
    let (k, v) = (random.tensor::<f32>(kv, 1.0), random.tensor::<f32>(kv, 1.0));
    let q = [(); 2].map(|()| random.tensor::<f32>(Shape { seq: 3, heads: 4, dim: 20, ..kv }, 1.0));
    let weight = [1.0; 40];
    for (bits, cpu) in BITS.into_iter().flat_map(|bits| cpus().map(move |cpu| (bits, cpu))) {
        let attention = Attention::new().mask(Mask::causal()).cpu(cpu);
        let lambda = Lambda { first: [&[0.1], &[0.2]], second: [&[0.3], &[0.1]], init: 0.3 };
        let norm = RmsNorm { weight: &weight, epsilon: 1e-5 };
        let layer = Differential { attention: &attention, lambda, norm };
        let coded = quantized(bits, &k, &v);
        let [keys, values] = held(&coded);
        let mut plain = ContiguousCache::<f32>::new(2, (40, 40), kv.seq).unwrap();
        plain.append(keys.view(), values.view()).unwrap();
        for phase in [Phase::Prompt, Phase::Generated] {
            let run = |store: &dyn KvStore| {
                layer.forward_cached(q.each_ref().map(Tensor::view), &[store], phase).unwrap().out
            };
            let (got, expected) = (run(&coded), run(&plain));
            let expected: Vec<f64> = expected.as_slice().iter().map(|x| f64::from(*x)).collect();
            let off = error(got.as_slice(), &expected);
            assert!(off <= 2e-5, "{bits:?} {phase:?} {}: {off:e}", cpu.level);
        }
    }
}
