//! BigBird: neighbouring blocks, two global blocks, and blocks drawn at random, as a block layout.
//!
//! ```text
//! block row b sees blocks   {b − 1, b, b + 1} ∪ {0, n − 1} ∪ random(head, b)        rows of blocks 0 and n − 1 see all
//! causal (an extension)     the same, keys at or before the query
//! ```
//!
//! The layout is a [`Mask`]: the exact engine computes live blocks alone, forward, backward and over caches. Cost for
//! each query: (5 + r) · block keys. Zaheer et al. 2020, section 2 and appendix D (ITC).

use crate::error::{Error, Result};
use crate::mask::{BlockSize, Blocks, Extent, Mask};
use crate::random::Random;

/// Which random blocks each head's block rows see, `[heads][blocks][random]`. A trained model's plan is part of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockPlan {
    heads: usize,
    blocks: usize,
    random: usize,
    choices: Vec<Option<usize>>,
}

impl BlockPlan {
    /// A given plan, row-major; `None` where a row sees fewer. `heads` of 1 is shared by all heads.
    ///
    /// # Errors
    /// [`Error::BufferLength`] unless there are `heads · blocks · random` choices, [`Error::OutOfRange`] for a block
    /// that does not exist, [`Error::InvalidParameter`] for more random blocks than there are blocks.
    pub fn given(
        [heads, blocks, random]: [usize; 3],
        choices: &[Option<usize>],
    ) -> Result<BlockPlan> {
        check(blocks, random)?;
        let expected = heads.checked_mul(blocks).and_then(|n| n.checked_mul(random));
        let (expected, got) = (expected.unwrap_or(usize::MAX), choices.len());
        if got != expected {
            return Err(Error::BufferLength { what: "random blocks of a plan", expected, got });
        }
        if let Some(&got) = choices.iter().flatten().find(|&&block| block >= blocks) {
            return Err(Error::OutOfRange { what: "random block of a plan", got, limit: blocks });
        }
        Ok(BlockPlan { heads, blocks, random, choices: choices.to_vec() })
    }

    /// A plan drawn as the released code draws it, from a generator of our own (the code uses NumPy's global one, so
    /// that no seed gives the same draws).
    ///
    /// What the code does, which is not what the paper says: with more than 2r + 5 blocks, all rows draw from the
    /// first 2r + 5 blocks; with more than r + 5, r/2 (rounded down) are drawn from the first r + 5 blocks and the
    /// others from the rest. Never drawn are the row's own block and its neighbours, the first block, the last of
    /// the range that is drawn from, for row 1 the range's last but one, and for the range's last but one row
    /// block 1. A row for which too few are left sees fewer. The first and the last block row draw none.
    ///
    /// # Errors
    /// [`Error::InvalidParameter`] for more random blocks than there are blocks.
    pub fn published([heads, blocks, random]: [usize; 3], seed: u64) -> Result<BlockPlan> {
        check(blocks, random)?;
        // Ends of ranges, and how many blocks each row draws from each.
        let plan = if 2 * random + 5 < blocks {
            [(2 * random + 5, random), (blocks, 0)]
        } else if random + 5 < blocks {
            [(random + 5, random / 2), (blocks, random - random / 2)]
        } else {
            [(blocks, random), (blocks, 0)]
        };
        let mut random_numbers = Random::new(seed);
        let mut choices = vec![None; heads * blocks * random];
        for head in 0..heads {
            for row in 1..blocks.saturating_sub(1) {
                let own = &mut choices[(head * blocks + row) * random..][..random];
                let (mut start, mut place) = (0, 0);
                for (end, count) in plan {
                    let mut left = legal(row, start, end);
                    for slot in &mut own[place..place + count] {
                        if !left.is_empty() {
                            *slot = Some(left.swap_remove(random_numbers.below(left.len())));
                        }
                    }
                    place += count;
                    start = end;
                }
            }
        }
        Ok(BlockPlan { heads, blocks, random, choices })
    }

    /// Blocks of a sequence.
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// The random blocks of a block row.
    ///
    /// # Panics
    /// If there is no such head or row.
    pub fn choices(&self, head: usize, row: usize) -> &[Option<usize>] {
        assert!(head < self.heads && row < self.blocks);
        &self.choices[(head * self.blocks + row) * self.random..][..self.random]
    }
}

fn check(blocks: usize, random: usize) -> Result<()> {
    if random <= blocks {
        return Ok(());
    }
    let expected = "no more than there are blocks: a row sees a block once";
    Err(Error::InvalidParameter {
        what: "random blocks of a row",
        expected,
        got: random.to_string(),
    })
}

/// The blocks from `start` to `end` that a block row may draw.
fn legal(row: usize, start: usize, end: usize) -> Vec<usize> {
    let second_last = |block: usize| block + 2 == end;
    let allowed = |&block: &usize| {
        let near = block + 1 >= row && block <= row + 1;
        let across = row == 1 && second_last(block) || second_last(row) && block == 1;
        !near && block != 0 && block + 1 != end && !across
    };
    (start..end).filter(allowed).collect()
}

/// BigBird's pattern.
///
/// ```
/// use foveal::sparse::{BigBird, BlockPlan};
/// use foveal::{Attention, Shape, Tensor};
/// # fn main() -> foveal::Result<()> {
/// let x = Tensor::<f32>::zeros(Shape { batch: 1, seq: 200, heads: 2, dim: 16 })?;
/// let pattern = BigBird { block: 16, plan: BlockPlan::published([2, 13, 3], 1)?, causal: false };
/// let attention = Attention::new().mask(pattern.mask()?);
/// assert_eq!(attention.forward(x.view(), x.view(), x.view())?.out.shape(), x.shape());
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BigBird {
    /// Tokens of a block. The last block of a sequence may be shorter.
    pub block: usize,
    /// The random blocks.
    pub plan: BlockPlan,
    /// Whether keys after the query are hidden.
    pub causal: bool,
}

impl BigBird {
    /// The pattern as a mask, for self-attention of up to `block · plan.blocks()` tokens. Allocates a bit for each
    /// pair of blocks and head.
    ///
    /// # Errors
    /// [`Error::InvalidParameter`] for blocks of size 0.
    pub fn mask(&self) -> Result<Mask> {
        let BlockPlan { heads, blocks: n, .. } = self.plan;
        let mut visible = vec![false; heads * n * n];
        for (row, seen) in visible.chunks_mut(n.max(1)).enumerate() {
            let (head, row) = (row / n, row % n);
            if row == 0 || row + 1 == n {
                seen.fill(true);
                continue;
            }
            let random = self.plan.choices(head, row).iter().flatten().copied();
            for block in [0, n - 1, row - 1, row, row + 1].into_iter().chain(random) {
                seen[block] = true;
            }
        }
        let layout = Extent { batch: 1, heads, queries: n, keys: n };
        let size = BlockSize { queries: self.block, keys: self.block };
        let mask = Mask::from(Blocks::new(&visible, layout, size)?);
        Ok(if self.causal { mask.and(Mask::causal()) } else { mask })
    }
}
