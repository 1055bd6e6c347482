//! Tokenizers without a network: a reduced GPT-2 under every family of pre-tokenizers, the embedded SentencePiece model,
//! hostile descriptions, and what must hold for any text.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use foveal_lm::tokenizer::{
    Encode, Ends, Error, GgufVocabulary, Marks, StreamDecoder, TokenKind, Tokenizer,
};
use foveal_lm::weights::Gguf;
use proptest::prelude::*;
use serde::Deserialize;
use serde_json::json;

/// The bytes and first 600 merges of GPT-2 with four special tokens, and what llama.cpp makes of some texts.
#[derive(Deserialize)]
struct Fixture {
    tokens: Vec<String>,
    token_types: Vec<i32>,
    merges: Vec<String>,
    texts: Vec<String>,
    ids: BTreeMap<String, Vec<Vec<u32>>>,
    #[serde(rename = "gpt-2 with marks")]
    with_marks: Vec<Vec<u32>>,
}

static FIXTURE: LazyLock<Fixture> = LazyLock::new(|| {
    serde_json::from_str(include_str!("fixtures/gpt2_600.json")).expect("a valid fixture")
});

static GPT2: LazyLock<Tokenizer> = LazyLock::new(|| bpe("gpt-2"));

/// One of each family.
static FAMILIES: LazyLock<BTreeMap<&str, Tokenizer>> =
    LazyLock::new(|| FIXTURE.ids.keys().map(|pre| (pre.as_str(), bpe(pre))).collect());

static GLASS: LazyLock<Tokenizer> = LazyLock::new(|| {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/assets/glassllm-en.gguf");
    let file = Gguf::open(path.as_ref()).expect("the embedded model");
    Tokenizer::from_gguf(file.metadata()).expect("a valid tokenizer")
});

static BYTES: LazyLock<Tokenizer> =
    LazyLock::new(|| Tokenizer::from_vocabulary(&sentence_piece()).expect("a valid vocabulary"));

fn gpt2(pre: &str) -> GgufVocabulary<'_> {
    GgufVocabulary {
        model: "gpt2",
        pre: Some(pre),
        tokens: FIXTURE.tokens.iter().map(String::as_str).collect(),
        token_types: Some(FIXTURE.token_types.clone()),
        merges: Some(FIXTURE.merges.iter().map(String::as_str).collect()),
        bos: Some(856),
        eos: Some(856),
        ..GgufVocabulary::default()
    }
}

fn bpe(pre: &str) -> Tokenizer {
    Tokenizer::from_vocabulary(&gpt2(pre)).expect("a valid vocabulary")
}

/// A SentencePiece vocabulary with all bytes.
fn sentence_piece() -> GgufVocabulary<'static> {
    static BYTE_NAMES: LazyLock<Vec<String>> =
        LazyLock::new(|| (0..256).map(|byte| format!("<0x{byte:02X}>")).collect());
    let words = ["▁", "a", "b", "▁a", "ab", "▁▁", "é", "aé", "s>", "</", "<|sep|>"];
    let mut tokens = vec!["<unk>", "<s>", "</s>"];
    tokens.extend(BYTE_NAMES.iter().map(String::as_str));
    tokens.extend(words);
    let mut types = vec![2, 3, 3];
    types.extend([6; 256]);
    types.extend([1; 10]);
    types.push(4);
    let scores = (0..tokens.len()).map(|id| -(id as f32)).collect();
    GgufVocabulary {
        model: "llama",
        scores: Some(scores),
        token_types: Some(types),
        tokens,
        ..GgufVocabulary::default()
    }
}

fn error(vocabulary: &GgufVocabulary<'_>) -> Error {
    Tokenizer::from_vocabulary(vocabulary).map(|_| ()).expect_err("a wrong vocabulary")
}

#[test]
fn every_family_cuts_as_llama_cpp_does() {
    for (pre, tokenizer) in &*FAMILIES {
        let expected = &FIXTURE.ids[*pre];
        assert_eq!(expected.len(), FIXTURE.texts.len());
        for (text, ids) in FIXTURE.texts.iter().zip(expected) {
            assert_eq!(&tokenizer.encode(text, Encode::TEXT).unwrap(), ids, "{pre}: {text:?}");
            assert_eq!(&tokenizer.decode(ids).unwrap(), text, "{pre}");
        }
    }
}

