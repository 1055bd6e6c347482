//! What a row's bits may not depend on: threads, the rest of the batch, how many rows share a call, how
//! a prompt was cut, and anything that the row may not see.

mod support;

use foveal::cache::{ContiguousCache, KvKeys, KvRows, KvStore};
use foveal::plan::Kernel;
use foveal::{
    Attention, Cpu, Element, Mask, Plan, Shape, Tensor, TensorMut, TensorRef, Threads, Workspace,
};
use half::{bf16, f16};
use std::num::NonZeroUsize;
use support::{Random, cpus, tokens};

const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const DIM: usize = 24;

fn sequence(tokens: usize, seed: u64) -> [Tensor<f32>; 3] {
    let mut random = Random::new(seed);
    let q = Shape { batch: 1, seq: tokens, heads: HEADS, dim: DIM };
    let kv = Shape { heads: KV_HEADS, ..q };
    [random.tensor(q, 2.0), random.tensor(kv, 2.0), random.tensor(kv, 1.0)]
}

/// Runs a plan over caches with a poisoned workspace and output.
fn cached(plan: &Plan<'_>, q: TensorRef<'_, f32>, stores: &[&dyn KvStore]) -> Vec<f32> {
    let shape = plan.out_shape();
    let mut out = vec![f32::NAN; shape.checked_len().unwrap()];
    let mut workspace = Workspace::for_plan(plan);
    workspace.poison();
    let outputs = (TensorMut::new(&mut out, shape).unwrap(), None);
    plan.forward_cached(q, stores, outputs, &mut workspace).unwrap();
    out
}

fn shapes(queries: usize, batch: usize, capacity: usize) -> [Shape; 3] {
    let q = Shape { batch, seq: queries, heads: HEADS, dim: DIM };
    let kv = Shape { seq: capacity, heads: KV_HEADS, ..q };
    [q, kv, kv]
}

fn cache<E: Element>(k: TensorRef<'_, f32>, v: TensorRef<'_, f32>) -> ContiguousCache<E> {
    let mut cache = ContiguousCache::new(KV_HEADS, (DIM, DIM), 1024).unwrap();
    cache.append(k, v).unwrap();
    cache
}

/// Feeds a prompt in pieces, forgetting what `window` can't reach.
fn in_pieces(
    attention: &Attention,
    qkv: &[Tensor<f32>; 3],
    cuts: &[usize],
    window: usize,
) -> Vec<f32> {
    let [q, k, v] = qkv;
    let mut cache = ContiguousCache::<f32>::new(KV_HEADS, (DIM, DIM), 1024).unwrap();
    let mut out = vec![];
    for cut in cuts.windows(2) {
        let piece = cut[0]..cut[1];
        cache.forget((piece.start + 1).saturating_sub(window));
        cache.append(tokens(k, piece.clone()), tokens(v, piece.clone())).unwrap();
        let [qs, ks, vs] = shapes(piece.len(), 1, 1024);
        let plan = attention.plan(qs, ks, vs).unwrap();
        out.extend(cached(&plan, tokens(q, piece), &[&cache]));
    }
    out
}

#[test]
fn how_a_prompt_is_cut() {
    let qkv = sequence(700, 11);
    let [q, k, v] = &qkv;
    for cpu in cpus() {
        for (mask, window) in [(Mask::causal(), usize::MAX), (Mask::window(130), 130)] {
            let attention = Attention::new().mask(mask).cpu(cpu);
            let whole = attention.forward(q.view(), k.view(), v.view()).unwrap().out.into_vec();
            for cuts in [&[0, 1, 700][..], &[0, 255, 257, 513, 700], &[0, 48, 350, 699, 700]] {
                assert_eq!(
                    in_pieces(&attention, &qkv, cuts, window),
                    whole,
                    "{} {cuts:?}",
                    cpu.level
                );
            }
        }
    }
}

