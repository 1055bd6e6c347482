//! Batches of pairs, whose sources have one length in every call.
//!
//! ```text
//! epoch    a random order; 64 steps of it at a time are sorted by length, cut into steps, and steps shuffled
//! call     pairs of a step whose sources have one length; targets are filled up at their ends, and ask for nothing there
//! ```
//!
//! The decoder reads the end token and the target, and is to say the target and the end token. What is left of an epoch below
//! a whole step waits for another epoch's order.
//!
//! Vaswani et al. 2017, §5.1: pairs of about the same length together.

use sha2::{Digest, Sha256};

use super::super::random::{Use, numbers, seed};
use super::{Position, Sequences};
use crate::train::{Error, IGNORED};
use foveal::random::Random;

/// Steps that are sorted together.
const SORTED: usize = 64;

/// A source and a target, as tokens.
pub(in crate::train) type Pair = [Vec<u32>; 2];

/// Pairs that give batches.
#[derive(Debug)]
pub(in crate::train) struct PairBatches {
    pairs: Vec<Pair>,
    end: u32,
    /// Pairs of a step.
    step: usize,
    /// What orders follow from; `None` for pairs as they come.
    seed: Option<u64>,
    position: Position,
    epoch: Option<(u64, Vec<u32>)>,
}

impl PairBatches {
    /// Pairs to train on, `step` at a time, in an order that follows from `run`.
    ///
    /// # Errors
    ///
    /// [`Error::TooFewPairs`] for fewer than a step has.
    pub(in crate::train) fn shuffled(
        pairs: Vec<Pair>,
        end: u32,
        (step, run): (usize, u64),
    ) -> Result<PairBatches, Error> {
        if pairs.len() < step {
            return Err(Error::TooFewPairs { found: pairs.len(), expected: step });
        }
        Ok(PairBatches { seed: Some(run), ..PairBatches::in_order(pairs, end, step) })
    }

    /// Pairs to evaluate on.
    pub(in crate::train) fn in_order(pairs: Vec<Pair>, end: u32, step: usize) -> PairBatches {
        PairBatches { pairs, end, step, seed: None, position: Position::default(), epoch: None }
    }

    /// The pairs.
    pub(in crate::train) fn pairs(&self) -> &[Pair] {
        &self.pairs
    }

    /// A number that other pairs do not have.
    pub(super) fn digest(&self) -> String {
        digest(&self.pairs)
    }

    pub(super) fn position(&self) -> &Position {
        &self.position
    }

    pub(super) fn set_position(&mut self, position: Position) -> Result<(), Error> {
        if !position.streams.is_empty() {
            return Err(Error::OtherText);
        }
        self.position = position;
        Ok(())
    }

    pub(super) fn rewind(&mut self) {
        self.position = Position::default();
    }

    /// The calls of the next `count` pairs, of at most `most` each.
    pub(super) fn calls(&mut self, count: usize, most: usize) -> Vec<Sequences> {
        let mut chosen: Vec<usize> = vec![];
        let epoch = self.position.epoch;
        while chosen.len() < count && (self.seed.is_some() || self.position.epoch == epoch) {
            chosen.push(self.next());
        }
        let source = |n: &usize| self.pairs[*n][0].len();
        chosen.sort_by_key(source);
        let alike = chosen.chunk_by(|a, b| source(a) == source(b));
        alike.flat_map(|alike| alike.chunks(most.max(1))).map(|of| self.sequences(of)).collect()
    }

    /// The next pair.
    fn next(&mut self) -> usize {
        let mut order = self.order();
        // Steps may have become larger since the position was written.
        if self.position.sequence >= order.len() {
            self.turn();
            order = self.order();
        }
        let chosen = order.get(self.position.sequence).map_or(0, |&n| n as usize);
        let all = order.len();
        self.epoch = Some((self.position.epoch, order));
        self.position.sequence += 1;
        if self.position.sequence >= all {
            self.turn();
        }
        chosen
    }

    fn turn(&mut self) {
        self.position.sequence = 0;
        self.position.epoch += 1;
    }

    /// The order of this epoch, taken out of its place.
    fn order(&mut self) -> Vec<u32> {
        let epoch = self.position.epoch;
        match (self.epoch.take(), self.seed) {
            (Some((known, order)), _) if known == epoch => order,
            (_, None) => (0..self.pairs.len() as u32).collect(),
            (_, Some(run)) => self.shuffle(numbers(seed(run, Use::Order, [epoch, 0]))),
        }
    }

