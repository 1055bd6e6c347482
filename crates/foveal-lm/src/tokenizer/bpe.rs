//! Byte-pair encoding: GGUF's `gpt2`, on bytes, and `gemma4`, on characters.
//!
//! `gpt2` cuts text into words, writes each byte of a word as a token, and merges. `gemma4` writes `▁` for each space,
//! cuts text into lines only, and begins with characters; one that has no token becomes its bytes, `<0x0A>`.
//! What has no token at all, not even by its bytes, is left out, as in llama.cpp: a vocabulary with all 256 bytes gives
//! back every text.

use std::collections::HashMap;

use super::Error;
use super::bytes;
use super::merges::{Merges, Word};
use super::pretokenizer::PreTokenizer;
use super::vocabulary::Vocabulary;

/// Words beyond this length are merged again each time they occur.
const LONGEST_REMEMBERED: usize = 64;

/// The merges and what they begin with.
#[derive(Debug)]
pub(super) struct Bpe {
    merges: Merges,
    byte_ids: [Option<u32>; 256],
    start: Start,
}

/// What a word is before anything is merged.
#[derive(Debug)]
enum Start {
    Bytes(PreTokenizer),
    Characters,
}

impl Bpe {
    /// `gpt2`: words cut by `pre`, merged from bytes.
    pub(super) fn bytes(
        merges: &[&str],
        pre: PreTokenizer,
        vocabulary: &Vocabulary,
    ) -> Result<Bpe, Error> {
        let byte_id = |byte: usize| vocabulary.text_id(bytes::to_byte_level(byte as u8).encode_utf8(&mut [0; 4]));
        Ok(Bpe {
            merges: Merges::new(merges, vocabulary)?,
            byte_ids: std::array::from_fn(byte_id),
            start: Start::Bytes(pre),
        })
    }

    /// `gemma4`: lines, merged from characters.
    pub(super) fn characters(merges: &[&str], vocabulary: &Vocabulary) -> Result<Bpe, Error> {
        Ok(Bpe {
            merges: Merges::new(merges, vocabulary)?,
            byte_ids: vocabulary.byte_ids(),
            start: Start::Characters,
        })
    }

    /// Appends the tokens of `text`, which has no special tokens.
    pub(super) fn encode(&self, text: &str, vocabulary: &Vocabulary, out: &mut Vec<u32>) {
        match &self.start {
            Start::Bytes(pre) => self.encode_words(text, pre, vocabulary, out),
            Start::Characters => self.encode_lines(text, vocabulary, out),
        }
    }

    /// A word that occurred before is copied from where its tokens stand.
    fn encode_words(&self, text: &str, pre: &PreTokenizer, vocabulary: &Vocabulary, out: &mut Vec<u32>) {
        let mut seen = HashMap::new();
        let mut scratch = Word::default();
        let mut name = String::new();
        for word in pre.words(text) {
            let word = &text[word];
            if let Some(tokens) = seen.get(word).cloned() {
                out.extend_from_within(tokens);
                continue;
            }
            let start = out.len();
            match pre.whole_words.then(|| whole(word, vocabulary, &mut name)).flatten() {
                Some(token) => out.push(token),
                None => self.encode_word(word, &mut scratch, out),
            }
            if word.len() <= LONGEST_REMEMBERED {
                seen.insert(word, start..out.len());
            }
        }
    }

    fn encode_word(&self, word: &str, scratch: &mut Word, out: &mut Vec<u32>) {
        scratch.clear();
        for byte in word.bytes() {
            scratch.push(self.byte_ids[usize::from(byte)]);
        }
        scratch.merge(&self.merges);
        out.extend(scratch.tokens());
    }

    fn encode_lines(&self, text: &str, vocabulary: &Vocabulary, out: &mut Vec<u32>) {
        let text = text.replace(' ', "▁");
        let mut scratch = Word::default();
        let mut rest = &*text;
        while !rest.is_empty() {
            let breaks = rest.starts_with('\n');
            let end = rest.find(|character| (character == '\n') != breaks).unwrap_or(rest.len());
            let line;
            (line, rest) = rest.split_at(end);
            match vocabulary.text_id(line).filter(|_| breaks) {
                Some(token) => out.push(token),
                None => self.encode_line(line, &mut scratch, vocabulary, out),
            }
        }
    }

    fn encode_line(&self, line: &str, scratch: &mut Word, vocabulary: &Vocabulary, out: &mut Vec<u32>) {
        scratch.clear();
        for character in line.chars() {
            let mut buffer = [0; 4];
            let character = &*character.encode_utf8(&mut buffer);
            match vocabulary.text_id(character) {
                Some(token) => scratch.push(Some(token)),
                None => character.bytes().for_each(|byte| scratch.push(self.byte_ids[usize::from(byte)])),
            }
        }
        scratch.merge(&self.merges);
        out.extend(scratch.tokens());
    }
}

/// The token that is the whole of `word`, which is written into `name` in GPT-2's alphabet.
fn whole(word: &str, vocabulary: &Vocabulary, name: &mut String) -> Option<u32> {
    name.clear();
    name.extend(word.bytes().map(bytes::to_byte_level));
    vocabulary.text_id(name)
}
