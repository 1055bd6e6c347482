//! Models in other formats: the same description, weights that are near, text that is as likely.

use std::path::PathBuf;

use foveal::Phase;
use foveal::projection::{Format, dequantize_row, quantize_row};
use foveal_lm::config::ModelConfig;
use foveal_lm::model::{Logits, Scratch, Step};
use foveal_lm::quantize::{Written, quantize};
use foveal_lm::testing::{Model as Real, Tiny, TinySizes, fetch_model};
use foveal_lm::tokenizer::{Encode, Tokenizer};
use foveal_lm::weights::{Description, Weights};
use foveal_lm::{Error, Model};
use serde_json::json;

use crate::formats::Folder;
use crate::golden_case::{difference, nll};
use crate::small;

fn small_file() -> PathBuf {
    concat!(env!("CARGO_MANIFEST_DIR"), "/tests/assets/glassllm-en.gguf").into()
}

fn logits(model: &Model, tokens: &[u32]) -> Vec<f32> {
    let (mut state, mut scratch) = (model.state().unwrap(), Scratch::new());
    let step = Step { phase: Phase::Prompt, logits: Logits::All };
    model.forward(tokens, step, &mut state, &mut scratch).unwrap();
    scratch.logits().to_vec()
}

fn tokens(count: u32, vocab: u32) -> Vec<u32> {
    (0..count).map(|i| i * 17 % vocab).collect()
}

/// Mean NLL of each token after the first.
fn likelihood(model: &Model, tokens: &[u32]) -> f64 {
    let logits = logits(model, tokens);
    let rows = logits.chunks(model.config().vocab).zip(&tokens[1..]);
    let sum: f64 = rows.map(|(row, &token)| f64::from(nll(row, token))).sum();
    sum / (tokens.len() - 1) as f64
}

fn run(input: &std::path::Path, output: &std::path::Path, format: Format) -> Vec<Written> {
    let mut written = vec![];
    quantize(input, output, format, |tensor| written.push(tensor.clone())).unwrap();
    written
}

/// A description without what the two forms say differently.
fn comparable(weights: &Weights) -> ModelConfig {
    let mut config = ModelConfig::read(weights).unwrap();
    config.norm_offset = 0.0;
    config.attention.rope_layout = foveal_lm::config::RopeLayout::HalfSplit;
    if config.architecture == foveal_lm::config::Architecture::Mistral {
        config.architecture = foveal_lm::config::Architecture::Llama;
    }
    for layer in &mut config.layers {
        use foveal_lm::config::RopeScaling;
        if let RopeScaling::Llama3 { .. } | RopeScaling::Divisors(_) = layer.rope.scaling {
            layer.rope.scaling = RopeScaling::None;
        }
    }
    config
}

#[test]
fn every_family_goes_from_a_folder_to_gguf_and_on() {
    for family in Tiny::FAMILIES {
        let mut model = Tiny::new(family, TinySizes::default());
        if family.starts_with("gemma") {
            model.config["query_pre_attn_scalar"] = json!(5);
        }
        let folder = Folder::new(&format!("quantize-{family}"));
        model.save_folder(&folder.0, Format::F32, 2).unwrap();
        let [gguf, again] = ["a.gguf", "b.gguf"].map(|name| folder.0.join(name));
        let written = run(&folder.0, &gguf, Format::F32);
        assert!(written.iter().all(|tensor| tensor.to == Format::F32 && !tensor.fell_back));
        let (old, new) = (Weights::open(&folder.0).unwrap(), Weights::open(&gguf).unwrap());
        assert_eq!(comparable(&old), comparable(&new), "{family}");
        let [old, new] = [old, new].map(|weights| Model::new(&weights).unwrap());
        let tokens = tokens(40, 50);
        let off = difference(&logits(&old, &tokens), &logits(&new, &tokens));
        assert!(off < 5e-5, "{family}: off by {off}");
        // From GGUF to GGUF nothing is left to change.
        run(&gguf, &again, Format::F32);
        assert!(std::fs::read(&gguf).unwrap() == std::fs::read(&again).unwrap(), "{family}");
    }
}

