//! Sequences that hold the same pages read them together, and have the bits of sequences that share nothing.

mod support;

use foveal::cache::{ContiguousCache, KvStore, KvTile, PagePool, PagedCache, SharedTile, TILE};
use foveal::{Attention, Cpu, DType, Element, Mask, Shape, Tensor, TensorMut, Threads, Workspace};
use half::{bf16, f16};
use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use support::{Random, cpus};

const KV_HEADS: usize = 2;
const DIMS: (usize, usize) = (24, 40);

/// Sequences of a pool, and each of them in a cache of its own.
struct Family<E: Element> {
    pool: PagePool<E>,
    paged: Vec<PagedCache<E>>,
    plain: Vec<ContiguousCache<E>>,
    random: Random,
}

impl<E: Element> Family<E> {
    fn new(pages: usize) -> Family<E> {
        let pool = PagePool::new(KV_HEADS, DIMS, pages).unwrap();
        Family { pool, paged: vec![], plain: vec![], random: Random::new(1) }
    }

    fn numbers(&mut self, seq: usize) -> [Tensor<f32>; 2] {
        let shape = |dim| Shape { batch: 1, seq, heads: KV_HEADS, dim };
        [self.random.tensor(shape(DIMS.0), 1.0), self.random.tensor(shape(DIMS.1), 1.0)]
    }

    fn create(&mut self, length: usize) -> usize {
        self.paged.push(self.pool.create());
        self.plain.push(ContiguousCache::new(KV_HEADS, DIMS, 2048).unwrap());
        self.append(self.paged.len() - 1, length);
        self.paged.len() - 1
    }

    fn append(&mut self, n: usize, length: usize) {
        let [k, v] = self.numbers(length);
        self.paged[n].append(k.view(), v.view()).unwrap();
        self.plain[n].append(k.view(), v.view()).unwrap();
    }

    /// A sequence with the first `end` tokens of another one and `own` of its own.
    fn fork(&mut self, of: usize, end: usize, own: usize) -> usize {
        self.paged.push(self.paged[of].fork(end).unwrap());
        let mut plain = ContiguousCache::new(KV_HEADS, DIMS, 2048).unwrap();
        // What was rounded once is not changed by another rounding.
        for start in (0..end).step_by(TILE) {
            let positions = start..(start + TILE).min(end);
            let [k, v] = self.rows(of, positions);
            plain.append(k.view(), v.view()).unwrap();
        }
        self.plain.push(plain);
        self.append(self.paged.len() - 1, own);
        self.paged.len() - 1
    }

    fn rows(&self, of: usize, positions: Range<usize>) -> [Tensor<E>; 2] {
        let tiles: Vec<_> =
            (0..KV_HEADS).map(|head| self.plain[of].tile(head, positions.clone())).collect();
        let gather = |keys: bool, dim: usize| {
            let mut data: Vec<E> = vec![];
            for n in 0..positions.len() {
                for tile in &tiles {
                    let rows = if keys { tile.keys.rows() } else { tile.values.rows() };
                    let row = number_rows(rows.unwrap(), n);
                    data.extend(row.into_iter().map(E::from_f32));
                }
            }
            let shape = Shape { batch: 1, seq: positions.len(), heads: KV_HEADS, dim };
            Tensor::from_vec(data, shape).unwrap()
        };
        [gather(true, DIMS.0), gather(false, DIMS.1)]
    }
}

fn number_rows(rows: foveal::cache::KvRows<'_>, n: usize) -> Vec<f32> {
    use foveal::cache::KvRows;
    fn wide<E: Element>(row: &[E]) -> Vec<f32> {
        row.iter().map(|x| x.to_f32()).collect()
    }
    match rows {
        KvRows::F32(rows) => wide(rows.row(n)),
        KvRows::F16(rows) => wide(rows.row(n)),
        KvRows::Bf16(rows) => wide(rows.row(n)),
        other => panic!("{other:?}"),
    }
}

