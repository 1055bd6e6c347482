//! Vocabularies from strangers, and any text: an error, or ids in range whose text comes back the same in one go and
//! token by token.

use arbitrary::{Result, Unstructured};
use foveal_lm::tokenizer::{Encode, GgufVocabulary, StreamDecoder, Tokenizer};
use foveal_lm::weights::Gguf;
use std::collections::BTreeSet;

/// What tokens and texts are made of: letters, spaces and what stands for them, marks, bytes, several scripts.
const PARTS: &[&str] = &[
    "a",
    "b",
    "c",
    "ab",
    "e",
    "\u{301}",
    "é",
    "€",
    "😀",
    "中",
    " ",
    "  ",
    "\n",
    "\t",
    "▁",
    "Ġ",
    "Ċ",
    "0",
    "12",
    "'s",
    "'",
    "!",
    "<0x41>",
    "<0xE2>",
    "<|im_end|>",
    "<s>",
    "</s>",
    "<unk>",
    "<",
    "\0",
    "\u{fffd}",
    "\u{202e}",
];

/// A GGUF file with a vocabulary, or a vocabulary in parts, and a text.
pub fn tokenizer(bytes: &[u8]) {
    if bytes.starts_with(b"GGUF") {
        let Ok(file) = Gguf::from_bytes(bytes.to_vec()) else { return };
        if let Ok(tokenizer) = Tokenizer::from_gguf(file.metadata()) {
            assert_consistent(&tokenizer, "Hello, it's 1 <|im_end|>\n é 中 😀");
        }
        return;
    }
    let mut input = Unstructured::new(bytes);
    let Ok(parts) = Parts::read(&mut input) else { return };
    let Ok(tokenizer) = Tokenizer::from_vocabulary(&parts.vocabulary()) else { return };
    assert_consistent(&tokenizer, &parts.text);
    // Token types can make marks of bytes.
    if parts.every_byte && parts.model == "gpt2" && parts.token_types.is_none() {
        let tokens = tokenizer.encode(&parts.text, Encode::TEXT).expect("text can be encoded");
        let decoder = StreamDecoder::new(&tokenizer).with_marks();
        assert_eq!(streamed(decoder, &tokens), parts.text);
    }
}

fn assert_consistent(tokenizer: &Tokenizer, text: &str) {
    let size = tokenizer.vocab_size();
    for how in [Encode::TEXT, Encode::PROMPT, Encode::TEMPLATE] {
        let tokens = tokenizer.encode(text, how).expect("a GGUF tokenizer encodes any text");
        assert!(tokens.iter().all(|&token| (token as usize) < size), "{tokens:?} of {size}");
        let whole = tokenizer.decode(&tokens).expect("its own tokens");
        assert_eq!(streamed(StreamDecoder::new(tokenizer), &tokens), whole);
    }
    for token in 0..size.min(1 << 16) as u32 {
        assert!(tokenizer.token_bytes(token).is_some() && tokenizer.token_kind(token).is_some());
    }
    assert!(tokenizer.token_bytes(size as u32).is_none());
    assert!(tokenizer.decode(&[size as u32]).is_err());
}

fn streamed(mut decoder: StreamDecoder<'_>, tokens: &[u32]) -> String {
    let mut text = String::new();
    for &token in tokens {
        text += &decoder.push(token).expect("its own token");
    }
    text + &decoder.finish()
}

/// A vocabulary, owned.
#[derive(Debug)]
struct Parts {
    model: &'static str,
    pre: Option<&'static str>,
    tokens: Vec<String>,
    scores: Option<Vec<f32>>,
    token_types: Option<Vec<i32>>,
    merges: Option<Vec<String>>,
    roles: [Option<u32>; 5],
    flags: [Option<bool>; 3],
    every_byte: bool,
    text: String,
}

