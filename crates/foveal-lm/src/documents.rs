//! The documents of a text that is read as it comes: memory does not grow with it, nor with a document.
//!
//! A document ends at a line of its own, or where the text does; or each line of JSON is one (JSONL). Training reads its
//! files so, too.

use std::io::{BufRead, Read};

use serde_json::Value;

use crate::Error;

/// Bytes of a line of JSON, at most.
const LINE: u64 = 64 << 20;
/// White space that may follow on a separator.
const SPACE: usize = 64;

/// Where a document ends.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Boundary {
    /// Where the text does: there is one document.
    #[default]
    End,
    /// At a line that is this text, and perhaps white space behind it.
    Line(String),
    /// At the end of each line, which is an object of JSON with this member for the text. Lines of white space are skipped.
    Json(String),
}

/// A text as documents, one after the other.
///
/// ```
/// use foveal_lm::documents::{Boundary, Documents};
/// use std::io::Read;
///
/// let mut documents = Documents::new(&b"one\n---\ntwo\n"[..], Boundary::Line("---".to_owned()));
/// let mut texts = vec![];
/// while let Some(mut document) = documents.next_document()? {
///     let mut text = String::new();
///     document.read_to_string(&mut text).unwrap();
///     texts.push(text);
/// }
/// assert_eq!(texts, ["one\n", "two\n"]);
/// # Ok::<(), foveal_lm::Error>(())
/// ```
#[derive(Debug)]
pub struct Documents<R> {
    from: R,
    boundary: Boundary,
    /// Documents that have begun.
    begun: usize,
    /// Lines of JSON that were read.
    lines: usize,
    /// Read, but not yet handed out: a line of JSON's text, or what might have been a separator.
    held: Vec<u8>,
    /// How much of it has been handed out.
    given: usize,
    /// Whether the next byte begins a line.
    line_begins: bool,
    /// Whether the document has ended, and the text.
    ended: [bool; 2],
}

/// What is left of a document. What is not read of it is skipped.
#[derive(Debug)]
pub struct Document<'a, R: BufRead>(&'a mut Documents<R>);

impl<R: BufRead> Documents<R> {
    /// A text from its beginning.
    pub fn new(from: R, boundary: Boundary) -> Documents<R> {
        Documents {
            from,
            boundary,
            begun: 0,
            lines: 0,
            held: vec![],
            given: 0,
            line_begins: true,
            ended: [true, false],
        }
    }

    /// The next document; `None` at the end of the text.
    ///
    /// # Errors
    ///
    /// [`Error::TextStream`] when the text can't be read, or has a line that is no JSON with the text asked for, or one of more
    /// than 64 MiB.
    pub fn next_document(&mut self) -> Result<Option<Document<'_, R>>, Error> {
        while !self.ended[0] {
            let mut rest = [0; 4096];
            (Document(self)).read(&mut rest).map_err(failed)?;
        }
        if let Boundary::Json(key) = &self.boundary {
            let key = key.clone();
            return Ok(self.next_line(&key)?.then_some(Document(self)));
        }
        // A text without a byte is a document; behind a separator there may be none.
        let begins = self.begun == 0 || !self.at_end()?;
        (self.ended[0], self.line_begins) = (!begins, true);
        self.begun += usize::from(begins);
        Ok(begins.then_some(Document(self)))
    }

    fn at_end(&mut self) -> Result<bool, Error> {
        Ok(self.ended[1] || self.from.fill_buf().map_err(failed)?.is_empty())
    }

    /// Takes the next line of JSON; `false` if there is none.
    fn next_line(&mut self, key: &str) -> Result<bool, Error> {
        loop {
            self.held.clear();
            let read = (&mut self.from).take(LINE + 1).read_until(b'\n', &mut self.held);
            if read.map_err(failed)? == 0 {
                return Ok(false);
            }
            self.lines += 1;
            if !self.held.trim_ascii().is_empty() {
                break;
            }
        }
        let text = if self.held.len() as u64 > LINE {
            Err("it is longer than 64 MiB".to_owned())
        } else {
            member(&self.held, key)
        };
        let number = self.lines;
        let text = text
            .map_err(|reason| Error::TextStream { reason: format!("line {number}: {reason}") })?;
        (self.held, self.given, self.ended[0]) = (text.into_bytes(), 0, false);
        Ok(true)
    }

    /// Looks whether the line that begins is a separator; if not, what was read of it is held.
    fn look(&mut self, separator: &str) -> std::io::Result<()> {
        let most = separator.len() + SPACE;
        self.held.clear();
        self.given = 0;
        (&mut self.from).take(most as u64).read_until(b'\n', &mut self.held)?;
        let whole = self.held.ends_with(b"\n") || self.held.len() < most;
        self.ended[1] = self.held.len() < most && !self.held.ends_with(b"\n");
        self.line_begins = self.held.ends_with(b"\n");
        if whole && !self.held.is_empty() && self.held.trim_ascii_end() == separator.as_bytes() {
            self.held.clear();
            self.ended[0] = true;
        }
        Ok(())
    }
}

fn member(line: &[u8], key: &str) -> Result<String, String> {
    let mut value: Value = serde_json::from_slice(line).map_err(|error| error.to_string())?;
    match value.get_mut(key).map(Value::take) {
        Some(Value::String(text)) => Ok(text),
        _ => Err(format!("it is no object with a text {key:?}; name the member that has it")),
    }
}

