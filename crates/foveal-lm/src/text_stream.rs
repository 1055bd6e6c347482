//! A text of any length as tokens, piece by piece: memory does not grow with it.
//!
//! A piece ends behind a line break before something that is no white space: there every tokenizer begins a new word, so
//! that the tokens are those of the text as a whole. A text without such a place for 1 MiB is cut before a space, where some
//! tokenizers would have gone on.

use std::io::Read;

use crate::Error;
use crate::tokenizer::{Encode, Tokenizer};

/// Bytes of a piece, if there is a place to cut.
const PIECE: usize = 1 << 16;
/// Bytes after which any space will do.
const LONG: usize = 1 << 20;

/// The tokens of a text that is read from somewhere.
#[derive(Debug)]
pub struct TextStream<'a, R> {
    tokenizer: &'a Tokenizer,
    from: R,
    piece: usize,
    /// Read, but not yet made into tokens.
    bytes: Vec<u8>,
    /// Bytes that were made into tokens.
    offset: u64,
    ended: bool,
    /// Tokens around a text: before the first piece and after the last.
    around: [Option<u32>; 2],
}

impl<'a, R: Read> TextStream<'a, R> {
    /// From the beginning of a text, with the tokens around it that the model was trained with.
    ///
    /// # Errors
    ///
    /// [`Error::Tokenizer`].
    pub fn new(tokenizer: &'a Tokenizer, from: R) -> Result<TextStream<'a, R>, Error> {
        let empty = tokenizer.encode("", Encode::PROMPT)?;
        let begins = empty.first().copied().filter(|&token| Some(token) == tokenizer.bos());
        let ends = empty.get(usize::from(begins.is_some())..).and_then(|rest| rest.last().copied());
        let around = [begins, ends];
        let (bytes, offset, ended) = (vec![], 0, false);
        Ok(TextStream { tokenizer, from, piece: PIECE, bytes, offset, ended, around })
    }

    /// On from where another stream of the same text was: its [`TextStream::offset`]. `from` is at the text's beginning.
    ///
    /// # Errors
    ///
    /// [`Error::TextStream`] if the text is shorter; [`Error::Tokenizer`].
    pub fn after(
        tokenizer: &'a Tokenizer,
        mut from: R,
        offset: u64,
    ) -> Result<TextStream<'a, R>, Error> {
        let mut skipped = (&mut from).take(offset);
        let read = std::io::copy(&mut skipped, &mut std::io::sink()).map_err(failed)?;
        if read < offset {
            let reason = format!("it has {read} bytes, and was read up to {offset} before");
            return Err(Error::TextStream { reason });
        }
        let mut stream = TextStream::new(tokenizer, from)?;
        if offset > 0 {
            (stream.offset, stream.around[0]) = (offset, None);
        }
        Ok(stream)
    }

    /// The same in pieces of about so many bytes.
    #[must_use]
    pub fn pieces_of(self, bytes: usize) -> TextStream<'a, R> {
        TextStream { piece: bytes.max(1), ..self }
    }

    /// Bytes that were made into tokens.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// The tokens of the next piece; `None` at the end.
    ///
    /// # Errors
    ///
    /// [`Error::TextStream`] when the text can't be read or is no UTF-8; [`Error::Tokenizer`].
    pub fn next_piece(&mut self) -> Result<Option<Vec<u32>>, Error> {
        let mut least = self.piece;
        let end = loop {
            self.fill(least)?;
            if self.ended {
                break self.bytes.len();
            }
            if let Some(end) = place(&self.bytes, self.bytes.len() >= LONG) {
                break end;
            }
            least = self.bytes.len() + self.piece;
        };
        let first = self.offset == 0;
        let begins = self.around[0].take();
        if end == 0 {
            let ends = self.around[1].take();
            let rest: Vec<u32> = begins.into_iter().chain(ends).collect();
            return Ok((!rest.is_empty()).then_some(rest));
        }
        let text = std::str::from_utf8(&self.bytes[..end]).map_err(|error| {
            let at = self.offset + error.valid_up_to() as u64;
            Error::TextStream { reason: format!("it is not UTF-8 at byte {at}; convert it first") }
        })?;
        let mut tokens: Vec<u32> = begins.into_iter().collect();
        tokens.extend(self.encode(text, first)?);
        self.offset += end as u64;
        self.bytes.drain(..end);
        Ok(Some(tokens))
    }

    /// The tokens of a part of the text.
    fn encode(&self, text: &str, first: bool) -> Result<Vec<u32>, Error> {
        if first || !self.tokenizer.adds_space_prefix() {
            return Ok(self.tokenizer.encode(text, Encode::TEXT)?);
        }
        // A space before a text goes before the line break that this part follows on.
        let before = self.tokenizer.encode("\n", Encode::TEXT)?;
        let mut tokens = self.tokenizer.encode(&format!("\n{text}"), Encode::TEXT)?;
        match tokens.starts_with(&before) {
            true => Ok(tokens.split_off(before.len())),
            false => Ok(self.tokenizer.encode(text, Encode::TEXT)?),
        }
    }

    /// Reads until there are so many bytes, or the text ends.
    fn fill(&mut self, least: usize) -> Result<(), Error> {
        let missing = least.saturating_sub(self.bytes.len()) as u64;
        if missing > 0 && !self.ended {
            let read = (&mut self.from).take(missing).read_to_end(&mut self.bytes);
            self.ended = (read.map_err(failed)? as u64) < missing;
        }
        Ok(())
    }
}

#[allow(clippy::needless_pass_by_value, reason = "the form that map_err wants")]
fn failed(error: std::io::Error) -> Error {
    Error::TextStream { reason: error.to_string() }
}

/// Where to cut: behind the last line break before something that is no white space, or, if any will do, before the last space.
fn place(bytes: &[u8], any: bool) -> Option<usize> {
    let pairs = |found: fn(u8, u8) -> bool| {
        bytes.windows(2).rposition(|pair| found(pair[0], pair[1])).filter(|&at| at > 0)
    };
    // Bytes of a longer character may be one of white space.
    let visible = |byte: u8| byte.is_ascii() && !byte.is_ascii_whitespace() && byte != 0x0b;
    let lines = bytes.windows(2).rposition(|pair| pair[0] == b'\n' && visible(pair[1]));
    lines.map(|at| at + 1).or_else(|| {
        if any {
            pairs(|a, b| !a.is_ascii_whitespace() && b == b' ').map(|at| at + 1)
        } else {
            None
        }
    })
}