#[test]
fn formats_are_chosen_tensor_by_tensor() {
    let sizes = TinySizes { width: 256, inner: 288, layers: 1, ..TinySizes::default() };
    let model = Tiny::new("qwen2", sizes);
    let folder = Folder::new("quantize-choice");
    model.save_folder(&folder.0, Format::BF16, 1).unwrap();
    let out = folder.0.join("out.gguf");
    for (format, fitting, fallback, outer) in [
        (Format::Q4_K, Format::Q4_K, Format::Q5_0, Format::Q6_K),
        (Format::Q5_K, Format::Q5_K, Format::Q5_1, Format::Q6_K),
        (Format::Q6_K, Format::Q6_K, Format::Q8_0, Format::Q6_K),
        (Format::Q4_0, Format::Q4_0, Format::Q4_0, Format::Q6_K),
        (Format::Q8_0, Format::Q8_0, Format::Q8_0, Format::Q8_0),
        (Format::F16, Format::F16, Format::F16, Format::F16),
    ] {
        let written = run(&folder.0, &out, format);
        let of = |name: &str| written.iter().find(|tensor| tensor.name == name).unwrap();
        assert_eq!(of("blk.0.attn_q.weight").to, fitting);
        assert_eq!((of("blk.0.ffn_down.weight").to, of("token_embd.weight").to), (fallback, outer));
        assert_eq!(of("blk.0.ffn_down.weight").fell_back, fallback != format, "{format}");
        for vector in ["blk.0.attn_norm.weight", "blk.0.attn_q.bias", "output_norm.weight"] {
            assert_eq!(of(vector).to, Format::F32);
        }
        let weights = Weights::open(&out).unwrap();
        assert_eq!(weights.tensors().len(), written.len());
        assert!(
            logits(&Model::new(&weights).unwrap(), &tokens(9, 50)).iter().all(|x| x.is_finite())
        );
        // What is in the file is what rounding the folder's rows gives.
        let values = model.clone().round_to(Format::BF16);
        let values = values.values("model.layers.0.mlp.up_proj.weight").unwrap();
        let mut bytes = vec![0; fitting.row_bytes(values.len()).unwrap()];
        quantize_row(fitting, values, &mut bytes).unwrap();
        assert_eq!(weights.tensor("blk.0.ffn_up.weight").unwrap().bytes(), bytes);
    }
    // Rows of 24 are whole blocks of nothing but floats.
    Tiny::new("llama", TinySizes::default()).save_folder(&folder.0, Format::F32, 1).unwrap();
    let written = run(&folder.0, &out, Format::Q4_K);
    let f16 = written.iter().filter(|tensor| tensor.to == Format::F16);
    assert_eq!(f16.filter(|tensor| tensor.fell_back).count(), 1 + 7 * 6);
}

#[test]
fn the_same_input_gives_the_same_bytes() {
    let folder = Folder::new("quantize-same");
    let [a, b] = ["a.gguf", "b.gguf"].map(|name| folder.0.join(name));
    for format in [Format::Q8_0, Format::Q4_0] {
        run(&small_file(), &a, format);
        run(&small_file(), &b, format);
        assert!(std::fs::read(&a).unwrap() == std::fs::read(&b).unwrap());
    }
}

#[test]
fn text_stays_as_likely() {
    let text = "Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to \
                do: once or twice she had peeped into the book her sister was reading, but it had no pictures";
    let tokens = small::tokenizer().encode(text, Encode::PROMPT).unwrap();
    let before = likelihood(&small::model(), &tokens);
    let folder = Folder::new("quantize-likely");
    let out = folder.0.join("out.gguf");
    for (format, most) in [
        (Format::F32, 1e-5),
        (Format::BF16, 0.01),
        (Format::Q8_0, 0.01),
        (Format::Q5_1, 0.05),
        (Format::Q5_0, 0.05),
        (Format::Q4_1, 0.1),
        (Format::Q4_0, 0.15),
    ] {
        let written = run(&small_file(), &out, format);
        let weights = Weights::open(&out).unwrap();
        let after = likelihood(&Model::new(&weights).unwrap(), &tokens);
        println!("{format}: {before:.4} → {after:.4}");
        assert!((after - before).abs() <= most, "{format}: {before} → {after}");
        assert!(written.iter().all(|tensor| !tensor.is_rounded_twice()));
        // The tokenizer came with it.
        let Description::Gguf(metadata) = weights.description() else { panic!("a GGUF file") };
        let tokenizer = Tokenizer::from_gguf(metadata).unwrap();
        assert_eq!(tokenizer.encode(text, Encode::PROMPT).unwrap(), tokens);
    }
}

