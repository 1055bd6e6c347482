//! The command as a user meets it: what goes to which stream, exit codes, damaged files.

use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

fn foveal(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_foveal")).args(arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn stdout_carries_the_continuation_alone() {
    let arguments =
        ["generate", "--temperature", "0", "--max-tokens", "12", "Alice was beginning to"];
    let first = foveal(&arguments);
    assert!(first.status.success(), "{}", text(&first.stderr));
    let continuation = text(&first.stdout);
    assert!(!continuation.contains("Alice was beginning") && !continuation.trim().is_empty());
    assert!(!text(&first.stderr).is_empty());
    assert_eq!(foveal(&arguments).stdout, first.stdout);
}

#[test]
fn a_seed_decides_the_text() {
    let with =
        |seed| foveal(&["generate", "--max-tokens", "30", "--seed", seed, "The Queen"]).stdout;
    assert_eq!(with("1"), with("1"));
    assert_ne!(with("1"), with("2"));
}

#[test]
fn a_text_may_outgrow_the_context() {
    let run = foveal(&["generate", "--max-tokens", "300", "--seed", "3", "--json", "The King"]);
    assert!(run.status.success(), "{}", text(&run.stderr));
    let json: serde_json::Value = serde_json::from_slice(&run.stdout).unwrap();
    assert!(json.is_object(), "{json}");
}

#[test]
fn a_prompt_comes_from_standard_input() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_foveal"))
        .args(["generate", "--temperature", "0", "--max-tokens", "8", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"Alice was beginning to").unwrap();
    let piped = child.wait_with_output().unwrap();
    let direct =
        foveal(&["generate", "--temperature", "0", "--max-tokens", "8", "Alice was beginning to"]);
    assert_eq!(piped.stdout, direct.stdout);
}

#[test]
fn bad_usage_ends_with_two_and_a_missing_file_with_one() {
    assert_eq!(foveal(&["generate", "--temperature", "NaN", "x"]).status.code(), Some(2));
    assert_eq!(foveal(&["nonsense"]).status.code(), Some(2));
    let missing = foveal(&["generate", "--model", "no such file.gguf", "x"]);
    assert_eq!(missing.status.code(), Some(1));
    assert!(text(&missing.stderr).contains("no such file.gguf"));
    assert!(missing.stdout.is_empty());
}

#[test]
fn the_registry_is_listed() {
    let listed: serde_json::Value =
        serde_json::from_slice(&foveal(&["list", "--json"]).stdout).unwrap();
    assert!(listed.as_array().unwrap().iter().any(|mechanism| mechanism["name"] == "full"));
}

#[test]
fn damaged_models_end_with_a_sentence() {
    let whole = include_bytes!("../assets/glassllm-en.gguf");
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    let file = folder.join("damaged.gguf");
    let mut damaged: Vec<Vec<u8>> =
        [0, 3, 24, 100, 5_000, 40_000, whole.len() - 1].map(|n| whole[..n].to_vec()).to_vec();
    for at in [0, 5, 8, 16, 30, 77, 300, 1_000, 9_000] {
        for bit in [0, 6] {
            let mut flipped = whole.to_vec();
            flipped[at] ^= 1 << bit;
            damaged.push(flipped);
        }
    }
    for (n, bytes) in damaged.iter().enumerate() {
        std::fs::write(&file, bytes).unwrap();
        for arguments in [
            &["inspect", file.to_str().unwrap()][..],
            &["generate", "--max-tokens", "2", "--model", file.to_str().unwrap(), "x"],
        ] {
            let run = foveal(arguments);
            let (code, said) = (run.status.code(), text(&run.stderr));
            assert!(code.is_some_and(|code| code < 100), "case {n}: {code:?} {said}");
            assert!(!said.contains("panicked"), "case {n}: {said}");
            if code != Some(0) {
                assert_eq!(said.trim().lines().count(), 1, "case {n}: {said}");
            }
        }
    }
}
