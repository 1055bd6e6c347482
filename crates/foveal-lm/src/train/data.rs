//! Batches of a text: sequences anywhere in it, or streams that go on from batch to batch.
//!
//! ```text
//! shuffled   an epoch's sequences begin at r + n T, in a random order; r < T is another in each epoch
//! streams    the text in as many parts as a step has sequences; each goes on where it was
//! ```
//!
//! Which tokens a step gets depends on the seed and on the steps before it, nothing else; [`Position`] is all that has to
//! be known to go on. A sequence of `T` tokens predicts each next one. In streams a sequence ends with its document; the rest
//! of its place has no targets.

mod pairs;
mod text;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::config::{DataSection, Order};
use super::corpus::pieces;
use super::random::{Use, numbers, seed};
use super::{Batch, Error, IGNORED, Pairs};
use crate::tokenizer::{Encode, Tokenizer};

pub(super) use pairs::{Pair, PairBatches, digest};
pub(super) use text::Text;

/// Bytes of a text that are encoded at a time.
const PIECE: usize = 1 << 18;

/// The tokens of a text, and where its documents end.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tokens {
    tokens: Vec<u32>,
    ends: Vec<usize>,
}

/// What has been read of a text.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct Position {
    /// Times that the text was gone through.
    pub epoch: u64,
    /// Sequences of this epoch, of shuffled ones.
    pub sequence: usize,
    /// Where each stream is.
    pub streams: Vec<Stream>,
}

/// Where a stream is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct Stream {
    /// The next token.
    pub at: usize,
    /// Whether a document begins there.
    pub fresh: bool,
}

/// Sequences that go through the model together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sequences {
    /// The sources of pairs, `[sequences, S]`; none of one text.
    pub sources: Vec<u32>,
    /// `[sequences, T]`.
    pub tokens: Vec<u32>,
    /// What follows each, or [`IGNORED`].
    pub targets: Vec<u32>,
    /// Whether each sequence begins with nothing carried.
    pub fresh: Vec<bool>,
}

/// A text that gives batches.
#[derive(Debug)]
pub struct Batches {
    text: Tokens,
    sequence: usize,
    order: Order,
    seed: u64,
    position: Position,
    /// Where this epoch's sequences begin, and their order.
    epoch: Option<(u64, usize, Vec<u32>)>,
}

impl Tokens {
    /// The tokens of documents, each with the tokenizer's end token behind it where it has one and there are several.
    ///
    /// # Errors
    ///
    /// [`Error::Model`] for a text that the tokenizer can't encode.
    pub fn encode(documents: &[String], tokenizer: &Tokenizer) -> Result<Tokens, Error> {
        let all: Vec<(usize, &str)> = documents
            .iter()
            .enumerate()
            .flat_map(|(n, document)| pieces(document, PIECE).map(move |piece| (n, piece)))
            .collect();
        let encode = |part: &[(usize, &str)]| {
            let ids =
                part.iter().map(|(n, piece)| Ok((*n, tokenizer.encode(piece, Encode::TEXT)?)));
            ids.collect::<Result<Vec<_>, Error>>()
        };
        let parts = on_threads(&all, encode);
        let end = tokenizer.eos().filter(|_| documents.len() > 1);
        let mut joined = Tokens::default();
        let mut current = 0;
        for part in parts {
            for (document, ids) in part? {
                if document != current {
                    joined.finish(end);
                    current = document;
                }
                joined.tokens.extend(ids);
            }
        }
        joined.finish(end);
        Ok(joined)
    }

