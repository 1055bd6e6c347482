//! `foveal generate`: continues a prompt.

use std::io::{IsTerminal, Read};
use std::path::PathBuf;
use std::time::Instant;

use anyhow::Context;
use foveal_lm::Model;
use foveal_lm::generate::{Generator, Options, Piece, StopReason, prompt_tokens};
use foveal_lm::sample::Sampling;
use foveal_lm::tokenizer::Tokenizer;
use serde_json::json;

use crate::compute::ComputeArguments;
use crate::kv::KvArguments;
use crate::{numbers, output, source};

/// The longest prompt that is read from standard input.
const MAX_PROMPT_BYTES: u64 = 64 << 20;

/// Continue a prompt.
///
/// Standard output carries the continuation alone, as it is made (and a line break at the end, on a terminal); figures
/// go to standard error. Tokens are chosen by
/// repeat penalty, top-k, top-p, min-p and temperature, in this order, as llama.cpp does.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// The text to continue; "-" reads it from standard input.
    prompt: String,

    /// A GGUF file, or a folder with config.json, safetensors and tokenizer.json; the built-in model if left out.
    #[arg(long, short, value_name = "FILE|DIR")]
    model: Option<PathBuf>,

    /// The most tokens to make.
    #[arg(long, short = 'n', value_name = "N", default_value_t = 128)]
    max_tokens: usize,

    /// Above 1 flattens the probabilities, below 1 sharpens them; 0 always takes the most probable token.
    #[arg(long, short, default_value_t = 0.8, value_parser = numbers::temperature)]
    temperature: f32,

    /// Keep so many of the most probable tokens; 0 keeps all.
    #[arg(long, value_name = "N", default_value_t = 40)]
    top_k: usize,

    /// Keep the most probable tokens that together have this probability; 1 keeps all.
    #[arg(long, value_name = "P", default_value_t = 0.95, value_parser = numbers::top_p)]
    top_p: f32,

    /// Keep tokens with at least this share of the greatest probability; 0 keeps all.
    #[arg(long, value_name = "P", default_value_t = 0.05, value_parser = numbers::min_p)]
    min_p: f32,

    /// Divide the positive logits of the last 64 tokens by this, and multiply the others; 1 changes nothing.
    #[arg(long, value_name = "R", default_value_t = 1.0, value_parser = numbers::repeat_penalty)]
    repeat_penalty: f32,

    /// The beginning of the random numbers: the same seed gives the same text.
    #[arg(long, default_value_t = 0)]
    seed: u64,

    /// End the text before this string; may be given several times.
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,

    #[command(flatten)]
    compute: ComputeArguments,

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
    arguments.compute.install(|| generate(arguments))
}

fn generate(arguments: &Arguments) -> anyhow::Result<()> {
    let path = arguments.model.as_deref();
    let weights = source::open(path)?;
    let model = Model::new(&weights);
    let model = model.with_context(|| format!("cannot run {}", source::name(path)))?;
    let model = arguments.compute.apply(model);
    let tokenizer = source::tokenizer(path, &weights)?;
    let prompt = prompt_tokens(&tokenizer, &prompt(&arguments.prompt)?)?;
    arguments.kv.warn(&model, prompt.len().saturating_add(arguments.max_tokens));

    let mut text = String::new();
    let figures = continue_prompt(arguments, (&model, &tokenizer), &prompt, |piece| {
        if arguments.json {
            text.push_str(piece);
            return Ok(());
        }
        output::print(piece)
    })?;
    if arguments.json {
        return Ok(output::print_json(&figures.as_json(&text))?);
    }
    if std::io::stdout().is_terminal() {
        output::print("\n")?;
    }
    output::note(&figures.summary());
    Ok(())
}

fn continue_prompt(
    arguments: &Arguments,
    (model, tokenizer): (&Model, &Tokenizer),
    prompt: &[u32],
    mut give: impl FnMut(&str) -> std::io::Result<()>,
) -> anyhow::Result<Figures> {
    let options = arguments.options();
    let mut state = arguments.kv.state(model)?;
    let start = Instant::now();
    let mut generator = Generator::new(model, tokenizer, &mut state, prompt, &options)?;
    let prompt_seconds = start.elapsed().as_secs_f64();
    let start = Instant::now();
    let mut tokens = Vec::new();
    for piece in &mut generator {
        let Piece { token, text } = piece?;
        tokens.push(token);
        give(&text)?;
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
    if argument != "-" {
        return Ok(argument.to_owned());
    }
    let mut bytes = Vec::new();
    let input = std::io::stdin().lock();
    input
        .take(MAX_PROMPT_BYTES + 1)
        .read_to_end(&mut bytes)
        .context("cannot read standard input")?;
    anyhow::ensure!(
        bytes.len() as u64 <= MAX_PROMPT_BYTES,
        "the prompt on standard input is longer than 64 MiB; give a shorter one"
    );
    String::from_utf8(bytes).context("the prompt on standard input is not UTF-8; convert it first")
}

impl Arguments {
    fn options(&self) -> Options {
        let &Arguments {
            max_tokens, temperature, top_k, top_p, min_p, repeat_penalty, seed, ..
        } = self;
        let sampling = Sampling {
            temperature,
            top_k,
            top_p,
            min_p,
            repeat_penalty,
            seed,
            ..Sampling::default()
        };
        Options { max_tokens, stop: self.stop.clone(), sampling }
    }
}

impl Figures {
    fn prompt_rate(&self) -> f64 {
        rate(self.prompt_tokens, self.prompt_seconds)
    }

    /// The prompt has already paid for the first token.
    fn generate_rate(&self) -> f64 {
        rate(self.tokens.len().saturating_sub(1), self.generate_seconds)
    }

    fn summary(&self) -> String {
        let resident = resident_bytes();
        let resident = resident
            .map_or_else(String::new, |bytes| format!(", {} resident", numbers::bytes(bytes)));
        format!(
            "prompt: {} tokens, {:.1} tok/s; generated: {} tokens, {:.1} tok/s, ended by {}; \
             memory: {} of keys and values{resident}",
            self.prompt_tokens,
            self.prompt_rate(),
            self.tokens.len(),
            self.generate_rate(),
            self.stop.map_or("nothing", StopReason::name),
            numbers::bytes(self.kv_bytes),
        )
    }

    fn as_json(&self, text: &str) -> serde_json::Value {
        json!({
            "text": text,
            "tokens": self.tokens,
            "stop": self.stop.map(StopReason::name),
            "prompt_tokens": self.prompt_tokens,
            "prompt_seconds": self.prompt_seconds,
            "prompt_tokens_per_second": self.prompt_rate(),
            "generate_seconds": self.generate_seconds,
            "generate_tokens_per_second": self.generate_rate(),
            "kv_bytes": self.kv_bytes,
            "resident_bytes": resident_bytes(),
        })
    }
}

fn rate(tokens: usize, seconds: f64) -> f64 {
    if seconds > 0.0 { tokens as f64 / seconds } else { 0.0 }
}

/// The most memory that this process has had resident, where the system says so (Linux).
fn resident_bytes() -> Option<usize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kibibytes: usize = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kibibytes.checked_mul(1024)
}
