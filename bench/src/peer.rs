//! PyTorch as a process that speaks the line protocol of `bench/peers/torch_sdpa.py`.

use crate::case::Case;
use anyhow::{Context, Result, bail};
use foveal::Phase;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

/// A running PyTorch, with one case loaded at a time.
#[derive(Debug)]
pub(crate) struct Torch {
    process: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
}

impl Torch {
    /// Starts the worker with the interpreter that `bench/peers/setup.sh torch` made.
    pub(crate) fn start() -> Result<Torch> {
        let here = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("peers");
        let setup = "run bench/peers/setup.sh torch first";
        let found = Command::new("bash")
            .args(["-c", "source \"$0/versions.sh\" && printf %s \"$TORCH_DIR/bin/python\""])
            .arg(&here)
            .output()
            .context(setup)?;
        let python = PathBuf::from(String::from_utf8(found.stdout)?);
        if !python.exists() {
            bail!("there is no PyTorch to compare with: {setup}");
        }
        let mut process = Command::new(python)
            .arg(here.join("torch_sdpa.py"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context(setup)?;
        let to = process.stdin.take().context("no pipe to PyTorch")?;
        let from = BufReader::new(process.stdout.take().context("no pipe from PyTorch")?);
        let mut torch = Torch { process, to, from };
        let hello = torch.answer()?;
        eprintln!("peer: torch {}", hello["torch"].as_str().unwrap_or("?"));
        Ok(torch)
    }

    /// Loads a case; returns its checksum and the size that differences are measured by.
    pub(crate) fn load(&mut self, case: &Case, threads: usize) -> Result<(f64, f64)> {
        let op = if case.phase() == Phase::Generated { "decode" } else { "forward" };
        let answer = self.ask(&json!({
            "cmd": "case", "batch": case.batch, "seq_q": case.queries, "seq_k": case.keys,
            "q_heads": case.heads, "kv_heads": case.kv_heads(), "head_dim": case.dim,
            "mask": case.mask, "dtype": "f32", "threads": threads, "op": op, "seed": crate::SEED,
        }))?;
        let number = |key: &str| answer[key].as_f64().with_context(|| format!("no {key}"));
        Ok((number("checksum")?, number("scale")?))
    }

    /// Seconds of one of `iterations` executions.
    pub(crate) fn run(&mut self, iterations: usize) -> Result<f64> {
        let answer = self.ask(&json!({ "cmd": "run", "iterations": iterations, "lead": 1 }))?;
        Ok(answer["seconds"].as_f64().context("no seconds")? / iterations as f64)
    }

    fn ask(&mut self, request: &Value) -> Result<Value> {
        writeln!(self.to, "{request}")?;
        self.to.flush()?;
        self.answer()
    }

    fn answer(&mut self) -> Result<Value> {
        let mut line = String::new();
        self.from.read_line(&mut line)?;
        let answer: Value = serde_json::from_str(&line).context("PyTorch's answer")?;
        if answer["ok"] != true {
            bail!("PyTorch: {}", answer["error"].as_str().unwrap_or(&line));
        }
        Ok(answer)
    }
}

impl Drop for Torch {
    fn drop(&mut self) {
        let _ = writeln!(self.to, "{}", json!({ "cmd": "quit" }));
        std::thread::sleep(Duration::from_millis(50));
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
