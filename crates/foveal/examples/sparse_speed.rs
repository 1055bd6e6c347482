//! Sparse attention next to exact causal attention, one thread: times, ratios, share of peak on live entries, and how
//! time grows with the length.
//!
//! `cargo run --release -p foveal --example sparse_speed [ratio] [growth] [layer]` (all without).
//!
//! Rounds go through all cases one after the other and the best of each is printed, so that a machine that is disturbed
//! disturbs all alike; the peak of multiply-adds is measured in the same rounds.

use foveal::mask::{Pattern, Site};
use foveal::plan::Inputs;
use foveal::sparse::{
    AngularHash, BigBird, BlockChoices, BlockPlan, Buckets, Longformer, Moba, Reformer,
    SparseTransformer,
};
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
                Case::longformer(n, cpu),
                Case::reformer(n, cpu),
                Case::moba(n, cpu),
            ]
        };
        for n in [16384, 32768] {
            compare(n, layers(n), 7, cpu)?;
        }
    }
    if has("growth") {
        growth(cpu)?;
    }
    if has("layer") {
        layer(cpu)?;
    }
    Ok(())
}

/// What is timed.
enum What {
    Exact(Attention<'static>),
    Layer(SparseTransformer),
    Longformer(Longformer),
    /// Hashing is not timed.
    Reformer(Reformer, Buckets),
    /// Nor is choosing.
    Moba(Moba, BlockChoices),
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

    fn of(name: &str, what: What, live: f64) -> Case {
        Case { name: name.into(), what, live, forward: f64::MAX, backward: f64::MAX }
    }

    /// A window of 512 keys, and 4 global tokens.
    fn longformer(n: usize, cpu: Cpu) -> Case {
        let global = (0..4).map(|g| g * n / 4).collect();
        let layer = Longformer::new(256).global(vec![global]).cpu(cpu);
        let live = pairs(&layer.mask(), n);
        Case::of("Longformer, 256 each side, 4 global", What::Longformer(layer), live)
    }

    /// Two rounds of chunks of 128.
    fn reformer(n: usize, cpu: Cpu) -> Case {
        let [qk, ..] = tensors(n).expect("small tensors");
        let hash = AngularHash::new(DIM, 2 * n / 128, 2, 1).expect("an even number");
        let buckets = hash.buckets(qk.view(), cpu).expect("vectors of this dim");
        let layer = Reformer::new(128).expect("a good size").cpu(cpu);
        let live = (0..2).map(|round| chunk_pairs(buckets.of(0, 0, round), 128)).sum();
        Case::of("Reformer, chunks of 128, 2 rounds", What::Reformer(layer, buckets), live)
    }

    /// The own block and two others.
    fn moba(n: usize, cpu: Cpu) -> Case {
        let [q, k, ..] = tensors(n).expect("small tensors");
        let layer = Moba::new(512, 3).expect("good sizes").cpu(cpu);
        let choices = layer.choose(q.view(), k.view()).expect("equal shapes");
        let chosen = (0..n).map(|t| 512 * choices.of(0, 0, t).count() + t % 512 + 1).sum::<usize>();
        Case::of("MoBA, blocks of 512, 3 of them", What::Moba(layer, choices), chosen as f64)
    }

    /// One forward and one backward; keeps the best times.
    fn round(&mut self, x: &[Tensor<f32>; 4]) -> foveal::Result<()> {
        let [q, k, v, d_out] = x.each_ref().map(Tensor::view);
        let inputs = Inputs { q, k, v };
        let start = Instant::now();
        match &self.what {
            What::Reformer(layer, buckets) => {
                let forward = layer.forward(q, v, buckets)?;
                self.forward = self.forward.min(start.elapsed().as_secs_f64());
                let start = Instant::now();
                std::hint::black_box(layer.backward((q, v), buckets, &forward, d_out)?);
                self.backward = self.backward.min(start.elapsed().as_secs_f64());
                return Ok(());
            }
            What::Longformer(layer) => {
                let forward = layer.forward(inputs, inputs)?;
                self.forward = self.forward.min(start.elapsed().as_secs_f64());
                let start = Instant::now();
                std::hint::black_box(layer.backward(inputs, inputs, &forward, d_out)?);
                self.backward = self.backward.min(start.elapsed().as_secs_f64());
                return Ok(());
            }
            _ => {}
        }
        let forward: Forward<f32> = match &self.what {
            What::Layer(layer) => layer.forward(inputs)?,
            What::Moba(layer, choices) => layer.forward(inputs, choices)?,
            What::Exact(attention) => attention.forward(q, k, v)?,
            _ => return Ok(()),
        };
        self.forward = self.forward.min(start.elapsed().as_secs_f64());
        let start = Instant::now();
        std::hint::black_box(match &self.what {
            What::Layer(layer) => layer.backward(inputs, &forward, d_out)?,
            What::Moba(layer, choices) => layer.backward(inputs, choices, &forward, d_out)?,
            What::Exact(attention) => attention.backward(inputs, &forward, d_out)?,
            _ => return Ok(()),
        });
        self.backward = self.backward.min(start.elapsed().as_secs_f64());
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

/// Pairs of one round of sorted chunks, causal, without those of a token with itself.
fn chunk_pairs(buckets: &[u32], chunk: usize) -> f64 {
    let mut order: Vec<usize> = (0..buckets.len()).collect();
    order.sort_by_key(|&t| (buckets[t], t));
    let chunks: Vec<&[usize]> = order.chunks(chunk).collect();
    let back = |n: usize| chunks[(n + chunks.len() - 1) % chunks.len()];
    let seen = |row: usize, keys: &[usize]| keys.iter().filter(|&&key| key < row).count();
    let rows = chunks.iter().enumerate().flat_map(|(n, own)| own.iter().map(move |&row| (n, row)));
    rows.map(|(n, row)| seen(row, chunks[n]) + seen(row, back(n))).sum::<usize>() as f64
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

/// 64k tokens and 8 heads, forward and backward, and the most memory that the process held meanwhile.
fn layer(cpu: Cpu) -> foveal::Result<()> {
    let shape = Shape { batch: 1, seq: 65536, heads: 8, dim: DIM };
    let data =
        |n: usize| (0..shape.seq * 8 * DIM).map(move |i| ((i * 7 + n) % 13) as f32 / 13.0 - 0.5);
    let mut x = Vec::new();
    for n in 0..4 {
        x.push(Tensor::from_vec(data(n).collect(), shape)?);
    }
    let [q, k, v, d_out] = &x[..] else { return Ok(()) };
    let inputs = Inputs { q: q.view(), k: k.view(), v: v.view() };
    let results = ((4 * shape.seq * 8 * DIM + shape.seq * 8) * 4) >> 20;
    println!("\n65536 tokens, 8 heads, forward and backward");
    println!("| pattern | s | MiB beyond inputs and results |");
    println!("|---|---|---|");
    for (name, layer) in [
        ("fixed, l 256, c 8", SparseTransformer::fixed(256, 8)?),
        ("strided, l 256", SparseTransformer::strided(256)?),
    ] {
        // Starts counting the most anew.
        let _ = std::fs::write("/proc/self/clear_refs", "5");
        let (layer, before, start) = (layer.cpu(cpu), resident("VmRSS"), Instant::now());
        let forward = layer.forward(inputs)?;
        std::hint::black_box(layer.backward(inputs, &forward, d_out.view())?);
        let seconds = start.elapsed().as_secs_f64();
        let more = before.zip(resident("VmHWM")).map(|(a, b)| (b - a).saturating_sub(results));
        let more = more.map_or("?".into(), |more| more.to_string());
        println!("| {name} | {seconds:.1} | {more} |");
    }
    Ok(())
}

/// What the system says about the memory of the process, MiB.
fn resident(name: &str) -> Option<usize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with(name))?;
    Some(line.split_whitespace().nth(1)?.parse::<usize>().ok()? >> 10)
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
    let patterns: [(&str, Make); 7] = [
        ("fixed, l = √N, c 8", |n, cpu| {
            Case::layer("", SparseTransformer::fixed(root(n), 8), n, cpu)
        }),
        ("strided, l = √N", |n, cpu| {
            Case::layer("", SparseTransformer::strided(root(n)), n, cpu)
        }),
        ("window 512", |n, cpu| Case::exact("", Mask::window(512), n, cpu)),
        ("BigBird, block 64, 3 random", |n, cpu| Case::exact("", bigbird(n), n, cpu)),
        ("Longformer, 256 each side, 4 global", Case::longformer),
        ("Reformer, chunks of 128, 2 rounds", Case::reformer),
        ("MoBA, blocks of 512, 3 of them", Case::moba),
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
