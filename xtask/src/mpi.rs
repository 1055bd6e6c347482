//! `cargo xtask mpi`: ring attention and a training run on two processes that MPI starts, against one process.

use crate::run::{self, cargo, works};
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The run: few steps, and all that has a state of its own.
const CONFIG: &str = "[model]\nlayers = 2\nwidth = 32\nheads = 2\nmixer = [{ name = 'full' }, { name = 'gated_delta' }]\n\
    [data]\nsequence = 64\nbatch = 4\norder = 'streams'\n[schedule]\nsteps = 6\n\
    [train]\ndropout = 0.1\nevaluate_every = 3\nevaluate_batches = 3\ncheckpoint_every = 3\n";

pub(crate) fn run(arguments: &[String]) -> Result<()> {
    if let [first, ..] = arguments {
        bail!("mpi takes no arguments, got {first:?}");
    }
    let script = run::root().join("scripts/install_mpi.sh");
    // Where it can't, the next line says so.
    let _ = run::run(Command::new("bash").arg(script).arg("--if-possible"));
    if !works(Command::new("mpirun").arg("--version")) || !works(Command::new("mpicc").arg("-v")) {
        println!(
            "\nSKIPPED, NOT TESTED: two processes with MPI; scripts/install_mpi.sh installs it\n"
        );
        return Ok(());
    }
    // The whole workspace, so that its crates are those that the tests have built.
    run::run(&mut cargo(&[
        "build",
        "--release",
        "--workspace",
        "--features=foveal-cli/mpi,foveal-mpi/mpi",
        "--bin=foveal",
        "--example=ring",
    ]))?;
    let built = target().join("release");
    run::run(&mut processes(2, &built.join("examples/ring")))?;
    training(&built.join("foveal"))
}

fn target() -> PathBuf {
    let target =
        std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| "target".into(), PathBuf::from);
    run::root().join(target)
}

/// `mpirun`, also as root, and with fewer processors than processes.
fn processes(count: usize, program: &Path) -> Command {
    let mut command = Command::new("mpirun");
    command.args(["-n", &count.to_string()]).arg(program);
    for (name, value) in [
        ("OMPI_ALLOW_RUN_AS_ROOT", "1"),
        ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1"),
        ("OMPI_MCA_rmaps_base_oversubscribe", "1"),
        ("OMPI_MCA_hwloc_base_binding_policy", "none"),
    ] {
        command.env(name, value);
    }
    command
}

/// The same run on one process, on two, and on two and then one.
fn training(foveal: &Path) -> Result<()> {
    let folder = target().join("mpi");
    if folder.exists() {
        fs::remove_dir_all(&folder)?;
    }
    fs::create_dir_all(&folder)?;
    let config = folder.join("run.toml");
    fs::write(&config, CONFIG)?;
    let [one, two] = ["one", "two"].map(|name| folder.join(name));
    run::run(train(&mut Command::new(foveal)).arg(&config).arg("--out").arg(&one))?;
    run::run(train(&mut processes(2, foveal)).arg(&config).arg("--out").arg(&two))?;
    same(&one, &two)?;
    let more = ["--set", "schedule.steps=9", "--resume"];
    run::run(train(&mut Command::new(foveal)).args(more).arg(&one))?;
    run::run(train(&mut processes(2, foveal)).args(more).arg(&two))?;
    same(&one, &two)?;
    let mut uneven = processes(3, foveal);
    if works(train(&mut uneven).arg(&config).arg("--out").arg(folder.join("three"))) {
        bail!("three processes shared out a step of four sequences");
    }
    Ok(())
}

fn train(command: &mut Command) -> &mut Command {
    command.args(["train", "--threads", "1"])
}

/// Whether two runs have given the same model and the same losses.
fn same(one: &Path, two: &Path) -> Result<()> {
    let model = |folder: &Path| fs::read(folder.join("model.safetensors")).context("no model");
    if model(one)? != model(two)? {
        bail!("{} and {} have different models", one.display(), two.display());
    }
    let losses = |folder: &Path| -> Result<Vec<String>> {
        let metrics = fs::read_to_string(folder.join("metrics.jsonl"))?;
        let fields = metrics.lines().flat_map(|line| line.split(['{', ',', '}']));
        let kept = fields.filter(|field| field.contains("loss") || field.contains("validation"));
        Ok(kept.map(str::to_owned).collect())
    };
    let (a, b) = (losses(one)?, losses(two)?);
    if a.is_empty() || a != b {
        bail!("{} and {} have different losses:\n{a:?}\n{b:?}", one.display(), two.display());
    }
    println!("{} losses and the model are the same, bit for bit", a.len());
    Ok(())
}
