//! An OpenAI-compatible server for language models on the `foveal` attention engine, and a page that shows attention at
//! work.
//!
//! ```text
//! connections ─▶ http (limits, key, headers) ─▶ api ─▶ engine: one thread, one running batch, keys and values in pages
//! ```
//!
//! [`run`] serves until it is told to stop. The calling thread does the inference, with the threads of its pool; HTTP runs on
//! a thread beside it. Nothing is kept between requests but what prompts have in common, so that any number of servers may
//! stand behind one address.

#![forbid(unsafe_code)]

mod api;
mod engine;
mod error;
mod http;
mod key;
mod look;
mod mechanisms;
mod page;

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use foveal_lm::Model;
use foveal_lm::chat::{ChatTemplate, Transcript};
use foveal_lm::generate::BatchOptions;
use foveal_lm::model::MAX_TEXTS;
use foveal_lm::tokenizer::Tokenizer;

pub use error::Error;
pub use key::Keys;

/// A model and what goes with it.
#[derive(Debug)]
pub struct Served {
    /// What clients call it.
    pub name: String,
    /// The model.
    pub model: Model,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// Its chat template, if it has one.
    pub template: Option<ChatTemplate>,
    transcript: Transcript,
    since: u64,
}

impl Served {
    /// A model that clients call `name`.
    pub fn new(
        name: String,
        model: Model,
        tokenizer: Tokenizer,
        template: Option<ChatTemplate>,
    ) -> Served {
        let transcript = Transcript::new(&tokenizer);
        let since = api::seconds_since_1970();
        Served { name, model, tokenizer, template, transcript, since }
    }

    /// How many tokens prompt and answer may have together.
    fn context(&self, batch: &BatchOptions) -> usize {
        batch.cache.context.unwrap_or(self.model.config().context)
    }
}

/// What a model's file or folder is called: its name without the ending.
pub fn name_of(path: &Path) -> String {
    let stem = if path.is_dir() { path.file_name() } else { path.file_stem() };
    stem.map_or_else(|| "model".to_owned(), |stem| stem.to_string_lossy().into_owned())
}

/// How to serve.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where to listen. Anything but this machine's own addresses needs keys.
    pub address: SocketAddr,
    /// Who may ask; everyone on this machine if there are none.
    pub keys: Keys,
    /// How texts go on together.
    pub batch: BatchOptions,
    /// Texts that may wait; more are refused with 429.
    pub queue: usize,
    /// The most tokens of a chat's answer whose request doesn't say.
    pub max_tokens: usize,
    /// The longest body of a request, in bytes.
    pub body: usize,
    /// The longest that a request may take, its waiting included.
    pub limit: Duration,
    /// How long texts may go on after the server was told to stop.
    pub drain: Duration,
}

impl Options {
    /// Those that `foveal serve` has when it is told nothing.
    pub fn new(address: SocketAddr) -> Options {
        Options {
            address,
            keys: Keys::default(),
            batch: BatchOptions::default(),
            queue: 64,
            max_tokens: 1024,
            body: 2 << 20,
            limit: Duration::from_secs(600),
            drain: Duration::from_secs(30),
        }
    }

    fn check(&self) -> Result<(), Error> {
        if !self.address.ip().is_loopback() && self.keys.is_empty() {
            return Err(Error::NoKeys { address: self.address });
        }
        if !(1..=MAX_TEXTS).contains(&self.batch.parallel) {
            return Err(Error::Parallel { found: self.batch.parallel });
        }
        Ok(())
    }
}

/// Tells a server to stop; clones tell the same one.
#[derive(Debug, Clone, Default)]
pub struct Stop(std::sync::Arc<tokio::sync::Notify>);

impl Stop {
    /// One that has not been told yet.
    pub fn new() -> Stop {
        Stop::default()
    }

    /// Takes no more requests, lets what runs end, and stops. The second time it does not wait for that.
    pub fn stop(&self) {
        self.0.notify_one();
    }

    async fn told(&self) {
        self.0.notified().await;
    }
}

/// Serves until `stop`, SIGTERM or SIGINT; `ready` gets the address once there is something that listens.
///
/// Works on the calling thread and its pool's.
///
/// # Errors
///
/// [`Error::NoKeys`] for an address that others can reach, without keys; [`Error::Listen`]; those of the model.
pub fn run(
    served: Served,
    options: &Options,
    stop: &Stop,
    ready: impl FnOnce(SocketAddr),
) -> Result<(), Error> {
    options.check()?;
    let served = std::sync::Arc::new(served);
    let engine = engine::Engine::new(options.queue, options.batch.parallel);
    let app = api::App::new(served.clone(), engine.clone(), options);
    let (listener, address) = http::bind(options.address)?;
    let server = http::Server { listener, app, engine: engine.clone(), drain: options.drain };
    let stop = stop.clone();
    let thread = std::thread::Builder::new().name("http".to_owned());
    let thread = thread.spawn(move || server.run(&stop)).map_err(Error::Thread)?;
    ready(address);
    let done = engine.run(&served, &options.batch);
    let http = thread.join().unwrap_or(Err(Error::Fault));
    done?;
    http
}
