//! What a mask lets through, to look at: its picture, its share of pairs, and how far it reaches in several layers.
//!
//! ```text
//! A [N, N] of bits, A_ij = may i see j          share = pairs seen / pairs that a full pattern of the kind sees
//! R_0 = I        R_m = (A_m ∪ I) R_(m−1), and/or    reach: the least m for which R_m holds every pair
//! ```
//!
//! A token reaches what the tokens that it sees have reached a layer before; what it has reached itself, the
//! residual stream keeps. Cost: N³/64 operations a layer.

use crate::error::{Error, Result};
use crate::mask::{Mask, Pattern, Site};

/// The most tokens of a picture: 2 MiB of bits.
pub const MAX_PICTURE: usize = 4096;

/// The pairs that some head of a layer sees, for N queries and N keys.
///
/// ```
/// use foveal::Mask;
/// use foveal::sparse::{Picture, reach};
/// let window = Picture::new(&Mask::window(4), 1, 10)?;
/// assert!(window.is_causal());
/// // Three tokens further back in each layer.
/// assert_eq!(reach(&[window]), Some(3));
/// # Ok::<(), foveal::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Picture {
    tokens: usize,
    words: usize,
    bits: Vec<u64>,
}

impl Picture {
    /// What heads `0..heads` of the first sequence see, together.
    ///
    /// # Errors
    /// [`Error::InvalidParameter`] for more than [`MAX_PICTURE`] tokens.
    pub fn new(mask: &Mask, heads: usize, tokens: usize) -> Result<Picture> {
        if tokens > MAX_PICTURE {
            let (what, expected) = ("tokens of a picture", "at most 4096");
            return Err(Error::InvalidParameter { what, expected, got: tokens.to_string() });
        }
        let mut picture = Picture::empty(tokens);
        for (i, j, q_head) in (0..heads)
            .flat_map(|h| (0..tokens).flat_map(move |i| (0..tokens).map(move |j| (i, j, h))))
        {
            let site = Site { batch: 0, q_head, kv_head: q_head };
            if mask.allows(site, i as isize, j) {
                picture.bits[i * picture.words + j / 64] |= 1 << (j % 64);
            }
        }
        Ok(picture)
    }

    fn empty(tokens: usize) -> Picture {
        let words = tokens.div_ceil(64);
        Picture { tokens, words, bits: vec![0; tokens * words] }
    }

    fn row(&self, i: usize) -> &[u64] {
        &self.bits[i * self.words..][..self.words]
    }

    /// Whether query `i` sees key `j`.
    ///
    /// # Panics
    /// If there is no such token.
    pub fn sees(&self, i: usize, j: usize) -> bool {
        assert!(i < self.tokens && j < self.tokens);
        self.row(i)[j / 64] >> (j % 64) & 1 == 1
    }

    /// Whether no query sees a later key.
    pub fn is_causal(&self) -> bool {
        (0..self.tokens).all(|i| (i + 1..self.tokens).all(|j| !self.sees(i, j)))
    }

    /// Pairs that are seen.
    pub fn pairs(&self) -> usize {
        self.bits.iter().map(|word| word.count_ones() as usize).sum()
    }

    /// Pairs that a causal pattern, or a pattern of both directions, could see.
    pub fn all_pairs(&self) -> usize {
        let n = self.tokens;
        if self.is_causal() { n * (n + 1) / 2 } else { n * n }
    }

    /// What a query costs, on average.
    pub fn keys_per_query(&self) -> f64 {
        self.pairs() as f64 / self.tokens as f64
    }

    /// What every token has reached above `before`.
    fn after(&self, before: &Picture) -> Picture {
        let mut next = before.clone();
        for (i, to) in next.bits.chunks_mut(self.words.max(1)).enumerate() {
            for j in (0..self.tokens).filter(|&j| self.sees(i, j)) {
                to.iter_mut().zip(before.row(j)).for_each(|(to, from)| *to |= from);
            }
        }
        next
    }
}

/// A line for each query: `#` where it sees the key, `.` where it could, a blank after the query of a causal pattern.
impl std::fmt::Display for Picture {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let causal = self.is_causal();
        for i in 0..self.tokens {
            let keys = if causal { i + 1 } else { self.tokens };
            let line: String = (0..keys).map(|j| if self.sees(i, j) { '#' } else { '.' }).collect();
            writeln!(f, "{line}")?;
        }
        Ok(())
    }
}

/// After how many layers every token has reached every other (every earlier one if all pictures are causal), where
/// layers take the pictures in turn from the lowest on; `None` if it never does, and without pictures.
///
/// # Panics
/// If pictures are of different numbers of tokens.
pub fn reach(layers: &[Picture]) -> Option<usize> {
    let tokens = layers.first()?.tokens;
    assert!(layers.iter().all(|layer| layer.tokens == tokens), "pictures of equal sizes");
    let goal = layers.iter().map(Picture::all_pairs).max()?;
    let mut reached = Picture::empty(tokens);
    for i in 0..tokens {
        reached.bits[i * reached.words + i / 64] |= 1 << (i % 64);
    }
    let mut depth = 0;
    while reached.pairs() < goal {
        let before = reached.pairs();
        for layer in layers {
            reached = layer.after(&reached);
            depth += 1;
            if reached.pairs() == goal {
                return Some(depth);
            }
        }
        // What a whole turn of layers does not add, no other will.
        if reached.pairs() == before {
            return None;
        }
    }
    Some(depth)
}
