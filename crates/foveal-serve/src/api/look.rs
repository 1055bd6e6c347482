//! `/page/look`: who looks at whom in a text, for the page: maps of all heads at once, rows of weights when asked for.
//!
//! ```text
//! maps: 255 · √|weight|, a byte a cell, lower triangles       rows: 32767 · weight / scale, two bytes a token, low byte first
//! ```

use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::sse::{Event, Sse};
use axum::response::{IntoResponse, Response};
use foveal_lm::generate::prompt_tokens;
use foveal_lm::look::{Habits, Head, Looking, Recalled, Section, Weights};
use foveal_lm::tokenizer::Tokenizer;
use futures_core::Stream;
use serde::Deserialize;
use serde_json::{Value, json};

use super::body::Body;
use super::chat::{self, ChatMessage};
use super::failure::Failure;
use super::{App, tokens};
use crate::look::{CELLS, Continuing, LONGEST, MORE, Newest, Reading, Row, Shared, Tokens};

/// A text, or messages, to look at.
#[derive(Debug, Deserialize)]
pub(crate) struct LookRequest {
    text: Option<String>,
    messages: Option<Vec<ChatMessage>>,
}

/// Which heads' weights are meant: all of them, a layer's, one head's.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
pub(crate) struct Heads {
    layer: Option<usize>,
    head: Option<usize>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct RowRequest {
    position: usize,
    #[serde(flatten)]
    heads: Heads,
}

#[derive(Debug, Deserialize)]
pub(crate) struct ContinueRequest {
    tokens: usize,
    #[serde(flatten)]
    heads: Heads,
}

fn gone<E>(_: E) -> Failure {
    Failure::cut()
}

fn find(app: &App, id: &str) -> Result<Shared, Failure> {
    let id = u64::from_str_radix(id, 16).ok();
    id.and_then(|id| app.looks.get(id)).ok_or_else(|| {
        let message = "there is no such look any more; look at the text again";
        Failure::new(StatusCode::NOT_FOUND, "no_look", message)
    })
}

/// Reads a text and shows the maps of all heads.
pub(crate) async fn begin(
    State(app): State<App>,
    Body(request): Body<LookRequest>,
) -> Result<Json<Value>, Failure> {
    let tokens = match (request.text, request.messages) {
        (Some(text), None) => {
            tokens::on_thread(&app, move |served| prompt_tokens(&served.tokenizer, &text)).await?
        }
        (None, Some(messages)) => chat::prompt(&app, messages).await?,
        _ => return Err(Failure::bad("text", "expected either text or messages")),
    };
    if tokens.len() > LONGEST {
        return Err(Failure::too_long("text", tokens.len(), LONGEST));
    }
    let (reading, done) = Reading::new(tokens, app.options.batch.cache.context);
    app.engine.beside(Box::new(reading))?;
    let look = done.await.map_err(gone)??;
    let id = app.number();
    let body = {
        let look = look.lock().map_err(gone)?;
        overview(&look, &app.served.tokenizer, &format!("{id:016x}"))
    };
    app.looks.keep(id, look);
    Ok(Json(body))
}

fn overview(look: &Looking, tokenizer: &Tokenizer, id: &str) -> Value {
    let names = look.tokens().iter().map(|&token| tokens::name(tokenizer, token));
    let cells = CELLS.min(look.tokens().len());
    let layers = look.look().layers.iter().zip(look.habits()).map(|(layer, habits)| {
        let maps: Vec<u8> = layer.heads.iter().flat_map(|head| map(head, cells)).collect();
        let habits: Vec<Value> = habits.iter().map(habit).collect();
        let section = |section: &Section| {
            let Section { name, heads, recurrent } = section;
            json!({"name": name, "heads": heads, "recurrent": recurrent})
        };
        let sections: Vec<Value> = layer.sections.iter().map(section).collect();
        let maps = base64::encode(maps);
        json!({"reach": layer.reach, "sections": sections, "maps": maps, "habits": habits})
    });
    let (tokens, layers): (Vec<String>, Vec<Value>) = (names.collect(), layers.collect());
    json!({"id": id, "tokens": tokens, "cells": cells, "layers": layers})
}

fn habit(habits: &Habits) -> Value {
    let Habits { previous, first, same, own, spread, distance } = habits;
    json!({"previous": previous, "first": first, "same": same, "own": own, "spread": spread, "distance": distance})
}

fn map(head: &Head, cells: usize) -> impl Iterator<Item = u8> {
    (0..cells).flat_map(move |a| {
        let row = head.map[a * cells..][..=a].iter();
        row.map(|mass| (mass.clamp(0.0, 1.0).sqrt() * 255.0).round() as u8)
    })
}

/// The weights of a token.
pub(crate) async fn row(
    State(app): State<App>,
    Path(id): Path<String>,
    Body(request): Body<RowRequest>,
) -> Result<Json<Value>, Failure> {
    let look = find(&app, &id)?;
    check(&app, request.heads)?;
    let (row, done) = Row::new(look, request.position, request.heads.layer);
    app.engine.beside(Box::new(row))?;
    let weights = done.await.map_err(gone)?.map_err(|error| match error {
        foveal_lm::Error::Position { .. } => Failure::bad("position", error.to_string()),
        error => error.into(),
    })?;
    Ok(Json(shown(request.position, &weights, request.heads)))
}

fn check(app: &App, heads: Heads) -> Result<(), Failure> {
    let config = app.served.model.config();
    let there = heads.layer.is_none_or(|layer| layer < config.layers.len())
        && heads.head.is_none_or(|head| heads.layer.is_some() && head < config.attention.heads);
    there.then_some(()).ok_or_else(|| Failure::bad("head", "there is no such layer or head"))
}

/// A token's row: weights by sign and size, which tokens have any, and what was read of a memory.
fn shown(position: usize, weights: &Weights, heads: Heads) -> Value {
    let mean = weights.mean(heads.layer, heads.head);
    let scale = mean.iter().fold(1f32, |most, w| most.max(w.abs()));
    let word = |w: &f32| ((w / scale * 32767.0).round() as i16).to_le_bytes();
    let words: Vec<u8> = mean.iter().flat_map(word).collect();
    let mut seen: Vec<[usize; 2]> = vec![];
    for (n, _) in mean.iter().enumerate().filter(|(_, w)| **w != 0.0) {
        match seen.last_mut() {
            Some([_, end]) if *end == n => *end = n + 1,
            _ => seen.push([n, n + 1]),
        }
    }
    let own = heads
        .layer
        .zip(heads.head)
        .and_then(|(layer, head)| weights.recalled.get(layer)?.get(head)?.as_ref());
    let recalled = own.map(|Recalled { gate, segment, entries }| {
        json!({"gate": gate, "segment": segment, "entries": entries})
    });
    json!({
        "position": position,
        "weights": base64::encode(words),
        "scale": scale,
        "seen": seen,
        "recalled": recalled,
    })
}

/// Goes on with the text, and shows each new token's weights as it is made.
pub(crate) async fn go_on(
    State(app): State<App>,
    Path(id): Path<String>,
    Body(request): Body<ContinueRequest>,
) -> Result<Response, Failure> {
    let look = find(&app, &id)?;
    check(&app, request.heads)?;
    let (work, tokens) = Continuing::new(look, request.tokens.min(MORE), request.heads.layer)?;
    app.engine.beside(Box::new(work))?;
    let heads = request.heads;
    let stream = Rows { tokens, app, heads, ready: VecDeque::new(), ended: false };
    Ok(Sse::new(stream).into_response())
}

struct Rows {
    tokens: Tokens,
    app: App,
    heads: Heads,
    ready: VecDeque<String>,
    ended: bool,
}

impl Stream for Rows {
    type Item = Result<Event, Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.ready.is_empty() && !self.ended {
            let next = ready!(self.tokens.poll_recv(context));
            let data = match next {
                Some(Ok(Newest { token, position, weights })) => {
                    let piece = tokens::name(&self.app.served.tokenizer, token);
                    let mut row = shown(position, &weights, self.heads);
                    row["token"] = piece.into();
                    row.to_string()
                }
                Some(Err(error)) => Failure::from(error).body().to_string(),
                None => {
                    self.ended = true;
                    "[DONE]".to_owned()
                }
            };
            self.ready.push_back(data);
        }
        let next = self.ready.pop_front();
        Poll::Ready(next.map(|data| Ok(Event::default().data(data))))
    }
}
