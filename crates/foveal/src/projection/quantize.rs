//! Rows of `f32` to their stored form: what [`dequantize_row`](super::dequantize_row) reads.
//!
//! ```text
//! choose d, m and whole numbers q so that   Σ w (x − value(d, m, q))²   is small       w = √(mean x²) + |x|
//! ```
//!
//! Scales and minima are found by trial: some twenty ways to round a block are each followed by the scale (and minimum)
//! that is best for those whole numbers by least squares, then rounded to f16; the best of all counts, plain rounding
//! between the extremes among them, which is therefore never better for a format of 32 elements. Large weights count more,
//! because they meet inputs no smaller than others do and their errors are larger. The idea is that of ggml's quantisers;
//! costs some 100 operations an element. The same row gives the same bytes on every machine.

mod fit;
mod super_blocks;

use half::{bf16, f16};

use super::{Format, RowError};
use fit::{Affine, Levels, nearest, weights};

/// A row that has no stored form.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum QuantizeError {
    /// Numbers and bytes do not fit each other.
    #[error(transparent)]
    Row(#[from] RowError),
    /// A number that is NaN, infinite, or beyond what the format's scales hold.
    #[error(
        "element {at} is {found}, and {format} holds numbers up to ±{limit}; the weights may be damaged"
    )]
    Range {
        /// Where it is.
        at: usize,
        /// The number.
        found: f32,
        /// The format asked for.
        format: Format,
        /// The largest magnitude that it takes.
        limit: f32,
    },
}

/// The largest magnitude that a row of a format may have.
fn limit(format: Format) -> f32 {
    match format {
        Format::F32 => f32::MAX,
        Format::BF16 => bf16::MAX.to_f32(),
        _ => f16::MAX.to_f32(),
    }
}

/// Writes the stored form of `values`, a whole number of blocks, to `bytes`. Does not allocate.
///
/// # Errors
///
/// [`QuantizeError`] when `values` is not a whole number of blocks, `bytes` is not exactly their size, or a number is not
/// finite or too large; `bytes` is then unchanged.
///
/// ```
/// use foveal::projection::{Format, dequantize_row, quantize_row};
///
/// let values: Vec<f32> = (0..32).map(|i| i as f32 - 10.0).collect();
/// let (mut bytes, mut back) = ([0; 34], [0.0; 32]);
/// quantize_row(Format::Q8_0, &values, &mut bytes)?;
/// dequantize_row(Format::Q8_0, &bytes, &mut back)?;
/// assert!(values.iter().zip(back).all(|(x, y)| (x - y).abs() < 0.1));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn quantize_row(format: Format, values: &[f32], bytes: &mut [u8]) -> Result<(), QuantizeError> {
    let elements = values.len();
    let Some(expected) = format.row_bytes(elements) else {
        return Err(
            RowError::PartialBlock { format, elements, block_len: format.block_len() }.into()
        );
    };
    if bytes.len() != expected {
        return Err(RowError::Length { format, elements, expected, got: bytes.len() }.into());
    }
    let limit = limit(format);
    if let Some(at) = values.iter().position(|x| x.is_nan() || x.abs() > limit) {
        return Err(QuantizeError::Range { at, found: values[at], format, limit });
    }
    match format {
        Format::F32 => each_block(values, bytes, |[x], out| *out = x.to_le_bytes()),
        Format::F16 => each_block(values, bytes, |[x], out| *out = f16::from_f32(*x).to_le_bytes()),
        Format::BF16 => {
            each_block(values, bytes, |[x], out| *out = bf16::from_f32(*x).to_le_bytes());
        }
        Format::Q8_0 => each_block(values, bytes, q8_0),
        Format::Q4_0 => each_block(values, bytes, q4_0),
        Format::Q4_1 => each_block(values, bytes, q4_1),
        Format::Q5_0 => each_block(values, bytes, q5_0),
        Format::Q5_1 => each_block(values, bytes, q5_1),
        Format::Q4_K => each_block(values, bytes, super_blocks::q4_k),
        Format::Q5_K => each_block(values, bytes, super_blocks::q5_k),
        Format::Q6_K => each_block(values, bytes, super_blocks::q6_k),
    }
    Ok(())
}

