//! The mechanisms for the page, and how long one takes on this machine.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json};

use super::App;
use super::body::Body;
use super::failure::Failure;
use crate::mechanisms::{self, Measuring, TOKENS};

/// All mechanisms of the registry.
pub(crate) async fn list() -> Json<Value> {
    Json(mechanisms::all())
}

#[derive(Debug, Deserialize)]
pub(crate) struct MeasureRequest {
    name: String,
}

/// A mechanism's time for prompts of several lengths.
pub(crate) async fn measure(
    State(app): State<App>,
    Body(request): Body<MeasureRequest>,
) -> Result<Json<Value>, Failure> {
    let (work, done) = Measuring::new(request.name);
    app.engine.beside(Box::new(work))?;
    let curve = done.await.map_err(|_| Failure::cut())?;
    let curve = curve.map_err(|error| match error {
        foveal::Error::InvalidParameter { .. } => Failure::bad("name", error.to_string()),
        error => {
            let status = StatusCode::INTERNAL_SERVER_ERROR;
            Failure::new(status, "kernel_error", error.to_string())
        }
    })?;
    Ok(Json(json!({"tokens": TOKENS, "milliseconds": curve})))
}