#[test]
fn marks_are_tokens_only_when_asked_for() {
    for (text, ids) in FIXTURE.texts.iter().zip(&FIXTURE.with_marks) {
        assert_eq!(&GPT2.encode(text, Encode::TEMPLATE).unwrap(), ids, "{text:?}");
    }
    let text = "<|im_start|>a";
    let literal = GPT2.encode(text, Encode::TEXT).unwrap();
    assert!(literal.iter().all(|&id| GPT2.token_kind(id) == Some(TokenKind::Normal)));
    assert_eq!(GPT2.decode(&literal).unwrap(), text);
    let marked = GPT2.encode(text, Encode::TEMPLATE).unwrap();
    assert_eq!(GPT2.decode(&marked).unwrap(), "a");
    let mut decoder = StreamDecoder::new(&GPT2).with_marks();
    let shown: String = marked.iter().map(|&id| decoder.push(id).unwrap()).collect();
    assert_eq!(shown, text);
}

#[test]
fn roles_come_from_the_file_and_from_texts() {
    let prompt = GPT2.encode("a", Encode::PROMPT).unwrap();
    assert_eq!(
        prompt,
        GPT2.encode("a", Encode::TEXT).unwrap(),
        "GPT-2 has no begin token by default"
    );
    let with_bos =
        Tokenizer::from_vocabulary(&GgufVocabulary { add_bos: Some(true), ..gpt2("gpt-2") })
            .unwrap();
    assert_eq!(with_bos.encode("", Encode::PROMPT).unwrap(), [856]);
    assert_eq!(
        bpe("llama-bpe").encode("", Encode::PROMPT).unwrap(),
        [856],
        "llama 3 has one by default"
    );
    assert_eq!(
        (GPT2.bos(), GPT2.eos(), GPT2.eot()),
        (Some(856), Some(856), GPT2.token_named("<|im_end|>"))
    );
    assert_eq!(GPT2.ends().collect::<Vec<_>>(), [856, 858]);
    assert!(GPT2.is_end(858) && !GPT2.is_end(857));
    assert_eq!(GPT2.vocab_size(), 860);
    assert_eq!(GPT2.token_bytes(220), Some(&b" "[..]));
    assert_eq!(GPT2.token_bytes(860), None);
    assert!(matches!(GPT2.decode(&[860]), Err(Error::OutOfRange { found: 860, size: 860, .. })));
}

#[test]
fn the_embedded_model_reads_as_its_package_does() {
    let vectors: [(&str, &[u32]); 3] = [
        ("Alice was beginning to", &[494, 160, 729, 633, 111]),
        ("The Queen looked at her and said", &[185, 388, 501, 194, 191, 120, 151]),
        ("` I wish I had not", &[1, 129, 1004, 129, 211, 248]),
    ];
    for (text, ids) in vectors {
        assert_eq!(GLASS.encode(text, Encode::PROMPT).unwrap(), ids, "{text}");
    }
    let text = "“Who are you?” said the\nCaterpillar.";
    let ids = GLASS.encode(text, Encode::PROMPT).unwrap();
    assert_eq!(GLASS.decode(&ids).unwrap(), text);
    assert_eq!(
        (GLASS.vocab_size(), GLASS.bos(), GLASS.eos(), GLASS.unknown()),
        (1024, Some(2), Some(3), Some(1))
    );
    assert_eq!(
        GLASS.decode(&[1, 494, 3]).unwrap(),
        GLASS.decode(&[494]).unwrap(),
        "marks are no text"
    );
}

#[test]
fn sentence_piece_merges_by_score_and_falls_back_to_bytes() {
    let id = |name: &str| BYTES.token_named(name).expect("a token");
    let encode = |text| BYTES.encode(text, Encode::TEXT).unwrap();
    assert_eq!(encode("ab"), [id("▁a"), id("b")], "▁a has a higher score than ab");
    assert_eq!(encode("a ab"), [id("▁a"), id("▁a"), id("b")]);
    assert_eq!(encode("ü"), [id("▁"), id("<0xC3>"), id("<0xBC>")]);
    assert_eq!(encode(""), [0; 0]);
    assert_eq!(BYTES.encode("", Encode::PROMPT).unwrap(), [1]);
    // The space comes again after each token that is found before merging.
    assert_eq!(encode("a<|sep|>a"), [id("▁a"), id("<|sep|>"), id("▁a")]);
    let template = Encode { ends: Ends::AsTrained, marks: Marks::Tokens };
    assert_eq!(BYTES.encode("a</s>", template).unwrap(), [1, id("▁a"), 2]);
    assert_eq!(BYTES.decode(&[1, id("▁a"), id("▁a"), 2]).unwrap(), "a a");
    assert!(!encode("</s><unk><0x41>").iter().any(|&token| token < 3 || token == id("<0x41>")));
}

