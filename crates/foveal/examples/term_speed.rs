//! What terms cost a forward pass: N 2048, D 64, 4 heads, full mask, one thread, as a multiple of the plain call.
//!
//! `cargo run --release -p foveal --example term_speed`: rounds alternate between the calls; best times count.

use foveal::plan::Inputs;
use foveal::position::{RelativeBias, Slopes};
use foveal::{Attention, Cpu, Dropout, Level, Result, Shape, Tensor, Threads, Workspace};
use std::time::Instant;

const SHAPE: Shape = Shape { batch: 1, seq: 2048, heads: 4, dim: 64 };
const ROUNDS: usize = 25;

fn main() -> Result<()> {
    let len = SHAPE.seq * SHAPE.heads * SHAPE.dim;
    let numbers = (0..len).map(|i| (i * 7919 % 1009) as f32 / 504.0 - 1.0).collect();
    let x = Tensor::from_vec(numbers, SHAPE)?;
    let bias = Tensor::<f32>::zeros(Shape { batch: 1, seq: 2048, heads: 1, dim: 2048 })?;
    let (sinks, table) = ([0.5; SHAPE.heads], [0.1; 32 * SHAPE.heads]);
    let cpu = Cpu { level: Level::detect()?, threads: Threads::ONE };
    let plain = Attention::new().cpu(cpu);
    let relative = RelativeBias::bidirectional(&table, SHAPE.heads, 128)?;
    let calls = [
        ("plain", plain.clone()),
        ("sinks", plain.clone().sinks(&sinks)),
        ("ALiBi", plain.clone().alibi(Slopes::Standard)),
        ("dense bias", plain.clone().bias(bias.view())),
        ("relative bias", plain.clone().relative_bias(relative)),
        ("softcap", plain.clone().softcap(50.0)),
        ("dropout", plain.dropout(Dropout { rate: 0.1, seed: 1 })),
    ];
    let mut best = calls.each_ref().map(|_| f64::INFINITY);
    let mut out = Tensor::<f32>::zeros(SHAPE)?;
    for _ in 0..ROUNDS {
        for ((_, attention), best) in calls.iter().zip(&mut best) {
            let plan = attention.plan(SHAPE, SHAPE, SHAPE)?;
            let mut workspace = Workspace::for_plan(&plan);
            let inputs = Inputs { q: x.view(), k: x.view(), v: x.view() };
            let start = Instant::now();
            plan.forward(inputs, out.view_mut(), None, &mut workspace)?;
            *best = best.min(start.elapsed().as_secs_f64());
        }
    }
    for ((name, _), time) in calls.iter().zip(best) {
        println!("{name:14} {:7.2} ms  {:.3}", time * 1e3, time / best[0]);
    }
    Ok(())
}
