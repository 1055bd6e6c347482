//! How close projections come to the machine's limits.
//!
//! Prints, taken in turn and best of several rounds: bytes read a second by one-row projections of
//! matrices that no cache holds, beside a plain loop that reads the same memory; arithmetic of prompt
//! projections, and of their gradients, beside a loop of fused multiply-adds in registers; and the
//! projections of one token of a model with the shapes of SmolLM2-135M.
//!
//! `cargo run --release -p foveal --example projection_speed [rounds] [part] [activations]` with the part `reading`,
//! `arithmetic`, `gradients`, `token` or `all`, and the activations `f32`, `bf16` or `int8`.

use foveal::projection::{
    Activations, Call, Format, Input, Matrix, MatrixShape, Output, Projection, ProjectionBackward,
    ProjectionGradients, backward_workspace_bytes, project_backward, project_many, workspace_bytes,
};
use foveal::testing::multiply_add;
use foveal::{Cpu, DType, Gradient, Level, Phase, Threads, Workspace};
use std::hint::black_box;
use std::num::NonZeroUsize;
use std::time::Instant;

fn main() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let rounds = std::env::args().nth(1).map_or(Ok(9), |n| n.parse())?;
    let cpu = Cpu::detect()?;
    println!("level {}, best of {rounds}", cpu.level);
    let part = std::env::args().nth(2);
    let wanted = |name| part.as_deref().is_none_or(|part| part == name || part == "all");
    let name = std::env::args().nth(3).unwrap_or_else(|| "f32".to_owned());
    let activations = Activations::named(&name).ok_or("activations are f32, bf16 or int8")?;
    // On a thread of the pool, as a program would that cares for speed: a call from outside puts its
    // thread to sleep and wakes it again.
    rayon::scope(|_| {
        if wanted("reading") {
            reading(cpu, activations, rounds)?;
        }
        if wanted("arithmetic") {
            arithmetic(cpu, activations, rounds)?;
        }
        if wanted("gradients") {
            gradients(cpu, rounds)?;
        }
        if wanted("token") {
            token(cpu, activations, rounds)?;
        }
        Ok(())
    })
}

fn threads(n: usize) -> Threads {
    Threads::at_most(NonZeroUsize::new(n).expect("one at least"))
}

/// Blocks whose scales are finite: every byte 0x11.
fn stored(format: Format, shape: MatrixShape) -> Vec<u8> {
    vec![0x11; format.row_bytes(shape.in_features).expect("whole blocks") * shape.out_features]
}

fn seconds(work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_secs_f64()
}

/// XOR of all words, in sums that the compiler keeps in vectors.
fn read(bytes: &[u8]) -> u64 {
    let mut lanes = [0u64; 16];
    for block in bytes.as_chunks::<128>().0 {
        for (lane, word) in lanes.iter_mut().zip(block.as_chunks().0) {
            *lane ^= u64::from_le_bytes(*word);
        }
    }
    lanes.iter().fold(0, |a, b| a ^ b)
}

fn reading(cpu: Cpu, activations: Activations, rounds: usize) -> Result<(), foveal::Error> {
    for count in [1, 2] {
        println!(
            "\none row, {count} threads: GB/s of 256 MiB of weights, of plain reading; of 512 KiB"
        );
        let call = Call {
            phase: Phase::Generated,
            cpu: Cpu { threads: threads(count), ..cpu },
            activations,
        };
        for format in Format::ALL {
            let in_features = 2048;
            let row = format.row_bytes(in_features).expect("whole blocks");
            let shape = MatrixShape { out_features: (256 << 20) / row, in_features };
            let bytes = stored(format, shape);
            let matrix = Matrix::new(format, shape, &bytes)?;
            let mut bench = Bench::new(&[matrix], 1, call);
            let (mut best, mut best_read) = (f64::MAX, f64::MAX);
            for _ in 0..rounds {
                best_read = best_read.min(seconds(|| read_with(&bytes, count)));
                best = best.min(seconds(|| bench.run(&[matrix], call)));
            }
            let speed = |seconds: f64| bytes.len() as f64 / seconds / 1e9;
            let (ours, plain) = (speed(best), speed(best_read));
            let share = 100.0 * ours / plain;
            let cached = from_cache(format, in_features, call, 20 * rounds)?;
            println!("{format:>5} {ours:6.1} of {plain:5.1}  {share:3.0} %  {cached:6.1}");
        }
    }
    Ok(())
}

