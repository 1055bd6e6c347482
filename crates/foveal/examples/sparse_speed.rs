//! Sparse attention next to exact causal attention, one thread: times, ratios, share of peak on live entries, and how
//! time grows with the length.
//!
//! `cargo run --release -p foveal --example sparse_speed [ratio] [growth]` (both without).
//!
//! Rounds go through all cases one after the other and the best of each is printed, so that a machine that is disturbed
//! disturbs all alike; the peak of multiply-adds is measured in the same rounds.

use foveal::mask::{Pattern, Site};
use foveal::plan::Inputs;
use foveal::sparse::{BigBird, BlockPlan, Factors, SparseTransformer, Window};
use foveal::testing::multiply_add;
use foveal::{Attention, Cpu, DType, Forward, Level, Mask, Shape, Tensor, Threads};
use std::time::Instant;

const DIM: usize = 64;

fn main() -> foveal::Result<()> {
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    let has = |name: &str| wanted.is_empty() || wanted.iter().any(|x| x == name);
    let cpu = Cpu { level: Level::detect()?, threads: Threads::ONE };
    println!("{}, one thread, D {DIM}", cpu.level);
    if has("ratio") {
        let layers = |n: usize| {
            let l = (n as f64).sqrt() as usize;
            vec![
                Case::exact("causal", Mask::causal(), n, cpu),
                Case::layer("fixed, l 128, c 8", SparseTransformer::fixed(128, 8), n, cpu),
                Case::layer("strided, l = √N", SparseTransformer::strided(l), n, cpu),
                Case::exact("window 512", Mask::window(512), n, cpu),
                Case::exact("BigBird, block 64, 3 random", bigbird(n), n, cpu),
            ]
        };
        for n in [16384, 32768] {
            compare(n, layers(n), 7, cpu)?;
        }
    }
    if has("growth") {
        growth(cpu)?;
    }
    Ok(())
}

/// What is timed.
enum What {
    Exact(Attention<'static>),
    Layer(SparseTransformer),
}

struct Case {
    name: String,
    what: What,
    /// Pairs that are seen.
    live: f64,
    forward: f64,
    backward: f64,
}

impl Case {
    fn exact(name: &str, mask: Mask, n: usize, cpu: Cpu) -> Case {
        let live = pairs(&mask, n);
        let what = What::Exact(Attention::new().mask(mask).cpu(cpu));
        Case { name: name.into(), what, live, forward: f64::MAX, backward: f64::MAX }
    }

    fn layer(name: &str, layer: foveal::Result<SparseTransformer>, n: usize, cpu: Cpu) -> Case {
        let layer = layer.expect("good parameters").cpu(cpu);
        let (live, what) = (pairs(&layer.mask(), n), What::Layer(layer));
        Case { name: name.into(), what, live, forward: f64::MAX, backward: f64::MAX }
    }

    /// One forward and one backward; keeps the best times.
    fn round(&mut self, x: &[Tensor<f32>; 4]) -> foveal::Result<()> {
        let [q, k, v, d_out] = x.each_ref().map(Tensor::view);
        let inputs = Inputs { q, k, v };
        let start = Instant::now();
        let forward: Forward<f32> = match &self.what {
            What::Exact(attention) => attention.forward(q, k, v)?,
            What::Layer(layer) => layer.forward(inputs)?,
        };
        self.forward = self.forward.min(start.elapsed().as_secs_f64());
        let start = Instant::now();
        let backward = match &self.what {
            What::Exact(attention) => attention.backward(inputs, &forward, d_out)?,
            What::Layer(layer) => layer.backward(inputs, &forward, d_out)?,
        };
        self.backward = self.backward.min(start.elapsed().as_secs_f64());
        std::hint::black_box(backward);
        Ok(())
    }

    /// Operations a second of forward and backward on seen pairs.
    fn rates(&self) -> [f64; 2] {
        let forward = self.live * 4.0 * DIM as f64;
        [forward / self.forward, 2.5 * forward / self.backward]
    }
}

/// Pairs that one head sees, counted by rows of bits.
fn pairs(mask: &Mask, n: usize) -> f64 {
    let site = Site { batch: 0, q_head: 0, kv_head: 0 };
    // A sample of rows is enough: a few per mille of all, evenly spread.
    let step = (n / 512).max(1) | 1;
    let rows = (0..n).step_by(step);
    let count = rows.len() as f64;
    let seen: usize =
        rows.map(|i| (0..n).filter(|&j| mask.allows(site, i as isize, j)).count()).sum();
    seen as f64 / count * n as f64
}

/// Blocks of 64, 3 of them at random.
fn bigbird(n: usize) -> Mask {
    let plan = BlockPlan::published([1, n.div_ceil(64), 3], 1).expect("fewer than blocks");
    BigBird { block: 64, plan, causal: false }.mask().expect("a good size")
}

fn tensors(n: usize) -> foveal::Result<[Tensor<f32>; 4]> {
    let shape = Shape { batch: 1, seq: n, heads: 1, dim: DIM };
    let mut state = 1u64;
    let mut tensor = || {
        let mut next = || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / 8_388_608.0 - 1.0
        };
        Tensor::from_vec((0..n * DIM).map(|_| next()).collect(), shape)
    };
    Ok([tensor()?, tensor()?, tensor()?, tensor()?])
}