#[allow(clippy::needless_pass_by_value, reason = "the form that map_err wants")]
fn failed(error: std::io::Error) -> Error {
    Error::TextStream { reason: error.to_string() }
}

impl<R: BufRead> Read for Document<'_, R> {
    fn read(&mut self, to: &mut [u8]) -> std::io::Result<usize> {
        let Documents { boundary, .. } = &*self.0;
        if to.is_empty() {
            return Ok(0);
        }
        let separator = match boundary {
            Boundary::Line(separator) => Some(separator.trim_end().to_owned()),
            Boundary::End | Boundary::Json(_) => None,
        };
        let json = matches!(boundary, Boundary::Json(_));
        let all = &mut *self.0;
        if let Some(separator) = &separator
            && all.line_begins
            && all.given == all.held.len()
            && all.ended == [false, false]
        {
            all.look(separator)?;
        }
        if all.given < all.held.len() {
            let count = to.len().min(all.held.len() - all.given);
            to[..count].copy_from_slice(&all.held[all.given..all.given + count]);
            all.given += count;
            return Ok(count);
        }
        if all.ended != [false, false] || json {
            all.ended[0] = true;
            return Ok(0);
        }
        let found = all.from.fill_buf()?;
        let mut count = found.len().min(to.len());
        if separator.is_some()
            && let Some(end) = found[..count].iter().position(|&byte| byte == b'\n')
        {
            count = end + 1;
            all.line_begins = true;
        }
        to[..count].copy_from_slice(&found[..count]);
        all.from.consume(count);
        all.ended = [count == 0; 2];
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All documents, through readers that give so many bytes at a time.
    fn all(text: &[u8], boundary: &Boundary, step: usize) -> Result<Vec<String>, Error> {
        let from = std::io::BufReader::with_capacity(step, text);
        let mut documents = Documents::new(from, boundary.clone());
        let mut texts = vec![];
        while let Some(mut document) = documents.next_document()? {
            let (mut bytes, mut some) = (vec![], vec![0; step]);
            loop {
                match document.read(&mut some).unwrap() {
                    0 => break,
                    count => bytes.extend(&some[..count]),
                }
            }
            texts.push(String::from_utf8(bytes).unwrap());
        }
        Ok(texts)
    }

    /// What lies between separators, but for an empty document at the end.
    fn split(text: &str, separator: &str) -> Vec<String> {
        let mut documents = vec![String::new()];
        for line in text.split_inclusive('\n') {
            if line.trim_end() == separator {
                documents.push(String::new());
            } else if let Some(document) = documents.last_mut() {
                document.push_str(line);
            }
        }
        if documents.len() > 1 && documents.last().is_some_and(String::is_empty) {
            documents.pop();
        }
        documents
    }

    #[test]
    fn documents_lie_between_separators() {
        let long = format!("{}---\n{}\n---\n", "x".repeat(200), "-".repeat(300));
        let texts = [
            "",
            "---",
            "---\n",
            "a\n---\nb",
            "a\n---  \r\nb\n",
            "a---\n---b\n---\n---\nc\n\n---\n",
            "a\n --- \n--\n----\nb\n",
            "\n\n---\n\n",
            &long,
        ];
        for text in texts {
            for step in [1, 2, 3, 7, 1000] {
                let found = all(text.as_bytes(), &Boundary::Line("---".to_owned()), step).unwrap();
                assert_eq!(found, split(text, "---"), "{text:?} by {step}");
                let whole = all(text.as_bytes(), &Boundary::End, step).unwrap();
                assert_eq!(whole, [text], "{text:?} by {step}");
            }
        }
    }

    #[test]
    fn each_line_of_json_is_a_document() {
        let key = Boundary::Json("text".to_owned());
        let text = "{\"text\": \"a\\nb\"}\n\n  \n{\"id\": 1, \"text\": \"\"}\r\n{\"text\": \"c\"}";
        for step in [1, 5, 1000] {
            assert_eq!(all(text.as_bytes(), &key, step).unwrap(), ["a\nb", "", "c"]);
        }
        assert!(all(b"", &key, 5).unwrap().is_empty());
        for bad in ["{\"text\": \"a\"}\nno\n", "{\"text\": \"a\"}\n{\"texts\": \"a\"}", "\n[1]\n"] {
            let Err(Error::TextStream { reason }) = all(bad.as_bytes(), &key, 9) else {
                panic!("{bad}")
            };
            assert!(reason.contains("line 2"), "{reason}");
        }
    }

    #[test]
    fn what_is_not_read_of_a_document_is_skipped() {
        for (text, boundary) in [
            (&b"abc\nabc\n---\nd\n"[..], Boundary::Line("---".to_owned())),
            (b"{\"t\": \"abc\"}\n{\"t\": \"d\\n\"}\n", Boundary::Json("t".to_owned())),
        ] {
            let mut documents = Documents::new(text, boundary);
            let mut one = [0];
            documents.next_document().unwrap().unwrap().read_exact(&mut one).unwrap();
            assert_eq!(one, *b"a");
            let mut rest = String::new();
            documents.next_document().unwrap().unwrap().read_to_string(&mut rest).unwrap();
            assert_eq!(rest, "d\n");
            assert!(documents.next_document().unwrap().is_none());
        }
    }
}
