//! How well a model predicts a text: the negative log-likelihood of each token, given those before it.
//!
//! ```text
//! nll_i = −ln softmax(logits_(i−1))[token_i]         i = 1 … n − 1, in nats
//! perplexity = exp(mean nll)        bits per byte = Σ nll / (ln 2 · bytes of these tokens' text)
//! ```
//!
//! Cost: one prefill of the text, and the head for every token. Memory: a number a token, the state, and a few rows of
//! logits.

mod streaming;

use std::ops::{ControlFlow, Range};

use foveal::{Cpu, nn};

use crate::Error;
use crate::model::{CHUNK, Model, Scratch, State, Step};

pub use streaming::Running;

/// The log-likelihoods of a text's tokens, negative, in nats: one for each but the first. Reads on from where `state` is.
/// `watch` is told how many tokens have been read, and may break the reading off.
///
/// # Errors
///
/// [`Error::Interrupted`], [`Error::Kernel`], and those of [`Model::forward`].
pub fn token_nll(
    model: &Model,
    tokens: &[u32],
    state: &mut State,
    watch: &mut dyn FnMut(usize) -> ControlFlow<()>,
) -> Result<Vec<f32>, Error> {
    // Of a call's last token the next one, which the call does not have, is looked up as well.
    model.check(tokens, Step::PROMPT, state.layers().len())?;
    let level = Cpu::detect()?.level;
    let mut scratch = Scratch::new();
    let mut nll = Vec::with_capacity(tokens.len().saturating_sub(1));
    let mut done = 0;
    while done < tokens.len() {
        let room = CHUNK - state.position() % CHUNK;
        let end = (done + room).min(tokens.len());
        model.forward_each(&tokens[done..end], state, &mut scratch, &mut |place, logits| {
            if let Some(&next) = tokens.get(done + place + 1) {
                nn::log_softmax(logits, level);
                nll.push(-logits[next as usize]);
            }
        })?;
        done = end;
        if watch(done).is_break() {
            return Err(Error::Interrupted);
        }
    }
    Ok(nll)
}

/// The tokens of a bucket, and what they cost together.
#[derive(Clone, Debug, PartialEq)]
pub struct Bucket {
    /// Positions in the text.
    pub positions: Range<usize>,
    /// Tokens that were predicted there.
    pub tokens: usize,
    /// The sum of their negative log-likelihoods, in nats.
    pub nll: f64,
}

/// Sums by position: buckets end at powers of two, from 64 on, so that each has as many tokens as all before it.
/// `first` is the position of the first of `nll`.
pub fn by_position(nll: &[f32], first: usize) -> Vec<Bucket> {
    let mut buckets: Vec<Bucket> = Vec::new();
    for (position, &nll) in (first..).zip(nll) {
        let end = (position + 1).next_power_of_two().max(64);
        let start = if end == 64 { 0 } else { end / 2 };
        let bucket = buckets.iter_mut().rfind(|bucket| bucket.positions.start == start);
        match bucket {
            Some(bucket) => {
                bucket.tokens += 1;
                bucket.nll += f64::from(nll);
            }
            None => {
                buckets.push(Bucket { positions: start..end, tokens: 1, nll: f64::from(nll) });
            }
        }
    }
    buckets
}

impl Bucket {
    /// Takes another bucket's tokens in.
    pub fn add(&mut self, other: &Bucket) {
        self.tokens += other.tokens;
        self.nll += other.nll;
    }

    /// The mean, in nats a token.
    pub fn mean(&self) -> f64 {
        self.nll / self.tokens as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_cover_each_position_once() {
        let nll: Vec<f32> = (1..300).map(|n| n as f32).collect();
        let buckets = by_position(&nll, 1);
        let edges: Vec<Range<usize>> = buckets.iter().map(|b| b.positions.clone()).collect();
        assert_eq!(edges, [0..64, 64..128, 128..256, 256..512]);
        let tokens: Vec<usize> = buckets.iter().map(|bucket| bucket.tokens).collect();
        assert_eq!(tokens, [63, 64, 128, 44]);
        assert_eq!(buckets[0].nll, f64::from((1..64).sum::<i32>()));
        assert_eq!(buckets[3].mean(), f64::from((256..300).sum::<i32>()) / 44.0);
        assert!(by_position(&[], 1).is_empty());
    }
}