/// Best floating-point operations a second of multiply-adds on registers.
fn peak(level: Level) -> f64 {
    let start = Instant::now();
    let (operations, x) = multiply_add(level, DType::F32, 20_000);
    let seconds = start.elapsed().as_secs_f64();
    std::hint::black_box(x);
    operations as f64 / seconds
}

fn compare(n: usize, mut cases: Vec<Case>, rounds: usize, cpu: Cpu) -> foveal::Result<()> {
    let x = tensors(n)?;
    let mut best = 0.0f64;
    for _ in 0..rounds {
        best = best.max(peak(cpu.level));
        for case in &mut cases {
            case.round(&x)?;
        }
    }
    println!("\n{n} tokens, peak {:.1} GFLOP/s, best of {rounds}", best / 1e9);
    println!(
        "| pattern | pairs a query | forward, ms | of peak | × causal | backward, ms | of peak | × causal |"
    );
    println!("|---|---|---|---|---|---|---|---|");
    let (forward, backward) = (cases[0].forward, cases[0].backward);
    for case in &cases {
        let share = case.rates().map(|rate| 100.0 * rate / best);
        println!(
            "| {} | {:.0} | {:.2} | {:.0} % | {:.1} | {:.2} | {:.0} % | {:.1} |",
            case.name,
            case.live / n as f64,
            case.forward * 1e3,
            share[0],
            forward / case.forward,
            case.backward * 1e3,
            share[1],
            backward / case.backward
        );
    }
    Ok(())
}

/// Times of lengths from 2k to 64k, and the slope of the line through their logarithms.
fn growth(cpu: Cpu) -> foveal::Result<()> {
    type Make = fn(usize, Cpu) -> Case;
    fn root(n: usize) -> usize {
        (n as f64).sqrt().ceil() as usize
    }
    let patterns: [(&str, Make); 4] = [
        ("fixed, l = √N, c 8", |n, cpu| {
            Case::layer("", SparseTransformer::fixed(root(n), 8), n, cpu)
        }),
        ("strided, l = √N", |n, cpu| {
            Case::layer("", SparseTransformer::strided(root(n)), n, cpu)
        }),
        ("strided, l = √N, window as in the code", |n, cpu| {
            let factors = Factors::Strided { stride: root(n), window: Window::Code };
            Case::layer("", SparseTransformer::new(factors), n, cpu)
        }),
        ("window 512", |n, cpu| Case::exact("", Mask::window(512), n, cpu)),
    ];
    let lengths = [2048, 4096, 8192, 16384, 32768, 65536];
    println!("\n| pattern | forward, ms at {lengths:?} | exponent | backward, ms | exponent |");
    println!("|---|---|---|---|---|");
    for (name, make) in patterns {
        let mut times = [vec![], vec![]];
        for n in lengths {
            let (x, mut case) = (tensors(n)?, make(n, cpu));
            for _ in 0..(7 * 16384 / n).clamp(4, 30) {
                case.round(&x)?;
            }
            times[0].push(case.forward);
            times[1].push(case.backward);
        }
        let show = |times: &[f64]| {
            times.iter().map(|t| format!("{:.2}", t * 1e3)).collect::<Vec<_>>().join(", ")
        };
        let [f, b] = times.each_ref().map(|times| slope(&lengths, times));
        println!("| {name} | {} | {f:.2} | {} | {b:.2} |", show(&times[0]), show(&times[1]));
    }
    Ok(())
}

/// The least-squares slope of ln time over ln length.
fn slope(lengths: &[usize], times: &[f64]) -> f64 {
    let points: Vec<_> =
        lengths.iter().zip(times).map(|(&n, t)| ((n as f64).ln(), t.ln())).collect();
    let count = points.len() as f64;
    let (x, y) = points.iter().fold((0.0, 0.0), |(x, y), p| (x + p.0 / count, y + p.1 / count));
    let (up, across) = points.iter().fold((0.0, 0.0), |(up, across), p| {
        (up + (p.0 - x) * (p.1 - y), across + (p.0 - x).powi(2))
    });
    up / across
}