impl Parts {
    fn read(input: &mut Unstructured<'_>) -> Result<Parts> {
        let model = *input.choose(&["gpt2", "llama", "gemma4", "bert"])?;
        let pre = *input.choose(&[
            None,
            Some("default"),
            Some("gpt-2"),
            Some("llama-bpe"),
            Some("qwen2"),
            Some("smollm"),
            Some("none"),
        ])?;
        let every_byte = input.arbitrary()?;
        let tokens = tokens(input, every_byte)?;
        let merges = if input.ratio(7u8, 8u8)? { Some(merges(input, &tokens)?) } else { None };
        let count = match input.int_in_range(0..=15u8)? {
            15 => input.int_in_range(0..=tokens.len() + 1)?,
            _ => tokens.len(),
        };
        let mut roles = [None; 5];
        for role in &mut roles {
            *role = match input.int_in_range(0..=3u8)? {
                3 => Some(input.int_in_range(0..=tokens.len() as u32)?),
                _ => None,
            };
        }
        Ok(Parts {
            model,
            pre,
            scores: list(input, count, |input| {
                Ok(match input.int_in_range(0..=31i8)? {
                    31 => *input.choose(&[f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX])?,
                    n => f32::from(n) / 4.0,
                })
            })?,
            token_types: list(input, count, |input| input.int_in_range(0..=7))?,
            merges,
            roles,
            flags: input.arbitrary()?,
            every_byte,
            tokens,
            text: text(input, 200)?,
        })
    }

    fn vocabulary(&self) -> GgufVocabulary<'_> {
        let [bos, eos, eot, unknown, padding] = self.roles;
        let [add_bos, add_eos, add_space_prefix] = self.flags;
        GgufVocabulary {
            model: self.model,
            pre: self.pre,
            tokens: self.tokens.iter().map(String::as_str).collect(),
            scores: self.scores.clone(),
            token_types: self.token_types.clone(),
            merges: self.merges.as_ref().map(|all| all.iter().map(String::as_str).collect()),
            bos,
            eos,
            eot,
            unknown,
            padding,
            add_bos,
            add_eos,
            add_space_prefix,
        }
    }
}

/// `count` items, or no list.
fn list<T>(
    input: &mut Unstructured<'_>,
    count: usize,
    mut item: impl FnMut(&mut Unstructured<'_>) -> Result<T>,
) -> Result<Option<Vec<T>>> {
    if input.arbitrary()? {
        (0..count).map(|_| item(input)).collect::<Result<_>>().map(Some)
    } else {
        Ok(None)
    }
}

/// Tokens, most of the time each of them once.
fn tokens(input: &mut Unstructured<'_>, every_byte: bool) -> Result<Vec<String>> {
    let mut tokens: Vec<String> = vec![];
    if every_byte {
        tokens.extend((0..=255u8).map(|byte| byte_character(byte).to_string()));
    }
    let mut seen: BTreeSet<String> = tokens.iter().cloned().collect();
    let duplicates = input.ratio(1u8, 16u8)?;
    for _ in 0..input.int_in_range(0..=40)? {
        let token = text(input, 4)?;
        if seen.insert(token.clone()) || duplicates {
            tokens.push(token);
        }
    }
    Ok(tokens)
}

/// Pairs that make up a token, most of the time.
fn merges(input: &mut Unstructured<'_>, tokens: &[String]) -> Result<Vec<String>> {
    let mut merges = vec![];
    for _ in 0..input.int_in_range(0..=30)? {
        let token = match tokens {
            [] => "",
            tokens => input.choose(tokens)?,
        };
        let cuts: Vec<usize> = token.char_indices().map(|(at, _)| at).skip(1).collect();
        merges.push(match cuts.as_slice() {
            [] => text(input, 3)?,
            cuts => {
                let (left, right) = token.split_at(*input.choose(cuts)?);
                format!("{left} {right}")
            }
        });
    }
    Ok(merges)
}

/// Up to `most` parts one after the other.
fn text(input: &mut Unstructured<'_>, most: usize) -> Result<String> {
    let count = input.int_in_range(0..=most)?;
    let mut text = String::new();
    for _ in 0..count {
        if input.is_empty() {
            break;
        }
        match input.int_in_range(0..=PARTS.len() as u8)? {
            n if usize::from(n) < PARTS.len() => text += PARTS[usize::from(n)],
            _ => text.push(input.arbitrary()?),
        }
    }
    Ok(text)
}

/// The character that stands for a byte in byte-level vocabularies (GPT-2's `bytes_to_unicode`).
fn byte_character(byte: u8) -> char {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    if printable(byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|&b| !printable(b)).count() as u32;
    char::from_u32(256 + before).expect("below the surrogates")
}
