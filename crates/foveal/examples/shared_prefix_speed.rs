//! What sharing a prefix saves: one generated token for each of 16 sequences of 4096 common and 64 own tokens, in pages that
//! they share, in pages of their own, and in caches of their own.
//!
//! `cargo run --release -p foveal --example shared_prefix_speed [THREADS]`: rounds alternate; best times count.

use foveal::cache::{ContiguousCache, KvStore, PagePool};
use foveal::{
    Attention, Cpu, Element, Level, Mask, Plan, Result, Shape, Tensor, TensorRef, Threads,
    Workspace,
};
use half::bf16;
use std::num::NonZeroUsize;
use std::time::Instant;

const SEQUENCES: usize = 16;
const PREFIX: usize = 4096;
const OWN: usize = 64;
const DIM: usize = 128;
const KV_HEADS: usize = 8;

fn numbers<E: Element>(shape: Shape) -> Result<Tensor<E>> {
    let len = shape.batch * shape.seq * shape.heads * shape.dim;
    let number = |i: usize| E::from_f32((i * 7919 % 10007) as f32 / 5003.0 - 1.0);
    Tensor::from_vec((0..len).map(number).collect(), shape)
}

/// Seconds of one call.
fn time<E: Element>(
    plan: &Plan<'_>,
    q: TensorRef<'_, E>,
    stores: &[&dyn KvStore],
    workspace: &mut Workspace,
) -> Result<f64> {
    let mut out = Tensor::zeros(plan.out_shape())?;
    let start = Instant::now();
    plan.forward_cached(q, stores, (out.view_mut(), None), workspace)?;
    Ok(start.elapsed().as_secs_f64())
}

fn measure<E: Element>(cpu: Cpu, group: usize) -> Result<()> {
    let shape = |seq| Shape { batch: 1, seq, heads: KV_HEADS, dim: DIM };
    let (prefix, own) = (numbers::<E>(shape(PREFIX))?, numbers::<E>(shape(OWN))?);
    let pages = (PREFIX + OWN).div_ceil(256);
    let shared = PagePool::<E>::new(KV_HEADS, (DIM, DIM), pages + SEQUENCES)?;
    let alone = PagePool::<E>::new(KV_HEADS, (DIM, DIM), SEQUENCES * pages)?;
    let mut root = shared.create();
    root.append(prefix.view(), prefix.view())?;
    let (mut forks, mut copies, mut caches) = (vec![], vec![], vec![]);
    for _ in 0..SEQUENCES {
        let (mut fork, mut copy) = (root.fork(PREFIX)?, alone.create());
        let mut cache = ContiguousCache::<E>::new(KV_HEADS, (DIM, DIM), PREFIX + OWN)?;
        fork.append(own.view(), own.view())?;
        for tokens in [prefix.view(), own.view()] {
            copy.append(tokens, tokens)?;
            cache.append(tokens, tokens)?;
        }
        forks.push(fork);
        copies.push(copy);
        caches.push(cache);
    }
    let ways: [Vec<&dyn KvStore>; 3] = [
        forks.iter().map(|store| store as _).collect(),
        copies.iter().map(|store| store as _).collect(),
        caches.iter().map(|store| store as _).collect(),
    ];
    let attention = Attention::new().mask(Mask::causal()).cpu(cpu);
    let q = numbers::<E>(Shape { batch: SEQUENCES, seq: 1, heads: group * KV_HEADS, dim: DIM })?;
    let keys = Shape { batch: SEQUENCES, ..shape(PREFIX + OWN) };
    let plan = attention.plan_decode(q.shape(), keys, keys)?;
    let mut workspace = Workspace::for_plan(&plan);
    let mut best = [f64::INFINITY; 3];
    for _ in 0..12 {
        for (way, best) in ways.iter().zip(&mut best) {
            *best = best.min(time(&plan, q.view(), way, &mut workspace)?);
        }
    }
    let [shared, alone, caches] = best.map(|seconds| 1e3 * seconds);
    println!(
        "{:<4} {group:>2} heads a key: shared pages {shared:6.2} ms, own pages {alone:6.2} ms ({:.2}x), caches {caches:6.2} ms ({:.2}x)",
        E::DTYPE.to_string(),
        alone / shared,
        caches / shared,
    );
    Ok(())
}

fn main() -> Result<()> {
    let threads = std::env::args().nth(1).and_then(|n| n.parse().ok());
    let threads = threads.map_or(Threads::all(), Threads::at_most);
    let cpu = Cpu { level: Level::detect()?, threads };
    let one = Cpu { threads: Threads::at_most(NonZeroUsize::MIN), ..cpu };
    for cpu in [one, cpu] {
        println!("{}, {} threads", cpu.level, cpu.threads.count());
        for group in [1, 4, 16] {
            measure::<f32>(cpu, group)?;
            measure::<bf16>(cpu, group)?;
        }
    }
    Ok(())
}
