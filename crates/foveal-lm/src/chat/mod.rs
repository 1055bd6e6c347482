//! A conversation with a model: messages, the model's template that writes them down, and a state that has read them.
//!
//! ```text
//! text = template(messages)          read = tokens that the state holds
//! next answer: reads tokens(text) from where it differs from what is held, and goes on
//! ```
//!
//! A turn costs its own tokens, not the conversation's: as long as the template writes earlier messages as before,
//! which most do, generated tokens stay as they were made and only what follows them is read. Where it does not
//! (some cut old thoughts out, or trim an answer), or a message was taken back, the state goes back to the last token
//! that both have in common, where its store can ([`Model::rewind`]), and reads all again where it can't.

mod functions;
mod literal;
mod template;
mod transcript;

use std::ops::ControlFlow;

use serde::Serialize;

pub use template::ChatTemplate;
pub use transcript::Transcript;

use crate::Error;
use crate::generate::{Generator, Options, Prompt, StopReason, read};
use crate::model::{Model, State};
use crate::tokenizer::Tokenizer;

/// Who said something.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Whoever set the conversation up.
    System,
    /// Whoever asks.
    User,
    /// The model.
    Assistant,
}

impl Role {
    /// `system`, `user` or `assistant`, as templates write it.
    pub const fn name(self) -> &'static str {
        match self {
            Role::System => "system",
            Role::User => "user",
            Role::Assistant => "assistant",
        }
    }
}

/// What someone said.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct Message {
    /// Who.
    pub role: Role,
    /// What.
    pub content: String,
}

/// What happens while an answer is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event<'a> {
    /// So many of the turn's new tokens have been read.
    Read {
        /// Tokens read.
        done: usize,
        /// Tokens to read.
        total: usize,
    },
    /// The answer goes on with this text, which may be empty.
    Text(&'a str),
}

/// What an answer took.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Tokens that were read before the answer.
    pub read: usize,
    /// Tokens that the state held already.
    pub held: usize,
    /// Tokens of the answer, the end token included.
    pub made: usize,
    /// Why it ended; `None` if it was interrupted.
    pub stop: Option<StopReason>,
}

/// A conversation.
#[derive(Debug)]
pub struct Conversation<'a> {
    model: &'a Model,
    tokenizer: &'a Tokenizer,
    template: &'a ChatTemplate,
    transcript: Transcript,
    state: State,
    messages: Vec<Message>,
    held: Held,
}

/// What of the conversation the state has read.
#[derive(Debug, Default)]
struct Held {
    /// As many as the state's position.
    tokens: Vec<u32>,
    /// Made, but not read: the last tokens of an answer that did not end by itself.
    pending: Vec<u32>,
    /// What all these tokens stand for, if that is known to the letter.
    text: Option<String>,
}