#[test]
fn a_window_forgets_what_it_can_not_reach() {
    let [_, k, v] = sequence(700, 12);
    let mut cache = cache::<f32>(k.view(), v.view());
    cache.forget(600);
    assert_eq!((cache.start(), cache.end(), cache.room()), (512, 700, 1024 - 188));
    cache.forget(100);
    assert_eq!(cache.start(), 512);
    let kept = cache.tile(1, 600..601);
    let KvKeys::Rows(KvRows::F32(keys)) = kept.keys else { panic!("stored as f32") };
    assert_eq!(keys.row(0), k.view().row(0, 600, 1));
}

#[test]
fn threads() {
    let qkv = sequence(300, 13);
    let [q, k, v] = &qkv;
    for Cpu { level, .. } in cpus() {
        let run = |n: usize| {
            let threads = Threads::at_most(NonZeroUsize::new(n).unwrap());
            let attention = Attention::new().mask(Mask::causal()).cpu(Cpu { level, threads });
            let prompt = attention.forward(q.view(), k.view(), v.view()).unwrap();
            let last = tokens(q, 290..300);
            let generated = attention.decode(last, k.view(), v.view()).unwrap();
            (prompt, generated)
        };
        let one = run(1);
        assert_eq!(one, run(2), "{level}");
        assert_eq!(one, run(3), "{level}");
    }
}

#[test]
fn the_rest_of_the_batch() {
    let sequences = [sequence(300, 14), sequence(7, 15), sequence(513, 16)];
    let caches: Vec<_> =
        sequences.iter().map(|[_, k, v]| cache::<f32>(k.view(), v.view())).collect();
    let stores: Vec<&dyn KvStore> = caches.iter().map(|cache| cache as &dyn KvStore).collect();
    let mut queries = vec![];
    for [q, ..] in &sequences {
        let n = q.shape().seq;
        queries.extend_from_slice(&q.as_slice()[(n - 3) * HEADS * DIM..]);
    }
    for cpu in cpus() {
        let attention = Attention::new().mask(Mask::causal()).cpu(cpu);
        for decode in [false, true] {
            let plan = |batch| {
                let [q, k, v] = shapes(3, batch, 1024);
                let plan =
                    if decode { attention.plan_decode(q, k, v) } else { attention.plan(q, k, v) };
                plan.unwrap()
            };
            let q = TensorRef::new(&queries, shapes(3, 3, 0)[0]).unwrap();
            let together = cached(&plan(3), q, &stores);
            let alone: Vec<f32> = (0..3)
                .flat_map(|b| {
                    let own = &queries[b * 3 * HEADS * DIM..][..3 * HEADS * DIM];
                    let q = TensorRef::new(own, shapes(3, 1, 0)[0]).unwrap();
                    cached(&plan(1), q, &stores[b..=b])
                })
                .collect();
            assert_eq!(together, alone, "{} decode {decode}", cpu.level);
        }
    }
}

#[test]
fn how_many_generated_rows_share_a_call() {
    fn run<E: Element>() {
        let [q, k, v] = &sequence(600, 17);
        for cpu in cpus() {
            for mask in [Mask::causal(), Mask::window(100)] {
                let attention = Attention::new().mask(mask).cpu(cpu);
                let [qs, ks, vs] = shapes(30, 1, 1024);
                let plan = attention.plan_decode(qs, ks, vs).unwrap();
                let whole = cache::<E>(k.view(), v.view());
                let together = cached(&plan, tokens(q, 570..600), &[&whole]);
                let mut growing = cache::<E>(tokens(k, 0..570), tokens(v, 0..570));
                let mut one_by_one = vec![];
                for i in 570..600 {
                    growing.append(tokens(k, i..i + 1), tokens(v, i..i + 1)).unwrap();
                    let [qs, ks, vs] = shapes(1, 1, 1024);
                    let plan = attention.plan_decode(qs, ks, vs).unwrap();
                    one_by_one.extend(cached(&plan, tokens(q, i..i + 1), &[&growing]));
                }
                assert_eq!(together, one_by_one, "{} {}", cpu.level, E::DTYPE);
            }
        }
    }
    run::<f32>();
    run::<f16>();
    run::<bf16>();
}

