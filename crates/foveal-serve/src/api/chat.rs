//! `/v1/chat/completions`: messages that the model answers, as its template has it.

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use foveal_lm::chat::{Message, Role};
use foveal_lm::generate::{Piece, Request};
use foveal_lm::tokenizer::Tokenizer;
use serde::Deserialize;
use serde_json::{Value, json};
use utoipa::ToSchema;

use super::answer::{Answer, Usage, Whole, finish_reason};
use super::body::Body;
use super::choice::Choice;
use super::failure::Failure;
use super::head::Head;
use super::stream::{self, Chunks};
use super::{App, tokens};
use crate::engine::Event;

/// The most alternatives of each token.
const MOST_LOGPROBS: u64 = 20;

/// A request for an answer.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct ChatRequest {
    /// The conversation.
    messages: Vec<ChatMessage>,
    /// Whether each token comes with its probability.
    logprobs: Option<bool>,
    /// With how many of the most probable tokens each token comes.
    top_logprobs: Option<u64>,
    #[serde(flatten)]
    choice: Choice,
}

/// What someone said.
#[derive(Debug, Clone, Deserialize, ToSchema)]
pub(crate) struct ChatMessage {
    /// `system`, `developer`, `user` or `assistant`.
    role: String,
    /// A string, or a list of parts of type `text`.
    #[schema(value_type = Object)]
    content: Option<Content>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
enum Content {
    Text(String),
    Parts(Vec<ContentPart>),
}

#[derive(Debug, Clone, Deserialize)]
struct ContentPart {
    #[serde(rename = "type")]
    kind: String,
    text: Option<String>,
}

impl ChatMessage {
    fn message(self) -> Result<Message, Failure> {
        let role = match &*self.role {
            "system" | "developer" => Role::System,
            "user" => Role::User,
            "assistant" => Role::Assistant,
            found => {
                let found: String = found.chars().take(40).collect();
                let message = format!(
                    "the role {found:?} is not supported; expected system, user or assistant"
                );
                return Err(Failure::unsupported("messages", message));
            }
        };
        let content = match self.content {
            None => String::new(),
            Some(Content::Text(text)) => text,
            Some(Content::Parts(parts)) => {
                let mut text = String::new();
                for part in parts {
                    match part.text.filter(|_| part.kind == "text") {
                        Some(more) => text.push_str(&more),
                        None => {
                            let message = "a part of a message that is no text is not supported";
                            return Err(Failure::unsupported("messages", message));
                        }
                    }
                }
                text
            }
        };
        Ok(Message { role, content })
    }
}

/// The tokens of a conversation, up to where the answer begins.
pub(crate) async fn prompt(app: &App, messages: Vec<ChatMessage>) -> Result<Vec<u32>, Failure> {
    if messages.is_empty() {
        return Err(Failure::bad("messages", "there are no messages"));
    }
    let messages = messages.into_iter().map(ChatMessage::message);
    let messages = messages.collect::<Result<Vec<_>, _>>()?;
    if app.served.template.is_none() {
        let message =
            "the model has no chat template, so it was hardly made for chats; use /v1/completions";
        return Err(Failure::unsupported("messages", message));
    }
    tokens::on_thread(app, move |served| match &served.template {
        Some(template) => served.transcript.tokens(template, &served.tokenizer, &messages),
        None => Ok(vec![]),
    })
    .await
}

/// Answers messages.
#[utoipa::path(post, path = "/v1/chat/completions", request_body = ChatRequest, responses(
    (status = 200, description = "The answers; with stream, events with what is new of them."),
    (status = 400, description = "What is wrong with the request."),
    (status = 429, description = "Too many wait; Retry-After says how long to wait."),
))]
pub(crate) async fn create(
    State(app): State<App>,
    Body(request): Body<ChatRequest>,
) -> Result<Response, Failure> {
    let ChatRequest { messages, logprobs, top_logprobs, choice } = request;
    choice.check(&app)?;
    let answers = choice.answers()?;
    let logprobs = match (logprobs.unwrap_or(false), top_logprobs.unwrap_or(0)) {
        (false, 0) => None,
        (true, top) if top <= MOST_LOGPROBS => Some(top as usize),
        _ => {
            let message = format!("expected 0 to {MOST_LOGPROBS}, with \"logprobs\": true");
            return Err(Failure::bad("top_logprobs", message));
        }
    };
    let prompt = prompt(&app, messages).await?;
    let room = tokens::room(&app, "messages", prompt.len())?;
    let seed = app.number();
    let requests = (0..answers).map(|n| {
        let mut options = choice.options((n, seed), (app.options.max_tokens, room), logprobs)?;
        let template = app.served.template.iter().flat_map(|template| template.stop());
        options.stop.extend(template.cloned());
        Ok(Request { prompt: prompt.clone(), options })
    });
    let requests = requests.collect::<Result<Vec<_>, Failure>>()?;
    let mut usage = Usage { prompt: prompt.len(), ..Usage::default() };
    let answer = Answer::begin(&app, requests)?;
    if choice.streams() {
        let head = Head::new(&app, "chatcmpl", "chat.completion.chunk");
        let include_usage = choice.include_usage();
        return Ok(stream::response(answer, Deltas { head, usage, include_usage, answers }));
    }
    let texts = answer.whole(answers).await?;
    usage.made = texts.iter().map(|text| text.pieces.len()).sum();
    usage.shared = texts.iter().map(|text| text.shared).max().unwrap_or(0);
    let head = Head::new(&app, "chatcmpl", "chat.completion");
    let choices = texts.iter().enumerate().map(|(n, text)| whole(&head, n, text)).collect();
    Ok(Json(head.body(choices, Some(usage))).into_response())
}

