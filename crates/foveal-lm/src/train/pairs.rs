//! Pairs of texts: lines of files, or a task that is made up.
//!
//! ```text
//! .jsonl     {"source": "…", "target": "…"}       the members that data.source_key and data.target_key name
//! .tsv       source, a tab, target
//! task       4096 pairs of 4 to 12 random letters, and the same or the reverse
//! ```
//!
//! A source is not empty. Pairs are texts one after the other: source, target, source, target, …

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::Error;
use super::config::{Config, DataSection, Task};
use super::corpus::{files, has_ending, wrong};
use super::random::{Use, numbers, seed};

/// What of a folder is read.
const ENDINGS: [&str; 2] = ["jsonl", "tsv"];
/// Pairs of a task.
const PAIRS: usize = 4096;
/// Letters of a text of a task.
const LETTERS: [usize; 2] = [4, 12];

/// The pairs that a run trains on: those of its files, or of its task.
///
/// # Errors
///
/// [`Error::Text`] for a file that can't be read or a line that is no pair.
pub(super) fn of_run(config: &Config) -> Result<Vec<String>, Error> {
    match config.data.task {
        Some(task) => Ok(made_up(task, &config.data, config.train.seed)),
        None => read(&config.data.train, &config.data),
    }
}

/// The pairs of files and folders, in order.
///
/// # Errors
///
/// [`Error::Text`] for a file that can't be read, is no UTF-8, or has a line that is no pair.
pub(super) fn read(paths: &[PathBuf], data: &DataSection) -> Result<Vec<String>, Error> {
    let mut texts = vec![];
    for path in paths {
        for file in files(path, &ENDINGS)? {
            let bytes = std::fs::read(&file).map_err(|error| wrong(&file, error))?;
            let text =
                String::from_utf8(bytes).map_err(|error| wrong(&file, error.utf8_error()))?;
            let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
            for (n, line) in lines {
                let pair =
                    if has_ending(&file, &["jsonl"]) { members(line, data) } else { columns(line) };
                texts.extend(pair.map_err(|reason| line_error(&file, n, &reason))?);
            }
        }
    }
    Ok(texts)
}

fn line_error(file: &Path, line: usize, reason: &str) -> Error {
    wrong(file, format!("line {}: {reason}", line + 1))
}

fn members(line: &str, data: &DataSection) -> Result<[String; 2], String> {
    let object: Value = serde_json::from_str(line).map_err(|error| error.to_string())?;
    let member = |key: &str| match object.get(key).and_then(Value::as_str) {
        Some(text) => Ok(text.to_owned()),
        None => Err(format!(
            "it has no text {key:?}; data.source_key and data.target_key name the members of a pair"
        )),
    };
    filled([member(&data.source_key)?, member(&data.target_key)?])
}

fn columns(line: &str) -> Result<[String; 2], String> {
    let columns: Vec<&str> = line.split('\t').collect();
    match columns[..] {
        [source, target] => filled([source.to_owned(), target.to_owned()]),
        _ => Err(format!("it has {} columns, expected source, a tab, target", columns.len())),
    }
}

fn filled(pair: [String; 2]) -> Result<[String; 2], String> {
    match pair[0].is_empty() {
        true => Err("its source is empty".to_owned()),
        false => Ok(pair),
    }
}

/// Pairs of random letters.
fn made_up(task: Task, data: &DataSection, run: u64) -> Vec<String> {
    let mut random = numbers(seed(run, Use::Task, [0, 0]));
    // The decoder reads one token more than a target has.
    let most = LETTERS[1].min(data.sequence - 1);
    let least = LETTERS[0].min(most);
    let mut pair = || {
        let count = least + random.below(most - least + 1);
        let source: String =
            (0..count).map(|_| char::from(b'a' + random.below(26) as u8)).collect();
        let target = match task {
            Task::Copy => source.clone(),
            Task::Reverse => source.chars().rev().collect(),
        };
        [source, target]
    };
    (0..PAIRS).flat_map(|_| pair()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_pairs() {
        let folder = std::env::temp_dir().join(format!("foveal-pairs-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let write = |name: &str, text: &str| std::fs::write(folder.join(name), text).unwrap();
        write("b.tsv", "one\teins\r\n\ntwo\tzwei\n");
        write("a.jsonl", "{\"source\": \"three\", \"id\": 3, \"target\": \"\"}\n");
        write("c.txt", "no pair");
        let data = DataSection::default();
        let texts = read(std::slice::from_ref(&folder), &data).unwrap();
        assert_eq!(texts, ["three", "", "one", "eins", "two", "zwei"]);
        for (text, words) in [
            ("one\teins\nalone\n", "line 2: it has 1 columns"),
            ("one\ttwo\tthree\n", "3 columns"),
            ("\tnothing\n", "line 1: its source is empty"),
        ] {
            write("bad.tsv", text);
            let message = read(&[folder.join("bad.tsv")], &data).unwrap_err().to_string();
            assert!(message.contains(words), "{message}");
        }
        write("bad.jsonl", "{\"source\": \"x\", \"translation\": \"y\"}\n");
        let message = read(&[folder.join("bad.jsonl")], &data).unwrap_err().to_string();
        assert!(message.contains("line 1: it has no text \"target\""), "{message}");
        let named = DataSection { target_key: "translation".to_owned(), ..data };
        assert_eq!(read(&[folder.join("bad.jsonl")], &named).unwrap(), ["x", "y"]);
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn a_task_is_what_it_says_for_any_length() {
        for sequence in [2, 3, 9, 100] {
            let data = DataSection { sequence, ..DataSection::default() };
            for (task, reverse) in [(Task::Copy, false), (Task::Reverse, true)] {
                let texts = made_up(task, &data, 5);
                assert_eq!(texts.len(), 2 * PAIRS);
                for pair in texts.chunks_exact(2) {
                    let expected = match reverse {
                        true => pair[0].chars().rev().collect(),
                        false => pair[0].clone(),
                    };
                    assert_eq!(pair[1], expected);
                    assert!(!pair[0].is_empty() && pair[0].len() < sequence.min(13));
                }
                assert_ne!(texts, made_up(task, &data, 6));
            }
        }
    }
}
