//! Masks that differ by head or sequence, through the engine: results as if alone, and only the tiles that count.

mod support;

use foveal::cache::{ContiguousCache, KvStore, KvTile, TILE};
use foveal::mask::{BlockSize, Blocks, Extent, Tree};
use foveal::{Attention, DType, Mask, Phase, Plan, Shape, Tensor, TensorRef, Workspace};
use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Mutex;
use support::{Random, cpus, error, reference, tokens};

const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const DIM: usize = 16;
const PHASES: [Phase; 2] = [Phase::Prompt, Phase::Generated];

/// A cache that notes which tiles of which heads are read.
#[derive(Debug)]
struct Noting {
    cache: ContiguousCache<f32>,
    read: Mutex<BTreeSet<(usize, usize)>>,
}

impl KvStore for Noting {
    fn end(&self) -> usize {
        self.cache.end()
    }
    fn start(&self) -> usize {
        self.cache.start()
    }
    fn kv_heads(&self) -> usize {
        self.cache.kv_heads()
    }
    fn dims(&self) -> (usize, usize) {
        self.cache.dims()
    }
    fn dtype(&self) -> DType {
        self.cache.dtype()
    }
    fn tile(&self, head: usize, positions: Range<usize>) -> KvTile<'_> {
        self.read.lock().unwrap().insert((head, positions.start / TILE));
        self.cache.tile(head, positions)
    }
}

fn cache(k: TensorRef<'_, f32>, v: TensorRef<'_, f32>) -> ContiguousCache<f32> {
    let mut cache = ContiguousCache::new(KV_HEADS, (DIM, DIM), 4096).unwrap();
    cache.append(k, v).unwrap();
    cache
}

fn plan<'a>(attention: &'a Attention<'_>, phase: Phase, q: Shape, k: Shape) -> Plan<'a> {
    match phase {
        Phase::Prompt => attention.plan(q, k, k),
        Phase::Generated => attention.plan_decode(q, k, k),
    }
    .unwrap()
}

/// Output and log-sum-exp over caches, whose buffers are NaN before.
fn cached(plan: &Plan<'_>, q: TensorRef<'_, f32>, stores: &[&dyn KvStore]) -> [Tensor<f32>; 2] {
    let shapes = [plan.out_shape(), plan.out_shape().per_row()];
    let [mut out, mut lse] = shapes.map(|shape| {
        Tensor::from_vec(vec![f32::NAN; shape.checked_len().unwrap()], shape).unwrap()
    });
    let mut workspace = Workspace::for_plan(plan);
    let outputs = (out.view_mut(), Some(lse.view_mut()));
    plan.forward_cached(q, stores, outputs, &mut workspace).unwrap();
    [out, lse]
}

/// Diagonal blocks of 256 and the first column, causal within: BigBird's and Longformer's shape.
fn blocks(tokens: usize) -> Mask {
    let count = tokens.div_ceil(TILE);
    let visible: Vec<_> =
        (0..count * count).map(|n| n % count == 0 || n % count == n / count).collect();
    let layout = Extent { batch: 1, heads: 1, queries: count, keys: count };
    let size = BlockSize { queries: TILE, keys: TILE };
    Mask::from(Blocks::new(&visible, layout, size).unwrap()).and(Mask::causal())
}

fn masks(tokens: usize) -> Vec<Mask> {
    vec![Mask::window(10), Mask::streaming(2, 300), blocks(tokens), Mask::keys(600..700)]
}

fn sequence(tokens: usize) -> [Tensor<f32>; 3] {
    let mut random = Random::new(21);
    let shape = |heads| Shape { batch: 1, seq: tokens, heads, dim: DIM };
    [HEADS, KV_HEADS, KV_HEADS].map(|heads| random.tensor(shape(heads), 1.5))
}

#[test]
fn heads_with_masks_of_their_own_compute_what_they_compute_alone() {
    let total = 1500;
    let [q, k, v] = sequence(total);
    let stored = cache(k.view(), v.view());
    for (phase, cpu) in PHASES.into_iter().flat_map(|phase| cpus().map(move |cpu| (phase, cpu))) {
        for rows in [1, 3, 60] {
            let queries = tokens(&q, total - rows..total);
            let run = |mask| {
                let attention = Attention::new().mask(mask).cpu(cpu);
                cached(&plan(&attention, phase, queries.shape(), k.shape()), queries, &[&stored])
            };
            let together = run(Mask::per_head(masks(total)));
            for (head, mask) in masks(total).into_iter().enumerate() {
                for (whole, alone) in together.iter().zip(&run(mask)) {
                    for i in 0..rows {
                        let [whole, alone] = [whole, alone].map(|x| {
                            x.view().row(0, i, head).iter().map(|x| x.to_bits()).collect::<Vec<_>>()
                        });
                        assert_eq!(whole, alone, "{phase:?} {} {rows} {i} {head}", cpu.level);
                    }
                }
            }
        }
    }
}

