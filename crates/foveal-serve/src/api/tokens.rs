//! `/tokenize` and `/detokenize`, and what all requests do with texts and tokens.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use foveal_lm::generate::prompt_tokens;
use foveal_lm::tokenizer::{Encode, Tokenizer};
use serde::Deserialize;
use serde_json::{Value, json};
use utoipa::ToSchema;

use super::App;
use super::body::Body;
use super::chat::{self, ChatMessage};
use super::failure::Failure;
use crate::Served;

/// A token as it is written; bytes that are no character become U+FFFD.
pub(crate) fn name(tokenizer: &Tokenizer, token: u32) -> String {
    String::from_utf8_lossy(tokenizer.token_bytes(token).unwrap_or_default()).into_owned()
}

/// Does work that takes a while on a thread of its own, so that others' pieces go on.
pub(crate) async fn on_thread<T: Send + 'static>(
    app: &App,
    work: impl FnOnce(&Served) -> Result<T, foveal_lm::Error> + Send + 'static,
) -> Result<T, Failure> {
    let served = app.served.clone();
    let done = tokio::task::spawn_blocking(move || work(&served)).await;
    let fault =
        |_| Failure::new(StatusCode::INTERNAL_SERVER_ERROR, "fault", "a thread had a fault");
    Ok(done.map_err(fault)??)
}

/// How many tokens the context has behind a prompt.
pub(crate) fn room(app: &App, field: &str, prompt: usize) -> Result<usize, Failure> {
    let context = app.context();
    match context.checked_sub(prompt) {
        Some(room) if room > 0 => Ok(room),
        _ => Err(Failure::too_long(field, prompt, context)),
    }
}

/// A text, or a conversation, whose tokens are asked for.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct TokenizeRequest {
    /// The text.
    #[serde(alias = "prompt")]
    content: Option<String>,
    /// Or messages, as the model's template writes them.
    messages: Option<Vec<ChatMessage>>,
    /// Whether the text gets the model's begin token, where it wants one; true if left out.
    add_special: Option<bool>,
}

/// The tokens of a text.
#[utoipa::path(post, path = "/tokenize", request_body = TokenizeRequest, responses(
    (status = 200, description = "tokens, and pieces: how each is written."),
    (status = 400, description = "What is wrong with the request."),
))]
pub(crate) async fn tokenize(
    State(app): State<App>,
    Body(request): Body<TokenizeRequest>,
) -> Result<Json<Value>, Failure> {
    let special = request.add_special.unwrap_or(true);
    let tokens = match (request.content, request.messages) {
        (Some(content), None) => {
            on_thread(&app, move |served| match special {
                true => prompt_tokens(&served.tokenizer, &content),
                false => Ok(served.tokenizer.encode(&content, Encode::TEXT)?),
            })
            .await?
        }
        (None, Some(messages)) => chat::prompt(&app, messages).await?,
        _ => return Err(Failure::bad("content", "expected either content or messages")),
    };
    let tokenizer = &app.served.tokenizer;
    let pieces: Vec<String> = tokens.iter().map(|&token| name(tokenizer, token)).collect();
    Ok(Json(json!({"tokens": tokens, "count": tokens.len(), "pieces": pieces})))
}

/// Tokens whose text is asked for.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct DetokenizeRequest {
    tokens: Vec<u32>,
}

/// The text of tokens.
#[utoipa::path(post, path = "/detokenize", request_body = DetokenizeRequest, responses(
    (status = 200, description = "content: the text, without marks."),
    (status = 400, description = "A token that the model does not have."),
))]
pub(crate) async fn detokenize(
    State(app): State<App>,
    Body(request): Body<DetokenizeRequest>,
) -> Result<Json<Value>, Failure> {
    let decode = move |served: &Served| Ok(served.tokenizer.decode(&request.tokens)?);
    Ok(Json(json!({"content": on_thread(&app, decode).await?})))
}
