//! `/openapi.json`: what can be asked, for programs.

use axum::Json;
use serde_json::Value;
use utoipa::OpenApi;

#[derive(OpenApi)]
#[openapi(
    info(
        title = "foveal serve",
        description = "Language models on the CPU, by OpenAI's interface."
    ),
    paths(
        super::models::list,
        super::models::one,
        super::models::embeddings,
        super::models::health,
        super::completions::create,
        super::chat::create,
        super::tokens::tokenize,
        super::tokens::detokenize,
        super::metrics::all,
    )
)]
struct Document;

/// The document.
pub(crate) async fn all() -> Json<Value> {
    Json(serde_json::to_value(Document::openapi()).unwrap_or_default())
}
