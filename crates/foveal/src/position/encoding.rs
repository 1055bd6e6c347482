//! The relative positional encoding of Transformer-XL (Dai et al. 2019, arXiv:1901.02860, §3.3).
//!
//! ```text
//! s_ij = scale (⟨q_i + u_h, k_j⟩ + ⟨q_i + v_h, r_h(i − j)⟩)        r [distances, heads, dim], u, v [heads, dim]
//! R_p = [sin(p ω₀) … sin(p ω_n) cos(p ω₀) … cos(p ω_n)], ω_c = 10000^(−2c/features)          r(p) = W R_p
//! ```
//!
//! A query is compared with what a key says and, by a second product, with how far behind the key lies. Distances are
//! those of positions: keys of earlier segments stand before the segment's, and nothing of them changes when the
//! segment moves on, so that cached keys and values stay what they were.
//!
//! A distance beyond the last row of r takes the last row, as `clamp_len` has it; one below 0 takes the first. A longer
//! memory at evaluation needs a longer r, or its clamp. That each query sees the same number of keys (`same_length`)
//! is a [window](crate::Mask::window).

use crate::error::{Error, Result};
use crate::tensor::{Shape, TensorRef};

/// Keys by distance, and what queries are moved by for each of the two products. Cheap to copy.
#[derive(Debug, Clone, Copy)]
pub struct RelativeEncoding<'a> {
    keys: TensorRef<'a, f32>,
    content_bias: &'a [f32],
    position_bias: &'a [f32],
}

impl<'a> RelativeEncoding<'a> {
    /// `keys` is r, `{batch: 1, seq: distances, heads: query heads, dim}` with any strides, whose row `p` is for keys
    /// that lie `p` positions behind the query. `content_bias` is u and `position_bias` v, `[heads, dim]` row by row.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] for keys of more than one sequence, [`Error::InvalidParameter`] for keys of no distance,
    /// [`Error::LengthMismatch`] for biases of other lengths.
    pub fn new(
        keys: TensorRef<'a, f32>,
        content_bias: &'a [f32],
        position_bias: &'a [f32],
    ) -> Result<RelativeEncoding<'a>> {
        let shape = keys.shape();
        if shape.batch != 1 {
            let what = "keys by distance are the same for all sequences";
            let expected = Shape { batch: 1, ..shape };
            return Err(Error::ShapeMismatch { what, expected, got: shape });
        }
        if shape.seq == 0 {
            let (what, expected) = ("distances of a relative encoding", "1 or more");
            return Err(Error::InvalidParameter { what, expected, got: "0".to_owned() });
        }
        let expected = shape.heads * shape.dim;
        for (what, bias) in [
            ("content bias, [heads, dim]", content_bias),
            ("position bias, [heads, dim]", position_bias),
        ] {
            if bias.len() != expected {
                return Err(Error::LengthMismatch { what, expected, got: bias.len() });
            }
        }
        Ok(RelativeEncoding { keys, content_bias, position_bias })
    }

    /// The shape of the keys by distance, `[1, distances, heads, dim]`.
    pub fn shape(&self) -> Shape {
        self.keys.shape()
    }

    /// The row of the keys that a distance takes.
    pub fn row(&self, distance: isize) -> usize {
        distance.clamp(0, self.shape().seq as isize - 1) as usize
    }

    /// The table of sines and cosines `[distances, features]` of which a layer's W makes keys, row by row, for distances
    /// from 0 on. Computed in f64. Allocates.
    ///
    /// # Errors
    /// [`Error::InvalidParameter`] for features that are not even or none, [`Error::ShapeOverflow`].
    pub fn sinusoids(distances: usize, features: usize) -> Result<Vec<f32>> {
        if features == 0 || !features.is_multiple_of(2) {
            let (what, expected) = ("features of a relative encoding", "an even number above 0");
            return Err(Error::InvalidParameter { what, expected, got: features.to_string() });
        }
        let shape = Shape { batch: 1, seq: distances, heads: 1, dim: features };
        let overflow = Error::ShapeOverflow { what: "relative encoding", shape };
        let len = shape.checked_len().filter(|&n| n <= isize::MAX as usize / 4).ok_or(overflow)?;
        let frequency = |c: usize| 10000f64.powf(-2.0 * c as f64 / features as f64);
        let frequencies: Vec<f64> = (0..features / 2).map(frequency).collect();
        let mut table = Vec::with_capacity(len);
        for p in 0..distances {
            let angles = frequencies.iter().map(|frequency| p as f64 * frequency);
            table.extend(angles.clone().map(|angle| angle.sin() as f32));
            table.extend(angles.map(|angle| angle.cos() as f32));
        }
        Ok(table)
    }

    pub(crate) fn keys(&self) -> TensorRef<'a, f32> {
        self.keys
    }

    /// The key of a head for a distance.
    pub(crate) fn key(&self, head: usize, distance: isize) -> &'a [f32] {
        self.keys.row(0, self.row(distance), head)
    }

    /// u and v of a head.
    pub(crate) fn biases(&self, head: usize) -> [&'a [f32]; 2] {
        let dim = self.shape().dim;
        [self.content_bias, self.position_bias].map(|bias| &bias[head * dim..][..dim])
    }
}

#[cfg(test)]
mod tests {
    use super::RelativeEncoding;
    use crate::tensor::{Shape, TensorRef};

    #[test]
    fn sinusoids_are_sines_and_then_cosines() {
        let table = RelativeEncoding::sinusoids(3, 4).unwrap();
        let expected = [0.0, 0.0, 1.0, 1.0, 1f64.sin(), 0.01f64.sin(), 1f64.cos(), 0.01f64.cos()];
        for (x, expected) in table.iter().zip(expected) {
            assert!((f64::from(*x) - expected).abs() < 1e-7, "{x} {expected}");
        }
        assert_eq!(table.len(), 12);
        assert!(RelativeEncoding::sinusoids(0, 2).unwrap().is_empty());
        assert!(RelativeEncoding::sinusoids(2, 3).is_err());
        assert!(RelativeEncoding::sinusoids(2, 0).is_err());
        assert!(RelativeEncoding::sinusoids(usize::MAX, 2).is_err());
    }

    #[test]
    fn numbers_that_do_not_fit_are_refused() {
        let numbers = [0.0; 24];
        let keys = |batch, seq, heads| {
            let shape = Shape { batch, seq, heads, dim: 2 };
            TensorRef::new(&numbers[..batch * seq * heads * 2], shape).unwrap()
        };
        let new = |keys, u: usize, v: usize| {
            RelativeEncoding::new(keys, &numbers[..u], &numbers[..v]).map(|_| ())
        };
        assert!(new(keys(1, 4, 3), 6, 6).is_ok());
        assert!(new(keys(2, 2, 3), 6, 6).is_err());
        assert!(new(keys(1, 0, 3), 6, 6).is_err());
        assert!(new(keys(1, 4, 3), 5, 6).is_err());
        assert!(new(keys(1, 4, 3), 6, 7).is_err());
    }

    #[test]
    fn distances_beyond_the_ends_take_the_ends() {
        let numbers = [0.0; 8];
        let keys = TensorRef::new(&numbers, Shape { batch: 1, seq: 4, heads: 1, dim: 2 }).unwrap();
        let encoding = RelativeEncoding::new(keys, &numbers[..2], &numbers[..2]).unwrap();
        assert_eq!([-9, -1, 0, 3, 4, 99].map(|p| encoding.row(p)), [0, 0, 0, 3, 3, 3]);
    }
}