/// A whole answer.
fn whole(head: &Head, number: usize, text: &Whole) -> Value {
    json!({
        "index": number,
        "message": {"role": "assistant", "content": text.text(), "refusal": null},
        "logprobs": logprobs(&head.app.served.tokenizer, &text.pieces),
        "finish_reason": text.stopped.map(finish_reason),
    })
}

/// The probabilities of pieces, if they have them.
fn logprobs(tokenizer: &Tokenizer, pieces: &[Piece]) -> Value {
    if pieces.iter().all(|piece| piece.logprobs.is_none()) {
        return Value::Null;
    }
    let entry = |token: u32, logprob: f32| {
        let bytes = tokenizer.token_bytes(token).unwrap_or_default();
        json!({"token": tokens::name(tokenizer, token), "logprob": logprob, "bytes": bytes})
    };
    let said = pieces.iter().filter(|piece| !tokenizer.is_end(piece.token));
    let content = said.filter_map(|piece| {
        let logprobs = piece.logprobs.as_ref()?;
        let top = logprobs.top.iter().map(|&(token, x)| entry(token, x));
        let top: Vec<Value> = top.collect();
        let mut own = entry(piece.token, logprobs.chosen);
        own["top_logprobs"] = top.into();
        Some(own)
    });
    json!({"content": content.collect::<Vec<_>>(), "refusal": null})
}

/// An answer in chunks.
struct Deltas {
    head: Head,
    usage: Usage,
    include_usage: bool,
    answers: usize,
}

impl Deltas {
    fn chunk(&self, number: usize, delta: Value, (logprobs, reason): (Value, Value)) -> Value {
        let mut choice = json!({"index": number});
        choice["delta"] = delta;
        choice["logprobs"] = logprobs;
        choice["finish_reason"] = reason;
        self.head.chunk(choice, self.include_usage)
    }
}

impl Chunks for Deltas {
    fn first(&mut self) -> Vec<Value> {
        let delta = json!({"role": "assistant", "content": ""});
        let first = |n| self.chunk(n, delta.clone(), (Value::Null, Value::Null));
        (0..self.answers).map(first).collect()
    }

    fn of(&mut self, number: usize, event: Event) -> Vec<Value> {
        match event {
            Event::Piece(piece) => {
                self.usage.made += 1;
                if piece.text.is_empty() && piece.logprobs.is_none() {
                    return vec![];
                }
                let tokenizer = &self.head.app.served.tokenizer;
                let logprobs = logprobs(tokenizer, std::slice::from_ref(&piece));
                vec![self.chunk(number, json!({"content": piece.text}), (logprobs, Value::Null))]
            }
            Event::Done { stopped, shared } => {
                self.usage.shared = self.usage.shared.max(shared);
                let reason = finish_reason(stopped).into();
                vec![self.chunk(number, json!({}), (Value::Null, reason))]
            }
            Event::Failed(_) | Event::Cut => vec![],
        }
    }

    fn last(&mut self) -> Vec<Value> {
        let usage = || self.head.body(vec![], Some(self.usage));
        self.include_usage.then(usage).into_iter().collect()
    }
}
