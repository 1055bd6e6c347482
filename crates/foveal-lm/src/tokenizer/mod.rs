//! Text to token ids and back, as the models were trained.
//!
//! | GGUF `tokenizer.ggml.model` | what it is | here |
//! |---|---|---|
//! | `gpt2` | BPE on the bytes of words, cut as `tokenizer.ggml.pre` says | `bpe.rs` |
//! | `gemma4` | BPE on the characters of lines | `bpe.rs` |
//! | `llama` | SentencePiece's merging by score | `sentencepiece.rs` |
//! | (a folder's `tokenizer.json`) | whatever the `tokenizers` crate reads | `hugging_face.rs` |
//!
//! The first three give the ids that llama.cpp gives, on all the vectors that it ships; `bert`, `t5`, `rwkv` and other
//! kinds are refused with an error that names these three.
//!
//! ```no_run
//! use foveal_lm::tokenizer::{Encode, Tokenizer};
//! use foveal_lm::weights::Gguf;
//!
//! let file = Gguf::open("model.gguf".as_ref())?;
//! let tokenizer = Tokenizer::from_gguf(file.metadata())?;
//! let prompt = tokenizer.encode("The capital of France is", Encode::PROMPT)?;
//! assert_eq!(tokenizer.decode(&prompt)?, "The capital of France is");
//! # Ok::<(), foveal_lm::tokenizer::Error>(())
//! ```

mod bpe;
mod bytes;
mod error;
mod export;
mod gguf;
mod gguf_to_json;
mod hugging_face;
mod merges;
mod patterns;
mod pretokenizer;
mod sentencepiece;
mod special;
mod stream;
mod vocabulary;

pub(crate) use bytes::to_byte_level as byte_level_character;
pub use error::Error;
pub(crate) use gguf_to_json::gguf_to_json;
pub use stream::StreamDecoder;
pub use vocabulary::{GgufVocabulary, TokenKind};

use bpe::Bpe;
use hugging_face::HuggingFace;
use pretokenizer::PreTokenizer;
use sentencepiece::SentencePiece;
use special::{Fragment, SpecialTokens};
use vocabulary::{Alphabet, Roles, Vocabulary};

/// The kinds of tokenizer of GGUF files that are supported.
const MODELS: &[&str] = &["gpt2", "gemma4", "llama"];

/// What to make of a text's ends, and of marks such as `<|im_end|>` in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Encode {
    /// Whether to add what the model wants around a text, such as the begin token.
    pub ends: Ends,
    /// Whether marks in the text are tokens.
    pub marks: Marks,
}

/// Whether to add what the model wants around a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ends {
    /// The text alone.
    Bare,
    /// The begin and end tokens that the model's file asks for.
    AsTrained,
}

/// What `<|im_end|>` and its like in a text are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Marks {
    /// Characters like any others: for what a user typed.
    Text,
    /// Their tokens: for a filled-in chat template.
    Tokens,
}

impl Encode {
    /// A part of a text, taken literally.
    pub const TEXT: Encode = Encode { ends: Ends::Bare, marks: Marks::Text };
    /// A whole text, taken literally.
    pub const PROMPT: Encode = Encode { ends: Ends::AsTrained, marks: Marks::Text };
    /// A filled-in chat template, which has its own begin token.
    pub const TEMPLATE: Encode = Encode { ends: Ends::Bare, marks: Marks::Tokens };
}

/// A model's tokenizer. Immutable; any number of threads may use it.
#[derive(Debug)]
pub struct Tokenizer {
    vocabulary: Vocabulary,
    add_bos: bool,
    add_eos: bool,
    model: Model,
}

#[derive(Debug)]
enum Model {
    Bpe(Bpe, SpecialTokens),
    SentencePiece(SentencePiece, SpecialTokens),
    HuggingFace(Box<HuggingFace>),
}