/// Replaces the keys or values of positions from `first` on.
fn spoiled(x: &Tensor<f32>, first: usize, with: f32) -> Tensor<f32> {
    let mut data = x.as_slice().to_vec();
    data[first * KV_HEADS * DIM..].fill(with);
    Tensor::from_vec(data, x.shape()).unwrap()
}

#[test]
fn what_a_row_may_not_see() {
    let [q, k, v] = &sequence(300, 18);
    for cpu in cpus() {
        let attention = Attention::new().mask(Mask::causal()).cpu(cpu);
        let clean = attention.forward(q.view(), k.view(), v.view()).unwrap();
        for first in [1, 6, 100, 255, 256, 299] {
            for with in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e30] {
                for (k, v) in
                    [(spoiled(k, first, with), v.clone()), (k.clone(), spoiled(v, first, with))]
                {
                    let got = attention.forward(q.view(), k.view(), v.view()).unwrap();
                    let row = HEADS * DIM;
                    let what = format!("{} from {first} on {with}", cpu.level);
                    assert_eq!(
                        got.out.as_slice()[..first * row],
                        clean.out.as_slice()[..first * row],
                        "{what}"
                    );
                    assert_eq!(
                        got.lse.as_slice()[..first * HEADS],
                        clean.lse.as_slice()[..first * HEADS],
                        "{what}"
                    );
                    if !with.is_finite()
                        && got.out.as_slice()[first * row..].iter().all(|x| x.is_finite())
                    {
                        panic!("{what}: nothing of it arrived at the rows that see it");
                    }
                }
            }
        }
    }
}

#[test]
fn what_a_generated_row_may_not_see() {
    let [q, k, v] = &sequence(300, 19);
    for cpu in cpus() {
        let attention = Attention::new().mask(Mask::window(40)).cpu(cpu);
        let last = tokens(q, 280..300);
        let clean = attention.decode(last, k.view(), v.view()).unwrap().out.into_vec();
        for with in [f32::NAN, f32::INFINITY] {
            // Row r sits at 280 + r and sees 241 + r..=280 + r: the last 10 rows see position 290.
            let v = spoiled(v, 290, with);
            let got = attention.decode(last, k.view(), v.view()).unwrap().out.into_vec();
            let seen = 10 * HEADS * DIM;
            assert_eq!(got[..seen], clean[..seen], "{}", cpu.level);
            assert!(got[seen..].iter().all(|x| !x.is_finite()), "{}", cpu.level);
        }
    }
}

#[test]
fn non_finite_keys_reach_the_rows_that_see_them() {
    let [q, k, v] = &sequence(70, 20);
    for cpu in cpus() {
        let attention = Attention::new().mask(Mask::causal()).cpu(cpu);
        let k = spoiled(k, 69, f32::NAN);
        for result in [
            attention.forward(q.view(), k.view(), v.view()).unwrap(),
            attention.decode(tokens(q, 10..70), k.view(), v.view()).unwrap(),
        ] {
            let out = result.out.as_slice();
            let (before, last) = out.split_at(out.len() - HEADS * DIM);
            assert!(before.iter().all(|x| x.is_finite()), "{}", cpu.level);
            assert!(last.iter().all(|x| x.is_nan()), "{}", cpu.level);
        }
    }
}