#[test]
fn a_stream_gives_a_character_with_its_last_byte() {
    let mut decoder = StreamDecoder::new(&BYTES);
    let byte = |value: u32| value + 3;
    assert_eq!(decoder.push(BYTES.token_named("▁a").unwrap()).unwrap(), "a");
    assert_eq!(decoder.push(byte(0xf0)).unwrap(), "");
    assert_eq!(decoder.push(byte(0x9f)).unwrap(), "");
    assert_eq!(decoder.push(byte(0x90)).unwrap(), "");
    assert_eq!(decoder.push(byte(0x8b)).unwrap(), "🐋");
    assert_eq!(decoder.push(byte(0xe2)).unwrap(), "");
    assert_eq!(decoder.push(byte(b'x'.into())).unwrap(), "\u{fffd}x");
    assert_eq!(decoder.push(byte(0xff)).unwrap(), "\u{fffd}");
    assert_eq!(decoder.push(byte(0xc3)).unwrap(), "");
    assert!(decoder.push(u32::MAX).is_err());
    assert_eq!(decoder.finish(), "\u{fffd}");
    let mut continued = StreamDecoder::after_prompt(&BYTES);
    assert_eq!(continued.push(BYTES.token_named("▁a").unwrap()).unwrap(), " a");
}

#[test]
fn wrong_descriptions_are_refused() {
    let base = || gpt2("gpt-2");
    let bert = GgufVocabulary { model: "bert", ..base() };
    assert!(error(&bert).to_string().contains("gpt2, gemma4, llama"));
    assert!(
        matches!(error(&gpt2("gpt-9")), Error::PreTokenizer { supported, .. } if supported.contains(&"qwen2"))
    );
    let empty = GgufVocabulary { model: "gpt2", merges: Some(vec![]), ..GgufVocabulary::default() };
    assert!(matches!(error(&empty), Error::EmptyVocabulary));
    let short = GgufVocabulary { token_types: Some(vec![1; 3]), ..base() };
    assert!(matches!(error(&short), Error::Length { expected: 860, found: 3, .. }));
    let mut twice = base();
    twice.tokens[7] = twice.tokens[5];
    assert!(matches!(error(&twice), Error::DuplicateToken { first: 5, second: 7, .. }));
    let mut kind = base();
    kind.token_types = Some([vec![1; 859], vec![9]].concat());
    assert!(matches!(error(&kind), Error::TokenType { id: 859, found: 9 }));
    let byte = GgufVocabulary { token_types: Some(vec![6; 860]), ..base() };
    assert!(matches!(error(&byte), Error::ByteToken { id: 0, .. }));
    let far = GgufVocabulary { bos: Some(860), ..base() };
    assert!(matches!(error(&far), Error::OutOfRange { found: 860, size: 860, .. }));
    assert!(matches!(error(&GgufVocabulary { merges: None, ..base() }), Error::Missing { .. }));
}

#[test]
fn wrong_merges_and_scores_are_refused() {
    for merge in ["", " ", "a", "ab", "ab ", "é"] {
        let wrong = GgufVocabulary { merges: Some(vec!["Ġ t", merge]), ..gpt2("gpt-2") };
        assert!(matches!(
            error(&wrong),
            Error::MergeForm { index: 1, .. } | Error::MergeToken { index: 1, .. }
        ));
    }
    let unknown = GgufVocabulary { merges: Some(vec!["z z"]), ..gpt2("gpt-2") };
    assert!(matches!(error(&unknown), Error::MergeToken { index: 0, piece, .. } if piece == "zz"));
    let base = sentence_piece;
    assert!(matches!(error(&GgufVocabulary { scores: None, ..base() }), Error::Missing { .. }));
    let short = GgufVocabulary { scores: Some(vec![]), ..base() };
    assert!(matches!(error(&short), Error::Length { found: 0, .. }));
    let size = base().tokens.len();
    let nan =
        GgufVocabulary { scores: Some([vec![0.0; size - 1], vec![f32::NAN]].concat()), ..base() };
    assert!(matches!(error(&nan), Error::Score { .. }));
}

/// The fixture as a `tokenizer.json`.
fn hugging_face() -> Tokenizer {
    let normal = || (0..).zip(&FIXTURE.tokens).take(856);
    let vocab: BTreeMap<_, _> = normal().map(|(id, token)| (token.clone(), id)).collect();
    let added: Vec<_> = (856..860)
        .map(|id: usize| {
            json!({"id": id, "content": FIXTURE.tokens[id], "special": id < 859, "single_word": false,
                "lstrip": false, "rstrip": false, "normalized": false})
        })
        .collect();
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let description = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "vocab": vocab, "merges": FIXTURE.merges},
    });
    let config = json!({"bos_token": "<|endoftext|>", "eos_token": {"content": "<|im_end|>"}});
    Tokenizer::from_hugging_face(
        description.to_string().as_bytes(),
        Some(config.to_string().as_bytes()),
    )
    .expect("a valid tokenizer.json")
}

static HUGGING_FACE: LazyLock<Tokenizer> = LazyLock::new(hugging_face);

