//! Whole models: `foveal generate` against llama.cpp's `llama-bench`, a process a turn.
//!
//! A turn of either side takes a prompt and generates tokens, once; both report the seconds of each part
//! themselves, without loading. Prefill and decoding become two results of one case.

use crate::case::ModelCase;
use crate::contender::Samples;
use crate::peer::{Peer, Peers};
use anyhow::{Context, bail, ensure};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The parts of a case.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    /// Seconds for a token of the prompt.
    Prefill,
    /// Seconds for a generated token.
    Decode,
}

impl Part {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Part::Prefill => "prefill",
            Part::Decode => "decode",
        }
    }
}

/// Seconds for a token: of the prompt, and generated.
#[derive(Debug, Clone, Copy)]
struct Speeds {
    prefill: f64,
    decode: f64,
}

/// Lets the sides take turns and returns both parts' samples, ours first.
///
/// # Errors
/// If either side cannot run; nothing has to be built for `foveal` to be missing.
pub(crate) fn compete(
    case: &ModelCase,
    peers: &Peers,
    rounds: usize,
) -> anyhow::Result<Vec<(Part, Vec<Samples>)>> {
    let model = model_file(case)?;
    let program = program()?;
    let bench = peers.folder.join("llama_bench.sh");
    let mut ours = Vec::new();
    let mut theirs: [Vec<Speeds>; 2] = Default::default();
    for _ in 0..rounds {
        ours.push(generate(&program, &model, case)?);
        if peers.has(Peer::Llama) {
            let flash = llama(&bench, &model, case)?;
            theirs.iter_mut().zip(flash).for_each(|(all, speeds)| all.push(speeds));
        }
    }
    let [plain, flash] = &theirs;
    let sides = [("foveal", &ours), ("llama.cpp", plain), ("llama.cpp -fa", flash)];
    let part = |part: Part| {
        let present = sides.iter().filter(|(_, speeds)| !speeds.is_empty());
        (part, present.map(|(name, speeds)| samples(name, speeds, part)).collect())
    };
    Ok(vec![part(Part::Prefill), part(Part::Decode)])
}

fn samples(name: &str, speeds: &[Speeds], part: Part) -> Samples {
    let seconds = speeds.iter().map(|speeds| match part {
        Part::Prefill => speeds.prefill,
        Part::Decode => speeds.decode,
    });
    let seconds = seconds.collect();
    Samples { name: name.to_owned(), note: "seconds a token".to_owned(), iterations: 1, seconds }
}

/// The model in the cache that tests fill.
fn model_file(case: &ModelCase) -> anyhow::Result<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).map(PathBuf::from);
    let cache = variable("FOVEAL_CACHE")
        .or_else(|| Some(variable("XDG_CACHE_HOME")?.join("foveal")))
        .or_else(|| Some(variable("HOME")?.join(".cache/foveal")));
    let file = cache.context("there is no home folder")?.join(&case.sha256).join(&case.file);
    ensure!(file.exists(), "{} is not in the cache; run the tests of foveal-lm first", case.file);
    Ok(file)
}

/// The command, built beside this program.
fn program() -> anyhow::Result<PathBuf> {
    let own = std::env::current_exe()?;
    let program = own.with_file_name("foveal");
    ensure!(program.exists(), "the command is not built; run cargo build --release -p foveal-cli");
    Ok(program)
}

fn generate(program: &Path, model: &Path, case: &ModelCase) -> anyhow::Result<Speeds> {
    let mut command = Command::new(program);
    command
        .args(["generate", "--json", "--temperature", "0"])
        .args(["--threads", &case.threads.to_string()])
        .args(["--max-tokens", &case.generated_tokens.to_string()])
        .arg("--model")
        .arg(model)
        .arg("the ".repeat(case.prompt_tokens));
    let answer = answer(&mut command)?;
    let number = |name: &str| answer[name].as_f64().with_context(|| format!("no {name}"));
    let tokens = answer["tokens"].as_array().context("no tokens")?.len();
    ensure!(tokens > 1, "only {tokens} tokens were generated");
    // The first token comes from the prompt's logits.
    let steps = (tokens - 1) as f64;
    let prefill = number("prompt_seconds")? / number("prompt_tokens")?;
    Ok(Speeds { prefill, decode: number("generate_seconds")? / steps })
}

/// Without and with its flash attention.
fn llama(bench: &Path, model: &Path, case: &ModelCase) -> anyhow::Result<[Speeds; 2]> {
    let mut command = Command::new(bench);
    command
        .arg(model)
        .args(["-j", "-r", "1", "-t", &case.threads.to_string()])
        .args(["-p", &case.prompt_tokens.to_string()])
        .args(["-n", &case.generated_tokens.to_string()])
        .args(["-d", "0"]);
    let answer = answer(&mut command)?;
    let speed = |flash: bool, prompt: bool| {
        let fits = |row: &&Value| {
            let has = row["flash_attn"].as_bool().unwrap_or(row["flash_attn"] == 1);
            has == flash && (row["n_prompt"] != 0) == prompt
        };
        let row = answer.as_array().and_then(|rows| rows.iter().find(fits));
        let rate = row.and_then(|row| row["samples_ts"][0].as_f64());
        rate.map(|rate| 1.0 / rate).context("llama-bench gave no such row")
    };
    let speeds = |flash| -> anyhow::Result<Speeds> {
        Ok(Speeds { prefill: speed(flash, true)?, decode: speed(flash, false)? })
    };
    Ok([speeds(false)?, speeds(true)?])
}

fn answer(command: &mut Command) -> anyhow::Result<Value> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().with_context(|| format!("cannot start {program}"))?;
    if !output.status.success() {
        bail!("{program} failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    serde_json::from_slice(&output.stdout).with_context(|| format!("the answer of {program}"))
}
