//! Errors in the form that OpenAI's clients read.
//!
//! ```text
//! {"error": {"message", "type", "param", "code"}}
//! ```

use std::sync::Arc;

use axum::Json;
use axum::extract::Request;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use foveal_lm::Error;
use serde_json::{Value, json};

use crate::engine::Refused;

/// Why a request was not answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    status: StatusCode,
    code: &'static str,
    /// The field that is wrong.
    field: Option<String>,
    message: String,
    retry_after: Option<u64>,
}

impl Failure {
    pub(crate) fn new(
        status: StatusCode,
        code: &'static str,
        message: impl Into<String>,
    ) -> Failure {
        Failure { status, code, field: None, message: message.into(), retry_after: None }
    }

    /// A request that can't be answered as it is.
    pub(crate) fn bad(field: &str, message: impl Into<String>) -> Failure {
        let failure = Failure::new(StatusCode::BAD_REQUEST, "invalid_value", message);
        Failure { field: Some(field.to_owned()), ..failure }
    }

    /// Something that this server can't do, where it would change the answer to leave it out.
    pub(crate) fn unsupported(field: &str, message: impl Into<String>) -> Failure {
        Failure { code: "unsupported", ..Failure::bad(field, message) }
    }

    pub(crate) fn model(found: &str, served: &str) -> Failure {
        let found: String = found.chars().take(100).collect();
        let message = format!("there is no model {found:?}; this server has {served:?}");
        let failure = Failure::new(StatusCode::NOT_FOUND, "model_not_found", message);
        Failure { field: Some("model".to_owned()), ..failure }
    }

    /// A prompt that leaves no place for an answer.
    pub(crate) fn too_long(field: &str, tokens: usize, context: usize) -> Failure {
        let message = format!(
            "the prompt has {tokens} tokens, but prompt and answer may have {context} together; shorten it"
        );
        Failure { code: "context_length_exceeded", ..Failure::bad(field, message) }
    }

    /// What took longer than it may.
    pub(crate) fn late(seconds: u64) -> Failure {
        let message = format!("the answer took longer than {seconds} s; ask for fewer tokens");
        Failure::new(StatusCode::GATEWAY_TIMEOUT, "timeout", message)
    }

    /// A server that stopped half way.
    pub(crate) fn cut() -> Failure {
        let failure =
            Failure::new(StatusCode::SERVICE_UNAVAILABLE, "stopped", "the server has stopped");
        Failure { retry_after: Some(1), ..failure }
    }

    pub(crate) fn of_model(error: &Arc<Error>) -> Failure {
        Failure::from(&**error)
    }

    /// What clients read.
    pub(crate) fn body(&self) -> Value {
        let kind = match self.status.as_u16() {
            401 => "authentication_error",
            403 => "permission_error",
            404 => "not_found_error",
            429 => "rate_limit_error",
            status if status < 500 => "invalid_request_error",
            _ => "server_error",
        };
        let (message, param, code) = (&self.message, &self.field, self.code);
        json!({"error": {"message": message, "type": kind, "param": param, "code": code}})
    }
}

impl From<Refused> for Failure {
    fn from(refused: Refused) -> Failure {
        let (status, code, message, seconds) = match refused {
            Refused::Full { seconds } => {
                let message = "too many requests wait already; try again later";
                (StatusCode::TOO_MANY_REQUESTS, "queue_full", message, seconds)
            }
            Refused::Closing => {
                (StatusCode::SERVICE_UNAVAILABLE, "stopping", "the server is about to stop", 1)
            }
        };
        Failure { retry_after: Some(seconds), ..Failure::new(status, code, message) }
    }
}

impl From<&Error> for Failure {
    fn from(error: &Error) -> Failure {
        let message = error.to_string();
        match error {
            Error::Template { .. } => Failure::bad("messages", message),
            Error::EmptyPrompt | Error::Token { .. } | Error::Tokenizer(_) => {
                Failure::bad("prompt", message)
            }
            Error::Sampling { name, .. } => Failure::bad(&name.replace(['-', ' '], "_"), message),
            Error::Kernel(foveal::Error::OutOfPages { .. }) => {
                let message = "prompt and answer are larger than the server's pool of pages; ask for \
                               fewer tokens, or start it with a larger --pool";
                Failure { code: "pool_exceeded", ..Failure::bad("max_tokens", message) }
            }
            Error::ObservedKeep | Error::ObservedMixer => Failure::unsupported("model", message),
            _ => Failure::new(StatusCode::INTERNAL_SERVER_ERROR, "model_error", message),
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        Failure::from(&error)
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        if let Some(seconds) = self.retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            let scheme = HeaderValue::from_static("Bearer");
            response.headers_mut().insert(header::WWW_AUTHENTICATE, scheme);
        }
        response
    }
}

/// For addresses where nothing is.
pub(crate) async fn nowhere(request: Request) -> Failure {
    let path: String = request.uri().path().chars().take(100).collect();
    let message = format!("there is nothing at {path:?}; /openapi.json lists what there is");
    Failure::new(StatusCode::NOT_FOUND, "unknown_url", message)
}

/// For a GET that should be a POST, and the like.
pub(crate) async fn wrong_method(request: Request) -> Failure {
    let message = format!("{} is not what this address takes", request.method());
    Failure::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message)
}
