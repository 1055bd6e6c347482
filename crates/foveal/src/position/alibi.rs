//! Attention with linear biases (Press et al. 2022, arXiv:2108.12409).
//!
//! ```text
//! s_ij = scale ⟨q_i, k_j⟩ − m_h |i − j|        m_h = 2^(−8 h / H), h = 1…H, for H a power of two
//! ```
//!
//! For other head counts the paper's code takes the slopes of the largest power of two P below H, then
//! every other slope of 2 P. Under a causal mask |i − j| is i − j; where keys lie ahead they are as
//! distant as those behind.

/// How fast the score of a key falls with its distance, for each query head.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
#[non_exhaustive]
pub enum Slopes<'a> {
    /// Those of the paper.
    #[default]
    Standard,
    /// One for each query head.
    Given(&'a [f32]),
}

impl Slopes<'_> {
    /// The slope of one of `heads` query heads.
    ///
    /// # Panics
    /// If there is no such head, or no slope for it.
    pub fn of(&self, head: usize, heads: usize) -> f32 {
        assert!(head < heads, "head {head} of {heads}");
        match self {
            Slopes::Standard => standard(head, heads),
            Slopes::Given(slopes) => slopes[head],
        }
    }
}

fn standard(head: usize, heads: usize) -> f32 {
    let power = 1 << heads.ilog2();
    let exponent = match head.checked_sub(power) {
        None => (head + 1) as f64 / power as f64,
        Some(beyond) => (2 * beyond + 1) as f64 / (2 * power) as f64,
    };
    (-8.0 * exponent).exp2() as f32
}

#[cfg(test)]
mod tests {
    use super::Slopes;

    #[test]
    fn slopes_are_those_of_the_paper() {
        let slopes = |heads| (0..heads).map(move |head| Slopes::Standard.of(head, heads));
        assert!(slopes(8).eq((1..=8).map(|n| 0.5f32.powi(n))));
        assert_eq!(slopes(1).collect::<Vec<_>>(), [1.0 / 256.0]);
        let twelve: Vec<_> = slopes(12).collect();
        assert_eq!(twelve[..8], slopes(8).collect::<Vec<_>>());
        for (got, exponent) in twelve[8..].iter().zip([0.5f32, 1.5, 2.5, 3.5]) {
            assert!((got - (-exponent).exp2()).abs() < 1e-7);
        }
    }
}
