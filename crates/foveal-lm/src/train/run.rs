//! The loop: steps, evaluations, samples, checkpoints, and when to stop.
//!
//! The folder of a run has `train.toml`, the tokenizer, `metrics.jsonl` with a line a step, `checkpoint.safetensors`, and the
//! model as of the last checkpoint (of the best evaluation, where `train.patience` is set). A process may be killed at any
//! moment: what a checkpoint promised is kept, and a run that was resumed gives the bits of one that was not.

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::trainer::{CONFIG, Evaluation, METRICS, Step, Trainer};
use super::{Error, checkpoint};
use crate::folder;

/// What has just happened.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// A step.
    Step(&'a Step),
    /// An evaluation.
    Evaluated(&'a Evaluation),
    /// A sample of text.
    Sample(&'a str),
    /// A checkpoint is on disk.
    Saved,
}

/// Why a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum End {
    /// All steps are done.
    Done,
    /// The evaluations had not become better for as long as the configuration allows.
    Stale,
    /// Whoever watched broke it off; a checkpoint is on disk.
    Interrupted,
}

/// A run's measurements, a JSON object a line.
struct Metrics {
    file: File,
    path: PathBuf,
    /// Bytes that are written.
    len: u64,
}

impl Metrics {
    /// Goes on after what belongs to the checkpoint.
    fn open(folder: &Path, len: u64) -> Result<Metrics, Error> {
        let path = folder.join(METRICS);
        let open = || {
            let mut file = File::options().write(true).create(true).truncate(false).open(&path)?;
            file.set_len(len)?;
            file.seek(SeekFrom::End(0))?;
            Ok(file)
        };
        match open() {
            Ok(file) => Ok(Metrics { file, path, len }),
            Err(source) => Err(Error::Write { path, source }),
        }
    }

    fn write(&mut self, record: &Value) -> Result<(), Error> {
        let line = format!("{record}\n");
        let written = self.file.write_all(line.as_bytes());
        written.map_err(|source| Error::Write { path: self.path.clone(), source })?;
        self.len += line.len() as u64;
        Ok(())
    }

    fn sync(&self) -> Result<u64, Error> {
        let synced = self.file.sync_all();
        synced.map_err(|source| Error::Write { path: self.path.clone(), source })?;
        Ok(self.len)
    }
}

/// Makes the folder of a new run: the first process does, and all call it.
///
/// # Errors
///
/// [`Error::Taken`] for a folder that has a run already; [`Error::Write`]; [`Error::Elsewhere`].
pub fn begin(trainer: &Trainer, folder: &Path) -> Result<(), Error> {
    trainer.together(if trainer.writes() { make(trainer, folder) } else { Ok(()) })
}

fn make(trainer: &Trainer, folder: &Path) -> Result<(), Error> {
    let config = folder.join(CONFIG);
    if config.exists() {
        return Err(Error::Taken { path: folder.to_owned() });
    }
    std::fs::create_dir_all(folder)
        .map_err(|source| Error::Write { path: folder.to_owned(), source })?;
    // Should the process be killed right after it, all that follows is made again.
    trainer.write_description(folder)?;
    save_config(trainer, folder)
}

/// Writes the configuration, with settings that came later.
fn save_config(trainer: &Trainer, folder: &Path) -> Result<(), Error> {
    let text = trainer.config().to_text()?;
    folder::save_bytes(&folder.join(CONFIG), text.as_bytes()).map_err(super::trainer::write_error)
}

/// Takes a run to its end. `watch` is told what has happened, and may break the run off after a step. All processes call it;
/// what one of them breaks off ends on all, and the first one writes.
///
/// # Errors
///
/// Those of [`Trainer::step`], [`Trainer::evaluate`], [`Trainer::sample`] and [`Trainer::save`]. The last checkpoint stays.
pub fn run(
    trainer: &mut Trainer,
    folder: &Path,
    watch: &mut dyn FnMut(&Trainer, Event<'_>) -> ControlFlow<()>,
) -> Result<End, Error> {
    let metrics = match trainer.writes() {
        true => open(trainer, folder).map(Some),
        false => Ok(None),
    };
    let metrics = trainer.together(metrics)?;
    Running { trainer, folder, metrics, watch }.all()
}

/// The measurements of a run whose folder is in order.
fn open(trainer: &Trainer, folder: &Path) -> Result<Metrics, Error> {
    checkpoint::clean(folder);
    save_config(trainer, folder)?;
    Metrics::open(folder, trainer.state.metrics)
}

struct Running<'a> {
    trainer: &'a mut Trainer,
    folder: &'a Path,
    /// Of the process that writes.
    metrics: Option<Metrics>,
    watch: &'a mut dyn FnMut(&Trainer, Event<'_>) -> ControlFlow<()>,
}

