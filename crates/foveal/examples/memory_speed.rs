//! Speed of memory mechanisms, one thread: how much of the multiply-add peak, and time a token as a text grows.
//!
//! `cargo run --release -p foveal --example memory_speed [infini]`
//!
//! Rounds go through all cases one after the other and the best of each is printed; the peak of multiply-adds is measured in
//! the same rounds. Operations are counted as the definition has them: keys within the segment up to the query's own.

use foveal::linear::State;
use foveal::memory::Update;
use foveal::memory::infini::{Infini, Tokens, Upstream};
use foveal::sparse::StateHeads;
use foveal::testing::multiply_add;
use foveal::{Cpu, DType, Level, Phase, Shape, Tensor, Threads, Workspace};
use std::time::Instant;

const DIM: usize = 128;
const HEADS: usize = 4;
const ROUNDS: usize = 5;

fn main() -> foveal::Result<()> {
    let cpu = Cpu { level: Level::detect()?, threads: Threads::ONE };
    println!("{}, one thread, {HEADS} heads of {DIM}, best of {ROUNDS}", cpu.level);
    infini_of_peak(cpu)?;
    infini_over_length(cpu)?;
    infini_token_by_token(cpu)
}

/// Numbers between −1 and 1 that look random.
fn numbers(shape: Shape) -> foveal::Result<Tensor<f32>> {
    let mut state = 1u64;
    let mut next = || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / 8_388_608.0 - 1.0
    };
    let len = shape.batch * shape.seq * shape.heads * shape.dim;
    Tensor::from_vec((0..len).map(|_| next()).collect(), shape)
}

/// Best floating-point operations a second of multiply-adds on registers.
fn flops(level: Level) -> f64 {
    let start = Instant::now();
    let (operations, x) = multiply_add(level, DType::F32, 20_000);
    let seconds = start.elapsed().as_secs_f64();
    std::hint::black_box(x);
    operations as f64 / seconds
}

fn seconds(run: impl FnOnce() -> foveal::Result<()>) -> foveal::Result<f64> {
    let start = Instant::now();
    run()?;
    Ok(start.elapsed().as_secs_f64())
}

/// What a pair of a query and a key costs forward, and what a token's read and write cost.
fn operations(tokens: usize, segment: usize, update: Update) -> f64 {
    let (whole, rest) = (tokens / segment, tokens % segment);
    let pairs = |n: usize| n as f64 * (n + 1) as f64 / 2.0;
    let near = (whole as f64 * pairs(segment) + pairs(rest)) * (4 * DIM) as f64;
    let product = (2 * DIM * DIM) as f64;
    let read = tokens.saturating_sub(segment) as f64 * product;
    let writes = (whole * segment) as f64 * product;
    let corrections = (whole.saturating_sub(1) * segment) as f64 * product;
    let write = if update == Update::Delta { writes + corrections } else { writes };
    HEADS as f64 * (near + read + write)
}

fn infini_of_peak(cpu: Cpu) -> foveal::Result<()> {
    let shape = Shape { batch: 1, seq: 8192, heads: HEADS, dim: DIM };
    let [q, k, v] = [numbers(shape)?, numbers(shape)?, numbers(shape)?];
    let gate = [0.0; HEADS];
    let tokens = Tokens::new(q.view(), k.view(), v.view(), &gate);
    let cases = [Update::Linear, Update::Delta]
        .into_iter()
        .flat_map(|update| [256, 512, 1024, 2048, 4096].map(|segment| (update, segment)));
    let cases: Vec<_> = cases.collect();
    let (mut peak, mut best) = (0.0f64, vec![[f64::INFINITY; 2]; cases.len()]);
    let (mut out, mut workspace) = (Tensor::zeros(shape)?, Workspace::new());
    for _ in 0..ROUNDS {
        peak = peak.max(flops(cpu.level));
        for (best, &(update, segment)) in best.iter_mut().zip(&cases) {
            let infini = Infini::new(segment)?.update(update).cpu(cpu);
            let initial = infini.memory(&tokens)?;
            let mut memory = initial.clone();
            let forward = seconds(|| {
                infini.forward_into(&tokens, out.view_mut(), &mut memory, &mut workspace)
            })?;
            let upstream = Upstream { d_out: v.view(), initial: &initial };
            let backward = seconds(|| infini.backward(&tokens, upstream, &mut memory).map(|_| ()))?;
            best[0] = best[0].min(forward);
            best[1] = best[1].min(backward);
        }
    }
    println!("\nInfini-attention, {} tokens; peak {:.1} GFLOP/s", shape.seq, peak / 1e9);
    println!("| update | segment | forward, GFLOP/s | of FMA peak | backward, of forward's time |");
    println!("|---|---|---|---|---|");
    for ([forward, backward], (update, segment)) in best.iter().zip(cases) {
        let rate = operations(shape.seq, segment, update) / forward;
        println!(
            "| {update:?} | {segment} | {:.1} | {:.0} % | {:.2} |",
            rate / 1e9,
            100.0 * rate / peak,
            backward / forward
        );
    }
    Ok(())
}

/// A million tokens: what a token of each eighth costs.
fn infini_over_length(cpu: Cpu) -> foveal::Result<()> {
    const PIECE: usize = 1 << 15;
    let shape = Shape { batch: 1, seq: PIECE, heads: 1, dim: DIM };
    let [q, k, v] = [numbers(shape)?, numbers(shape)?, numbers(shape)?];
    let tokens = Tokens::new(q.view(), k.view(), v.view(), &[0.0]);
    let infini = Infini::new(2048)?.cpu(cpu);
    let mut memory: State = infini.memory(&tokens)?;
    let (mut out, mut workspace) = (Tensor::zeros(shape)?, Workspace::new());
    println!("\nInfini-attention, segments of 2048, one head: a million tokens");
    println!("| tokens | µs a token |");
    println!("|---|---|");
    for eighth in 0..8 {
        let mut all = 0.0;
        for _ in 0..(1 << 17) / PIECE {
            all += seconds(|| {
                infini.forward_into(&tokens, out.view_mut(), &mut memory, &mut workspace)
            })?;
        }
        println!("| {} | {:.2} |", (eighth + 1) << 17, all * 1e6 / (1 << 17) as f64);
    }
    Ok(())
}

/// What a generated token costs while a segment fills.
fn infini_token_by_token(cpu: Cpu) -> foveal::Result<()> {
    let heads = StateHeads { heads: HEADS, kv_heads: HEADS, key_dim: DIM, value_dim: DIM };
    let mut state = Infini::new(2048)?.cpu(cpu).state(heads, false)?;
    let shape = Shape { batch: 1, seq: 1, heads: HEADS, dim: DIM };
    let [q, k, v] = [numbers(shape)?, numbers(shape)?, numbers(shape)?];
    let tokens = Tokens::new(q.view(), k.view(), v.view(), &[0.0; HEADS]);
    println!("\nInfini-attention token by token, segments of 2048: {} bytes", state.bytes());
    println!("| segment | µs a token, first quarter | last quarter | the one that writes, µs |");
    println!("|---|---|---|---|");
    for segment in 0..4 {
        let mut times = vec![];
        for _ in 0..2048 {
            times.push(1e6 * seconds(|| state.forward(&tokens, Phase::Generated).map(|_| ()))?);
        }
        let mean = |x: &[f64]| x.iter().sum::<f64>() / x.len() as f64;
        let (first, last) = (mean(&times[..512]), mean(&times[1536..2047]));
        println!("| {segment} | {first:.1} | {last:.1} | {:.0} |", times[2047]);
    }
    Ok(())
}
