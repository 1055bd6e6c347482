//! Words as arrays.

use super::{UNITS, Words, flip, flipped};
use crate::simd::portable::{Lanes8, Portable, f16_to_f32};

impl Words for Portable {
    type U = [u32; 8];

    #[inline(always)]
    unsafe fn load_words(self, p: *const u8) -> [u32; 8] {
        // SAFETY: the caller promises 32 readable bytes.
        unsafe { p.cast::<[u32; 8]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_repeated(self, p: *const u8) -> [u32; 8] {
        // SAFETY: the caller's promise is the callee's.
        unsafe { self.load_words(p) }
    }
    #[inline(always)]
    unsafe fn load_pieces(self, p: *const u8, stride: usize, count: usize) -> [u32; 8] {
        let mut pieces = [[0u32; 4]; 2];
        for (i, piece) in pieces.iter_mut().enumerate().take(count) {
            // SAFETY: the caller promises `count` readable pieces.
            *piece = unsafe { p.add(i * stride).cast::<[u32; 4]>().read_unaligned() };
        }
        std::array::from_fn(|i| pieces[i / 4][i % 4])
    }
    #[inline(always)]
    unsafe fn load_large_pieces(self, p: *const u8, _stride: usize, count: usize) -> [u32; 8] {
        // SAFETY: the caller promises `count` readable pieces.
        if count > 0 { unsafe { self.load_words(p) } } else { [0; 8] }
    }
    #[inline(always)]
    unsafe fn load_f16_quads(self, p: *const u8, stride: usize, count: usize) -> Lanes8 {
        let mut x = [0.0; 4];
        for (i, x) in x.iter_mut().enumerate().take(count.min(2)) {
            // SAFETY: the caller promises `count` readable numbers.
            *x = f16_to_f32(unsafe { p.add(i * stride).cast::<u16>().read_unaligned() });
        }
        self.quads(x, 0)
    }
    #[inline(always)]
    unsafe fn load_f16_octets(self, p: *const u8, stride: usize, count: usize) -> [Lanes8; 2] {
        let mut out = [Lanes8([0.0; 8]); 2];
        for (i, out) in out.iter_mut().enumerate().take(count) {
            // SAFETY: the caller promises `count` readable numbers.
            let bits = unsafe { p.add(i * stride).cast::<u16>().read_unaligned() };
            *out = Lanes8([f16_to_f32(bits); 8]);
        }
        out
    }

    #[inline(always)]
    fn widen_f16(self, bits: u16) -> f32 {
        f16_to_f32(bits)
    }
    #[inline(always)]
    fn scaled_bytes(self, bytes: [u8; 4], factor: f32) -> [f32; 4] {
        bytes.map(|byte| factor * f32::from(byte as i8))
    }
    #[inline(always)]
    fn quads(self, x: [f32; 4], half: usize) -> Lanes8 {
        Lanes8(std::array::from_fn(|i| x[2 * half + i / 4]))
    }
    #[inline(always)]
    fn octets(self, x: [f32; 4], half: usize) -> [Lanes8; 2] {
        [Lanes8([x[2 * half]; 8]), Lanes8([x[2 * half + 1]; 8])]
    }

    #[inline(always)]
    fn shift_right<const N: u32>(self, a: [u32; 8]) -> [u32; 8] {
        a.map(|a| a >> N)
    }
    #[inline(always)]
    fn shift_left<const N: u32>(self, a: [u32; 8]) -> [u32; 8] {
        a.map(|a| a << N)
    }
    #[inline(always)]
    fn shift_right_each(self, a: [u32; 8], counts: [u32; 8]) -> [u32; 8] {
        std::array::from_fn(|i| a[i].wrapping_shr(counts[i]))
    }
    #[inline(always)]
    fn merge(self, a: [u32; 8], b: [u32; 8], mask: u32) -> [u32; 8] {
        std::array::from_fn(|i| (a[i] & !mask) | (b[i] & mask))
    }
    #[inline(always)]
    unsafe fn join_fifth(self, a: [u32; 8], p: *const u8, stride: usize, count: usize) -> [u32; 8] {
        let mut out = a.map(|a| a & 0x0f0f_0f0f);
        for piece in 0..count.min(2) {
            // SAFETY: the caller promises `count` readable pairs.
            let bits = unsafe { p.add(piece * stride).cast::<u16>().read_unaligned() };
            for j in 0..4 {
                let four = u32::from(bits >> (4 * j) & 15);
                out[4 * piece + j] |= four.wrapping_mul(0x0204_0810) & 0x1010_1010;
            }
        }
        out
    }
    #[inline(always)]
    fn field(self, a: [u32; 8], mask: u32, offset: f32) -> Lanes8 {
        Lanes8(a.map(|a| f32::from_bits((a & mask) | UNITS.to_bits()) - (UNITS + offset)))
    }
    #[inline(always)]
    fn signed_byte(self, a: [u32; 8], shift: u32) -> Lanes8 {
        let mut out = Lanes8([0.0; 8]);
        for (out, a) in out.0.iter_mut().zip(a) {
            *out = f32::from_bits((a & 0xff << shift) ^ flip(shift)) - flipped(shift);
        }
        out
    }
}
