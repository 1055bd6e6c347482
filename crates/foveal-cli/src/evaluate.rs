//! `foveal eval`: how well a model predicts a text.

mod stream;

use std::path::PathBuf;
use std::time::Instant;

use foveal_lm::Model;
use foveal_lm::evaluate::{Bucket, by_position, token_nll};
use foveal_lm::tokenizer::{Encode, Tokenizer};
use serde_json::json;

use crate::documents::DocumentArguments;
use crate::kv::KvArguments;
use crate::memory::MemoryArguments;
use crate::progress::Progress;
use crate::session::{ModelArguments, Session};
use crate::{input, interrupt, numbers, output};

/// Bytes of text for each token that is asked for, and at least so many: the first tokens do not depend on what is
/// further away.
const BYTES_A_TOKEN: usize = 16;
const LEAST_BYTES: usize = 1 << 16;

/// Say how well a model predicts a text: perplexity, bits per byte, and the mean by position.
///
/// Each token is predicted from all before it, back to the model's context; the first is not. Memory does not grow with
/// the text, apart from the text itself.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// A file of UTF-8 text; "-" reads standard input.
    #[arg(long, value_name = "FILE")]
    text: PathBuf,

    /// Take the first N tokens of the text; all if left out.
    #[arg(long, value_name = "N", value_parser = numbers::tokens)]
    tokens: Option<usize>,

    /// Forget everything after each N tokens, so that the text is many short ones; never if left out.
    #[arg(long, value_name = "N", value_parser = numbers::tokens)]
    chunk: Option<usize>,

    /// Read the text piece by piece, however long it is: nothing is kept of it but what the model's layers keep.
    #[arg(long, conflicts_with = "chunk")]
    stream: bool,

    /// With --stream, keep what was read of the text in this file now and then, and go on from it: a run that was ended in the
    /// middle is taken up, to the bit.
    #[arg(long, value_name = "FILE", requires = "stream", conflicts_with = "documents")]
    state: Option<PathBuf>,

    /// With --state, after about so many tokens.
    #[arg(long, value_name = "N", default_value_t = 65_536, requires = "state", value_parser = numbers::tokens)]
    save_every: usize,

    /// Bytes of a piece.
    #[arg(long, default_value_t = 65_536, hide = true, requires = "stream")]
    piece: usize,

    #[command(flatten)]
    documents: DocumentArguments,

    #[command(flatten)]
    memory: MemoryArguments,

    #[command(flatten)]
    model: ModelArguments,

    #[command(flatten)]
    kv: KvArguments,

    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// What was measured.
#[derive(Debug)]
struct Figures {
    tokens: usize,
    /// Those of them that this run read.
    new: usize,
    bytes: usize,
    buckets: Vec<Bucket>,
    seconds: f64,
    kv_bytes: usize,
    /// Of entries in files.
    file_bytes: usize,
    /// Of all that was predicted of a stream, to the bit.
    digest: Option<u64>,
    documents: usize,
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let change = |config| arguments.memory.change(config);
    arguments.model.run_as(change, |session| evaluate(arguments, session))
}

fn evaluate(arguments: &Arguments, session: &Session) -> anyhow::Result<()> {
    let figures = match arguments.stream {
        true => stream::measure(arguments, session)?,
        false => whole(arguments, session)?,
    };
    if arguments.json {
        return Ok(output::print_json(&figures.as_json(&session.model))?);
    }
    Ok(output::print(&figures.table())?)
}

fn whole(arguments: &Arguments, session: &Session) -> anyhow::Result<Figures> {
    let text = input::read(&arguments.text, "the text")?;
    let tokens = first_tokens(&session.tokenizer, &text, arguments.tokens)?;
    anyhow::ensure!(
        tokens.len() >= 2,
        "the text has {} tokens, at least 2 are needed: each is predicted from those before it",
        tokens.len()
    );
    let chunk = arguments.chunk.unwrap_or(tokens.len());
    anyhow::ensure!(chunk >= 2, "--chunk is {chunk}, at least 2 are needed");
    arguments.kv.warn(&session.model, chunk.min(tokens.len()));
    measure(arguments, session, &tokens, chunk)
}

/// The first `limit` tokens of a text, without looking at all of it if it is long.
fn first_tokens(
    tokenizer: &Tokenizer,
    text: &str,
    limit: Option<usize>,
) -> anyhow::Result<Vec<u32>> {
    let Some(limit) = limit else { return Ok(tokenizer.encode(text, Encode::PROMPT)?) };
    let mut end = limit.saturating_mul(BYTES_A_TOKEN).max(LEAST_BYTES);
    loop {
        let part = &text[..text.floor_char_boundary(end)];
        let mut tokens = tokenizer.encode(part, Encode::PROMPT)?;
        if part.len() == text.len() || tokens.len() >= limit + limit / 4 + 256 {
            tokens.truncate(limit);
            return Ok(tokens);
        }
        end = end.saturating_mul(4);
    }
}

