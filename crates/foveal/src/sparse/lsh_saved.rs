//! A state of LSH attention as plain numbers, and one made of them again.
//!
//! ```text
//! counts [heads, rounds, buckets, 2]     tokens of each bucket, in units of 2²⁰ and the rest
//! slots  [heads]                         tokens held
//! lists  [what counts say]               for each bucket, which of its head's tokens the next one sees
//! keys   [slots, key_dim]                normalised            values [slots, value_dim]        head after head
//! ```
//!
//! Numbers of strangers are checked: lists have the lengths that counts say, counts the sum that the text has tokens, and each
//! token that is held is in a list.

use super::lsh_state::{Bucket, Head, LshState};
use crate::error::{Error, Result};

/// Tokens that the larger part of a count counts by.
const UNIT: usize = 1 << 20;

impl LshState<f32> {
    /// Counts, slots, lists, keys and values, as the module says. Allocates them.
    pub fn image(&self) -> [Vec<f32>; 5] {
        let [mut counts, mut slots, mut lists, mut keys, mut values] = [(); 5].map(|()| vec![]);
        let (dims, per_round) = ([self.shape.key_dim, self.shape.value_dim], self.per_round());
        for head in &self.heads {
            // The places of slots once free ones are left out.
            let mut places = vec![0.0; head.shown.len()];
            let mut live = 0;
            for (slot, _) in head.shown.iter().enumerate().filter(|(_, shown)| **shown > 0) {
                places[slot] = live as f32;
                live += 1;
                for ((from, to), dim) in
                    [(&head.keys, &mut keys), (&head.values, &mut values)].into_iter().zip(dims)
                {
                    to.extend_from_slice(&from[slot * dim..(slot + 1) * dim]);
                }
            }
            slots.push(live as f32);
            for n in 0..self.hash.rounds() * per_round {
                let bucket = head.buckets.get(&self.key(n));
                let count = bucket.map_or(0, |bucket| bucket.count);
                counts.extend([(count / UNIT) as f32, (count % UNIT) as f32]);
                let held = bucket.into_iter().flat_map(|bucket| &bucket.held);
                lists.extend(held.map(|&slot| places[slot as usize]));
            }
        }
        [counts, slots, lists, keys, values]
    }

    /// How many counts and slots there are.
    pub fn tables(&self) -> [usize; 2] {
        let heads = self.shape.heads;
        [heads * self.hash.rounds() * self.per_round() * 2, heads]
    }

    /// How long lists, keys and values are, of a text of so many tokens.
    ///
    /// # Errors
    /// [`Error::InvalidParameter`] for counts and slots that no such text has.
    pub fn lengths(&self, tokens: usize, [counts, slots]: [&[f32]; 2]) -> Result<[usize; 3]> {
        if [counts.len(), slots.len()] != self.tables() {
            return Err(refused("as many counts and slots as there are buckets and heads"));
        }
        let mut list = 0usize;
        for round in counts.chunks(2 * self.per_round()) {
            let counts = round.chunks(2).map(|pair| count(pair, tokens));
            let counts = counts.collect::<Option<Vec<usize>>>();
            let counts = counts.filter(|counts| counts.iter().sum::<usize>() == tokens);
            let counts = counts.ok_or_else(|| refused("counts of all tokens in each round"))?;
            list += counts.into_iter().map(|count| self.held(count)).sum::<usize>();
        }
        let live = slots.iter().map(|&slots| whole(slots, tokens)).sum::<Option<usize>>();
        let live = live.ok_or_else(|| refused("slots of at most all tokens"))?;
        let len = |dim| live.checked_mul(dim).ok_or_else(|| refused("rows that fit in memory"));
        Ok([list, len(self.shape.key_dim)?, len(self.shape.value_dim)?])
    }

    /// Becomes the state whose image these are.
    ///
    /// # Errors
    /// [`Error::InvalidParameter`] for numbers that aren't one; the state is unchanged then.
    pub fn restore(
        &mut self,
        tokens: usize,
        [counts, slots, lists]: [Vec<f32>; 3],
        [keys, values]: [Vec<f32>; 2],
    ) -> Result<()> {
        let lengths = self.lengths(tokens, [&counts, &slots])?;
        if [lists.len(), keys.len(), values.len()] != lengths {
            return Err(refused("lists and rows as long as counts and slots say"));
        }
        let [mut keys, mut values] = [&keys[..], &values[..]];
        let (mut lists, mut heads) = (&lists[..], vec![]);
        for (counts, &slots) in counts.chunks(2 * self.hash.rounds() * self.per_round()).zip(&slots)
        {
            let live = slots as usize;
            let mut head = Head::new();
            head.shown = vec![0; live];
            head.keys = take(&mut keys, live * self.shape.key_dim).to_vec();
            head.values = take(&mut values, live * self.shape.value_dim).to_vec();
            for (n, pair) in counts.chunks(2).enumerate() {
                let count = count(pair, tokens).unwrap_or(0);
                if count == 0 {
                    continue;
                }
                let list = take(&mut lists, self.held(count)).iter();
                let held = list.map(|&slot| whole(slot, usize::MAX).filter(|&slot| slot < live));
                let held = held.collect::<Option<Vec<usize>>>();
                let held = held.ok_or_else(|| refused("lists of tokens that are held"))?;
                held.iter().for_each(|&slot| head.shown[slot] += 1);
                let held = held.into_iter().map(|slot| slot as u32).collect();
                head.buckets.insert(self.key(n), Bucket { count, held });
            }
            if head.shown.contains(&0) {
                return Err(refused("no token that nobody sees"));
            }
            heads.push(head);
        }
        (self.heads, self.tokens) = (heads, tokens);
        Ok(())
    }

    fn per_round(&self) -> usize {
        self.hash.buckets_per_round()
    }

    /// The name of the n-th bucket of a head, counted over all rounds.
    fn key(&self, n: usize) -> u64 {
        let (round, bucket) = (n / self.per_round(), n % self.per_round());
        (round as u64) << 32 | bucket as u64
    }

    /// Tokens of a bucket of so many that the next one sees.
    fn held(&self, count: usize) -> usize {
        let chunk = self.layer.cuts.chunk;
        count - (count / chunk).saturating_sub(1) * chunk
    }
}

/// The first numbers of a slice, which keeps the others.
fn take<'a>(from: &mut &'a [f32], len: usize) -> &'a [f32] {
    let (first, rest) = from.split_at(len);
    *from = rest;
    first
}

/// A number that counts something, of which there is at most so much.
fn whole(x: f32, most: usize) -> Option<usize> {
    let found = x as usize;
    ((0.0..=16_777_216.0).contains(&x) && found as f32 == x && found <= most).then_some(found)
}

fn count(pair: &[f32], most: usize) -> Option<usize> {
    let &[units, rest] = pair else { return None };
    let (units, rest) = (whole(units, usize::MAX)?, whole(rest, UNIT - 1)?);
    Some(units * UNIT + rest).filter(|&count| count <= most)
}

fn refused(expected: &'static str) -> Error {
    let (what, got) = ("numbers of a state of LSH attention", "others".to_owned());
    Error::InvalidParameter { what, expected, got }
}
