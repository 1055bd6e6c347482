//! Random numbers that depend on what they are for, and on nothing that came before: SplitMix64's mixing function on a
//! seed and a place.

use foveal::random::{Random, mix};

/// What a stream of random numbers is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub(super) enum Use {
    /// The order of sequences in an epoch.
    Order = 1,
    /// Dropout in a step.
    Dropout,
    /// Masked tokens of a step.
    Mask,
    /// A sample's choices.
    Sample,
    /// Pairs that are made up.
    Task,
}

/// A seed for one purpose, at one place of a run.
pub(super) fn seed(run: u64, purpose: Use, place: [u64; 2]) -> u64 {
    [purpose as u64, place[0], place[1]].into_iter().fold(mix(run), |seed, x| mix(seed ^ mix(x)))
}

/// Numbers one after the other for a [`seed`]: all but the first, so that runs are what they always were.
pub(super) fn numbers(seed: u64) -> Random {
    let mut random = Random::new(seed);
    random.bits();
    random
}
