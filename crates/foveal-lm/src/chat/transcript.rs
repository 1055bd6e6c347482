//! Messages as tokens, for whoever keeps no conversation: what users type stays text, marks are the template's alone.

use super::literal::{self, Literal};
use super::{ChatTemplate, Message};
use crate::Error;
use crate::tokenizer::Tokenizer;

/// Writes messages down as tokens. Knows the marks of one tokenizer; any number of threads may use it.
#[derive(Debug)]
pub struct Transcript {
    literal: Literal,
}

impl Transcript {
    /// For texts of `tokenizer`.
    pub fn new(tokenizer: &Tokenizer) -> Transcript {
        Transcript { literal: Literal::new(tokenizer) }
    }

    /// The tokens of `messages`, up to where the model's answer begins; `tokenizer` is the one of [`Transcript::new`].
    ///
    /// # Errors
    ///
    /// [`Error::Template`] if the template refuses the messages; [`Error::Tokenizer`].
    pub fn tokens(
        &self,
        template: &ChatTemplate,
        tokenizer: &Tokenizer,
        messages: &[Message],
    ) -> Result<Vec<u32>, Error> {
        tokens(tokenizer, &self.text(template, messages)?)
    }

    /// What the template makes of `messages`, with seams in whatever looks like a mark.
    pub(super) fn text(
        &self,
        template: &ChatTemplate,
        messages: &[Message],
    ) -> Result<String, Error> {
        let seamed = messages.iter().map(|message| Message {
            content: self.literal.seam(&message.content),
            ..message.clone()
        });
        template.render(&seamed.collect::<Vec<_>>(), true)
    }

    pub(super) fn seam(&self, text: &str) -> String {
        self.literal.seam(text)
    }
}

/// The tokens of a template's text, with the begin token where the tokenizer adds one and the template did not.
pub(super) fn tokens(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>, Error> {
    let mut tokens = literal::encode(tokenizer, text)?;
    if let Some(bos) = tokenizer.bos().filter(|_| tokenizer.adds_bos())
        && tokens.first() != Some(&bos)
    {
        tokens.insert(0, bos);
    }
    Ok(tokens)
}
