//! Stored rows to `f32`, in order, with the values of [`crate::projection::dequantize_row`] (but for a
//! zero's sign).
//!
//! A scale has at most 19 bits and an integer at most 8, so that their product is exact and it does
//! not matter whether it is rounded before the minimum is added.

use crate::projection::Format;
use crate::simd::dispatch;
use crate::simd::words::Words;

dispatch! {
    /// Writes the values of whole blocks; `bytes` holds exactly those of `out`.
    pub(crate) fn dequantize(format: Format, bytes: &[u8], out: &mut [f32]) = dequantize_kernel
}

#[inline(always)]
fn dequantize_kernel<S: Words>(s: S, format: Format, bytes: &[u8], out: &mut [f32]) {
    assert_eq!(format.row_bytes(out.len()), Some(bytes.len()));
    match format {
        Format::F32 => {
            for (y, x) in out.iter_mut().zip(bytes.as_chunks().0) {
                *y = f32::from_le_bytes(*x);
            }
        }
        Format::F16 => sixteen_bits(s, bytes, out, |p| {
            // SAFETY: `sixteen_bits` calls this with LANES readable numbers.
            unsafe { s.load_f16(p) }
        }),
        Format::BF16 => sixteen_bits(s, bytes, out, |p| {
            // SAFETY: as above.
            unsafe { s.load_bf16(p) }
        }),
        Format::Q8_0 => blocks(bytes, out, |x, y| q8_0(s, x, y)),
        Format::Q4_0 => blocks(bytes, out, |x, y| q4_0(s, x, y)),
        Format::Q4_1 => blocks(bytes, out, |x, y| q4_1(s, x, y)),
        Format::Q5_0 => blocks(bytes, out, |x, y| q5_0(s, x, y)),
        Format::Q5_1 => blocks(bytes, out, |x, y| q5_1(s, x, y)),
        Format::Q4_K => blocks(bytes, out, |x, y| q4_k(s, x, y)),
        Format::Q5_K => blocks(bytes, out, |x, y| q5_k(s, x, y)),
        Format::Q6_K => blocks(bytes, out, |x, y| q6_k(s, x, y)),
    }
}

#[inline(always)]
fn blocks<const BYTES: usize, const LEN: usize>(
    bytes: &[u8],
    out: &mut [f32],
    decode: impl Fn(&[u8; BYTES], &mut [f32; LEN]),
) {
    for (block, values) in bytes.as_chunks().0.iter().zip(out.as_chunks_mut().0) {
        decode(block, values);
    }
}

#[inline(always)]
fn sixteen_bits<S: Words>(s: S, bytes: &[u8], out: &mut [f32], load: impl Fn(*const u16) -> S::F) {
    for (x, y) in bytes.chunks(2 * S::LANES).zip(out.chunks_mut(S::LANES)) {
        if y.len() == S::LANES {
            // SAFETY: the chunk holds LANES numbers.
            unsafe { s.store(y.as_mut_ptr(), load(x.as_ptr().cast())) };
        } else {
            let mut part = [0u8; 32];
            part[..x.len()].copy_from_slice(x);
            // SAFETY: the copy holds 16 >= LANES numbers, and `y` as many as are stored.
            unsafe { s.store_part(y.as_mut_ptr(), load(part.as_ptr().cast()), y.len()) };
        }
    }
}

#[inline(always)]
fn half_at<S: Words>(s: S, block: &[u8], at: usize) -> f32 {
    s.widen_f16(u16::from_le_bytes([block[at], block[at + 1]]))
}

/// `scale * q + offset` for 16 or 32 signed bytes.
#[inline(always)]
fn signed<S: Words>(s: S, q: &[i8], (scale, offset): (f32, f32), y: &mut [f32]) {
    assert_eq!(q.len(), y.len());
    let (scale, offset) = (s.splat(scale), s.splat(offset));
    for (q, y) in q.chunks_exact(S::LANES).zip(y.chunks_exact_mut(S::LANES)) {
        // SAFETY: both chunks hold LANES numbers.
        unsafe { s.store(y.as_mut_ptr(), s.fma(scale, s.load_i8(q.as_ptr()), offset)) };
    }
}

/// `scale * q + offset` for the low halves of `q`, then for the high halves.
#[inline(always)]
fn nibbles<S: Words>(s: S, q: &[u8], fit: [(f32, f32); 2], y: &mut [f32]) {
    assert_eq!(2 * q.len(), y.len());
    let (low, high) = y.split_at_mut(q.len());
    let [(a, b), (c, d)] = fit;
    let (a, b, c, d) = (s.splat(a), s.splat(b), s.splat(c), s.splat(d));
    for (i, q) in q.chunks_exact(S::LANES).enumerate() {
        // SAFETY: `q`, and `low` and `high` from i * LANES on, hold LANES numbers.
        unsafe {
            let (x, z) = s.load_nibbles(q.as_ptr());
            s.store(low[i * S::LANES..].as_mut_ptr(), s.fma(a, x, b));
            s.store(high[i * S::LANES..].as_mut_ptr(), s.fma(c, z, d));
        }
    }
}

