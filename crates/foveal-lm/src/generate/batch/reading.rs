//! Prompts in hand: which of them is read on, and what they have in common with those that wait.
//!
//! ```text
//! budget of a step:   CHUNK/2 to those with the fewest tokens left      the rest to the one that came first
//! ```
//!
//! So a short prompt passes a long one within two steps, and the long one goes on at half its speed at least.

use super::Running;
use crate::generate::prefixes::common;
use crate::model::{CHUNK, Model, State};

/// Tokens that are worth waiting for another prompt to read.
pub(super) const WORTH: usize = 32;

/// A text whose prompt is being read.
#[derive(Debug)]
pub(super) struct Reading<'a> {
    pub(super) running: Running<'a>,
    pub(super) prompt: Vec<u32>,
    pub(super) state: State,
}

impl Reading<'_> {
    fn left(&self) -> usize {
        self.prompt.len() - self.state.position()
    }

    /// How many of the first tokens of `prompt` it reads or has read; one is always left to read.
    fn common(&self, prompt: &[u32]) -> usize {
        common(&self.prompt, prompt).min(prompt.len().saturating_sub(1))
    }
}

/// Which prompt is read on with a budget of `left` tokens, and how many of its tokens at most. There is one at least; they
/// are in the order in which they came.
pub(super) fn next(readings: &[Reading<'_>], left: usize) -> (usize, usize) {
    let lengths: Vec<usize> = readings.iter().map(Reading::left).collect();
    choose(&lengths, left)
}

fn choose(lengths: &[usize], left: usize) -> (usize, usize) {
    let shortest = (0..lengths.len()).min_by_key(|&n| lengths[n]).unwrap_or(0);
    match left.checked_sub(CHUNK / 2) {
        Some(spare) if spare > 0 && lengths.len() > 1 => (shortest, spare),
        _ => (0, left),
    }
}

/// How many of the first tokens of `prompt` one of them is about to read, if so many are worth the wait.
pub(super) fn about_to_share(readings: &[Reading<'_>], prompt: &[u32]) -> Option<usize> {
    let common = readings.iter().filter_map(|reading| {
        let common = reading.common(prompt);
        (common > reading.state.position()).then_some(common)
    });
    common.max().filter(|common| *common >= WORTH)
}

/// A state of the most tokens of `prompt`, more than `known`, that one of them has read already.
pub(super) fn share(
    readings: &[Reading<'_>],
    (model, prompt): (&Model, &[u32]),
    known: usize,
) -> Option<State> {
    let common = readings
        .iter()
        .map(|reading| (reading.common(prompt).min(reading.state.position()), &reading.state));
    let useful = common.filter(|(common, state)| *common > known && state.can_fork(model, *common));
    let (common, state) = useful.max_by_key(|(common, _)| *common)?;
    state.fork(model, common)
}

#[cfg(test)]
mod tests {
    use super::{CHUNK, choose};

    #[test]
    fn short_prompts_pass_long_ones_which_get_half_of_each_step() {
        assert_eq!(choose(&[5000], CHUNK), (0, CHUNK));
        assert_eq!(choose(&[5000, 20, 9], CHUNK), (2, CHUNK / 2));
        assert_eq!(choose(&[5000, 20], CHUNK - 9), (1, CHUNK / 2 - 9));
        assert_eq!(choose(&[5000, 20], CHUNK / 2), (0, CHUNK / 2));
        assert_eq!(choose(&[7, 7], CHUNK), (0, CHUNK / 2));
        assert_eq!(choose(&[70, 7], 3), (0, 3));
    }
}