#[test]
fn smollm2_stays_as_likely() {
    let Some(path) = fetch_model(Real::SmolLm2) else { return };
    let weights = Weights::open(&path).unwrap();
    let Description::Gguf(metadata) = weights.description() else { panic!("a GGUF file") };
    let text = "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in \
                want of a wife. However little known the feelings or views of such a man may be on his first entering a \
                neighbourhood, this truth is so well fixed in the minds of the surrounding families, that he is \
                considered as the rightful property of some one or other of their daughters.";
    let tokens = Tokenizer::from_gguf(metadata).unwrap().encode(text, Encode::PROMPT).unwrap();
    let before = likelihood(&Model::new(&weights).unwrap(), &tokens);
    let folder = Folder::new("quantize-smollm2");
    let out = folder.0.join("out.gguf");
    for (format, most) in [(Format::Q8_0, 0.01), (Format::Q4_K, 0.1)] {
        let written = run(&path, &out, format);
        assert!(written.iter().filter(|tensor| tensor.is_rounded_twice()).count() > 200);
        let after = likelihood(&Model::load(&out).unwrap(), &tokens);
        println!("{format}: {before:.4} → {after:.4}");
        assert!((after - before).abs() <= most, "{format}: {before} → {after}");
    }
}

/// A folder with a tokenizer, written as GGUF: both tokenizers.
fn tokenizers(name: &str, vocab: usize, json: &str, config: Option<&str>) -> [Tokenizer; 2] {
    let folder = Folder::new(name);
    let sizes = TinySizes { vocab, layers: 1, ..TinySizes::default() };
    Tiny::new("llama", sizes).save_folder(&folder.0, Format::F32, 1).unwrap();
    std::fs::write(folder.0.join("tokenizer.json"), json).unwrap();
    if let Some(config) = config {
        std::fs::write(folder.0.join("tokenizer_config.json"), config).unwrap();
    }
    let out = folder.0.join("out.gguf");
    run(&folder.0, &out, Format::F16);
    let weights = Weights::open(&out).unwrap();
    let Description::Gguf(metadata) = weights.description() else { panic!("a GGUF file") };
    assert_eq!(
        metadata.get::<&str>("tokenizer.chat_template").unwrap(),
        config.map(|_| "{{ messages }}")
    );
    [Tokenizer::from_folder(&folder.0).unwrap(), Tokenizer::from_gguf(metadata).unwrap()]
}

const TEXTS: [&str; 4] = [
    "It's 12 o'clock; she'll have 3,141 apples.\n\n  Then  nothing\t!",
    "naïve café — 中文，日本語 🚀",
    "",
    "<|im_start|>user\nfoo_bar(x)<|im_end|>",
];

fn assert_alike([folder, gguf]: &[Tokenizer; 2]) {
    for text in TEXTS {
        for encode in [Encode::TEXT, Encode::PROMPT, Encode::TEMPLATE] {
            let [a, b] = [folder, gguf].map(|tokenizer| tokenizer.encode(text, encode).unwrap());
            assert_eq!(a, b, "{text:?} {encode:?}");
        }
    }
    assert_eq!((folder.bos(), folder.eos()), (gguf.bos(), gguf.eos()));
}