#[test]
fn short_prompts_have_the_bits_of_the_tiles() {
    let mut random = Random::new(41);
    for (queries, keys, heads, dim) in
        [(1, 1, 2, 64), (7, 7, 6, 40), (13, 64, 4, 17), (64, 50, 2, 128), (5, 33, 2, 3)]
    {
        let shape = Shape { batch: 1, seq: queries, heads, dim };
        let kv = Shape { seq: keys, heads: 2, ..shape };
        let (q, k) = (random.tensor::<f32>(shape, 2.0), random.tensor::<f32>(kv, 2.0));
        let v = random.tensor::<f32>(kv, 1.0);
        let mut store = ContiguousCache::<f32>::new(2, (dim, dim), keys).unwrap();
        store.append(k.view(), v.view()).unwrap();
        for (cpu, mask) in cpus()
            .flat_map(|cpu| [Mask::full(), Mask::causal(), Mask::window(3)].map(|mask| (cpu, mask)))
        {
            let attention = Attention::new().mask(mask).cpu(cpu);
            let run = |capacity, kernel| {
                let planned = Shape { seq: capacity, ..kv };
                let plan = attention.plan(shape, planned, planned).unwrap();
                assert_eq!(plan.explain().kernel, kernel);
                let mut out = Tensor::<f32>::zeros(shape).unwrap();
                let mut lse = Tensor::<f32>::zeros(shape.per_row()).unwrap();
                let mut workspace = Workspace::for_plan(&plan);
                workspace.poison();
                let outputs = (out.view_mut(), Some(lse.view_mut()));
                plan.forward_cached(q.view(), &[&store], outputs, &mut workspace).unwrap();
                (out, lse)
            };
            let (short, tiled) = (run(keys, Kernel::Short), run(300, Kernel::Tiled));
            assert_eq!(short, tiled, "{queries} over {keys} on {}", cpu.level);
        }
    }
}

#[test]
fn a_nan_in_a_short_prompt_of_more_than_one_tile() {
    // 60 positions of 2 heads a group are more rows than a tile has, over keys that fit into one panel.
    let [q, k, v] = &sequence(60, 21);
    for cpu in cpus() {
        let attention = Attention::new().mask(Mask::causal()).cpu(cpu);
        let clean = attention.forward(q.view(), k.view(), v.view()).unwrap();
        let v = spoiled(v, 50, f32::NAN);
        let got = attention.forward(q.view(), k.view(), v.view()).unwrap();
        let (before, after) = got.out.as_slice().split_at(50 * HEADS * DIM);
        assert_eq!(before, &clean.out.as_slice()[..50 * HEADS * DIM], "{}", cpu.level);
        assert!(after.iter().all(|x| x.is_nan()), "{}", cpu.level);
    }
}

/// The products of a sequence are those of its own store's type, whatever the others' is.
#[test]
fn stores_of_other_types_share_a_batch() {
    let [_, k, v] = sequence(300, 21);
    let (wide, half) = (cache::<f32>(k.view(), v.view()), cache::<f16>(k.view(), v.view()));
    let pairs = cache::<bf16>(k.view(), v.view());
    let stores: [&dyn KvStore; 3] = [&wide, &pairs, &half];
    let q = Random::new(22).tensor::<bf16>(shapes(3, 3, 0)[0], 2.0);
    let rows = 3 * HEADS * DIM;
    for (cpu, decode) in cpus().flat_map(|cpu| [(cpu, false), (cpu, true)]) {
        let attention = Attention::new().mask(Mask::causal()).cpu(cpu);
        let run = |batch: std::ops::Range<usize>| {
            let [qs, ks, vs] = shapes(3, batch.len(), 1024);
            let plan =
                if decode { attention.plan_decode(qs, ks, vs) } else { attention.plan(qs, ks, vs) };
            let plan = plan.unwrap();
            let mut out = Tensor::<bf16>::zeros(qs).unwrap();
            let mut workspace = Workspace::for_plan(&plan);
            workspace.poison();
            let own = &q.as_slice()[batch.start * rows..batch.end * rows];
            let (q, outputs) = (TensorRef::new(own, qs).unwrap(), (out.view_mut(), None));
            plan.forward_cached(q, &stores[batch], outputs, &mut workspace).unwrap();
            out.into_vec()
        };
        let alone: Vec<bf16> = (0..3).flat_map(|b| run(b..b + 1)).collect();
        assert_eq!(run(0..3), alone, "{} {decode}", cpu.level);
    }
}
