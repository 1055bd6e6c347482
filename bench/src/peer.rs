//! Whom Foveal is compared with, and how the peers that run in processes of their own are started.

use crate::case::{AttentionCase, DType};
use crate::prepared::Absent;
use crate::worker::{Worker, WorkerCase};
use anyhow::{Context, ensure};
use clap::ValueEnum;
use serde::Deserialize;
use std::cell::RefCell;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::rc::Rc;

/// A side other than ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Peer {
    /// Two matrix products with a softmax between them, in this process.
    Unfused,
    /// The same call under a causal mask, in every run whose cases name it.
    #[value(skip)]
    Causal,
    /// PyTorch's `scaled_dot_product_attention` and its gradients.
    Torch,
    /// ONNX Runtime's fastest attention operator.
    Onnxruntime,
    /// OpenVINO's `ScaledDotProductAttention`.
    Openvino,
    /// llama.cpp's flash attention.
    Ggml,
    /// The crate candle-nn's flash attention.
    Candle,
    /// The crate burn-flex's attention.
    BurnFlex,
    /// llama.cpp, for models.
    Llama,
    /// Nobody.
    None,
}

/// How a worker is started.
enum Program {
    /// A script beside `setup.sh`, in the Python environment of a variable of `versions.sh`.
    Python(&'static str, &'static str),
    /// The program of `rust-peers` with an argument.
    Rust(&'static str),
}

impl Peer {
    /// Its name in reports.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Peer::Unfused => "unfused",
            Peer::Causal => "causal",
            Peer::Torch => "torch",
            Peer::Onnxruntime => "onnxruntime",
            Peer::Openvino => "openvino",
            Peer::Ggml => "ggml",
            Peer::Candle => "candle",
            Peer::BurnFlex => "burn-flex",
            Peer::Llama => "llama.cpp",
            Peer::None => "none",
        }
    }

    fn program(self) -> Option<Program> {
        Some(match self {
            Peer::Torch => Program::Python("TORCH_DIR", "torch_sdpa.py"),
            Peer::Onnxruntime => Program::Python("ONNXRUNTIME_DIR", "onnxruntime_attention.py"),
            Peer::Openvino => Program::Python("OPENVINO_DIR", "openvino_sdpa.py"),
            Peer::Ggml => Program::Python("GGML_DIR", "ggml_flash.py"),
            Peer::Candle => Program::Rust("candle"),
            Peer::BurnFlex => Program::Rust("burn-flex"),
            Peer::Unfused | Peer::Causal | Peer::Llama | Peer::None => return None,
        })
    }

    /// The name under which `setup.sh` installs it.
    fn package(self) -> &'static str {
        match self {
            Peer::Candle | Peer::BurnFlex => "rust",
            other => other.name(),
        }
    }

    /// The command that starts its worker for so many threads.
    fn command(self, folder: &Path, threads: usize) -> anyhow::Result<Command> {
        let program = self.program().with_context(|| format!("{} has no worker", self.name()))?;
        let mut command = match program {
            Program::Python(environment, script) => {
                let python = script_variable(folder, environment)?.join("bin/python");
                self.require(&python)?;
                let mut command = Command::new(python);
                command.arg(folder.join(script));
                command
            }
            Program::Rust(name) => {
                let program =
                    script_variable(folder, "RUST_DIR")?.join("release/foveal-rust-peers");
                self.require(&program)?;
                let mut command = Command::new(program);
                command.arg(name);
                command
            }
        };
        // Where a library takes it from nowhere else.
        for variable in ["RAYON_NUM_THREADS", "CANDLE_NUM_THREADS", "OMP_NUM_THREADS"] {
            command.env(variable, threads.to_string());
        }
        Ok(command)
    }

    fn require(self, program: &Path) -> anyhow::Result<()> {
        let package = self.package();
        ensure!(
            program.exists(),
            "{} is not installed; run bench/peers/setup.sh {package}",
            self.name()
        );
        Ok(())
    }
}

/// The largest accepted error of a peer's results, relative to a row's largest number: what 16-bit cases are
/// allowed covers rounding of probabilities and results to the inputs' type.
pub(crate) fn bound(dtype: DType) -> f64 {
    match dtype {
        DType::F32 => 5e-5,
        DType::F16 => 8e-3,
        DType::Bf16 => 6e-2,
    }
}

/// A variable that `versions.sh` sets.
fn script_variable(folder: &Path, name: &str) -> anyhow::Result<PathBuf> {
    let script = format!("source \"$0\" && printf %s \"${name}\"");
    let versions = folder.join("versions.sh");
    let output = Command::new("bash").args(["-euc", &script]).arg(&versions).output()?;
    ensure!(output.status.success(), "cannot read {}", versions.display());
    Ok(PathBuf::from(String::from_utf8(output.stdout)?))
}

/// A worker and the case that it holds both speak to it.
type Shared = Rc<RefCell<Worker>>;

/// The peers of this run.
pub(crate) struct Peers {
    asked: Vec<Peer>,
    /// The folder of their scripts.
    pub(crate) folder: PathBuf,
    /// Running workers, one for each number of threads, since some libraries never change theirs.
    workers: RefCell<HashMap<(Peer, usize), Shared>>,
}

impl Peers {
    /// Starts a worker of each peer that has one, to fail early and to learn versions.
    ///
    /// # Errors
    /// If one is not installed or does not start.
    pub(crate) fn start(
        asked: &[Peer],
        folder: &Path,
        threads: usize,
    ) -> anyhow::Result<(Peers, Vec<String>)> {
        let peers =
            Peers { asked: asked.to_vec(), folder: folder.to_owned(), workers: RefCell::default() };
        let mut descriptions = Vec::new();
        for &peer in asked.iter().filter(|peer| peer.program().is_some()) {
            descriptions.push(peers.worker(peer, threads)?.borrow().description.clone());
        }
        Ok((peers, descriptions))
    }

    pub(crate) fn has(&self, peer: Peer) -> bool {
        self.asked.contains(&peer)
    }

    /// The worker for a case, started where there is none or where it has gone.
    fn worker(&self, peer: Peer, threads: usize) -> anyhow::Result<Shared> {
        let mut workers = self.workers.borrow_mut();
        if let Some(worker) = workers.get(&(peer, threads))
            && worker.borrow_mut().runs()
        {
            return Ok(worker.clone());
        }
        let command = peer.command(&self.folder, threads)?;
        let worker = Rc::new(RefCell::new(Worker::start(peer.name(), command)?));
        workers.insert((peer, threads), worker.clone());
        Ok(worker)
    }

    /// The peer's side of a case, or why it has none; nothing if nobody asked for it.
    pub(crate) fn case(
        &self,
        peer: Peer,
        case: &AttentionCase,
    ) -> Option<Result<WorkerCase, Absent>> {
        if !self.has(peer) {
            return None;
        }
        let built =
            self.worker(peer, case.threads).and_then(|worker| WorkerCase::new(worker, case));
        Some(built.map_err(|error| Absent::new(peer.name(), &format!("{error:#}"))))
    }
}
