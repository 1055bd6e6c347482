//! The bucketed relative bias of T5 (Raffel et al. 2020, §2.1).
//!
//! ```text
//! s_ij = scale ⟨q_i, k_j⟩ + table[bucket(i − j), h]                  table [buckets, heads]
//! ```
//!
//! Of the buckets of one direction the first half are distances 0, 1, 2, …; the other half grow
//! logarithmically up to `max_distance`, and everything beyond shares the last. A causal bias counts keys
//! behind the query and treats those ahead as distance 0; a bidirectional one gives half of its buckets to
//! keys behind (and the query itself), the upper half to keys ahead.
//!
//! The limits between buckets are whole numbers: the smallest n with n^k ≥ first^k · (max/first)^b for k logarithmic
//! buckets and limit b, compared as integers, where a logarithm in floating point could fall to either side.

use crate::error::{Error, Result};
use std::sync::Arc;

/// The most buckets of a bias.
pub const MAX_BUCKETS: usize = 512;
/// The largest distance that may have a bucket of its own.
pub const MAX_DISTANCE: usize = 1 << 16;

/// A learned bias by distance: a table and how distances fall into its rows. Cheap to clone.
#[derive(Debug, Clone, PartialEq)]
pub struct RelativeBias<'a> {
    table: &'a [f32],
    heads: usize,
    bidirectional: bool,
    /// The smallest distance of each bucket of a direction, ascending from 0.
    limits: Arc<[usize]>,
}

impl<'a> RelativeBias<'a> {
    /// A causal bias of `table`, `[buckets, heads]` row by row: distances of `max_distance` (128 in T5) and
    /// beyond share the last bucket.
    ///
    /// # Errors
    /// [`Error::InvalidParameter`] unless the table holds an even number of 2 to [`MAX_BUCKETS`] rows of
    /// `heads`, and `max_distance` is more than half of the buckets and at most [`MAX_DISTANCE`].
    pub fn causal(table: &'a [f32], heads: usize, max_distance: usize) -> Result<RelativeBias<'a>> {
        RelativeBias::new(table, heads, max_distance, false)
    }

    /// Like [`RelativeBias::causal`], with half of the buckets for keys ahead of the query.
    ///
    /// # Errors
    /// Those of [`RelativeBias::causal`] for one direction's buckets.
    pub fn bidirectional(
        table: &'a [f32],
        heads: usize,
        max_distance: usize,
    ) -> Result<RelativeBias<'a>> {
        RelativeBias::new(table, heads, max_distance, true)
    }

    fn new(
        table: &'a [f32],
        heads: usize,
        max_distance: usize,
        bidirectional: bool,
    ) -> Result<RelativeBias<'a>> {
        let rows = table.len().checked_div(heads).unwrap_or(0);
        let buckets = if bidirectional { rows / 2 } else { rows };
        let whole = heads > 0 && table.len().is_multiple_of(heads);
        let even = rows.is_multiple_of(if bidirectional { 4 } else { 2 });
        if !whole || !even || rows == 0 || rows > MAX_BUCKETS {
            return Err(Error::InvalidParameter {
                what: "relative bias table",
                expected: "an even number of buckets for each direction, 2 to 512 in all, times the query heads",
                got: format!("{} numbers for {heads} heads", table.len()),
            });
        }
        if max_distance <= buckets / 2 || max_distance > MAX_DISTANCE {
            return Err(Error::InvalidParameter {
                what: "relative bias max_distance",
                expected: "more than half of a direction's buckets, at most 65536",
                got: max_distance.to_string(),
            });
        }
        let limits = (0..buckets).map(|bucket| limit(bucket, buckets, max_distance)).collect();
        Ok(RelativeBias { table, heads, bidirectional, limits })
    }

    /// Rows of the table.
    pub fn buckets(&self) -> usize {
        self.table.len() / self.heads
    }

    /// Columns of the table: query heads.
    pub fn heads(&self) -> usize {
        self.heads
    }

    /// The row of the table for a query at position i and a key at j, by `i − j`.
    pub fn bucket(&self, distance: isize) -> usize {
        match (self.bidirectional, distance < 0) {
            (true, true) => self.limits.len() + self.bucket_of(distance.unsigned_abs()),
            (false, true) => 0,
            _ => self.bucket_of(distance.unsigned_abs()),
        }
    }

    fn bucket_of(&self, distance: usize) -> usize {
        self.limits.partition_point(|&limit| limit <= distance) - 1
    }

    /// How many keys from one at `distance` on, going forward, share its bucket.
    pub(crate) fn run(&self, distance: isize) -> usize {
        if distance >= 0 {
            let bucket = self.bucket_of(distance.unsigned_abs());
            distance.unsigned_abs() - self.limits[bucket] + 1
        } else if self.bidirectional {
            let next = self.bucket_of(distance.unsigned_abs()) + 1;
            self.limits.get(next).map_or(usize::MAX, |limit| limit - distance.unsigned_abs())
        } else {
            usize::MAX
        }
    }

    /// Adds the biases of keys from one at `distance` on, going forward, to `out`.
    pub(crate) fn add(&self, head: usize, mut distance: isize, mut out: &mut [f32]) {
        while !out.is_empty() {
            let n = self.run(distance).min(out.len());
            let (same, rest) = out.split_at_mut(n);
            let bias = self.table[self.bucket(distance) * self.heads + head];
            same.iter_mut().for_each(|x| *x += bias);
            (distance, out) = (distance - n as isize, rest);
        }
    }
}

