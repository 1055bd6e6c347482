//! Inputs that are the same in every language: splitmix64 as a counter, as the peers' protocol has it.

use crate::case::{AttentionCase, DType};
use foveal::{Element, Shape, Tensor};
use half::{bf16, f16};

/// Element `n` of the generator with this seed.
pub(crate) fn splitmix(seed: u64, n: usize) -> u64 {
    let step = (n as u64).wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let z = seed.wrapping_add(step);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Element `n` as a number in [-1, 1), exact in `f32`.
pub(crate) fn uniform(seed: u64, n: usize) -> f32 {
    (splitmix(seed, n) >> 40) as f32 / (1 << 23) as f32 - 1.0
}

/// The seed of queries; keys, values and random masks have the next three.
pub(crate) const SEED: u64 = 0;

/// Queries, keys and values of a case, rounded to the type they are stored in and widened again.
#[derive(Debug)]
pub(crate) struct Inputs {
    pub(crate) q: Tensor<f32>,
    pub(crate) k: Tensor<f32>,
    pub(crate) v: Tensor<f32>,
}

impl Inputs {
    pub(crate) fn new(case: &AttentionCase) -> foveal::Result<Inputs> {
        let AttentionCase { batch, seq_q, seq_k, heads, kv_heads, dim, dtype, .. } = *case;
        let q = Shape { batch, seq: seq_q, heads, dim };
        let kv = Shape { batch, seq: seq_k, heads: kv_heads, dim };
        let make = |offset: u64, shape: Shape| {
            let len = shape.checked_len().unwrap_or(usize::MAX);
            let numbers = (0..len).map(|n| round(uniform(SEED + offset, n), dtype)).collect();
            Tensor::from_vec(numbers, shape)
        };
        Ok(Inputs { q: make(0, q)?, k: make(1, kv)?, v: make(2, kv)? })
    }
}

fn round(x: f32, dtype: DType) -> f32 {
    match dtype {
        DType::F32 => x,
        DType::F16 => f16::from_f32(x).to_f32(),
        DType::Bf16 => bf16::from_f32(x).to_f32(),
    }
}

/// A copy stored as `E`.
pub(crate) fn stored<E: Element>(x: &Tensor<f32>) -> foveal::Result<Tensor<E>> {
    Tensor::from_vec(x.as_slice().iter().map(|&x| E::from_f32(x)).collect(), x.shape())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_generator_is_splitmix64() {
        assert_eq!(splitmix(0, 0), 0xe220_a839_7b1d_cdaf);
        assert_eq!(splitmix(0, 2), 0x06c4_5d18_8009_454f);
        assert_eq!(uniform(0, 0), 0xe220a8 as f32 / (1 << 23) as f32 - 1.0);
    }
}
