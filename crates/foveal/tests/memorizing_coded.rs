//! Memories of codes: what they retrieve is what the keys themselves retrieve.

mod support;

use foveal::cache::{ContiguousCache, KvKeys, KvRows, KvStore};
use foveal::memory::memorizing::Tokens;
use foveal::memory::{CodedMemory, MemorizingState, MemoryStore};
use foveal::{Cpu, Element, Error, Phase, Shape, Tensor};
use half::{bf16, f16};
use std::ops::Range;
use support::memorizing::{Call, SMALL, Sizes, listed};
use support::{Random, cpus, tokens as cut};

const LONG: Sizes = Sizes {
    seq: 2100,
    heads: 4,
    kv_heads: 2,
    key_dim: 16,
    value_dim: 70,
    segment: 420,
    top: 9,
    capacity: 1500,
    ..SMALL
};

type Coded<S> = MemorizingState<CodedMemory<ContiguousCache<S>>>;

/// Room for what is remembered, a segment, and what is left of a tile.
fn room(sizes: Sizes) -> usize {
    sizes.capacity + sizes.segment + 3 * foveal::cache::TILE
}

fn coded<S: Element>(call: &Call<f32>, cpu: Cpu) -> Coded<S> {
    let Sizes { kv_heads, key_dim, value_dim, .. } = call.sizes;
    let keys = ContiguousCache::new(kv_heads, (key_dim, 0), room(call.sizes)).unwrap();
    call.options(cpu).state(call.heads(), CodedMemory::new(keys, value_dim).unwrap()).unwrap()
}

fn part(call: &Call<f32>, range: Range<usize>) -> Tokens<'_, f32> {
    call.with([&call.q, &call.k, &call.v].map(|x| cut(x, range.clone())))
}

/// q̂ · k̂ of the keys that a memory has as rows, in f64.
fn scores(store: &dyn KvStore, q: &[f32], head: usize, range: Range<usize>) -> Vec<(f64, usize)> {
    let norm = (q.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() + 1e-6).sqrt();
    let score = |at: usize| {
        let KvKeys::Rows(rows) = store.tile(head, at..at + 1).keys else { panic!("rows") };
        let key: Vec<f32> = match rows {
            KvRows::F32(rows) => rows.row(0).to_vec(),
            KvRows::F16(rows) => rows.row(0).iter().map(|x| x.to_f32()).collect(),
            KvRows::Bf16(rows) => rows.row(0).iter().map(|x| x.to_f32()).collect(),
            _ => panic!("other rows"),
        };
        q.iter().zip(&key).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>() / norm
    };
    range.map(|at| (score(at), at)).collect()
}

fn retrieves_the_best<S: Element>(sizes: Sizes) {
    let call: Call<f32> = Call::random(sizes, &mut Random::new(1));
    for cpu in cpus() {
        let mut state = coded::<S>(&call, cpu);
        for start in (0..sizes.seq).step_by(sizes.segment) {
            let own = start..(start + sizes.segment).min(sizes.seq);
            let mut single = state.clone();
            let before = state.clone();
            let remembered = before.tokens() - before.remembered()..before.tokens();
            let forward = state.forward(&part(&call, own.clone()), Phase::Prompt).unwrap();
            let few = own.start..own.start + 3;
            let generated = single.forward(&part(&call, few), Phase::Generated).unwrap();
            for (t, head) in (0..own.len()).step_by(29).flat_map(|t| [(t, 0), (t, 3)]) {
                let got: Vec<usize> = forward.selected.of(t, head).collect();
                assert_eq!(got.len(), sizes.top.min(remembered.len()));
                let query = call.q.view().row(0, own.start + t, head);
                let exact = before.store().exact();
                let mut all = scores(exact, query, head / 2, remembered.clone());
                let score = |at: usize| all[at - remembered.start].0;
                assert!(got.windows(2).all(|x| score(x[0]) >= score(x[1]) - 1e-6), "order");
                let least = got.iter().map(|&at| score(at)).fold(f64::INFINITY, f64::min);
                all.sort_by(|a, b| b.0.total_cmp(&a.0));
                let missed = all[..got.len()].iter().filter(|x| !got.contains(&x.1));
                assert!(missed.into_iter().all(|x| x.0 <= least + 1e-6), "{} missed", cpu.level);
                if t == 0 {
                    assert_eq!(generated.selected.of(0, head).collect::<Vec<_>>(), got);
                }
            }
        }
    }
}

