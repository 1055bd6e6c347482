//! The tokenizers of Hugging Face folders, run by the `tokenizers` crate.
//!
//! Encoding is that crate's. Decoding goes by the bytes of each token, so that it streams; the decoders of byte-level
//! BPE and of SentencePiece are known, and a `tokenizer.json` with another is refused.

use std::path::Path;
use std::sync::OnceLock;

use serde_json::Value;

use super::vocabulary::{Alphabet, Roles, TokenKind, Vocabulary};
use super::{Error, Model, Tokenizer, bytes};

/// A `tokenizer.json`, ready to encode.
#[derive(Debug)]
pub(super) struct HuggingFace {
    /// Finds marks in a text.
    tokenizer: tokenizers::Tokenizer,
    /// Takes marks for text; made when first needed.
    literal: OnceLock<tokenizers::Tokenizer>,
    pub(super) space_prefix: bool,
}

impl HuggingFace {
    /// The tokens of `text`, with what the post-processor puts around it if `around`.
    pub(super) fn encode(&self, text: &str, around: bool, marks: bool) -> Result<Vec<u32>, Error> {
        let tokenizer =
            if marks { &self.tokenizer } else { self.literal.get_or_init(|| self.literal()) };
        match tokenizer.encode_fast(text, around) {
            Ok(encoding) => Ok(encoding.get_ids().to_vec()),
            Err(error) => Err(Error::Encode { reason: error.to_string() }),
        }
    }

    fn literal(&self) -> tokenizers::Tokenizer {
        let mut tokenizer = self.tokenizer.clone();
        tokenizer.set_encode_special_tokens(true);
        tokenizer
    }
}

impl Tokenizer {
    /// Builds the tokenizer of a Hugging Face folder: `tokenizer.json` and, for the begin and end tokens,
    /// `tokenizer_config.json` where there is one. Reads both whole.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] when a file can't be read, and those of [`Tokenizer::from_hugging_face`].
    pub fn from_folder(folder: &Path) -> Result<Tokenizer, Error> {
        let (json, config) = read_folder(folder)?;
        Tokenizer::from_hugging_face(&json, config.as_deref())
    }

    /// Whether a space is put before a text.
    pub(super) fn adds_space(&self) -> bool {
        matches!(&self.model, Model::HuggingFace(model) if model.space_prefix)
    }

    /// Builds a tokenizer from the contents of `tokenizer.json` and `tokenizer_config.json`.
    ///
    /// # Errors
    ///
    /// [`Error::HuggingFace`] when they can't be read or have a decoder that can't stream, and an error for ids that
    /// are far apart.
    pub fn from_hugging_face(json: &[u8], config: Option<&[u8]>) -> Result<Tokenizer, Error> {
        let description: Value = serde_json::from_slice(json).map_err(wrong)?;
        let config = config.map_or(Ok(Value::Null), serde_json::from_slice).map_err(wrong)?;
        let mut tokenizer = tokenizers::Tokenizer::from_bytes(json).map_err(wrong)?;
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(wrong)?;
        tokenizer.set_encode_special_tokens(false);
        let decoder = Decoder::of(&description["decoder"])?;
        let vocabulary = vocabulary(&tokenizer, &decoder, &config)?;
        let bare = tokenizer.encode_fast("", true).map_err(wrong)?;
        let adds = |role: Option<u32>| role.is_some_and(|id| bare.get_ids().contains(&id));
        let (add_bos, add_eos) = (adds(vocabulary.roles.bos), adds(vocabulary.roles.eos));
        let space_prefix = decoder.space_prefix;
        let model = HuggingFace { tokenizer, literal: OnceLock::new(), space_prefix };
        Ok(Tokenizer { vocabulary, add_bos, add_eos, model: Model::HuggingFace(Box::new(model)) })
    }
}

/// `tokenizer.json`, and `tokenizer_config.json` if there is one.
pub(super) fn read_folder(folder: &Path) -> Result<(Vec<u8>, Option<Vec<u8>>), Error> {
    let read = |name| {
        let path = folder.join(name);
        std::fs::read(&path).map_err(|source| Error::Io { path, source })
    };
    let config = match read("tokenizer_config.json") {
        Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => None,
        config => Some(config?),
    };
    Ok((read("tokenizer.json")?, config))
}

#[allow(clippy::needless_pass_by_value, reason = "the form that map_err wants")]
fn wrong(reason: impl ToString) -> Error {
    Error::HuggingFace { reason: reason.to_string() }
}

/// How tokens become text.
struct Decoder {
    alphabet: Alphabet,
    bytes: bool,
    space_prefix: bool,
}

impl Decoder {
    /// Reads the `decoder` of a `tokenizer.json`: `ByteLevel`, `Metaspace`, or the steps that llama's has.
    fn of(description: &Value) -> Result<Decoder, Error> {
        let list = std::slice::from_ref(description);
        let steps = description["decoders"].as_array().map_or(list, Vec::as_slice);
        let mut decoder =
            Decoder { alphabet: Alphabet::Escaped, bytes: false, space_prefix: false };
        let mut known = false;
        for step in steps {
            match step["type"].as_str() {
                Some("ByteLevel") => (decoder.alphabet, known) = (Alphabet::ByteLevel, true),
                Some("Metaspace") => {
                    let prepends = step["prepend_scheme"].as_str().map(|scheme| scheme != "never");
                    decoder.space_prefix =
                        prepends.or(step["add_prefix_space"].as_bool()).unwrap_or(true);
                    known = true;
                }
                Some("Replace") if step["pattern"]["String"] == "▁" => known = true,
                Some("ByteFallback") => decoder.bytes = true,
                Some("Strip") => decoder.space_prefix = step["start"].as_u64() == Some(1),
                Some("Fuse") => {}
                other => return Err(wrong(format!("its decoder {other:?} can't stream"))),
            }
        }
        if known { Ok(decoder) } else { Err(wrong("it has no decoder of text")) }
    }
}

fn vocabulary(
    tokenizer: &tokenizers::Tokenizer,
    decoder: &Decoder,
    config: &Value,
) -> Result<Vocabulary, Error> {
    let ids = tokenizer.get_vocab(true);
    let size = ids.values().max().map_or(0, |&id| id as usize + 1);
    // Ids may have gaps, but memory goes by the greatest.
    let limit = 2 * ids.len() + 1024;
    if size > limit {
        return Err(Error::Limit { what: "the greatest token id", found: size, limit });
    }
    let mut tokens = vec![""; size];
    for (text, &id) in &ids {
        tokens[id as usize] = text;
    }
    let mut kinds: Vec<TokenKind> = tokens.iter().map(|text| decoder.kind(text)).collect();
    for (id, token) in tokenizer.get_added_tokens_decoder() {
        if let Some(kind) = kinds.get_mut(id as usize) {
            *kind = if token.special { TokenKind::Control } else { TokenKind::UserDefined };
        }
    }
    let role = |name: &str| {
        let value = &config[name];
        let text = value.as_str().or(value["content"].as_str())?;
        ids.get(text).copied()
    };
    let roles = Roles {
        bos: role("bos_token"),
        eos: role("eos_token"),
        eot: None,
        unknown: role("unk_token"),
        padding: role("pad_token"),
    };
    Vocabulary::new(&tokens, kinds, decoder.alphabet, roles)
}

impl Decoder {
    fn kind(&self, text: &str) -> TokenKind {
        match text {
            "" => TokenKind::Unused,
            _ if self.bytes && bytes::parse_hexadecimal(text).is_some() => TokenKind::Byte,
            _ => TokenKind::Normal,
        }
    }
}
