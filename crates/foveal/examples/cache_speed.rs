//! What quantised caches cost and save: decode of one query over 32768 tokens, and a prompt of 2048 tokens in pieces of 256,
//! against a cache of bf16.
//!
//! `cargo run --release -p foveal --example cache_speed [THREADS]`: rounds alternate between the caches; best times count.

use foveal::cache::codes::Bits;
use foveal::cache::{ContiguousCache, KvStore, QuantizedCache, pieces};
use foveal::{
    Attention, Cpu, Level, Mask, Result, Shape, Tensor, TensorMut, TensorRef, Threads, Workspace,
};
use half::bf16;
use std::num::NonZeroUsize;
use std::time::Instant;

const DIM: usize = 128;
const HEADS: usize = 8;
const LONG: usize = 32768;
const PROMPT: usize = 2048;

/// Appends to one of the caches.
enum Cache {
    Bf16(ContiguousCache<bf16>),
    Codes(QuantizedCache),
}

impl Cache {
    fn all(kv_heads: usize, capacity: usize) -> Result<[Cache; 3]> {
        let dims = (DIM, DIM);
        let codes = |bits| QuantizedCache::new(bits, kv_heads, dims, capacity).map(Cache::Codes);
        let plain = Cache::Bf16(ContiguousCache::new(kv_heads, dims, capacity)?);
        Ok([plain, codes(Bits::Eight)?, codes(Bits::Four)?])
    }

    fn append(&mut self, x: TensorRef<'_, f32>) -> Result<()> {
        match self {
            Cache::Bf16(cache) => cache.append(x, x),
            Cache::Codes(cache) => cache.append(x, x),
        }
    }

    fn clear(&mut self) {
        match self {
            Cache::Bf16(cache) => cache.clear(),
            Cache::Codes(cache) => cache.clear(),
        }
    }

    fn store(&self) -> &dyn KvStore {
        match self {
            Cache::Bf16(cache) => cache,
            Cache::Codes(cache) => cache,
        }
    }
}

fn numbers(shape: Shape) -> Result<Tensor<f32>> {
    let len = shape.seq * shape.heads * shape.dim;
    let number = |i: usize| (i * 7919 % 10007) as f32 / 5003.0 - 1.0;
    Tensor::from_vec((0..len).map(number).collect(), shape)
}

fn tokens(x: &Tensor<f32>, range: std::ops::Range<usize>) -> Result<TensorRef<'_, f32>> {
    let shape = Shape { seq: range.len(), ..x.shape() };
    let row = shape.heads * shape.dim;
    TensorRef::new(&x.as_slice()[range.start * row..range.end * row], shape)
}

fn report(what: &str, best: [f64; 3]) {
    let [bf16, eight, four] = best.map(|time| time * 1e3);
    let (e, f) = (bf16 / eight, bf16 / four);
    println!(
        "{what:34} bf16 {bf16:8.3} ms   8 bits {eight:8.3} ms, {e:.2}   4 bits {four:8.3} ms, {f:.2}"
    );
}

fn decode(cpu: Cpu, kv_heads: usize, heads: usize) -> Result<()> {
    let attention = Attention::new().mask(Mask::causal()).cpu(cpu);
    let mut caches = Cache::all(kv_heads, LONG)?;
    let block = numbers(Shape { batch: 1, seq: 1024, heads: kv_heads, dim: DIM })?;
    for cache in &mut caches {
        for _ in 0..LONG / 1024 {
            cache.append(block.view())?;
        }
    }
    let q = numbers(Shape { batch: 1, seq: 1, heads, dim: DIM })?;
    let kv = Shape { batch: 1, seq: LONG, heads: kv_heads, dim: DIM };
    let plan = attention.plan_decode(q.shape(), kv, kv)?;
    let mut workspace = Workspace::for_plan(&plan);
    let mut out = vec![0.0f32; heads * DIM];
    let mut best = [f64::INFINITY; 3];
    for _ in 0..40 {
        for (cache, best) in caches.iter().zip(&mut best) {
            let start = Instant::now();
            let out = TensorMut::new(&mut out, q.shape())?;
            plan.forward_cached(q.view(), &[cache.store()], (out, None), &mut workspace)?;
            *best = best.min(start.elapsed().as_secs_f64());
        }
    }
    report(&format!("decode {LONG}, {heads} on {kv_heads} heads"), best);
    Ok(())
}

fn prompt(cpu: Cpu) -> Result<()> {
    let attention = Attention::new().mask(Mask::causal()).cpu(cpu);
    let mut caches = Cache::all(HEADS, PROMPT)?;
    let shape = Shape { batch: 1, seq: PROMPT, heads: HEADS, dim: DIM };
    let x = numbers(shape)?;
    let mut out = vec![0.0f32; PROMPT * HEADS * DIM];
    let mut best = [f64::INFINITY; 3];
    for _ in 0..12 {
        for (cache, best) in caches.iter_mut().zip(&mut best) {
            cache.clear();
            let start = Instant::now();
            for piece in pieces(0..PROMPT) {
                let now = tokens(&x, piece.clone())?;
                cache.append(now)?;
                let plan = attention.plan(now.shape(), shape, shape)?;
                let mut workspace = Workspace::for_plan(&plan);
                let row = HEADS * DIM;
                let out = &mut out[piece.start * row..piece.end * row];
                let out = TensorMut::new(out, now.shape())?;
                plan.forward_cached(now, &[cache.store()], (out, None), &mut workspace)?;
            }
            *best = best.min(start.elapsed().as_secs_f64());
        }
    }
    report(&format!("prompt {PROMPT}, {HEADS} heads, appended"), best);
    Ok(())
}

fn main() -> Result<()> {
    let threads = std::env::args().nth(1).and_then(|n| n.parse().ok()).unwrap_or(NonZeroUsize::MIN);
    let cpu = Cpu { level: Level::detect()?, threads: Threads::at_most(threads) };
    decode(cpu, HEADS, HEADS)?;
    decode(cpu, 2, 8)?;
    prompt(cpu)
}
