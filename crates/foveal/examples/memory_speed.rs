//! Speed of memory mechanisms, one thread: how much of the multiply-add peak, and time a token as a text grows.
//!
//! `cargo run --release -p foveal --example memory_speed [infini | memorizing]`
//!
//! Rounds go through all cases one after the other and the best of each is printed; the peak of multiply-adds is measured in
//! the same rounds. Operations are counted as the definition has them: keys within the segment up to the query's own.

use foveal::cache::{ContiguousCache, KvStore, KvTile};
use foveal::linear::State;
use foveal::memory::infini::{Infini, Tokens, Upstream};
use foveal::memory::memorizing::{self, Memorizing};
use foveal::memory::{CodedMemory, MemoryStore, Update};
use foveal::sparse::StateHeads;
use foveal::testing::multiply_add;
use foveal::{Cpu, DType, Element, Level, Phase, Shape, Tensor, TensorRef, Threads, Workspace};
use std::time::Instant;

const DIM: usize = 128;
const HEADS: usize = 4;
const ROUNDS: usize = 3;

fn main() -> foveal::Result<()> {
    let cpu = Cpu { level: Level::detect()?, threads: Threads::ONE };
    println!("{}, one thread, {HEADS} heads of {DIM}, best of {ROUNDS}", cpu.level);
    let only = std::env::args().nth(1);
    let runs = |name: &str| only.as_ref().is_none_or(|only| only == name);
    if runs("infini") {
        infini_of_peak(cpu)?;
        infini_over_length(cpu)?;
        infini_token_by_token(cpu)?;
    }
    if runs("memorizing") {
        memorizing::<f32>("f32", cpu)?;
        memorizing::<half::bf16>("bf16", cpu)?;
        coded(cpu)?;
    }
    Ok(())
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
        .flat_map(|update| [256, 1024, 2048].map(|segment| (update, segment)));
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

/// A store that is full from the first segment on, which it then holds over and over.
#[derive(Debug)]
struct Full<E>(ContiguousCache<E>, usize);

impl<E: Element> KvStore for Full<E> {
    fn end(&self) -> usize {
        self.0.end()
    }
    fn start(&self) -> usize {
        self.0.start()
    }
    fn kv_heads(&self) -> usize {
        self.0.kv_heads()
    }
    fn dims(&self) -> (usize, usize) {
        self.0.dims()
    }
    fn dtype(&self) -> DType {
        self.0.dtype()
    }
    fn tile(&self, head: usize, positions: std::ops::Range<usize>) -> KvTile<'_> {
        self.0.tile(head, positions)
    }
}

impl<E: Element> MemoryStore for Full<E> {
    fn append(&mut self, k: TensorRef<'_, f32>, v: TensorRef<'_, f32>) -> foveal::Result<()> {
        self.0.append(k, v)?;
        while self.0.end() < self.1 {
            self.0.append(k, v)?;
        }
        Ok(())
    }
    fn forget(&mut self, before: usize) {
        self.0.forget(before);
    }
    fn clear(&mut self) {
        self.0.clear();
    }
    fn exact(&self) -> &dyn KvStore {
        self
    }
}

/// Sizes of a memory that is measured.
#[derive(Clone, Copy)]
struct Sizes {
    heads: usize,
    dim: usize,
    entries: usize,
}

/// Segments of so many tokens.
const SEGMENT: usize = 512;

/// A segment, and a token, against memories of several sizes.
fn memorizing<E: Element>(name: &str, cpu: Cpu) -> foveal::Result<()> {
    println!("\nMemorizing Transformers, entries in {name}, segments of {SEGMENT}");
    println!(
        "| heads × dim | entries | k | a segment, ms | products of keys alone, of FMA peak | a token, µs | GB/s of keys |"
    );
    println!("|---|---|---|---|---|---|---|");
    for (heads, dim, entries) in
        [(4, 128, 8192), (4, 128, 65_536), (8, 64, 65_536), (8, 128, 65_536)]
    {
        let sizes = Sizes { heads, dim, entries };
        for top in [1, 32, 128] {
            let memorizing = Memorizing::new(SEGMENT, top, entries)?.cpu(cpu);
            let shape = sizes.heads();
            let store = Full(memorizing.store::<E>(shape)?, entries);
            measure(sizes, top, memorizing.state(shape, store)?, cpu)?;
        }
    }
    Ok(())
}

