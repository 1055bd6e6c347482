use foveal::*;
use foveal::plan::Inputs;
use foveal::cache::*;
use std::time::Instant;
fn main() {
    let args: Vec<usize> = std::env::args().skip(1).map(|a| a.parse().unwrap()).collect();
    let (s, d, h, kvh) = (args[0], args[1], args[2], args[3]);
    let fill = vec![0.01f32; 1 << 20];
    let mut c = ContiguousCache::<f32>::new(kvh, (d, d), s).unwrap();
    let step = (1 << 20) / (kvh * d);
    let mut at = 0;
    while at < s { let n = step.min(s - at); let sh = Shape{batch:1,seq:n,heads:kvh,dim:d}; let t = TensorRef::new(&fill[..n*kvh*d], sh).unwrap(); c.append(t, t).unwrap(); at += n; }
    let q = Tensor::from_vec(vec![0.1f32; h*d], Shape{batch:1,seq:1,heads:h,dim:d}).unwrap();
    let big: Vec<f32> = vec![1.0; 128 << 20];
    let mut bw = f64::MAX;
    for _ in 0..3 { let t = Instant::now(); let mut acc = [0f32; 64]; for ch in big.chunks_exact(64) { for i in 0..64 { acc[i] += ch[i]; } } std::hint::black_box(acc); bw = bw.min(t.elapsed().as_secs_f64()); }
    let bw = 0.5 * 1.073741824 / bw;
    let level = Level::available().last().unwrap();
    for threads in [1, 2] {
    let cpu = Cpu { level, threads: Threads::at_most(std::num::NonZeroUsize::new(threads).unwrap()) };
    let att = Attention::new().mask(Mask::causal()).cpu(cpu);
    let kv = Shape{batch:1,seq:s,heads:kvh,dim:d};
    let plan = att.plan_decode(q.shape(), kv, kv).unwrap();
    let mut ws = Workspace::for_plan(&plan);
    let mut out = Tensor::<f32>::zeros(q.shape()).unwrap();
    let mut best = f64::MAX;
    let stores: [&dyn KvStore; 1] = [&c];
    for _ in 0..9 {
        let t = Instant::now();
        plan.forward_cached(q.view(), &stores, (out.view_mut(), None), &mut ws).unwrap();
        best = best.min(t.elapsed().as_secs_f64());
    }
    let bytes = (2 * s * d * kvh * 4) as f64;
    let gf = 4.0 * (s * d * h) as f64 / best / 1e9;
    println!("{level} threads {threads} s {s} d {d} h {h}/{kvh}: {:.1} GB/s of {:.1} (1 thread) = {:.0}%, {:.1} GF/s, {:.3} ms", bytes / best / 1e9, bw, bytes / best / 1e9 / bw * 100.0, gf, best * 1e3);
    }
}
