//! AVX-512 F, BW, DQ and VL: sixteen lanes, thirty-two registers, lane masks.

use super::Simd;
use std::arch::x86_64::*;

/// Proof that the processor has AVX-512 F, BW, DQ, VL, and what AVX2 stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Avx512(());

impl Avx512 {
    pub(crate) fn detect() -> Option<Avx512> {
        let has = super::Avx2::detect().is_some()
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl");
        has.then_some(Avx512(()))
    }
}

#[inline(always)]
fn first(n: usize) -> __mmask16 {
    ((1u32 << n) - 1) as __mmask16
}

// SAFETY of every block below: the token proves the instructions; pointers are as the trait says.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Simd for Avx512 {
    type F = __m512;
    const LANES: usize = 16;
    const TILE_VECTORS: usize = 4;

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> __m512 {
        unsafe { _mm512_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn load_part(self, p: *const f32, n: usize) -> __m512 {
        unsafe { _mm512_maskz_loadu_ps(first(n), p) }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, x: __m512) {
        unsafe { _mm512_storeu_ps(p, x) }
    }
    #[inline(always)]
    unsafe fn store_part(self, p: *mut f32, x: __m512, n: usize) {
        unsafe { _mm512_mask_storeu_ps(p, first(n), x) }
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const u16) -> __m512 {
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u16) -> __m512 {
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        }
    }
    #[inline(always)]
    unsafe fn store_f16(self, p: *mut u16, x: __m512) {
        unsafe { _mm256_storeu_si256(p.cast(), _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x)) }
    }
    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut u16, x: __m512) {
        unsafe {
            let bits = _mm512_castps_si512(x);
            let high = _mm512_srli_epi32::<16>(bits);
            let odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
            let half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
            let rounded = _mm512_srli_epi32::<16>(_mm512_add_epi32(bits, half));
            let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x);
            let quiet = _mm512_mask_or_epi32(rounded, nan, high, _mm512_set1_epi32(0x40));
            _mm256_storeu_si256(p.cast(), _mm512_cvtepi32_epi16(quiet));
        }
    }
    #[inline(always)]
    unsafe fn load_bytes(self, p: *const u8) -> [__m512; 8] {
        unsafe {
            let x = _mm512_loadu_si512(p.cast());
            let number = |x| {
                let bits = _mm512_and_si512(x, _mm512_set1_epi32(0x007f_8000));
                _mm512_castsi512_ps(_mm512_or_si512(bits, _mm512_set1_epi32(0x3f80_0000)))
            };
            let mut out = [_mm512_setzero_ps(); 8];
            out[0] = number(_mm512_slli_epi32::<15>(x));
            out[1] = number(_mm512_slli_epi32::<7>(x));
            out[2] = number(_mm512_srli_epi32::<1>(x));
            out[3] = number(_mm512_srli_epi32::<9>(x));
            out
        }
    }
    #[inline(always)]
    unsafe fn load_halves(self, p: *const u8) -> [__m512; 8] {
        unsafe {
            let x = _mm512_broadcast_i32x8(_mm256_loadu_si256(p.cast()));
            let upper = _mm512_set_epi32(3, 3, 3, 3, 3, 3, 3, 3, 19, 19, 19, 19, 19, 19, 19, 19);
            let number = |x| {
                let bits = _mm512_and_si512(x, _mm512_set1_epi32(0x0078_0000));
                _mm512_castsi512_ps(_mm512_or_si512(bits, _mm512_set1_epi32(0x3f80_0000)))
            };
            // Rotations bring bits 4 k, and in the upper lanes 16 + 4 k, to bit 19.
            let x = _mm512_rolv_epi32(x, upper);
            let mut out = [_mm512_setzero_ps(); 8];
            out[0] = number(x);
            out[1] = number(_mm512_ror_epi32::<4>(x));
            out[2] = number(_mm512_ror_epi32::<8>(x));
            out[3] = number(_mm512_ror_epi32::<12>(x));
            out
        }
    }
    #[inline(always)]
    unsafe fn load_i8(self, p: *const i8) -> __m512 {
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast()))) }
    }
    #[inline(always)]
    unsafe fn load_nibbles(self, p: *const u8) -> (__m512, __m512) {
        unsafe {
            let bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast()));
            let low = _mm512_and_si512(bytes, _mm512_set1_epi32(15));
            (_mm512_cvtepi32_ps(low), _mm512_cvtepi32_ps(_mm512_srli_epi32::<4>(bytes)))
        }
    }

    #[inline(always)]
    fn prefetch(self, p: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
    }
    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_div_ps(a, b) }
    }
    #[inline(always)]
    fn sqrt(self, a: __m512) -> __m512 {
        unsafe { _mm512_sqrt_ps(a) }
    }
    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_max_ps(a, b) }
    }
    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_min_ps(a, b) }
    }
    #[inline(always)]
    fn select(self, bits: u32, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_mask_mov_ps(b, bits as __mmask16, a) }
    }
    #[inline(always)]
    fn above(self, a: __m512, b: __m512) -> u32 {
        unsafe { u32::from(_mm512_cmp_ps_mask::<_CMP_GT_OQ>(a, b)) }
    }
    #[inline(always)]
    fn scale_exponent(self, p: __m512, t: __m512, x: __m512) -> __m512 {
        unsafe {
            let k = _mm512_slli_epi32::<23>(_mm512_castps_si512(t));
            let keep = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x, _mm512_set1_ps(-126.0));
            _mm512_castsi512_ps(_mm512_maskz_add_epi32(keep, _mm512_castps_si512(p), k))
        }
    }

    #[inline(always)]
    fn sum(self, a: __m512) -> f32 {
        unsafe {
            let a = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps::<1>(a));
            let a = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let a = _mm_add_ps(a, _mm_movehl_ps(a, a));
            _mm_cvtss_f32(_mm_add_ss(a, _mm_shuffle_ps::<1>(a, a)))
        }
    }
    #[inline(always)]
    fn reduce_max(self, a: __m512) -> f32 {
        unsafe {
            let m = _mm256_max_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps::<1>(a));
            let m = _mm_max_ps(_mm256_castps256_ps128(m), _mm256_extractf128_ps::<1>(m));
            let m = _mm_max_ps(m, _mm_movehl_ps(m, m));
            _mm_cvtss_f32(_mm_max_ss(m, _mm_shuffle_ps::<1>(m, m)))
        }
    }
    #[inline(always)]
    unsafe fn sums(self, a: &[__m512; 16], out: *mut f32) {
        // A tree of additions over ever smaller parts, two vectors at a time: every lane of the
        // result went through the same order of additions.
        unsafe {
            let mut b = [_mm512_setzero_ps(); 8];
            for i in 0..8 {
                let low = _mm512_shuffle_f32x4::<0x44>(a[i], a[i + 8]);
                let high = _mm512_shuffle_f32x4::<0xee>(a[i], a[i + 8]);
                b[i] = _mm512_add_ps(low, high);
            }
            let mut c = [_mm512_setzero_ps(); 4];
            for i in 0..4 {
                let even = _mm512_shuffle_f32x4::<0x88>(b[i], b[i + 4]);
                let odd = _mm512_shuffle_f32x4::<0xdd>(b[i], b[i + 4]);
                c[i] = _mm512_add_ps(even, odd);
            }
            let mut d = [_mm512_setzero_ps(); 2];
            for i in 0..2 {
                let low = _mm512_unpacklo_ps(c[i], c[i + 2]);
                let high = _mm512_unpackhi_ps(c[i], c[i + 2]);
                d[i] = _mm512_add_ps(low, high);
            }
            let low = _mm512_unpacklo_ps(d[0], d[1]);
            let high = _mm512_unpackhi_ps(d[0], d[1]);
            let mixed = _mm512_add_ps(low, high);
            _mm512_storeu_ps(out, _mm512_shuffle_f32x4::<0xd8>(mixed, mixed));
        }
    }
    #[inline(always)]
    fn transpose(self, a: &mut [__m512; 16]) {
        unsafe {
            let mut b = [_mm512_setzero_ps(); 16];
            for i in 0..8 {
                b[2 * i] = _mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]);
                b[2 * i + 1] = _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]);
            }
            // c[4 i + k] holds, in 128-bit block m, element 4 m + k of rows 4 i to 4 i + 3.
            let mut c = [_mm512_setzero_ps(); 16];
            for i in 0..4 {
                for j in 0..2 {
                    let (x, y) = (b[4 * i + j], b[4 * i + 2 + j]);
                    c[4 * i + 2 * j] = _mm512_shuffle_ps::<0x44>(x, y);
                    c[4 * i + 2 * j + 1] = _mm512_shuffle_ps::<0xee>(x, y);
                }
            }
            for k in 0..4 {
                let low01 = _mm512_shuffle_f32x4::<0x44>(c[k], c[4 + k]);
                let low23 = _mm512_shuffle_f32x4::<0x44>(c[8 + k], c[12 + k]);
                let high01 = _mm512_shuffle_f32x4::<0xee>(c[k], c[4 + k]);
                let high23 = _mm512_shuffle_f32x4::<0xee>(c[8 + k], c[12 + k]);
                a[k] = _mm512_shuffle_f32x4::<0x88>(low01, low23);
                a[4 + k] = _mm512_shuffle_f32x4::<0xdd>(low01, low23);
                a[8 + k] = _mm512_shuffle_f32x4::<0x88>(high01, high23);
                a[12 + k] = _mm512_shuffle_f32x4::<0xdd>(high01, high23);
            }
        }
    }
}
