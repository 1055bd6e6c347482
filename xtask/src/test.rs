//! `cargo xtask test`: every test there is, with cargo alone, or with nextest where that is installed.

use crate::c;
use crate::python;
use crate::run::{self, cargo};
use anyhow::{Result, bail};

pub(crate) fn run(arguments: &[String]) -> Result<()> {
    let (flags, filters): (Vec<_>, Vec<_>) =
        arguments.iter().cloned().partition(|argument| argument == "--torch");
    if !flags.is_empty() {
        return python::torch();
    }
    workspace(&filters)?;
    if !filters.is_empty() {
        return Ok(());
    }
    run::run(&mut cargo(&["test", "--release", "--workspace", "--doc"]))?;
    run::run(&mut cargo(&[
        "test",
        "--release",
        "-p",
        "foveal",
        "--no-default-features",
        "--tests",
    ]))?;
    for level in foveal::Level::available() {
        let mut command = cargo(&["test", "--release", "-p", "foveal", "--test", "dispatch"]);
        run::run(command.env("FOVEAL_SIMD", level.name()))?;
    }
    c::run()?;
    if python::torch_is_wanted() {
        return python::torch();
    }
    python::say_skipped();
    Ok(())
}

/// Unit and integration tests.
fn workspace(filters: &[String]) -> Result<()> {
    if run::has("nextest") {
        return run::run(cargo(&["nextest", "run", "--release", "--workspace"]).args(filters));
    }
    let mut command = cargo(&["test", "--release", "--workspace", "--lib", "--bins", "--tests"]);
    match filters {
        [] => {}
        [filter] => drop(command.arg(filter)),
        _ => bail!("cargo test takes one filter; install cargo-nextest for several"),
    }
    run::run(&mut command)
}
