//! Folders whose configuration names mixers, through the command.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use foveal_lm::testing::{Tiny, TinySizes};
use serde_json::{Map, Value, json};

fn foveal(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_foveal")).args(arguments).output().unwrap()
}

fn stdout(arguments: &[&str]) -> String {
    let output = foveal(arguments);
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {message}");
    String::from_utf8(output.stdout).unwrap()
}

/// A tokenizer whose tokens are the bytes.
fn bytes() -> Value {
    let printable = |byte: u32| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let mut others = 256..;
    let mut vocab = Map::new();
    for byte in 0..256 {
        let code = if printable(byte) { byte } else { others.next().unwrap() };
        vocab.insert(char::from_u32(code).unwrap().to_string(), byte.into());
    }
    let level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    json!({
        "version": "1.0", "added_tokens": [], "normalizer": null, "post_processor": null,
        "pre_tokenizer": level, "decoder": level,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    })
}

/// A model of four layers with random weights, each with other mixers.
fn hybrid() -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("mixers");
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder).unwrap();
    let sizes = TinySizes { vocab: 256, layers: 4, kv_heads: 4, ..TinySizes::default() };
    let mut model = Tiny::new("llama", sizes);
    model.config["foveal"] = json!({"mixer": [
        {"name": "sparse_transformer", "pattern": "fixed", "stride": 16, "width": 2},
        {"name": "linear"},
        [{"name": "window", "tokens": 12, "heads": 2}, {"name": "efficient", "heads": 2}],
        {"name": "moba", "block": 8, "top": 3},
    ]});
    model.save_folder(&folder, foveal::projection::Format::F32, 1).unwrap();
    std::fs::write(folder.join("tokenizer.json"), bytes().to_string()).unwrap();
    folder
}

#[test]
fn a_hybrid_model_runs_and_what_it_does_not_do_is_refused() {
    let folder = hybrid();
    let model = folder.to_str().unwrap();
    let prompt = "Alice was beginning to get very tired of sitting by her sister on the bank.";
    let generate = ["generate", "-m", model, "-n", "20", "-t", "0", "--json"];
    let alone: Value = serde_json::from_str(&stdout(&[&generate[..], &[prompt]].concat())).unwrap();
    let one = [&generate[..], &["--threads", "1", prompt]].concat();
    assert_eq!(alone["text"], serde_json::from_str::<Value>(&stdout(&one)).unwrap()["text"]);

    let input = folder.join("in.jsonl");
    let line = json!({"prompt": prompt, "max_tokens": 20, "temperature": 0}).to_string();
    std::fs::write(&input, format!("{line}\n{line}\n{{\"prompt\": \"a\", \"max_tokens\": 5}}\n"))
        .unwrap();
    let answers = stdout(&["batch", "-m", model, input.to_str().unwrap()]);
    for answer in answers.lines().take(2) {
        assert_eq!(serde_json::from_str::<Value>(answer).unwrap()["text"], alone["text"]);
    }

    let text = folder.join("text.txt");
    std::fs::write(&text, prompt.repeat(5)).unwrap();
    assert!(!stdout(&["eval", "-m", model, "--text", text.to_str().unwrap()]).is_empty());

    let cache = folder.join("cache").to_str().unwrap().to_owned();
    let cached = [&generate[..], &["--prompt-cache", &cache, prompt]].concat();
    for held in [0, prompt.len() - 1] {
        let again: Value = serde_json::from_str(&stdout(&cached)).unwrap();
        assert_eq!(
            (&again["text"], &again["prompt_tokens_cached"]),
            (&alone["text"], &held.into())
        );
    }
    let seen = stdout(&["look", "-m", model, prompt]);
    let named = ["sparse_transformer", "linear", "window", "efficient", "moba"];
    assert!(named.iter().any(|name| seen.contains(name)), "{seen}");
    let gguf = folder.join("out.gguf").to_str().unwrap().to_owned();
    stdout(&["quantize", model, &gguf, "--type", "f32"]);
    let again = ["generate", "-m", &gguf, "-n", "20", "-t", "0", "--json", prompt];
    let again: Value = serde_json::from_str(&stdout(&again)).unwrap();
    assert_eq!(again["text"], alone["text"]);
    let output = foveal(&["generate", "-m", model, "--window", "8", prompt]);
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && message.contains("mixer that is named"), "{message}");
    std::fs::remove_dir_all(&folder).unwrap();
}