impl Tokenizer {
    /// Builds the tokenizer that a GGUF file describes.
    ///
    /// Takes memory of a few times the text of the tokens and merges.
    ///
    /// # Errors
    ///
    /// [`Error::Model`] and [`Error::PreTokenizer`] for kinds that aren't supported, and an error for whatever is wrong
    /// with the lists: lengths that differ, tokens that are there twice, merges of what is no token, ids out of range.
    pub fn from_vocabulary(source: &GgufVocabulary<'_>) -> Result<Tokenizer, Error> {
        match source.model {
            "gpt2" => Tokenizer::byte_level(source),
            "gemma4" => Tokenizer::character_level(source),
            "llama" => Tokenizer::sentence_piece(source),
            found => Err(Error::Model { found: found.to_owned(), supported: MODELS }),
        }
    }

    fn byte_level(source: &GgufVocabulary<'_>) -> Result<Tokenizer, Error> {
        let pre = PreTokenizer::named(source.pre.unwrap_or("default"))?;
        let add_bos = pre.add_bos;
        let merges =
            source.merges.as_ref().ok_or(Error::Missing { model: "gpt2", what: "merges" })?;
        let vocabulary = Vocabulary::from_gguf(source, Alphabet::ByteLevel, Roles::default())?;
        let bpe = Bpe::bytes(merges, pre, &vocabulary)?;
        let special = SpecialTokens::new(&source.tokens, &vocabulary)?;
        Ok(Tokenizer::assemble(source, vocabulary, add_bos, Model::Bpe(bpe, special)))
    }

    fn character_level(source: &GgufVocabulary<'_>) -> Result<Tokenizer, Error> {
        let merges =
            source.merges.as_ref().ok_or(Error::Missing { model: "gemma4", what: "merges" })?;
        let vocabulary = Vocabulary::from_gguf(source, Alphabet::Escaped, Roles::default())?;
        let bpe = Bpe::characters(merges, &vocabulary)?;
        let special = SpecialTokens::new(&source.tokens, &vocabulary)?;
        Ok(Tokenizer::assemble(source, vocabulary, true, Model::Bpe(bpe, special)))
    }

    fn sentence_piece(source: &GgufVocabulary<'_>) -> Result<Tokenizer, Error> {
        let defaults = Roles { unknown: Some(0), bos: Some(1), eos: Some(2), ..Roles::default() };
        let vocabulary = Vocabulary::from_gguf(source, Alphabet::Escaped, defaults)?;
        let prefix = source.add_space_prefix.unwrap_or(true);
        let scores = source.scores.as_deref();
        let model = SentencePiece::new(scores, prefix, &source.tokens, &vocabulary)?;
        let special = SpecialTokens::new(&source.tokens, &vocabulary)?;
        Ok(Tokenizer::assemble(source, vocabulary, true, Model::SentencePiece(model, special)))
    }

    fn assemble(
        source: &GgufVocabulary<'_>,
        vocabulary: Vocabulary,
        add_bos: bool,
        model: Model,
    ) -> Tokenizer {
        Tokenizer {
            vocabulary,
            add_bos: source.add_bos.unwrap_or(add_bos),
            add_eos: source.add_eos.unwrap_or(false),
            model,
        }
    }

    /// The ids of `text`. Time O(n log n) for n bytes, whatever the text.
    ///
    /// # Errors
    ///
    /// Never for a GGUF tokenizer. [`Error::Encode`] when a `tokenizer.json` can't encode the text.
    pub fn encode(&self, text: &str, how: Encode) -> Result<Vec<u32>, Error> {
        let marks = how.marks == Marks::Tokens;
        let around = how.ends == Ends::AsTrained;
        let mut out = Vec::with_capacity(text.len() / 4 + 2);
        if let Model::HuggingFace(model) = &self.model {
            return model.encode(text, around, marks);
        }
        out.extend(self.vocabulary.roles.bos.filter(|_| around && self.add_bos));
        self.encode_fragments(text, marks, &mut out);
        out.extend(self.vocabulary.roles.eos.filter(|_| around && self.add_eos));
        Ok(out)
    }