/// Whether something that happens every so many steps is due.
fn due(step: u64, every: u64) -> bool {
    every > 0 && step.is_multiple_of(every)
}

impl Running<'_> {
    fn all(&mut self) -> Result<End, Error> {
        let steps = self.trainer.config().schedule.steps;
        while !self.trainer.state.done {
            if self.trainer.state.step >= steps {
                self.trainer.state.done = true;
                break;
            }
            let step = self.trainer.step()?;
            let wrote = self.record(&json!({
                "step": step.step, "loss": step.loss, "gradient": step.gradient,
                "learning_rate": step.learning_rate, "tokens": step.tokens, "seconds": step.seconds,
            }));
            let flow = (self.watch)(self.trainer, Event::Step(&step));
            let broken_off = self.trainer.any_stops(wrote.map(|()| flow.is_break()))?;
            let last = step.step >= steps;
            let train = self.trainer.config().train.clone();
            if due(step.step, train.evaluate_every) || (last && train.evaluate_every > 0) {
                self.evaluate()?;
            }
            if due(step.step, train.sample_every) {
                self.sample()?;
            }
            let stale = train.patience > 0 && self.trainer.state.stale >= train.patience;
            self.trainer.state.done = last || stale;
            let due = due(step.step, train.checkpoint_every);
            if due || broken_off || self.trainer.state.done {
                self.save()?;
            }
            if stale {
                return Ok(End::Stale);
            }
            if broken_off && !last {
                return Ok(End::Interrupted);
            }
        }
        if self.trainer.saved_step() != Some(self.trainer.state.step) {
            self.save()?;
        }
        Ok(End::Done)
    }

    /// Writes a measurement, where this process does.
    fn record(&mut self, record: &Value) -> Result<(), Error> {
        self.metrics.as_mut().map_or(Ok(()), |metrics| metrics.write(record))
    }

    fn evaluate(&mut self) -> Result<(), Error> {
        let Some(evaluation) = self.trainer.evaluate()? else { return Ok(()) };
        let mut wrote = self.record(&json!({
            "step": evaluation.step, "validation": evaluation.loss, "tokens": evaluation.tokens,
        }));
        if self.trainer.config().train.patience > 0 && evaluation.best {
            wrote = wrote.and_then(|()| self.export());
        }
        self.trainer.together(wrote)?;
        let _ = (self.watch)(self.trainer, Event::Evaluated(&evaluation));
        Ok(())
    }

    fn sample(&mut self) -> Result<(), Error> {
        let made = match self.trainer.writes() {
            true => self.trainer.sample().and_then(|text| {
                self.record(&json!({"step": self.trainer.state.step, "sample": text}))?;
                Ok(Some(text))
            }),
            false => Ok(None),
        };
        if let Some(text) = self.trainer.together(made)? {
            let _ = (self.watch)(self.trainer, Event::Sample(&text));
        }
        Ok(())
    }

    /// Writes the model, where this process does.
    fn export(&self) -> Result<(), Error> {
        if self.trainer.writes() { self.trainer.export(self.folder) } else { Ok(()) }
    }

    fn save(&mut self) -> Result<(), Error> {
        let synced = self.metrics.as_ref().map(Metrics::sync).transpose();
        if let Some(len) = self.trainer.together(synced)? {
            self.trainer.state.metrics = len;
        }
        self.trainer.save(self.folder)?;
        // The best model stays where there is one.
        let train = &self.trainer.config().train;
        if train.patience == 0 || self.trainer.state.best_step().is_none() {
            self.trainer.together(self.export())?;
        }
        let _ = (self.watch)(self.trainer, Event::Saved);
        Ok(())
    }
}
