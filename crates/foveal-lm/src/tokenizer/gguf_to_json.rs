//! The tokenizer of a GGUF file as `tokenizer.json` and `tokenizer_config.json`, for a folder.
//!
//! Byte-level BPE only. Its cut becomes patterns; those that other readers of `tokenizer.json` have no words for are
//! refused. What comes out is tried on a text, and refused unless it gives the same ids.

use serde_json::{Map, Value, json};

use super::export::PROBE;
use super::patterns::FAMILIES;
use super::pretokenizer::Cut;
use super::{Encode, Error, GgufVocabulary, TokenKind, Tokenizer};
use crate::weights::gguf::Metadata;

/// The two files.
pub(crate) fn gguf_to_json(metadata: &Metadata) -> Result<(Vec<u8>, Vec<u8>), Error> {
    let source = GgufVocabulary::from_metadata(metadata)?;
    if source.model != "gpt2" {
        let found = source.model;
        return Err(wrong(format!(
            "only GGUF tokenizers of the kind gpt2 can be written to a folder, not {found}"
        )));
    }
    let own = Tokenizer::from_vocabulary(&source)?;
    let config = config(&own, &source, metadata.get("tokenizer.chat_template")?);
    let json = json(&own, &source)?.to_string().into_bytes();
    let config = config.to_string().into_bytes();
    let made = Tokenizer::from_hugging_face(&json, Some(&config))?;
    for how in [Encode::PROMPT, Encode::TEMPLATE] {
        if made.encode(PROBE, how)? != own.encode(PROBE, how)? {
            return Err(wrong("what was made of the GGUF file's gives other ids"));
        }
    }
    Ok((json, config))
}

#[allow(clippy::needless_pass_by_value, reason = "the form that map_err wants")]
fn wrong(reason: impl ToString) -> Error {
    Error::HuggingFace { reason: reason.to_string() }
}

fn json(own: &Tokenizer, source: &GgufVocabulary<'_>) -> Result<Value, Error> {
    let name = source.pre.unwrap_or("default");
    let family = FAMILIES.iter().find(|family| family.names.contains(&name));
    let family = family.ok_or_else(|| wrong(format!("there is no cut {name:?}")))?;
    let mut steps =
        family.cuts.iter().map(|cut| split(cut, name)).collect::<Result<Vec<_>, _>>()?;
    let level = |regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": regex});
    steps.push(level(false));
    let vocab = source.tokens.iter().enumerate().map(|(id, text)| ((*text).to_owned(), id.into()));
    let merges = source.merges.iter().flatten().map(|merge| {
        // A piece may begin with a space of its own only in other alphabets.
        merge.split_once(' ').map(|(left, right)| json!([left, right]))
    });
    let merges: Option<Vec<Value>> = merges.collect();
    Ok(json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null,
        "added_tokens": added(own, source),
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": post_processor(own, source),
        "decoder": level(true),
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": family.whole_words,
            "vocab": vocab.collect::<Map<String, Value>>(),
            "merges": merges.ok_or_else(|| wrong("a merge is no pair of tokens"))?,
        },
    }))
}

/// A cut as a step of a pre-tokenizer.
fn split(cut: &Cut, name: &str) -> Result<Value, Error> {
    let pattern = match cut {
        // Set differences are written otherwise elsewhere.
        Cut::Only(pattern) | Cut::Words(pattern) if pattern.contains("--") => None,
        Cut::Only(pattern) => Some((*pattern).to_owned()),
        Cut::Words(pattern) => Some(format!(r"{pattern}|\s+(?!\S)|\s+")),
        Cut::DigitsByThree => None,
    };
    let pattern = pattern.ok_or_else(|| wrong(format!("the cut {name:?} has no form in it")))?;
    Ok(
        json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false}),
    )
}

/// Marks, and tokens that are found as they are.
fn added(own: &Tokenizer, source: &GgufVocabulary<'_>) -> Vec<Value> {
    let ids = source.tokens.iter().enumerate();
    let added = ids.filter_map(|(id, text)| {
        let special = match own.token_kind(id as u32)? {
            TokenKind::Control => true,
            TokenKind::UserDefined => false,
            _ => return None,
        };
        Some(json!({
            "id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": special,
        }))
    });
    added.collect()
}

/// Puts the begin and end tokens around a text where the file says so.
fn post_processor(own: &Tokenizer, source: &GgufVocabulary<'_>) -> Value {
    let token = |id: Option<u32>, wanted: bool| {
        id.filter(|_| wanted).and_then(|id| Some((id, *source.tokens.get(id as usize)?)))
    };
    let [before, after] = [token(own.bos(), own.add_bos), token(own.eos(), own.add_eos)];
    if before.is_none() && after.is_none() {
        return Value::Null;
    }
    let special = |token: &(u32, &str)| json!({"SpecialToken": {"id": token.1, "type_id": 0}});
    let sequence = json!({"Sequence": {"id": "A", "type_id": 0}});
    let mut single: Vec<Value> = before.iter().map(special).collect();
    single.push(sequence);
    single.extend(after.iter().map(special));
    let tokens = before
        .iter()
        .chain(&after)
        .map(|(id, text)| ((*text).to_owned(), json!({"id": text, "ids": [id], "tokens": [text]})));
    let pair =
        json!([{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}]);
    json!({
        "type": "TemplateProcessing", "single": single, "pair": pair,
        "special_tokens": tokens.collect::<Map<String, Value>>(),
    })
}

fn config(own: &Tokenizer, source: &GgufVocabulary<'_>, template: Option<&str>) -> Value {
    let mut config = json!({"tokenizer_class": "PreTrainedTokenizerFast"});
    // What ends a turn ends a text in a folder, which has no word for turns.
    for (key, id) in [
        ("bos_token", own.bos()),
        ("eos_token", own.eos()),
        ("unk_token", own.unknown()),
        ("pad_token", own.padding()),
    ] {
        if let Some(text) = id.and_then(|id| source.tokens.get(id as usize)) {
            config[key] = json!(text);
        }
    }
    if let Some(template) = template {
        config["chat_template"] = json!(template);
    }
    config
}
