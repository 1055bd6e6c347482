//! `foveal batch`: continues many prompts at once.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Context;
use foveal_lm::generate::{BatchOptions, Batcher, Options, Request, Text, prompt_tokens};
use foveal_lm::model::MAX_TEXTS;
use foveal_lm::sample::Sampling;
use foveal_lm::tokenizer::Tokenizer;
use foveal_lm::{Model, atomic_file};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::compute::ComputeArguments;
use crate::kv::KvArguments;
use crate::{numbers, output, source};

/// The longest line that is read.
const MAX_LINE_BYTES: u64 = 64 << 20;

/// Continue many prompts at once.
///
/// Each line of the input is a JSON object with "prompt" and, if wanted, "max_tokens", "temperature", "top_k", "top_p",
/// "min_p", "repeat_penalty", "seed", "stop" (a string or several) and "id" (anything). Each becomes a line of the
/// output, in the order of the input: "index", "id", "text", "tokens", "prompt_tokens" and "stop", or "index", "id" and
/// "error". A text is the one that `foveal generate` makes of the same prompt and options.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// The file of prompts, one JSON object a line; "-" reads standard input.
    input: PathBuf,

    /// Where results go; standard output if left out. A file appears when all is done.
    output: Option<PathBuf>,

    /// A GGUF file, or a folder with config.json, safetensors and tokenizer.json; the built-in model if left out.
    #[arg(long, short, value_name = "FILE|DIR")]
    model: Option<PathBuf>,

    /// How many texts go on together, at most.
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = parallel)]
    parallel: usize,

    /// Keep keys and values of at most N tokens at once; a text waits until there is room for all that it may become. As many
    /// as the model's context has for each of the texts if left out.
    #[arg(long, value_name = "N", value_parser = numbers::tokens)]
    pool: Option<usize>,

    /// The most tokens to make for a prompt that doesn't say.
    #[arg(long, short = 'n', value_name = "N", default_value_t = 128)]
    max_tokens: usize,

    #[command(flatten)]
    compute: ComputeArguments,

    #[command(flatten)]
    kv: KvArguments,
}

fn parallel(text: &str) -> Result<usize, String> {
    let number = text.parse().ok().filter(|number| (1..=MAX_TEXTS).contains(number));
    number.ok_or_else(|| format!("expected 1 to {MAX_TEXTS}"))
}

/// A line of the input.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    prompt: String,
    #[serde(default)]
    id: Value,
    max_tokens: Option<usize>,
    temperature: Option<f32>,
    top_k: Option<usize>,
    top_p: Option<f32>,
    min_p: Option<f32>,
    repeat_penalty: Option<f32>,
    seed: Option<u64>,
    #[serde(default)]
    stop: Stop,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Stop {
    One(String),
    Several(Vec<String>),
}

impl Default for Stop {
    fn default() -> Stop {
        Stop::Several(vec![])
    }
}

impl Line {
    fn options(&self, max_tokens: usize) -> Options {
        let usual = Sampling::default();
        let sampling = Sampling {
            temperature: self.temperature.unwrap_or(usual.temperature),
            top_k: self.top_k.unwrap_or(usual.top_k),
            top_p: self.top_p.unwrap_or(usual.top_p),
            min_p: self.min_p.unwrap_or(usual.min_p),
            repeat_penalty: self.repeat_penalty.unwrap_or(usual.repeat_penalty),
            seed: self.seed.unwrap_or(usual.seed),
            ..usual
        };
        let stop = match &self.stop {
            Stop::One(stop) => vec![stop.clone()],
            Stop::Several(stops) => stops.clone(),
        };
        let max_tokens = self.max_tokens.unwrap_or(max_tokens);
        Options { max_tokens, stop, sampling, logprobs: None }
    }
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<()> {
    arguments.compute.install(|| batch(arguments))
}

fn batch(arguments: &Arguments) -> anyhow::Result<()> {
    let path = arguments.model.as_deref();
    let input = open(&arguments.input)?;
    let weights = source::open(path)?;
    let model =
        Model::new(&weights).with_context(|| format!("cannot run {}", source::name(path)))?;
    let model = arguments.compute.apply(model);
    let tokenizer = source::tokenizer(path, &weights)?;
    let &Arguments { parallel, pool, .. } = arguments;
    let options = BatchOptions { parallel, pool, cache: arguments.kv.options()? };
    let batcher = Batcher::new(&model, &tokenizer, &options)?;
    let mut job = Job {
        batcher,
        tokenizer: &tokenizer,
        max_tokens: arguments.max_tokens,
        lines: 0,
        known: BTreeMap::new(),
        done: BTreeMap::new(),
        written: 0,
        figures: Figures::default(),
    };
    let start = Instant::now();
    match &arguments.output {
        None => job.run(input, &mut io::stdout().lock())?,
        Some(path) => {
            // The cause goes past `atomic_file`, whose errors are those of the system.
            let mut failed = None;
            let written = atomic_file::write(path, |out| {
                job.run(input, out).map_err(|error| {
                    failed = Some(error);
                    io::Error::other("not finished")
                })
            });
            if let Some(error) = failed {
                return Err(error);
            }
            written.with_context(|| format!("cannot write {}", path.display()))?;
        }
    }
    job.figures.shared = job.batcher.shared();
    output::note(&job.figures.summary(job.lines, start.elapsed().as_secs_f64()));
    Ok(())
}

fn open(path: &Path) -> anyhow::Result<Box<dyn BufRead>> {
    if path == Path::new("-") {
        return Ok(Box::new(io::stdin().lock()));
    }
    let file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(Box::new(BufReader::new(file)))
}

/// The lines between input and output.
struct Job<'a> {
    batcher: Batcher<'a>,
    tokenizer: &'a Tokenizer,
    max_tokens: usize,
    /// Lines read; the number of the next.
    lines: usize,
    /// The line, id and tokens of the prompt of each request that is on its way.
    known: BTreeMap<usize, (usize, Value, usize)>,
    /// Results that wait for those of earlier lines.
    done: BTreeMap<usize, Value>,
    written: usize,
    figures: Figures,
}

