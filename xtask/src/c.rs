//! The example in C: built with the system's compiler against both libraries of `foveal-c`, and run.

use crate::run::{self, cargo};
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const STRICT: &[&str] = &["-std=c99", "-O1", "-Wall", "-Wextra", "-Wpedantic", "-Werror"];
/// What the static library needs of the system.
const SYSTEM: &[&str] = &["-lpthread", "-ldl", "-lm"];

pub(crate) fn run() -> Result<()> {
    let compiler = std::env::var("CC").unwrap_or_else(|_| "cc".to_owned());
    if !run::works(Command::new(&compiler).arg("--version")) {
        println!(
            "\nSKIPPED, NOT TESTED: the C interface's example; there is no C compiler {compiler:?}\n"
        );
        return Ok(());
    }
    if cfg!(windows) {
        println!("\nSKIPPED, NOT TESTED: the C interface's example is built on Unix only\n");
        return Ok(());
    }
    let libraries = libraries()?;
    let folder = run::root().join("crates/foveal-c");
    for library in &libraries {
        let program = library.with_extension("example");
        let mut command = Command::new(&compiler);
        command.args(STRICT).arg("-I").arg(folder.join("include"));
        command.arg(folder.join("examples/attention.c")).arg(library);
        if let Some(beside) = library.parent().filter(|_| !is_static(library)) {
            command.arg(format!("-Wl,-rpath,{}", beside.display()));
        }
        run::run(command.arg("-o").arg(&program).args(SYSTEM))?;
        run::run(&mut Command::new(&program))?;
    }
    cpp(&compiler, &folder.join("include/foveal.h"))
}

/// The header is C++ too, where the compiler knows that.
fn cpp(compiler: &str, header: &Path) -> Result<()> {
    let check = |file: &Path| {
        let mut command = Command::new(compiler);
        command.args(["-x", "c++", "-std=c++11", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]);
        command.arg(file);
        command
    };
    if !run::works(&mut check(Path::new("/dev/null"))) {
        println!("\nSKIPPED, NOT TESTED: the header as C++; {compiler:?} has no C++\n");
        return Ok(());
    }
    run::run(&mut check(header))
}

/// Builds the static and the shared library and asks cargo where they are.
fn libraries() -> Result<Vec<PathBuf>> {
    let mut command = cargo(&[
        "build",
        "--release",
        "-p",
        "foveal-c",
        "--message-format",
        "json-render-diagnostics",
    ]);
    let output = command.stderr(Stdio::inherit()).output().context("cannot start cargo")?;
    if !output.status.success() {
        bail!("cargo build -p foveal-c failed ({})", output.status);
    }
    let mut libraries = vec![];
    for line in String::from_utf8(output.stdout)?.lines() {
        let message: Value = serde_json::from_str(line).context("a message of cargo")?;
        if message["target"]["name"] == "foveal_c" {
            let files = message["filenames"].as_array().into_iter().flatten();
            let files = files.filter_map(Value::as_str).map(PathBuf::from);
            libraries.extend(files.filter(|file| is_static(file) || is_shared(file)));
        }
    }
    if !libraries.iter().any(|file| is_static(file))
        || !libraries.iter().any(|file| is_shared(file))
    {
        bail!("cargo made no static and shared library of foveal-c, but {libraries:?}");
    }
    Ok(libraries)
}

fn is_static(file: &Path) -> bool {
    file.extension().is_some_and(|end| end == "a")
}

fn is_shared(file: &Path) -> bool {
    file.extension().is_some_and(|end| end == "so" || end == "dylib")
}
