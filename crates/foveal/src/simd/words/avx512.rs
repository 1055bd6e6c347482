//! Words in 512-bit registers.

use super::{UNITS, Words, flip, flipped};
use crate::simd::avx512::Avx512;
use std::arch::x86_64::*;

/// Lane `i` takes number `i / 4`.
#[inline(always)]
fn quarter() -> __m512i {
    // SAFETY: only called by methods of the token.
    unsafe { _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3) }
}

/// `count <= 4` pairs of bytes, `stride` apart, side by side; the missing ones are zero.
/// # Safety
/// Each of them is readable.
#[inline(always)]
unsafe fn sixteen_bits(p: *const u8, stride: usize, count: usize) -> u64 {
    let pair = |i: usize| match i < count {
        // SAFETY: the caller's promise.
        true => u64::from(unsafe { p.add(i * stride).cast::<u16>().read_unaligned() }),
        false => 0,
    };
    pair(0) | pair(1) << 16 | pair(2) << 32 | pair(3) << 48
}

// SAFETY of every block below: the token proves the instructions; pointers are as the trait says.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Words for Avx512 {
    type U = __m512i;

    #[inline(always)]
    unsafe fn load_words(self, p: *const u8) -> __m512i {
        unsafe { _mm512_loadu_si512(p.cast()) }
    }
    #[inline(always)]
    unsafe fn load_repeated(self, p: *const u8) -> __m512i {
        unsafe { _mm512_broadcast_i64x4(_mm256_loadu_si256(p.cast())) }
    }
    #[inline(always)]
    unsafe fn load_pieces(self, p: *const u8, stride: usize, count: usize) -> __m512i {
        unsafe {
            let piece = |i: usize| match i < count {
                true => _mm_loadu_si128(p.add(i * stride).cast()),
                false => _mm_setzero_si128(),
            };
            let low = _mm512_inserti32x4::<1>(_mm512_castsi128_si512(piece(0)), piece(1));
            _mm512_inserti32x4::<3>(_mm512_inserti32x4::<2>(low, piece(2)), piece(3))
        }
    }
    #[inline(always)]
    unsafe fn load_large_pieces(self, p: *const u8, stride: usize, count: usize) -> __m512i {
        unsafe {
            let piece = |i: usize| match i < count {
                true => _mm256_loadu_si256(p.add(i * stride).cast()),
                false => _mm256_setzero_si256(),
            };
            _mm512_inserti64x4::<1>(_mm512_castsi256_si512(piece(0)), piece(1))
        }
    }
    #[inline(always)]
    unsafe fn load_f16_quads(self, p: *const u8, stride: usize, count: usize) -> __m512 {
        unsafe {
            let four = sixteen_bits(p, stride, count);
            let x = _mm_cvtph_ps(_mm_cvtsi64_si128(four as i64));
            _mm512_permutexvar_ps(quarter(), _mm512_castps128_ps512(x))
        }
    }
    #[inline(always)]
    unsafe fn load_f16_octets(self, p: *const u8, stride: usize, count: usize) -> [__m512; 2] {
        unsafe {
            let four = _mm_cvtsi64_si128(sixteen_bits(p, stride, count) as i64);
            let x = _mm512_castps128_ps512(_mm_cvtph_ps(four));
            let first = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
            let second = _mm512_add_epi32(first, _mm512_set1_epi32(2));
            [_mm512_permutexvar_ps(first, x), _mm512_permutexvar_ps(second, x)]
        }
    }

    #[inline(always)]
    fn widen_f16(self, bits: u16) -> f32 {
        unsafe { _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(bits)))) }
    }
    #[inline(always)]
    fn scaled_bytes(self, bytes: [u8; 4], factor: f32) -> [f32; 4] {
        unsafe {
            let wide = _mm_cvtepi8_epi32(_mm_cvtsi32_si128(i32::from_le_bytes(bytes)));
            let mut out = [0.0; 4];
            let scaled = _mm_mul_ps(_mm_cvtepi32_ps(wide), _mm_set1_ps(factor));
            _mm_storeu_ps(out.as_mut_ptr(), scaled);
            out
        }
    }
    #[inline(always)]
    fn quads(self, x: [f32; 4], _half: usize) -> __m512 {
        unsafe {
            let x = _mm512_castps128_ps512(_mm_loadu_ps(x.as_ptr()));
            _mm512_permutexvar_ps(quarter(), x)
        }
    }
    #[inline(always)]
    fn octets(self, x: [f32; 4], _half: usize) -> [__m512; 2] {
        unsafe {
            let x = _mm512_castps128_ps512(_mm_loadu_ps(x.as_ptr()));
            let even = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 2, 2, 2, 2, 2, 2, 2, 2);
            let odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
            [_mm512_permutexvar_ps(even, x), _mm512_permutexvar_ps(odd, x)]
        }
    }

    #[inline(always)]
    fn shift_right<const N: u32>(self, a: __m512i) -> __m512i {
        unsafe { _mm512_srli_epi32::<N>(a) }
    }
    #[inline(always)]
    fn shift_left<const N: u32>(self, a: __m512i) -> __m512i {
        unsafe { _mm512_slli_epi32::<N>(a) }
    }
    #[inline(always)]
    fn shift_right_each(self, a: __m512i, counts: __m512i) -> __m512i {
        unsafe { _mm512_srlv_epi32(a, counts) }
    }
    #[inline(always)]
    fn merge(self, a: __m512i, b: __m512i, mask: u32) -> __m512i {
        unsafe { _mm512_ternarylogic_epi32::<0xd8>(a, b, _mm512_set1_epi32(mask as i32)) }
    }
    #[inline(always)]
    unsafe fn join_fifth(self, a: __m512i, p: *const u8, stride: usize, count: usize) -> __m512i {
        unsafe {
            let bits = sixteen_bits(p, stride, count);
            let low = _mm512_and_si512(a, _mm512_set1_epi8(15));
            _mm512_mask_add_epi8(low, bits, low, _mm512_set1_epi8(16))
        }
    }
    #[inline(always)]
    fn field(self, a: __m512i, mask: u32, offset: f32) -> __m512 {
        unsafe {
            let units = _mm512_castps_si512(_mm512_set1_ps(UNITS));
            let placed =
                _mm512_ternarylogic_epi32::<0xea>(a, _mm512_set1_epi32(mask as i32), units);
            _mm512_sub_ps(_mm512_castsi512_ps(placed), _mm512_set1_ps(UNITS + offset))
        }
    }
    #[inline(always)]
    fn low_nibble(self, a: __m512i) -> __m512 {
        unsafe {
            let values = _mm512_setr_ps(
                -8.0, -7.0, -6.0, -5.0, -4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0,
                7.0,
            );
            _mm512_permutexvar_ps(a, values)
        }
    }
    #[inline(always)]
    fn signed_byte(self, a: __m512i, shift: u32) -> __m512 {
        unsafe {
            // (a & mask) ^ flip
            let mask = _mm512_set1_epi32(0xff << shift);
            let flip = _mm512_set1_epi32(flip(shift) as i32);
            let placed = _mm512_ternarylogic_epi32::<0x6a>(a, mask, flip);
            _mm512_sub_ps(_mm512_castsi512_ps(placed), _mm512_set1_ps(flipped(shift)))
        }
    }
}
