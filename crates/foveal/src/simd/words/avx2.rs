//! Words in 256-bit registers.

use super::{UNITS, Words, flip, flipped};
use crate::simd::avx2::Avx2;
use std::arch::x86_64::*;

// SAFETY of every block below: the token proves AVX2, FMA and F16C; pointers are as the trait says.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Words for Avx2 {
    type U = __m256i;

    #[inline(always)]
    unsafe fn load_words(self, p: *const u8) -> __m256i {
        unsafe { _mm256_loadu_si256(p.cast()) }
    }
    #[inline(always)]
    unsafe fn load_repeated(self, p: *const u8) -> __m256i {
        unsafe { _mm256_loadu_si256(p.cast()) }
    }
    #[inline(always)]
    unsafe fn load_pieces(self, p: *const u8, stride: usize, count: usize) -> __m256i {
        unsafe {
            let piece = |i: usize| match i < count {
                true => _mm_loadu_si128(p.add(i * stride).cast()),
                false => _mm_setzero_si128(),
            };
            _mm256_set_m128i(piece(1), piece(0))
        }
    }
    #[inline(always)]
    unsafe fn load_large_pieces(self, p: *const u8, _stride: usize, count: usize) -> __m256i {
        unsafe { if count > 0 { _mm256_loadu_si256(p.cast()) } else { _mm256_setzero_si256() } }
    }
    #[inline(always)]
    unsafe fn load_f16_quads(self, p: *const u8, stride: usize, count: usize) -> __m256 {
        unsafe {
            let half = |i: usize| match i < count {
                true => u32::from(p.add(i * stride).cast::<u16>().read_unaligned()),
                false => 0,
            };
            let pair = half(0) | half(1) << 16;
            let x = _mm_cvtph_ps(_mm_cvtsi32_si128(pair as i32));
            _mm256_set_m128(_mm_shuffle_ps::<0x55>(x, x), _mm_shuffle_ps::<0>(x, x))
        }
    }
    #[inline(always)]
    unsafe fn load_f16_octets(self, p: *const u8, stride: usize, count: usize) -> [__m256; 2] {
        unsafe {
            let octet = |i: usize| match i < count {
                true => {
                    let half = p.add(i * stride).cast::<i16>().read_unaligned();
                    _mm256_cvtph_ps(_mm_set1_epi16(half))
                }
                false => _mm256_setzero_ps(),
            };
            [octet(0), octet(1)]
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
    fn quads(self, x: [f32; 4], half: usize) -> __m256 {
        unsafe { _mm256_set_m128(_mm_set1_ps(x[2 * half + 1]), _mm_set1_ps(x[2 * half])) }
    }
    #[inline(always)]
    fn octets(self, x: [f32; 4], half: usize) -> [__m256; 2] {
        unsafe { [_mm256_set1_ps(x[2 * half]), _mm256_set1_ps(x[2 * half + 1])] }
    }

    #[inline(always)]
    fn shift_right<const N: u32>(self, a: __m256i) -> __m256i {
        unsafe { _mm256_srl_epi32(a, _mm_cvtsi32_si128(N as i32)) }
    }
    #[inline(always)]
    fn shift_left<const N: u32>(self, a: __m256i) -> __m256i {
        unsafe { _mm256_sll_epi32(a, _mm_cvtsi32_si128(N as i32)) }
    }
    #[inline(always)]
    fn shift_right_each(self, a: __m256i, counts: __m256i) -> __m256i {
        unsafe { _mm256_srlv_epi32(a, counts) }
    }
    #[inline(always)]
    fn merge(self, a: __m256i, b: __m256i, mask: u32) -> __m256i {
        unsafe {
            let mask = _mm256_set1_epi32(mask as i32);
            _mm256_or_si256(_mm256_andnot_si256(mask, a), _mm256_and_si256(mask, b))
        }
    }
    #[inline(always)]
    unsafe fn join_fifth(self, a: __m256i, p: *const u8, stride: usize, count: usize) -> __m256i {
        unsafe {
            let bits = |i: usize| match i < count {
                true => _mm_set1_epi16(p.add(i * stride).cast::<i16>().read_unaligned()),
                false => _mm_setzero_si128(),
            };
            let byte = _mm256_broadcastsi128_si256(_mm_set_epi64x(0x0101_0101_0101_0101, 0));
            let bytes = _mm256_shuffle_epi8(_mm256_set_m128i(bits(1), bits(0)), byte);
            let bit = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64 as i64);
            let set = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bit), bit);
            let fifth = _mm256_and_si256(set, _mm256_set1_epi8(16));
            _mm256_or_si256(_mm256_and_si256(a, _mm256_set1_epi8(15)), fifth)
        }
    }
    #[inline(always)]
    fn field(self, a: __m256i, mask: u32, offset: f32) -> __m256 {
        unsafe {
            let masked = _mm256_and_si256(a, _mm256_set1_epi32(mask as i32));
            let units = _mm256_or_ps(_mm256_castsi256_ps(masked), _mm256_set1_ps(UNITS));
            _mm256_sub_ps(units, _mm256_set1_ps(UNITS + offset))
        }
    }
    #[inline(always)]
    fn signed_byte(self, a: __m256i, shift: u32) -> __m256 {
        unsafe {
            let masked = _mm256_and_si256(a, _mm256_set1_epi32(0xff << shift));
            let placed = _mm256_xor_si256(masked, _mm256_set1_epi32(flip(shift) as i32));
            _mm256_sub_ps(_mm256_castsi256_ps(placed), _mm256_set1_ps(flipped(shift)))
        }
    }
}
