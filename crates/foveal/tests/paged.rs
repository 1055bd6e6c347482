//! A pool of pages against plain caches, through random appends, forks, frees and forgetting, and attention over it.

mod support;

use foveal::cache::{ContiguousCache, KvRows, KvStore, PagePool, PagedCache, TILE};
use foveal::{
    Attention, Element, Error, Mask, Phase, Shape, Tensor, TensorMut, TensorRef, Workspace,
};
use half::{bf16, f16};
use std::collections::HashMap;
use support::{Random, cpus, tokens};

const HEADS: usize = 2;
const DIMS: (usize, usize) = (3, 2);

fn pool<E: Element>(pages: usize) -> PagePool<E> {
    PagePool::new(HEADS, DIMS, pages).unwrap()
}

fn numbers(random: &mut Random, seq: usize) -> [Tensor<f32>; 2] {
    let shape = |dim| Shape { batch: 1, seq, heads: HEADS, dim };
    [random.tensor(shape(DIMS.0), 1.0), random.tensor(shape(DIMS.1), 1.0)]
}

fn rows<'a>(rows: Option<KvRows<'a>>) -> impl Fn(usize) -> &'a [f32] {
    let Some(KvRows::F32(rows)) = rows else { panic!("stored as f32") };
    move |i| rows.row(i)
}

/// Every number of the positions from `from` on.
fn assert_same(a: &dyn KvStore, b: &dyn KvStore, from: usize) {
    assert_eq!((a.start(), a.end()), (b.start(), b.end()));
    for head in 0..HEADS {
        for start in (from / TILE * TILE..a.end()).step_by(TILE) {
            let positions = start.max(a.start())..(start + TILE).min(a.end());
            let (x, y) = (a.tile(head, positions.clone()), b.tile(head, positions.clone()));
            for (x, y) in [(x.keys.rows(), y.keys.rows()), (x.values.rows(), y.values.rows())] {
                let (x, y) = (rows(x), rows(y));
                assert!((0..positions.len()).all(|i| x(i) == y(i)), "{head} {positions:?}");
            }
        }
    }
}

/// A pool, and what its sequences should hold.
struct Twin {
    pool: PagePool<f32>,
    plain: Vec<(PagedCache<f32>, ContiguousCache<f32>)>,
    random: Random,
    refused: usize,
    copied: usize,
}

impl Twin {
    fn pick(&mut self) -> usize {
        self.random.below(self.plain.len())
    }

    fn append(&mut self) {
        let n = self.pick();
        let count = match self.random.below(8) {
            0 => self.random.below(2 * TILE),
            1 => 0,
            _ => self.random.below(60),
        };
        let [k, v] = numbers(&mut self.random, count);
        let (paged, plain) = &mut self.plain[n];
        let (free, before) = (self.pool.free_pages(), paged.pages().collect::<Vec<_>>());
        let tiles = (plain.end() + count - plain.start()).div_ceil(TILE);
        let announced = paged.pages_for(count);
        match paged.append(k.view(), v.view()) {
            Ok(()) => {
                plain.grow(plain.end() - plain.start() + count).unwrap();
                plain.append(k.view(), v.view()).unwrap();
                assert!(announced <= free);
                let after: Vec<_> = paged.pages().collect();
                self.copied += usize::from(after[..before.len()] != before);
            }
            Err(Error::OutOfPages { needed, free: left }) => {
                assert_eq!((left, needed), (free, announced));
                assert!(needed > free && needed <= tiles - before.len() + 1);
                self.refused += 1;
            }
            Err(other) => panic!("{other}"),
        }
        let (paged, plain) = &self.plain[n];
        assert_same(paged, plain, plain.start());
    }

    fn fork(&mut self) {
        let n = self.pick();
        let (paged, plain) = &self.plain[n];
        let (start, end) = (plain.start(), plain.end());
        let at = match self.random.below(3) {
            0 => start + self.random.below(end - start + 1),
            _ => end,
        };
        let fork = paged.fork(at).unwrap();
        // What a plain cache would hold: the same, cut off.
        let mut cut = ContiguousCache::new(HEADS, DIMS, at).unwrap();
        let mut copy = [vec![], vec![]];
        for position in 0..at {
            for head in 0..HEADS {
                let tile = (position >= start).then(|| plain.tile(head, position..position + 1));
                let row = |rows: Option<_>, dim| match rows {
                    Some(found) => rows_of(found),
                    None => vec![0.0; dim],
                };
                copy[0].extend(row(tile.map(|tile| tile.keys.rows()), DIMS.0));
                copy[1].extend(row(tile.map(|tile| tile.values.rows()), DIMS.1));
            }
        }
        let shape = |dim| Shape { batch: 1, seq: at, heads: HEADS, dim };
        let [k, v] = copy;
        let k = Tensor::from_vec(k, shape(DIMS.0)).unwrap();
        let v = Tensor::from_vec(v, shape(DIMS.1)).unwrap();
        cut.append(k.view(), v.view()).unwrap();
        cut.forget(start);
        // A plain cache gives up whole tiles only.
        if cut.start() == start {
            assert_same(&fork, &cut, start);
            self.plain.push((fork, cut));
        }
    }

