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
    AngularHash, BigBird, BlockPlan, Branches, Longformer, Moba, NativeSizes, NativeSparse,
    Reformer, SparseTransformer,
};
use foveal::testing::{multiply_add, normal};
use foveal::{Attention, Cpu, DType, Level, Mask, Shape, Tensor, TensorRef, Threads};
use std::time::Instant;

const DIM: usize = 64;

type Result<T> = foveal::Result<T>;

fn main() -> Result<()> {
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    let has = |name: &str| wanted.is_empty() || wanted.iter().any(|x| x == name);
    let cpu = Cpu { level: Level::detect()?, threads: Threads::ONE };
    if !wanted.iter().any(|x| x == "csv") {
        println!("{}, one thread, D {DIM}", cpu.level);
    }
    if has("ratio") {
        for n in [16384, 32768] {
            let cases = PATTERNS.iter().chain(FIXED).map(|(name, make)| make(name, n, cpu));
            let causal = Case::exact("causal", Mask::causal(), n, cpu);
            let cases = std::iter::once(causal).chain(cases.collect::<Result<Vec<_>>>()?);
            compare(n, cases.collect(), 7, cpu)?;
        }
    }
    if wanted.iter().any(|x| x == "csv") {
        return growth(cpu, true);
    }
    if has("growth") {
        growth(cpu, false)?;
    }
    if has("layer") {
        layer(cpu)?;
    }
    Ok(())
}