#[test]
fn nothing_is_missed() {
    retrieves_the_best::<bf16>(LONG);
    retrieves_the_best::<f16>(Sizes { top: 1, value_dim: 8, ..LONG });
    retrieves_the_best::<f32>(Sizes { top: 300, key_dim: 33, capacity: 900, ..LONG });
}

/// Keys in a few crowds, so close that codes can't tell them apart.
#[test]
fn nothing_is_missed_in_a_crowd() {
    let sizes = Sizes { seq: 1600, segment: 800, heads: 2, kv_heads: 1, top: 5, ..LONG };
    let mut call: Call<f32> = Call::random(sizes, &mut Random::new(2));
    let center = call.k.view().row(0, 0, 0).to_vec();
    let mut keys = call.k.view_mut();
    for t in 0..800 {
        let row = keys.row_mut(0, t, 0);
        let random: Vec<f32> = row.to_vec();
        for ((x, center), random) in row.iter_mut().zip(&center).zip(random) {
            *x = center + 2e-4 * random;
        }
    }
    for cpu in cpus() {
        let mut state = coded::<f32>(&call, cpu);
        state.forward(&part(&call, 0..800), Phase::Prompt).unwrap();
        let before = state.clone();
        let forward = state.forward(&part(&call, 800..1600), Phase::Prompt).unwrap();
        let exact = before.store().exact();
        for t in (0..800).step_by(97) {
            let got: Vec<usize> = forward.selected.of(t, 1).collect();
            let query = call.q.view().row(0, 800 + t, 1);
            let mut all = scores(exact, query, 0, 0..800);
            let least = got.iter().map(|&at| all[at].0).fold(f64::INFINITY, f64::min);
            all.sort_by(|a, b| b.0.total_cmp(&a.0));
            assert!(all[..5].iter().all(|x| got.contains(&x.1) || x.0 <= least + 1e-6));
        }
        // All the same: the earliest.
        let mut same = call.clone();
        let shape = same.k.shape();
        same.k = Tensor::from_vec([&center[..]; 1600].concat(), shape).unwrap();
        let mut state = coded::<bf16>(&same, cpu);
        let forward = state.forward(&same.tokens(), Phase::Prompt).unwrap();
        assert_eq!(forward.selected.of(1599, 0).collect::<Vec<_>>(), [0, 1, 2, 3, 4]);
    }
}

#[test]
fn no_bit_depends_on_cuts() {
    let call: Call<f32> = Call::random(LONG, &mut Random::new(3));
    for cpu in cpus() {
        let whole = coded::<bf16>(&call, cpu).forward(&call.tokens(), Phase::Prompt).unwrap();
        let mut state = coded::<bf16>(&call, cpu);
        let mut out = vec![];
        for start in (0..LONG.seq).step_by(300) {
            let tokens = part(&call, start..start + 300);
            out.extend(state.forward(&tokens, Phase::Prompt).unwrap().out.into_vec());
        }
        assert!(out == whole.out.as_slice(), "{}", cpu.level);
        state.clear();
        let again = state.forward(&call.tokens(), Phase::Prompt).unwrap();
        assert!(again == whole, "{} cleared", cpu.level);
    }
}

/// Values are read from codes: a step of 1/255 of a token's range and the rounding to bf16 before it.
#[test]
fn values_are_those_of_codes() {
    let call: Call<f32> = Call::random(LONG, &mut Random::new(4));
    for cpu in cpus() {
        let coded = coded::<f32>(&call, cpu).forward(&call.tokens(), Phase::Prompt).unwrap();
        let exact = call.forward(cpu);
        let (a, b) = (listed(&coded.selected, LONG), listed(&exact.selected, LONG));
        let same = a.iter().zip(&b).filter(|(a, b)| a == b).count();
        assert!(same * 1000 >= 998 * a.len(), "{same} of {}", a.len());
        let largest =
            |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
        // Numbers are between -1 and 1, so that rounding costs 2⁻⁹ and half a step 2⁻⁸.
        let error = largest(coded.memory.as_slice(), exact.memory.as_slice());
        assert!((1e-4..0.0075).contains(&error), "{}: {error}", cpu.level);
        assert!(coded.local == exact.local);
    }
}

