//! Rows of a tensor on their way to another format: read, changed, rounded, written.

use std::io::Write;

use foveal::projection::{Format, QuantizeError, dequantize_row, quantize_row};

use crate::Error;
use crate::weights::{self, Weight};

/// Numbers that are in memory at a time, about.
const AT_ONCE: usize = 1 << 20;

/// What GGUF stores otherwise than Hugging Face.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// Nothing.
    None,
    /// In each run of so many rows, rows `i` and `i + half` become `2i` and `2i + 1`: interleaved pairs.
    Interleave(usize),
    /// One is added.
    AddOne,
}

impl Change {
    /// The row of the source that becomes row `row`.
    fn source(self, row: usize) -> usize {
        match self {
            Change::Interleave(run) => {
                let (head, i) = (row / run, row % run);
                head * run + i / 2 + i % 2 * (run / 2)
            }
            Change::None | Change::AddOne => row,
        }
    }
}

/// Writes a tensor in a format. A vector counts as a column where its rows are to be moved.
pub(super) fn write(
    weight: &Weight,
    change: Change,
    to: Format,
    out: &mut dyn Write,
) -> Result<(), Error> {
    let failed = |source| {
        let path = std::path::PathBuf::from(weight.name());
        Error::Weights(weights::Error::Io { action: "write", path, source })
    };
    if weight.format() == to && change == Change::None {
        return out.write_all(weight.bytes()).map_err(failed);
    }
    if weight.shape().len() < 2 {
        let values = weight.to_f32();
        let moved = (0..values.len()).map(|row| values[change.source(row)]);
        let added = if change == Change::AddOne { 1.0 } else { 0.0 };
        let values: Vec<f32> = moved.map(|x| x + added).collect();
        return out.write_all(&stored(weight, &values, 0, to)?).map_err(failed);
    }
    let (rows, width) = (weight.out_features(), weight.in_features());
    let together = (AT_ONCE / width.max(1)).max(1);
    let mut values = vec![];
    for first in (0..rows).step_by(together) {
        let part = first..rows.min(first + together);
        values.resize(part.len() * width, 0.0);
        for (row, values) in part.clone().zip(values.chunks_mut(width)) {
            let bytes = weight.row(change.source(row)).unwrap_or_default();
            dequantize_row(weight.format(), bytes, values).map_err(|source| Error::Quantize {
                name: weight.name().to_owned(),
                source: source.into(),
            })?;
        }
        out.write_all(&stored(weight, &values, first * width, to)?).map_err(failed)?;
    }
    Ok(())
}

/// The stored form of whole rows that begin with element `first` of their tensor; on all processors.
fn stored(weight: &Weight, values: &[f32], first: usize, to: Format) -> Result<Vec<u8>, Error> {
    let len = to.row_bytes(values.len()).unwrap_or(0);
    let mut bytes = vec![0; len];
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let blocks = values.len() / to.block_len();
    let share = blocks.div_ceil(threads).max(1);
    let parts =
        values.chunks(share * to.block_len()).zip(bytes.chunks_mut(share * to.block_bytes()));
    let results: Vec<Result<(), QuantizeError>> = std::thread::scope(|scope| {
        let started = parts.map(|(values, bytes)| scope.spawn(|| quantize_row(to, values, bytes)));
        let started: Vec<_> = started.collect();
        let joined = started.into_iter().map(|thread| match thread.join() {
            Ok(result) => result,
            Err(fault) => std::panic::resume_unwind(fault),
        });
        joined.collect()
    });
    for (part, result) in results.into_iter().enumerate() {
        result.map_err(|mut source| {
            if let QuantizeError::Range { at, .. } = &mut source {
                *at += first + part * share * to.block_len();
            }
            Error::Quantize { name: weight.name().to_owned(), source }
        })?;
    }
    Ok(bytes)
}
