//! `cargo xtask ci`: the stages of `.ci/run`, which is the one list of them.

use crate::run;
use anyhow::{Result, bail};
use std::process::Command;

pub(crate) fn run(arguments: &[String]) -> Result<()> {
    if let [first, ..] = arguments {
        bail!("ci takes no arguments, got {first:?}");
    }
    run::run(Command::new("bash").arg(".ci/run").current_dir(run::root()))
}
