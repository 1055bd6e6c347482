//! Angular hashing: vectors that point the same way probably share a bucket.
//!
//! ```text
//! h_r(x) = argmax([x R_r ; −x R_r])        R_r [dim, buckets / 2], standard normal, drawn from a seed
//! ```
//!
//! Scaling x changes nothing. More than 128 buckets are made of two such hashes, h = h′ + n′ · h″, so that a hash
//! costs O(dim · √buckets) multiplications instead of O(dim · buckets). Andoni et al. 2015; Kitaev et al. 2020,
//! section 2, and its released code.

use crate::cpu::{Cpu, Phase};
use crate::element::Element;
use crate::error::{Error, Result};
use crate::projection::{
    Activations, Call, Input, Matrix, MatrixShape, Output, project, workspace_bytes,
};
use crate::random::Random;
use crate::tensor::{Shape, TensorRef};
use crate::workspace::Workspace;

/// Buckets of one hash from which on two are combined.
const ALONE: usize = 128;
/// Rows hashed at a time.
const ROWS: usize = 1024;

/// The bucket of each token, `[batch][head][round][token]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Buckets {
    batch: usize,
    heads: usize,
    rounds: usize,
    tokens: usize,
    data: Vec<u32>,
}

impl Buckets {
    /// Given buckets, row-major, of `[batch, heads, rounds, tokens]`.
    ///
    /// # Errors
    /// [`Error::BufferLength`] unless there is one for each, [`Error::InvalidParameter`] for no rounds.
    pub fn given([batch, heads, rounds, tokens]: [usize; 4], data: Vec<u32>) -> Result<Buckets> {
        check_rounds(rounds)?;
        let axes = [heads, rounds, tokens];
        let expected = axes.iter().try_fold(batch, |n, &axis| n.checked_mul(axis));
        let (expected, got) = (expected.unwrap_or(usize::MAX), data.len());
        if got != expected {
            return Err(Error::BufferLength { what: "buckets", expected, got });
        }
        Ok(Buckets { batch, heads, rounds, tokens, data })
    }

    /// Rounds of hashing.
    pub fn rounds(&self) -> usize {
        self.rounds
    }

    /// The buckets of all tokens of a head in one round.
    ///
    /// # Panics
    /// If there is no such sequence, head or round.
    pub fn of(&self, batch: usize, head: usize, round: usize) -> &[u32] {
        assert!(batch < self.batch && head < self.heads && round < self.rounds);
        let at = (batch * self.heads + head) * self.rounds + round;
        &self.data[at * self.tokens..][..self.tokens]
    }

    /// Sequences and heads.
    pub(super) fn choosers(&self) -> [usize; 2] {
        [self.batch, self.heads]
    }

    pub(super) fn tokens(&self) -> usize {
        self.tokens
    }

    /// Refuses buckets of other tokens than the call's.
    pub(super) fn check(&self, qk: Shape) -> Result<()> {
        let own = Shape { batch: self.batch, seq: self.tokens, heads: self.heads, dim: qk.dim };
        crate::plan::expect("buckets of the queries", qk, own)
    }
}

fn check_rounds(rounds: usize) -> Result<()> {
    if rounds > 0 {
        return Ok(());
    }
    let (what, expected) = ("rounds of hashing", "at least 1");
    Err(Error::InvalidParameter { what, expected, got: rounds.to_string() })
}

/// Seeded random directions for some rounds of hashing.
///
/// ```
/// use foveal::sparse::AngularHash;
/// use foveal::{Cpu, Shape, Tensor};
/// # fn main() -> foveal::Result<()> {
/// let x = Tensor::<f32>::zeros(Shape { batch: 1, seq: 100, heads: 2, dim: 16 })?;
/// let buckets = AngularHash::new(16, 8, 2, 1)?.buckets(x.view(), Cpu::detect()?)?;
/// assert_eq!(buckets.of(0, 1, 1).len(), 100);
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct AngularHash {
    dim: usize,
    /// Buckets of the hashes that are combined; 1 for none.
    factors: [usize; 2],
    rounds: usize,
    /// For each round and factor, `[factor / 2, dim]`.
    directions: Vec<Vec<f32>>,
}

