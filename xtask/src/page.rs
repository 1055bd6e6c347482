//! `cargo xtask page`: types and clicks of the server's page, where there are npm and Chromium.

use crate::run;
use anyhow::{Context, Result, bail};
use std::process::Command;

/// What the script ends with where npm can't be reached.
const NOT_CHECKED: i32 = 3;

pub(crate) fn run(arguments: &[String]) -> Result<()> {
    if let [first, ..] = arguments {
        bail!("page takes no arguments, got {first:?}");
    }
    let there = |name: &&str| run::works(Command::new(name).arg("--version"));
    let missing: Vec<&str> =
        ["npm", "node", "chromium", "curl"].into_iter().filter(|name| !there(name)).collect();
    if !missing.is_empty() {
        println!("*** no {}: the page is NOT checked ***", missing.join(", "));
        return Ok(());
    }
    let root = run::root();
    // The workspace's features, so that nothing is built twice.
    let build = ["build", "--release", "--workspace", "--bin", "foveal", "--example"];
    run::run(run::cargo(&build).arg("random_model"))?;
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or(root.join("target"), Into::into);
    let release = root.join(target).join("release");
    let (folder, scripts) = (release.join("page-check-model"), root.join("scripts/serve/page"));
    let mixers = std::fs::read_to_string(scripts.join("mixers.json"))?;
    run::run(Command::new(release.join("examples/random_model")).arg(&folder).arg(mixers))?;
    let mut check = Command::new("bash");
    check.arg(scripts.join("check.sh")).arg(release.join("foveal")).arg(&folder);
    let status = check.status().context("bash")?;
    match status.code() {
        Some(0 | NOT_CHECKED) => Ok(()),
        _ => bail!("the page does not do what it says: {status}"),
    }
}
