//! `cargo xtask python`: builds the wheel, installs it into a fresh environment, and tests what was installed there.

use crate::run;
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What builds and tests the wheel.
const TOOLS: &[&str] = &["maturin>=1.14,<2", "numpy>=2.1", "pytest"];
/// The tests that need PyTorch.
const TORCH_TESTS: &str = "crates/foveal-python/tests/torch";
const TESTS: &str = "crates/foveal-python/tests";

pub(crate) fn run(arguments: &[String]) -> Result<()> {
    if let [first, ..] = arguments {
        bail!("python takes no arguments, got {first:?}");
    }
    let Some(python) = python() else {
        skip("the wheel", "there is no Python 3.10 or newer with venv ($PYTHON names one)");
        return Ok(());
    };
    let folder = folder()?;
    let Some(environment) = environment(&python, &folder.join("environment"), None)? else {
        skip("the wheel", "pip cannot install maturin, NumPy and pytest");
        return Ok(());
    };
    let wheel = wheel(&environment, &folder)?;
    install(&environment, &wheel)?;
    pytest(&environment, &[TESTS, "--ignore", TORCH_TESTS])?;
    run::run(Command::new(environment.join("bin/foveal")).arg("list"))
}

/// The tests that need PyTorch, in an environment that finds it where an interpreter has it.
pub(crate) fn torch() -> Result<()> {
    let Some(python) = with_torch() else {
        bail!(
            "no Python has PyTorch; bench/peers/setup.sh torch installs it, or $FOVEAL_PYTHON names one"
        );
    };
    let packages = packages(&python)?;
    let folder = folder()?;
    let place = folder.join("torch");
    let Some(environment) = environment(&python, &place, Some(&packages))? else {
        bail!("pip cannot install maturin, NumPy and pytest");
    };
    let wheel = wheel(&environment, &folder)?;
    install(&environment, &wheel)?;
    pytest(&environment, &[TORCH_TESTS])
}

/// Whether the tests with PyTorch are asked for.
pub(crate) fn torch_is_wanted() -> bool {
    std::env::var_os("FOVEAL_TORCH").is_some_and(|value| value == "1")
}

/// Says that they were not asked for.
pub(crate) fn say_skipped() {
    skip("the wheel with PyTorch and Transformers", "FOVEAL_TORCH=1 or --torch asks for it");
}

fn skip(what: &str, why: &str) {
    println!("\nSKIPPED, NOT TESTED: {what}; {why}\n");
}

/// `target/python`, made.
fn folder() -> Result<PathBuf> {
    let target = std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| run::root().join("target"), PathBuf::from);
    let folder = run::root().join(target).join("python");
    fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    Ok(folder)
}

/// An interpreter that can make environments.
fn python() -> Option<PathBuf> {
    let named = std::env::var_os("PYTHON").map(PathBuf::from);
    let mut names = named.into_iter().chain(["python3", "python"].map(PathBuf::from));
    let check = "import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))";
    names.find(|name| run::works(Command::new(name).args(["-c", check])))
}

/// An interpreter that has PyTorch: the one that is named, the peers', or the first there is.
fn with_torch() -> Option<PathBuf> {
    let named = std::env::var_os("FOVEAL_PYTHON").map(PathBuf::from);
    let cache = std::env::var_os("FOVEAL_CACHE").map(PathBuf::from).or_else(|| {
        let home = std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache"));
        let base = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).or(home)?;
        Some(base.join("foveal"))
    });
    let peers =
        cache.and_then(|cache| fs::read_dir(cache.join("peers")).ok()).into_iter().flatten();
    let peers = peers.flatten().map(|entry| entry.path()).filter(|path| {
        path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("torch-"))
    });
    let mut names =
        named.into_iter().chain(peers.map(|path| path.join("bin/python"))).chain(python());
    let check = "import importlib.util, sys; sys.exit(importlib.util.find_spec('torch') is None)";
    names.find(|name| run::works(Command::new(name).args(["-c", check])))
}

/// Where an interpreter's packages are.
fn packages(python: &Path) -> Result<String> {
    let output = Command::new(python)
        .args(["-c", "import sysconfig; print(sysconfig.get_path('purelib'))"])
        .output()?;
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

/// A fresh environment with the tools, which also finds the packages of another folder; `None` if they can't be had.
fn environment(python: &Path, place: &Path, packages: Option<&str>) -> Result<Option<PathBuf>> {
    if place.exists() {
        fs::remove_dir_all(place)?;
    }
    run::run(Command::new(python).args(["-m", "venv"]).arg(place))?;
    if let Some(packages) = packages {
        let own = packages_of(place)?;
        fs::write(own.join("others.pth"), format!("{packages}\n"))?;
    }
    let mut install = pip(place);
    install.args(["install", "--quiet", "--disable-pip-version-check"]).args(TOOLS);
    Ok(run::run(&mut install).is_ok().then(|| place.to_owned()))
}

fn packages_of(environment: &Path) -> Result<PathBuf> {
    Ok(PathBuf::from(packages(&environment.join("bin/python"))?))
}

fn pip(environment: &Path) -> Command {
    let mut command = Command::new(environment.join("bin/python"));
    command.args(["-m", "pip"]);
    command
}

/// Builds the wheel; its file.
fn wheel(environment: &Path, folder: &Path) -> Result<PathBuf> {
    let wheels = folder.join("wheels");
    if wheels.exists() {
        fs::remove_dir_all(&wheels)?;
    }
    let mut build = Command::new(environment.join("bin/maturin"));
    build
        .args(["build", "--release", "--quiet", "--interpreter"])
        .arg(environment.join("bin/python"));
    build.arg("--out").arg(&wheels).current_dir(run::root());
    run::run(&mut build)?;
    let mut files = fs::read_dir(&wheels)?.flatten().map(|entry| entry.path());
    files
        .find(|file| file.extension().is_some_and(|end| end == "whl"))
        .context("maturin made no wheel")
}

fn install(environment: &Path, wheel: &Path) -> Result<()> {
    let mut install = pip(environment);
    install.args(["install", "--quiet", "--disable-pip-version-check", "--no-deps"]);
    run::run(install.arg("--force-reinstall").arg(wheel))
}

/// Tests what is installed, not what lies in the source folder.
fn pytest(environment: &Path, arguments: &[&str]) -> Result<()> {
    let mut tests = Command::new(environment.join("bin/python"));
    tests.args(["-m", "pytest"]).args(arguments).current_dir(run::root());
    run::run(&mut tests)
}
