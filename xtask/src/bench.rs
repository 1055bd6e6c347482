//! `cargo xtask bench`: the benchmark runner, built as everything else is.

use crate::run::{self, cargo};
use anyhow::Result;

pub(crate) fn run(arguments: &[String]) -> Result<()> {
    run::run(cargo(&["run", "--release", "-p", "foveal-bench", "--"]).args(arguments))
}
