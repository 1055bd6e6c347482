//! A folder's tokenizer in the keys of a GGUF file.
//!
//! `tokenizer.json` says how it cuts text by patterns, a GGUF file by a name. The name is found by trial: the first that
//! gives the folder's own ids for [`PROBE`] is taken, and a tokenizer that no name fits is refused. Byte-level BPE becomes
//! `gpt2`, BPE on characters with a fallback to bytes becomes `llama`, whose scores are the ranks of its merges.

use std::path::Path;

use serde_json::Value;

use super::hugging_face::read_folder;
use super::patterns::FAMILIES;
use super::{Encode, Ends, Error, GgufVocabulary, Marks, Tokenizer};
use crate::weights::gguf::OwnedValue;

/// Text on which tokenizers differ: cases, contractions, digits, spaces, lines, marks, scripts, emoji.
pub(super) const PROBE: &str = "Hello, WORLD! I'm sure they've gone; it'S 1,234,567.89 or 2026.\n\n\n  Two  spaces,\ttabs\t\tand \
    trailing ones   \n--> x=y+z*(a/b)_c #!? camelCase snake_case\r\n\u{e9}t\u{e9} na\u{ef}ve \u{3a9}\u{3b1} \
    \u{4e2d}\u{6587}\u{ff0c}\u{65e5}\u{672c}\u{8a9e} \u{43f}\u{440}\u{438}\u{432}\u{435}\u{442} \u{1f680}\u{1f44d}\u{1f3fd} \
    \u{ac00}\u{b098} \u{e01}\u{e33} e\u{301} ''' \"q\" don't DON'T 3 33 333 3333 \u{a0}\u{3000} ";

/// A vocabulary taken from a `tokenizer.json`.
struct Export {
    byte_level: bool,
    tokens: Vec<String>,
    types: Vec<i32>,
    merges: Vec<String>,
    scores: Vec<f32>,
}

impl Tokenizer {
    /// The keys that describe a folder's tokenizer, its chat template among them, with unused tokens up to `vocab`.
    ///
    /// # Errors
    ///
    /// Those of [`Tokenizer::from_folder`]; [`Error::HuggingFace`] for a tokenizer that GGUF has no kind for.
    pub(crate) fn gguf_keys(
        folder: &Path,
        vocab: usize,
    ) -> Result<Vec<(String, OwnedValue)>, Error> {
        let (json, config) = read_folder(folder)?;
        let own = Tokenizer::from_hugging_face(&json, config.as_deref())?;
        let json: Value = serde_json::from_slice(&json).map_err(wrong)?;
        let config: Value = config
            .map_or(Ok(Value::Null), |config| serde_json::from_slice(&config))
            .map_err(wrong)?;
        let export = Export::new(&json, vocab)?;
        let pre = export.pre(&own)?;
        let mut keys = export.keys(pre);
        let roles = &own.vocabulary.roles;
        for (name, id) in [
            ("bos", roles.bos),
            ("eos", roles.eos),
            ("unknown", roles.unknown),
            ("padding", roles.padding),
        ] {
            keys.extend(id.map(|id| (format!("tokenizer.ggml.{name}_token_id"), id.into())));
        }
        keys.push(("tokenizer.ggml.add_bos_token".to_owned(), own.add_bos.into()));
        keys.push(("tokenizer.ggml.add_eos_token".to_owned(), own.add_eos.into()));
        if !export.byte_level {
            let space = own.adds_space();
            keys.push(("tokenizer.ggml.add_space_prefix".to_owned(), space.into()));
        }
        if let Some(template) = config["chat_template"].as_str() {
            keys.push(("tokenizer.chat_template".to_owned(), template.into()));
        }
        Ok(keys)
    }
}

#[allow(clippy::needless_pass_by_value, reason = "the form that map_err wants")]
fn wrong(reason: impl ToString) -> Error {
    Error::HuggingFace { reason: reason.to_string() }
}

