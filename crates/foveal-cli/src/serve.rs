//! `foveal serve`: a model for programs and people.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use foveal_lm::Model;
use foveal_lm::chat::ChatTemplate;
use foveal_lm::generate::BatchOptions;
use foveal_lm::model::MAX_TEXTS;
use foveal_serve::{Keys, Options, Served, Stop};

use crate::compute::ComputeArguments;
use crate::kv::KvArguments;
use crate::{numbers, output, source};

/// The environment's variable with a key.
const KEY: &str = "FOVEAL_API_KEY";

/// Serve a model by OpenAI's interface, and a page that shows attention at work.
///
/// Answers to this machine alone unless --host says otherwise; then a key is needed, by --key-file or in the variable
/// FOVEAL_API_KEY. Ctrl-C or SIGTERM lets what runs end, and stops; once more stops at once.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// A GGUF file, or a folder with config.json, safetensors and tokenizer.json; the built-in model if left out.
    #[arg(long, short, value_name = "FILE|DIR")]
    model: Option<PathBuf>,

    /// What clients call the model; the name of its file if left out.
    #[arg(long, value_name = "NAME")]
    name: Option<String>,

    /// The address to listen on.
    #[arg(long, default_value = "127.0.0.1")]
    host: IpAddr,

    /// The port to listen on; 0 for one that is free.
    #[arg(long, default_value_t = 8080)]
    port: u16,

    /// A file of keys, one a line, any of which lets a client in.
    #[arg(long, value_name = "FILE")]
    key_file: Option<PathBuf>,

    /// How many texts go on together, at most.
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = parallel)]
    parallel: usize,

    /// Keep keys and values of at most N tokens at once; a text waits until there is room for all that it may become. As many
    /// as four whole contexts have if left out.
    #[arg(long, value_name = "N", value_parser = numbers::tokens)]
    pool: Option<usize>,

    /// How many texts may wait; more are refused.
    #[arg(long, value_name = "N", default_value_t = 64)]
    queue: usize,

    /// The most tokens of a chat's answer whose request doesn't say.
    #[arg(long, short = 'n', value_name = "N", default_value_t = 1024, value_parser = numbers::tokens)]
    max_tokens: usize,

    /// The longest body of a request, in bytes.
    #[arg(long, value_name = "BYTES", default_value_t = 2 << 20, value_parser = numbers::tokens)]
    max_body: usize,

    /// The longest that a request may take, its waiting included, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    time_limit: u64,

    /// How long texts may go on when the server is told to stop, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    drain: u64,

    #[command(flatten)]
    compute: ComputeArguments,

    #[command(flatten)]
    kv: KvArguments,
}

fn parallel(text: &str) -> Result<usize, String> {
    let number = text.parse().ok().filter(|number| (1..=MAX_TEXTS).contains(number));
    number.ok_or_else(|| format!("expected 1 to {MAX_TEXTS}"))
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<()> {
    arguments.compute.install(|| serve(arguments))
}

fn serve(arguments: &Arguments) -> anyhow::Result<()> {
    let keys = arguments.keys()?;
    let served = arguments.open()?;
    let options = arguments.options(keys, &served)?;
    let name = output::one_line(&served.name);
    let ready = |address| output::note(&format!("foveal: {name} at http://{address}"));
    Ok(foveal_serve::run(served, &options, &Stop::new(), ready)?)
}

impl Arguments {
    fn keys(&self) -> anyhow::Result<Keys> {
        let mut keys = Keys::default();
        if let Some(path) = &self.key_file {
            keys.add_file(path)?;
        }
        match std::env::var(KEY) {
            Ok(key) if !key.is_empty() => keys.add(&key).with_context(|| KEY.to_owned())?,
            Err(std::env::VarError::NotUnicode(_)) => anyhow::bail!("{KEY} is no text"),
            _ => {}
        }
        Ok(keys)
    }

    fn open(&self) -> anyhow::Result<Served> {
        let path = self.model.as_deref();
        let weights = source::open(path)?;
        let model = Model::new(&weights);
        let model = model.with_context(|| format!("cannot run {}", source::name(path)))?;
        let model = self.compute.apply(model);
        let tokenizer = source::tokenizer(path, &weights)?;
        let template = ChatTemplate::open(&weights, path, &tokenizer)?;
        let name = self.name.clone().or_else(|| path.map(foveal_serve::name_of));
        let name = name.unwrap_or_else(|| "built-in".to_owned());
        Ok(Served::new(name, model, tokenizer, template))
    }

    fn options(&self, keys: Keys, served: &Served) -> anyhow::Result<Options> {
        let cache = self.kv.options()?;
        let context = cache.context.unwrap_or(served.model.config().context);
        // Beside its tokens a text holds the chunk being read and what is partly seen.
        let pool = self.pool.unwrap_or_else(|| context.saturating_add(1024).saturating_mul(4));
        Ok(Options {
            keys,
            batch: BatchOptions { parallel: self.parallel, cache, pool: Some(pool) },
            queue: self.queue,
            max_tokens: self.max_tokens,
            body: self.max_body,
            limit: Duration::from_secs(self.time_limit),
            drain: Duration::from_secs(self.drain),
            ..Options::new(SocketAddr::new(self.host, self.port))
        })
    }
}