#[test]
fn a_tokenizer_json_has_the_same_face() {
    let text = "<|im_start|>The whale's 🐋<|im_end|>";
    let marked = HUGGING_FACE.encode(text, Encode::TEMPLATE).unwrap();
    assert_eq!(marked, GPT2.encode(text, Encode::TEMPLATE).unwrap());
    assert_eq!(HUGGING_FACE.decode(&marked).unwrap(), "The whale's 🐋");
    let literal = HUGGING_FACE.encode(text, Encode::TEXT).unwrap();
    assert_eq!(literal, GPT2.encode(text, Encode::TEXT).unwrap());
    assert_eq!(HUGGING_FACE.decode(&literal).unwrap(), text);
    assert_eq!((HUGGING_FACE.bos(), HUGGING_FACE.eos()), (Some(856), Some(858)));
    for wrong in ["", "{}", "[]", r#"{"decoder": {"type": "WordPiece"}}"#] {
        assert!(matches!(
            Tokenizer::from_hugging_face(wrong.as_bytes(), None),
            Err(Error::HuggingFace { .. })
        ));
    }
}

/// Text with all that tokenizers treat apart.
fn any_text() -> impl Strategy<Value = String> {
    let atom = prop_oneof![
        any::<char>().prop_map(String::from),
        "[ \\t\\r\\n]{1,4}",
        "[a-zA-Z']{1,5}",
        "[0-9]{1,7}",
        "[é▁日ñ.,!\u{a0}\u{3000}]{1,2}",
        prop::sample::select(vec!["<|im_end|>", "</s>", "<0x41>", "    ", "<|sep|>"])
            .prop_map(String::from),
    ];
    prop::collection::vec(atom, 0..24).prop_map(|atoms| atoms.concat())
}

proptest! {
    #[test]
    fn byte_level_bpe_gives_back_every_text(text in any_text()) {
        for (pre, tokenizer) in &*FAMILIES {
            let ids = tokenizer.encode(&text, Encode::TEXT).unwrap();
            prop_assert_eq!(&tokenizer.decode(&ids).unwrap(), &text, "{}", pre);
        }
    }

    #[test]
    fn sentence_piece_gives_back_every_text_but_for_its_spaces(text in any_text()) {
        // A user-defined token has a space put after it that is not in the text.
        let text = text.replace("<|sep|>", "");
        let ids = BYTES.encode(&text, Encode::TEXT).unwrap();
        prop_assert_eq!(BYTES.decode(&ids).unwrap(), text.replace('▁', " "));
    }

    #[test]
    fn text_is_never_a_mark(text in any_text()) {
        for tokenizer in [&*GPT2, &*BYTES, &*HUGGING_FACE] {
            let ids = tokenizer.encode(&text, Encode::TEXT).unwrap();
            prop_assert!(ids.iter().all(|&id| !tokenizer.token_kind(id).unwrap().is_mark()));
        }
    }

    #[test]
    fn the_tokenizers_crate_agrees(text in any_text()) {
        let found = GPT2.encode(&text, Encode::TEXT).unwrap();
        prop_assert_eq!(found, HUGGING_FACE.encode(&text, Encode::TEXT).unwrap());
    }

    #[test]
    fn a_stream_is_the_lossy_text_of_all_bytes(ids in prop::collection::vec(3u32..270, 0..40)) {
        let bytes: Vec<u8> = ids.iter().flat_map(|&id| BYTES.token_bytes(id).unwrap()).copied().collect();
        let mut decoder = StreamDecoder::after_prompt(&BYTES);
        let mut text = String::new();
        for &id in &ids {
            text.push_str(&decoder.push(id).unwrap());
        }
        text.push_str(&decoder.finish());
        prop_assert_eq!(text, String::from_utf8_lossy(&bytes));
    }

    #[test]
    fn any_description_is_refused_or_works(
        tokens in prop::collection::vec("[ab▁ ]{0,3}|<0x4[0-9]>|.", 0..8),
        types in prop::option::of(prop::collection::vec(0i32..8, 0..8)),
        merges in prop::collection::vec("[ab ]{0,4}", 0..4),
        scores in prop::collection::vec(any::<f32>(), 0..8),
        (model, id, text) in (0usize..3, 0u32..8, any_text()),
    ) {
        let source = GgufVocabulary {
            model: ["gpt2", "gemma4", "llama"][model],
            tokens: tokens.iter().map(String::as_str).collect(),
            token_types: types,
            merges: Some(merges.iter().map(String::as_str).collect()),
            scores: Some(scores),
            unknown: Some(id),
            ..GgufVocabulary::default()
        };
        if let Ok(tokenizer) = Tokenizer::from_vocabulary(&source) {
            let ids = tokenizer.encode(&text, Encode::TEMPLATE).unwrap();
            tokenizer.decode(&ids).unwrap();
        }
    }
}
