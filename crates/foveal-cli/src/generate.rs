//! `foveal generate`: continues a prompt.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::time::Instant;

use foveal_lm::generate::{Generator, Options, Piece, Prompt, StopReason, prompt_tokens, read};
use foveal_lm::model::State;
use foveal_lm::prompt_cache::{PromptCache, Resumed};
use foveal_lm::text_stream::TextStream;
use serde_json::json;

use crate::documents::DocumentArguments;
use crate::kv::KvArguments;
use crate::memory::MemoryArguments;
use crate::progress::Progress;
use crate::sampling::SamplingArguments;
use crate::session::{ModelArguments, Session};
use crate::{input, interrupt, numbers, output};

/// Continue a prompt.
///
/// Standard output carries the continuation alone, as it is made (and a line break at the end, on a terminal); figures
/// go to standard error. Tokens are chosen by
/// repeat penalty, top-k, top-p, min-p and temperature, in this order, as llama.cpp does.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// The text to continue; "-" reads it from standard input.
    prompt: String,

    /// Read the text to continue piece by piece, however long it is: nothing is kept of it but what the model's layers keep.
    #[arg(long, conflicts_with = "prompt_cache")]
    stream: bool,

    #[command(flatten)]
    documents: DocumentArguments,

    #[command(flatten)]
    memory: MemoryArguments,

    /// The most tokens to make.
    #[arg(long, short = 'n', value_name = "N", default_value_t = 128)]
    max_tokens: usize,

    /// End the text before this string; may be given several times.
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,

    #[command(flatten)]
    model: ModelArguments,

    #[command(flatten)]
    sampling: SamplingArguments,

    #[command(flatten)]
    kv: KvArguments,

    /// Keep what was read of the prompt in this file, and go on from it when a prompt begins likewise. The file is made by the
    /// first run, and serves the same model with the same options.
    #[arg(long, value_name = "FILE", conflicts_with = "evict")]
    prompt_cache: Option<PathBuf>,

    /// Print one JSON object with the text, its tokens and the figures.
    #[arg(long)]
    json: bool,
}

/// What a run took.
#[derive(Debug)]
struct Figures {
    prompt_tokens: usize,
    /// Those of them that a prompt cache had.
    cached: usize,
    prompt_seconds: f64,
    tokens: Vec<u32>,
    generate_seconds: f64,
    stop: Option<StopReason>,
    kv_bytes: usize,
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let change = |config| arguments.memory.change(config);
    arguments.model.run_as(change, |session| generate(arguments, session))
}

fn generate(arguments: &Arguments, session: &Session) -> anyhow::Result<()> {
    let mut text = String::new();
    let figures = continue_prompt(arguments, session, |piece| {
        if arguments.json {
            text.push_str(piece);
            return Ok(());
        }
        output::print(piece)
    })?;
    if arguments.json {
        output::print_json(&figures.as_json(&text))?;
    } else {
        if std::io::stdout().is_terminal() {
            output::print("\n")?;
        }
        output::note(&figures.summary());
    }
    // An interrupted text is shown as far as it came, and the exit code says so.
    if interrupt::asked() { Err(foveal_lm::Error::Interrupted.into()) } else { Ok(()) }
}

fn continue_prompt(
    arguments: &Arguments,
    session: &Session,
    mut give: impl FnMut(&str) -> std::io::Result<()>,
) -> anyhow::Result<Figures> {
    let (Session { model, tokenizer, .. }, options) = (session, arguments.options());
    let start = Instant::now();
    let Begun { mut state, cached, prompt_tokens, tokens, read } = match arguments.stream {
        true => read_stream(arguments, session)?,
        false => read_prompt(arguments, session)?,
    };
    let (held, new) = tokens.split_at(read);
    let mut generator =
        Generator::new(model, tokenizer, &mut state, Prompt { held, new }, &options)?;
    let prompt_seconds = start.elapsed().as_secs_f64();
    let start = Instant::now();
    let mut tokens = Vec::new();
    for piece in &mut generator {
        let Piece { token, text, .. } = piece?;
        tokens.push(token);
        give(&text)?;
        if interrupt::asked() {
            break;
        }
    }
    Ok(Figures {
        prompt_tokens,
        cached,
        prompt_seconds,
        tokens,
        generate_seconds: start.elapsed().as_secs_f64(),
        stop: generator.stopped(),
        kv_bytes: generator.state().kv_bytes(),
    })
}

/// A prompt that was read up to its end.
struct Begun {
    state: State,
    /// How many tokens a prompt cache had.
    cached: usize,
    prompt_tokens: usize,
    /// The last of its tokens, or all.
    tokens: Vec<u32>,
    /// How many of these `state` has read.
    read: usize,
}

