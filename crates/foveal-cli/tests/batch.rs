//! `foveal batch`: JSON lines in, JSON lines out.

mod support;

use std::io::Write;
use std::path::Path;
use std::process::{Output, Stdio};

use serde_json::{Value, json};
use support::foveal;

/// Runs a batch with `input` on standard input.
fn batch(arguments: &[&str], input: &[u8]) -> Output {
    let mut command = foveal(&[&["batch", "-"], arguments].concat());
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
    let writer = std::thread::spawn(move || stdin.write_all(&input));
    let output = child.wait_with_output().unwrap();
    let _ = writer.join().unwrap();
    output
}

fn lines(output: &Output) -> Vec<Value> {
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{message}");
    let text = std::str::from_utf8(&output.stdout).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn alone(line: &Value) -> Value {
    let text = |key: &str| match &line[key] {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    let mut arguments = vec!["generate".to_owned(), "--json".to_owned()];
    for (key, option) in [
        ("max_tokens", "--max-tokens"),
        ("temperature", "--temperature"),
        ("top_k", "--top-k"),
        ("seed", "--seed"),
        ("stop", "--stop"),
    ] {
        if !line[key].is_null() {
            arguments.extend([option.to_owned(), text(key)]);
        }
    }
    arguments.extend(["--".to_owned(), text("prompt")]);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let output = foveal(&arguments).output().unwrap();
    assert!(output.status.success());
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn texts_are_those_of_generate_in_the_order_of_the_input() {
    let requests = [
        json!({"prompt": "Alice was beginning to", "temperature": 0, "max_tokens": 50, "id": "a"}),
        json!({"prompt": "The Queen", "seed": 5, "max_tokens": 5, "id": [1, {"b": null}]}),
        json!({"prompt": "Alice ".repeat(300), "seed": 1, "top_k": 7, "max_tokens": 8}),
        json!({"prompt": "The", "temperature": 0, "stop": "e", "max_tokens": 40}),
        json!({"prompt": "One day", "max_tokens": 0}),
    ];
    let input: String = requests.iter().map(|request| format!("{request}\n\n")).collect();
    let expected: Vec<Value> = requests.iter().map(alone).collect();
    for parallel in ["1", "3", "64"] {
        let output = batch(&["--parallel", parallel, "--threads", "2"], input.as_bytes());
        let found = lines(&output);
        assert_eq!(found.len(), requests.len());
        for (n, (found, expected)) in found.iter().zip(&expected).enumerate() {
            assert_eq!(found["index"], n);
            assert_eq!(found["id"], requests[n]["id"]);
            for key in ["text", "stop", "prompt_tokens"] {
                assert_eq!(found[key], expected[key], "{n} {key}, {parallel} at once");
            }
            assert_eq!(found["tokens"], expected["tokens"].as_array().unwrap().len());
        }
        let note = String::from_utf8(output.stderr).unwrap();
        assert!(note.starts_with("5 prompts of ") && note.contains("tok/s"), "{note}");
    }
}

#[test]
fn errors_are_lines_and_end_nothing() {
    let input = concat!(
        "{\"prompt\": \"The\", \"max_tokens\": 2}\n",
        "no json\n",
        "{\"prompt\": \"The\", \"tempreature\": 1, \"id\": 3}\n",
        "{\"max_tokens\": 2}\n",
        "{\"prompt\": \"The\", \"top_p\": 7, \"id\": 4}\n",
        "{\"prompt\": 5}\n",
        "\u{1}\n",
        "{\"prompt\": \"The\", \"max_tokens\": 2}",
    );
    let found = lines(&batch(&[], input.as_bytes()));
    assert_eq!(found.len(), 8);
    for n in [0, 7] {
        assert_eq!(found[n]["tokens"], 2);
        assert_eq!(found[n]["text"], found[0]["text"]);
    }
    let words =
        [(1, "expected"), (2, "tempreature"), (3, "prompt"), (4, "top-p is 7"), (5, "string")];
    for (n, word) in words {
        let error = found[n]["error"].as_str().unwrap();
        assert!(error.contains(word), "{n}: {error}");
        assert_eq!(found[n]["index"], n);
    }
    assert_eq!(found[4]["id"], 4);
    let none = lines(&batch(&[], b""));
    assert!(none.is_empty());
    let invalid = lines(&batch(&[], b"{\"prompt\": \"\xff\"}\n"));
    assert!(invalid[0]["error"].is_string());
}

#[test]
fn files_appear_whole_or_not_at_all() {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("batch");
    std::fs::create_dir_all(&folder).unwrap();
    let (input, out) = (folder.join("in.jsonl"), folder.join("out.jsonl"));
    std::fs::write(&input, "{\"prompt\": \"The\", \"max_tokens\": 3}\n").unwrap();
    let paths = [input.to_str().unwrap(), out.to_str().unwrap()];
    let output = foveal(&["batch", paths[0], paths[1]]).output().unwrap();
    assert!(output.status.success() && output.stdout.is_empty());
    let text = std::fs::read_to_string(&out).unwrap();
    let line: Value = serde_json::from_str(text.trim()).unwrap();
    assert_eq!(line["tokens"], 3);
    let absent = foveal(&["batch", "/nowhere/in.jsonl", paths[1]]).output().unwrap();
    assert_eq!(absent.status.code(), Some(1));
    assert_eq!(std::fs::read_to_string(&out).unwrap(), text);
    let usage = foveal(&["batch", paths[0], "--parallel", "65"]).output().unwrap();
    assert_eq!(usage.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&usage.stderr).contains("expected 1 to 64"));
    std::fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn a_pool_bounds_what_is_kept_and_beginnings_are_read_once() {
    let line = |end: &str| {
        let prompt =
            format!("{} and said {end}", "The Queen of Hearts looked at the King".repeat(4));
        json!({"prompt": prompt, "max_tokens": 9}).to_string()
    };
    let long = json!({"prompt": "Alice ".repeat(600), "max_tokens": 3}).to_string();
    let input = [line("no"), line("yes"), long, line("no more")].join("\n");
    let output = batch(&["--pool", "300"], input.as_bytes());
    let found = lines(&output);
    for n in [0, 1, 3] {
        let prompt = serde_json::from_str(input.lines().nth(n).unwrap()).unwrap();
        assert_eq!(found[n]["text"], alone(&prompt)["text"]);
    }
    let error = found[2]["error"].as_str().unwrap();
    assert!(error.contains("more pages") && error.contains("make the pool larger"), "{error}");
    let output = batch(&[], input.as_bytes());
    assert_eq!(lines(&output)[..2], found[..2]);
    let note = String::from_utf8(output.stderr).unwrap();
    let shared = note.split_once('(').and_then(|(_, rest)| rest.split_once(" shared"));
    // Of three texts that begin alike, two need not read that.
    assert!(shared.unwrap().0.parse::<usize>().unwrap() >= 2 * 32, "{note}");
}

#[test]
fn keys_that_are_given_up_by_choice_are_refused_before_anything_is_read() {
    for keep in [&["--window", "20"][..], &["--evict", "h2o:20"], &["--evict", "snapkv:20"]] {
        let output = batch(keep, b"{\"prompt\": \"Alice\"}\n");
        assert_eq!((output.status.code(), &output.stdout[..]), (Some(1), &b""[..]));
        let message = String::from_utf8_lossy(&output.stderr);
        assert!(message.contains("leave out --window, --sinks and --evict"), "{message}");
    }
}
