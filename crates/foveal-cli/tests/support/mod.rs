//! What the tests of the command share.

#![allow(dead_code, reason = "shared by tests that each use some of it")]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// A model of 853 thousand parameters, whose texts the tests know.
pub(crate) const SMALL: &str =
    concat!(env!("CARGO_MANIFEST_DIR"), "/../foveal-lm/tests/assets/glassllm-en.gguf");

/// The command, with the built-in model where the arguments name none.
pub(crate) fn built_in(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_foveal"));
    command.args(arguments).stdin(Stdio::null());
    command
}

/// The command, with [`SMALL`] where the arguments name no model.
pub(crate) fn foveal(arguments: &[&str]) -> Command {
    let runs = ["generate", "chat", "eval", "look", "bench", "batch", "serve"];
    match arguments {
        [name, rest @ ..]
            if runs.contains(name) && !rest.iter().any(|one| ["--model", "-m"].contains(one)) =>
        {
            built_in(&[&[*name, "--model", SMALL], rest].concat())
        }
        _ => built_in(arguments),
    }
}

pub(crate) fn run(arguments: &[&str]) -> Output {
    foveal(arguments).output().unwrap()
}

pub(crate) fn stdout(output: &Output) -> &str {
    std::str::from_utf8(&output.stdout).unwrap()
}

pub(crate) fn stderr(output: &Output) -> &str {
    std::str::from_utf8(&output.stderr).unwrap()
}

/// An error: the exit code, nothing on standard output, and one line that has `words`.
#[track_caller]
pub(crate) fn assert_fails(output: &Output, code: i32, words: &[&str]) {
    let message = stderr(output);
    assert_eq!(output.status.code(), Some(code), "{message}");
    assert_eq!(stdout(output), "");
    assert!(code == 2 || message.trim_end().lines().count() == 1, "{message}");
    assert!(words.iter().all(|word| message.contains(word)), "{message}");
    assert!(!message.contains("panicked"), "{message}");
}

/// A folder that is removed when it is done with.
pub(crate) struct Folder(pub(crate) PathBuf);

impl Folder {
    pub(crate) fn new(name: &str) -> Folder {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        std::fs::create_dir_all(&folder).unwrap();
        Folder(folder)
    }

    pub(crate) fn write(&self, name: &str, bytes: &[u8]) -> String {
        let path = self.0.join(name);
        std::fs::write(&path, bytes).unwrap();
        path.to_str().unwrap().to_owned()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Runs the command with `input` as standard input.
pub(crate) fn run_with(arguments: &[&str], input: &str) -> Output {
    let mut command = foveal(arguments);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    // A command that refuses its arguments reads nothing.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    child.wait_with_output().unwrap()
}
