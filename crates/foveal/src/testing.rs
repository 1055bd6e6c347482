//! What benches measure kernels against. Not part of the crate's promises.

use crate::simd::{Level, peak};

/// Runs `passes` passes of multiply-adds on registers; returns how many operations that was, and a number that
/// depends on all of them.
pub fn multiply_add(level: Level, passes: usize) -> (u64, f32) {
    peak::multiply_add(level, passes)
}

/// Loads every number once; returns one that depends on all of them.
pub fn read(level: Level, numbers: &[f32]) -> f32 {
    peak::read(level, numbers)
}
