//! Measures attention against what the machine can do and against PyTorch: `cargo xtask bench`.
//!
//! A case is verified against the definition in f64 before it is timed, and refused if it is wrong. Rounds are
//! interleaved: peak, ours, peer, peak, ours, peer, …; figures are the best and the median of the rounds.

#![forbid(unsafe_code)]

mod case;
mod peer;

use anyhow::{Context, Result, bail};
use case::Case;
use foveal::cache::{ContiguousCache, KvStore};
use foveal::mask::{Pattern, Site};
use foveal::plan::Inputs;
use foveal::{Attention, Cpu, Level, Phase, Shape, Tensor, Threads, Workspace, testing};
use peer::Torch;
use std::hint::black_box;
use std::num::NonZeroUsize;
use std::time::Instant;

/// Of the inputs; the peer makes the same ones.
const SEED: u64 = 1;
const USAGE: &str = "bench [CASE-FILTER] [--peer torch] [--threads N] [--rounds N] [--level NAME]";

struct Options {
    filter: String,
    torch: bool,
    threads: NonZeroUsize,
    rounds: usize,
    level: Level,
}

fn options() -> Result<Options> {
    let mut options = Options {
        filter: String::new(),
        torch: false,
        threads: NonZeroUsize::MIN,
        rounds: 9,
        level: Level::detect()?,
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().with_context(|| format!("{argument} needs a value"));
        match argument.as_str() {
            "--peer" => match value()?.as_str() {
                "torch" => options.torch = true,
                other => bail!("there is no peer {other:?}; there is torch"),
            },
            "--threads" => options.threads = value()?.parse().context("--threads")?,
            "--rounds" => options.rounds = value()?.parse::<usize>().context("--rounds")?.max(1),
            "--level" => options.level = Level::named(&value()?)?,
            flag if flag.starts_with('-') => bail!("{flag:?} is not known; {USAGE}"),
            filter => options.filter = filter.to_owned(),
        }
    }
    Ok(options)
}

fn main() -> Result<()> {
    let options = options()?;
    let pool = rayon::ThreadPoolBuilder::new().num_threads(options.threads.get()).build()?;
    pool.install(|| run(&options))
}

fn run(options: &Options) -> Result<()> {
    let mut torch = options.torch.then(Torch::start).transpose()?;
    println!("level {}, {} threads, {} rounds", options.level, options.threads, options.rounds);
    println!(
        "| case | ms, best (median) | GFLOP/s | of peak, best / median | KV GB/s | of read bandwidth | torch ÷ ours, best [median] |"
    );
    println!("|---|---|---|---|---|---|---|");
    let memory = vec![1.0_f32; 192 << 20];
    for case in Case::all(&options.filter)? {
        measure(&case, options, torch.as_mut(), &memory)?;
    }
    Ok(())
}

/// One case, from its inputs to its line of the table.
fn measure(
    case: &Case,
    options: &Options,
    torch: Option<&mut Torch>,
    memory: &[f32],
) -> Result<()> {
    let cpu = Cpu { level: options.level, threads: Threads::at_most(options.threads) };
    let (q, kv) = (case.q_shape(), case.kv_shape());
    let (q, k, v) = (numbers(q, SEED)?, numbers(kv, SEED + 1)?, numbers(kv, SEED + 2)?);
    let attention = Attention::new().mask(case.mask()).cpu(cpu);
    let plan = match case.phase() {
        Phase::Prompt => attention.plan(q.shape(), k.shape(), v.shape())?,
        Phase::Generated => attention.plan_decode(q.shape(), k.shape(), v.shape())?,
    };
    let mut out = Tensor::<f32>::zeros(plan.out_shape())?;
    let mut workspace = Workspace::for_plan(&plan);
    let decode = case.phase() == Phase::Generated;
    let caches = if decode { caches(&k, &v)? } else { vec![] };
    let stores: Vec<&dyn KvStore> = caches.iter().map(|cache| cache as &dyn KvStore).collect();
    let mut once = || -> Result<f64> {
        let inputs = Inputs { q: q.view(), k: k.view(), v: v.view() };
        let start = Instant::now();
        if decode {
            let outputs = (out.view_mut(), None);
            plan.forward_cached(q.view(), &stores, outputs, &mut workspace)?;
        } else {
            plan.forward(inputs, out.view_mut(), None, &mut workspace)?;
        }
        Ok(start.elapsed().as_secs_f64())
    };
    let estimate = once()?.min(once()?);
    let iterations = ((0.03 / estimate) as usize).clamp(1, 10_000);
    verify(case, (&q, &k, &v), &out_copy(&attention, case, &q, &k, &v)?)?;

    let mut torch = torch;
    if let Some(torch) = torch.as_deref_mut() {
        torch.load(case, options.threads.get())?;
    }
    let (mut ours, mut theirs, mut ratios, mut shares) = (vec![], vec![], vec![], vec![]);
    for _ in 0..options.rounds {
        let ceiling = if decode { bandwidth(cpu.level, memory) } else { multiply_add(cpu.level) };
        let start = Instant::now();
        for _ in 0..iterations {
            once()?;
        }
        let seconds = start.elapsed().as_secs_f64() / iterations as f64;
        let work = if decode { case.kv_bytes() } else { case.operations() };
        shares.push(work / seconds / ceiling);
        ours.push(seconds);
        if let Some(torch) = torch.as_deref_mut() {
            let seconds_of_torch = torch.run(iterations)?;
            ratios.push(seconds_of_torch / seconds);
            theirs.push(seconds_of_torch);
        }
    }
    print_line(case, decode, [ours, theirs, ratios, shares]);
    Ok(())
}