impl Job<'_> {
    /// Reads no further ahead than keeps the batch full.
    fn run(&mut self, mut input: impl BufRead, out: &mut impl Write) -> anyhow::Result<()> {
        let mut more = true;
        while more || !self.batcher.is_idle() {
            while more && self.batcher.waiting() < MAX_TEXTS && self.done.len() < 1 << 12 {
                more = self.take_line(&mut input)?;
            }
            for finished in self.batcher.step()? {
                let Some((line, id, prompt)) = self.known.remove(&finished.id) else { continue };
                let result = match finished.text {
                    Ok(text) => Ok((text, prompt)),
                    Err(error) => Err(output::sentence(&error.into())),
                };
                self.finish(line, id, result);
            }
            while let Some(result) = self.done.remove(&self.written) {
                writeln!(out, "{result}")?;
                self.written += 1;
            }
            out.flush()?;
        }
        Ok(())
    }

    /// Queues the next line; whether there was one.
    fn take_line(&mut self, input: &mut impl BufRead) -> anyhow::Result<bool> {
        let mut bytes = vec![];
        let mut limited = input.take(MAX_LINE_BYTES + 1);
        limited.read_until(b'\n', &mut bytes).context("cannot read the prompts")?;
        if bytes.is_empty() {
            return Ok(false);
        }
        let line = self.lines + 1;
        anyhow::ensure!(bytes.len() as u64 <= MAX_LINE_BYTES, "line {line} is longer than 64 MiB");
        if bytes.trim_ascii().is_empty() {
            return Ok(true);
        }
        self.lines += 1;
        let index = self.lines - 1;
        match self.request(&bytes) {
            Ok((request, id)) => {
                let prompt = request.prompt.len();
                let number = self.batcher.push(request);
                self.known.insert(number, (index, id, prompt));
            }
            Err((id, error)) => self.finish(index, id, Err(error)),
        }
        Ok(true)
    }

    fn request(&self, bytes: &[u8]) -> Result<(Request, Value), (Value, String)> {
        let line: Line =
            serde_json::from_slice(bytes).map_err(|error| (Value::Null, error.to_string()))?;
        let options = line.options(self.max_tokens);
        match prompt_tokens(self.tokenizer, &line.prompt) {
            Ok(prompt) => Ok((Request { prompt, options }, line.id)),
            Err(error) => Err((line.id, output::sentence(&error.into()))),
        }
    }

    fn finish(&mut self, index: usize, id: Value, result: Result<(Text, usize), String>) {
        let mut line = match result {
            Ok((text, prompt_tokens)) => {
                self.figures.prompt_tokens += prompt_tokens;
                self.figures.tokens += text.tokens.len();
                json!({
                    "index": index,
                    "text": text.text,
                    "tokens": text.tokens.len(),
                    "prompt_tokens": prompt_tokens,
                    "stop": text.stopped.name(),
                })
            }
            Err(error) => {
                self.figures.errors += 1;
                json!({"index": index, "error": error})
            }
        };
        if !id.is_null() {
            line["id"] = id;
        }
        self.done.insert(index, line);
    }
}

/// What a run took.
#[derive(Debug, Default)]
struct Figures {
    prompt_tokens: usize,
    /// Tokens of prompts that an earlier one began with.
    shared: usize,
    tokens: usize,
    errors: usize,
}

impl Figures {
    fn summary(&self, lines: usize, seconds: f64) -> String {
        let Figures { prompt_tokens, shared, tokens, errors } = self;
        let rate = if seconds > 0.0 { *tokens as f64 / seconds } else { 0.0 };
        format!(
            "{lines} prompts of {prompt_tokens} tokens ({shared} shared), {errors} with errors; {tokens} tokens generated in {seconds:.1} s, \
             {rate:.1} tok/s with the prompts read"
        )
    }
}
