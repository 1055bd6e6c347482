//! How probable tokens are: the logits' own probabilities, before any step of the choice.
//!
//! ```text
//! ln p_t = x_t − m − ln Σ_u e^(x_u − m)        m = max x
//! ```

use super::candidates::{exp, largest};
use crate::Error;

/// How probable a token was, and what might have come instead.
#[derive(Clone, Debug, PartialEq)]
pub struct Logprobs {
    /// ln p of the token that was chosen.
    pub chosen: f32,
    /// The most probable tokens and their ln p, in order.
    pub top: Vec<(u32, f32)>,
}

impl Logprobs {
    /// Those of `token` and of the `top` most probable ones. Sums in f64.
    ///
    /// # Errors
    ///
    /// [`Error::Logit`] when a logit is NaN or +∞, [`Error::NoCandidate`] when none is above −∞, [`Error::Token`] for one
    /// without a logit.
    pub fn new(logits: &[f32], token: u32, top: usize) -> Result<Logprobs, Error> {
        let mut best = Vec::new();
        largest(logits, top.max(1), &mut best)?;
        let most = f64::from(best[0].logit);
        let sum: f64 = logits.iter().map(|&x| exp(f64::from(x) - most)).sum();
        let normal = most + sum.ln();
        let logprob = |logit: f32| (f64::from(logit) - normal) as f32;
        let missing = Error::Token { found: token, vocab: logits.len() };
        let chosen = logits.get(token as usize).copied().ok_or(missing)?;
        let top = best.iter().take(top).map(|best| (best.token, logprob(best.logit)));
        Ok(Logprobs { chosen: logprob(chosen), top: top.collect() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_are_the_logarithms_of_softmax() {
        let logits = [1.0, f32::NEG_INFINITY, 3.0, -2.0, 3.0];
        let sum: f64 = logits.iter().map(|&x| f64::from(x).exp()).sum();
        let expected = |n: usize| (f64::from(logits[n]) - sum.ln()) as f32;
        let found = Logprobs::new(&logits, 3, 3).unwrap();
        assert!((found.chosen - expected(3)).abs() < 1e-6);
        let tokens: Vec<u32> = found.top.iter().map(|(token, _)| *token).collect();
        assert_eq!(tokens, [2, 4, 0]);
        assert!(found.top.iter().all(|&(t, x)| (x - expected(t as usize)).abs() < 1e-6));
        assert_eq!(Logprobs::new(&logits, 1, 0).unwrap().chosen, f32::NEG_INFINITY);
        assert!(Logprobs::new(&logits, 0, 9).unwrap().top.len() == 4);
    }

    #[test]
    fn what_has_no_probability_is_an_error() {
        assert!(matches!(Logprobs::new(&[], 0, 1), Err(Error::NoCandidate)));
        assert!(matches!(Logprobs::new(&[f32::NAN], 0, 1), Err(Error::Logit { .. })));
        assert!(matches!(Logprobs::new(&[1.0], 1, 1), Err(Error::Token { found: 1, vocab: 1 })));
    }
}