#[inline(always)]
fn q8_0<S: Words>(s: S, block: &[u8; 34], y: &mut [f32; 32]) {
    let q: [i8; 32] = std::array::from_fn(|i| block[2 + i] as i8);
    signed(s, &q, (half_at(s, block, 0), -0.0), y);
}

#[inline(always)]
fn q4_0<S: Words>(s: S, block: &[u8; 18], y: &mut [f32; 32]) {
    let d = half_at(s, block, 0);
    nibbles(s, &block[2..], [(d, -8.0 * d); 2], y);
}

#[inline(always)]
fn q4_1<S: Words>(s: S, block: &[u8; 20], y: &mut [f32; 32]) {
    let fit = (half_at(s, block, 0), half_at(s, block, 2));
    nibbles(s, &block[4..], [fit; 2], y);
}

#[inline(always)]
fn q5_0<S: Words>(s: S, block: &[u8; 22], y: &mut [f32; 32]) {
    let q = five_bits(&block[2..]).map(|q| q - 16);
    signed(s, &q, (half_at(s, block, 0), -0.0), y);
}

#[inline(always)]
fn q5_1<S: Words>(s: S, block: &[u8; 24], y: &mut [f32; 32]) {
    let fit = (half_at(s, block, 0), half_at(s, block, 2));
    signed(s, &five_bits(&block[4..]), fit, y);
}

/// 32 integers from their word of fifth bits and their nibbles.
#[inline(always)]
fn five_bits(bytes: &[u8]) -> [i8; 32] {
    let fifth = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    let mut q = [0i8; 32];
    for j in 0..16 {
        let (low, high) = (bytes[4 + j] & 15, bytes[4 + j] >> 4);
        q[j] = (low | ((fifth >> j & 1) << 4) as u8) as i8;
        q[j + 16] = (high | ((fifth >> (j + 16) & 1) << 4) as u8) as i8;
    }
    q
}

#[inline(always)]
fn q4_k<S: Words>(s: S, block: &[u8; 144], y: &mut [f32; 256]) {
    let fits = six_bit_fits(s, &block[..16]);
    for g in 0..4 {
        let q = &block[16 + 32 * g..][..32];
        nibbles(s, q, [fits[2 * g], fits[2 * g + 1]], &mut y[64 * g..][..64]);
    }
}

/// Scales and offsets of the eight runs of a block that begins with two halves and 12 packed bytes.
#[inline(always)]
fn six_bit_fits<S: Words>(s: S, block: &[u8]) -> [(f32, f32); 8] {
    let (d, m) = (half_at(s, block, 0), half_at(s, block, 2));
    let packed = &block[4..16];
    std::array::from_fn(|r| {
        let (scale, minimum) = if r < 4 {
            (packed[r] & 63, packed[r + 4] & 63)
        } else {
            (packed[r + 4] & 15 | packed[r - 4] >> 6 << 4, packed[r + 4] >> 4 | packed[r] >> 6 << 4)
        };
        (d * f32::from(scale), -(m * f32::from(minimum)))
    })
}

#[inline(always)]
fn q5_k<S: Words>(s: S, block: &[u8; 176], y: &mut [f32; 256]) {
    let fits = six_bit_fits(s, &block[..16]);
    let (fifth, low) = block[16..].split_at(32);
    for (r, y) in y.chunks_exact_mut(32).enumerate() {
        let mut q = [0i8; 32];
        for i in 0..32 {
            let nibble = low[32 * (r / 2) + i] >> (4 * (r % 2)) & 15;
            q[i] = (nibble | (fifth[i] >> r & 1) << 4) as i8;
        }
        signed(s, &q, fits[r], y);
    }
}

#[inline(always)]
fn q6_k<S: Words>(s: S, block: &[u8; 210], y: &mut [f32; 256]) {
    let d = half_at(s, block, 208);
    for (half, y) in y.chunks_exact_mut(128).enumerate() {
        let (low, high) = (&block[64 * half..][..64], &block[128 + 32 * half..][..32]);
        let scales = &block[192 + 8 * half..][..8];
        let mut q = [0i8; 128];
        for i in 0..32 {
            let bits = |k: usize| (high[i] >> (2 * k) & 3) << 4;
            q[i] = (low[i] & 15 | bits(0)) as i8 - 32;
            q[32 + i] = (low[32 + i] & 15 | bits(1)) as i8 - 32;
            q[64 + i] = (low[i] >> 4 | bits(2)) as i8 - 32;
            q[96 + i] = (low[32 + i] >> 4 | bits(3)) as i8 - 32;
        }
        for (run, y) in y.chunks_exact_mut(16).enumerate() {
            let scale = d * f32::from(scales[run] as i8);
            signed(s, &q[16 * run..][..16], (scale, -0.0), y);
        }
    }
}
