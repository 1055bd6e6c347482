//! Prompts that were read, so that what another one has in common with them need not be read again.
//!
//! ```text
//! prompt   t₀ … tₙ₋₁        kept: t₀ … tₘ₋₁ with its state        begins with the state of the longest common t₀ … tₗ₋₁, l < n
//! ```

use std::collections::VecDeque;

use crate::mixer::{Demand, Pages};
use crate::model::{Model, State};

/// States after prompts; the last is the one that was used last.
#[derive(Debug)]
pub(super) struct Prefixes {
    kept: VecDeque<(Vec<u32>, State)>,
    most: usize,
}

impl Prefixes {
    /// None yet, and never more than `most`.
    pub(super) fn new(most: usize) -> Prefixes {
        Prefixes { kept: VecDeque::new(), most }
    }

    /// A state of the most tokens of `prompt` that a kept one has read too, leaving one to read. It shares their pages.
    pub(super) fn longest(&mut self, model: &Model, prompt: &[u32]) -> Option<State> {
        let (common, n) = self.candidates(model, prompt).max()?;
        let fork = self.kept[n].1.fork(model, common)?;
        let used = self.kept.remove(n);
        self.kept.extend(used);
        Some(fork)
    }

    /// What each kept prompt has in common with `prompt`, if that can be used, and its place.
    fn candidates<'p>(
        &'p self,
        model: &'p Model,
        prompt: &'p [u32],
    ) -> impl Iterator<Item = (usize, usize)> + 'p {
        let limit = prompt.len().saturating_sub(1);
        self.kept.iter().enumerate().filter_map(move |(n, (kept, state))| {
            let common = common(kept, prompt).min(limit);
            (common > 0 && state.can_fork(model, common)).then_some((common, n))
        })
    }

    /// How many tokens [`Prefixes::longest`] would have of `prompt`.
    pub(super) fn known(&self, model: &Model, prompt: &[u32]) -> usize {
        self.candidates(model, prompt).map(|(common, _)| common).max().unwrap_or(0)
    }

    /// Keeps the state after `prompt`, if it lies in pages.
    pub(super) fn keep(&mut self, model: &Model, prompt: Vec<u32>, state: &State) {
        let Some(fork) = state.fork(model, state.position()) else { return };
        // One that this one begins with is of no more use, unless a window has left its end behind.
        self.kept.retain(|(kept, _)| {
            common(kept, &prompt) < kept.len() || !fork.can_fork(model, kept.len())
        });
        self.kept.push_back((prompt, fork));
        if self.kept.len() > self.most {
            self.kept.pop_front();
        }
    }

    /// Gives up what was not used for longest, until so many pages are free or nothing is left.
    pub(super) fn make_room(&mut self, pages: &Pages, demand: &Demand) {
        while pages.has_free(demand).is_err() && self.kept.pop_front().is_some() {}
    }
}

/// How many tokens both begin with.
pub(super) fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}
