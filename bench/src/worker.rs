//! A peer in a process of its own, which answers one line of JSON for each line.
//!
//! The protocol is described in `peers/protocol.py`.

use crate::case::{AttentionCase, Phase};
use crate::contender::{Contender, Turn};
use crate::data::SEED;
use anyhow::{Context, bail, ensure};
use serde_json::{Value, json};
use std::cell::RefCell;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::rc::Rc;

/// A running worker.
pub(crate) struct Worker {
    name: &'static str,
    child: Child,
    requests: ChildStdin,
    answers: BufReader<ChildStdout>,
    /// Version and instructions, in words.
    pub(crate) description: String,
}

impl Worker {
    /// Starts a worker and waits for its greeting.
    ///
    /// # Errors
    /// If it can't be started or speaks another protocol.
    pub(crate) fn start(name: &'static str, mut command: Command) -> anyhow::Result<Worker> {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {name}"))?;
        let requests = child.stdin.take().context("the worker has no input")?;
        let answers = BufReader::new(child.stdout.take().context("the worker has no output")?);
        let mut worker = Worker { name, child, requests, answers, description: String::new() };
        let hello = worker.answer()?;
        ensure!(hello["protocol"] == 2, "{name} speaks another protocol: {hello}");
        worker.description = hello["peer"].as_str().unwrap_or("?").to_owned();
        Ok(worker)
    }

    /// Whether the process is still there.
    pub(crate) fn runs(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    fn ask(&mut self, request: &Value) -> anyhow::Result<Value> {
        let gone = || format!("{} has gone", self.name);
        writeln!(self.requests, "{request}").with_context(gone)?;
        self.answer()
    }

    fn answer(&mut self) -> anyhow::Result<Value> {
        let name = self.name;
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        ensure!(!line.is_empty(), "{name} has gone");
        let answer: Value =
            serde_json::from_str(&line).with_context(|| format!("the answer of {name}"))?;
        if answer["ok"] != true {
            bail!("{}", answer["error"].as_str().unwrap_or("an error without a word"));
        }
        Ok(answer)
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // It answers by going, or has gone.
        let _ = self.ask(&json!({ "cmd": "quit" }));
        let _ = self.child.wait();
    }
}

/// A case that a worker holds.
pub(crate) struct WorkerCase {
    worker: Rc<RefCell<Worker>>,
    note: String,
}

impl WorkerCase {
    /// Has the worker build the case.
    ///
    /// # Errors
    /// If it refuses the case.
    pub(crate) fn new(worker: Rc<RefCell<Worker>>, case: &AttentionCase) -> anyhow::Result<Self> {
        let backward = case.phase == Phase::Backward;
        let answer = worker.borrow_mut().ask(&json!({
            "cmd": "case",
            "batch": case.batch,
            "seq_q": case.seq_q,
            "seq_k": case.seq_k,
            "q_heads": case.heads,
            "kv_heads": case.kv_heads,
            "head_dim": case.dim,
            "mask": case.mask,
            "dtype": case.dtype,
            "threads": case.threads,
            "op": if backward { "backward" } else { "forward" },
            "seed": SEED,
            "layout": if case.phase == Phase::Decode { "bhtd" } else { "bthd" },
            "copies": case.copies,
        }))?;
        let note = answer["note"].as_str().unwrap_or("?").to_owned();
        Ok(WorkerCase { worker, note })
    }

    /// Its result, `[batch, seq, heads, dim]`; of gradients those of queries, keys and values.
    ///
    /// # Errors
    /// If the worker or its file has gone.
    pub(crate) fn output(&self) -> anyhow::Result<Vec<f32>> {
        let path = std::env::temp_dir().join(format!("foveal-bench-{}.f32", std::process::id()));
        let request = json!({ "cmd": "dump", "path": path.to_string_lossy() });
        let asked = self.worker.borrow_mut().ask(&request);
        let bytes = std::fs::read(&path);
        let _ = std::fs::remove_file(&path);
        asked?;
        let bytes = bytes.context("the peer's output")?;
        Ok(bytes.as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b)).collect())
    }
}

impl Contender for WorkerCase {
    fn name(&self) -> &'static str {
        self.worker.borrow().name
    }

    fn note(&self) -> String {
        self.note.clone()
    }

    fn time(&mut self, turn: Turn) -> anyhow::Result<f64> {
        let request = json!({ "cmd": "run", "iterations": turn.iterations, "lead": turn.lead });
        let answer = self.worker.borrow_mut().ask(&request)?;
        answer["seconds"].as_f64().context("the worker gave no time")
    }
}
