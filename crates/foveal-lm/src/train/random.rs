//! Random numbers that depend on what they are for, and on nothing that came before: SplitMix64's mixing function on a
//! seed and a place.

/// All bits depend on all bits.
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

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

/// Numbers one after the other.
#[derive(Clone, Debug)]
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Random {
        Random(seed)
    }

    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A whole number below `n`, which is not 0.
    pub(super) fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.bits()) * n as u128) >> 64) as usize
    }

    /// The numbers below `n` in any order.
    pub(super) fn permutation(&mut self, n: usize) -> Vec<u32> {
        let mut order: Vec<u32> = (0..n as u32).collect();
        for last in (1..n).rev() {
            order.swap(last, self.below(last + 1));
        }
        order
    }
}