    fn shuffle(&self, mut random: Random) -> Vec<u32> {
        let mut order = random.permutation(self.pairs.len());
        let lengths = |n: &u32| self.pairs[*n as usize].each_ref().map(Vec::len);
        order.chunks_mut(SORTED * self.step).for_each(|pool| pool.sort_by_key(lengths));
        let steps: Vec<&[u32]> = order.chunks_exact(self.step).collect();
        let turns = random.permutation(steps.len());
        turns.into_iter().flat_map(|n| steps[n as usize].iter().copied()).collect()
    }

    /// Pairs whose sources have one length.
    fn sequences(&self, of: &[usize]) -> Sequences {
        let targets = of.iter().map(|&n| self.pairs[n][1].len());
        let len = targets.max().unwrap_or(0) + 1;
        let mut batch = Sequences::default();
        for [source, target] in of.iter().map(|&n| &self.pairs[n]) {
            let filled = batch.tokens.len() + len;
            batch.sources.extend(source);
            batch.tokens.push(self.end);
            batch.tokens.extend(target);
            batch.tokens.resize(filled, self.end);
            batch.targets.extend(target);
            batch.targets.push(self.end);
            batch.targets.resize(filled, IGNORED);
            batch.fresh.push(true);
        }
        batch
    }
}

/// A number that other pairs do not have.
pub(in crate::train) fn digest(pairs: &[Pair]) -> String {
    let mut hash = Sha256::new();
    for text in pairs.iter().flatten() {
        hash.update((text.len() as u64).to_le_bytes());
        text.iter().for_each(|token| hash.update(token.to_le_bytes()));
    }
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const END: u32 = 99;

    /// Pairs of which each says its number.
    fn pairs(count: usize) -> Vec<Pair> {
        (0..count).map(|n| [vec![n as u32; 1 + n % 5], vec![n as u32; n % 3]]).collect()
    }

    #[test]
    fn an_epoch_has_every_pair_once_and_steps_few_lengths() {
        let mut batches = PairBatches::shuffled(pairs(43), END, (4, 7)).unwrap();
        let mut orders = vec![];
        for epoch in 0..3 {
            let mut seen = vec![];
            while batches.position().epoch == epoch {
                let calls = batches.calls(4, 3);
                assert!(calls.len() <= 3, "{}", calls.len());
                for call in calls {
                    assert!(call.fresh.len() <= 3);
                    let own = call.sources.len() / call.fresh.len();
                    seen.extend(call.sources.chunks_exact(own).map(|source| source[0]));
                }
            }
            orders.push(seen.clone());
            seen.sort_unstable();
            seen.dedup();
            // What is below a step is left over.
            assert_eq!(seen.len(), 40);
        }
        assert_ne!(orders[0], orders[1]);
        let error = PairBatches::shuffled(pairs(3), END, (4, 7)).unwrap_err();
        assert!(error.to_string().contains("3 pairs, expected 4"), "{error}");
    }

    #[test]
    fn the_decoder_reads_what_it_has_said() {
        let pairs = vec![[vec![1, 2], vec![3]], [vec![4, 5], vec![6, 7, 8]], [vec![9], vec![]]];
        let mut batches = PairBatches::in_order(pairs, END, 2);
        let calls = batches.calls(8, 8);
        assert_eq!(calls.len(), 2);
        assert_eq!(
            (&calls[0].sources[..], &calls[0].tokens[..], &calls[0].targets[..]),
            (&[9][..], &[END][..], &[END][..])
        );
        assert_eq!(calls[1].sources, [1, 2, 4, 5]);
        assert_eq!(calls[1].tokens, [END, 3, END, END, END, 6, 7, 8]);
        assert_eq!(calls[1].targets, [3, END, IGNORED, IGNORED, 6, 7, 8, END]);
        assert_eq!(batches.position().epoch, 1);
        batches.rewind();
        assert_eq!(batches.calls(8, 8), calls);
    }

    #[test]
    fn a_position_is_all_that_there_is_to_know() {
        let new = || PairBatches::shuffled(pairs(30), END, (4, 7)).unwrap();
        let mut whole = new();
        for _ in 0..20 {
            let mut later = new();
            later.set_position(whole.position().clone()).unwrap();
            assert_eq!(later.calls(4, 4), whole.calls(4, 4));
        }
        // Other steps than those that were written down.
        let mut wider = PairBatches::shuffled(pairs(30), END, (13, 7)).unwrap();
        wider.set_position(Position { sequence: 27, ..Position::default() }).unwrap();
        let count: usize = wider.calls(13, 13).iter().map(|call| call.fresh.len()).sum();
        assert_eq!(
            (count, wider.position().epoch),
            (13, 1 + u64::from(wider.position().sequence == 0))
        );
    }
}
