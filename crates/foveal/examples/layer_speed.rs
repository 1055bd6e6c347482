//! What is next to attention in a layer, one thread: norms and rotations of queries and keys, appending keys and values,
//! attention over the cache, and attention over the same keys and values as tensors `[batch, seq, heads, dim]`.
//!
//! `cargo run --release -p foveal --example layer_speed`: rounds alternate between the steps; best times count.

use foveal::cache::{ContiguousCache, KvStore};
use foveal::nn::{RmsNorm, rms_norm_in_place};
use foveal::plan::Inputs;
use foveal::position::{Rope, RopeConfig, RopeLayout};
use foveal::{
    Attention, Cpu, Level, Mask, Phase, Plan, Result, Shape, Tensor, TensorMut, TensorRef, Threads,
    Workspace,
};
use std::time::Instant;

/// Tokens of the call, tokens held after it, query heads, key/value heads, head dim.
const CALLS: [[usize; 5]; 4] =
    [[512, 512, 9, 3, 64], [2048, 2048, 8, 8, 128], [1, 512, 32, 8, 128], [1, 8192, 32, 32, 128]];
const STEPS: [&str; 5] = ["norms", "rotations", "appending", "attention", "over tensors"];
const ROUNDS: usize = 25;

/// A call's tensors.
struct Call {
    cpu: Cpu,
    phase: Phase,
    /// New queries and keys, which stand for values too, and all keys.
    shapes: [Shape; 3],
    q: Vec<f32>,
    k: Vec<f32>,
    /// All keys and all values.
    all: [Tensor<f32>; 2],
    before: ContiguousCache<f32>,
    held: ContiguousCache<f32>,
}

impl Call {
    fn new([tokens, held, heads, kv_heads, dim]: [usize; 5]) -> Result<Call> {
        let q = Shape { batch: 1, seq: tokens, heads, dim };
        let k = Shape { heads: kv_heads, ..q };
        let shapes = [q, k, Shape { seq: held, ..k }];
        let numbers = |shape: Shape| -> Vec<f32> {
            let len = shape.seq * shape.heads * shape.dim;
            (0..len).map(|i| (i * 7919 % 1009) as f32 / 504.0 - 1.0).collect()
        };
        let fill = |seq| -> Result<ContiguousCache<f32>> {
            let shape = Shape { seq, ..k };
            let rows = Tensor::from_vec(numbers(shape), shape)?;
            let mut cache = ContiguousCache::new(kv_heads, (dim, dim), held)?;
            cache.append(rows.view(), rows.view())?;
            Ok(cache)
        };
        Ok(Call {
            cpu: Cpu { level: Level::detect()?, threads: Threads::ONE },
            phase: if tokens == 1 { Phase::Generated } else { Phase::Prompt },
            shapes,
            q: numbers(q),
            k: numbers(k),
            all: [
                Tensor::from_vec(numbers(shapes[2]), shapes[2])?,
                Tensor::from_vec(numbers(shapes[2]), shapes[2])?,
            ],
            before: fill(held - tokens)?,
            held: fill(held)?,
        })
    }

    /// Microseconds of each of [`STEPS`].
    fn round(&mut self, plan: &Plan<'_>) -> Result<[f64; 5]> {
        let [q, k, all] = self.shapes;
        let (weight, level) = (vec![1.0; q.dim], self.cpu.level);
        let norm = RmsNorm { weight: &weight, epsilon: 1e-6 };
        let config = RopeConfig::new(q.dim, RopeLayout::HalfSplit);
        let table = Rope::new(config)?.table(all.seq - q.seq..all.seq)?;
        let mut cache = self.before.clone();
        let rows = Tensor::from_vec(self.k.clone(), k)?;
        let (mut out, mut workspace) = (Tensor::zeros(q)?, Workspace::for_plan(plan));
        let mut marks = vec![Instant::now()];
        rms_norm_in_place(norm, &mut self.q, level)?;
        rms_norm_in_place(norm, &mut self.k, level)?;
        marks.push(Instant::now());
        table.rotate(level, TensorMut::new(&mut self.q, q)?)?;
        table.rotate(level, TensorMut::new(&mut self.k, k)?)?;
        marks.push(Instant::now());
        cache.append(rows.view(), rows.view())?;
        marks.push(Instant::now());
        let queries = TensorRef::new(&self.q, q)?;
        let stores: [&dyn KvStore; 1] = [&self.held];
        plan.forward_cached(queries, &stores, (out.view_mut(), None), &mut workspace)?;
        marks.push(Instant::now());
        let inputs = Inputs { q: queries, k: self.all[0].view(), v: self.all[1].view() };
        plan.forward(inputs, out.view_mut(), None, &mut workspace)?;
        marks.push(Instant::now());
        let micros = |n: usize| (marks[n + 1] - marks[n]).as_secs_f64() * 1e6;
        Ok(std::array::from_fn(micros))
    }
}

fn main() -> Result<()> {
    for sizes in CALLS {
        let mut call = Call::new(sizes)?;
        let attention = Attention::new().mask(Mask::causal()).cpu(call.cpu);
        let [q, _, k] = call.shapes;
        let plan = match call.phase {
            Phase::Prompt => attention.plan(q, k, k)?,
            Phase::Generated => attention.plan_decode(q, k, k)?,
        };
        let mut best = [f64::INFINITY; 5];
        for _ in 0..if q.seq == 1 { 10 * ROUNDS } else { ROUNDS } {
            let times = call.round(&plan)?;
            best.iter_mut().zip(times).for_each(|(best, time)| *best = best.min(time));
        }
        let [tokens, held, heads, kv_heads, dim] = sizes;
        println!("{tokens} tokens, {held} held, {heads} heads on {kv_heads} of {dim}");
        for (step, time) in STEPS.iter().zip(best) {
            println!("  {step:14} {time:10.1} µs");
        }
    }
    Ok(())
}
