//! `/v1/completions`: prompts that are continued as they are.

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use foveal_lm::generate::{Piece, Request, prompt_tokens};
use foveal_lm::tokenizer::Tokenizer;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use utoipa::ToSchema;

use super::answer::{Answer, Usage, Whole, finish_reason};
use super::body::Body;
use super::choice::{Choice, MOST_TEXTS};
use super::failure::Failure;
use super::head::Head;
use super::stream::{self, Chunks};
use super::{App, tokens};
use crate::engine::Event;

/// Tokens of an answer whose request doesn't say, as OpenAI has it.
const USUAL: usize = 16;
/// The most alternatives of each token.
const MOST_LOGPROBS: u64 = 20;

/// A request for completions.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct CompletionRequest {
    /// What is continued: a string, several, the tokens of one, or those of several.
    #[schema(value_type = Object)]
    prompt: Prompts,
    /// With how many of the most probable tokens each token comes.
    logprobs: Option<u64>,
    #[serde(flatten)]
    choice: Choice,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Prompts {
    Text(String),
    Texts(Vec<String>),
    Tokens(Vec<u32>),
    Several(Vec<Vec<u32>>),
}

impl Prompts {
    fn tokens(self, tokenizer: &Tokenizer) -> Result<Vec<Vec<u32>>, foveal_lm::Error> {
        match self {
            Prompts::Text(text) => Ok(vec![prompt_tokens(tokenizer, &text)?]),
            Prompts::Texts(texts) => {
                texts.iter().map(|text| prompt_tokens(tokenizer, text)).collect()
            }
            Prompts::Tokens(tokens) => Ok(vec![tokens]),
            Prompts::Several(several) => Ok(several),
        }
    }

    fn count(&self) -> usize {
        match self {
            Prompts::Text(_) | Prompts::Tokens(_) => 1,
            Prompts::Texts(texts) => texts.len(),
            Prompts::Several(several) => several.len(),
        }
    }
}

/// Continues prompts.
#[utoipa::path(post, path = "/v1/completions", request_body = CompletionRequest, responses(
    (status = 200, description = "The texts; with stream, events of the same form."),
    (status = 400, description = "What is wrong with the request."),
    (status = 429, description = "Too many wait; Retry-After says how long to wait."),
))]
pub(crate) async fn create(
    State(app): State<App>,
    Body(request): Body<CompletionRequest>,
) -> Result<Response, Failure> {
    let CompletionRequest { prompt, logprobs, choice } = request;
    choice.check(&app)?;
    let answers = choice.answers()?;
    let prompts = prompt.count();
    if prompts == 0 || prompts.saturating_mul(answers) > MOST_TEXTS {
        let message = format!(
            "{prompts} prompts with {answers} answers each, expected up to {MOST_TEXTS} texts"
        );
        return Err(Failure::bad("prompt", message));
    }
    if logprobs.is_some_and(|top| top > MOST_LOGPROBS) {
        return Err(Failure::bad("logprobs", format!("expected 0 to {MOST_LOGPROBS}")));
    }
    let logprobs = logprobs.map(|top| top as usize);
    let prompts = tokens::on_thread(&app, move |served| prompt.tokens(&served.tokenizer)).await?;
    let mut usage = Usage::default();
    let (mut requests, seed) = (vec![], app.number());
    for prompt in &prompts {
        usage.prompt += prompt.len();
        let room = tokens::room(&app, "prompt", prompt.len())?;
        for _ in 0..answers {
            let options = choice.options((requests.len(), seed), (USUAL, room), logprobs)?;
            requests.push(Request { prompt: prompt.clone(), options });
        }
    }
    let head = Head::new(&app, "cmpl", "text_completion");
    let texts = requests.len();
    let answer = Answer::begin(&app, requests)?;
    if choice.streams() {
        let chunks =
            Pieces { head, usage, include_usage: choice.include_usage(), written: vec![0; texts] };
        return Ok(stream::response(answer, chunks));
    }
    let texts = answer.whole(texts).await?;
    usage.made = texts.iter().map(|text| text.pieces.len()).sum();
    usage.shared = texts.iter().map(|text| text.shared).sum();
    let choices = texts.iter().enumerate().map(|(n, text)| whole(&head, n, text)).collect();
    Ok(Json(head.body(choices, Some(usage))).into_response())
}

/// A whole text.
fn whole(head: &Head, number: usize, text: &Whole) -> Value {
    json!({
        "index": number,
        "text": text.text(),
        "logprobs": logprobs(&head.app.served.tokenizer, &text.pieces, 0),
        "finish_reason": text.stopped.map(finish_reason),
    })
}

/// The probabilities of pieces, if they have them; the first begins at `offset` of the text.
fn logprobs(tokenizer: &Tokenizer, pieces: &[Piece], mut offset: usize) -> Value {
    if pieces.iter().any(|piece| piece.logprobs.is_none()) || pieces.is_empty() {
        return Value::Null;
    }
    let (mut names, mut chosen, mut tops, mut offsets) = (vec![], vec![], vec![], vec![]);
    for piece in pieces.iter().filter(|piece| !tokenizer.is_end(piece.token)) {
        let Some(logprobs) = &piece.logprobs else { continue };
        names.push(tokens::name(tokenizer, piece.token));
        chosen.push(logprobs.chosen);
        let top = logprobs.top.iter().map(|&(token, x)| (tokens::name(tokenizer, token), x.into()));
        tops.push(top.collect::<Map<String, Value>>());
        offsets.push(offset);
        offset += piece.text.chars().count();
    }
    json!({"tokens": names, "token_logprobs": chosen, "top_logprobs": tops, "text_offset": offsets})
}

/// An answer in chunks.
struct Pieces {
    head: Head,
    usage: Usage,
    include_usage: bool,
    /// Characters of each text.
    written: Vec<usize>,
}

impl Pieces {
    fn chunk(&self, choice: Value) -> Vec<Value> {
        vec![self.head.chunk(choice, self.include_usage)]
    }
}

impl Chunks for Pieces {
    fn first(&mut self) -> Vec<Value> {
        vec![]
    }

    fn of(&mut self, number: usize, event: Event) -> Vec<Value> {
        match event {
            Event::Piece(piece) => {
                self.usage.made += 1;
                if piece.text.is_empty() && piece.logprobs.is_none() {
                    return vec![];
                }
                let tokenizer = &self.head.app.served.tokenizer;
                let pieces = std::slice::from_ref(&piece);
                let logprobs = logprobs(tokenizer, pieces, self.written[number]);
                self.written[number] += piece.text.chars().count();
                self.chunk(json!({
                    "index": number,
                    "text": piece.text,
                    "logprobs": logprobs,
                    "finish_reason": null,
                }))
            }
            Event::Done { stopped, shared } => {
                self.usage.shared += shared;
                let reason = finish_reason(stopped);
                self.chunk(
                    json!({"index": number, "text": "", "logprobs": null, "finish_reason": reason}),
                )
            }
            Event::Failed(_) | Event::Cut => vec![],
        }
    }

    fn last(&mut self) -> Vec<Value> {
        let usage = self.include_usage.then(|| self.head.body(vec![], Some(self.usage)));
        usage.into_iter().collect()
    }
}
