//! What the processor can do at most: loops of nothing but multiplications and additions, and of
//! nothing but loads. Benches measure kernels against them.

use super::product::{Product, dispatch_form};
use super::{Simd, dispatch};

/// Rows of accumulators, as in the tile kernels.
const ROWS: usize = 6;
/// Vectors that one pass of the reading loop loads.
const STREAMS: usize = 8;

dispatch_form! {
    /// Runs `passes` passes of independent `c + a * b` on registers; returns how many floating-point
    /// operations that was (two for each pair of numbers) and a number that depends on all of them.
    pub(crate) fn multiply_add(passes: usize) -> (u64, f32) = multiply_add_kernel
}

#[inline(always)]
fn multiply_add_kernel<P: Product>(product: P, passes: usize) -> (u64, f32) {
    match P::S::TILE_VECTORS {
        4 => multiply_add_columns::<P, 4>(product, passes),
        2 => multiply_add_columns::<P, 2>(product, passes),
        _ => multiply_add_columns::<P, 1>(product, passes),
    }
}

#[inline(always)]
fn multiply_add_columns<P: Product, const V: usize>(product: P, passes: usize) -> (u64, f32) {
    let s = product.simd();
    let (a, b) = std::hint::black_box((0.999_f32, 0.001_f32));
    let (a, b) = (s.splat(a), s.splat(b));
    let mut sums = [[b; V]; ROWS];
    for _ in 0..passes {
        for row in &mut sums {
            for sum in row {
                *sum = product.step(a, b, *sum);
            }
        }
    }
    let total = sums.as_flattened().iter().fold(s.splat(0.0), |total, &sum| s.add(total, sum));
    let numbers = ROWS * V * P::S::LANES * P::CELL;
    (2 * numbers as u64 * passes as u64, s.sum(total))
}

dispatch! {
    /// Loads every number once, front to back; returns one that depends on all of them.
    pub(crate) fn read(numbers: &[f32]) -> f32 = read_kernel
}

#[inline(always)]
fn read_kernel<S: Simd>(s: S, numbers: &[f32]) -> f32 {
    let mut sums = [s.splat(0.0); STREAMS];
    let stretches = numbers.chunks_exact(STREAMS * S::LANES);
    let rest: f32 = stretches.remainder().iter().sum();
    for stretch in stretches {
        for (sum, vector) in sums.iter_mut().zip(stretch.chunks_exact(S::LANES)) {
            // SAFETY: the chunk holds LANES numbers.
            *sum = s.add(*sum, unsafe { s.load(vector.as_ptr()) });
        }
    }
    rest + s.sum(sums.iter().fold(s.splat(0.0), |total, &sum| s.add(total, sum)))
}

dispatch! {
    /// x ← ½ x + ½, in place.
    pub(crate) fn update(numbers: &mut [f32]) = update_kernel
}

#[inline(always)]
fn update_kernel<S: Simd>(s: S, numbers: &mut [f32]) {
    let half = s.splat(0.5);
    for block in numbers.chunks_mut(S::LANES) {
        let p = block.as_mut_ptr();
        // SAFETY: the block holds so many numbers.
        unsafe {
            if block.len() == S::LANES {
                s.store(p, s.fma(s.load(p), half, half));
            } else {
                s.store_part(p, s.fma(s.load_part(p, block.len()), half, half), block.len());
            }
        }
    }
}
