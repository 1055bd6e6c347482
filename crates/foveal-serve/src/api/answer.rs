//! Texts on their way to a client: events as they come, within the time that a request may take; and texts that are whole.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use foveal_lm::generate::{Piece, Request, StopReason};
use serde_json::{Value, json};
use tokio::time::Sleep;

use super::App;
use super::failure::Failure;
use crate::engine::{Event, Events};

/// The events of some texts. Dropping it ends them.
pub(crate) struct Answer {
    events: Events,
    limit: Duration,
    deadline: Pin<Box<Sleep>>,
}

/// A text that is whole.
#[derive(Debug, Default)]
pub(crate) struct Whole {
    pub(crate) pieces: Vec<Piece>,
    pub(crate) stopped: Option<StopReason>,
    pub(crate) shared: usize,
}

impl Whole {
    pub(crate) fn text(&self) -> String {
        self.pieces.iter().map(|piece| &*piece.text).collect()
    }
}

impl Answer {
    /// Begins texts.
    pub(crate) fn begin(app: &App, requests: Vec<Request>) -> Result<Answer, Failure> {
        let events = app.engine.submit(requests)?;
        let limit = app.options.limit;
        Ok(Answer { events, limit, deadline: Box::pin(tokio::time::sleep(limit)) })
    }

    /// The next event; none after the last text's end.
    pub(crate) fn poll(
        &mut self,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<(usize, Event), Failure>>> {
        // First of all, however many events lie there for a client that takes them slowly.
        if self.deadline.as_mut().poll(context).is_ready() {
            return Poll::Ready(Some(Err(Failure::late(self.limit.as_secs()))));
        }
        self.events.poll_recv(context).map(|event| {
            event.map(|(number, event)| match event {
                Event::Failed(error) => Err(Failure::of_model(&error)),
                Event::Cut => Err(Failure::cut()),
                event => Ok((number, event)),
            })
        })
    }

    /// All texts, once all are whole.
    pub(crate) async fn whole(mut self, texts: usize) -> Result<Vec<Whole>, Failure> {
        let mut all: Vec<Whole> = (0..texts).map(|_| Whole::default()).collect();
        while let Some(event) = poll_fn(|context| self.poll(context)).await {
            let (number, event) = event?;
            match event {
                Event::Piece(piece) => all[number].pieces.push(piece),
                Event::Done { stopped, shared } => {
                    (all[number].stopped, all[number].shared) = (Some(stopped), shared);
                }
                Event::Failed(_) | Event::Cut => {}
            }
        }
        // A thread that ended without a word leaves texts without an end.
        if all.iter().any(|whole| whole.stopped.is_none()) {
            return Err(Failure::cut());
        }
        Ok(all)
    }
}

/// Why a text ended, as OpenAI's clients know it.
pub(crate) fn finish_reason(stopped: StopReason) -> &'static str {
    match stopped {
        StopReason::MaxTokens => "length",
        _ => "stop",
    }
}

/// How many tokens a request took.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Usage {
    pub(crate) prompt: usize,
    pub(crate) made: usize,
    /// Tokens of prompts that needed no reading.
    pub(crate) shared: usize,
}

impl Usage {
    pub(crate) fn body(self) -> Value {
        let Usage { prompt, made, shared } = self;
        json!({
            "prompt_tokens": prompt,
            "completion_tokens": made,
            "total_tokens": prompt + made,
            "prompt_tokens_details": {"cached_tokens": shared},
        })
    }
}
