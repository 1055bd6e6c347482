//! AVX-512 BF16 and VNNI on top of AVX-512: products of pairs of bf16, and of bytes. Everything else is AVX-512's.

use super::pairs::round_kernel;
use super::product::{PairProduct, Product};
use super::tile::Steps;
use super::words::ByteProduct;
use super::{Avx512, Simd};
use crate::element::Element;
use std::arch::x86_64::*;

/// Proof that the processor has AVX-512 BF16 and VNNI, and what AVX-512 stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Avx512Bf16(Avx512);

impl Avx512Bf16 {
    pub(crate) fn detect() -> Option<Avx512Bf16> {
        let found =
            is_x86_feature_detected!("avx512bf16") && is_x86_feature_detected!("avx512vnni");
        Avx512::detect().filter(|_| found).map(Avx512Bf16)
    }

    /// What kernels that do not multiply pairs run with.
    pub(crate) fn avx512(self) -> Avx512 {
        self.0
    }
}

impl Product for Avx512Bf16 {
    type S = Avx512;
    const CELL: usize = 2;

    #[inline(always)]
    fn simd(self) -> Avx512 {
        self.0
    }
    #[inline(always)]
    fn step(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: the token proves the instruction; both types are 64 bytes without invalid values.
        unsafe {
            let cells = |x: __m512| std::mem::transmute::<__m512, __m512bh>(x);
            _mm512_dpbf16_ps(c, cells(a), cells(b))
        }
    }
    #[inline(always)]
    unsafe fn load_cells<E: Element>(self, p: *const E) -> __m512 {
        const { assert!(size_of::<E>() == 2) };
        // SAFETY: 32 elements are 64 readable bytes; the load needs no alignment.
        unsafe { self.0.load(p.cast()) }
    }
    #[inline(always)]
    unsafe fn load_cells_part<E: Element>(self, p: *const E, n: usize) -> __m512 {
        const { assert!(size_of::<E>() == 2) };
        let first = ((1u64 << n) - 1) as __mmask32;
        // SAFETY: the first n elements are readable, and no others are read.
        unsafe { _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(first, p.cast())) }
    }
    #[inline(always)]
    fn weights(self, weights: &mut [f32], steps: Steps) {
        round_kernel(self, weights, steps);
    }
}

/// For each result of [`PairProduct::interleave`]: words `first`, `first` of the second row (32 on), `first + 1` and so on.
static ORDER: [[u16; 32]; 2] = {
    let mut order = [[0; 32]; 2];
    let mut i = 0;
    while i < 64 {
        order[i / 32][i % 32] = (i / 2) as u16 + if i % 2 == 1 { 32 } else { 0 };
        i += 1;
    }
    order
};

impl PairProduct for Avx512Bf16 {
    #[inline(always)]
    fn round(self, low: __m512, high: __m512) -> __m512 {
        // SAFETY: the token proves the instruction; both types are 64 bytes without invalid values.
        unsafe { std::mem::transmute(_mm512_cvtne2ps_pbh(high, low)) }
    }
    #[inline(always)]
    fn interleave(self, a: __m512, b: __m512) -> [__m512; 2] {
        // SAFETY: the token proves the instructions; an order holds 64 bytes.
        unsafe {
            let (a, b) = (_mm512_castps_si512(a), _mm512_castps_si512(b));
            let take = |order: &[u16; 32]| {
                let order = _mm512_loadu_si512(order.as_ptr().cast());
                _mm512_castsi512_ps(_mm512_permutex2var_epi16(a, order, b))
            };
            [take(&ORDER[0]), take(&ORDER[1])]
        }
    }
}

// SAFETY of every block below: the token proves the instructions; pointers are as the trait says.
#[allow(clippy::undocumented_unsafe_blocks)]
impl ByteProduct for Avx512Bf16 {
    #[inline(always)]
    unsafe fn load_bytes(self, p: *const f32) -> __m512i {
        unsafe { _mm512_loadu_si512(p.cast()) }
    }
    #[inline(always)]
    fn masked(self, a: __m512i, mask: u32, flip: u32) -> __m512i {
        unsafe {
            // (a & mask) ^ flip
            let (mask, flip) = (_mm512_set1_epi32(mask as i32), _mm512_set1_epi32(flip as i32));
            _mm512_ternarylogic_epi32::<0x6a>(a, mask, flip)
        }
    }
    #[inline(always)]
    fn no_dots(self) -> __m512i {
        unsafe { _mm512_setzero_si512() }
    }
    #[inline(always)]
    fn dot_bytes(self, sums: __m512i, a: __m512i, b: __m512i) -> __m512i {
        unsafe { _mm512_dpbusd_epi32(sums, a, b) }
    }
    #[inline(always)]
    fn numbers(self, a: __m512i) -> __m512 {
        unsafe { _mm512_cvtepi32_ps(a) }
    }
}
