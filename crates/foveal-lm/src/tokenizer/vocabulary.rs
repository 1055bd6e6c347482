//! The tokens of a model: their text, what kind each is, and the bytes each stands for.

use std::collections::{BTreeSet, HashMap};

use super::Error;
use super::bytes;

/// Twenty times the largest vocabulary known (Gemma's 262144).
const MAX_TOKENS: usize = 1 << 22;

/// A tokenizer as GGUF files describe it: the keys `tokenizer.ggml.*`, each under its own name.
///
/// `None` takes the default of the kind of tokenizer, as llama.cpp does.
#[derive(Clone, Debug, Default)]
pub struct GgufVocabulary<'a> {
    /// `model`: `gpt2` (byte-level BPE), `llama` (SentencePiece) or `gemma4` (BPE on characters).
    pub model: &'a str,
    /// `pre`: the name of the way text is cut into words before BPE.
    pub pre: Option<&'a str>,
    /// `tokens`, by id.
    pub tokens: Vec<&'a str>,
    /// `scores`, by id: the higher, the earlier SentencePiece merges into this token.
    pub scores: Option<Vec<f32>>,
    /// `token_type`, by id: 1 normal, 2 unknown, 3 control, 4 user defined, 5 unused, 6 byte.
    pub token_types: Option<Vec<i32>>,
    /// `merges`, by rank: two tokens with a space between.
    pub merges: Option<Vec<&'a str>>,
    /// `bos_token_id`.
    pub bos: Option<u32>,
    /// `eos_token_id`.
    pub eos: Option<u32>,
    /// `eot_token_id`, the end of a turn; found by its text when absent.
    pub eot: Option<u32>,
    /// `unknown_token_id`.
    pub unknown: Option<u32>,
    /// `padding_token_id`.
    pub padding: Option<u32>,
    /// `add_bos_token`.
    pub add_bos: Option<bool>,
    /// `add_eos_token`.
    pub add_eos: Option<bool>,
    /// `add_space_prefix`, of SentencePiece only.
    pub add_space_prefix: Option<bool>,
}

/// What a token is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenKind {
    /// A piece of text.
    Normal,
    /// Stands for text that has no token.
    Unknown,
    /// Marks structure, such as the end of a turn; never comes from plain text.
    Control,
    /// Text that is always one token, found before anything else.
    UserDefined,
    /// Has an id and nothing else.
    Unused,
    /// One byte of text that has no token.
    Byte,
}

impl TokenKind {
    /// Whether the token marks something and is no part of a text.
    pub fn is_mark(self) -> bool {
        matches!(self, TokenKind::Control | TokenKind::Unknown)
    }

    fn from_gguf(id: u32, found: i32) -> Result<TokenKind, Error> {
        match found {
            1 => Ok(TokenKind::Normal),
            2 => Ok(TokenKind::Unknown),
            3 => Ok(TokenKind::Control),
            4 => Ok(TokenKind::UserDefined),
            0 | 5 => Ok(TokenKind::Unused),
            6 => Ok(TokenKind::Byte),
            _ => Err(Error::TokenType { id, found }),
        }
    }
}

/// How the text of a normal token writes bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Alphabet {
    /// One printable character for every byte, as GPT-2's byte-level BPE does.
    ByteLevel,
    /// Text itself, with `▁` for a space, as SentencePiece does.
    Escaped,
}

/// The ids of the tokens with a role; each is in range.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Roles {
    pub(super) bos: Option<u32>,
    pub(super) eos: Option<u32>,
    pub(super) eot: Option<u32>,
    pub(super) unknown: Option<u32>,
    pub(super) padding: Option<u32>,
}

/// The tokens of a model, checked: every token once, every id in range.
#[derive(Debug)]
pub(super) struct Vocabulary {
    ids: HashMap<Box<str>, u32>,
    kinds: Vec<TokenKind>,
    pieces: Pieces,
    pub(super) roles: Roles,
    ends: BTreeSet<u32>,
}

