//! `cargo xtask bench`: the benchmark runner with the peers that are built into it, and the command that
//! it compares with other programs.

use crate::run::{self, cargo};
use anyhow::Result;

pub(crate) fn run(arguments: &[String]) -> Result<()> {
    run::run(&mut cargo(&["build", "--release", "-p", "foveal-cli"]))?;
    let runner = ["run", "--release", "-p", "foveal-bench", "--features", "unfused", "--"];
    run::run(cargo(&runner).args(arguments))
}
