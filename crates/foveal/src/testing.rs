//! What benches measure kernels against. Not part of the crate's promises.

use crate::element::DType;
use crate::simd::product::Form;
use crate::simd::{Level, peak};

/// Runs `passes` passes of multiply-adds on registers, as products of factors stored as `dtype` take them; returns how
/// many operations that was, and a number that depends on all of them.
pub fn multiply_add(level: Level, dtype: DType, passes: usize) -> (u64, f32) {
    peak::multiply_add(Form::of(level, [dtype; 2]), passes)
}

/// Loads every number once; returns one that depends on all of them.
pub fn read(level: Level, numbers: &[f32]) -> f32 {
    peak::read(level, numbers)
}

/// Reads and writes every number once.
pub fn update(level: Level, numbers: &mut [f32]) {
    peak::update(level, numbers);
}
