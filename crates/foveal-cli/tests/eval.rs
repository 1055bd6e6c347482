//! `foveal eval`: its figures agree with each other, and with a text that is cut otherwise.

mod support;

use serde_json::Value;
use support::{Folder, assert_fails, run, run_with, stderr, stdout};

const TEXT: &str = "Alice was beginning to get very tired of sitting by her sister on the bank, and of \
    having nothing to do: once or twice she had peeped into the book her sister was reading. ";

fn json(arguments: &[&str], text: &str) -> Value {
    let output = run_with(&[&["eval", "--text", "-", "--json"], arguments].concat(), text);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

#[test]
fn figures_agree_with_each_other() {
    let text = TEXT.repeat(8);
    let found = json(&["--kv-cache", "f32"], &text);
    let mean = number(&found["mean_nll"]);
    assert!((1.0..6.0).contains(&mean), "{mean}");
    assert!((number(&found["perplexity"]) - mean.exp()).abs() < 1e-9 * mean.exp());
    let (predicted, bytes) = (number(&found["predicted"]), number(&found["bytes"]));
    let bits = mean * predicted / bytes / std::f64::consts::LN_2;
    assert!((number(&found["bits_per_byte"]) - bits).abs() < 1e-9);
    assert_eq!(predicted, number(&found["tokens"]) - 1.0);
    // All bytes but those of the first token.
    assert!(bytes < text.len() as f64 + 1.0 && bytes > text.len() as f64 - 12.0, "{bytes}");
    let buckets = found["by_position"].as_array().unwrap();
    assert!(buckets.len() >= 4);
    let sum: f64 = buckets.iter().map(|b| number(&b["mean_nll"]) * number(&b["tokens"])).sum();
    assert!((sum / predicted - mean).abs() < 1e-9);
    assert_eq!(
        json(&["--kv-cache", "f32", "--threads", "1"], &text)["mean_nll"],
        found["mean_nll"]
    );
}

#[test]
fn a_number_of_tokens_is_taken_from_the_beginning() {
    let whole = json(&[], &TEXT.repeat(3));
    let tokens = whole["tokens"].as_u64().unwrap();
    // A text that goes on for a long time is looked at no further than needed, with the same result.
    let long = TEXT.repeat(3000);
    let found = json(&["--tokens", &tokens.to_string()], &long);
    assert_eq!(found["tokens"], whole["tokens"]);
    let off = number(&found["mean_nll"]) - number(&whole["mean_nll"]);
    assert!(off.abs() < 0.05, "{off}");
    assert_eq!(json(&["--tokens", "64"], &long)["predicted"], 63);
}

#[test]
fn chunks_are_texts_of_their_own() {
    let text = TEXT.repeat(4);
    let chunked = json(&["--chunk", "50", "--tokens", "100"], &text);
    assert_eq!(chunked["predicted"], 98);
    assert_eq!(chunked["by_position"].as_array().unwrap().len(), 1);
    let first = json(&["--tokens", "50"], &text);
    let half = number(&first["mean_nll"]) * 49.0;
    assert!(half < number(&chunked["mean_nll"]) * 98.0);
    // A last chunk of one token predicts nothing.
    assert_eq!(json(&["--chunk", "50", "--tokens", "101"], &text)["mean_nll"], chunked["mean_nll"]);
}

#[test]
fn files_are_read_and_what_is_no_text_is_refused() {
    let folder = Folder::new("eval");
    let path = folder.write("text.txt", TEXT.as_bytes());
    let output = run(&["eval", "--text", &path]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    for words in ["perplexity", "bits per byte", "0..64", "tok/s"] {
        assert!(stdout(&output).contains(words), "{words}: {}", stdout(&output));
    }
    let latin = folder.write("latin.txt", b"caf\xe9");
    assert_fails(&run(&["eval", "--text", &latin]), 1, &["UTF-8", "latin.txt"]);
    assert_fails(&run(&["eval", "--text", "/no/such/file"]), 1, &["/no/such/file"]);
    assert_fails(&run_with(&["eval", "--text", "-"], ""), 1, &["tokens", "at least 2"]);
    assert_fails(&run(&["eval", "--text", &path, "--chunk", "1"]), 1, &["--chunk", "2"]);
    assert_fails(&run(&["eval"]), 2, &["--text"]);
}
