//! Tokenizers for new models: the bytes themselves, byte pairs merged as often as they occur in the texts, or one that
//! exists.
//!
//! | `data.tokenizer` | tokens |
//! |---|---|
//! | `bytes` | 256 bytes and `<|endoftext|>` |
//! | `bpe` | `data.vocab`: the same, and merges within words (Sennrich et al. 2016; words as GPT-2 cuts them) |
//! | a folder, a `tokenizer.json`, a GGUF file | its own |
//!
//! All are a `tokenizer.json` in the end, which lies beside the model.

use std::path::Path;

use serde_json::{Map, Value, json};
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, TokenizerBuilder};

use super::Error;
use super::corpus::pieces;
use crate::tokenizer::{Tokenizer, byte_level_character, gguf_to_json};
use crate::weights::{Description, Weights};

/// The token between documents.
const END: &str = "<|endoftext|>";

/// What stands for hidden tokens, where those are to be predicted.
const MASK: &str = "<|mask|>";
/// What others call it.
const MASKS: [&str; 3] = [MASK, "[MASK]", "<mask>"];

/// Bytes of a text that are read at a time.
const PIECE: usize = 1 << 16;

/// A tokenizer and the files that describe it.
#[derive(Debug)]
pub struct Vocabulary {
    /// The tokenizer.
    pub tokenizer: Tokenizer,
    /// `tokenizer.json`.
    pub json: Vec<u8>,
    /// `tokenizer_config.json`.
    pub config: Option<Vec<u8>>,
}

impl Vocabulary {
    /// The tokenizer that `name` stands for. `texts` are what a new one is made from, with `vocab` tokens, `<|mask|>` among
    /// them if `mask`.
    ///
    /// # Errors
    ///
    /// [`Error::Vocabulary`] for texts that give no such tokenizer; [`Error::Model`] for a file that has none.
    pub fn new(
        name: &str,
        (vocab, mask): (usize, bool),
        texts: &[String],
    ) -> Result<Vocabulary, Error> {
        let marks: &[&str] = if mask { &[END, MASK] } else { &[END] };
        match name {
            "bytes" => {
                let json = bytes(marks).to_string().into_bytes();
                Ok(Vocabulary::from_json(json, Some(end_config()))?)
            }
            "bpe" => Ok(Vocabulary::from_json(train(vocab, marks, texts)?, Some(end_config()))?),
            path => Ok(Vocabulary::open(path.as_ref())?),
        }
    }

    /// That of a folder, of a `tokenizer.json`, or of a GGUF file.
    ///
    /// # Errors
    ///
    /// For one that can't be read, or that a folder has no form for.
    pub fn open(path: &Path) -> Result<Vocabulary, crate::Error> {
        if path.extension().is_some_and(|ending| ending.eq_ignore_ascii_case("gguf")) {
            let weights = Weights::open(path)?;
            if let Description::Gguf(metadata) = weights.description() {
                let (json, config) = gguf_to_json(metadata)?;
                return Vocabulary::from_json(json, Some(config));
            }
        }
        let read = |path: &Path| match std::fs::read(path) {
            Ok(bytes) => Ok(bytes),
            Err(source) => Err(crate::tokenizer::Error::Io { path: path.to_owned(), source }),
        };
        let (file, folder) = match path.is_dir() {
            true => (path.join("tokenizer.json"), path),
            false => (path.to_owned(), path.parent().unwrap_or(path)),
        };
        let config = folder.join("tokenizer_config.json");
        let config = config.exists().then(|| read(&config)).transpose()?;
        Vocabulary::from_json(read(&file)?, config)
    }

    /// The token for what is hidden.
    pub fn mask(&self) -> Option<u32> {
        MASKS.iter().find_map(|name| self.tokenizer.token_named(name))
    }

    fn from_json(json: Vec<u8>, config: Option<Vec<u8>>) -> Result<Vocabulary, crate::Error> {
        let tokenizer = Tokenizer::from_hugging_face(&json, config.as_deref())?;
        Ok(Vocabulary { tokenizer, json, config })
    }
}

