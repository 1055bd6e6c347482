//! The built-in model: the texts that are committed of it and those that it writes, what it makes of a novel that it has not seen, and in what memory.

mod support;

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};

use serde_json::Value;
use support::{Folder, built_in, stderr};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/novels")
}

fn read(name: &str) -> String {
    std::fs::read_to_string(folder().join(name)).unwrap()
}

fn run(arguments: &[&str]) -> Output {
    let output = built_in(arguments).stderr(Stdio::piped()).output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", stderr(&output));
    output
}

/// Words in small letters; the last one of a text may be cut off and is left out.
fn words(text: &str) -> Vec<String> {
    let all = text.split(|c: char| !c.is_ascii_alphabetic()).filter(|word| !word.is_empty());
    let mut words: Vec<String> = all.map(str::to_ascii_lowercase).collect();
    words.pop();
    words
}

/// 20 texts of 200 tokens, of words that the novels have, none of which goes round in circles.
#[track_caller]
fn check(lines: &str) {
    let known = read("words.txt");
    let known: HashSet<&str> = known.lines().collect();
    let (mut count, mut inside, mut texts) = (0, 0, 0);
    for line in lines.lines() {
        let answer: Value = serde_json::from_str(line).unwrap();
        assert_eq!(answer["tokens"], 200, "{line}");
        let words = words(answer["text"].as_str().unwrap());
        let mut seen: HashMap<&[String], usize> = HashMap::new();
        words.windows(8).for_each(|eight| *seen.entry(eight).or_default() += 1);
        assert!(seen.values().all(|&times| times <= 2), "{line}");
        count += words.len();
        inside += words.iter().filter(|word| known.contains(word.as_str())).count();
        texts += 1;
    }
    assert_eq!(texts, 20);
    let share = inside as f64 / count as f64;
    assert!(count > 2000 && share >= 0.95, "{share} of {count} words");
}

#[test]
fn committed_texts_are_of_words_and_do_not_repeat() {
    check(&read("samples.jsonl"));
}

#[test]
fn it_writes_such_texts() {
    let prompts = folder().join("prompts.jsonl");
    let output = run(&["batch", prompts.to_str().unwrap()]);
    check(std::str::from_utf8(&output.stdout).unwrap());
}

#[test]
fn a_novel_goes_through_it_in_bounded_memory() {
    let folder = Folder::new("novels");
    let novel = concat!(env!("CARGO_MANIFEST_DIR"), "/assets/northanger-abbey.txt");
    // As its training had it: a paragraph is a line.
    let novel = std::fs::read_to_string(novel).unwrap().replace("\r\n", "\n");
    let lines = novel.split("\n\n").map(|one| one.split_whitespace().collect::<Vec<_>>().join(" "));
    let text: String = lines.filter(|line| !line.is_empty()).collect::<Vec<_>>().join("\n\n");
    let figures = |bytes: usize| -> Value {
        let text = &text.as_bytes()[..bytes];
        let text = folder.write("text.txt", String::from_utf8_lossy(text).as_bytes());
        let output = run(&["eval", "--text", &text, "--stream", "--json"]);
        serde_json::from_slice(&output.stdout).unwrap()
    };
    // The memory holds 4096 tokens, which both texts have.
    let (short, long) = (figures(20_000), figures(200_000));
    let state = |figures: &Value| figures["kv_bytes"].as_u64().unwrap();
    // Ten times as long a text; pages of windows may be fuller.
    assert!(state(&short) > 0 && state(&long) * 10 <= state(&short) * 11, "{short} {long}");
    // The 5-gram of models/novels/README.md needs 1.64 of the whole novel.
    let bits = long["bits_per_byte"].as_f64().unwrap();
    assert!((1.0..1.55).contains(&bits), "{bits}");
}