/// Byte strings one after the other, in one allocation.
#[derive(Debug, Default)]
struct Pieces {
    bytes: Vec<u8>,
    ends: Vec<usize>,
}

impl Pieces {
    fn push(&mut self, piece: &[u8]) {
        self.bytes.extend_from_slice(piece);
        self.ends.push(self.bytes.len());
    }

    fn get(&self, index: usize) -> Option<&[u8]> {
        let end = *self.ends.get(index)?;
        let start = if index == 0 { 0 } else { self.ends[index - 1] };
        Some(&self.bytes[start..end])
    }
}

impl Vocabulary {
    /// Checks the tokens of a GGUF file and turns them into bytes.
    pub(super) fn from_gguf(
        source: &GgufVocabulary<'_>,
        alphabet: Alphabet,
        defaults: Roles,
    ) -> Result<Vocabulary, Error> {
        let kinds = match &source.token_types {
            Some(types) => {
                expect_length("token types", source.tokens.len(), types.len())?;
                let typed = types.iter().zip(0..).map(|(&found, id)| TokenKind::from_gguf(id, found));
                typed.collect::<Result<Vec<_>, Error>>()?
            }
            None => vec![TokenKind::Normal; source.tokens.len()],
        };
        let given = Roles {
            bos: source.bos,
            eos: source.eos,
            eot: source.eot,
            unknown: source.unknown,
            padding: source.padding,
        };
        let roles = given.or(defaults, source.tokens.len())?;
        Vocabulary::new(&source.tokens, kinds, alphabet, roles)
    }

    /// Builds the maps of a vocabulary with one of `kinds` for each of `tokens`.
    pub(super) fn new(
        tokens: &[&str],
        kinds: Vec<TokenKind>,
        alphabet: Alphabet,
        roles: Roles,
    ) -> Result<Vocabulary, Error> {
        let ids = number(tokens)?;
        let mut vocabulary =
            Vocabulary { ids, kinds, pieces: Pieces::default(), roles, ends: BTreeSet::new() };
        vocabulary.find_ends();
        for (&text, id) in tokens.iter().zip(0..) {
            let piece = bytes_of(id, text, vocabulary.kinds[id as usize], alphabet)?;
            vocabulary.pieces.push(&piece);
        }
        Ok(vocabulary)
    }

    pub(super) fn len(&self) -> usize {
        self.kinds.len()
    }

    pub(super) fn id(&self, text: &str) -> Option<u32> {
        self.ids.get(text).copied()
    }

    /// The id of a token that text can become: no mark, no byte token.
    pub(super) fn text_id(&self, text: &str) -> Option<u32> {
        let id = self.id(text)?;
        let kind = self.kinds[id as usize];
        (!kind.is_mark() && kind != TokenKind::Byte).then_some(id)
    }

    pub(super) fn kind(&self, id: u32) -> Option<TokenKind> {
        self.kinds.get(id as usize).copied()
    }

    pub(super) fn piece(&self, id: u32) -> Option<&[u8]> {
        self.pieces.get(id as usize)
    }

    pub(super) fn ends(&self) -> &BTreeSet<u32> {
        &self.ends
    }

    /// The id of the token `<0x0A>` and its like, by byte.
    pub(super) fn byte_ids(&self) -> [Option<u32>; 256] {
        std::array::from_fn(|byte| {
            let id = self.id(&format!("<0x{byte:02X}>"))?;
            (self.kinds[id as usize] == TokenKind::Byte).then_some(id)
        })
    }

    /// Finds the tokens that end a generation: by role, and by the texts that models are known to use.
    ///
    /// Such a token is a mark even where its file says otherwise.
    fn find_ends(&mut self) {
        let turn = END_OF_TURN.iter().find_map(|text| self.id(text));
        self.roles.eot = self.roles.eot.or(turn);
        self.ends = END_TEXTS.iter().filter_map(|text| self.id(text)).collect();
        for &id in &self.ends {
            self.kinds[id as usize] = TokenKind::Control;
        }
        self.ends.extend(self.roles.eos);
        self.ends.extend(self.roles.eot);
        for ((text, kind), others) in EXCEPTIONS {
            let id = self.id(text).filter(|_| others.iter().all(|other| self.id(other).is_some()));
            if let Some(id) = id.filter(|id| self.ends.remove(id)) {
                self.kinds[id as usize] = *kind;
            }
        }
    }
}

