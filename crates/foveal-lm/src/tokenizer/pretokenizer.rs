//! Cuts text into the words that byte-level BPE merges within.
//!
//! A pre-tokenizer is a list of [`Step`]s. The first cuts the text, each further one cuts the pieces of the one
//! before. A step's matches become pieces, and so does what lies between two matches; a step sees nothing outside its
//! piece. The patterns are those of the models' own `tokenizer.json`, in the form that llama.cpp gives them
//! (`src/llama-vocab.cpp`), found by automata in linear time on any text.
//!
//! Nearly all of them end in `\s+(?!\S)`, which an automaton can't express: a run of spaces without its last, unless
//! the text ends there or the run is one long. [`Step::words`] matches `\s+` and then gives back the last space.

use std::ops::Range;

use regex_automata::meta::Regex;

use super::Error;
use super::patterns;

/// A way to cut text into words.
#[derive(Debug)]
pub(super) struct PreTokenizer {
    steps: Vec<Step>,
    /// Whether a word that is a token as a whole is that token, without merges.
    pub(super) whole_words: bool,
    /// Whether prompts begin with the begin token unless the file says otherwise.
    pub(super) add_bos: bool,
}

#[derive(Debug)]
enum Step {
    /// Cuts around the matches of a pattern; pattern 1, where there is one, is a run of spaces.
    Pattern(Regex),
    /// Cuts each run of digits into threes from its end.
    DigitsByThree,
}

/// What makes up a pre-tokenizer, as the table in `patterns.rs` lists it.
#[derive(Clone, Copy, Debug)]
pub(super) enum Cut {
    /// The pattern, then `\s+(?!\S)|\s+`.
    Words(&'static str),
    /// The pattern alone.
    Only(&'static str),
    /// Threes of digits, counted from the end of their run.
    DigitsByThree,
}

impl PreTokenizer {
    /// The pre-tokenizer that GGUF files call `name`.
    pub(super) fn named(name: &str) -> Result<PreTokenizer, Error> {
        let Some(family) = patterns::FAMILIES.iter().find(|family| family.names.contains(&name)) else {
            let mut supported: Vec<_> =
                patterns::FAMILIES.iter().flat_map(|family| family.names).copied().collect();
            supported.sort_unstable();
            return Err(Error::PreTokenizer { found: name.to_owned(), supported });
        };
        let steps = family.cuts.iter().map(Step::new).collect::<Result<_, _>>()?;
        Ok(PreTokenizer { steps, whole_words: family.whole_words, add_bos: family.add_bos })
    }

    /// The words of `text`, in order and without gaps.
    pub(super) fn words(&self, text: &str) -> Vec<Range<usize>> {
        let mut pieces = Vec::new();
        if !text.is_empty() {
            pieces.push(0..text.len());
        }
        for step in &self.steps {
            let mut cut = Vec::with_capacity(pieces.len());
            for piece in pieces {
                step.cut(&text[piece.clone()], piece.start, &mut cut);
            }
            pieces = cut;
        }
        pieces
    }
}

impl Step {
    fn new(cut: &Cut) -> Result<Step, Error> {
        let built = match cut {
            Cut::Words(pattern) => Regex::new_many(&[*pattern, r"\s+"]),
            Cut::Only(pattern) => Regex::new(pattern),
            Cut::DigitsByThree => return Ok(Step::DigitsByThree),
        };
        // The patterns are constants; a test builds them all.
        built.map(Step::Pattern).map_err(|_| Error::Missing { model: "gpt2", what: "a valid pattern" })
    }

    /// Appends the pieces of `text`, which begins at `offset` of the whole.
    fn cut(&self, text: &str, offset: usize, out: &mut Vec<Range<usize>>) {
        let mut done = 0;
        let mut push = |range: Range<usize>| {
            for piece in [done..range.start, range.clone()] {
                if !piece.is_empty() {
                    out.push(offset + piece.start..offset + piece.end);
                }
            }
            done = range.end;
        };
        match self {
            Step::Pattern(regex) => cut_matches(regex, text, &mut push),
            Step::DigitsByThree => cut_digits(text, &mut push),
        }
        push(text.len()..text.len());
    }
}

fn cut_matches(regex: &Regex, text: &str, push: &mut impl FnMut(Range<usize>)) {
    let mut at = 0;
    while let Some(found) = regex.find(regex_automata::Input::new(text).range(at..)) {
        let spaces = found.pattern().as_usize() == 1;
        let end = if spaces { without_last_space(text, found.range()) } else { found.end() };
        if end == found.start() {
            break;
        }
        push(found.start()..end);
        at = end;
    }
}

/// The end of a run of spaces that leaves its last one to the word after it.
fn without_last_space(text: &str, run: Range<usize>) -> usize {
    let last = text[run.clone()].char_indices().next_back().map_or(0, |(index, _)| index);
    if run.end == text.len() || last == 0 { run.end } else { run.start + last }
}

fn cut_digits(text: &str, push: &mut impl FnMut(Range<usize>)) {
    let mut run: Vec<usize> = Vec::new();
    for (index, character) in text.char_indices().chain([(text.len(), ' ')]) {
        if character.is_ascii_digit() {
            run.push(index);
            continue;
        }
        let mut left = run.len();
        for (digit, &start) in run.iter().enumerate() {
            if digit == 0 || left % 3 == 0 {
                let take = if left % 3 == 0 { 3 } else { left % 3 };
                push(start..run.get(digit + take).copied().unwrap_or(index));
            }
            left -= 1;
        }
        run.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words<'t>(name: &str, text: &'t str) -> Vec<&'t str> {
        let pre = PreTokenizer::named(name).expect("a supported name");
        pre.words(text).into_iter().map(|word| &text[word]).collect()
    }

    #[test]
    fn the_last_space_belongs_to_the_next_word() {
        assert_eq!(words("gpt-2", "a  b"), ["a", " ", " b"]);
        assert_eq!(words("gpt-2", "a\t\tb\n\n c "), ["a", "\t", "\t", "b", "\n\n", " c", " "]);
        assert_eq!(words("llama3", "it'S 12345!!\n\n  x"), ["it", "'S", " ", "123", "45", "!!\n\n", " ", " x"]);
        assert_eq!(words("qwen2", "x   \n y\u{3000}\u{3000}z"), ["x", "   \n", " y", "\u{3000}", "\u{3000}z"]);
        assert_eq!(words("smollm", " 2024."), [" ", "2", "0", "2", "4", "."]);
    }

    #[test]
    fn digits_are_counted_from_the_end() {
        assert_eq!(words("superbpe", "a1234567b12"), ["a", "1", "234", "567", "b", "12"]);
    }

    #[test]
    fn every_family_builds_and_keeps_the_text() {
        let text = "Ünïcode 12345  \r\n\t ſ'T 日本語 ひらがな '' \u{85}\u{a0}x\0\u{10ffff}   ";
        for name in patterns::FAMILIES.iter().flat_map(|family| family.names) {
            assert_eq!(words(name, text).concat(), text, "{name}");
            assert!(words(name, "").is_empty(), "{name}");
        }
    }

    #[test]
    fn an_unknown_name_lists_the_known_ones() {
        let message = PreTokenizer::named("gpt-7").map(|_| ()).expect_err("no such name").to_string();
        assert!(message.contains("\"gpt-7\"") && message.contains("llama-bpe"), "{message}");
    }
}
