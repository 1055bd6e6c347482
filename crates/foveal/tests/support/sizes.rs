//! The extents of a call, random tensors of them, and masks for them.

use super::Random;
use foveal::mask::{Dense, Extent};
use foveal::{Element, Mask, Shape, Tensor};

/// The extents of a call.
#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    pub batch: usize,
    pub queries: usize,
    pub keys: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub dim: usize,
    pub value_dim: usize,
}

impl Sizes {
    pub fn tensors<E: Element>(self, seed: u64) -> (Tensor<E>, Tensor<E>, Tensor<E>) {
        let mut random = Random::new(seed);
        let Sizes { batch, queries, keys, heads, kv_heads, dim, value_dim } = self;
        let q = random.tensor(Shape { batch, seq: queries, heads, dim }, 2.0);
        let k = random.tensor(Shape { batch, seq: keys, heads: kv_heads, dim }, 2.0);
        let v = random.tensor(Shape { batch, seq: keys, heads: kv_heads, dim: value_dim }, 1.0);
        (q, k, v)
    }
}

pub fn random_mask(sizes: Sizes, seed: u64) -> Mask {
    let mut random = Random::new(seed);
    let Sizes { batch, queries, keys, heads, .. } = sizes;
    let extent = Extent { batch, heads, queries, keys };
    // A third of the rows sees nothing, a third half, a third nearly everything.
    let visible: Vec<bool> = (0..batch * heads * queries)
        .flat_map(|row| {
            let mut bits: Vec<bool> = (0..keys).map(|_| random.below(8) > row % 3 * 4).collect();
            if row % 3 == 1 {
                bits.fill(false);
            }
            bits
        })
        .collect();
    Dense::new(&visible, extent).unwrap().into()
}

/// One of each kind.
pub fn masks(sizes: Sizes) -> Vec<Mask> {
    vec![
        Mask::full(),
        Mask::causal(),
        Mask::window(1),
        Mask::window(3),
        Mask::window(0),
        Mask::band(Some(2), Some(1)),
        Mask::band(None, Some(3)).and(Mask::window(2).or(Mask::band(Some(90), Some(0)))),
        random_mask(sizes, 7),
    ]
}