/// One cache per sequence, filled: what decoding reads.
fn caches(k: &Tensor<f32>, v: &Tensor<f32>) -> Result<Vec<ContiguousCache<f32>>> {
    let Shape { batch, seq, heads, dim } = k.shape();
    let mut caches = vec![];
    for b in 0..batch {
        let mut cache = ContiguousCache::new(heads, (dim, dim), seq)?;
        let one = Shape { batch: 1, ..k.shape() };
        let of =
            |x: &Tensor<f32>| x.as_slice()[b * seq * heads * dim..][..seq * heads * dim].to_vec();
        let (k, v) = (Tensor::from_vec(of(k), one)?, Tensor::from_vec(of(v), one)?);
        cache.append(k.view(), v.view())?;
        caches.push(cache);
    }
    Ok(caches)
}

fn out_copy(
    attention: &Attention,
    case: &Case,
    q: &Tensor<f32>,
    k: &Tensor<f32>,
    v: &Tensor<f32>,
) -> Result<Tensor<f32>> {
    Ok(match case.phase() {
        Phase::Prompt => attention.forward(q.view(), k.view(), v.view())?.out,
        Phase::Generated => attention.decode(q.view(), k.view(), v.view())?.out,
    })
}

fn print_line(case: &Case, decode: bool, [ours, theirs, ratios, shares]: [Vec<f64>; 4]) {
    let best = ours.iter().copied().fold(f64::INFINITY, f64::min);
    let most = shares.iter().copied().fold(0.0, f64::max);
    let share = format!("{:.0} / {:.0} %", 100.0 * most, 100.0 * median(shares));
    let (peak, read) = if decode { (String::new(), share) } else { (share, String::new()) };
    let torch = match ratios.is_empty() {
        true => String::new(),
        false => {
            let fastest = theirs.iter().copied().fold(f64::INFINITY, f64::min);
            format!("{:.2} [{:.2}]", fastest / best, median(ratios))
        }
    };
    println!(
        "| {} | {:.3} ({:.3}) | {:.1} | {peak} | {:.1} | {read} | {torch} |",
        case.name,
        1e3 * best,
        1e3 * median(ours),
        case.operations() / best / 1e9,
        case.kv_bytes() / best / 1e9,
    );
}

/// Multiply-adds of one thread, in operations per second, times the threads of the pool.
fn multiply_add(level: Level) -> f64 {
    let start = Instant::now();
    let (operations, sum) = testing::multiply_add(level, 400_000);
    black_box(sum);
    operations as f64 / start.elapsed().as_secs_f64() * rayon::current_num_threads() as f64
}

/// Bytes per second that all threads of the pool together read from memory.
fn bandwidth(level: Level, memory: &[f32]) -> f64 {
    let start = Instant::now();
    let part = memory.len().div_ceil(rayon::current_num_threads());
    rayon::scope(|scope| {
        for part in memory.chunks(part) {
            scope.spawn(move |_| {
                black_box(testing::read(level, part));
            });
        }
    });
    4.0 * memory.len() as f64 / start.elapsed().as_secs_f64()
}

fn median(mut numbers: Vec<f64>) -> f64 {
    numbers.sort_by(f64::total_cmp);
    numbers[numbers.len() / 2]
}

/// Element n is splitmix64's output n, mapped to (−1, 1): what the peers' protocol prescribes.
fn numbers(shape: Shape, seed: u64) -> Result<Tensor<f32>> {
    let len = shape.checked_len().context("the case is too large")?;
    let number = |n: usize| {
        let z = seed.wrapping_add((n as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    Ok(Tensor::from_vec((0..len).map(number).collect(), shape)?)
}

/// Compares sampled rows with the definition in f64.
fn verify(
    case: &Case,
    (q, k, v): (&Tensor<f32>, &Tensor<f32>, &Tensor<f32>),
    out: &Tensor<f32>,
) -> Result<()> {
    let mask = case.mask();
    let step = (case.queries * case.heads).div_ceil(16).max(1);
    for n in (0..case.queries * case.heads).step_by(step) {
        let (i, head) = (n / case.heads, n % case.heads);
        let kv_head = head / (case.heads / case.kv_heads());
        let site = Site { batch: 0, q_head: head, kv_head };
        let position = (i + case.keys) as isize - case.queries as isize;
        let seen: Vec<usize> = (0..case.keys).filter(|&j| mask.allows(site, position, j)).collect();
        let query = q.view().row(0, i, head);
        let scores: Vec<f64> = seen
            .iter()
            .map(|&j| {
                let key = k.view().row(0, j, kv_head);
                let dot: f64 =
                    query.iter().zip(key).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum();
                dot / (case.dim as f64).sqrt()
            })
            .collect();
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = scores.iter().map(|score| (score - max).exp()).sum();
        for (d, got) in out.view().row(0, i, head).iter().enumerate() {
            let terms = seen.iter().zip(&scores);
            let expected: f64 = terms
                .map(|(&j, score)| {
                    (score - max).exp() / sum * f64::from(v.view().row(0, j, kv_head)[d])
                })
                .sum();
            let off = (f64::from(*got) - expected).abs();
            if off.is_nan() || off > 3e-6 {
                bail!("{}: row {i} of head {head} is off by {off:e}; not timed", case.name);
            }
        }
    }
    Ok(())
}
