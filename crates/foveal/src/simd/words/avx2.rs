//! Words in 256-bit registers.

use super::{UNITS, Words};
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
            let [low, high] = std::array::from_fn(|i| match i < count {
                true => _mm_loadu_si128(p.add(i * stride).cast()),
                false => _mm_setzero_si128(),
            });
            _mm256_set_m128i(high, low)
        }
    }
    #[inline(always)]
    unsafe fn load_quads(self, p: *const u8, stride: usize, count: usize) -> __m256i {
        unsafe {
            let [low, high] = std::array::from_fn(|i| match i < count {
                true => _mm_set1_epi32(p.add(i * stride).cast::<i32>().read_unaligned()),
                false => _mm_setzero_si128(),
            });
            _mm256_set_m128i(high, low)
        }
    }
    #[inline(always)]
    unsafe fn load_f16_quads(self, p: *const u8, stride: usize, count: usize) -> __m256 {
        unsafe {
            let [low, high] = std::array::from_fn(|i| match i < count {
                true => u32::from(p.add(i * stride).cast::<u16>().read_unaligned()),
                false => 0,
            });
            let pair = low | high << 16;
            let x = _mm_cvtph_ps(_mm_cvtsi32_si128(pair as i32));
            _mm256_set_m128(_mm_shuffle_ps::<0x55>(x, x), _mm_shuffle_ps::<0>(x, x))
        }
    }

    #[inline(always)]
    fn widen_f16(self, bits: u16) -> f32 {
        unsafe { _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(bits)))) }
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
    fn scatter_bits(self, a: __m256i) -> __m256i {
        unsafe {
            let low = _mm256_and_si256(a, _mm256_set1_epi32(15));
            let spread = _mm256_mullo_epi32(low, _mm256_set1_epi32(0x0204_0810));
            _mm256_and_si256(spread, _mm256_set1_epi32(0x1010_1010))
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
}
