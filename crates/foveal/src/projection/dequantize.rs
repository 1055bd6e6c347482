//! Stored rows to `f32`, one plain loop for each format: the reference that every fast kernel is tested against.
//!
//! The layouts are those of [`Format`]. Each product and sum is rounded to f32 in the order that ggml's own code
//! rounds it (`(d·s)·q − (m·t)`), so that the values agree with it bit for bit. f16 and bf16 widen exactly.

use half::{bf16, f16};

use super::Format;

/// A row that cannot be read, because its length does not fit its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RowError {
    /// The number of elements is not a whole number of blocks.
    #[error("a row of {elements} elements is not a whole number of {format} blocks of {block_len}")]
    PartialBlock {
        /// The format of the row.
        format: Format,
        /// The elements asked for.
        elements: usize,
        /// The elements of a block of this format.
        block_len: usize,
    },
    /// The bytes are too few or too many for the elements asked for.
    #[error("a row of {elements} {format} elements has {expected} bytes, got {got}")]
    Length {
        /// The format of the row.
        format: Format,
        /// The elements asked for.
        elements: usize,
        /// The bytes that so many elements have.
        expected: usize,
        /// The bytes given.
        got: usize,
    },
}

/// Writes the values of a stored row, or of any whole number of rows, to `out`. Does not allocate.
///
/// # Errors
///
/// [`RowError`] when `out` is not a whole number of blocks, or `bytes` is not exactly its blocks; `out` is then
/// unchanged.
///
/// ```
/// use foveal::projection::{Format, dequantize_row};
///
/// let mut row = [0.0; 2];
/// dequantize_row(Format::BF16, &[0x80, 0x3f, 0x00, 0xc0], &mut row)?;
/// assert_eq!(row, [1.0, -2.0]);
/// # Ok::<(), foveal::projection::RowError>(())
/// ```
pub fn dequantize_row(format: Format, bytes: &[u8], out: &mut [f32]) -> Result<(), RowError> {
    let elements = out.len();
    let Some(expected) = format.row_bytes(elements) else {
        return Err(RowError::PartialBlock { format, elements, block_len: format.block_len() });
    };
    if bytes.len() != expected {
        return Err(RowError::Length { format, elements, expected, got: bytes.len() });
    }
    match format {
        Format::F32 => each_block(bytes, out, |x, [y]| *y = f32::from_le_bytes(*x)),
        Format::F16 => each_block(bytes, out, |x, [y]| *y = f16::from_le_bytes(*x).to_f32()),
        Format::BF16 => each_block(bytes, out, |x, [y]| *y = bf16::from_le_bytes(*x).to_f32()),
        Format::Q8_0 => each_block(bytes, out, q8_0),
        Format::Q4_0 => each_block(bytes, out, q4_0),
        Format::Q4_1 => each_block(bytes, out, q4_1),
        Format::Q5_0 => each_block(bytes, out, q5_0),
        Format::Q5_1 => each_block(bytes, out, q5_1),
        Format::Q4_K => each_block(bytes, out, q4_k),
        Format::Q5_K => each_block(bytes, out, q5_k),
        Format::Q6_K => each_block(bytes, out, q6_k),
    }
    Ok(())
}

