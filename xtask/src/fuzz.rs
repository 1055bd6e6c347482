//! `cargo xtask fuzz`: libFuzzer on every target, through cargo-fuzz, without a sanitizer.

use crate::run::{self, cargo};
use anyhow::{Result, bail};
use std::fs;

/// Every target of `fuzz/fuzz_targets`.
const TARGETS: &[&str] = &["attention", "cache", "gguf", "safetensors", "tokenizer"];
const RUNS: &str = "1000000";

pub(crate) fn run(arguments: &[String]) -> Result<()> {
    let (mut targets, mut limits) = (Vec::new(), Vec::new());
    let mut arguments = arguments.iter();
    while let Some(argument) = arguments.next() {
        let value = |next: Option<&String>| match next.map(|n| n.parse::<u64>()) {
            Some(Ok(n)) => Ok(n),
            _ => bail!("{argument} needs a whole number"),
        };
        match argument.as_str() {
            "--runs" => limits.push(format!("-runs={}", value(arguments.next())?)),
            "--time" => limits.push(format!("-max_total_time={}", value(arguments.next())?)),
            target if TARGETS.contains(&target) => targets.push(target),
            other => bail!("there is no target {other:?}; there are {}", TARGETS.join(", ")),
        }
    }
    if limits.is_empty() {
        limits.push(format!("-runs={RUNS}"));
    }
    if targets.is_empty() {
        targets = TARGETS.to_vec();
    }
    if !run::has("fuzz") {
        run::run(&mut cargo(&["install", "--locked", "cargo-fuzz"]))?;
    }
    for target in targets {
        let (corpus, seeds) =
            (format!("fuzz/corpus/{target}"), format!("fuzz/corpus-seeds/{target}"));
        fs::create_dir_all(run::root().join(&corpus))?;
        // libFuzzer's closing lines name executions, `cov:` and `ft:`.
        run::run(
            cargo(&["fuzz", "run", "--sanitizer", "none", "--release", target, &corpus, &seeds])
                .args(["--", "-print_final_stats=1"])
                .args(&limits),
        )?;
    }
    Ok(())
}
