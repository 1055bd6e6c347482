//! The vocabularies of llama.cpp with their test vectors, from the source package of llama-cpp-python.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::models::{Scratch, cache_folder, hash_of, run, skipped};

const PACKAGE: &str = "llama-cpp-python==0.3.36";
const ARCHIVE: &str = "llama_cpp_python-0.3.36.tar.gz";
const SHA256: &str = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e";
const MODELS: &str = "llama_cpp_python-0.3.36/vendor/llama.cpp/models";

/// Before pip keeps a source package it asks the package's build back end for its metadata. This one answers in its
/// place, so that nothing of the package is run and no compiler is needed.
const BACK_END: &str = "\
import os

def get_requires_for_build_wheel(settings=None):
    return []

def prepare_metadata_for_build_wheel(folder, settings=None):
    name = 'llama_cpp_python-0.3.36.dist-info'
    os.mkdir(os.path.join(folder, name))
    with open(os.path.join(folder, name, 'METADATA'), 'w') as out:
        out.write('Metadata-Version: 2.1\\nName: llama-cpp-python\\nVersion: 0.3.36\\n')
    return name
";

/// The folder with `ggml-vocab-*.gguf`, `.gguf.inp` and `.gguf.out`, downloaded (70 MB) when the cache doesn't have it.
///
/// When that fails, writes a line with `SKIPPED` and the reason to standard error, past the capture of the test
/// harness, and returns `None`; the test should then return.
pub fn fetch_vocabularies() -> Option<PathBuf> {
    fetch().map_err(|reason| skipped("vocabularies of llama.cpp", &reason)).ok()
}

fn fetch() -> io::Result<PathBuf> {
    let folder = cache_folder()?.join(SHA256);
    let models = folder.join("models");
    if models.is_dir() {
        return Ok(models);
    }
    fs::create_dir_all(&folder)?;
    // One download at a time, among all test processes; released when closed.
    let lock = File::create(folder.join("lock"))?;
    lock.lock()?;
    if !models.is_dir() {
        let scratch = Scratch(folder.join("download"));
        let archive = download(&scratch.0)?;
        run(Command::new("python3").args(["-m", "tarfile", "-e"]).arg(&archive).arg(&scratch.0))?;
        fs::rename(scratch.0.join(MODELS), &models)?;
    }
    Ok(models)
}

fn download(scratch: &Path) -> io::Result<PathBuf> {
    let back_end = scratch.join("back_end").join("scikit_build_core");
    fs::create_dir_all(&back_end)?;
    fs::write(back_end.join("__init__.py"), "")?;
    fs::write(back_end.join("build.py"), BACK_END)?;
    let mut pip = Command::new("python3");
    pip.env("PYTHONPATH", scratch.join("back_end"));
    pip.args([
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--no-binary=:all:",
        "--no-build-isolation",
    ]);
    pip.args(["--disable-pip-version-check", "--retries=1", "--timeout=20", "--dest"]);
    run(pip.arg(scratch).arg(PACKAGE))?;
    let archive = scratch.join(ARCHIVE);
    let found = hash_of(&mut File::open(&archive)?)?;
    if found != SHA256 {
        return Err(io::Error::other(format!("its sha256 is {found}, expected {SHA256}")));
    }
    Ok(archive)
}