fn measure(
    arguments: &Arguments,
    session: &Session,
    tokens: &[u32],
    chunk: usize,
) -> anyhow::Result<Figures> {
    let mut state = arguments.kv.state(&session.model)?;
    arguments.memory.keep(&mut state, session)?;
    let mut progress = Progress::new("read", tokens.len());
    let (start, mut kv_bytes) = (Instant::now(), 0);
    let (mut buckets, mut predicted): (Vec<Bucket>, _) = (Vec::new(), Vec::new());
    for (n, part) in tokens.chunks(chunk).enumerate() {
        state.reset();
        let nll = token_nll(&session.model, part, &mut state, &mut |done| {
            progress.show(n * chunk + done);
            interrupt::flow()
        })?;
        kv_bytes = kv_bytes.max(state.kv_bytes());
        predicted.extend_from_slice(&part[1..]);
        for new in by_position(&nll, 1) {
            match buckets.iter_mut().find(|bucket| bucket.positions == new.positions) {
                Some(bucket) => bucket.add(&new),
                None => buckets.push(new),
            }
        }
    }
    let bytes = predicted.iter().filter_map(|&token| session.tokenizer.token_bytes(token));
    let bytes = bytes.map(<[u8]>::len).sum();
    let seconds = start.elapsed().as_secs_f64();
    let (tokens, file_bytes) = (tokens.len(), state.memory_file_bytes());
    let new = tokens;
    Ok(Figures {
        tokens,
        new,
        bytes,
        buckets,
        seconds,
        kv_bytes,
        file_bytes,
        digest: None,
        documents: 1,
    })
}

impl Figures {
    fn total(&self) -> Bucket {
        let positions = 0..self.tokens;
        let mut total = Bucket { positions, tokens: 0, nll: 0.0 };
        self.buckets.iter().for_each(|bucket| total.add(bucket));
        total
    }

    fn bits_per_byte(&self) -> f64 {
        self.total().nll / std::f64::consts::LN_2 / self.bytes as f64
    }

    fn table(&self) -> String {
        let total = self.total();
        let mut text = format!(
            "tokens            {} ({} predicted, {} bytes)\n\
             mean NLL          {:.4} nats a token\n\
             perplexity        {:.3}\n\
             bits per byte     {:.4}\n\
             speed             {:.1} tok/s\n\
             memory            {} of keys and values{}{}\n\n\
             {:>17} {:>8} {:>9} {:>11}\n",
            self.tokens,
            total.tokens,
            self.bytes,
            total.mean(),
            total.mean().exp(),
            self.bits_per_byte(),
            self.new as f64 / self.seconds,
            numbers::bytes(self.kv_bytes),
            match self.file_bytes {
                0 => String::new(),
                bytes => format!(", {} in files", numbers::bytes(bytes)),
            },
            numbers::resident_bytes().map_or_else(String::new, |bytes| {
                format!(", {} resident", numbers::bytes(bytes))
            }),
            "positions",
            "tokens",
            "mean NLL",
            "perplexity",
        );
        for bucket in &self.buckets {
            let positions = format!("{}..{}", bucket.positions.start, bucket.positions.end);
            let (tokens, mean) = (bucket.tokens, bucket.mean());
            text += &format!("{positions:>17} {tokens:>8} {mean:>9.4} {:>11.3}\n", mean.exp());
        }
        text
    }

    fn as_json(&self, model: &Model) -> serde_json::Value {
        let total = self.total();
        let buckets = self.buckets.iter().map(|bucket| {
            json!({
                "from": bucket.positions.start,
                "to": bucket.positions.end,
                "tokens": bucket.tokens,
                "mean_nll": bucket.mean(),
                "perplexity": bucket.mean().exp(),
            })
        });
        json!({
            "tokens": self.tokens,
            "documents": self.documents,
            "predicted": total.tokens,
            "bytes": self.bytes,
            "mean_nll": total.mean(),
            "perplexity": total.mean().exp(),
            "bits_per_byte": self.bits_per_byte(),
            "by_position": buckets.collect::<Vec<_>>(),
            "seconds": self.seconds,
            "tokens_per_second": self.new as f64 / self.seconds,
            "digest": self.digest.map(|digest| format!("{digest:016x}")),
            "kv_bytes": self.kv_bytes,
            "memory_file_bytes": self.file_bytes,
            "resident_bytes": numbers::resident_bytes(),
            "context": model.config().context,
        })
    }
}