impl<'a> Conversation<'a> {
    /// A conversation without messages; `state` is one of `model`'s without tokens.
    pub fn new(
        model: &'a Model,
        tokenizer: &'a Tokenizer,
        template: &'a ChatTemplate,
        mut state: State,
    ) -> Conversation<'a> {
        state.reset();
        let (transcript, held) = (Transcript::new(tokenizer), Held::default());
        Conversation { model, tokenizer, template, transcript, state, messages: Vec::new(), held }
    }

    /// What was said so far.
    pub fn messages(&self) -> &[Message] {
        &self.messages
    }

    /// What the model holds of the conversation.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Forgets all messages but the system's.
    pub fn reset(&mut self) {
        self.messages.retain(|message| message.role == Role::System);
    }

    /// Sets the system's message, or takes it away if `content` is empty.
    pub fn set_system(&mut self, content: &str) {
        self.messages.retain(|message| message.role != Role::System);
        if !content.is_empty() {
            let message = Message { role: Role::System, content: content.to_owned() };
            self.messages.insert(0, message);
        }
    }

    /// Goes on after messages of another time, which are read with the next answer.
    pub fn recall(&mut self, messages: impl IntoIterator<Item = Message>) {
        self.messages.extend(messages);
    }

    /// Says something as the user.
    pub fn say(&mut self, content: &str) {
        self.messages.push(Message { role: Role::User, content: content.to_owned() });
    }

    /// Takes the last message back, if it is `role`'s.
    pub fn take_back(&mut self, role: Role) -> Option<Message> {
        self.messages.pop_if(|message| message.role == role)
    }

    /// Lets the model answer, and adds what it says to the messages. `watch` sees what happens and may break it off:
    /// then the answer is what was said so far, and none is added if nothing was.
    ///
    /// # Errors
    ///
    /// [`Error::Template`], [`Error::Sampling`], [`Error::EmptyPrompt`], and those of [`Model::forward`]; no message is
    /// added then.
    pub fn answer(
        &mut self,
        options: &Options,
        watch: &mut dyn FnMut(Event<'_>) -> ControlFlow<()>,
    ) -> Result<Answer, Error> {
        let (text, new) = self.prepare()?;
        let held = self.held.tokens.len();
        self.held.text = None;
        let made = self.read_and_answer(&new, options, watch);
        // Whatever happened: the state has read the new tokens from the first on.
        let position = self.state.position();
        self.held.tokens.truncate(position);
        let made = match made {
            Ok(made) => made,
            Err(Error::Interrupted) => Made::default(),
            Err(error) => {
                // A call that failed may have left layers at different positions.
                self.forget();
                return Err(error);
            }
        };
        let answer = Answer { read: new.len(), held, made: made.tokens.len(), stop: made.stop };
        if made.began {
            self.remember(text, &made);
            let content = made.text;
            if made.stop.is_some() || !content.is_empty() {
                self.messages.push(Message { role: Role::Assistant, content });
            }
        }
        Ok(answer)
    }

    fn forget(&mut self) {
        self.state.reset();
        self.held = Held::default();
    }

    /// The conversation's text, and what of its tokens the state has to read; the state has gone back where it had to.
    fn prepare(&mut self) -> Result<(String, Vec<u32>), Error> {
        let text = self.transcript.text(self.template, &self.messages)?;
        let rest = self.held.text.as_deref().and_then(|held| text.strip_prefix(held));
        if let Some(rest) = rest.filter(|rest| !rest.is_empty()) {
            let mut new = self.held.pending.clone();
            new.extend(literal::encode(self.tokenizer, rest)?);
            return Ok((text, new));
        }
        let mut tokens = transcript::tokens(self.tokenizer, &text)?;
        let equal = self.held.tokens.iter().zip(&tokens).take_while(|(a, b)| a == b).count();
        // The last token is always read: its logits are the first of the answer.
        let keep = equal.min(tokens.len().saturating_sub(1));
        if self.model.rewind(&mut self.state, keep) {
            self.held.tokens.truncate(keep);
        } else {
            self.forget();
        }
        let new = tokens.split_off(self.held.tokens.len());
        Ok((text, new))
    }

    fn read_and_answer(
        &mut self,
        new: &[u32],
        options: &Options,
        watch: &mut dyn FnMut(Event<'_>) -> ControlFlow<()>,
    ) -> Result<Made, Error> {
        let before = self.held.tokens.len();
        self.held.tokens.extend_from_slice(new);
        let total = new.len();
        let rest =
            read(self.model, new, &mut self.state, &mut |done| watch(Event::Read { done, total }))?;
        let first = &self.held.tokens[..before + total - rest.len()];
        let mut options = options.clone();
        options.stop.extend_from_slice(self.template.stop());
        let prompt = Prompt { held: first, new: rest };
        let mut generator =
            Generator::new(self.model, self.tokenizer, &mut self.state, prompt, &options)?;
        let mut made = Made { began: true, ..Made::default() };
        if watch(Event::Read { done: total, total }).is_continue() {
            for piece in &mut generator {
                let piece = piece?;
                made.tokens.push(piece.token);
                made.text.push_str(&piece.text);
                if watch(Event::Text(&piece.text)).is_break() {
                    break;
                }
            }
        }
        made.stop = generator.stopped();
        Ok(made)
    }

    /// Notes which tokens of an answer the state has read, and what all of them stand for.
    fn remember(&mut self, mut text: String, made: &Made) {
        let said: &[u32] = match made.tokens.split_last() {
            Some((end, said)) if self.tokenizer.is_end(*end) => said,
            _ => &made.tokens,
        };
        let read = self.state.position() - self.held.tokens.len();
        self.held.tokens.extend_from_slice(&made.tokens[..read]);
        self.held.pending = said.get(read..).unwrap_or_default().to_vec();
        let bytes = said.iter().flat_map(|&token| self.tokenizer.token_bytes(token).unwrap_or(&[]));
        let to_the_letter = bytes.eq(made.text.as_bytes()) && read <= said.len();
        text.push_str(&self.transcript.seam(&made.text));
        self.held.text = to_the_letter.then_some(text);
    }
}

/// What was made of an answer.
#[derive(Debug, Default)]
struct Made {
    /// Whether all that comes before it was read.
    began: bool,
    tokens: Vec<u32>,
    text: String,
    stop: Option<StopReason>,
}
