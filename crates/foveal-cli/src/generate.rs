//! `foveal generate`: continues a prompt.

use std::io::IsTerminal;
use std::time::Instant;

use foveal_lm::generate::{Generator, Options, Piece, Prompt, StopReason, prompt_tokens, read};
use serde_json::json;

use crate::kv::KvArguments;
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

    /// Print one JSON object with the text, its tokens and the figures.
    #[arg(long)]
    json: bool,
}

/// What a run took.
#[derive(Debug)]
struct Figures {
    prompt_tokens: usize,
    prompt_seconds: f64,
    tokens: Vec<u32>,
    generate_seconds: f64,
    stop: Option<StopReason>,
    kv_bytes: usize,
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<()> {
    arguments.model.run(|session| generate(arguments, session))
}

fn generate(arguments: &Arguments, session: &Session) -> anyhow::Result<()> {
    let prompt = prompt_tokens(&session.tokenizer, &prompt(&arguments.prompt)?)?;
    arguments.kv.warn(&session.model, prompt.len().saturating_add(arguments.max_tokens));

    let mut text = String::new();
    let figures = continue_prompt(arguments, session, &prompt, |piece| {
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
    Session { model, tokenizer, .. }: &Session,
    prompt: &[u32],
    mut give: impl FnMut(&str) -> std::io::Result<()>,
) -> anyhow::Result<Figures> {
    let options = arguments.options();
    let mut state = arguments.kv.state(model)?;
    let start = Instant::now();
    let mut progress = Progress::new("read", prompt.len());
    let new = read(model, prompt, &mut state, &mut |done| {
        progress.show(done);
        interrupt::flow()
    })?;
    let held = &prompt[..prompt.len() - new.len()];
    let prompt_and_held = Prompt { held, new };
    let mut generator = Generator::new(model, tokenizer, &mut state, prompt_and_held, &options)?;
    drop(progress);
    let prompt_seconds = start.elapsed().as_secs_f64();
    let start = Instant::now();
    let mut tokens = Vec::new();
    for piece in &mut generator {
        let Piece { token, text } = piece?;
        tokens.push(token);
        give(&text)?;
        if interrupt::asked() {
            break;
        }
    }
    Ok(Figures {
        prompt_tokens: prompt.len(),
        prompt_seconds,
        tokens,
        generate_seconds: start.elapsed().as_secs_f64(),
        stop: generator.stopped(),
        kv_bytes: generator.state().kv_bytes(),
    })
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
        Options { max_tokens, stop: self.stop.clone(), sampling }
    }
}

impl Figures {
    fn prompt_rate(&self) -> f64 {
        numbers::rate(self.prompt_tokens, self.prompt_seconds)
    }

    /// The prompt has already paid for the first token.
    fn generate_rate(&self) -> f64 {
        numbers::rate(self.tokens.len().saturating_sub(1), self.generate_seconds)
    }

    fn summary(&self) -> String {
        let resident = numbers::resident_bytes();
        let resident = resident
            .map_or_else(String::new, |bytes| format!(", {} resident", numbers::bytes(bytes)));
        format!(
            "prompt: {} tokens, {:.1} tok/s; generated: {} tokens, {:.1} tok/s, ended by {}; \
             memory: {} of keys and values{resident}",
            self.prompt_tokens,
            self.prompt_rate(),
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
            "prompt_seconds": self.prompt_seconds,
            "prompt_tokens_per_second": self.prompt_rate(),
            "generate_seconds": self.generate_seconds,
            "generate_tokens_per_second": self.generate_rate(),
            "kv_bytes": self.kv_bytes,
            "resident_bytes": numbers::resident_bytes(),
        })
    }
}
