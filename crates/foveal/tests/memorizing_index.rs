//! Memorizing Transformers with an inverted file: what its definition in f64 retrieves, exact where all lists are searched, and
//! what bits may not depend on.

mod support;

use foveal::cache::{KvRows, KvStore};
use foveal::memory::memorizing::{Index, Memorizing};
use foveal::memory::{MemorizingState, MemoryStore};
use foveal::{Cpu, Element, Error, Phase, Shape, Tensor, Threads};
use half::{bf16, f16};
use std::num::NonZeroUsize;
use std::ops::Range;
use support::memorizing::{Call, SMALL, Sizes};
use support::{Random, cpus, tokens as cut};

const SIZES: Sizes = Sizes {
    seq: 700,
    heads: 4,
    kv_heads: 2,
    key_dim: 16,
    value_dim: 5,
    segment: 50,
    top: 6,
    capacity: 10_000,
    ..SMALL
};

/// From 128 entries on.
fn index(probes: usize) -> Option<Index> {
    Some(Index::new(4, probes).unwrap())
}

fn options(call: &Call<f32>, index: Option<Index>, cpu: Cpu) -> Memorizing {
    call.options(cpu).index(index)
}

fn state<S: Element>(
    call: &Call<f32>,
    index: Option<Index>,
    cpu: Cpu,
) -> MemorizingState<impl MemoryStore + Clone + use<S>> {
    let options = options(call, index, cpu);
    options.state(call.heads(), options.store::<S>(call.heads()).unwrap()).unwrap()
}

/// Outputs, and what each query retrieved.
type Read = (Vec<f32>, Vec<Vec<usize>>);

fn read<M: MemoryStore>(
    state: &mut MemorizingState<M>,
    call: &Call<f32>,
    (range, phase): (Range<usize>, Phase),
) -> Read {
    let own = [&call.q, &call.k, &call.v].map(|x| cut(x, range.clone()));
    let forward = state.forward(&call.with(own), phase).unwrap();
    let heads = (0..range.len()).flat_map(|t| (0..call.sizes.heads).map(move |head| (t, head)));
    let retrieved = heads.map(|(t, head)| forward.selected.of(t, head).collect());
    (forward.out.into_vec(), retrieved.collect())
}

/// Everything, cut before each of some tokens.
fn all<M: MemoryStore>(
    state: &mut MemorizingState<M>,
    call: &Call<f32>,
    (cuts, phase): (&[usize], Phase),
) -> Read {
    let mut read_all = (vec![], vec![]);
    let mut first = 0;
    for &end in cuts.iter().chain([&call.sizes.seq]) {
        let (out, retrieved) = read(state, call, (first..end, phase));
        read_all.0.extend(out);
        read_all.1.extend(retrieved);
        first = end;
    }
    read_all
}

fn same(what: &str, a: &Read, b: &Read) {
    assert_eq!(a.1, b.1, "{what}");
    assert!(a.0.iter().zip(&b.0).all(|(a, b)| a.to_bits() == b.to_bits()), "{what}");
}

#[test]
fn with_all_lists_it_is_exact() {
    fn exact<S: Element>(sizes: Sizes) {
        let call: Call<f32> = Call::random(sizes, &mut Random::new(1));
        for cpu in cpus() {
            let expected = all(&mut state::<S>(&call, None, cpu), &call, (&[], Phase::Prompt));
            let mut indexed = state::<S>(&call, index(4), cpu);
            same("prompt", &all(&mut indexed, &call, (&[], Phase::Prompt)), &expected);
            assert!(indexed.centroids().unwrap().0 > 0);
            let cuts: Vec<usize> = (1..sizes.seq.div_ceil(23)).map(|n| n * 23).collect();
            let generated = |index| {
                let mut state = state::<S>(&call, index, cpu);
                all(&mut state, &call, (&cuts, Phase::Generated))
            };
            same("generated", &generated(index(4)), &generated(None));
        }
    }
    exact::<f32>(SIZES);
    exact::<bf16>(Sizes { key_dim: 17, heads: 2, previous: true, ..SIZES });
    exact::<f16>(Sizes { capacity: 170, key_dim: 33, ..SIZES });
}

/// The dot product in f64.
fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

/// The numbers with the largest scores, best first.
fn best(count: usize, scores: impl Iterator<Item = (f64, usize)>) -> Vec<usize> {
    let mut scores: Vec<(f64, usize)> = scores.collect();
    scores.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    scores.into_iter().take(count).map(|x| x.1).collect()
}