    fn finish(&mut self, end: Option<u32>) {
        self.tokens.extend(end);
        if self.ends.last() != Some(&self.tokens.len()) {
            self.ends.push(self.tokens.len());
        }
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// The last `count` tokens, taken away from these.
    #[must_use]
    pub fn split_off(&mut self, count: usize) -> Tokens {
        let at = self.len() - count.min(self.len());
        let tokens = self.tokens.split_off(at);
        let first = self.ends.partition_point(|&end| end <= at);
        let ends = self.ends.split_off(first).into_iter().map(|end| end - at).collect();
        if at > 0 && self.ends.last() != Some(&at) {
            self.ends.push(at);
        }
        Tokens { tokens, ends }
    }

    /// The first end of a document beyond `at`.
    fn end_after(&self, at: usize) -> usize {
        let n = self.ends.partition_point(|&end| end <= at);
        self.ends.get(n).copied().unwrap_or(self.tokens.len())
    }

    /// A number that other tokens do not have.
    pub fn digest(&self) -> String {
        let mut hash = Sha256::new();
        self.tokens.chunks(4096).for_each(|part| {
            let bytes: Vec<u8> = part.iter().flat_map(|token| token.to_le_bytes()).collect();
            hash.update(&bytes);
        });
        self.ends.iter().for_each(|&end| hash.update((end as u64).to_le_bytes()));
        hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// Parts of `all`, each worked on by a thread; the results in order.
pub(super) fn on_threads<T: Sync, R: Send>(all: &[T], work: impl Fn(&[T]) -> R + Sync) -> Vec<R> {
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let (share, work) = (all.len().div_ceil(threads).max(1), &work);
    std::thread::scope(|scope| {
        let started: Vec<_> =
            all.chunks(share).map(|part| scope.spawn(move || work(part))).collect();
        let join = |thread: std::thread::ScopedJoinHandle<'_, _>| match thread.join() {
            Ok(result) => result,
            Err(fault) => std::panic::resume_unwind(fault),
        };
        started.into_iter().map(join).collect()
    })
}

impl Batches {
    /// Batches of a text, from its beginning. `streams` is the number of sequences of a step; `what` the text is called in
    /// errors.
    ///
    /// # Errors
    ///
    /// [`Error::TooShort`] for a text without a whole sequence, or with less than two tokens a stream.
    pub fn new(
        text: Tokens,
        data: &DataSection,
        run: u64,
        streams: usize,
        what: &'static str,
    ) -> Result<Batches, Error> {
        let expected = match data.order {
            // Room for any beginning.
            Order::Shuffled => 2 * data.sequence,
            Order::Streams => 2 * streams,
        };
        if text.len() < expected {
            return Err(Error::TooShort { what, found: text.len(), expected });
        }
        let parts = match data.order {
            Order::Shuffled => 0,
            Order::Streams => streams,
        };
        let part = |n: usize| Stream { at: n * (text.len() / streams.max(1)), fresh: true };
        let position = Position { streams: (0..parts).map(part).collect(), ..Position::default() };
        let (sequence, order) = (data.sequence, data.order);
        Ok(Batches { text, sequence, order, seed: run, position, epoch: None })
    }

    /// A number that other texts do not have.
    pub fn digest(&self) -> String {
        self.text.digest()
    }

    /// What has been read.
    pub fn position(&self) -> &Position {
        &self.position
    }

    /// Goes on from `position`.
    ///
    /// # Errors
    ///
    /// [`Error::OtherText`] for one of another text.
    pub fn set_position(&mut self, position: Position) -> Result<(), Error> {
        let known = position.streams.len() == self.position.streams.len()
            && position.streams.iter().all(|stream| stream.at < self.text.len());
        if !known {
            return Err(Error::OtherText);
        }
        self.position = position;
        Ok(())
    }

    /// Begins anew.
    pub fn rewind(&mut self) {
        let parts = self.position.streams.len();
        let size = self.text.len() / parts.max(1);
        let streams = (0..parts).map(|n| Stream { at: n * size, fresh: true }).collect();
        self.position = Position { streams, ..Position::default() };
    }

    /// Whether all sequences of a batch begin and end with each other: one document in equal parts, or sequences that do
    /// not go on.
    pub fn in_step(&self) -> bool {
        self.order == Order::Shuffled || self.text.ends.len() < 2
    }

    /// The next sequences, of the streams `places`.
    pub fn next(&mut self, places: std::ops::Range<usize>) -> Sequences {
        let mut batch = Sequences::default();
        for place in places {
            match self.order {
                Order::Shuffled => self.shuffled(&mut batch),
                Order::Streams => self.streamed(place, &mut batch),
            }
        }
        batch
    }

    fn shuffled(&mut self, batch: &mut Sequences) {
        let (len, n) = (self.sequence, self.position.sequence);
        let (first, order) = self.epoch_order();
        let (start, all) = (first + order.get(n).map_or(0, |&n| n as usize * len), order.len());
        batch.push(&self.text.tokens[start..=start + len], len, true);
        self.position.sequence += 1;
        if self.position.sequence >= all {
            self.position.sequence = 0;
            self.position.epoch += 1;
        }
    }

    /// Where this epoch's sequences begin, and their order.
    fn epoch_order(&mut self) -> (usize, &[u32]) {
        let epoch = self.position.epoch;
        if self.epoch.as_ref().is_none_or(|(known, ..)| *known != epoch) {
            let mut random = numbers(seed(self.seed, Use::Order, [epoch, 0]));
            let first = random.below(self.sequence);
            let count = (self.text.len() - 1 - first) / self.sequence;
            self.epoch = Some((epoch, first, random.permutation(count)));
        }
        self.epoch.as_ref().map_or((0, &[]), |(_, first, order)| (*first, order))
    }

    fn streamed(&mut self, place: usize, batch: &mut Sequences) {
        let (streams, all) = (self.position.streams.len(), self.text.len());
        let part = place * (all / streams)..(place + 1) * (all / streams);
        let Stream { at, fresh } = self.position.streams[place];
        let end = self.text.end_after(at).min(part.end);
        let last = (at + self.sequence).min(end - 1);
        batch.push(&self.text.tokens[at..=last], self.sequence, fresh);
        // A document's last token is a target only.
        let next = if last + 1 >= end { end } else { last };
        let over = next == end;
        let wrapped = next + 1 >= part.end;
        if wrapped && place == 0 {
            self.position.epoch += 1;
        }
        self.position.streams[place] = match wrapped {
            true => Stream { at: part.start, fresh: true },
            false => Stream { at: next, fresh: over },
        };
    }
}

impl Sequences {
    /// Appends a sequence of tokens of which each predicts the next.
    fn push(&mut self, tokens: &[u32], len: usize, fresh: bool) {
        let (read, targets) = match tokens {
            [read @ .., _] if !read.is_empty() => (read, &tokens[1..]),
            // One token alone predicts nothing.
            _ => (tokens, &[][..]),
        };
        let filled = self.tokens.len() + len;
        self.tokens.extend_from_slice(read);
        self.tokens.resize(filled, 0);
        self.targets.extend_from_slice(targets);
        self.targets.resize(filled, IGNORED);
        self.fresh.push(fresh);
    }

    /// The same for a network.
    pub fn view(&self) -> Batch<'_> {
        Batch { sequences: self.fresh.len(), tokens: &self.tokens, targets: &self.targets }
    }

    /// The same for a network of pairs.
    pub fn pairs(&self) -> Pairs<'_> {
        let Sequences { sources: source, tokens, targets, fresh } = self;
        Pairs { sequences: fresh.len(), source, tokens, targets }
    }

    /// Hides tokens, a share of all, and asks for those instead of the next ones: four of five become `mask`, half of the rest
    /// any of the `vocab` tokens, the others stay (Devlin et al. 2018, §3.1).
    #[must_use]
    pub fn hide(mut self, mask: u32, vocab: usize, share: f64, seed: u64) -> Sequences {
        let mut random = numbers(seed);
        let limit = (share * f64::from(1 << 30)) as usize;
        self.targets.fill(IGNORED);
        for (token, target) in self.tokens.iter_mut().zip(&mut self.targets) {
            if random.below(1 << 30) >= limit {
                continue;
            }
            *target = *token;
            match random.below(10) {
                0..8 => *token = mask,
                8 => *token = random.below(vocab) as u32,
                _ => {}
            }
        }
        self
    }

    /// How many tokens have a target.
    pub fn predicted(&self) -> usize {
        self.targets.iter().filter(|&&target| target != IGNORED).count()
    }
}

#[cfg(test)]
mod tests;