type Make = fn(&'static str, usize, Cpu) -> Result<Case>;

fn root(n: usize) -> usize {
    (n as f64).sqrt().ceil() as usize
}

/// Patterns whose cost for each query grows as √N or not at all.
const PATTERNS: &[(&str, Make)] = &[
    ("fixed, l = √N, c 8", |name, n, cpu| {
        Case::transformer(name, SparseTransformer::fixed(root(n), 8)?, n, cpu)
    }),
    ("strided, l = √N", |name, n, cpu| {
        Case::transformer(name, SparseTransformer::strided(root(n))?, n, cpu)
    }),
    ("window 512", |name, n, cpu| Ok(Case::exact(name, Mask::window(512), n, cpu))),
    ("BigBird, blocks of 64, 3 random", |name, n, cpu| {
        let plan = BlockPlan::published([1, n.div_ceil(64), 3], 1)?;
        Ok(Case::exact(name, BigBird { block: 64, plan, causal: false }.mask()?, n, cpu))
    }),
    ("Longformer, 256 each side, 4 global", Case::longformer),
    ("Reformer, chunks of 128, 2 rounds", Case::reformer),
    ("MoBA, blocks of 512, 3 of them", Case::moba),
    ("Native Sparse Attention, as published", Case::native),
];

/// The one that has an aim at a length.
const FIXED: &[(&str, Make)] = &[("fixed, l 128, c 8", |name, n, cpu| {
    Case::transformer(name, SparseTransformer::fixed(128, 8)?, n, cpu)
})];

/// Seconds of a forward and a backward.
type Run = Box<dyn Fn(Inputs<'_, f32, f32>, TensorRef<'_, f32>) -> Result<[f64; 2]>>;

fn timed<F, B>(
    forward: impl FnOnce() -> Result<F>,
    backward: impl FnOnce(&F) -> Result<B>,
) -> Result<[f64; 2]> {
    let start = Instant::now();
    let result = forward()?;
    let seconds = start.elapsed().as_secs_f64();
    let start = Instant::now();
    std::hint::black_box(backward(&result)?);
    Ok([seconds, start.elapsed().as_secs_f64()])
}

struct Case {
    name: &'static str,
    run: Run,
    /// Pairs that are seen.
    live: f64,
    /// The best times of forward and backward.
    best: [f64; 2],
}

impl Case {
    fn new(name: &'static str, live: f64, run: Run) -> Case {
        Case { name, run, live, best: [f64::MAX; 2] }
    }

    fn exact(name: &'static str, mask: Mask, n: usize, cpu: Cpu) -> Case {
        let live = pairs(&mask, n);
        let attention = Attention::new().mask(mask).cpu(cpu);
        let run = move |x: Inputs<'_, f32, f32>, d_out: TensorRef<'_, f32>| {
            let forward = || attention.forward(x.q, x.k, x.v);
            timed(forward, |forward| attention.backward(x, forward, d_out))
        };
        Case::new(name, live, Box::new(run))
    }

    fn transformer(
        name: &'static str,
        layer: SparseTransformer,
        n: usize,
        cpu: Cpu,
    ) -> Result<Case> {
        let (layer, live) = (layer.cpu(cpu), pairs(&layer.mask(), n));
        let run = move |x: Inputs<'_, f32, f32>, d_out: TensorRef<'_, f32>| {
            timed(|| layer.forward(x), |forward| layer.backward(x, forward, d_out))
        };
        Ok(Case::new(name, live, Box::new(run)))
    }

    /// A window of 513 keys, and 4 global tokens.
    fn longformer(name: &'static str, n: usize, cpu: Cpu) -> Result<Case> {
        let global = (0..4).map(|g| g * n / 4).collect();
        let layer = Longformer::new(256).global(vec![global]).cpu(cpu);
        let live = pairs(&layer.mask(), n);
        let run = move |x: Inputs<'_, f32, f32>, d_out: TensorRef<'_, f32>| {
            timed(|| layer.forward(x, x), |forward| layer.backward(x, x, forward, d_out))
        };
        Ok(Case::new(name, live, Box::new(run)))
    }

    /// Two rounds of chunks of 128; hashing is not timed.
    fn reformer(name: &'static str, n: usize, cpu: Cpu) -> Result<Case> {
        let [qk, ..] = tensors(n)?;
        let buckets = AngularHash::new(DIM, 2 * n / 128, 2, 1)?.buckets(qk.view(), cpu)?;
        let layer = Reformer::new(128)?.cpu(cpu);
        let live = (0..2).map(|round| chunk_pairs(buckets.of(0, 0, round), 128)).sum();
        let run = move |x: Inputs<'_, f32, f32>, d_out: TensorRef<'_, f32>| {
            let backward = |forward: &_| layer.backward((x.q, x.v), &buckets, forward, d_out);
            timed(|| layer.forward(x.q, x.v, &buckets), backward)
        };
        Ok(Case::new(name, live, Box::new(run)))
    }

    /// The own block and two others; choosing is timed with forward.
    fn moba(name: &'static str, n: usize, cpu: Cpu) -> Result<Case> {
        let [q, k, ..] = tensors(n)?;
        let layer = Moba::new(512, 3)?.cpu(cpu);
        let choices = layer.choose(q.view(), k.view())?;
        let live = (0..n).map(|t| 512 * choices.of(0, 0, t).count() + t % 512 + 1).sum::<usize>();
        let run = move |x: Inputs<'_, f32, f32>, d_out: TensorRef<'_, f32>| {
            let forward = || {
                let choices = layer.choose(x.q, x.k)?;
                Ok((layer.forward(x, &choices)?, choices))
            };
            timed(forward, |(forward, choices)| layer.backward(x, choices, forward, d_out))
        };
        Ok(Case::new(name, live as f64, Box::new(run)))
    }

    /// One head; choosing is timed with forward, pooling is not timed.
    fn native(name: &'static str, n: usize, cpu: Cpu) -> Result<Case> {
        let (layer, sizes) =
            (NativeSparse::new(NativeSizes::default())?.cpu(cpu), NativeSizes::default());
        let [_, k, v, _] = tensors(n)?;
        let (k, v) = (layer.pool(k.view())?, layer.pool(v.view())?);
        let gates = normal(Shape { batch: 1, seq: n, heads: 1, dim: 3 }, 9)?;
        let seen = |t: usize| {
            let own = t / sizes.block;
            let blocks = own.min(sizes.top - 1) * sizes.block + t % sizes.block + 1;
            layer.compressed_tokens(t + 1) + blocks + (t + 1).min(sizes.window)
        };
        let live = (0..n).map(seen).sum::<usize>();
        let run = move |x: Inputs<'_, f32, f32>, d_out: TensorRef<'_, f32>| {
            let compressed = Inputs { k: k.view(), v: v.view(), ..x };
            let inputs = Branches { compressed, selected: x, window: x };
            let forward = || layer.forward(inputs, gates.view());
            timed(forward, |forward| layer.backward(inputs, gates.view(), forward, d_out))
        };
        Ok(Case::new(name, live as f64, Box::new(run)))
    }

    /// One forward and one backward; keeps the best times.
    fn round(&mut self, x: &[Tensor<f32>; 4]) -> Result<()> {
        let [q, k, v, d_out] = x.each_ref().map(Tensor::view);
        let times = (self.run)(Inputs { q, k, v }, d_out)?;
        self.best = [0, 1].map(|n| self.best[n].min(times[n]));
        Ok(())
    }

    /// Operations a second of forward and backward on seen pairs.
    fn rates(&self) -> [f64; 2] {
        let forward = self.live * 4.0 * DIM as f64;
        [forward / self.best[0], 2.5 * forward / self.best[1]]
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

fn tensors(n: usize) -> Result<[Tensor<f32>; 4]> {
    let tensor = |seed| normal(Shape { batch: 1, seq: n, heads: 1, dim: DIM }, seed);
    Ok([tensor(1)?, tensor(2)?, tensor(3)?, tensor(4)?])
}

/// 64k tokens and 8 heads, forward and backward, and the most memory that the process held meanwhile.
fn layer(cpu: Cpu) -> Result<()> {
    let shape = Shape { batch: 1, seq: 65536, heads: 8, dim: DIM };
    let [q, k, v, d_out] = [1, 2, 3, 4].map(|seed| normal(shape, seed));
    let (q, k, v, d_out) = (q?, k?, v?, d_out?);
    let x = Inputs { q: q.view(), k: k.view(), v: v.view() };
    let d_out = d_out.view();
    println!("\n65536 tokens, 8 heads, forward and backward");
    println!("| pattern | forward, s | backward, s | MiB beyond inputs and results |");
    println!("|---|---|---|---|");
    // Output and three gradients, and a log-sum-exp.
    let results = (4 * shape.seq * 8 * DIM + shape.seq * 8) * 4;
    let show = |name: &str, run: &dyn Fn() -> Result<[f64; 2]>, results: usize| {
        // Starts counting the most anew.
        let _ = std::fs::write("/proc/self/clear_refs", "5");
        let before = resident("VmRSS");
        let [forward, backward] = run()?;
        let more = before.zip(resident("VmHWM")).map(|(a, b)| (b - a).saturating_sub(results));
        let more = more.map_or("?".into(), |more| (more >> 20).to_string());
        println!("| {name} | {forward:.1} | {backward:.1} | {more} |");
        Ok::<_, foveal::Error>(())
    };
    for (name, layer) in [
        ("fixed, l 256, c 8", SparseTransformer::fixed(256, 8)?),
        ("strided, l 256", SparseTransformer::strided(256)?),
    ] {
        let layer = layer.cpu(cpu);
        show(name, &|| timed(|| layer.forward(x), |f| layer.backward(x, f, d_out)), results)?;
    }
    let longformer = Longformer::new(256).global(vec![vec![0, 16384, 32768, 49152]]).cpu(cpu);
    // Both projections have gradients.
    let run = || timed(|| longformer.forward(x, x), |f| longformer.backward(x, x, f, d_out));
    show("Longformer, 256 each side, 4 global", &run, results + 3 * shape.seq * 8 * DIM * 4)?;
    let moba = Moba::new(512, 3)?.cpu(cpu);
    let run = || {
        let choices = moba.choose(x.q, x.k)?;
        timed(|| moba.forward(x, &choices), |f| moba.backward(x, &choices, f, d_out))
    };
    show("MoBA, blocks of 512, 3 of them", &run, results)?;
    let reformer = Reformer::new(128)?.cpu(cpu);
    let buckets = AngularHash::new(DIM, 1024, 2, 1)?.buckets(x.q, cpu)?;
    let run = || {
        let backward = |f: &_| reformer.backward((x.q, x.v), &buckets, f, d_out);
        timed(|| reformer.forward(x.q, x.v, &buckets), backward)
    };
    // Queries are keys: an output and two gradients.
    show("Reformer, chunks of 128, 2 rounds", &run, results - shape.seq * 8 * DIM * 4)?;
    let plan = BlockPlan::published([8, shape.seq.div_ceil(64), 3], 1)?;
    let mask = BigBird { block: 64, plan, causal: false }.mask()?;
    let bigbird = Attention::new().mask(mask).cpu(cpu);
    let run = || timed(|| bigbird.forward(x.q, x.k, x.v), |f| bigbird.backward(x, f, d_out));
    show("BigBird, blocks of 64, 3 random", &run, results)?;
    let native = NativeSparse::new(NativeSizes::default())?.cpu(cpu);
    let (k, v) = (native.pool(x.k)?, native.pool(x.v)?);
    let gates = normal(Shape { dim: 3, ..shape }, 9)?;
    let compressed = Inputs { q: x.q, k: k.view(), v: v.view() };
    let inputs = Branches { compressed, selected: x, window: x };
    let run = || {
        let forward = || native.forward(inputs, gates.view());
        timed(forward, |f| native.backward(inputs, gates.view(), f, d_out))
    };
    // An output, and gradients of the three branches.
    let tokens = (1 + 3 + 2 + 2) * shape.seq + 2 * k.shape().seq;
    show("Native Sparse Attention, as published", &run, tokens * 8 * DIM * 4)
}

/// What the system says about the memory of the process, bytes.
fn resident(name: &str) -> Option<usize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with(name))?;
    Some(line.split_whitespace().nth(1)?.parse::<usize>().ok()? << 10)
}

/// Best floating-point operations a second of multiply-adds on registers.
fn peak(level: Level) -> f64 {
    let start = Instant::now();
    let (operations, x) = multiply_add(level, DType::F32, 20_000);
    let seconds = start.elapsed().as_secs_f64();
    std::hint::black_box(x);
    operations as f64 / seconds
}

fn compare(n: usize, mut cases: Vec<Case>, rounds: usize, cpu: Cpu) -> Result<()> {
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
    let causal = cases[0].best;
    for case in &cases {
        let share = case.rates().map(|rate| 100.0 * rate / best);
        println!(
            "| {} | {:.0} | {:.2} | {:.0} % | {:.1} | {:.2} | {:.0} % | {:.1} |",
            case.name,
            case.live / n as f64,
            case.best[0] * 1e3,
            share[0],
            causal[0] / case.best[0],
            case.best[1] * 1e3,
            share[1],
            causal[1] / case.best[1]
        );
    }
    Ok(())
}

/// Times of lengths from 2k to 64k, and the slope of the line through their logarithms; or the times alone, as a record.
fn growth(cpu: Cpu, csv: bool) -> Result<()> {
    let lengths = [2048, 4096, 8192, 16384, 32768, 65536];
    if csv {
        println!("pattern,way,tokens,seconds");
    } else {
        println!("\n| pattern | forward, ms at {lengths:?} | exponent | backward, ms | exponent |");
        println!("|---|---|---|---|---|");
    }
    for (name, make) in PATTERNS {
        let mut times = [vec![], vec![]];
        for n in lengths {
            let (x, mut case) = (tensors(n)?, make(name, n, cpu)?);
            for _ in 0..(7 * 16384 / n).clamp(4, 30) {
                case.round(&x)?;
            }
            (0..2).for_each(|way| times[way].push(case.best[way]));
        }
        if csv {
            for (way, times) in ["forward", "backward"].into_iter().zip(&times) {
                for (n, seconds) in lengths.iter().zip(times) {
                    println!("{name},{way},{n},{seconds}");
                }
            }
            continue;
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