#[test]
fn a_byte_level_tokenizer_goes_along() {
    let Some(path) = fetch_model(Real::SmolLm2) else { return };
    let weights = Weights::open(&path).unwrap();
    let Description::Gguf(metadata) = weights.description() else { panic!("a GGUF file") };
    let tokens: Vec<&str> = metadata.require("tokenizer.ggml.tokens").unwrap();
    let merges: Vec<&str> = metadata.require("tokenizer.ggml.merges").unwrap();
    let types: Vec<i32> = metadata.require("tokenizer.ggml.token_type").unwrap();
    let special = |id: &usize| types[*id] == 3;
    let vocab = tokens.iter().enumerate().map(|(id, text)| ((*text).to_owned(), json!(id)));
    let added = (0..tokens.len()).filter(special).map(|id| {
        json!({"id": id, "content": tokens[id], "special": true, "single_word": false,
               "lstrip": false, "rstrip": false, "normalized": false})
    });
    let json = json!({
        "version": "1.0", "added_tokens": added.collect::<Vec<_>>(),
        "model": {
            "type": "BPE", "vocab": vocab.collect::<serde_json::Map<_, _>>(), "merges": merges,
        },
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Digits", "individual_digits": true},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        ]},
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
    });
    let config = json!({
        "bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"},
        "chat_template": "{{ messages }}",
    });
    let both = tokenizers(
        "quantize-byte-level",
        tokens.len(),
        &json.to_string(),
        Some(&config.to_string()),
    );
    assert_alike(&both);
    let own = Tokenizer::from_gguf(metadata).unwrap();
    for text in TEXTS {
        let [a, b] =
            [&own, &both[1]].map(|tokenizer| tokenizer.encode(text, Encode::TEXT).unwrap());
        assert_eq!(a, b, "{text:?}");
    }
}

/// BPE on characters that falls back to bytes, as Llama 2 has it.
fn character_json() -> serde_json::Value {
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).to_vec();
    tokens.extend((0..256).map(|byte| format!("<0x{byte:02X}>")));
    tokens.extend("▁abcdefghijklmnopqrstuvwxyzIT0123456789.,;!'\n".chars().map(String::from));
    let merges =
        ["t h", "th e", "▁ the", "▁ a", "e n", "i n", "in g", "l e", "p le", "▁a p", "▁ap ple"];
    tokens.extend(merges.iter().map(|merge| merge.replace(' ', "")));
    let vocab = tokens.iter().enumerate().map(|(id, text)| (text.clone(), json!(id)));
    let added = (0..3).map(|id| {
        json!({"id": id, "content": tokens[id], "special": true, "single_word": false,
               "lstrip": false, "rstrip": false, "normalized": false})
    });
    json!({
        "version": "1.0", "added_tokens": added.collect::<Vec<_>>(),
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ]},
        "model": {
            "type": "BPE", "vocab": vocab.collect::<serde_json::Map<_, _>>(),
            "merges": merges.map(|merge| merge.split(' ').collect::<Vec<_>>()),
            "unk_token": "<unk>", "fuse_unk": true, "byte_fallback": true,
        },
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]},
    })
}

#[test]
fn a_tokenizer_of_characters_goes_along() {
    let json = character_json();
    let vocab = json["model"]["vocab"].as_object().unwrap().len();
    let config =
        json!({"bos_token": "<s>", "eos_token": "</s>", "chat_template": "{{ messages }}"});
    // More rows of the embedding than tokens: the rest is unused.
    let both =
        tokenizers("quantize-characters", vocab + 5, &json.to_string(), Some(&config.to_string()));
    let [folder, gguf] = &both;
    for text in ["the apple in the thing", "apples, 12; naïve 中\nline", "then"] {
        let [a, b] = [folder, gguf].map(|tokenizer| tokenizer.encode(text, Encode::TEXT).unwrap());
        assert_eq!(a, b, "{text:?}");
        assert_eq!(gguf.decode(&b).unwrap().trim_start(), text);
    }
}

