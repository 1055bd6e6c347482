//! Cases as the protocol has them, with the inputs that are the same in every language.
//!
//! `bench/peers/protocol.py` describes both.

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

/// Who may see whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mask {
    /// Everybody sees every key.
    Full,
    /// Keys up to the query's own position.
    Causal,
    /// The same, given as a matrix.
    CausalMask,
    /// So many keys, the query's own position included.
    Window(usize),
    /// So many of 256 keys, by the generator.
    Random(u64),
}

/// A request for one attention call.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Case {
    /// Always `"case"`.
    #[allow(dead_code)]
    cmd: String,
    /// Sequences.
    pub batch: usize,
    /// Rows of queries.
    pub seq_q: usize,
    /// Rows of keys and values.
    pub seq_k: usize,
    /// Heads of queries.
    pub q_heads: usize,
    /// Heads of keys and values.
    pub kv_heads: usize,
    /// Numbers of a row.
    pub head_dim: usize,
    /// Who may see whom.
    pub mask: Mask,
    /// `f32`, or a type that no peer here is compared in.
    dtype: String,
    /// The threads of this process.
    pub threads: usize,
    /// `forward` or `backward`.
    op: String,
    seed: u64,
    #[allow(dead_code)]
    layout: String,
    /// Input sets that executions go through in turn.
    pub copies: usize,
}

impl Case {
    /// Reads a request.
    ///
    /// # Errors
    /// If it is not one that a peer in Rust can have a part in.
    pub fn read(line: &str) -> Result<Case> {
        let case: Case = serde_json::from_str(line).context("not a case")?;
        ensure!(case.dtype == "f32", "peers in Rust are compared in f32 only");
        ensure!(case.op == "forward", "peers in Rust have no gradients of fused attention");
        let sizes = [case.batch, case.seq_q, case.seq_k, case.kv_heads, case.head_dim, case.copies];
        ensure!(sizes.iter().all(|&n| n > 0), "sizes begin at 1");
        ensure!(case.q_heads.is_multiple_of(case.kv_heads), "heads don't divide into groups");
        let threads = std::env::var("RAYON_NUM_THREADS").unwrap_or_default();
        let fits = threads == case.threads.to_string();
        ensure!(fits, "started for {threads:?} threads, asked for {}", case.threads);
        Ok(case)
    }

    /// `[batch, seq, heads, dim]` of queries, keys and values.
    pub fn shapes(&self) -> [[usize; 4]; 3] {
        let q = [self.batch, self.seq_q, self.q_heads, self.head_dim];
        let kv = [self.batch, self.seq_k, self.kv_heads, self.head_dim];
        [q, kv, kv]
    }

    /// Queries, keys and values, in the order of [`Case::shapes`].
    pub fn inputs(&self) -> [Vec<f32>; 3] {
        let shapes = self.shapes();
        [0, 1, 2].map(|n| {
            let len: usize = shapes[n].iter().product();
            (0..len).map(|i| uniform(self.seed + n as u64, i)).collect()
        })
    }

    /// Whether query `i` may see key `j`.
    pub fn allows(&self, i: usize, j: usize) -> bool {
        // Positions are shifted by the number of queries, so as not to be negative.
        let (position, key) = (i + self.seq_k, j + self.seq_q);
        match self.mask {
            Mask::Full => true,
            Mask::Causal | Mask::CausalMask => key <= position,
            Mask::Window(width) => key <= position && position < key + width,
            Mask::Random(keep) => splitmix(self.seed + 3, i * self.seq_k + j) >> 56 < keep,
        }
    }
}

/// Axes 1 and 2 changed places: `[batch, seq, heads, dim]` from or to `[batch, heads, seq, dim]`.
pub fn swapped(numbers: &[f32], [batch, rows, columns, dim]: [usize; 4]) -> Vec<f32> {
    let mut out = Vec::with_capacity(numbers.len());
    for b in 0..batch {
        for column in 0..columns {
            for row in 0..rows {
                let start = ((b * rows + row) * columns + column) * dim;
                out.extend_from_slice(&numbers[start..start + dim]);
            }
        }
    }
    out
}

fn splitmix(seed: u64, n: usize) -> u64 {
    let step = (n as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let z = seed.wrapping_add(step);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn uniform(seed: u64, n: usize) -> f32 {
    (splitmix(seed, n) >> 40) as f32 / (1 << 23) as f32 - 1.0
}
