//! `cargo xtask rules`: what no lint checks.

use crate::run;
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::Path;
use std::process::Command;

/// Where intrinsics, target features and target checks may stand.
const INTRINSICS: &str = "crates/foveal/src/simd/";
/// Where `unsafe` may stand besides.
const UNSAFE: &[&str] = &[
    INTRINSICS,
    "crates/foveal/src/element.rs",
    "crates/foveal/src/tensor.rs",
    "crates/foveal/src/exact/",
    "crates/foveal/src/projection/project.rs",
    "crates/foveal-lm/src/weights/mapping.rs",
    "bench/src/product.rs",
];
const LONG: usize = 600;

pub(crate) fn run(arguments: &[String]) -> Result<()> {
    if !arguments.is_empty() {
        bail!("rules takes no arguments");
    }
    let mut broken = Vec::new();
    for file in sources()? {
        let text = fs::read_to_string(run::root().join(&file)).with_context(|| file.clone())?;
        check(&file, &text, &mut broken);
    }
    if broken.is_empty() {
        return Ok(());
    }
    bail!("rules are broken:\n{}", broken.join("\n"))
}

fn sources() -> Result<Vec<String>> {
    let listed = Command::new("git").args(["ls-files", "*.rs"]).current_dir(run::root()).output();
    let listed = listed.context("cannot list files with git")?;
    Ok(String::from_utf8(listed.stdout)?.lines().map(String::from).collect())
}

fn check(file: &str, text: &str, broken: &mut Vec<String>) {
    if file.starts_with("xtask/") || !Path::new(file).components().any(|c| c.as_os_str() == "src") {
        return;
    }
    let intrinsics = ["std::arch", "core::arch", "target_feature", "cfg(target_arch"];
    for word in intrinsics.iter().filter(|word| text.contains(**word)) {
        if !file.starts_with(INTRINSICS) {
            broken.push(format!("{file}: {word} belongs in {INTRINSICS}"));
        }
    }
    let blocks = text.matches("unsafe {").count();
    if blocks > 0 {
        println!("{blocks:4} unsafe blocks in {file}");
        if !UNSAFE.iter().any(|place| file.starts_with(place)) {
            broken.push(format!("{file}: unsafe is not allowed here"));
        }
    }
    let lines = text.lines().count();
    if lines > LONG {
        println!("{lines:4} lines in {file}: more than {LONG}");
    }
}
