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
        let (s, lanes) = (self.simd(), P::S::LANES);
        let mut sums = [[s.splat(0.0); 2]; R];
        let (whole, rest) = (x.in_features / (8 * lanes), x.in_features % (8 * lanes));
        for n in 0..whole {
            // SAFETY: chunk n < whole is all there, and the caller's promise.
            unsafe { self.add_chunk(B::chunk(s, row, n, lanes / 4), n, x, &mut sums) };
        }
        if rest > 0 {
            // SAFETY: the last chunk has `rest` weights, and the caller's promise.
            unsafe { self.add_chunk(B::chunk(s, row, whole, rest / 32), whole, x, &mut sums) };
        }
        sums.map(|[even, odd]| s.add(even, odd))
    }
}

impl<P: ByteProduct, B: Packed> Integers<P, B> {
    /// # Safety
    /// `x` is valid for reading chunk number `n` of R packed input rows.
    #[inline(always)]
    unsafe fn add_chunk<const R: usize>(
        self,
        weights: Chunk<P::S>,
        n: usize,
        x: Inputs,
        sums: &mut [[<P::S as Simd>::F; 2]; R],
    ) {
        let (product, s) = (self.0, self.simd());
        let (mask, flip, centre) = B::FIELDS.unsigned();
        let q = weights.words.map(|words| product.masked(words, mask, flip));
        let offset = |p: usize| s.fma(weights.scale[p], s.splat(-centre), weights.minimum[p]);
        for (r, sums) in sums.iter_mut().enumerate() {
            let first = r * x.stride + n * B::LAYOUT.integer_vectors() * P::S::LANES;
            // SAFETY: a packed chunk has so many vectors, and row r lies r strides further.
            let (z, vector) = (
                |p: usize| unsafe { product.load_bytes(x.data.add(first + p * P::S::LANES)) },
                |k: usize| unsafe { s.load(x.data.add(first + k * P::S::LANES)) },
            );
            let none = product.no_dots();
            if B::LAYOUT.shared() {
                let dots = product.dot_bytes(product.dot_bytes(none, q[0], z(0)), q[1], z(1));
                let scale = s.mul(weights.scale[0], vector(2));
                sums[0] = s.fma(scale, product.numbers(dots), sums[0]);
                sums[1] = s.fma(offset(0), vector(3), sums[1]);
            } else {
                for (p, sum) in sums.iter_mut().enumerate() {
                    let dots = product.numbers(product.dot_bytes(none, q[p], z(p)));
                    *sum = s.fma(s.mul(weights.scale[p], vector(2 + p)), dots, *sum);
                    *sum = s.fma(offset(p), vector(4 + p), *sum);
                }
            }
        }
    }
}