#[test]
fn a_query_finds_the_best_of_the_lists_that_suit_it() {
    for (heads, kv_heads, probes) in [(4, 2, 1), (2, 2, 2), (3, 1, 3)] {
        let sizes = Sizes { heads, kv_heads, capacity: 300, ..SIZES };
        let call: Call<f32> = Call::random(sizes, &mut Random::new(2));
        for (cpu, phase) in cpus().flat_map(|c| [(c, Phase::Prompt), (c, Phase::Generated)]) {
            let mut state = state::<f32>(&call, index(probes), cpu);
            read(&mut state, &call, (0..650, Phase::Prompt));
            let (_, retrieved) = read(&mut state, &call, (650..660, phase));
            let dim = sizes.key_dim;
            let (_, centroids) = state.centroids().unwrap();
            let key = |kv_head: usize, at: usize| match state
                .store()
                .tile(kv_head, at..at + 1)
                .keys
                .rows()
            {
                Some(KvRows::F32(rows)) => rows.row(0).to_vec(),
                _ => panic!("rows of f32"),
            };
            for (n, got) in retrieved.iter().enumerate() {
                let (t, head) = (n / heads, n % heads);
                let kv_head = head * kv_heads / heads;
                let own = &centroids[kv_head * 4 * dim..(kv_head + 1) * 4 * dim];
                let nearest = |x: &[f32], count| {
                    best(count, own.chunks(dim).enumerate().map(|(l, c)| (dot(x, c), l)))
                };
                let query = call.q.view().row(0, 650 + t, head);
                let lists = nearest(query, probes);
                let entries = (350..650).map(|at| (key(kv_head, at), at));
                let entries = entries.filter(|(key, _)| lists.contains(&nearest(key, 1)[0]));
                let expected = best(sizes.top, entries.map(|(key, at)| (dot(query, &key), at)));
                assert_eq!(*got, expected, "{} {phase:?} {n}", cpu.level);
            }
        }
    }
}

#[test]
fn bits_do_not_depend_on_cuts_threads_or_company() {
    let call: Call<f32> = Call::random(Sizes { capacity: 260, ..SIZES }, &mut Random::new(3));
    for cpu in cpus() {
        let whole = all(&mut state::<f32>(&call, index(2), cpu), &call, (&[], Phase::Prompt));
        for threads in [1, 2, 3] {
            let cpu = Cpu { threads: Threads::at_most(NonZeroUsize::new(threads).unwrap()), ..cpu };
            let mut cut = state::<f32>(&call, index(2), cpu);
            let cuts = [1, 49, 50, 51, 133, 400, 401, 699];
            same("cut", &all(&mut cut, &call, (&cuts, Phase::Prompt)), &whole);
            // A new document begins as the first one did.
            cut.clear();
            assert_eq!(cut.centroids().unwrap(), (0, &[][..]));
            same("again", &all(&mut cut, &call, (&[], Phase::Prompt)), &whole);
        }
        let one: Vec<usize> = (1..700).collect();
        let alone = all(&mut state::<f32>(&call, index(2), cpu), &call, (&one, Phase::Generated));
        let some: Vec<usize> = (1..14).map(|n| n * 53).collect();
        let mut together = state::<f32>(&call, index(2), cpu);
        same("company", &all(&mut together, &call, (&some, Phase::Generated)), &alone);
    }
}

#[test]
fn later_tokens_change_nothing_before_them() {
    let call: Call<f32> = Call::random(SIZES, &mut Random::new(4));
    let mut other = call.clone();
    let row = SIZES.kv_heads * SIZES.key_dim;
    let mut keys = other.k.as_slice().to_vec();
    keys[431 * row..].iter_mut().for_each(|x| *x = 1.0 - *x);
    other.k = Tensor::from_vec(keys, other.k.shape()).unwrap();
    for cpu in cpus() {
        let [a, b] = [&call, &other]
            .map(|call| all(&mut state::<f32>(call, index(1), cpu), call, (&[], Phase::Prompt)));
        let rows = 431 * SIZES.heads;
        assert_eq!(a.1[..rows], b.1[..rows]);
        let numbers = rows * SIZES.value_dim;
        assert_eq!(a.0[..numbers], b.0[..numbers]);
        assert_ne!(a.0, b.0);
    }
}

#[test]
fn a_state_goes_on_from_its_store_and_its_centroids() {
    let call: Call<f32> = Call::random(Sizes { capacity: 260, ..SIZES }, &mut Random::new(5));
    let cpu = cpus().next().unwrap();
    // Before there are lists, where they have just become due, between, and at a border of segments.
    for at in [100, 150, 333, 600] {
        let mut state = state::<f32>(&call, index(2), cpu);
        read(&mut state, &call, (0..at, Phase::Prompt));
        let (made_at, centroids) = state.centroids().unwrap();
        let mut resumed = state.memorizing().resume(state.heads(), state.store().clone()).unwrap();
        if made_at > 0 {
            resumed.restore_centroids(made_at, centroids).unwrap();
        }
        resumed.restore(at, state.before(), state.window()).unwrap();
        let expected = read(&mut state, &call, (at..700, Phase::Prompt));
        same("resumed", &read(&mut resumed, &call, (at..700, Phase::Prompt)), &expected);
        assert_eq!(resumed.centroids(), state.centroids());
    }
}

