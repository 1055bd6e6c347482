//! Answers as server-sent events: `data: {…}` for each piece, `data: [DONE]` at the end.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::http::{HeaderName, HeaderValue};
use axum::response::sse::{self, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_core::Stream;
use serde_json::Value;

use super::answer::Answer;
use crate::engine::Event;

/// How often something is sent while nothing happens, so that a client that is gone is noticed.
const ALIVE: Duration = Duration::from_secs(5);

/// Makes chunks of events.
pub(crate) trait Chunks: Send + 'static {
    /// What comes before all events.
    fn first(&mut self) -> Vec<Value>;
    /// What an event of a text becomes.
    fn of(&mut self, number: usize, event: Event) -> Vec<Value>;
    /// What comes after all events.
    fn last(&mut self) -> Vec<Value>;
}

struct Chunked<C> {
    answer: Answer,
    chunks: C,
    ready: VecDeque<String>,
    ended: bool,
}

/// The response of an answer that comes in chunks.
pub(crate) fn response(answer: Answer, mut chunks: impl Chunks + Unpin) -> Response {
    let ready = chunks.first().iter().map(Value::to_string).collect();
    let stream = Chunked { answer, chunks, ready, ended: false };
    let alive = KeepAlive::new().interval(ALIVE);
    let mut response = Sse::new(stream).keep_alive(alive).into_response();
    // nginx would hold pieces back until it has a buffer full.
    let name = HeaderName::from_static("x-accel-buffering");
    response.headers_mut().insert(name, HeaderValue::from_static("no"));
    response
}

impl<C: Chunks + Unpin> Stream for Chunked<C> {
    type Item = Result<sse::Event, Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        while this.ready.is_empty() && !this.ended {
            let event = ready!(this.answer.poll(context));
            let values = match event {
                Some(Ok((number, event))) => this.chunks.of(number, event),
                Some(Err(failure)) => {
                    this.ended = true;
                    vec![failure.body()]
                }
                None => {
                    this.ended = true;
                    this.chunks.last()
                }
            };
            this.ready.extend(values.iter().map(Value::to_string));
            if this.ended {
                this.ready.push_back("[DONE]".to_owned());
            }
        }
        let next = this.ready.pop_front();
        Poll::Ready(next.map(|data| Ok(sse::Event::default().data(data))))
    }
}
