//! `cargo xtask fuzz`: libFuzzer on the targets in `fuzz/`, with the stable compiler and without sanitizers.
//!
//! A target starts from `fuzz/corpus-seeds/TARGET`, which is committed, and from what earlier runs found, in
//! `fuzz/corpus/TARGET`. Inputs that fail are written to `fuzz/artifacts/TARGET`.

use crate::run::{self, cargo};
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const RUNS: u64 = 1_000_000;

/// What to run.
#[derive(Debug)]
struct Options {
    targets: Vec<String>,
    runs: u64,
    /// Seconds for each target, if there are fewer than it takes.
    seconds: Option<u64>,
}

/// What libFuzzer says at the end.
#[derive(Debug, Default, PartialEq, Eq)]
struct Figures {
    executions: u64,
    /// Edges of the control flow that were reached.
    edges: u64,
    /// Edges with how often they were passed, and other features that libFuzzer counts.
    features: u64,
    inputs: u64,
}

pub(crate) fn run(arguments: &[String]) -> Result<()> {
    let folder = run::root().join("fuzz");
    let options = options(arguments, &targets(&folder)?)?;
    if !run::has("fuzz") {
        run::run(&mut cargo(&["install", "cargo-fuzz", "--locked"]))?;
    }
    let mut lines = vec![];
    let mut failed = vec![];
    for target in &options.targets {
        let (figures, fine) = fuzz(&folder, target, &options)?;
        let Figures { executions, edges, features, inputs } = figures;
        lines.push(format!(
            "{target:<12} {executions:>9} executions, cov: {edges}, ft: {features}, {inputs} inputs kept"
        ));
        if !fine {
            failed.push(target.as_str());
        }
    }
    println!("\n{}", lines.join("\n"));
    if !failed.is_empty() {
        bail!("failing inputs of {} are in fuzz/artifacts", failed.join(", "));
    }
    Ok(())
}

/// Names of targets: none stand for all.
fn options(arguments: &[String], known: &[String]) -> Result<Options> {
    let mut options = Options { targets: vec![], runs: RUNS, seconds: None };
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        let mut number = || {
            let next = rest.next().with_context(|| format!("{argument} needs a number"))?;
            next.parse::<u64>().with_context(|| format!("{argument} {next}"))
        };
        if argument == "--runs" {
            options.runs = number()?;
        } else if argument == "--time" {
            options.seconds = Some(number()?);
        } else if known.contains(argument) {
            options.targets.push(argument.clone());
        } else {
            bail!("there is no target {argument:?}; there are {}", known.join(", "));
        }
    }
    if options.targets.is_empty() {
        options.targets = known.to_vec();
    }
    Ok(options)
}

/// The programs in `fuzz/fuzz_targets`, sorted.
fn targets(folder: &Path) -> Result<Vec<String>> {
    let programs = fs::read_dir(folder.join("fuzz_targets")).context("fuzz/fuzz_targets")?;
    let paths = programs.map(|entry| Ok(entry?.path())).collect::<Result<Vec<PathBuf>>>()?;
    let stems = paths.iter().filter_map(|path| path.file_stem());
    let mut names: Vec<String> = stems.map(|stem| stem.to_string_lossy().into_owned()).collect();
    names.sort();
    Ok(names)
}

/// Runs one target, with inputs no longer than its longest seed, and says whether it ended well.
fn fuzz(folder: &Path, target: &str, options: &Options) -> Result<(Figures, bool)> {
    let (found, seeds) =
        (folder.join("corpus").join(target), folder.join("corpus-seeds").join(target));
    fs::create_dir_all(&found).context("fuzz/corpus")?;
    let mut command = cargo(&["fuzz", "run", "--sanitizer", "none", target]);
    command.args([&found, &seeds]).arg("--").args([
        format!("-runs={}", options.runs),
        // Zero is no limit.
        format!("-max_total_time={}", options.seconds.unwrap_or(0)),
        "-timeout=10".to_owned(),
        "-rss_limit_mb=2048".to_owned(),
        "-print_final_stats=1".to_owned(),
    ]);
    println!("fuzzing {target}, {} executions", options.runs);
    let (log, fine) = logged(&mut command)?;
    Ok((figures(&log), fine))
}

/// Runs a command whose messages go to the terminal and are returned.
fn logged(command: &mut Command) -> Result<(String, bool)> {
    use std::io::{BufRead, BufReader};
    let mut child = command.stderr(Stdio::piped()).spawn().context("cannot start cargo fuzz")?;
    let mut log = String::new();
    for line in BufReader::new(child.stderr.take().context("a piped stream")?).split(b'\n') {
        let line = String::from_utf8_lossy(&line?).into_owned();
        eprintln!("{line}");
        log += &line;
        log.push('\n');
    }
    Ok((log, child.wait()?.success()))
}

fn figures(log: &str) -> Figures {
    let last = |key: &str| {
        let after = log.rsplit_once(key)?.1.trim_start();
        after.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
    };
    Figures {
        executions: last("stat::number_of_executed_units:").unwrap_or(0),
        edges: last(" cov: ").unwrap_or(0),
        features: last(" ft: ").unwrap_or(0),
        inputs: last(" corp: ").unwrap_or(0),
    }
}

#[cfg(test)]
mod tests {
    use super::{Figures, RUNS, figures, options};

    #[test]
    fn the_last_figures_of_a_log_count() {
        let log = "#2\tINITED cov: 1 ft: 2 corp: 3/4b exec/s: 0\n\
                   #9\tDONE   cov: 432 ft: 746 corp: 91/27Kb lim: 688 exec/s: 0\n\
                   stat::number_of_executed_units: 20000\n";
        let expected = Figures { executions: 20000, edges: 432, features: 746, inputs: 91 };
        assert_eq!(figures(log), expected);
        assert_eq!(figures("nothing"), Figures::default());
    }

    #[test]
    fn no_names_stand_for_all_targets() {
        let known = ["a".to_owned(), "b".to_owned()];
        let all = options(&[], &known).unwrap();
        assert_eq!((all.targets, all.runs), (known.to_vec(), RUNS));
        let some = options(&["b".to_owned(), "--runs".to_owned(), "5".to_owned()], &known).unwrap();
        assert_eq!((some.targets, some.runs), (vec!["b".to_owned()], 5));
        let timed = options(&["--time".to_owned(), "9".to_owned()], &known).unwrap();
        assert_eq!((timed.runs, timed.seconds), (RUNS, Some(9)));
        assert!(options(&["c".to_owned()], &known).is_err());
        assert!(options(&["--runs".to_owned()], &known).is_err());
    }
}
