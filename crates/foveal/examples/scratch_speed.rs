use foveal::*;
use foveal::plan::Inputs;
use std::time::Instant;
fn main() {
    let args: Vec<usize> = std::env::args().skip(1).map(|a| a.parse().unwrap()).collect();
    let (n, d, h, causal) = (args[0], args[1], args[2], args[3] == 1);
    let shape = Shape { batch: 1, seq: n, heads: h, dim: d };
    let mk = |s: u32| { let mut x = s; let data: Vec<f32> = (0..n*d*h).map(|_| { x = x.wrapping_mul(1664525).wrapping_add(1013904223); (x >> 8) as f32 / 8388608.0 - 1.0 }).collect(); Tensor::from_vec(data, shape).unwrap() };
    let (q, k, v) = (mk(1), mk(2), mk(3));
    for level in Level::available().skip(1) {
    let cpu = Cpu { level, threads: Threads::ONE };
    let att = Attention::new().mask(if causal { Mask::causal() } else { Mask::full() }).cpu(cpu);
    let plan = att.plan(shape, shape, shape).unwrap();
    let mut ws = Workspace::for_plan(&plan);
    let mut out = Tensor::<f32>::zeros(shape).unwrap();
    let mut best = f64::MAX;
    for _ in 0..9 {
        let t = Instant::now();
        plan.forward(Inputs { q: q.view(), k: k.view(), v: v.view() }, out.view_mut(), None, &mut ws).unwrap();
        best = best.min(t.elapsed().as_secs_f64());
    }
    let pairs = if causal { n as f64 * (n as f64 + 1.0) / 2.0 } else { (n * n) as f64 };
    let gf = 4.0 * d as f64 * pairs * h as f64 / best / 1e9;
    println!("{} n {n} d {d} h {h} causal {causal}: {:.1} GF/s  {:.1}% of 118", level, gf, gf / 1.18);
    }
}