/// Keys around a few directions, queries near them: what an index is for.
#[test]
fn few_lists_find_nearly_all_where_keys_lie_in_groups() {
    let sizes = Sizes { seq: 1600, heads: 1, kv_heads: 1, segment: 800, top: 16, ..SIZES };
    let mut call: Call<f32> = Call::random(sizes, &mut Random::new(6));
    let around = |x: &Tensor<f32>, seed: u64| {
        let centres =
            Random::new(7).tensor::<f32>(Shape { batch: 1, seq: 16, heads: 1, dim: 16 }, 1.0);
        let noise: Tensor<f32> = Random::new(seed).tensor(x.shape(), 0.6);
        let rows = noise.as_slice().chunks(16).enumerate().flat_map(|(t, noise)| {
            let centre = centres.view().row(0, t * 7 % 16, 0).to_vec();
            noise.iter().zip(centre).map(|(a, b)| a + b).collect::<Vec<f32>>()
        });
        Tensor::from_vec(rows.collect(), x.shape()).unwrap()
    };
    (call.q, call.k) = (around(&call.q, 8), around(&call.k, 9));
    let cpu = cpus().next().unwrap();
    let found = |index| {
        let mut state = state::<f32>(&call, index, cpu);
        read(&mut state, &call, (0..800, Phase::Prompt));
        read(&mut state, &call, (800..1600, Phase::Prompt)).1
    };
    let exact = found(None);
    let recall = |probes| {
        let some = found(Some(Index::new(16, probes).unwrap()));
        let both = exact.iter().zip(&some);
        let both = both.map(|(a, b)| a.iter().filter(|at| b.contains(at)).count());
        both.sum::<usize>() as f64 / (800.0 * 16.0)
    };
    let [one, half, all] = [1, 8, 16].map(recall);
    assert!(one < half && half > 0.9 && all == 1.0, "{one} {half}");
}

#[test]
fn keys_that_are_no_numbers_are_in_no_list() {
    let mut call: Call<f32> = Call::random(SIZES, &mut Random::new(10));
    let mut keys = call.k.as_slice().to_vec();
    let row = SIZES.kv_heads * SIZES.key_dim;
    for at in [3, 200, 201, 420] {
        keys[at * row..(at + 1) * row].fill(f32::NAN);
    }
    call.k = Tensor::from_vec(keys, call.k.shape()).unwrap();
    for cpu in cpus() {
        let expected = all(&mut state::<f32>(&call, None, cpu), &call, (&[], Phase::Prompt));
        let got = all(&mut state::<f32>(&call, index(4), cpu), &call, (&[], Phase::Prompt));
        assert_eq!(got.1, expected.1);
        assert!(got.1.iter().flatten().all(|at| ![3, 200, 201, 420].contains(at)));
    }
}

#[test]
fn what_makes_no_sense_is_refused() {
    for (lists, probes) in [(0, 1), (4, 0), (4, 5), (65_537, 1), (usize::MAX, 1)] {
        assert!(matches!(Index::new(lists, probes), Err(Error::InvalidParameter { .. })));
    }
    let call: Call<f32> = Call::random(SIZES, &mut Random::new(11));
    let cpu = cpus().next().unwrap();
    let mut plain = state::<f32>(&call, None, cpu);
    assert_eq!(plain.centroids(), None);
    let mut indexed = state::<f32>(&call, index(1), cpu);
    for state in [&mut plain, &mut indexed] {
        let before = state.bytes();
        read(state, &call, (0..400, Phase::Prompt));
        assert!(state.bytes() > before);
        let count = 4 * 2 * 16;
        for (at, numbers) in [(0, count), (401, count), (200, count - 1)] {
            let refused = state.restore_centroids(at, &vec![0.5; numbers]).unwrap_err();
            assert!(matches!(refused, Error::OutOfRange { .. } | Error::LengthMismatch { .. }));
        }
    }
    assert!(plain.restore_centroids(200, &[0.5; 128]).is_err());
    // Lists of all entries: 4 bytes each and head, and the centroids.
    assert_eq!(indexed.bytes() - plain.bytes(), 4 * 2 * 400 + 4 * 128);
    assert_eq!(indexed.store().end(), 400);
}