#[test]
fn tokenizers_that_gguf_cannot_hold_are_refused() {
    let folder = Folder::new("quantize-tokenizer");
    let out = folder.0.join("out.gguf");
    let mut json = character_json();
    let vocab = json["model"]["vocab"].as_object().unwrap().len();
    let refused = |vocab: usize, json: &serde_json::Value, word: &str| {
        let sizes = TinySizes { vocab, layers: 1, ..TinySizes::default() };
        Tiny::new("llama", sizes).save_folder(&folder.0, Format::F32, 1).unwrap();
        std::fs::write(folder.0.join("tokenizer.json"), json.to_string()).unwrap();
        let error = quantize(&folder.0, &out, Format::F32, |_| {}).unwrap_err();
        assert!(matches!(error, Error::Tokenizer(_)), "{error}");
        assert!(error.to_string().contains(word), "{error}");
        assert!(!out.exists());
    };
    refused(vocab - 1, &json, "is not below");
    // A text that is cut around every h has other ids than any GGUF tokenizer gives.
    json["pre_tokenizer"] = json!({"type": "Split", "pattern": {"String": "h"}, "behavior": "Isolated", "invert": false});
    refused(vocab, &json, "no tokenizer of GGUF files gives its ids");
}

#[test]
fn weights_that_are_no_numbers_are_named() {
    let folder = Folder::new("quantize-nan");
    let out = folder.0.join("out.gguf");
    let mut model = Tiny::new("llama", TinySizes::default());
    let name = "model.layers.2.mlp.up_proj.weight";
    let tensor = model.tensors.iter_mut().find(|tensor| tensor.hugging_face == name).unwrap();
    tensor.values[77] = f32::INFINITY;
    model.save_folder(&folder.0, Format::F32, 1).unwrap();
    let error = quantize(&folder.0, &out, Format::Q8_0, |_| {}).unwrap_err();
    let Error::Quantize { name: found, .. } = &error else { panic!("{error}") };
    assert_eq!(found, name);
    assert!(error.to_string().contains("element 77 is inf"), "{error}");
    assert!(!out.exists());
}

#[test]
fn what_gguf_has_no_key_for_is_refused() {
    let folder = Folder::new("quantize-refused");
    let out = folder.0.join("out.gguf");
    let refused = |family: &str, change: &dyn Fn(&mut serde_json::Value)| {
        let mut model = Tiny::new(family, TinySizes::default());
        change(&mut model.config);
        model.save_folder(&folder.0, Format::F32, 1).unwrap();
        let error = quantize(&folder.0, &out, Format::F32, |_| {}).unwrap_err();
        assert!(matches!(error, Error::UnsupportedConfig { .. }), "{error}");
        assert!(!out.exists());
    };
    refused("llama", &|config| config["hidden_act"] = json!("gelu_pytorch_tanh"));
    refused("qwen2-yarn", &|config| config["rope_scaling"]["truncate"] = json!(false));
    refused("gpt-oss", &|config| config["rope_scaling"]["truncate"] = json!(true));
}

#[test]
fn rows_survive_the_way_there_and_back() {
    // Llama's rows change places: a file of whole numbers shows where each went.
    let sizes = TinySizes { layers: 1, ..TinySizes::default() };
    let mut model = Tiny::new("llama", sizes);
    let name = "model.layers.0.self_attn.q_proj.weight";
    let query = model.tensors.iter_mut().find(|tensor| tensor.hugging_face == name).unwrap();
    query.values = (0..32 * 24).map(|n| (n / 24) as f32).collect();
    let folder = Folder::new("quantize-rows");
    model.save_folder(&folder.0, Format::F32, 1).unwrap();
    let out = folder.0.join("out.gguf");
    run(&folder.0, &out, Format::F16);
    let weights = Weights::open(&out).unwrap();
    let query = weights.tensor("blk.0.attn_q.weight").unwrap();
    let mut row = [0.0; 24];
    let first: Vec<f32> = (0..32)
        .map(|n| {
            dequantize_row(Format::F16, query.row(n).unwrap(), &mut row).unwrap();
            row[0]
        })
        .collect();
    assert_eq!(first[..8], [0.0, 4.0, 1.0, 5.0, 2.0, 6.0, 3.0, 7.0]);
    assert_eq!(first[24..], [24.0, 28.0, 25.0, 29.0, 26.0, 30.0, 27.0, 31.0]);
}