fn end_config() -> Vec<u8> {
    json!({"bos_token": END, "eos_token": END}).to_string().into_bytes()
}

/// What cuts words and writes bytes.
fn level() -> Value {
    json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true})
}

/// A tokenizer whose tokens are the bytes, and marks.
fn bytes(marks: &[&str]) -> Value {
    let vocab: Map<String, Value> =
        (0..=255).map(|byte| (byte_level_character(byte).to_string(), byte.into())).collect();
    let marks = marks.iter().enumerate().map(|(n, text)| {
        json!({
            "id": 256 + n, "content": text, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true,
        })
    });
    json!({
        "version": "1.0", "normalizer": null, "post_processor": null,
        "added_tokens": marks.collect::<Vec<Value>>(),
        "pre_tokenizer": level(), "decoder": level(),
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    })
}

/// A byte-level BPE of the texts.
fn train(vocab: usize, marks: &[&str], texts: &[String]) -> Result<Vec<u8>, Error> {
    let failed = |error: tokenizers::Error| Error::Vocabulary { reason: error.to_string() };
    let cut = ByteLevel::new(false, true, true);
    let mut tokenizer =
        TokenizerBuilder::<_, tokenizers::NormalizerWrapper, _, ByteLevel, _>::new()
            .with_model(BPE::default())
            .with_pre_tokenizer(Some(cut))
            .with_decoder(Some(cut))
            .build()
            .map_err(failed)?;
    let mut trainer = BpeTrainer::builder()
        .vocab_size(vocab)
        .show_progress(false)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .special_tokens(marks.iter().map(|&mark| AddedToken::from(mark, true)).collect())
        .build();
    let pieces = texts.iter().flat_map(|text| pieces(text, PIECE).map(str::to_owned));
    tokenizer.train(&mut trainer, pieces).map_err(failed)?;
    let json = tokenizer.to_string(false).map_err(failed)?;
    let found = tokenizer.get_vocab_size(true);
    if found < 257 {
        return Err(Error::Vocabulary { reason: format!("the texts give {found} tokens only") });
    }
    Ok(json.into_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::Encode;

    const TEXT: &str = "It is a truth universally acknowledged, that a single man in possession of a good \
        fortune, must be in want of a wife.\n\nHowever little known the feelings or views of such a man\u{2026}";

    #[test]
    fn bytes_are_their_own_tokens() {
        let vocabulary = Vocabulary::new("bytes", (0, false), &[]).unwrap();
        let tokenizer = &vocabulary.tokenizer;
        assert_eq!(tokenizer.vocab_size(), 257);
        assert_eq!(tokenizer.eos(), Some(256));
        let ids = tokenizer.encode(TEXT, Encode::TEXT).unwrap();
        assert!(ids.iter().zip(TEXT.bytes()).all(|(&id, byte)| id == u32::from(byte)));
        assert_eq!(tokenizer.decode(&ids).unwrap(), TEXT);
    }

    #[test]
    fn what_is_hidden_has_a_token_of_its_own() {
        for name in ["bytes", "bpe"] {
            let mask =
                |mask| Vocabulary::new(name, (270, mask), &[TEXT.to_owned()]).unwrap().mask();
            assert!(mask(true).is_some() && mask(false).is_none(), "{name}");
        }
    }

    #[test]
    fn merges_come_from_the_texts_and_are_always_the_same() {
        let texts = [TEXT.to_owned(), "a man and a wife".to_owned()];
        let vocabulary = Vocabulary::new("bpe", (280, false), &texts).unwrap();
        let again = Vocabulary::new("bpe", (280, false), &texts).unwrap();
        assert!(vocabulary.json == again.json);
        let tokenizer = &vocabulary.tokenizer;
        assert_eq!(tokenizer.vocab_size(), 280);
        let end = tokenizer.eos().unwrap();
        assert_eq!(tokenizer.token_bytes(end), Some(END.as_bytes()));
        let ids = tokenizer.encode(TEXT, Encode::TEXT).unwrap();
        assert!(ids.len() < TEXT.len() * 4 / 5, "{}", ids.len());
        assert_eq!(tokenizer.decode(&ids).unwrap(), TEXT);
    }
}