    fn forget(&mut self) {
        let n = self.pick();
        let before = self.random.below(self.plain[n].1.end() + 2);
        let (paged, plain) = &mut self.plain[n];
        paged.forget(before);
        plain.forget(before);
    }

    fn truncate(&mut self) {
        let n = self.pick();
        let (paged, plain) = &mut self.plain[n];
        let end = paged.start() + self.random.below(paged.end() - paged.start() + 2);
        paged.truncate(end);
        plain.truncate(end);
    }

    fn free(&mut self) {
        let n = self.pick();
        if self.random.below(4) == 0 {
            let (paged, plain) = &mut self.plain[n];
            paged.clear();
            plain.clear();
        } else {
            self.plain.swap_remove(n);
        }
    }

    /// Pages are held as often as sequences hold them, and all others are free.
    fn count(&self) {
        let mut held = HashMap::new();
        for (paged, plain) in &self.plain {
            assert_eq!((paged.start(), paged.end()), (plain.start(), plain.end()));
            paged.pages().for_each(|page| *held.entry(page).or_insert(0) += 1);
        }
        assert_eq!(held.len() + self.pool.free_pages(), self.pool.pages());
    }

    fn all(&self) {
        for (paged, plain) in &self.plain {
            assert_same(paged, plain, plain.start());
        }
    }
}

fn rows_of(found: Option<KvRows<'_>>) -> Vec<f32> {
    rows(found)(0).to_vec()
}

#[test]
fn ten_thousand_operations() {
    let mut twin =
        Twin { pool: pool(40), plain: vec![], random: Random::new(1), refused: 0, copied: 0 };
    let mut forks = 0;
    for step in 0..10_000 {
        match twin.random.below(20) {
            0 => {
                twin.plain.push((twin.pool.create(), ContiguousCache::new(HEADS, DIMS, 0).unwrap()))
            }
            _ if twin.plain.is_empty() => {}
            1 | 2 if twin.plain.len() < 40 => {
                forks += 1;
                twin.fork();
            }
            1..=4 => twin.free(),
            5 => twin.forget(),
            6 => twin.truncate(),
            _ => twin.append(),
        }
        twin.count();
        if step % 100 == 0 {
            twin.all();
        }
    }
    twin.all();
    // The test saw what it is about.
    assert!(forks > 500 && twin.refused > 100 && twin.copied > 100);
    twin.plain.clear();
    assert_eq!(twin.pool.free_pages(), 40);
}

#[test]
fn shared_pages_are_taken_once() {
    let pool = pool::<f32>(5);
    let mut random = Random::new(2);
    let [k, v] = numbers(&mut random, 2 * TILE + 10);
    let mut first = pool.create();
    first.append(k.view(), v.view()).unwrap();
    assert_eq!(pool.free_pages(), 2);
    let mut forks: Vec<_> = (0..10).map(|_| first.fork(2 * TILE).unwrap()).collect();
    assert_eq!(pool.free_pages(), 2);
    // One token each: a page each, until there are none.
    let token = |n: usize| (tokens(&k, n..n + 1), tokens(&v, n..n + 1));
    for (n, fork) in forks.iter_mut().enumerate() {
        let (k, v) = token(n);
        let result = fork.append(k, v);
        assert_eq!(
            result,
            if n < 2 { Ok(()) } else { Err(Error::OutOfPages { needed: 1, free: 0 }) }
        );
    }
    // The last page of the first sequence is shared with a fork: the first to write copies it, and there is no page for it.
    let mut tail = first.fork(2 * TILE + 10).unwrap();
    let (one_k, one_v) = token(0);
    assert_eq!(first.append(one_k, one_v), Err(Error::OutOfPages { needed: 1, free: 0 }));
    forks.swap_remove(0);
    first.append(one_k, one_v).unwrap();
    assert_eq!(pool.free_pages(), 0);
    // The fork is the page's only holder now, and writes in place.
    tail.append(one_k, one_v).unwrap();
    assert_same(&first, &tail, 0);
    let same: Vec<_> = first.pages().zip(tail.pages()).map(|(a, b)| a == b).collect();
    assert_eq!(same, [true, true, false]);
}

