//! What is served, and whether it is well.

use std::sync::atomic::Ordering::Relaxed;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::App;
use super::failure::Failure;

fn model(app: &App) -> Value {
    let config = app.served.model.config();
    json!({
        "id": app.served.name,
        "object": "model",
        "created": app.served.since,
        "owned_by": "foveal",
        "architecture": config.architecture.name(),
        "context_length": app.context(),
        "vocabulary": config.vocab,
        "layers": config.layers.len(),
        "heads": config.attention.heads,
        "kv_heads": config.attention.kv_heads,
        "chat": app.served.template.is_some(),
    })
}

/// The models of this server: one.
#[utoipa::path(get, path = "/v1/models", responses((status = 200, description = "A list of one model.")))]
pub(crate) async fn list(State(app): State<App>) -> Json<Value> {
    Json(json!({"object": "list", "data": [model(&app)]}))
}

/// A model.
#[utoipa::path(get, path = "/v1/models/{name}", params(("name" = String, Path, description = "Its name.")),
    responses((status = 200, description = "The model."), (status = 404, description = "It is not here.")))]
pub(crate) async fn one(
    State(app): State<App>,
    Path(name): Path<String>,
) -> Result<Json<Value>, Failure> {
    app.check_model(Some(&name))?;
    Ok(Json(model(&app)))
}

/// Embeddings, which no decoder gives.
#[utoipa::path(post, path = "/v1/embeddings", responses(
    (status = 400, description = "The model is no encoder.")))]
pub(crate) async fn embeddings(State(app): State<App>) -> Failure {
    let message = format!("{:?} is no encoder; it has no embeddings of texts", app.served.name);
    Failure::unsupported("model", message)
}

/// Whether requests are taken in: for load balancers.
#[utoipa::path(get, path = "/health", responses(
    (status = 200, description = "ok"),
    (status = 503, description = "draining: the server is about to stop.")))]
pub(crate) async fn health(State(app): State<App>) -> Response {
    match app.engine.is_closing() {
        false => Json(json!({"status": "ok"})).into_response(),
        true => {
            let body = Json(json!({"status": "draining"}));
            (StatusCode::SERVICE_UNAVAILABLE, body).into_response()
        }
    }
}

/// What the page's gauges show.
pub(crate) async fn status(State(app): State<App>) -> Json<Value> {
    let gauges = app.engine.gauges();
    let mut body = model(&app);
    body["status"] = json!({
        "waiting": app.engine.waiting(),
        "reading": gauges.reading.load(Relaxed),
        "running": gauges.running.load(Relaxed),
        "parallel": app.options.batch.parallel,
        "pages": gauges.pages.load(Relaxed),
        "free_pages": gauges.free_pages.load(Relaxed),
        "kv_bytes": gauges.kv_bytes.load(Relaxed),
        "made_tokens": gauges.made_tokens.load(Relaxed),
        "max_tokens": app.options.max_tokens,
    });
    Json(body)
}
