//! Projection cases: activations times a stored matrix, against the same product with the matrix
//! widened to f32 beforehand.

use crate::case::ProjectionCase;
use crate::contender::{Contender, InProcess};
use crate::data::{SEED, splitmix, uniform};
use crate::peaks::Roof;
use crate::peer::{Peer, Peers};
use crate::prepared::{Absent, Prepared, Work, level};
use anyhow::{Context, ensure};
use foveal::projection::{
    Activations, Call, Format, Input, Matrix, MatrixShape, Output, dequantize_row, project,
    workspace_bytes,
};
use foveal::{Cpu, DType, MAX_GENERATED_ROWS, Phase, Threads, Workspace};
use std::num::NonZeroUsize;

/// Results that are compared with the definition.
const SAMPLES: usize = 64;
/// The largest accepted error, relative to the sum of the products' magnitudes.
const BOUND: f64 = 1e-5;

/// Builds a case, checks results against f64, and says what bounds it.
///
/// # Errors
/// If a result is wrong.
pub(crate) fn prepare(case: &ProjectionCase, peers: &Peers) -> anyhow::Result<Prepared> {
    let stored = Stored::new(case)?;
    let threads = Threads::at_most(NonZeroUsize::new(case.threads).context("no threads")?);
    let level = level(&case.level)?;
    let phase = if case.rows > MAX_GENERATED_ROWS { Phase::Prompt } else { Phase::Generated };
    let call = Call { phase, cpu: Cpu { level, threads }, activations: Activations::F32 };
    let mut contenders: Vec<Box<dyn Contender>> = Vec::new();
    let mut absent = Vec::new();
    if peers.has(Peer::Unfused) {
        match widened(&stored, case)? {
            Ok(peer) => contenders.push(peer),
            Err(absence) => absent.push(absence),
        }
    }
    contenders.insert(0, Box::new(ours(stored, case, call)?));
    let bytes = row_bytes(case)? * case.out_features;
    let flops = 2.0 * (case.rows * case.out_features * case.in_features) as f64;
    let roof = Roof { level, dtype: DType::F32, threads: case.threads, bytes: bytes * case.copies };
    Ok(Prepared { contenders, absent, work: Work { flops, bytes: bytes as f64 }, roof })
}

fn format(case: &ProjectionCase) -> anyhow::Result<Format> {
    let found = Format::ALL.into_iter().find(|format| format.name() == case.format);
    found.with_context(|| format!("there is no format {}", case.format))
}

fn row_bytes(case: &ProjectionCase) -> anyhow::Result<usize> {
    let bytes = format(case)?.row_bytes(case.in_features);
    bytes.with_context(|| format!("{} elements are not whole blocks", case.in_features))
}

/// Activations and the matrix, several times over.
struct Stored {
    format: Format,
    shape: MatrixShape,
    x: Vec<f32>,
    matrices: Vec<Vec<u8>>,
}

impl Stored {
    fn new(case: &ProjectionCase) -> anyhow::Result<Stored> {
        let ProjectionCase { rows, out_features, in_features, copies, .. } = *case;
        let format = format(case)?;
        let blocks = row_bytes(case)? / format.block_bytes() * out_features;
        let matrix: Vec<u8> = (0..blocks).flat_map(|n| block(format, n)).collect();
        Ok(Stored {
            format,
            shape: MatrixShape { out_features, in_features },
            x: (0..rows * in_features).map(|n| uniform(SEED, n)).collect(),
            matrices: vec![matrix; copies],
        })
    }

    fn row(&self, n: usize) -> anyhow::Result<Vec<f32>> {
        let matrix = &self.matrices[0];
        let bytes = matrix.len() / self.shape.out_features;
        let mut row = vec![0.0; self.shape.in_features];
        dequantize_row(self.format, &matrix[n * bytes..(n + 1) * bytes], &mut row)?;
        Ok(row)
    }