    fn encode_fragments(&self, text: &str, marks: bool, out: &mut Vec<u32>) {
        let special = match &self.model {
            Model::Bpe(_, special) | Model::SentencePiece(_, special) => special,
            Model::HuggingFace(_) => return,
        };
        let mut start = true;
        for fragment in special.split(text, marks) {
            match (fragment, &self.model) {
                (Fragment::Token(token), _) => out.push(token),
                (Fragment::Text(range), Model::Bpe(bpe, _)) => {
                    bpe.encode(&text[range], &self.vocabulary, out);
                }
                (Fragment::Text(range), Model::SentencePiece(model, _)) => {
                    model.encode(&text[range], start, &self.vocabulary, out);
                    start = false;
                    continue;
                }
                (Fragment::Text(_), Model::HuggingFace(_)) => {}
            }
            start = true;
        }
    }

    /// The text of a whole sequence, without marks such as `<|im_end|>`; bytes that are no UTF-8 become U+FFFD.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfRange`] for a token that is not in the vocabulary.
    pub fn decode(&self, tokens: &[u32]) -> Result<String, Error> {
        let mut decoder = StreamDecoder::new(self);
        let mut text = String::with_capacity(tokens.len() * 4);
        for &token in tokens {
            text.push_str(&decoder.push(token)?);
        }
        text.push_str(&decoder.finish());
        Ok(text)
    }

    /// The bytes that `token` stands for, or the text of a mark; `None` when it is not in the vocabulary.
    ///
    /// A space that the tokenizer put before a text is part of the bytes of its first token.
    pub fn token_bytes(&self, token: u32) -> Option<&[u8]> {
        self.vocabulary.piece(token)
    }

    /// What `token` is for; `None` when it is not in the vocabulary.
    pub fn token_kind(&self, token: u32) -> Option<TokenKind> {
        self.vocabulary.kind(token)
    }

    /// The token that is written `text` in the model's file, such as `<|im_end|>`.
    pub fn token_named(&self, text: &str) -> Option<u32> {
        self.vocabulary.id(text)
    }

    /// The number of tokens: one more than the greatest id.
    pub fn vocab_size(&self) -> usize {
        self.vocabulary.len()
    }

    /// The token that begins a text.
    pub fn bos(&self) -> Option<u32> {
        self.vocabulary.roles.bos
    }

    /// The token that ends a text.
    pub fn eos(&self) -> Option<u32> {
        self.vocabulary.roles.eos
    }

    /// The token that ends a turn of a chat.
    pub fn eot(&self) -> Option<u32> {
        self.vocabulary.roles.eot
    }

    /// The token for text that has none.
    pub fn unknown(&self) -> Option<u32> {
        self.vocabulary.roles.unknown
    }

    /// The token that fills up a batch.
    pub fn padding(&self) -> Option<u32> {
        self.vocabulary.roles.padding
    }

    /// Whether a text is over after `token`.
    pub fn is_end(&self, token: u32) -> bool {
        self.vocabulary.ends().contains(&token)
    }

    /// All tokens after which a text is over, in ascending order.
    pub fn ends(&self) -> impl Iterator<Item = u32> {
        self.vocabulary.ends().iter().copied()
    }

    /// Whether a whole text gets the begin token.
    pub fn adds_bos(&self) -> bool {
        self.add_bos
    }

    /// Whether a text gets a space before it that is not part of it.
    pub(crate) fn adds_space_prefix(&self) -> bool {
        match &self.model {
            Model::Bpe(..) => false,
            Model::SentencePiece(model, _) => model.space_prefix,
            Model::HuggingFace(model) => model.space_prefix,
        }
    }

    /// The bytes that `token` adds to a text.
    fn visible_bytes(&self, token: u32, marks: bool) -> Result<&[u8], Error> {
        let size = self.vocab_size();
        let out_of_range = || Error::OutOfRange { what: "a token id", found: token, size };
        let kind = self.token_kind(token).ok_or_else(out_of_range)?;
        let piece = self.token_bytes(token).ok_or_else(out_of_range)?;
        Ok(if kind.is_mark() && !marks { &[] } else { piece })
    }
}
