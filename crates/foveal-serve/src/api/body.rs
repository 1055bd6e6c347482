//! Bodies of requests: JSON of limited length, in limited time.

use std::time::Duration;

use axum::body::to_bytes;
use axum::extract::{FromRequest, Request};
use axum::http::{StatusCode, header};
use serde::de::DeserializeOwned;

use super::App;
use super::failure::Failure;

/// How long a body may take to arrive.
const TIME: Duration = Duration::from_secs(30);

/// What a body says.
pub(crate) struct Body<T>(pub(crate) T);

impl<T: DeserializeOwned> FromRequest<App> for Body<T> {
    type Rejection = Failure;

    async fn from_request(request: Request, app: &App) -> Result<Body<T>, Failure> {
        let limit = app.options.body;
        let length = request.headers().get(header::CONTENT_LENGTH);
        let length = length.and_then(|length| length.to_str().ok()?.parse::<usize>().ok());
        if length.is_some_and(|length| length > limit) {
            return Err(too_large(limit));
        }
        let bytes = tokio::time::timeout(TIME, to_bytes(request.into_body(), limit)).await;
        let Ok(bytes) = bytes else {
            let message = format!("the body took longer than {} s", TIME.as_secs());
            return Err(Failure::new(StatusCode::REQUEST_TIMEOUT, "slow_body", message));
        };
        // The other reason is a client that is gone.
        let bytes = bytes.map_err(|_| too_large(limit))?;
        let value = serde_json::from_slice(&bytes).map_err(|error| {
            let message = format!("the body is not what is expected here: {error}");
            Failure::new(StatusCode::BAD_REQUEST, "invalid_json", message)
        })?;
        Ok(Body(value))
    }
}

fn too_large(limit: usize) -> Failure {
    let message = format!("the body has more than {limit} bytes");
    Failure::new(StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", message)
}
