//! The test vectors that llama.cpp ships with its vocabularies: every text gives exactly the ids listed.
//!
//! A vocabulary `V.gguf` comes with `V.gguf.inp`, texts divided by lines with `__ggml_vocab_test__`, and `V.gguf.out`, a
//! line of ids for each. The call is that of llama.cpp's `tests/test-tokenizer-0.cpp`: no begin token, marks as text.

use std::fs;
use std::path::Path;

use foveal_lm::testing::fetch_vocabularies;
use foveal_lm::tokenizer::{Encode, Error, Tokenizer};
use foveal_lm::weights::Gguf;

/// The vocabularies with vectors of the kinds that are supported, and how many each has.
const CLAIMED: [(&str, usize); 14] = [
    ("command-r", 46),
    ("deepseek-coder", 46),
    ("deepseek-llm", 46),
    ("falcon", 46),
    ("gemma-4", 46),
    ("gpt-2", 46),
    ("llama-bpe", 46),
    ("llama-spm", 46),
    ("mpt", 46),
    ("phi-3", 46),
    ("qwen2", 46),
    ("qwen35", 50),
    ("refact", 46),
    ("starcoder", 46),
];

/// The vocabularies of other kinds.
const NOT_CLAIMED: [(&str, &str); 2] = [("bert-bge", "bert"), ("nomic-bert-moe", "t5")];

/// Vocabularies of the supported kinds that come without vectors: they load.
const WITHOUT_VECTORS: [&str; 3] = ["aquila", "baichuan", "gpt-neox"];

fn load(folder: &Path, name: &str) -> Result<Tokenizer, Error> {
    let file = Gguf::open(&folder.join(format!("ggml-vocab-{name}.gguf")))?;
    Tokenizer::from_gguf(file.metadata())
}

/// The texts and their ids.
fn vectors(folder: &Path, name: &str) -> Vec<(String, Vec<u32>)> {
    let read = |kind| {
        fs::read_to_string(folder.join(format!("ggml-vocab-{name}.gguf.{kind}"))).expect("vectors")
    };
    let (texts, ids) = (read("inp"), read("out"));
    let texts: Vec<_> =
        texts.split_terminator("\n__ggml_vocab_test__\n").map(str::to_owned).collect();
    let numbers =
        |line: &str| line.split_whitespace().map(|id| id.parse().expect("an id")).collect();
    let ids: Vec<_> = ids.lines().map(numbers).collect();
    assert_eq!(texts.len(), ids.len(), "{name}");
    texts.into_iter().zip(ids).collect()
}

#[test]
fn every_vector_of_llama_cpp_is_met() {
    let Some(folder) = fetch_vocabularies() else { return };
    for (name, count) in CLAIMED {
        let tokenizer = load(&folder, name).expect("a supported vocabulary");
        let vectors = vectors(&folder, name);
        assert_eq!(vectors.len(), count, "{name}");
        for (text, expected) in vectors {
            assert_eq!(
                tokenizer.encode(&text, Encode::TEXT).expect("ids"),
                expected,
                "{name}: {text:?}"
            );
        }
        println!("{name}: {count} of {count} vectors");
    }
    for name in WITHOUT_VECTORS {
        load(&folder, name).expect("a supported vocabulary");
        println!("{name}: loads, has no vectors");
    }
    for (name, model) in NOT_CLAIMED {
        let refused = load(&folder, name).map(|_| ()).expect_err("a kind that is not supported");
        assert!(matches!(&refused, Error::Model { found, .. } if found == model), "{refused}");
        println!("{name}: not claimed ({refused})");
    }
}