    /// Refuses results `[rows, out_features]` that are off.
    fn check(&self, y: &[f32]) -> anyhow::Result<()> {
        let MatrixShape { out_features, in_features } = self.shape;
        for sample in 0..SAMPLES {
            let index = (splitmix(SEED + 1, sample) % y.len() as u64) as usize;
            let (row, column) = (index / out_features, index % out_features);
            let x = &self.x[row * in_features..][..in_features];
            let (mut sum, mut size) = (0.0, 0.0);
            for (&x, w) in x.iter().zip(self.row(column)?) {
                let product = f64::from(x) * f64::from(w);
                sum += product;
                size += product.abs();
            }
            let error = (f64::from(y[index]) - sum).abs();
            ensure!(
                error <= BOUND * size,
                "result {column} of row {row} is {}, not {sum}",
                y[index]
            );
        }
        Ok(())
    }
}

/// Block `n` of a matrix: drawn bytes, with scales and minima of a sensible size.
fn block(format: Format, n: usize) -> Vec<u8> {
    let len = format.block_bytes();
    if format.block_len() == 1 {
        let x = uniform(SEED + 2, n);
        return match format {
            Format::F16 => half::f16::from_f32(x).to_le_bytes().to_vec(),
            Format::BF16 => half::bf16::from_f32(x).to_le_bytes().to_vec(),
            _ => x.to_le_bytes().to_vec(),
        };
    }
    let words = (0..len.div_ceil(8)).map(|w| splitmix(SEED + 2, n * 64 + w));
    let mut bytes: Vec<u8> = words.flat_map(u64::to_le_bytes).take(len).collect();
    let halves: &[usize] = match format {
        Format::Q4_1 | Format::Q4_K => &[0, 2],
        Format::Q6_K => &[208],
        _ => &[0],
    };
    for &at in halves {
        let scale = half::f16::from_f32(0.01 + 0.01 * uniform(SEED + 3, n).abs());
        bytes[at..at + 2].copy_from_slice(&scale.to_le_bytes());
    }
    bytes
}

fn ours(stored: Stored, case: &ProjectionCase, call: Call) -> anyhow::Result<InProcess<'static>> {
    let mut y = vec![f32::NAN; case.rows * case.out_features];
    let mut workspace = Workspace::new();
    let first = Matrix::new(stored.format, stored.shape, &stored.matrices[0])?;
    workspace.reserve(workspace_bytes(&[first], case.rows, call));
    let (rows, stride, out_stride) = (case.rows, case.in_features, case.out_features);
    let mut once = move |stored: &Stored, y: &mut [f32], turn: usize| -> anyhow::Result<()> {
        let bytes = &stored.matrices[turn % stored.matrices.len()];
        let weights = Matrix::new(stored.format, stored.shape, bytes)?;
        let x = Input { data: &stored.x, rows, stride };
        let output = Output { data: y, stride: out_stride };
        Ok(project(&weights, x, output, call, &mut workspace)?)
    };
    once(&stored, &mut y, 0)?;
    stored.check(&y).context("our result is wrong")?;
    let mut turn = 0;
    let note = format!("{:?} kernels", call.phase);
    Ok(InProcess::new("foveal", note, move || {
        turn += 1;
        once(&stored, &mut y, turn)
    }))
}

#[cfg(feature = "unfused")]
fn widened(
    stored: &Stored,
    case: &ProjectionCase,
) -> anyhow::Result<Result<Box<dyn Contender>, Absent>> {
    let rows: anyhow::Result<Vec<_>> = (0..case.out_features).map(|n| stored.row(n)).collect();
    let (x, w) = (stored.x.clone(), rows?.concat());
    let (width, threads) = (case.in_features, case.threads);
    let mut y = vec![f32::NAN; case.rows * case.out_features];
    crate::product::project(&x, &w, width, &mut y, threads);
    stored.check(&y).context("the widened product is wrong")?;
    let run = move || {
        crate::product::project(&x, &w, width, &mut y, threads);
        Ok(())
    };
    Ok(Ok(Box::new(InProcess::new("unfused", "gemm on f32".to_owned(), run))))
}

#[cfg(not(feature = "unfused"))]
fn widened(_: &Stored, _: &ProjectionCase) -> anyhow::Result<Result<Box<dyn Contender>, Absent>> {
    Ok(Err(Absent::new("unfused", "built without the feature `unfused`")))
}