/// Tiles that no head of a group sees are not read.
#[test]
fn only_the_tiles_that_some_head_of_a_group_sees_are_read() {
    let total = 1500;
    let [q, k, v] = sequence(total);
    // The last positions see, in tiles of 256: 5 / 0 and 4 to 5 / 0 and 5 / 2.
    let expected = [(0, 0), (0, 4), (0, 5), (1, 0), (1, 2), (1, 5)];
    for (phase, cpu) in PHASES.into_iter().flat_map(|phase| cpus().map(move |cpu| (phase, cpu))) {
        for rows in [1, 50] {
            let stored = Noting { cache: cache(k.view(), v.view()), read: Mutex::default() };
            let attention = Attention::new().mask(Mask::per_head(masks(total))).cpu(cpu);
            let queries = tokens(&q, total - rows..total);
            cached(&plan(&attention, phase, queries.shape(), k.shape()), queries, &[&stored]);
            let read: Vec<_> = stored.read.into_inner().unwrap().into_iter().collect();
            assert_eq!(read, expected, "{phase:?} {} {rows} rows", cpu.level);
        }
    }
}

/// Speculation: each sequence of a batch has its own length and its own tree of guesses.
#[test]
fn trees_over_caches_of_different_lengths() {
    let mut random = Random::new(22);
    let lengths = [300, 13];
    let parents: [&[Option<usize>]; 2] =
        [&[None, Some(0), Some(0), Some(2), None], &[None, None, Some(1), Some(0), Some(3)]];
    let rows = parents[0].len();
    let shape = |seq, heads| Shape { batch: 1, seq, heads, dim: DIM };
    let data = lengths.map(|length| {
        [(rows, HEADS), (length, KV_HEADS), (length, KV_HEADS)]
            .map(|(seq, heads)| random.tensor::<f32>(shape(seq, heads), 1.5))
    });
    let trees: Vec<_> =
        (0..2).map(|b| Mask::from(Tree::new(lengths[b] - rows, parents[b]).unwrap())).collect();
    let queries: Vec<f32> = data.iter().flat_map(|[q, ..]| q.as_slice()).copied().collect();
    let q = Tensor::from_vec(queries, Shape { batch: 2, ..shape(rows, HEADS) }).unwrap();
    let caches = data.each_ref().map(|[_, k, v]| cache(k.view(), v.view()));
    let stores = caches.each_ref().map(|cache| cache as &dyn KvStore);
    let k = Shape { batch: 2, ..shape(300, KV_HEADS) };
    for (phase, cpu) in PHASES.into_iter().flat_map(|phase| cpus().map(move |cpu| (phase, cpu))) {
        let attention = Attention::new().mask(Mask::per_sequence(trees.clone())).cpu(cpu);
        let got = cached(&plan(&attention, phase, q.shape(), k), q.view(), &stores);
        for (b, [q, k, v]) in data.iter().enumerate() {
            let scale = 1.0 / (DIM as f64).sqrt();
            let expected = reference((q, k, v), &trees[b], scale);
            for (got, expected) in got.iter().zip([expected.0, expected.1]) {
                let got = &got.as_slice()[b * expected.len()..][..expected.len()];
                let error = error(got, &expected);
                assert!(error < 2e-6, "{phase:?} {} sequence {b}: {error:e}", cpu.level);
            }
        }
        let swapped = Mask::per_sequence(trees.iter().rev().cloned().collect());
        refused(&Attention::new().mask(swapped).cpu(cpu), (&q, k), &stores, phase);
    }
}

/// A tree made for a shorter sequence does not fit a longer one; nothing is written then.
fn refused(
    attention: &Attention<'_>,
    (q, k): (&Tensor<f32>, Shape),
    stores: &[&dyn KvStore],
    phase: Phase,
) {
    let plan = plan(attention, phase, q.shape(), k);
    let mut out = Tensor::<f32>::zeros(plan.out_shape()).unwrap();
    let mut workspace = Workspace::for_plan(&plan);
    let result = plan.forward_cached(q.view(), stores, (out.view_mut(), None), &mut workspace);
    assert!(matches!(result, Err(foveal::Error::MaskShape { .. })), "{result:?}");
    assert!(out.as_slice().iter().all(|&x| x == 0.0));
}

/// What a plan says about such masks.
#[test]
fn plans_say_which_head_sees_what() {
    let attention = Attention::new().mask(Mask::per_head(vec![
        Mask::causal(),
        Mask::causal(),
        Mask::window(128),
        Mask::streaming(4, 128),
    ]));
    let shape = Shape { batch: 1, seq: 300, heads: HEADS, dim: DIM };
    let words = attention.plan(shape, shape, shape).unwrap().explain().mask;
    let expected = "by head (0 to 1: causal, 2: window 128, 3: first 4 and window 128)";
    assert_eq!(words, expected);
}
