//! What can be asked, and by whom.

mod answer;
mod body;
mod chat;
mod choice;
mod completions;
mod document;
mod failure;
mod guard;
mod head;
mod look;
mod measure;
mod metrics;
mod models;
mod stream;
mod tokens;

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, SystemTime};

use axum::Router;
use axum::middleware::from_fn_with_state;
use axum::routing::{get, post};

use crate::engine::Engine;
use crate::look::Looks;
use crate::{Options, Served, page};
use failure::Failure;

/// What all requests share.
#[derive(Clone)]
pub(crate) struct App(Arc<Inner>);

pub(crate) struct Inner {
    pub(crate) served: Arc<Served>,
    pub(crate) engine: Engine,
    pub(crate) options: Options,
    pub(crate) looks: Looks,
    requests: AtomicU64,
    refused: AtomicU64,
    random: RandomState,
}

impl std::ops::Deref for App {
    type Target = Inner;

    fn deref(&self) -> &Inner {
        &self.0
    }
}

impl App {
    pub(crate) fn new(served: Arc<Served>, engine: Engine, options: &Options) -> App {
        App(Arc::new(Inner {
            served,
            engine,
            options: options.clone(),
            looks: Looks::default(),
            requests: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            random: RandomState::new(),
        }))
    }

    /// Everything that has an address.
    pub(crate) fn router(&self) -> Router {
        let api = Router::new()
            .route("/v1/models", get(models::list))
            .route("/v1/models/{name}", get(models::one))
            .route("/v1/completions", post(completions::create))
            .route("/v1/chat/completions", post(chat::create))
            .route("/v1/embeddings", post(models::embeddings))
            .route("/tokenize", post(tokens::tokenize))
            .route("/detokenize", post(tokens::detokenize))
            .route("/health", get(models::health))
            .route("/metrics", get(metrics::all))
            .route("/openapi.json", get(document::all))
            .route("/page/status", get(models::status))
            .route("/page/mechanisms", get(measure::list))
            .route("/page/measure", post(measure::measure))
            .route("/page/look", post(look::begin))
            .route("/page/look/{id}/row", post(look::row))
            .route("/page/look/{id}/continue", post(look::go_on));
        page::routes(api)
            .fallback(failure::nowhere)
            .method_not_allowed_fallback(failure::wrong_method)
            .layer(from_fn_with_state(self.clone(), guard::guard))
            .with_state(self.clone())
    }

    /// A number that nobody can foresee, for names and for texts without a seed.
    pub(crate) fn number(&self) -> u64 {
        let mut hasher = self.random.build_hasher();
        hasher.write_u64(self.requests.fetch_add(1, Relaxed));
        hasher.finish()
    }

    /// The name of an answer.
    fn name(&self, kind: &str) -> String {
        format!("{kind}-{:016x}", self.number())
    }

    /// Refuses the name of a model that is not here.
    fn check_model(&self, name: Option<&str>) -> Result<(), Failure> {
        match name {
            Some(name) if name != self.served.name => Err(Failure::model(name, &self.served.name)),
            _ => Ok(()),
        }
    }

    fn context(&self) -> usize {
        self.served.context(&self.options.batch)
    }
}

pub(crate) fn seconds_since_1970() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.unwrap_or(Duration::ZERO).as_secs()
}
