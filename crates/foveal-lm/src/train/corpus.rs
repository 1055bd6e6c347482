//! Texts as documents: files of text, files of JSON lines, and folders of both.
//!
//! A file of text is a document, or several where a line of its own stands between them; each line of a `.jsonl` file is
//! one. Folders are read whole, their files by name, so that the same folder always gives the same documents.

use std::io::Read;
use std::path::{Path, PathBuf};

use super::Error;
use super::config::DataSection;
use crate::documents::{Boundary, Documents};

/// What of a folder is read.
const ENDINGS: [&str; 4] = ["jsonl", "md", "text", "txt"];
/// Folders within folders.
const DEPTH: usize = 16;

/// The documents in files and folders, in order.
///
/// # Errors
///
/// [`Error::Text`] for a file that can't be read, is no UTF-8, or has a line that is no JSON object with the member asked
/// for; and for a folder without a text.
pub(super) fn read(paths: &[PathBuf], data: &DataSection) -> Result<Vec<String>, Error> {
    let mut documents = vec![];
    for path in paths {
        for file in files(path, &ENDINGS)? {
            read_file(&file, data, &mut documents)?;
        }
    }
    documents.retain(|document| !document.is_empty());
    Ok(documents)
}

/// A file, or those of a folder with such endings, by name.
///
/// # Errors
///
/// [`Error::Text`] for a folder without one, or that can't be read.
pub(super) fn files(path: &Path, endings: &[&str]) -> Result<Vec<PathBuf>, Error> {
    if !path.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let mut files = vec![];
    list(path, (DEPTH, endings), &mut files)?;
    if files.is_empty() {
        let expected: Vec<String> = endings.iter().map(|ending| format!(".{ending}")).collect();
        let reason = format!("the folder has no file that ends with {}", expected.join(", "));
        return Err(wrong(path, reason));
    }
    Ok(files)
}

#[allow(clippy::needless_pass_by_value, reason = "the form that map_err wants")]
pub(super) fn wrong(path: &Path, reason: impl ToString) -> Error {
    Error::Text { path: path.to_owned(), reason: reason.to_string() }
}

pub(super) fn has_ending(path: &Path, endings: &[&str]) -> bool {
    let ending = path.extension().and_then(|ending| ending.to_str()).unwrap_or_default();
    endings.iter().any(|known| ending.eq_ignore_ascii_case(known))
}

fn list(
    folder: &Path,
    (depth, endings): (usize, &[&str]),
    files: &mut Vec<PathBuf>,
) -> Result<(), Error> {
    let entries = std::fs::read_dir(folder).map_err(|error| wrong(folder, error))?;
    let paths = entries.map(|entry| entry.map(|entry| entry.path()));
    let mut paths = paths.collect::<Result<Vec<_>, _>>().map_err(|error| wrong(folder, error))?;
    paths.sort();
    for path in paths {
        if path.is_dir() {
            let depth = depth.checked_sub(1);
            let depth = depth.ok_or_else(|| wrong(&path, "too many folders in one another"))?;
            list(&path, (depth, endings), files)?;
        } else if has_ending(&path, endings) {
            files.push(path);
        }
    }
    Ok(())
}

fn read_file(path: &Path, data: &DataSection, documents: &mut Vec<String>) -> Result<(), Error> {
    let bytes = std::fs::read(path).map_err(|error| wrong(path, error))?;
    let text = String::from_utf8(bytes).map_err(|error| {
        wrong(path, format!("it is no UTF-8 from byte {} on", error.utf8_error().valid_up_to()))
    })?;
    let boundary = match &data.separator {
        _ if has_ending(path, &["jsonl"]) => Boundary::Json(data.text_key.clone()),
        Some(separator) => Boundary::Line(separator.clone()),
        None => Boundary::End,
    };
    let mut from = Documents::new(text.as_bytes(), boundary);
    while let Some(mut document) = from.next_document().map_err(|error| wrong(path, error))? {
        let mut text = String::new();
        document.read_to_string(&mut text).map_err(|error| wrong(path, error))?;
        documents.push(text);
    }
    Ok(())
}

/// A text in pieces of about `limit` bytes that end where a line does, and another begins with something to see: so words
/// of byte-level tokenizers are whole.
pub(super) fn pieces(text: &str, limit: usize) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let whole = |(at, _): &(usize, &str)| {
            let next = rest[at + 1..].chars().next();
            *at >= limit && next.is_some_and(|next| !next.is_whitespace())
        };
        let end = match rest.len() > limit {
            true => rest.match_indices('\n').find(whole).map_or(rest.len(), |(at, _)| at + 1),
            false => rest.len(),
        };
        let (piece, later) = rest.split_at(end);
        rest = later;
        Some(piece)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_end_with_lines() {
        let text = "one two\nthree\n\n  four\nfive\n";
        let cut: Vec<&str> = pieces(text, 8).collect();
        assert_eq!(cut, ["one two\nthree\n\n  four\n", "five\n"]);
        assert_eq!(pieces(text, 3).collect::<String>(), text);
        assert_eq!(pieces(text, 100).count(), 1);
        assert_eq!(pieces("", 3).count(), 0);
    }

    #[test]
    fn folders_are_read_in_the_order_of_names() {
        let folder = std::env::temp_dir().join(format!("foveal-corpus-{}", std::process::id()));
        std::fs::create_dir_all(folder.join("b")).unwrap();
        let write = |name: &str, text: &str| std::fs::write(folder.join(name), text).unwrap();
        write("c.txt", "one\n---\ntwo\r\n---\n\n---\n");
        write("a.jsonl", "{\"text\": \"first\"}\n\n{\"id\": 1, \"text\": \"second\"}\n");
        write("b/x.md", "within");
        write("b/y.bin", "\u{0}");
        let separator = Some("---".to_owned());
        let data = DataSection { separator, ..DataSection::default() };
        let documents = read(std::slice::from_ref(&folder), &data).unwrap();
        assert_eq!(documents, ["first", "second", "within", "one\n", "two\r\n", "\n"]);

        write("z.jsonl", "{\"text\": \"x\"}\n{\"texts\": 1}\n");
        std::fs::write(folder.join("bad.txt"), b"ab\xff").unwrap();
        for (name, words) in
            [("z.jsonl", "line 2"), ("bad.txt", "byte 2"), ("none.txt", "none.txt")]
        {
            let message = read(&[folder.join(name)], &data).unwrap_err().to_string();
            assert!(message.contains(words), "{message}");
        }
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
