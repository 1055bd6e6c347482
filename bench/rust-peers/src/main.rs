//! Attention of other Rust crates, as workers of the benchmark runner.
//!
//! ```text
//! foveal-rust-peers candle|burn-flex
//! ```
//!
//! One line of JSON on stdin, one on stdout: the protocol is described in `bench/peers/protocol.py`. The
//! number of threads is that of RAYON_NUM_THREADS, since neither crate changes it later.

#![forbid(unsafe_code)]

mod burn_flex;
mod candle;
mod case;

use anyhow::{Context, Result, bail};
use case::Case;
use serde_json::{Value, json};
use std::io::{BufRead, Write};
use std::time::{Duration, Instant};

/// Threads may spin for a while after their work and must not do so while the other side is timed.
const SETTLE: Duration = Duration::from_millis(20);
/// A first execution shorter than this is followed by a second one to warm up.
const SHORT: Duration = Duration::from_millis(100);

/// A case that is ready to run.
pub trait Prepared {
    /// Runs it once and gives the output, `[batch, seq, heads, dim]`.
    ///
    /// # Errors
    /// If the peer refuses it.
    fn execute(&mut self) -> Result<Vec<f32>>;

    /// Runs it several times and drops the outputs.
    ///
    /// # Errors
    /// If the peer refuses it.
    fn time(&mut self, executions: usize) -> Result<()>;

    /// What runs, in words.
    fn note(&self) -> &str;
}

type Prepare = fn(&Case) -> Result<Box<dyn Prepared>>;

struct Worker {
    prepare: Prepare,
    threads: usize,
    prepared: Option<Box<dyn Prepared>>,
    /// The output of the first execution.
    first: Vec<f32>,
}

impl Worker {
    fn answer(&mut self, line: &str) -> Result<Value> {
        let request: Value = serde_json::from_str(line).context("a request is JSON")?;
        match request["cmd"].as_str() {
            Some("case") => self.case(line),
            Some("run") => self.run(&request),
            Some("dump") => self.dump(&request),
            other => bail!("cmd is {other:?}; expected case, run, dump or quit"),
        }
    }

    fn case(&mut self, line: &str) -> Result<Value> {
        self.prepared = None;
        let case = Case::read(line)?;
        let mut prepared = (self.prepare)(&case)?;
        let start = Instant::now();
        self.first = prepared.execute()?;
        if start.elapsed() < SHORT {
            prepared.time(1)?;
        }
        self.threads = case.threads;
        let note = prepared.note().to_owned();
        self.prepared = Some(prepared);
        Ok(json!({ "ok": true, "note": note }))
    }

    fn run(&mut self, request: &Value) -> Result<Value> {
        let prepared = self.prepared.as_mut().context("no case is set; send a case first")?;
        let count = |name: &str| request[name].as_u64().unwrap_or(1) as usize;
        prepared.time(count("lead"))?;
        let start = Instant::now();
        prepared.time(count("iterations"))?;
        let seconds = start.elapsed().as_secs_f64();
        if self.threads > 1 {
            std::thread::sleep(SETTLE);
        }
        Ok(json!({ "ok": true, "seconds": seconds }))
    }

    fn dump(&self, request: &Value) -> Result<Value> {
        let path = request["path"].as_str().context("dump needs a path")?;
        let bytes: Vec<u8> = self.first.iter().flat_map(|x| x.to_le_bytes()).collect();
        std::fs::write(path, bytes)?;
        Ok(json!({ "ok": true, "elements": self.first.len() }))
    }
}

fn main() -> Result<()> {
    let name = std::env::args().nth(1);
    let (version, prepare): (&str, Prepare) = match name.as_deref() {
        Some("candle") => (candle::VERSION, candle::prepare),
        Some("burn-flex") => (burn_flex::VERSION, burn_flex::prepare),
        other => bail!("expected candle or burn-flex, got {other:?}"),
    };
    let mut worker = Worker { prepare, threads: 1, prepared: None, first: Vec::new() };
    let mut answers = std::io::stdout();
    writeln!(answers, "{}", json!({ "ok": true, "protocol": 2, "peer": version }))?;
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        if line.contains(r#""cmd":"quit""#) {
            break;
        }
        let answer = worker.answer(&line);
        let answer = answer.unwrap_or_else(|e| json!({ "ok": false, "error": format!("{e:#}") }));
        writeln!(answers, "{answer}")?;
        answers.flush()?;
    }
    Ok(())
}