fn read_prompt(arguments: &Arguments, session: &Session) -> anyhow::Result<Begun> {
    let Session { model, weights, tokenizer } = session;
    let tokens = prompt_tokens(tokenizer, &prompt(&arguments.prompt)?)?;
    let prompt_tokens = tokens.len();
    arguments.kv.warn(model, prompt_tokens.saturating_add(arguments.max_tokens));
    let mut progress = Progress::new("read", prompt_tokens);
    let mut watch = |done| {
        progress.show(done);
        interrupt::flow()
    };
    if let Some(path) = &arguments.prompt_cache {
        let cache = PromptCache::new(model, weights, arguments.kv.options()?)?;
        let Resumed { state, held } = cache.read(path, &tokens, &mut watch)?;
        let read = prompt_tokens - 1;
        return Ok(Begun { state, cached: held, prompt_tokens, tokens, read });
    }
    let mut state = arguments.kv.state(model)?;
    arguments.memory.keep(&mut state, session)?;
    let rest = read(model, &tokens, &mut state, &mut watch)?;
    let read = prompt_tokens - rest.len();
    Ok(Begun { state, cached: 0, prompt_tokens, tokens, read })
}

/// Tokens that a repeat penalty may look back on.
const RECENT: usize = 4096;

/// The same piece by piece. Where a text has several documents, it is the last one that is continued: what was read of others is
/// forgotten.
fn read_stream(arguments: &Arguments, session: &Session) -> anyhow::Result<Begun> {
    let Session { model, tokenizer, .. } = session;
    let mut state = arguments.kv.state(model)?;
    arguments.memory.keep(&mut state, session)?;
    let mut documents = match arguments.prompt.as_str() {
        "-" => arguments.documents.read("-".as_ref())?,
        text => arguments.documents.of(Box::new(text.as_bytes()))?,
    };
    let (mut tokens, mut read_of, mut prompt_tokens) = (vec![], 0, 0);
    while let Some(document) = documents.next_document()? {
        if prompt_tokens > 0 {
            state.reset();
            (read_of, prompt_tokens) = (0, 0);
            tokens.clear();
        }
        let mut stream = TextStream::new(tokenizer, document)?;
        while let Some(piece) = stream.next_piece()? {
            prompt_tokens += piece.len();
            tokens.extend(piece);
            let rest = read(model, &tokens[read_of..], &mut state, &mut |_| interrupt::flow())?;
            read_of = tokens.len() - rest.len();
            let old = read_of.saturating_sub(RECENT);
            tokens.drain(..old);
            read_of -= old;
        }
    }
    if tokens.is_empty() {
        tokens.push(tokenizer.bos().ok_or(foveal_lm::Error::EmptyPrompt)?);
        prompt_tokens = 1;
    }
    Ok(Begun { state, cached: 0, prompt_tokens, tokens, read: read_of })
}

/// The prompt itself, or what standard input has.
fn prompt(argument: &str) -> anyhow::Result<String> {
    match argument {
        "-" => input::read(argument.as_ref(), "the prompt"),
        _ => Ok(argument.to_owned()),
    }
}

impl Arguments {
    fn options(&self) -> Options {
        let (max_tokens, sampling) = (self.max_tokens, self.sampling.sampling());
        Options { max_tokens, stop: self.stop.clone(), sampling, logprobs: None }
    }
}

impl Figures {
    fn prompt_rate(&self) -> f64 {
        numbers::rate(self.prompt_tokens - self.cached, self.prompt_seconds)
    }

    /// The prompt has already paid for the first token.
    fn generate_rate(&self) -> f64 {
        numbers::rate(self.tokens.len().saturating_sub(1), self.generate_seconds)
    }

    fn summary(&self) -> String {
        let resident = numbers::resident_bytes();
        let resident = resident
            .map_or_else(String::new, |bytes| format!(", {} resident", numbers::bytes(bytes)));
        // Of a few tokens behind a cache the rate would be that of opening the file.
        let speed = match self.cached {
            0 => format!("{:.1} tok/s", self.prompt_rate()),
            cached => format!("{cached} of them cached, {:.2} s", self.prompt_seconds),
        };
        format!(
            "prompt: {} tokens, {speed}; generated: {} tokens, {:.1} tok/s, ended by {}; \
             memory: {} of keys and values{resident}",
            self.prompt_tokens,
            self.tokens.len(),
            self.generate_rate(),
            self.stop.map_or("an interruption", StopReason::name),
            numbers::bytes(self.kv_bytes),
        )
    }

    fn as_json(&self, text: &str) -> serde_json::Value {
        json!({
            "text": text,
            "tokens": self.tokens,
            "stop": self.stop.map_or("interrupted", StopReason::name),
            "prompt_tokens": self.prompt_tokens,
            "prompt_tokens_cached": self.cached,
            "prompt_seconds": self.prompt_seconds,
            "prompt_tokens_per_second": self.prompt_rate(),
            "generate_seconds": self.generate_seconds,
            "generate_tokens_per_second": self.generate_rate(),
            "kv_bytes": self.kv_bytes,
            "resident_bytes": numbers::resident_bytes(),
        })
    }
}