/// Forks and forks of forks, whole and broken pages, and sequences that share nothing.
fn family<E: Element>() -> Family<E> {
    let mut family = Family::new(60);
    let root = family.create(1300);
    for own in [1, 40, 300, 0, 513, 7] {
        family.fork(root, 1300, own);
    }
    let short = family.fork(root, 1024, 5);
    family.fork(root, 512, 1);
    family.fork(short, 1029, 600);
    family.fork(short, 1029, 0);
    family.create(700);
    family.create(3);
    // Two that end in one broken page, one of which does not hold all of it.
    family.fork(root, 1200, 0);
    family.fork(root, 1200, 0);
    family
}

/// Output and log-sum-exp, by the bits, with poisoned memory.
fn decode<E: Element>(
    attention: &Attention<'_>,
    q: &Tensor<E>,
    stores: &[&dyn KvStore],
) -> Vec<u32> {
    let held = stores.iter().map(|store| store.end() - store.start()).max().unwrap();
    let keys = Shape { seq: held, heads: KV_HEADS, ..q.shape() };
    let values = Shape { dim: DIMS.1, ..keys };
    let plan = attention.plan_decode(q.shape(), keys, values).unwrap();
    let shape = plan.out_shape();
    let mut out = vec![E::from_f32(f32::NAN); shape.checked_len().unwrap()];
    let mut lse = vec![f32::NAN; shape.per_row().checked_len().unwrap()];
    let mut workspace = Workspace::for_plan(&plan);
    workspace.poison();
    let outputs = (
        TensorMut::new(&mut out, shape).unwrap(),
        Some(TensorMut::new(&mut lse, shape.per_row()).unwrap()),
    );
    plan.forward_cached(q.view(), stores, outputs, &mut workspace).unwrap();
    let out = out.into_iter().map(|x| x.to_f32().to_bits());
    out.chain(lse.into_iter().map(f32::to_bits)).collect()
}

fn stores<E: Element>(family: &Family<E>) -> (Vec<&dyn KvStore>, Vec<&dyn KvStore>) {
    let plain = family.plain.iter().map(|cache| cache as _).collect();
    (family.paged.iter().map(|cache| cache as _).collect(), plain)
}

fn has_the_bits_of_caches_of_their_own<E: Element>() {
    let mut family = family::<E>();
    let batch = family.paged.len();
    // A row a head, groups that fill more than a pass together, and groups whose tiles are packed.
    let queries: Vec<Tensor<E>> = [(1, 2), (3, 4), (1, 14), (5, 26)]
        .into_iter()
        .map(|(seq, heads)| family.random.tensor(Shape { batch, seq, heads, dim: DIMS.0 }, 2.0))
        .collect();
    let (paged, plain) = stores(&family);
    for (cpu, q) in cpus().flat_map(|cpu| queries.iter().map(move |q| (cpu, q))) {
        for mask in [Mask::causal(), Mask::window(700), Mask::full()] {
            let attention = Attention::new().mask(mask).cpu(cpu);
            let (shared, alone) = (decode(&attention, q, &paged), decode(&attention, q, &plain));
            assert!(shared == alone, "{} {} {:?}", E::DTYPE, cpu.level, q.shape());
        }
    }
}

#[test]
fn sharing_changes_no_bit() {
    has_the_bits_of_caches_of_their_own::<f32>();
    has_the_bits_of_caches_of_their_own::<f16>();
    has_the_bits_of_caches_of_their_own::<bf16>();
}

#[test]
fn nor_do_threads_masks_of_heads_and_sequences_or_terms() {
    let mut family = family::<f32>();
    let batch = family.paged.len();
    let q: Tensor<f32> = family.random.tensor(Shape { batch, seq: 2, heads: 4, dim: DIMS.0 }, 2.0);
    let (paged, plain) = stores(&family);
    let by_head = [100, 600, 3, 2000].map(Mask::window).to_vec();
    let by_sequence = (0..batch).map(|n| Mask::window(150 * n + 1)).collect();
    let sinks = [0.5, -1.0, 2.0, 0.0];
    for Cpu { level, .. } in cpus() {
        for mask in [
            Mask::causal(),
            Mask::per_head(by_head.clone()),
            Mask::per_sequence(Vec::clone(&by_sequence)),
        ] {
            let run = |stores: &[&dyn KvStore], n: usize| {
                let threads = Threads::at_most(NonZeroUsize::new(n).unwrap());
                let attention = Attention::new().mask(mask.clone()).cpu(Cpu { level, threads });
                let attention = attention.sinks(&sinks).alibi(foveal::position::Slopes::Standard);
                decode(&attention, &q, stores)
            };
            let expected = run(&plain, 1);
            for threads in [1, 2, 3] {
                assert!(run(&paged, threads) == expected, "{level} {mask} {threads} threads");
            }
        }
    }
}

