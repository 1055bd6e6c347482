//! A pool of pages against plain caches, through random appends, forks, frees and forgetting, and attention over it.

mod support;

use foveal::cache::{ContiguousCache, KvRows, KvStore, PagePool, SequenceId, TILE};
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
    plain: Vec<(SequenceId, ContiguousCache<f32>)>,
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
        let (id, plain) = &mut self.plain[n];
        let (free, before) =
            (self.pool.free_pages(), self.pool.store(*id).unwrap().pages().to_vec());
        let tiles = (plain.end() + count - plain.start()).div_ceil(TILE);
        match self.pool.append(*id, k.view(), v.view()) {
            Ok(()) => {
                plain.grow(plain.end() - plain.start() + count).unwrap();
                plain.append(k.view(), v.view()).unwrap();
                let after = self.pool.store(*id).unwrap().pages().to_vec();
                self.copied += usize::from(after[..before.len()] != before);
            }
            Err(Error::OutOfPages { needed, free: left }) => {
                assert_eq!(left, free);
                assert!(needed > free && needed <= tiles - before.len() + 1);
                self.refused += 1;
            }
            Err(other) => panic!("{other}"),
        }
        let (id, plain) = &self.plain[n];
        assert_same(&self.pool.store(*id).unwrap(), plain, plain.start());
    }

    fn fork(&mut self) {
        let n = self.pick();
        let (id, plain) = &self.plain[n];
        let (start, end) = (plain.start(), plain.end());
        let at = match self.random.below(3) {
            0 => start + self.random.below(end - start + 1),
            _ => end,
        };
        let fork = self.pool.fork(*id, at).unwrap();
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
            assert_same(&self.pool.store(fork).unwrap(), &cut, start);
            self.plain.push((fork, cut));
        } else {
            self.pool.free(fork).unwrap();
        }
    }

    fn forget(&mut self) {
        let n = self.pick();
        let before = self.random.below(self.plain[n].1.end() + 2);
        let (id, plain) = &mut self.plain[n];
        self.pool.forget(*id, before).unwrap();
        plain.forget(before);
    }

    fn free(&mut self) {
        let n = self.pick();
        let (id, _) = self.plain.swap_remove(n);
        self.pool.free(id).unwrap();
        assert_eq!(self.pool.free(id), Err(Error::UnknownSequence));
        assert!(self.pool.store(id).is_err() && self.pool.fork(id, 0).is_err());
    }

    /// Pages are held as often as sequences hold them, and all others are free.
    fn count(&self) {
        let mut held = HashMap::new();
        for (id, plain) in &self.plain {
            let store = self.pool.store(*id).unwrap();
            assert_eq!((store.start(), store.end()), (plain.start(), plain.end()));
            store.pages().iter().for_each(|page| *held.entry(*page).or_insert(0) += 1);
        }
        assert_eq!(held.len() + self.pool.free_pages(), self.pool.pages());
    }

    fn all(&self) {
        for (id, plain) in &self.plain {
            assert_same(&self.pool.store(*id).unwrap(), plain, plain.start());
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
    while !twin.plain.is_empty() {
        twin.free();
    }
    assert_eq!(twin.pool.free_pages(), 40);
}

#[test]
fn shared_pages_are_taken_once() {
    let mut pool = pool::<f32>(5);
    let mut random = Random::new(2);
    let [k, v] = numbers(&mut random, 2 * TILE + 10);
    let first = pool.create();
    pool.append(first, k.view(), v.view()).unwrap();
    assert_eq!(pool.free_pages(), 2);
    let forks: Vec<_> = (0..10).map(|_| pool.fork(first, 2 * TILE).unwrap()).collect();
    assert_eq!(pool.free_pages(), 2);
    // One token each: a page each, until there are none.
    let token = |n: usize| (tokens(&k, n..n + 1), tokens(&v, n..n + 1));
    for (n, fork) in forks.iter().enumerate() {
        let (k, v) = token(n);
        let result = pool.append(*fork, k, v);
        assert_eq!(
            result,
            if n < 2 { Ok(()) } else { Err(Error::OutOfPages { needed: 1, free: 0 }) }
        );
    }
    // The last page of the first sequence is shared with a fork: the first to write copies it, and there is no page for it.
    let tail = pool.fork(first, 2 * TILE + 10).unwrap();
    let (one_k, one_v) = token(0);
    assert_eq!(pool.append(first, one_k, one_v), Err(Error::OutOfPages { needed: 1, free: 0 }));
    pool.free(forks[0]).unwrap();
    pool.append(first, one_k, one_v).unwrap();
    assert_eq!(pool.free_pages(), 0);
    // The fork is the page's only holder now, and writes in place.
    pool.append(tail, one_k, one_v).unwrap();
    let (a, b) = (pool.store(first).unwrap(), pool.store(tail).unwrap());
    assert_same(&a, &b, 0);
    assert_eq!(a.pages()[..2], b.pages()[..2]);
    assert_ne!(a.pages()[2], b.pages()[2]);
}

#[test]
fn what_does_not_fit_is_refused() {
    let mut pool = pool::<f32>(1);
    let id = pool.create();
    let [k, v] = numbers(&mut Random::new(3), 3);
    let wrong = Tensor::<f32>::zeros(Shape { batch: 1, seq: 3, heads: HEADS, dim: 9 }).unwrap();
    assert!(matches!(pool.append(id, wrong.view(), v.view()), Err(Error::ShapeMismatch { .. })));
    assert!(matches!(pool.append(id, k.view(), wrong.view()), Err(Error::ShapeMismatch { .. })));
    assert!(matches!(pool.fork(id, 1), Err(Error::OutOfRange { .. })));
    pool.append(id, k.view(), v.view()).unwrap();
    assert!(pool.fork(id, 3).is_ok());
    assert!(matches!(pool.fork(id, 4), Err(Error::OutOfRange { .. })));
    for (heads, dim, pages) in [(1, 1, usize::MAX), (usize::MAX, 2, 1), (2, usize::MAX, 1)] {
        let refused = PagePool::<f32>::new(heads, (dim, 1), pages);
        assert!(matches!(refused, Err(Error::ShapeOverflow { .. })));
    }
}

/// A batch of sequences of other lengths, some with a common beginning, has the bits of plain caches.
fn attention_over_pages<E: Element>() {
    let mut random = Random::new(4);
    let dims = (24, 40);
    let mut pool = PagePool::<E>::new(2, dims, 12).unwrap();
    let shape = |seq, dim| Shape { batch: 1, seq, heads: 2, dim };
    let prefix = TILE + 100;
    let lengths = [prefix + 3, prefix + 300, 7, prefix];
    let k: Tensor<f32> = random.tensor(shape(700, dims.0), 1.0);
    let v: Tensor<f32> = random.tensor(shape(700, dims.1), 1.0);
    let root = pool.create();
    pool.append(root, tokens(&k, 0..prefix), tokens(&v, 0..prefix)).unwrap();
    let mut plain = vec![];
    let mut ids = vec![];
    for (n, &length) in lengths.iter().enumerate() {
        let mut cache = ContiguousCache::<E>::new(2, dims, 700).unwrap();
        let shared = if length >= prefix { prefix } else { 0 };
        let id = if shared > 0 { pool.fork(root, prefix).unwrap() } else { pool.create() };
        cache.append(tokens(&k, 0..shared), tokens(&v, 0..shared)).unwrap();
        let own = (20 * n + 100)..(20 * n + 100 + length - shared);
        let (k, v) = (tokens(&k, own.clone()), tokens(&v, own));
        cache.append(k, v).unwrap();
        pool.append(id, k, v).unwrap();
        plain.push(cache);
        ids.push(id);
    }
    let paged: Vec<_> = ids.iter().map(|id| pool.store(*id).unwrap()).collect();
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