impl Roles {
    /// The given ids, which must be in range, and the defaults for those not given where these are in range.
    fn or(self, defaults: Roles, size: usize) -> Result<Roles, Error> {
        let choose = |what, given: Option<u32>, default: Option<u32>| match given {
            Some(found) if found as usize >= size => Err(Error::OutOfRange { what, found, size }),
            Some(id) => Ok(Some(id)),
            None => Ok(default.filter(|&id| (id as usize) < size)),
        };
        Ok(Roles {
            bos: choose("the id of the begin token", self.bos, defaults.bos)?,
            eos: choose("the id of the end token", self.eos, defaults.eos)?,
            eot: choose("the id of the end-of-turn token", self.eot, defaults.eot)?,
            unknown: choose("the id of the unknown token", self.unknown, defaults.unknown)?,
            padding: choose("the id of the padding token", self.padding, defaults.padding)?,
        })
    }
}

pub(super) fn expect_length(what: &'static str, expected: usize, found: usize) -> Result<(), Error> {
    if found == expected { Ok(()) } else { Err(Error::Length { what, expected, found }) }
}

fn number(tokens: &[&str]) -> Result<HashMap<Box<str>, u32>, Error> {
    if tokens.is_empty() {
        return Err(Error::EmptyVocabulary);
    }
    if tokens.len() > MAX_TOKENS {
        return Err(Error::Limit { what: "tokens", found: tokens.len(), limit: MAX_TOKENS });
    }
    let mut ids = HashMap::with_capacity(tokens.len());
    // An empty text is an unused id; there may be many.
    for (&text, second) in tokens.iter().zip(0..).filter(|(text, _)| !text.is_empty()) {
        if let Some(first) = ids.insert(Box::from(text), second) {
            return Err(Error::DuplicateToken { text: text.to_owned(), first, second });
        }
    }
    Ok(ids)
}

fn bytes_of(id: u32, text: &str, kind: TokenKind, alphabet: Alphabet) -> Result<Vec<u8>, Error> {
    match (kind, alphabet) {
        (TokenKind::Byte, _) => match bytes::parse_hexadecimal(text) {
            Some(byte) => Ok(vec![byte]),
            None => Err(Error::ByteToken { id, text: text.to_owned() }),
        },
        (TokenKind::Normal | TokenKind::Unused, Alphabet::ByteLevel) => Ok(bytes::from_byte_level(text)),
        (TokenKind::Normal | TokenKind::Unused, Alphabet::Escaped) => {
            Ok(text.replace(bytes::ESCAPED_SPACE, " ").into_bytes())
        }
        _ => Ok(text.as_bytes().to_vec()),
    }
}

/// The end of a turn, by text, in the order of preference.
const END_OF_TURN: &[&str] = &[
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "<｜end▁of▁sentence｜>",
    "<end_of_utterance>",
];

/// The texts after which generation ends, whatever the file says of them: those of llama.cpp (`src/llama-vocab.cpp`).
const END_TEXTS: &[&str] = &[
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "<｜end▁of▁sentence｜>",
    "[e~[",
];

/// A text of [`END_TEXTS`], with the kind it has after all, when all the other texts are tokens too.
type Exception = ((&'static str, TokenKind), &'static [&'static str]);

const EXCEPTIONS: &[Exception] = &[
    (("<|end|>", TokenKind::UserDefined), &["<|return|>", "<|call|>"]),
    (("<|end|>", TokenKind::UserDefined), &["<|calls|>", "<|flush|>"]),
    (("</s>", TokenKind::Normal), &["<|tool_response>"]),
];