fn each_block<const LEN: usize, const BYTES: usize>(
    values: &[f32],
    bytes: &mut [u8],
    encode: impl Fn(&[f32; LEN], &mut [u8; BYTES]),
) {
    for (values, block) in values.as_chunks().0.iter().zip(bytes.as_chunks_mut().0) {
        encode(values, block);
    }
}

fn put_half(block: &mut [u8], at: usize, x: f16) {
    block[at..at + 2].copy_from_slice(&x.to_le_bytes());
}

/// Writes the low four bits of 32 codes, elements 16 apart in a byte.
fn put_nibbles(out: &mut [u8], codes: &[u8; 32]) {
    for (j, byte) in out.iter_mut().enumerate() {
        *byte = codes[j] & 15 | codes[j + 16] << 4;
    }
}

/// The fifth bits of 32 codes.
fn fifth_bits(codes: &[u8; 32]) -> [u8; 4] {
    let bits = codes.iter().enumerate().map(|(j, code)| u32::from(code >> 4 & 1) << j);
    bits.fold(0, |all, bit| all | bit).to_le_bytes()
}

/// A scale for 32 numbers around zero, and their codes, which begin at 0.
fn symmetric(x: &[f32; 32], levels: Levels) -> (f16, [u8; 32]) {
    let d = fit::symmetric(x, &weights::<32>(x), levels, fit::half);
    let scale = d.to_f32();
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    let code = |x: f32| (nearest(x * inverse, levels) - levels.lowest) as u8;
    (d, x.map(code))
}

/// A scale and a minimum for 32 numbers, and their codes.
fn affine(x: &[f32; 32], highest: f32) -> ([f16; 2], [u8; 32]) {
    let Affine { scale, minimum } =
        fit::affine(x, &weights::<32>(x), (highest, f32::MAX), fit::half);
    let (d, m) = (scale.to_f32(), minimum.to_f32());
    let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
    let levels = Levels { lowest: 0.0, highest };
    ([scale, minimum], x.map(|x| nearest((x - m) * inverse, levels) as u8))
}

fn q8_0(x: &[f32; 32], block: &mut [u8; 34]) {
    let (d, codes) = symmetric(x, Levels { lowest: -127.0, highest: 127.0 });
    put_half(block, 0, d);
    for (byte, code) in block[2..].iter_mut().zip(codes) {
        *byte = code.wrapping_sub(127);
    }
}

fn q4_0(x: &[f32; 32], block: &mut [u8; 18]) {
    let (d, codes) = symmetric(x, Levels { lowest: -8.0, highest: 7.0 });
    put_half(block, 0, d);
    put_nibbles(&mut block[2..], &codes);
}

fn q4_1(x: &[f32; 32], block: &mut [u8; 20]) {
    let ([d, m], codes) = affine(x, 15.0);
    put_half(block, 0, d);
    put_half(block, 2, m);
    put_nibbles(&mut block[4..], &codes);
}

fn q5_0(x: &[f32; 32], block: &mut [u8; 22]) {
    let (d, codes) = symmetric(x, Levels { lowest: -16.0, highest: 15.0 });
    put_half(block, 0, d);
    block[2..6].copy_from_slice(&fifth_bits(&codes));
    put_nibbles(&mut block[6..], &codes);
}

fn q5_1(x: &[f32; 32], block: &mut [u8; 24]) {
    let ([d, m], codes) = affine(x, 31.0);
    put_half(block, 0, d);
    put_half(block, 2, m);
    block[4..8].copy_from_slice(&fifth_bits(&codes));
    put_nibbles(&mut block[8..], &codes);
}
