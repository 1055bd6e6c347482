//! SentencePiece's merging by score: GGUF's `llama`.
//!
//! Text, with `▁` for each space, begins as characters. Of all neighbours that together are a token, those whose token
//! has the highest score are merged first, the leftmost of equals, until none is left. A character that then has no
//! token becomes its bytes, `<0x0A>`, or the unknown token where the vocabulary has no bytes. With a heap and a linked
//! list that takes O(n log n) for n characters.
//! Sources: Kudo, Richardson, "SentencePiece" (2018), its `bpe_model.cc`; the order of equals is llama.cpp's.
//!
//! Text never becomes a control, unknown or byte token, as in SentencePiece; llama.cpp lets `</s>` in a text end it
//! where the pieces merge that far.

use std::cmp::Ordering;
use std::collections::BinaryHeap;
use std::ops::Range;

use super::Error;
use super::bytes::ESCAPED_SPACE;
use super::vocabulary::{Vocabulary, expect_length};

/// The scores of the tokens and what stands for text without one.
#[derive(Debug)]
pub(super) struct SentencePiece {
    scores: Vec<f32>,
    longest: usize,
    byte_ids: [Option<u32>; 256],
    unknown: u32,
    /// Whether a text begins with a space that isn't in it.
    pub(super) space_prefix: bool,
}

impl SentencePiece {
    pub(super) fn new(
        scores: Option<&[f32]>,
        space_prefix: bool,
        tokens: &[&str],
        vocabulary: &Vocabulary,
    ) -> Result<SentencePiece, Error> {
        const MODEL: &str = "llama";
        let scores = scores.ok_or(Error::Missing { model: MODEL, what: "scores" })?;
        expect_length("scores", vocabulary.len(), scores.len())?;
        if let Some((id, &found)) = (0..).zip(scores).find(|(_, score)| score.is_nan()) {
            return Err(Error::Score { id, found });
        }
        let byte_ids = vocabulary.byte_ids();
        let complete = byte_ids.iter().all(Option::is_some);
        let unknown = match vocabulary.roles.unknown {
            Some(unknown) => unknown,
            None if complete => 0,
            None => return Err(Error::Missing { model: MODEL, what: "all byte tokens or an unknown token" }),
        };
        let longest = tokens.iter().map(|token| token.len()).max().unwrap_or(0);
        Ok(SentencePiece { scores: scores.to_vec(), longest, byte_ids, unknown, space_prefix })
    }

    /// Appends the tokens of `text`, which has no special tokens; `start` where a space is to come before it.
    pub(super) fn encode(&self, text: &str, start: bool, vocabulary: &Vocabulary, out: &mut Vec<u32>) {
        let mut escaped = String::with_capacity(text.len() + text.len() / 2);
        if start && self.space_prefix {
            escaped.push(ESCAPED_SPACE);
        }
        escaped.extend(text.chars().map(|character| if character == ' ' { ESCAPED_SPACE } else { character }));
        let mut merging = Merging::new(&escaped, self, vocabulary);
        merging.run();
        let mut at = 0;
        while let Some(symbol) = merging.symbols.get(at) {
            self.emit(&escaped[symbol.text.clone()], vocabulary, out);
            at = symbol.next;
        }
    }

    fn emit(&self, piece: &str, vocabulary: &Vocabulary, out: &mut Vec<u32>) {
        if let Some(token) = vocabulary.text_id(piece) {
            return out.push(token);
        }
        let before = out.len();
        for byte in piece.bytes() {
            let Some(token) = self.byte_ids[usize::from(byte)] else {
                out.truncate(before);
                return out.push(self.unknown);
            };
            out.push(token);
        }
    }
}

/// A text while its symbols are being merged.
#[derive(Debug)]
struct Merging<'a> {
    text: &'a str,
    model: &'a SentencePiece,
    vocabulary: &'a Vocabulary,
    symbols: Vec<Symbol>,
    queue: BinaryHeap<Pair>,
}

/// A range of the text; empty once merged into the symbol before.
#[derive(Clone, Debug)]
struct Symbol {
    text: Range<usize>,
    previous: usize,
    next: usize,
}

/// Two neighbours that together are a token; the greatest is merged first.
#[derive(Clone, Copy, Debug)]
struct Pair {
    score: f32,
    left: usize,
    right: usize,
    len: usize,
}

impl Ord for Pair {
    fn cmp(&self, other: &Pair) -> Ordering {
        let by_place = || (other.left, other.right, other.len).cmp(&(self.left, self.right, self.len));
        // −0 and 0 are equal.
        (self.score + 0.0).total_cmp(&(other.score + 0.0)).then_with(by_place)
    }
}

impl PartialOrd for Pair {
    fn partial_cmp(&self, other: &Pair) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Pair {
    fn eq(&self, other: &Pair) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Pair {}

const NONE: usize = usize::MAX;

impl<'a> Merging<'a> {
    fn new(text: &'a str, model: &'a SentencePiece, vocabulary: &'a Vocabulary) -> Merging<'a> {
        let mut symbols: Vec<Symbol> = Vec::with_capacity(text.len());
        for (at, character) in text.char_indices() {
            let index = symbols.len();
            let previous = index.checked_sub(1).unwrap_or(NONE);
            symbols.push(Symbol { text: at..at + character.len_utf8(), previous, next: index + 1 });
        }
        if let Some(last) = symbols.last_mut() {
            last.next = NONE;
        }
        Merging { text, model, vocabulary, symbols, queue: BinaryHeap::new() }
    }

    fn run(&mut self) {
        for right in 1..self.symbols.len() {
            self.consider(right - 1, right);
        }
        while let Some(pair) = self.queue.pop() {
            let (left, right) = (self.symbols[pair.left].clone(), self.symbols[pair.right].clone());
            let current = left.next == pair.right && left.text.len() + right.text.len() == pair.len;
            if left.text.is_empty() || right.text.is_empty() || !current {
                continue;
            }
            self.symbols[pair.left] = Symbol {
                text: left.text.start..right.text.end,
                previous: left.previous,
                next: right.next,
            };
            self.symbols[pair.right].text = right.text.end..right.text.end;
            if right.next != NONE {
                self.symbols[right.next].previous = pair.left;
            }
            self.consider(left.previous, pair.left);
            self.consider(pair.left, right.next);
        }
    }

    fn consider(&mut self, left: usize, right: usize) {
        if left == NONE || right == NONE {
            return;
        }
        let text = self.symbols[left].text.start..self.symbols[right].text.end;
        let len = text.len();
        if len > self.model.longest {
            return;
        }
        if let Some(token) = self.vocabulary.text_id(&self.text[text]) {
            let score = self.model.scores[token as usize];
            self.queue.push(Pair { score, left, right, len });
        }
    }
}
