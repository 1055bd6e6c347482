//! PyTorch's attention, by a worker process that answers one line for each line.
//!
//! The protocol is described in `peers/torch_sdpa.py`.

use crate::case::{AttentionCase, Phase};
use crate::contender::Contender;
use crate::data::SEED;
use anyhow::{Context, bail, ensure};
use serde_json::{Value, json};
use std::cell::RefCell;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::rc::Rc;

/// A running worker.
pub(crate) struct Torch {
    child: Child,
    requests: ChildStdin,
    answers: BufReader<ChildStdout>,
    /// Version and instructions, in words.
    pub(crate) description: String,
}

impl Torch {
    /// Starts the worker in the environment that `peers/setup.sh torch` made.
    pub(crate) fn start(peers: &Path) -> anyhow::Result<Torch> {
        let python = interpreter(peers)?;
        let mut child = Command::new(&python)
            .arg(peers.join("torch_sdpa.py"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {}", python.display()))?;
        let requests = child.stdin.take().context("the worker has no input")?;
        let answers = BufReader::new(child.stdout.take().context("the worker has no output")?);
        let mut torch = Torch { child, requests, answers, description: String::new() };
        let hello = torch.answer()?;
        ensure!(hello["protocol"] == 1, "the worker speaks another protocol: {hello}");
        torch.description = format!(
            "torch {} ({})",
            hello["torch"].as_str().unwrap_or("?"),
            hello["capability"].as_str().unwrap_or("?")
        );
        Ok(torch)
    }

    fn ask(&mut self, request: &Value) -> anyhow::Result<Value> {
        writeln!(self.requests, "{request}").context("the torch worker has gone")?;
        self.answer()
    }

    fn answer(&mut self) -> anyhow::Result<Value> {
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        ensure!(!line.is_empty(), "the torch worker has gone; run peers/setup.sh torch");
        let answer: Value = serde_json::from_str(&line).context("the torch worker's answer")?;
        if answer["ok"] != true {
            bail!("torch: {}", answer["error"].as_str().unwrap_or("an error without a word"));
        }
        Ok(answer)
    }
}

impl Drop for Torch {
    fn drop(&mut self) {
        let quit = self.ask(&json!({ "cmd": "quit" }));
        debug_assert!(quit.is_err(), "a worker that quits gives no answer");
        let _ = self.child.wait();
    }
}

fn interpreter(peers: &Path) -> anyhow::Result<PathBuf> {
    let folder = script_variable(peers, "TORCH_DIR")?;
    let python = folder.join("bin/python");
    ensure!(python.exists(), "PyTorch is not installed; run bench/peers/setup.sh torch");
    Ok(python)
}

/// A variable that `peers/versions.sh` sets.
pub(crate) fn script_variable(peers: &Path, name: &str) -> anyhow::Result<PathBuf> {
    let script = format!("source \"$0\" && printf %s \"${name}\"");
    let versions = peers.join("versions.sh");
    let output = Command::new("bash").args(["-euc", &script]).arg(&versions).output()?;
    ensure!(output.status.success(), "cannot read {}", versions.display());
    Ok(PathBuf::from(String::from_utf8(output.stdout)?))
}

/// A case that the worker holds.
pub(crate) struct TorchCase {
    torch: Rc<RefCell<Torch>>,
    note: String,
}

impl TorchCase {
    /// Has the worker build the case.
    pub(crate) fn new(torch: &Rc<RefCell<Torch>>, case: &AttentionCase) -> anyhow::Result<Self> {
        let answer = torch.borrow_mut().ask(&json!({
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
            // "decode" only checks lengths, and has a lower limit for them.
            "op": "forward",
            "seed": SEED,
            "layout": if case.phase == Phase::Decode { "bhtd" } else { "bthd" },
            "copies": case.copies,
        }))?;
        let mask = if answer["explicit_mask"] == true { ", explicit mask" } else { "" };
        let note = format!("{}{mask}", answer["backend"].as_str().unwrap_or("?"));
        Ok(TorchCase { torch: torch.clone(), note })
    }

    /// Its output, `[batch, seq, heads, dim]`.
    pub(crate) fn output(&self) -> anyhow::Result<Vec<f32>> {
        let path = std::env::temp_dir().join(format!("foveal-bench-{}.f32", std::process::id()));
        let request = json!({ "cmd": "dump", "path": path.to_string_lossy() });
        let asked = self.torch.borrow_mut().ask(&request);
        let bytes = std::fs::read(&path);
        let _ = std::fs::remove_file(&path);
        asked?;
        let bytes = bytes.context("torch's output")?;
        Ok(bytes.as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b)).collect())
    }
}

impl Contender for TorchCase {
    fn name(&self) -> &str {
        "torch"
    }

    fn note(&self) -> String {
        self.note.clone()
    }

    fn time(&mut self, iterations: usize) -> anyhow::Result<f64> {
        let request = json!({ "cmd": "run", "iterations": iterations });
        let answer = self.torch.borrow_mut().ask(&request)?;
        answer["seconds"].as_f64().context("the torch worker gave no time")
    }
}
