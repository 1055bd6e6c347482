//! Text from tokens as they come: never half a character.

use super::{Error, Tokenizer};

/// Turns tokens into text one by one.
///
/// A character that spans tokens is given out with its last one. What can't become valid UTF-8, whatever comes, is
/// U+FFFD, once for each longest part of a character, so that all that is given out together is what
/// [`String::from_utf8_lossy`] makes of the bytes of all tokens. Marks such as `<|im_end|>` give nothing unless asked
/// for.
///
/// ```no_run
/// # use foveal_lm::tokenizer::{StreamDecoder, Tokenizer};
/// # fn show(tokenizer: &Tokenizer, generated: &[u32]) -> Result<(), foveal_lm::tokenizer::Error> {
/// let mut text = StreamDecoder::after_prompt(tokenizer);
/// for &token in generated {
///     print!("{}", text.push(token)?);
/// }
/// println!("{}", text.finish());
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct StreamDecoder<'a> {
    tokenizer: &'a Tokenizer,
    /// The bytes of a character that is not whole.
    pending: Vec<u8>,
    /// Whether a space that comes next is only the prefix of the text.
    at_start: bool,
    marks: bool,
}

impl<'a> StreamDecoder<'a> {
    /// For the tokens of a whole text: the space that some tokenizers put before a text is taken away.
    pub fn new(tokenizer: &'a Tokenizer) -> StreamDecoder<'a> {
        StreamDecoder {
            tokenizer,
            pending: Vec::new(),
            at_start: tokenizer.adds_space_prefix(),
            marks: false,
        }
    }

    /// For tokens that go on where a prompt ended: every space counts.
    pub fn after_prompt(tokenizer: &'a Tokenizer) -> StreamDecoder<'a> {
        StreamDecoder { at_start: false, ..StreamDecoder::new(tokenizer) }
    }

    /// Gives out marks such as `<|im_end|>` too.
    #[must_use]
    pub fn with_marks(mut self) -> StreamDecoder<'a> {
        self.marks = true;
        self
    }

    /// The text that is certain now that `token` has come; may be empty.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfRange`] for a token that is not in the vocabulary; the decoder can be used further.
    pub fn push(&mut self, token: u32) -> Result<String, Error> {
        let bytes = self.tokenizer.visible_bytes(token, self.marks)?;
        let bytes = match bytes.strip_prefix(b" ") {
            Some(rest) if self.at_start => rest,
            _ => bytes,
        };
        self.at_start &= self.tokenizer.visible_bytes(token, self.marks)?.is_empty();
        self.pending.extend_from_slice(bytes);
        Ok(self.take_certain())
    }

    /// What was held back: U+FFFD when the tokens end within a character, else nothing.
    pub fn finish(self) -> String {
        String::from_utf8_lossy(&self.pending).into_owned()
    }

    fn take_certain(&mut self) -> String {
        let mut text = String::with_capacity(self.pending.len());
        let mut certain = 0;
        for chunk in self.pending.utf8_chunks() {
            let end = certain + chunk.valid().len() + chunk.invalid().len();
            text.push_str(chunk.valid());
            let unfinished = end == self.pending.len() && is_beginning(chunk.invalid());
            if unfinished {
                certain += chunk.valid().len();
                break;
            }
            if !chunk.invalid().is_empty() {
                text.push(char::REPLACEMENT_CHARACTER);
            }
            certain = end;
        }
        self.pending.drain(..certain);
        text
    }
}

/// Whether `bytes` are the beginning of a character, and not all of it.
fn is_beginning(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes).is_err_and(|error| error.error_len().is_none())
}