#[test]
fn numbers_that_are_not_finite_stay_with_those_who_see_them() {
    let mut family = Family::<f32>::new(20);
    let root = family.create(500);
    let [mut k, v] = family.numbers(100);
    let mut numbers = k.clone().into_vec();
    numbers[30 * KV_HEADS * DIMS.0] = f32::NAN;
    k = Tensor::from_vec(numbers, k.shape()).unwrap();
    family.paged[root].append(k.view(), v.view()).unwrap();
    family.plain[root].append(k.view(), v.view()).unwrap();
    for own in 0..5 {
        family.fork(root, 600, 20 * own);
    }
    let q: Tensor<f32> =
        family.random.tensor(Shape { batch: 6, seq: 1, heads: 4, dim: DIMS.0 }, 1.0);
    let (paged, plain) = stores(&family);
    for cpu in cpus() {
        // The longer ones no longer see position 530.
        let attention = Attention::new().mask(Mask::window(110)).cpu(cpu);
        let (shared, alone) = (decode(&attention, &q, &paged), decode(&attention, &q, &plain));
        let nan = |bits: &u32| f32::from_bits(*bits).is_nan();
        assert!(shared.iter().any(nan) && !shared.iter().all(nan));
        assert!(shared.iter().zip(&alone).all(|(a, b)| a == b || nan(a) && nan(b)));
    }
}

/// A store that counts how often its tiles are asked for.
#[derive(Debug)]
struct Counted<'a> {
    store: &'a dyn KvStore,
    tiles: &'a AtomicUsize,
}

impl KvStore for Counted<'_> {
    fn end(&self) -> usize {
        self.store.end()
    }
    fn start(&self) -> usize {
        self.store.start()
    }
    fn kv_heads(&self) -> usize {
        self.store.kv_heads()
    }
    fn dims(&self) -> (usize, usize) {
        self.store.dims()
    }
    fn dtype(&self) -> DType {
        self.store.dtype()
    }
    fn shared_tile(&self, position: usize) -> Option<SharedTile> {
        self.store.shared_tile(position)
    }
    fn tile(&self, head: usize, positions: Range<usize>) -> KvTile<'_> {
        self.tiles.fetch_add(1, Ordering::Relaxed);
        self.store.tile(head, positions)
    }
}

#[test]
fn a_shared_page_is_read_once_for_up_to_48_rows() {
    let mut family = Family::<f32>::new(40);
    let root = family.create(4 * TILE);
    for _ in 0..15 {
        family.fork(root, 4 * TILE, 10);
    }
    family.append(root, 10);
    let (paged, _) = stores(&family);
    let tiles = AtomicUsize::new(0);
    let counted: Vec<_> =
        paged.iter().map(|store| Counted { store: *store, tiles: &tiles }).collect();
    let counted: Vec<&dyn KvStore> = counted.iter().map(|store| store as _).collect();
    let read = |heads: usize| {
        let shape = Shape { batch: 16, seq: 1, heads, dim: DIMS.0 };
        let q: Tensor<f32> = Random::new(9).tensor(shape, 1.0);
        tiles.store(0, Ordering::Relaxed);
        decode(&Attention::new().mask(Mask::causal()), &q, &counted);
        tiles.load(Ordering::Relaxed)
    };
    // Four shared tiles and 16 of the sequences' own, of two heads: 16 rows are a pass, 96 are two.
    assert_eq!(read(KV_HEADS), KV_HEADS * (4 + 16));
    assert_eq!(read(6 * KV_HEADS), KV_HEADS * (2 * 4 + 16));
}
