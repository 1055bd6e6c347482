//! One text in the making: from logits to tokens, and to the text that has become certain.

use super::stop::Stops;
use super::{Options, Piece, Prompt, StopReason};
use crate::Error;
use crate::sample::{Logprobs, Sampler};
use crate::tokenizer::{StreamDecoder, Tokenizer};

/// What is known of a text beside what the model holds of it.
#[derive(Debug)]
pub(super) struct Writing<'a> {
    tokenizer: &'a Tokenizer,
    sampler: Sampler,
    decoder: StreamDecoder<'a>,
    stops: Stops,
    left: usize,
    stopped: Option<StopReason>,
    logprobs: Option<usize>,
}

impl<'a> Writing<'a> {
    /// A text that begins with `prompt`.
    pub(super) fn new(
        tokenizer: &'a Tokenizer,
        prompt: Prompt<'_>,
        options: &Options,
    ) -> Result<Writing<'a>, Error> {
        if prompt.new.is_empty() {
            return Err(Error::EmptyPrompt);
        }
        let mut sampler = Sampler::new(options.sampling)?;
        prompt.held.iter().chain(prompt.new).for_each(|&token| sampler.accept(token));
        Ok(Writing {
            tokenizer,
            sampler,
            decoder: StreamDecoder::after_prompt(tokenizer),
            stops: Stops::new(&options.stop),
            left: options.max_tokens,
            logprobs: options.logprobs,
            stopped: (options.max_tokens == 0).then_some(StopReason::MaxTokens),
        })
    }

    pub(super) fn stopped(&self) -> Option<StopReason> {
        self.stopped
    }

    /// Chooses the next token. Not to be called once the text has stopped.
    pub(super) fn next(&mut self, logits: &[f32]) -> Result<Piece, Error> {
        let token = self.sampler.sample(logits)?;
        let logprobs = self.logprobs.map(|top| Logprobs::new(logits, token, top)).transpose()?;
        self.sampler.accept(token);
        self.left -= 1;
        if self.tokenizer.is_end(token) {
            let text = self.finish(StopReason::EndToken, String::new());
            return Ok(Piece { token, text, logprobs });
        }
        let (mut text, stop) = self.stops.push(&self.decoder.push(token)?);
        if stop {
            self.stopped = Some(StopReason::StopString);
        } else if self.left == 0 {
            text = self.finish(StopReason::MaxTokens, text);
        }
        Ok(Piece { token, text, logprobs })
    }

    /// The last piece's text, with all that was held back.
    fn finish(&mut self, reason: StopReason, mut text: String) -> String {
        let rest =
            std::mem::replace(&mut self.decoder, StreamDecoder::after_prompt(self.tokenizer));
        let (certain, stop) = self.stops.push(&rest.finish());
        text.push_str(&certain);
        text.push_str(&self.stops.finish());
        self.stopped = Some(if stop { StopReason::StopString } else { reason });
        text
    }
}