fn each_block<const BYTES: usize, const LEN: usize>(
    bytes: &[u8],
    out: &mut [f32],
    decode: impl Fn(&[u8; BYTES], &mut [f32; LEN]),
) {
    for (block, values) in bytes.as_chunks().0.iter().zip(out.as_chunks_mut().0) {
        decode(block, values);
    }
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// Element `j` of a 32-block whose 16 bytes of nibbles are given.
fn nibble(nibbles: &[u8], j: usize) -> u8 {
    if j < 16 { nibbles[j] & 15 } else { nibbles[j - 16] >> 4 }
}

fn q8_0(block: &[u8; 34], out: &mut [f32; 32]) {
    let d = half_at(block, 0);
    for (y, &q) in out.iter_mut().zip(&block[2..]) {
        *y = d * f32::from(q as i8);
    }
}

fn q4_0(block: &[u8; 18], out: &mut [f32; 32]) {
    let d = half_at(block, 0);
    for (j, y) in out.iter_mut().enumerate() {
        *y = d * (f32::from(nibble(&block[2..], j)) - 8.0);
    }
}

fn q4_1(block: &[u8; 20], out: &mut [f32; 32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    for (j, y) in out.iter_mut().enumerate() {
        *y = d * f32::from(nibble(&block[4..], j)) + m;
    }
}

/// Element `j` of a 32-block whose word of fifth bits, then nibbles, are given.
fn five_bits(bytes: &[u8], j: usize) -> u8 {
    nibble(&bytes[4..], j) | (bytes[j / 8] >> (j % 8) & 1) << 4
}

fn q5_0(block: &[u8; 22], out: &mut [f32; 32]) {
    let d = half_at(block, 0);
    for (j, y) in out.iter_mut().enumerate() {
        *y = d * (f32::from(five_bits(&block[2..], j)) - 16.0);
    }
}

fn q5_1(block: &[u8; 24], out: &mut [f32; 32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    for (j, y) in out.iter_mut().enumerate() {
        *y = d * f32::from(five_bits(&block[4..], j)) + m;
    }
}

/// The 6-bit scale and minimum of run `r` of a `Q4_K` or `Q5_K` block.
fn scale_and_minimum(packed: &[u8], r: usize) -> (u8, u8) {
    if r < 4 {
        (packed[r] & 63, packed[r + 4] & 63)
    } else {
        let (scale_high, minimum_high) = (packed[r - 4] >> 6, packed[r] >> 6);
        (packed[r + 4] & 15 | scale_high << 4, packed[r + 4] >> 4 | minimum_high << 4)
    }
}

fn q4_k(block: &[u8; 144], out: &mut [f32; 256]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    let nibbles = &block[16..];
    for (r, run) in out.chunks_exact_mut(32).enumerate() {
        let (s, t) = scale_and_minimum(&block[4..16], r);
        let (scale, minimum) = (d * f32::from(s), m * f32::from(t));
        for (i, y) in run.iter_mut().enumerate() {
            let byte = nibbles[32 * (r / 2) + i];
            let q = if r % 2 == 0 { byte & 15 } else { byte >> 4 };
            *y = scale * f32::from(q) - minimum;
        }
    }
}

fn q5_k(block: &[u8; 176], out: &mut [f32; 256]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    let (fifth, nibbles) = block[16..].split_at(32);
    for (r, run) in out.chunks_exact_mut(32).enumerate() {
        let (s, t) = scale_and_minimum(&block[4..16], r);
        let (scale, minimum) = (d * f32::from(s), m * f32::from(t));
        for (i, y) in run.iter_mut().enumerate() {
            let byte = nibbles[32 * (r / 2) + i];
            let q = if r % 2 == 0 { byte & 15 } else { byte >> 4 } | (fifth[i] >> r & 1) << 4;
            *y = scale * f32::from(q) - minimum;
        }
    }
}

fn q6_k(block: &[u8; 210], out: &mut [f32; 256]) {
    let d = half_at(block, 208);
    for (half, values) in out.chunks_exact_mut(128).enumerate() {
        let low = &block[64 * half..];
        let high = &block[128 + 32 * half..];
        let scales = &block[192 + 8 * half..];
        for (j, y) in values.iter_mut().enumerate() {
            let (k, i) = (j / 32, j % 32);
            let byte = low[32 * (k % 2) + i];
            let q = if k < 2 { byte & 15 } else { byte >> 4 } | (high[i] >> (2 * k) & 3) << 4;
            let scale = d * f32::from(scales[2 * k + i / 16] as i8);
            *y = scale * (f32::from(q) - 32.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: [u8; 2] = [0x00, 0x3c];
    const HALF: [u8; 2] = [0x00, 0x38];

    fn decode(format: Format, bytes: &[u8]) -> Vec<f32> {
        let mut out = vec![f32::NAN; bytes.len() / format.block_bytes() * format.block_len()];
        dequantize_row(format, bytes, &mut out).expect("the lengths agree");
        out
    }

    #[test]
    fn floats_widen_exactly() {
        assert_eq!(
            decode(Format::F32, &[0, 0, 0x20, 0xc1, 1, 0, 0, 0]),
            [-10.0, f32::from_bits(1)]
        );
        assert_eq!(decode(Format::F16, &[0x00, 0xc0, 0x01, 0x00]), [-2.0, 2f32.powi(-24)]);
        assert_eq!(decode(Format::BF16, &[0x40, 0x40, 0x80, 0x7f]), [3.0, f32::INFINITY]);
    }

    #[test]
    fn q8_0_is_signed() {
        let mut block = [0; 34];
        block[..2].copy_from_slice(&HALF);
        (block[2], block[3], block[33]) = (127, 0x80, 0xff);
        let out = decode(Format::Q8_0, &block);
        assert_eq!((out[0], out[1], out[2], out[31]), (63.5, -64.0, 0.0, -0.5));
    }

    #[test]
    fn nibbles_are_sixteen_apart() {
        let mut block = [0x88; 18];
        block[..2].copy_from_slice(&HALF);
        (block[2], block[17]) = (0xf1, 0x0a);
        let out = decode(Format::Q4_0, &block);
        assert_eq!((out[0], out[16], out[15], out[31], out[1]), (-3.5, 3.5, 1.0, -4.0, 0.0));
    }

    #[test]
    fn q4_1_adds_its_minimum() {
        let mut block = [0; 20];
        block[..2].copy_from_slice(&HALF);
        block[2..4].copy_from_slice(&ONE);
        (block[4], block[19]) = (0x2f, 0xe3);
        let out = decode(Format::Q4_1, &block);
        assert_eq!((out[0], out[16], out[15], out[31], out[1]), (8.5, 2.0, 2.5, 8.0, 1.0));
    }

    #[test]
    fn q5_0_takes_its_fifth_bits_from_the_word() {
        let mut block = [0; 22];
        block[..2].copy_from_slice(&ONE);
        block[2..6].copy_from_slice(&(1u32 | 1 << 17 | 1 << 31).to_le_bytes());
        (block[6], block[21]) = (0x0f, 0xf0);
        let out = decode(Format::Q5_0, &block);
        assert_eq!((out[0], out[16], out[17], out[15], out[31]), (15.0, -16.0, 0.0, -16.0, 15.0));
    }

    #[test]
    fn q5_1_adds_its_minimum() {
        let mut block = [0; 24];
        block[..2].copy_from_slice(&HALF);
        block[2..4].copy_from_slice(&ONE);
        block[4..8].copy_from_slice(&(1u32 | 1 << 17 | 1 << 31).to_le_bytes());
        (block[8], block[23]) = (0x0f, 0xf0);
        let out = decode(Format::Q5_1, &block);
        assert_eq!((out[0], out[16], out[17], out[15], out[31]), (16.5, 1.0, 9.0, 1.0, 16.5));
    }

    #[test]
    fn q5_k_takes_a_bit_of_each_byte_for_a_run() {
        let mut block = [0; 176];
        block[..2].copy_from_slice(&ONE);
        block[2..4].copy_from_slice(&HALF);
        // Run 1: scale 3, minimum 4. Run 6: scale 2, minimum 0.
        (block[4 + 1], block[4 + 5], block[4 + 10]) = (3, 4, 2);
        block[16 + 9] = 1 << 1 | 1 << 6;
        block[48 + 9] = 0x50; // element 9 of run 1 is 5 + 16
        block[48 + 3 * 32 + 9] = 0x07; // element 9 of run 6 is 7 + 16
        let out = decode(Format::Q5_K, &block);
        assert_eq!((out[32 + 9], out[32 + 8]), (3.0 * 21.0 - 2.0, -2.0));
        assert_eq!((out[6 * 32 + 9], out[6 * 32 + 8]), (2.0 * 23.0, 0.0));
    }

    #[test]
    fn q4_k_unpacks_six_bit_scales() {
        let mut block = [0; 144];
        block[..2].copy_from_slice(&ONE);
        block[2..4].copy_from_slice(&HALF);
        // Run 1: scale 33, minimum 5. Run 5: scale 0b10_0011, minimum 0b01_0110.
        (block[4 + 1], block[4 + 5]) = (33 | 0b10 << 6, 5 | 0b01 << 6);
        block[4 + 9] = 0b0110_0011;
        block[16] = 0x20; // group 0: element 0 of run 1 is 2
        block[16 + 2 * 32 + 31] = 0xf4; // group 2: element 31 of run 4 is 4, of run 5 is 15
        let out = decode(Format::Q4_K, &block);
        assert_eq!((out[32], out[33]), (2.0 * 33.0 - 2.5, -2.5));
        assert_eq!((out[4 * 32 + 31], out[5 * 32 + 31]), (0.0, 15.0 * 35.0 - 11.0));
    }

    #[test]
    fn q6_k_joins_low_and_high_bits() {
        let mut block = [0; 210];
        block[208..].copy_from_slice(&HALF);
        for scale in &mut block[192..208] {
            *scale = 2;
        }
        block[192 + 8 + 7] = 0xfd; // half 1, k = 3, i ≥ 16: −3
        block[64 + 32 + 20] = 0x70; // half 1, k = 3, i = 20: low bits 7
        block[128 + 32 + 20] = 0b11_00_01_00; // half 1, i = 20: k = 1 has 1, k = 3 has 3
        let out = decode(Format::Q6_K, &block);
        assert_eq!(out[0], -32.0);
        assert_eq!(out[128 + 32 + 20], f32::from(16u8) - 32.0);
        assert_eq!(out[128 + 96 + 20], -1.5 * (55.0 - 32.0));
        assert_eq!(out[128 + 96 + 19], -1.5 * -32.0);
    }

    #[test]
    fn rows_that_do_not_fit_are_refused() {
        let mut out = [7.0; 33];
        let partial = dequantize_row(Format::Q8_0, &[0; 34], &mut out);
        assert_eq!(
            partial,
            Err(RowError::PartialBlock { format: Format::Q8_0, elements: 33, block_len: 32 })
        );
        let short = dequantize_row(Format::Q8_0, &[0; 33], &mut out[..32]);
        let error = RowError::Length { format: Format::Q8_0, elements: 32, expected: 34, got: 33 };
        assert_eq!(short, Err(error));
        assert_eq!(out, [7.0; 33]);
    }
}