impl AngularHash {
    /// Directions for vectors of `dim` numbers. More than 128 buckets are rounded up to the product of two even
    /// numbers near their root.
    ///
    /// # Errors
    /// [`Error::InvalidParameter`] for an odd number of buckets or none, and for no rounds.
    pub fn new(dim: usize, buckets: usize, rounds: usize, seed: u64) -> Result<AngularHash> {
        check_rounds(rounds)?;
        if buckets == 0 || !buckets.is_multiple_of(2) || buckets > u32::MAX as usize {
            let expected = "an even number: a direction and its opposite are two buckets";
            let (what, got) = ("buckets of a hash", buckets.to_string());
            return Err(Error::InvalidParameter { what, expected, got });
        }
        let factors = if buckets <= ALONE {
            [buckets, 1]
        } else {
            // The power of two at or below the root.
            let first = 1usize << (buckets.ilog2() / 2);
            [first, buckets.div_ceil(first).next_multiple_of(2)]
        };
        let mut random = Random::new(seed);
        let numbers = |factor: usize| if factor == 1 { 0 } else { factor / 2 * dim };
        let directions = (0..2 * rounds)
            .map(|n| (0..numbers(factors[n % 2])).map(|_| random.normal()).collect())
            .collect();
        Ok(AngularHash { dim, factors, rounds, directions })
    }

    /// Rounds of hashing.
    pub fn rounds(&self) -> usize {
        self.rounds
    }

    /// How many buckets there are.
    pub fn buckets_per_round(&self) -> usize {
        self.factors[0] * self.factors[1]
    }

    /// The buckets of vectors `[B, N, H, dim]`. Among equal projections the first counts; a vector with NaN is in
    /// bucket 0. Allocates.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] for vectors of another dim.
    pub fn buckets<E: Element>(&self, x: TensorRef<'_, E>, cpu: Cpu) -> Result<Buckets> {
        let shape = x.shape();
        let expected = Shape { dim: self.dim, ..shape };
        crate::plan::expect("vectors to hash", expected, shape)?;
        let Shape { batch, seq, heads, dim } = shape;
        let mut data = vec![0; batch * heads * self.rounds * seq];
        let mut rows = vec![0.0; ROWS.min(seq) * dim];
        let mut products =
            vec![0.0; ROWS.min(seq) * self.factors.iter().max().map_or(0, |n| n / 2)];
        let mut workspace = Workspace::new();
        for (b, head) in (0..batch).flat_map(|b| (0..heads).map(move |head| (b, head))) {
            for start in (0..seq).step_by(ROWS) {
                let tokens = start..(start + ROWS).min(seq);
                for (t, row) in tokens.clone().zip(rows.chunks_exact_mut(dim.max(1))) {
                    row.iter_mut().zip(x.row(b, t, head)).for_each(|(to, x)| *to = x.to_f32());
                }
                for (n, directions) in self.directions.iter().enumerate() {
                    let (round, which) = (n / 2, n % 2);
                    let half = self.factors[which] / 2;
                    if half == 0 {
                        continue;
                    }
                    let shape = MatrixShape { out_features: half, in_features: dim };
                    let matrix = Matrix::from_floats(shape, directions)?;
                    let call = Call { phase: Phase::Prompt, cpu, activations: Activations::F32 };
                    workspace.reserve(workspace_bytes(&[matrix], tokens.len(), call));
                    let input = Input { data: &rows, rows: tokens.len(), stride: dim };
                    let output = Output { data: &mut products, stride: half };
                    project(&matrix, input, output, call, &mut workspace)?;
                    let step = if which == 0 { 1 } else { self.factors[0] };
                    let at = ((b * heads + head) * self.rounds + round) * seq;
                    let buckets = &mut data[at + tokens.start..at + tokens.end];
                    for (bucket, products) in buckets.iter_mut().zip(products.chunks_exact(half)) {
                        *bucket += (step * argmax(products)) as u32;
                    }
                }
            }
        }
        Buckets::given([batch, heads, self.rounds, seq], data)
    }
}

/// Where `[x ; −x]` is largest.
fn argmax(x: &[f32]) -> usize {
    let mut best = (f32::NEG_INFINITY, 0);
    for (sign, offset) in [(1.0, 0), (-1.0, x.len())] {
        for (n, &x) in x.iter().enumerate() {
            if sign * x > best.0 {
                best = (sign * x, offset + n);
            }
        }
    }
    best.1
}
