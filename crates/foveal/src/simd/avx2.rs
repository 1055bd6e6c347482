//! AVX2 with FMA and F16C: eight lanes, sixteen registers.

use super::Simd;
use std::arch::x86_64::*;

/// Proof that the processor has AVX2, FMA and F16C.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Avx2(());

impl Avx2 {
    pub(crate) fn detect() -> Option<Avx2> {
        let has = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        has.then_some(Avx2(()))
    }
}

/// Eight ones, then eight zeros: a window into it masks the first `n` lanes.
static PART: [i32; 16] = [-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0];

#[inline(always)]
fn part(n: usize) -> __m256i {
    assert!(n <= 8);
    // SAFETY: 8 - n to 16 - n lies inside the table; AVX2 is proven by the caller's token.
    unsafe { _mm256_loadu_si256(PART.as_ptr().add(8 - n).cast()) }
}

// SAFETY of every block below: the token proves AVX2, FMA and F16C; pointers are as the trait says.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Simd for Avx2 {
    type F = __m256;
    const LANES: usize = 8;
    const TILE_VECTORS: usize = 2;

    #[inline(always)]
    fn splat(self, x: f32) -> __m256 {
        unsafe { _mm256_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> __m256 {
        unsafe { _mm256_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn load_part(self, p: *const f32, n: usize) -> __m256 {
        unsafe { _mm256_maskload_ps(p, part(n)) }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, x: __m256) {
        unsafe { _mm256_storeu_ps(p, x) }
    }
    #[inline(always)]
    unsafe fn store_part(self, p: *mut f32, x: __m256, n: usize) {
        unsafe { _mm256_maskstore_ps(p, part(n), x) }
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const u16) -> __m256 {
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u16) -> __m256 {
        unsafe {
            let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
        }
    }
    #[inline(always)]
    unsafe fn store_f16(self, p: *mut u16, x: __m256) {
        unsafe { _mm_storeu_si128(p.cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x)) }
    }
    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut u16, x: __m256) {
        unsafe {
            let bits = _mm256_castps_si256(x);
            let high = _mm256_srli_epi32::<16>(bits);
            let odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
            let half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
            let rounded = _mm256_srli_epi32::<16>(_mm256_add_epi32(bits, half));
            let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(x, x));
            let quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
            let words = _mm256_blendv_epi8(rounded, quiet, nan);
            let packed = _mm256_packus_epi32(words, words);
            let packed = _mm256_permute4x64_epi64::<0b1000>(packed);
            _mm_storeu_si128(p.cast(), _mm256_castsi256_si128(packed));
        }
    }
    #[inline(always)]
    unsafe fn load_bytes(self, p: *const u8) -> [__m256; 8] {
        unsafe {
            let number = |x| {
                let bits = _mm256_and_si256(x, _mm256_set1_epi32(0x007f_8000));
                _mm256_castsi256_ps(_mm256_or_si256(bits, _mm256_set1_epi32(0x3f80_0000)))
            };
            let mut out = [_mm256_setzero_ps(); 8];
            for half in 0..2 {
                let x = _mm256_loadu_si256(p.add(32 * half).cast());
                out[half] = number(_mm256_slli_epi32::<15>(x));
                out[2 + half] = number(_mm256_slli_epi32::<7>(x));
                out[4 + half] = number(_mm256_srli_epi32::<1>(x));
                out[6 + half] = number(_mm256_srli_epi32::<9>(x));
            }
            out
        }
    }
    #[inline(always)]
    unsafe fn load_halves(self, p: *const u8) -> [__m256; 8] {
        unsafe {
            let x = _mm256_loadu_si256(p.cast());
            let number = |x| {
                let bits = _mm256_and_si256(x, _mm256_set1_epi32(0x0078_0000));
                _mm256_castsi256_ps(_mm256_or_si256(bits, _mm256_set1_epi32(0x3f80_0000)))
            };
            [
                number(_mm256_slli_epi32::<19>(x)),
                number(_mm256_slli_epi32::<3>(x)),
                number(_mm256_slli_epi32::<15>(x)),
                number(_mm256_srli_epi32::<1>(x)),
                number(_mm256_slli_epi32::<11>(x)),
                number(_mm256_srli_epi32::<5>(x)),
                number(_mm256_slli_epi32::<7>(x)),
                number(_mm256_srli_epi32::<9>(x)),
            ]
        }
    }
    #[inline(always)]
    unsafe fn load_i8(self, p: *const i8) -> __m256 {
        unsafe { _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast()))) }
    }
    #[inline(always)]
    unsafe fn load_nibbles(self, p: *const u8) -> (__m256, __m256) {
        unsafe {
            let bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(p.cast()));
            let low = _mm256_and_si256(bytes, _mm256_set1_epi32(15));
            (_mm256_cvtepi32_ps(low), _mm256_cvtepi32_ps(_mm256_srli_epi32::<4>(bytes)))
        }
    }

    #[inline(always)]
    fn prefetch(self, p: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
    }
    #[inline(always)]
    fn add(self, a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_add_ps(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_sub_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_mul_ps(a, b) }
    }
    #[inline(always)]
    fn div(self, a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_div_ps(a, b) }
    }
    #[inline(always)]
    fn sqrt(self, a: __m256) -> __m256 {
        unsafe { _mm256_sqrt_ps(a) }
    }
    #[inline(always)]
    fn fma(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn max(self, a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_max_ps(a, b) }
    }
    #[inline(always)]
    fn min(self, a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_min_ps(a, b) }
    }
    #[inline(always)]
    fn select(self, bits: u32, a: __m256, b: __m256) -> __m256 {
        unsafe {
            let lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
            let set = _mm256_and_si256(_mm256_set1_epi32(bits as i32), lane);
            let mask = _mm256_cmpeq_epi32(set, lane);
            _mm256_blendv_ps(b, a, _mm256_castsi256_ps(mask))
        }
    }
    #[inline(always)]
    fn above(self, a: __m256, b: __m256) -> u32 {
        unsafe { _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_GT_OQ>(a, b)) as u32 }
    }
    #[inline(always)]
    fn scale_exponent(self, p: __m256, t: __m256, x: __m256) -> __m256 {
        unsafe {
            let k = _mm256_slli_epi32::<23>(_mm256_castps_si256(t));
            let scaled = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), k));
            let tiny = _mm256_cmp_ps::<_CMP_LT_OQ>(x, _mm256_set1_ps(-126.0));
            _mm256_andnot_ps(tiny, scaled)
        }
    }

    #[inline(always)]
    fn sum(self, a: __m256) -> f32 {
        unsafe {
            let pairs = _mm256_hadd_ps(a, a);
            let quads = _mm256_hadd_ps(pairs, pairs);
            let total =
                _mm_add_ss(_mm256_castps256_ps128(quads), _mm256_extractf128_ps::<1>(quads));
            _mm_cvtss_f32(total)
        }
    }
    #[inline(always)]
    fn reduce_max(self, a: __m256) -> f32 {
        unsafe {
            let m = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let m = _mm_max_ps(m, _mm_movehl_ps(m, m));
            _mm_cvtss_f32(_mm_max_ss(m, _mm_shuffle_ps::<1>(m, m)))
        }
    }
    #[inline(always)]
    unsafe fn sums(self, a: &[__m256; 16], out: *mut f32) {
        unsafe {
            for half in 0..2 {
                let a = &a[half * 8..half * 8 + 8];
                let low = _mm256_hadd_ps(_mm256_hadd_ps(a[0], a[1]), _mm256_hadd_ps(a[2], a[3]));
                let high = _mm256_hadd_ps(_mm256_hadd_ps(a[4], a[5]), _mm256_hadd_ps(a[6], a[7]));
                let lower = _mm256_permute2f128_ps::<0x20>(low, high);
                let upper = _mm256_permute2f128_ps::<0x31>(low, high);
                _mm256_storeu_ps(out.add(half * 8), _mm256_add_ps(lower, upper));
            }
        }
    }
    #[inline(always)]
    fn transpose(self, a: &mut [__m256; 16]) {
        unsafe {
            let mut b = [_mm256_setzero_ps(); 8];
            for i in 0..4 {
                b[2 * i] = _mm256_unpacklo_ps(a[2 * i], a[2 * i + 1]);
                b[2 * i + 1] = _mm256_unpackhi_ps(a[2 * i], a[2 * i + 1]);
            }
            let mut c = [_mm256_setzero_ps(); 8];
            for i in 0..2 {
                for j in 0..2 {
                    let (x, y) = (b[4 * i + j], b[4 * i + 2 + j]);
                    c[4 * i + 2 * j] = _mm256_shuffle_ps::<0x44>(x, y);
                    c[4 * i + 2 * j + 1] = _mm256_shuffle_ps::<0xee>(x, y);
                }
            }
            for i in 0..4 {
                a[i] = _mm256_permute2f128_ps::<0x20>(c[i], c[i + 4]);
                a[i + 4] = _mm256_permute2f128_ps::<0x31>(c[i], c[i + 4]);
            }
        }
    }
}
