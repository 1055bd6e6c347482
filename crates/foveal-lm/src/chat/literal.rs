//! What users type is text, marks such as `<|im_end|>` in it too: only a template writes marks.
//!
//! A character that Unicode keeps free of meaning is put into every mark that a message holds, before the template sees
//! it. The text that the template makes is cut there, and its parts become tokens one by one: no part has a whole mark.

use aho_corasick::{AhoCorasick, MatchKind};

use crate::Error;
use crate::tokenizer::{Encode, Tokenizer};

/// A code point that is no character, for programs' own use.
const SEAM: char = '\u{FDD0}';

/// The marks of a tokenizer, ready to be found.
#[derive(Debug)]
pub(super) struct Literal {
    marks: Option<AhoCorasick>,
}

impl Literal {
    pub(super) fn new(tokenizer: &Tokenizer) -> Literal {
        let marks = (0..tokenizer.vocab_size()).filter_map(|id| {
            let id = u32::try_from(id).ok()?;
            let mark = tokenizer.token_kind(id)?.is_mark();
            let text = std::str::from_utf8(tokenizer.token_bytes(id)?).ok()?;
            (mark && text.chars().nth(1).is_some()).then_some(text)
        });
        let marks = AhoCorasick::builder().match_kind(MatchKind::Standard).build(marks);
        // More marks than memory holds can't be: the tokenizer holds them.
        Literal { marks: marks.ok() }
    }

    /// The same text with a seam in every mark.
    pub(super) fn seam(&self, text: &str) -> String {
        let text = text.replace(SEAM, "");
        let Some(marks) = &self.marks else { return text };
        let mut seams: Vec<usize> = marks
            .find_overlapping_iter(&text)
            .map(|found| {
                let first = text[found.start()..].chars().next().map_or(1, char::len_utf8);
                found.start() + first
            })
            .collect();
        seams.sort_unstable();
        seams.dedup();
        let mut seamed = String::with_capacity(text.len() + seams.len() * SEAM.len_utf8());
        let mut done = 0;
        for at in seams {
            seamed.push_str(&text[done..at]);
            seamed.push(SEAM);
            done = at;
        }
        seamed + &text[done..]
    }
}

/// The tokens of a template's text.
pub(super) fn encode(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>, Error> {
    let mut tokens = Vec::new();
    for part in text.split(SEAM) {
        tokens.extend(tokenizer.encode(part, Encode::TEMPLATE)?);
    }
    Ok(tokens)
}