impl Sizes {
    fn heads(self) -> StateHeads {
        let Sizes { heads, dim, .. } = self;
        StateHeads { heads, kv_heads: heads, key_dim: dim, value_dim: dim }
    }
}

/// A row of the table.
fn measure<M: MemoryStore>(
    sizes: Sizes,
    top: usize,
    mut state: memorizing::MemorizingState<M>,
    cpu: Cpu,
) -> foveal::Result<()> {
    let Sizes { heads, dim, entries } = sizes;
    let shape = Shape { batch: 1, seq: SEGMENT, heads, dim };
    let [q, k, v] = [numbers(shape)?, numbers(shape)?, numbers(shape)?];
    let (gate, scale) = (vec![0.0; heads], vec![1.0; heads]);
    let tokens = memorizing::Tokens::new(q.view(), k.view(), v.view(), &gate, &scale);
    let one = |x: &Tensor<f32>| -> foveal::Result<Tensor<f32>> {
        Tensor::from_vec(x.as_slice()[..heads * dim].to_vec(), Shape { seq: 1, ..shape })
    };
    let [q1, k1, v1] = [one(&q)?, one(&k)?, one(&v)?];
    let token = memorizing::Tokens::new(q1.view(), k1.view(), v1.view(), &gate, &scale);
    state.forward(&tokens, Phase::Prompt)?;
    let (mut peak, mut segment, mut single) = (0.0f64, f64::INFINITY, f64::INFINITY);
    for _ in 0..ROUNDS {
        peak = peak.max(flops(cpu.level));
        segment = segment.min(seconds(|| state.forward(&tokens, Phase::Prompt).map(|_| ()))?);
    }
    for _ in 0..8 * ROUNDS {
        single = single.min(seconds(|| state.forward(&token, Phase::Generated).map(|_| ()))?);
    }
    let products = (heads * SEGMENT * entries * 2 * dim) as f64 / segment;
    let number = if state.store().coded() { 1 } else { state.store().dtype().size() };
    let bytes = (heads * entries * dim * number) as f64 / single;
    println!(
        "| {heads} × {dim} | {entries} | {top} | {:.1} | {:.0} % | {:.0} | {:.1} |",
        segment * 1e3,
        100.0 * products / peak,
        single * 1e6,
        bytes / 1e9
    );
    Ok(())
}

/// The same of codes of 8 bits, with bf16 keys that decide; and what 262144 entries of 8 heads of 64 take.
fn coded(cpu: Cpu) -> foveal::Result<()> {
    println!("\nMemorizing Transformers, entries as codes of 8 bits, keys in bf16 to decide");
    println!(
        "| heads × dim | entries | k | a segment, ms | products of keys alone, of FMA peak | a token, µs | GB/s of codes |"
    );
    println!("|---|---|---|---|---|---|---|");
    for entries in [65_536, 262_144] {
        let sizes = Sizes { heads: 8, dim: 64, entries };
        let keys = ContiguousCache::<half::bf16>::new(8, (64, 0), entries + 8 * SEGMENT)?;
        let mut memory = CodedMemory::new(keys, 64)?;
        let shape = Shape { batch: 1, seq: SEGMENT, heads: 8, dim: 64 };
        let mut k = numbers(shape)?;
        for n in 0..entries / SEGMENT {
            // Other keys in each segment, of length 1.
            let mut rows = k.view_mut();
            for (t, head) in (0..SEGMENT).flat_map(|t| (0..8).map(move |head| (t, head))) {
                let row = rows.row_mut(0, t, head);
                row[(t + n) % 64] += 0.37 * (n % 5) as f32 - 0.6;
                let norm = row.iter().map(|x| x * x).sum::<f32>().sqrt();
                row.iter_mut().for_each(|x| *x /= norm);
            }
            memory.append(k.view(), k.view())?;
        }
        let bytes = memory.held_bytes().unwrap_or(0);
        let memorizing = Memorizing::new(SEGMENT, 32, entries)?.cpu(cpu);
        measure(sizes, 32, memorizing.resume(sizes.heads(), memory)?, cpu)?;
        println!("| | | | | | | {:.1} MiB in memory |", bytes as f64 / 1_048_576.0);
    }
    Ok(())
}