/// The same of a matrix that the second cache level holds: what arithmetic allows.
fn from_cache(
    format: Format,
    in_features: usize,
    call: Call,
    rounds: usize,
) -> Result<f64, foveal::Error> {
    let row = format.row_bytes(in_features).expect("whole blocks");
    let shape = MatrixShape { out_features: (512 << 10) / row, in_features };
    let bytes = stored(format, shape);
    let matrix = Matrix::new(format, shape, &bytes)?;
    let mut bench = Bench::new(&[matrix], 1, call);
    let mut best = f64::MAX;
    for _ in 0..rounds {
        best = best.min(seconds(|| bench.run(&[matrix], call)));
    }
    Ok(bytes.len() as f64 / best / 1e9)
}

fn read_with(bytes: &[u8], threads: usize) {
    std::thread::scope(|scope| {
        for part in bytes.chunks(bytes.len().div_ceil(threads)) {
            scope.spawn(move || black_box(read(part)));
        }
    });
}

/// Inputs, outputs and workspace of some matrices.
struct Bench {
    rows: usize,
    x: Vec<f32>,
    y: Vec<Vec<f32>>,
    workspace: Workspace,
}

impl Bench {
    fn new(matrices: &[Matrix<'_>], rows: usize, call: Call) -> Bench {
        let mut workspace = Workspace::new();
        workspace.reserve(workspace_bytes(matrices, rows, call));
        let width = matrices[0].shape().in_features;
        let y = matrices.iter().map(|m| vec![0.0; rows * m.shape().out_features]).collect();
        Bench { rows, x: vec![0.5; rows * width], y, workspace }
    }

    fn run(&mut self, matrices: &[Matrix<'_>], call: Call) {
        let mut projections: Vec<_> = matrices
            .iter()
            .zip(&mut self.y)
            .map(|(&weights, y)| {
                let output = Output { data: y, stride: weights.shape().out_features };
                Projection { weights, output }
            })
            .collect();
        let stride = matrices[0].shape().in_features;
        let x = Input { data: &self.x, rows: self.rows, stride };
        project_many(&mut projections, x, call, &mut self.workspace).expect("shapes agree");
    }
}

fn arithmetic(cpu: Cpu, activations: Activations, rounds: usize) -> Result<(), foveal::Error> {
    println!("\n1536x576, one thread: Gflop/s (share of the peak loop)");
    let shape = MatrixShape { out_features: 1536, in_features: 576 };
    let one = Cpu { threads: Threads::ONE, ..cpu };
    let dtype = match activations {
        Activations::F32 => DType::F32,
        _ => DType::Bf16,
    };
    for (phase, row_counts) in
        [(Phase::Prompt, &[16, 64, 512][..]), (Phase::Generated, &[4, 16, 64])]
    {
        for &rows in row_counts {
            for format in [Format::F32, Format::BF16, Format::Q8_0, Format::Q4_1, Format::Q5_0] {
                let call = Call { phase, cpu: one, activations };
                let bytes = stored(format, shape);
                let matrix = Matrix::new(format, shape, &bytes)?;
                let mut bench = Bench::new(&[matrix], rows, call);
                let (mut best, mut peak) = (f64::MAX, 0f64);
                for _ in 0..rounds {
                    peak = peak.max(peak_flops(cpu.level, dtype));
                    best = best.min(seconds(|| bench.run(&[matrix], call)));
                }
                let ours = 2.0 * (rows * 1536 * 576) as f64 / best / 1e9;
                let share = 100.0 * ours / peak;
                println!(
                    "{phase:?} {rows:4} rows {format:>5} {ours:6.1} of {peak:5.1}  {share:3.0} %"
                );
            }
        }
    }
    Ok(())
}

fn gradients(cpu: Cpu, rounds: usize) -> Result<(), foveal::Error> {
    println!("\ngradients of f32 matrices, one thread: share of the peak loop, of d_x and of d_W");
    let cpu = Cpu { threads: Threads::ONE, ..cpu };
    let mut workspace = Workspace::new();
    workspace.reserve(backward_workspace_bytes(cpu));
    for [rows, out_features, in_features] in
        [[512; 3], [1024; 3], [2048, 576, 1536], [2048, 1536, 576], [4096, 128, 128]]
    {
        let weights = vec![0.5; out_features * in_features];
        let (x, d_y) = (vec![0.5; rows * in_features], vec![0.5; rows * out_features]);
        let (mut d_x, mut d_weights) = (x.clone(), weights.clone());
        let shape = MatrixShape { out_features, in_features };
        let projection = ProjectionBackward {
            weights: Matrix::from_floats(shape, &weights)?,
            x: Input { data: &x, rows, stride: in_features },
            d_y: Input { data: &d_y, rows, stride: out_features },
        };
        let mut run = |gradients: ProjectionGradients<'_>| {
            seconds(|| {
                project_backward(projection, gradients, cpu, &mut workspace).expect("shapes agree");
            })
        };
        let (mut best, mut peak) = ([f64::MAX; 2], 0f64);
        for _ in 0..rounds {
            peak = peak.max(peak_flops(cpu.level, DType::F32));
            let d_x = Gradient::Write(Output { data: &mut d_x, stride: in_features });
            best[0] = best[0].min(run(ProjectionGradients { d_x, ..Default::default() }));
            let d_weights = Gradient::Write(&mut d_weights[..]);
            best[1] = best[1].min(run(ProjectionGradients { d_weights, ..Default::default() }));
        }
        let operations = 2.0 * (rows * out_features * in_features) as f64;
        let [d_x, d_weights] = best.map(|best| 100.0 * operations / best / 1e9 / peak);
        println!("{rows:4} rows {out_features:4}x{in_features:<4} {d_x:3.0} % {d_weights:3.0} %");
    }
    Ok(())
}

/// The matrices of one token: 30 layers of 576 with 4-bit weights, and an 8-bit head of 49152.
fn token(cpu: Cpu, activations: Activations, rounds: usize) -> Result<(), foveal::Error> {
    const LAYERS: usize = 30;
    let shape = |out_features, in_features| MatrixShape { out_features, in_features };
    let groups = [
        vec![shape(576, 576), shape(192, 576), shape(192, 576)],
        vec![shape(576, 576)],
        vec![shape(1536, 576), shape(1536, 576)],
        vec![shape(576, 1536)],
    ];
    let mut weights = Vec::new();
    for _ in 0..LAYERS {
        for group in &groups {
            let format = Format::Q4_1;
            weights.push(group.iter().map(|&s| (format, s, stored(format, s))).collect::<Vec<_>>());
        }
    }
    let head = shape(49152, 576);
    weights.push(vec![(Format::Q8_0, head, stored(Format::Q8_0, head))]);
    for count in [1, 2] {
        let call = Call {
            phase: Phase::Generated,
            cpu: Cpu { threads: threads(count), ..cpu },
            activations,
        };
        let mut groups = Vec::new();
        for group in &weights {
            let matrices: Result<Vec<_>, _> = group
                .iter()
                .map(|(format, shape, bytes)| Matrix::new(*format, *shape, bytes))
                .collect();
            let matrices = matrices?;
            groups.push((Bench::new(&matrices, 1, call), matrices));
        }
        let mut pass = || {
            seconds(|| {
                for (bench, matrices) in &mut groups {
                    bench.run(matrices, call);
                }
            })
        };
        let mut times: Vec<_> = (0..4 * rounds).map(|_| 1e3 * pass()).collect();
        times.sort_by(f64::total_cmp);
        println!(
            "\none token of SmolLM2-135M's projections (Q4_1, head Q8_0), {count} threads: \
             best {:.2} ms, median {:.2} ms",
            times[0],
            times[times.len() / 2]
        );
    }
    Ok(())
}

fn peak_flops(level: Level, dtype: DType) -> f64 {
    let mut operations = 0;
    let time = seconds(|| operations = black_box(multiply_add(level, dtype, 100_000)).0);
    operations as f64 / time / 1e9
}
