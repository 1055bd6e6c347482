//! Cuts a text at its special tokens, before anything else looks at it.
//!
//! Longer tokens are found first, everywhere in the text, then shorter ones in what is left; of two tokens of one
//! length the lower id comes first. This is llama.cpp's order (`tokenizer_st_partition`), and differs from
//! leftmost-longest where tokens overlap: with the tokens `ab` and `bcd`, `abcd` is `a`, `bcd`.

use std::ops::Range;

use aho_corasick::AhoCorasick;

use super::Error;
use super::vocabulary::{TokenKind, Vocabulary};

/// A part of a text: a special token, or what lies between two.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Fragment {
    Token(u32),
    Text(Range<usize>),
}

/// The special tokens of a vocabulary, ready to be found.
#[derive(Debug)]
pub(super) struct SpecialTokens {
    /// Longest first.
    tokens: Vec<Special>,
    finder: AhoCorasick,
}

#[derive(Debug)]
struct Special {
    id: u32,
    text: Box<str>,
    /// Found only where the text may contain marks.
    mark: bool,
}

impl SpecialTokens {
    pub(super) fn new(tokens: &[&str], vocabulary: &Vocabulary) -> Result<SpecialTokens, Error> {
        let mut specials: Vec<Special> = Vec::new();
        for (&text, id) in tokens.iter().zip(0..) {
            let Some(kind) = vocabulary.kind(id) else { break };
            if (kind.is_mark() || kind == TokenKind::UserDefined) && !text.is_empty() {
                specials.push(Special { id, text: text.into(), mark: kind.is_mark() });
            }
        }
        specials.sort_by_key(|special| std::cmp::Reverse(special.text.len()));
        let finder = AhoCorasick::new(specials.iter().map(|special| special.text.as_bytes()));
        let finder = finder.map_err(|_| Error::Limit {
            what: "special tokens",
            found: specials.len(),
            limit: u32::MAX as usize >> 1,
        })?;
        Ok(SpecialTokens { tokens: specials, finder })
    }

    /// Cuts `text`; marks such as `<|im_end|>` are found only with `marks`.
    ///
    /// Takes a pass over the text, and another for each different token that occurs in it.
    pub(super) fn split(&self, text: &str, marks: bool) -> Vec<Fragment> {
        let mut fragments = Vec::new();
        if !text.is_empty() {
            fragments.push(Fragment::Text(0..text.len()));
        }
        for special in self.occurring(text, marks) {
            fragments = cut(text, fragments, special);
        }
        fragments
    }

    /// The tokens that occur anywhere in `text`, longest first.
    fn occurring(&self, text: &str, marks: bool) -> impl Iterator<Item = &Special> {
        let mut found = vec![false; self.tokens.len()];
        for occurrence in self.finder.find_overlapping_iter(text) {
            found[occurrence.pattern().as_usize()] = true;
        }
        let tokens = self.tokens.iter().zip(found);
        tokens.filter(move |(special, found)| *found && (marks || !special.mark)).map(|(special, _)| special)
    }
}

/// Cuts every text among `fragments` at each occurrence of `special`.
fn cut(text: &str, fragments: Vec<Fragment>, special: &Special) -> Vec<Fragment> {
    let mut out = Vec::with_capacity(fragments.len());
    for fragment in fragments {
        let Fragment::Text(mut rest) = fragment else {
            out.push(fragment);
            continue;
        };
        while let Some(at) = text[rest.clone()].find(&*special.text) {
            if at > 0 {
                out.push(Fragment::Text(rest.start..rest.start + at));
            }
            out.push(Fragment::Token(special.id));
            rest.start += at + special.text.len();
        }
        if !rest.is_empty() {
            out.push(Fragment::Text(rest));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::vocabulary::{Alphabet, Roles};
    use super::*;

    const TOKENS: [&str; 5] = ["a", "ab", "bcd", "\n\n", "\n"];

    fn specials(kinds: [TokenKind; 5]) -> SpecialTokens {
        let vocabulary =
            Vocabulary::new(&TOKENS, kinds.to_vec(), Alphabet::ByteLevel, Roles::default());
        SpecialTokens::new(&TOKENS, &vocabulary.expect("a valid vocabulary")).expect("few tokens")
    }

    #[test]
    fn longer_tokens_come_first_wherever_they_are() {
        use Fragment::{Text, Token};
        let specials = specials([TokenKind::Normal, TokenKind::UserDefined, TokenKind::UserDefined,
            TokenKind::UserDefined, TokenKind::Control]);
        assert_eq!(specials.split("abcd", false), [Text(0..1), Token(2)]);
        assert_eq!(specials.split("xabab", false), [Text(0..1), Token(1), Token(1)]);
        assert_eq!(specials.split("\n\n\n", true), [Token(3), Token(4)]);
        assert_eq!(specials.split("\n\n\n", false), [Token(3), Text(2..3)]);
        assert_eq!(specials.split("", true), []);
    }
}