/// The smallest distance of a bucket: the bucket's number in the first half, then the smallest n with
/// n ≥ first · (max / first)^(b / logarithmic).
fn limit(bucket: usize, buckets: usize, max: usize) -> usize {
    let first = buckets / 2;
    let (Some(b), logarithmic) = (bucket.checked_sub(first), buckets - first) else {
        return bucket;
    };
    let ratio = max as f64 / first as f64;
    let estimate = first as f64 * ratio.powf(b as f64 / logarithmic as f64);
    let nearest = estimate.round();
    let close = (estimate - nearest).abs() <= 1e-9 * estimate;
    let n = if close { nearest as usize } else { estimate.ceil() as usize };
    if close && !reaches((n, first, max), b, logarithmic) { n + 1 } else { n }
}

/// Whether distance^k · first^b ≥ first^k · max^b, exactly.
fn reaches((distance, first, max): (usize, usize, usize), b: usize, k: usize) -> bool {
    let left = product(&[(distance, k), (first, b)]);
    let right = product(&[(first, k), (max, b)]);
    let longer = left.len().cmp(&right.len());
    longer.then_with(|| left.iter().rev().cmp(right.iter().rev())).is_ge()
}

/// The product of powers as digits of base 2³², the lowest first, without leading zeros.
fn product(powers: &[(usize, usize)]) -> Vec<u32> {
    let mut digits = vec![1u32];
    for &(base, exponent) in powers {
        for _ in 0..exponent {
            let mut carry = 0u64;
            for digit in &mut digits {
                let next = u64::from(*digit) * base as u64 + carry;
                *digit = next as u32;
                carry = next >> 32;
            }
            if carry > 0 {
                digits.push(carry as u32);
            }
        }
    }
    digits
}

#[cfg(test)]
mod tests {
    use super::RelativeBias;

    #[test]
    fn limits_between_buckets_are_exact() {
        let table = [0.0; 32];
        let causal = RelativeBias::causal(&table, 1, 128).unwrap();
        // 16 · ln(n / 16) / ln 8 is whole at n = 16, 32, 64, 128, wherever 8^(b/16) is.
        for (n, bucket) in [(0, 0), (15, 15), (16, 16), (31, 21), (32, 21), (64, 26), (127, 31)] {
            assert_eq!(causal.bucket(n), bucket, "{n}");
        }
        assert_eq!((causal.bucket(-5), causal.bucket(1000)), (0, 31));
        let both = RelativeBias::bidirectional(&table, 1, 128).unwrap();
        // 8 · ln(n / 8) / ln 16 is whole at n = 8, 16, 32, 64.
        for (n, bucket) in [(7, 7), (8, 8), (15, 9), (16, 10), (31, 11), (32, 12), (64, 14)] {
            assert_eq!((both.bucket(n), both.bucket(-n)), (bucket, bucket + 16), "{n}");
        }
        assert_eq!((both.bucket(0), both.bucket(1 << 40)), (0, 15));
    }

    #[test]
    fn runs_say_the_same_as_buckets() {
        let table: Vec<f32> = (0..40).map(|x| x as f32).collect();
        for bias in [
            RelativeBias::causal(&table, 2, 50).unwrap(),
            RelativeBias::bidirectional(&table, 2, 50).unwrap(),
            RelativeBias::bidirectional(&table[..16], 2, 3).unwrap(),
        ] {
            for first in -70..70 {
                let mut out = [0.0; 130];
                bias.add(1, first, &mut out);
                for (n, x) in out.into_iter().enumerate() {
                    let expected = table[bias.bucket(first - n as isize) * 2 + 1];
                    assert_eq!(x, expected, "{first} {n}");
                }
            }
        }
    }

    #[test]
    fn tables_that_do_not_fit_are_refused() {
        let table = [0.0; 36];
        for heads in [0, 4, 5, 12, 36] {
            assert!(RelativeBias::causal(&table, heads, 128).is_err(), "{heads}");
        }
        assert!(RelativeBias::bidirectional(&table, 2, 128).is_err());
        assert!(RelativeBias::causal(&table, 6, 3).is_err());
        assert!(RelativeBias::causal(&table, 6, 4).is_ok());
        assert!(RelativeBias::causal(&table, 6, usize::MAX).is_err());
    }
}
