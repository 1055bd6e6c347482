//! Packed weights against inputs that were rounded to 8-bit integers, the dot products exact in 32-bit integers.
//!
//! ```text
//! x_k ≈ dx · z_k,  z_k = round(x_k / dx),  dx = max |x| / 127 of 32 neighbours
//! Σ_k w_k x_k ≈ Σ_chunk Σ_p  scale_p · dx_p · Σ_c q_(2c+p) z_(2c+p)  +  (minimum_p − centre · scale_p) · dx_p Σ_c z_(2c+p)
//! ```
//!
//! with unsigned q here, as `vpdpbusd` (AVX-512 VNNI) takes them: four products of bytes for each lane and step. What
//! this costs is the rounding of inputs, at most dx / 2 each.

use super::RowCall;
use super::blocks::{Chunk, Packed};
use super::row::{Dots, Inputs, run_rows};
use crate::simd::Simd;
use crate::simd::product::dispatch_pairs;
use crate::simd::words::ByteProduct;

dispatch_pairs! {
    pub(super) fn run<B: Packed>(format: B, call: RowCall<'_>) = run_kernel
}

#[inline(always)]
fn run_kernel<P: ByteProduct, B: Packed>(product: P, format: B, call: RowCall<'_>) {
    run_rows(Integers(product, format), &call);
}

/// A format whose inputs are integers.
#[derive(Clone, Copy)]
struct Integers<P, B>(P, B);

impl<P: ByteProduct, B: Packed> Dots for Integers<P, B> {
    type S = P::S;

    #[inline(always)]
    fn simd(self) -> P::S {
        self.0.simd()
    }

    #[inline(always)]
    fn width(self, in_features: usize) -> usize {
        B::LAYOUT.packed_integers_len(in_features, P::S::LANES)
    }

    #[inline(always)]
    unsafe fn dots<const R: usize>(self, row: *const u8, x: Inputs) -> [<P::S as Simd>::F; R] {
        // SAFETY: the caller's promise is the callee's.
        let [dots] = unsafe { self.several::<1, R>([row], x) };
        dots
    }

    #[inline(always)]
    unsafe fn several<const W: usize, const R: usize>(
        self,
        rows: [*const u8; W],
        x: Inputs,
    ) -> [[<P::S as Simd>::F; R]; W] {
        let (s, lanes) = (self.simd(), P::S::LANES);
        let mut sums = [[[s.splat(0.0); 2]; R]; W];
        let (whole, rest) = (x.in_features / (8 * lanes), x.in_features % (8 * lanes));
        for n in 0..whole {
            // SAFETY: chunk n < whole of every row is all there, and the caller's promise.
            unsafe {
                self.add_chunk(B::chunks(s, rows, (n, lanes / 4)), n, x, &mut sums);
            }
        }
        if rest > 0 {
            // SAFETY: the last chunk has `rest` weights, and the caller's promise.
            unsafe {
                let weights = B::chunks(s, rows, (whole, rest / 32));
                self.add_chunk(weights, whole, x, &mut sums);
            }
        }
        let mut dots = [[s.splat(0.0); R]; W];
        for w in 0..W {
            for r in 0..R {
                dots[w][r] = s.add(sums[w][r][0], sums[w][r][1]);
            }
        }
        dots
    }
}

impl<P: ByteProduct, B: Packed> Integers<P, B> {
    /// # Safety
    /// `x` is valid for reading chunk number `n` of R packed input rows.
    #[inline(always)]
    unsafe fn add_chunk<const W: usize, const R: usize>(
        self,
        weights: [Chunk<P::S>; W],
        n: usize,
        x: Inputs,
        sums: &mut [[[<P::S as Simd>::F; 2]; R]; W],
    ) {
        let (product, s) = (self.0, self.simd());
        let (mask, flip, centre) = B::FIELDS.unsigned();
        let q = |w: usize, p: usize| product.masked(weights[w].words[p], mask, flip);
        let offset =
            |w: usize, p: usize| s.fma(weights[w].scale[p], s.splat(-centre), weights[w].minimum[p]);
        for r in 0..R {
            let first = r * x.stride + n * B::LAYOUT.integer_vectors() * P::S::LANES;
            // SAFETY: a packed chunk has so many vectors, and row r lies r strides further.
            let (z, vector) = (
                |p: usize| unsafe { product.load_bytes(x.data.add(first + p * P::S::LANES)) },
                |k: usize| unsafe { s.load(x.data.add(first + k * P::S::LANES)) },
            );
            let none = product.no_dots();
            if B::LAYOUT.shared() {
                let (even, odd, scale, sum) = (z(0), z(1), vector(2), vector(3));
                for w in 0..W {
                    let dots = product.dot_bytes(none, q(w, 0), even);
                    let dots = product.numbers(product.dot_bytes(dots, q(w, 1), odd));
                    let sums = &mut sums[w][r];
                    sums[0] = s.fma(s.mul(weights[w].scale[0], scale), dots, sums[0]);
                    sums[1] = s.fma(offset(w, 0), sum, sums[1]);
                }
                continue;
            }
            for p in 0..2 {
                let (z, scale, sum) = (z(p), vector(2 + p), vector(4 + p));
                for w in 0..W {
                    let dots = product.numbers(product.dot_bytes(none, q(w, p), z));
                    let to = &mut sums[w][r][p];
                    *to = s.fma(s.mul(weights[w].scale[p], scale), dots, *to);
                    *to = s.fma(offset(w, p), sum, *to);
                }
            }
        }
    }
}
