//! What benches measure kernels against, and what pictures are drawn from. Not part of the crate's promises.

pub mod alone;

use crate::element::DType;
use crate::random::Random;
use crate::simd::product::Form;
use crate::simd::{Level, peak};
use crate::tensor::{Shape, Tensor};

/// Standard normal numbers of a seed.
///
/// # Errors
/// [`crate::Error::ShapeOverflow`].
pub fn normal(shape: Shape, seed: u64) -> crate::Result<Tensor<f32>> {
    let mut tensor = Tensor::zeros(shape)?;
    let (mut random, mut view) = (Random::new(seed), tensor.view_mut());
    let Shape { batch, seq, heads, .. } = shape;
    for (b, t) in (0..batch).flat_map(|b| (0..seq).map(move |t| (b, t))) {
        for head in 0..heads {
            view.row_mut(b, t, head).fill_with(|| random.normal());
        }
    }
    Ok(tensor)
}

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
