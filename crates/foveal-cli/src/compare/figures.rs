//! What was measured of one attention; kept in its folder as `figures.json`.

use serde::{Deserialize, Serialize};

/// How well tokens of some positions are predicted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct AtPositions {
    /// From the first position to the one behind the last.
    pub(crate) from: usize,
    pub(crate) to: usize,
    /// Bytes of their text.
    pub(crate) bytes: usize,
    /// The sum, in bits.
    pub(crate) bits: f64,
}

impl AtPositions {
    pub(crate) fn bits_per_byte(&self) -> f64 {
        self.bits / self.bytes.max(1) as f64
    }
}

/// A text of so many tokens, read and gone on with.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct AtLength {
    pub(crate) tokens: usize,
    /// Tokens a second of reading it, the best of some rounds.
    pub(crate) read: f64,
    /// Tokens a second of making tokens behind it.
    pub(crate) made: f64,
    /// What it leaves behind, as f16 where that is keys and values.
    pub(crate) state_bytes: usize,
}

/// One attention.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Figures {
    pub(crate) name: String,
    /// What it was made with: figures of other settings are made anew.
    pub(crate) settings: String,
    /// Tokens of a sequence of training.
    pub(crate) sequence: usize,
    pub(crate) parameters: usize,
    pub(crate) tokens: u64,
    /// Of training.
    pub(crate) train_tokens_per_second: f64,
    /// Parameters, gradients, moments and activations at their peak; unknown where another process took all steps.
    pub(crate) train_bytes: Option<usize>,
    /// Tokens read, and the loss in nats a token.
    pub(crate) losses: Vec<(f64, f64)>,
    /// By position within texts of at most four sequences.
    pub(crate) quality: Vec<AtPositions>,
    pub(crate) speed: Vec<AtLength>,
}

impl Figures {
    /// Bits per byte of positions of training.
    pub(crate) fn within(&self) -> Option<f64> {
        mean(self.quality.iter().filter(|part| part.from < self.sequence))
    }

    /// The same of positions beyond.
    pub(crate) fn beyond(&self) -> Option<f64> {
        mean(self.quality.iter().filter(|part| part.from >= self.sequence))
    }

    /// Bytes that a text of so many tokens leaves behind: on the line between what was measured, and on through the last two.
    pub(crate) fn state_bytes(&self, tokens: usize) -> f64 {
        let at = |n: usize| (self.speed[n].tokens as f64, self.speed[n].state_bytes as f64);
        let last = self.speed.len().saturating_sub(1);
        if last == 0 {
            return self.speed.first().map_or(0.0, |one| one.state_bytes as f64);
        }
        let upper = self.speed.iter().position(|one| one.tokens >= tokens).unwrap_or(last).max(1);
        let ((x0, y0), (x1, y1)) = (at(upper - 1), at(upper));
        (y0 + (y1 - y0) * (tokens as f64 - x0) / (x1 - x0)).max(0.0)
    }

    /// Bytes that each further token leaves behind.
    pub(crate) fn bytes_per_token(&self) -> f64 {
        let longest = self.speed.last().map_or(0, |one| one.tokens);
        self.state_bytes(longest + 1) - self.state_bytes(longest)
    }
}

fn mean<'a>(parts: impl Iterator<Item = &'a AtPositions>) -> Option<f64> {
    let (bits, bytes) = parts.fold((0.0, 0), |sum, part| (sum.0 + part.bits, sum.1 + part.bytes));
    (bytes > 0).then(|| bits / bytes as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_grow_along_the_line_through_the_longest_texts() {
        let at = |tokens, state_bytes| AtLength { tokens, read: 1.0, made: 1.0, state_bytes };
        let part = |from, to, bits| AtPositions { from, to, bytes: 10, bits };
        let figures = Figures {
            name: "x".into(),
            settings: String::new(),
            sequence: 128,
            parameters: 1,
            tokens: 1,
            train_tokens_per_second: 1.0,
            train_bytes: Some(1),
            losses: vec![],
            quality: vec![part(0, 64, 30.0), part(64, 128, 20.0), part(128, 256, 10.0)],
            speed: vec![at(100, 1000), at(200, 2000), at(400, 4000)],
        };
        assert_eq!(figures.state_bytes(150), 1500.0);
        assert_eq!(figures.state_bytes(1000), 10_000.0);
        assert_eq!(figures.bytes_per_token(), 10.0);
        assert_eq!(figures.within(), Some(2.5));
        assert_eq!(figures.beyond(), Some(1.0));
        assert_eq!(Figures { sequence: 256, ..figures }.beyond(), None);
    }
}
