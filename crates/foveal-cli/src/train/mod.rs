//! `foveal train`: trains a model on texts.

mod processes;
mod report;
mod show;

use std::num::NonZeroUsize;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use anyhow::Context;
use foveal_lm::train::{Config, End, Event, Trainer, begin, run as run_all};

use crate::{compute, interrupt, numbers, output};
use show::Show;

/// What is trained where no configuration is given: a small model, for about a minute.
const USUAL: &str = include_str!("usual.toml");
/// The text of that model: Jane Austen's "Northanger Abbey" (1817).
pub(crate) const TEXT: &str = include_str!("../../assets/northanger-abbey.txt");
/// Where it goes.
const FOLDER: &str = "foveal-model";

/// Train a model, from nothing or from one that exists.
///
/// Without a configuration a small model learns from the novel that is built in, for about a minute. The folder holds a
/// model that `foveal generate --model DIR` runs, and all that is needed to go on: Ctrl-C, a power cut or a full disk lose
/// nothing that is older than the last checkpoint, and a resumed run gives the same bits as one that was never stopped.
/// A build with the feature `mpi` shares a run out over processes: mpirun -n 2 foveal train …
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// A TOML file; docs/training.md has all its keys.
    config: Option<PathBuf>,

    /// A setting in place of the file's, such as optimizer.learning_rate=3e-4; may come more than once.
    #[arg(long, value_name = "SECTION.KEY=VALUE")]
    set: Vec<String>,

    /// The folder of the run: the model, its checkpoint, measurements and a report [default: foveal-model]
    #[arg(long, value_name = "DIR", conflicts_with = "resume")]
    out: Option<PathBuf>,

    /// Go on with the run in this folder.
    #[arg(long, value_name = "DIR", conflicts_with = "config")]
    resume: Option<PathBuf>,

    /// Threads to use; all processors if left out. The results do not depend on it.
    #[arg(long, value_name = "N", value_parser = numbers::threads)]
    threads: Option<NonZeroUsize>,
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<()> {
    interrupt::catch();
    compute::with_threads(arguments.threads, || match &arguments.resume {
        Some(folder) => {
            let processes = processes::all()?;
            let trainer = Trainer::resume_among(processes, folder, &arguments.set, Some(TEXT));
            go(trainer.with_context(|| format!("cannot resume {}", folder.display()))?, folder)
        }
        None => {
            let folder = arguments.out.as_deref().unwrap_or(Path::new(FOLDER));
            let config = config(arguments)?;
            let trainer = Trainer::new_among(processes::all()?, config, Some(TEXT))?;
            begin(&trainer, folder)?;
            go(trainer, folder)
        }
    })
}

fn config(arguments: &Arguments) -> anyhow::Result<Config> {
    let here = std::env::current_dir().context("cannot tell the current folder")?;
    let Some(path) = &arguments.config else {
        return Ok(Config::parse(USUAL, &arguments.set, &here)?);
    };
    let text =
        std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    // Paths in a file begin where the file is.
    let folder = here.join(path.parent().unwrap_or(Path::new("")));
    Config::parse(&text, &arguments.set, &folder)
        .with_context(|| format!("cannot use {}", path.display()))
}

fn go(mut trainer: Trainer, folder: &Path) -> anyhow::Result<()> {
    // The first process speaks for all.
    let mut show = trainer.writes().then(|| Show::new(&trainer));
    let mut failed = None;
    let end = run_all(&mut trainer, folder, &mut |trainer, event| {
        if let Some(show) = &mut show {
            show.event(trainer, &event);
            if matches!(event, Event::Saved) {
                // A report is no reason to stop a run.
                failed = report::write(folder, trainer).err();
            }
        }
        if interrupt::asked() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    if let Some(show) = &mut show {
        show.clear();
    }
    let end = end.with_context(|| kept(&trainer, folder))?;
    if let Some(error) = failed {
        output::note(&format!("foveal: no report: {}", output::sentence(&error)));
    }
    if let Some(show) = &mut show {
        show.end(&trainer, end, folder);
    }
    match end {
        End::Interrupted => Err(foveal_lm::Error::Interrupted.into()),
        _ => Ok(()),
    }
}

/// What is left of a run that failed.
fn kept(trainer: &Trainer, folder: &Path) -> String {
    match trainer.saved_step() {
        Some(step) => format!(
            "stopped; the checkpoint of step {step} is in {}, go on with --resume",
            folder.display()
        ),
        None => format!("stopped before the first checkpoint in {}", folder.display()),
    }
}