#[test]
fn what_does_not_fit_is_refused() {
    let mut cache = pool::<f32>(1).create();
    let [k, v] = numbers(&mut Random::new(3), 3);
    let wrong = Tensor::<f32>::zeros(Shape { batch: 1, seq: 3, heads: HEADS, dim: 9 }).unwrap();
    assert!(matches!(cache.append(wrong.view(), v.view()), Err(Error::ShapeMismatch { .. })));
    assert!(matches!(cache.append(k.view(), wrong.view()), Err(Error::ShapeMismatch { .. })));
    assert!(matches!(cache.fork(1), Err(Error::OutOfRange { .. })));
    cache.append(k.view(), v.view()).unwrap();
    assert!(cache.fork(3).is_ok());
    assert!(matches!(cache.fork(4), Err(Error::OutOfRange { .. })));
    assert!(cache.clear_to(TILE + 1).is_err());
    assert_eq!((cache.start(), cache.end()), (0, 3));
    cache.clear_to(TILE).unwrap();
    assert_eq!((cache.start(), cache.end(), cache.pool().free_pages()), (TILE, TILE, 1));
    for (heads, dim) in [(usize::MAX, 2), (2, usize::MAX)] {
        let refused = PagePool::<f32>::new(heads, (dim, 1), 1);
        assert!(matches!(refused, Err(Error::ShapeOverflow { .. })));
    }
}

/// A batch of sequences of other lengths, some with a common beginning, has the bits of plain caches.
fn attention_over_pages<E: Element>() {
    let mut random = Random::new(4);
    let dims = (24, 40);
    let pool = PagePool::<E>::new(2, dims, 12).unwrap();
    let shape = |seq, dim| Shape { batch: 1, seq, heads: 2, dim };
    let prefix = TILE + 100;
    let lengths = [prefix + 3, prefix + 300, 7, prefix];
    let k: Tensor<f32> = random.tensor(shape(700, dims.0), 1.0);
    let v: Tensor<f32> = random.tensor(shape(700, dims.1), 1.0);
    let mut root = pool.create();
    root.append(tokens(&k, 0..prefix), tokens(&v, 0..prefix)).unwrap();
    let mut plain = vec![];
    let mut paged = vec![];
    for (n, &length) in lengths.iter().enumerate() {
        let mut cache = ContiguousCache::<E>::new(2, dims, 700).unwrap();
        let shared = if length >= prefix { prefix } else { 0 };
        let mut fork = if shared > 0 { root.fork(prefix).unwrap() } else { pool.create() };
        cache.append(tokens(&k, 0..shared), tokens(&v, 0..shared)).unwrap();
        let own = (20 * n + 100)..(20 * n + 100 + length - shared);
        let (k, v) = (tokens(&k, own.clone()), tokens(&v, own));
        cache.append(k, v).unwrap();
        fork.append(k, v).unwrap();
        plain.push(cache);
        paged.push(fork);
    }
    let a: Vec<&dyn KvStore> = paged.iter().map(|store| store as &dyn KvStore).collect();
    let b: Vec<&dyn KvStore> = plain.iter().map(|store| store as &dyn KvStore).collect();
    let q: Tensor<E> = random.tensor(Shape { batch: 4, seq: 3, heads: 4, dim: dims.0 }, 1.0);
    let [ks, vs] = [dims.0, dims.1].map(|dim| Shape { batch: 4, ..shape(700, dim) });
    for (cpu, phase) in cpus().flat_map(|cpu| [(cpu, Phase::Prompt), (cpu, Phase::Generated)]) {
        let attention = Attention::new().mask(Mask::causal()).cpu(cpu);
        let plan = match phase {
            Phase::Prompt => attention.plan(q.shape(), ks, vs).unwrap(),
            Phase::Generated => attention.plan_decode(q.shape(), ks, vs).unwrap(),
        };
        let run = |stores: &[&dyn KvStore]| {
            let mut out = vec![E::from_f32(f32::NAN); plan.out_shape().checked_len().unwrap()];
            let mut workspace = Workspace::for_plan(&plan);
            workspace.poison();
            let outputs = (TensorMut::new(&mut out, plan.out_shape()).unwrap(), None);
            plan.forward_cached(
                TensorRef::new(q.as_slice(), q.shape()).unwrap(),
                stores,
                outputs,
                &mut workspace,
            )
            .unwrap();
            out.into_iter().map(|x| x.to_f32()).collect::<Vec<_>>()
        };
        let (got, expected) = (run(&a), run(&b));
        assert!(expected.iter().all(|x| x.is_finite()));
        assert_eq!(got, expected, "{} {phase:?}", cpu.level);
    }
}

#[test]
fn attention_has_the_bits_of_plain_caches() {
    attention_over_pages::<f32>();
    attention_over_pages::<f16>();
    attention_over_pages::<bf16>();
}