/// A store with values takes up a memory where it was left.
#[test]
fn a_store_of_rows_is_coded_again() {
    let sizes = Sizes { seq: 1260, capacity: 5000, ..LONG };
    let call: Call<f32> = Call::random(sizes, &mut Random::new(5));
    let cpu = cpus().last().unwrap();
    let rows = ContiguousCache::<bf16>::new(2, (16, 70), room(sizes)).unwrap();
    let memory = CodedMemory::new(rows, 70).unwrap();
    let mut state = call.options(cpu).state(call.heads(), memory).unwrap();
    state.forward(&part(&call, 0..840), Phase::Prompt).unwrap();
    let found = CodedMemory::new(state.store().keys().clone(), 70).unwrap();
    let mut resumed = call.options(cpu).resume(call.heads(), found).unwrap();
    assert_eq!((resumed.tokens(), resumed.open(), resumed.remembered()), (840, 0, 840));
    let own = part(&call, 840..1260);
    let (a, b) = (state.forward(&own, Phase::Prompt), resumed.forward(&own, Phase::Prompt));
    assert!(a.unwrap() == b.unwrap());
    let new = call.options(cpu).state(call.heads(), resumed.store().clone());
    assert!(matches!(new, Err(Error::InvalidParameter { .. })), "{new:?}");
}

#[test]
fn bytes_are_those_of_codes() {
    let sizes = Sizes { heads: 8, kv_heads: 8, key_dim: 64, value_dim: 64, ..LONG };
    let call: Call<f32> = Call::random(sizes, &mut Random::new(6));
    let mut state = coded::<bf16>(&call, cpus().last().unwrap());
    state.forward(&call.tokens(), Phase::Prompt).unwrap();
    let tiles = state.store().end() / 256 - state.store().start() / 256 - 1;
    let recent = state.store().end() % 256 + 256;
    // 8 bits a number, 32 bits for 64 of them; a distance for each tile, coded or not, and head.
    let codes = tiles * 256 * 8 * 2 * (64 + 4);
    let expected = codes + recent * 8 * 2 * 64 * 2 + (tiles + 2) * 8 * 4;
    assert_eq!(state.store().held_bytes(), Some(expected));
    // A memory of 262144 entries takes less than 300 MiB.
    let large = 262_144 / 256 * (256 * 8 * 2 * (64 + 4) + 8 * 4) + 512 * 8 * 2 * 64 * 2;
    assert!(large <= 300 << 20, "{large}");
}

#[test]
fn what_does_not_fit_is_refused() {
    let call: Call<f32> = Call::random(SMALL, &mut Random::new(7));
    let rows = |values| ContiguousCache::<bf16>::new(1, (5, values), 1000).unwrap();
    assert!(matches!(CodedMemory::new(rows(3), 7), Err(Error::InvalidParameter { .. })));
    let memory = CodedMemory::new(rows(0), 7).unwrap();
    assert!(matches!(CodedMemory::new(memory, 7), Err(Error::InvalidParameter { .. })));
    let mut used = rows(0);
    let none = Tensor::<f32>::zeros(Shape { dim: 0, ..call.k.shape() }).unwrap();
    used.append(call.k.view(), none.view()).unwrap();
    assert!(matches!(CodedMemory::new(used, 7), Err(Error::InvalidParameter { .. })));
    let mut odd = call.clone();
    odd.v.view_mut().row_mut(0, 1, 0)[3] = f32::NAN;
    let mut state = coded::<bf16>(&odd, cpus().next().unwrap());
    let refused = state.forward(&odd.tokens(), Phase::Prompt);
    assert!(matches!(refused, Err(Error::InvalidParameter { .. })), "{refused:?}");
}