impl Export {
    fn new(json: &Value, vocab: usize) -> Result<Export, Error> {
        let model = &json["model"];
        let fallback = model["byte_fallback"].as_bool().unwrap_or(false);
        if model["type"] != "BPE" {
            let found = &model["type"];
            return Err(wrong(format!("GGUF files are made of BPE tokenizers, not of {found}")));
        }
        let unknown = model["unk_token"].as_str();
        let unused = |id: usize| format!("[PAD{id}]");
        let mut tokens: Vec<String> = (0..vocab).map(unused).collect();
        let mut types = vec![5; vocab];
        let mut place = |text: &str, id: Option<u64>, kind| {
            let id = id.and_then(|id| usize::try_from(id).ok()).filter(|&id| id < vocab);
            let id = id.ok_or_else(|| wrong(format!("the id of {text:?} is not below {vocab}")))?;
            text.clone_into(&mut tokens[id]);
            types[id] = kind;
            Ok::<_, Error>(())
        };
        for (text, id) in model["vocab"].as_object().into_iter().flatten() {
            let kind = match text {
                _ if Some(text.as_str()) == unknown => 2,
                _ if fallback && super::bytes::parse_hexadecimal(text).is_some() => 6,
                _ => 1,
            };
            place(text, id.as_u64(), kind)?;
        }
        for token in json["added_tokens"].as_array().into_iter().flatten() {
            let text = token["content"].as_str().unwrap_or_default();
            let kind = if token["special"] == true { 3 } else { 4 };
            let kind = if Some(text) == unknown { 2 } else { kind };
            place(text, token["id"].as_u64(), kind)?;
        }
        let merges = model["merges"].as_array().into_iter().flatten().map(merge);
        let merges = merges.collect::<Result<Vec<_>, _>>()?;
        let byte_level = !fallback;
        let scores = if byte_level { vec![] } else { scores(&tokens, &merges) };
        Ok(Export { byte_level, tokens, types, merges, scores })
    }

    /// The name of the cut that gives the ids of `own`.
    fn pre(&self, own: &Tokenizer) -> Result<&'static str, Error> {
        let encode = Encode { ends: Ends::Bare, marks: Marks::Text };
        let expected = own.encode(PROBE, encode)?;
        let only = ["default"];
        let names: Vec<&str> = match self.byte_level {
            true => FAMILIES.iter().filter_map(|family| family.names.first().copied()).collect(),
            false => only.to_vec(),
        };
        for name in names {
            let vocabulary = self.vocabulary(name, own);
            let found = Tokenizer::from_vocabulary(&vocabulary)?.encode(PROBE, encode)?;
            if found == expected {
                return Ok(name);
            }
        }
        Err(wrong("no tokenizer of GGUF files gives its ids"))
    }

    fn vocabulary<'a>(&'a self, pre: &'a str, own: &Tokenizer) -> GgufVocabulary<'a> {
        GgufVocabulary {
            model: self.model(),
            pre: Some(pre),
            tokens: self.tokens.iter().map(String::as_str).collect(),
            scores: (!self.byte_level).then(|| self.scores.clone()),
            token_types: Some(self.types.clone()),
            merges: self.byte_level.then(|| self.merges.iter().map(String::as_str).collect()),
            unknown: own.vocabulary.roles.unknown,
            add_bos: Some(false),
            add_eos: Some(false),
            add_space_prefix: Some(own.adds_space()),
            ..GgufVocabulary::default()
        }
    }

    fn model(&self) -> &'static str {
        if self.byte_level { "gpt2" } else { "llama" }
    }

    fn keys(&self, pre: &str) -> Vec<(String, OwnedValue)> {
        let key = |name: &str, value| (format!("tokenizer.ggml.{name}"), value);
        let mut keys = vec![
            key("model", self.model().into()),
            key("pre", pre.into()),
            key("tokens", self.tokens.clone().into()),
            key("token_type", self.types.clone().into()),
        ];
        keys.push(match self.byte_level {
            true => key("merges", self.merges.clone().into()),
            false => key("scores", self.scores.clone().into()),
        });
        keys
    }
}

/// A merge in the form of GGUF: two tokens with a space between.
fn merge(merge: &Value) -> Result<String, Error> {
    let parts = merge.as_array().map(|parts| {
        let texts = parts.iter().filter_map(Value::as_str);
        texts.collect::<Vec<_>>().join(" ")
    });
    let text = parts.or_else(|| merge.as_str().map(str::to_owned));
    text.ok_or_else(|| wrong(format!("the merge {merge} is no pair of tokens")))
}

/// Minus the rank of the first merge that makes each token; others are merged into last, if at all.
fn scores(tokens: &[String], merges: &[String]) -> Vec<f32> {
    let mut ranks = std::collections::HashMap::new();
    for (rank, merge) in merges.iter().enumerate() {
        let (left, right) = merge.split_once(' ').unwrap_or((merge, ""));
        ranks.entry(format!("{left}{right}")).or_insert(rank);
    }
    let score = |token: &String| -(*ranks.get(token).unwrap_or(&merges.len()) as f32);
    tokens.iter().map(score).collect()
}
