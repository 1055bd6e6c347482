//! A training run between two steps: model, text, optimizer and place, and what one step does with them.

mod evaluate;
mod learner;
mod texts;
mod together;

use std::borrow::Cow;
use std::path::Path;
use std::time::Instant;

use foveal::{Cpu, Dropout};
use foveal_processes::{Alone, Processes};
use serde_json::Value;

use super::checkpoint::{self, Numbers, State};
use super::config::{Config, Objective, Order, Precision as Wide};
use super::data::{Sequences, Text};
use super::optimizer::{Move, Optimizer, length};
use super::random::{Use, seed};
use super::{
    Carried, Error, Parameters, Precision, Scratch, StepOptions, Vocabulary, sample, schedule,
    start,
};
use crate::folder;
pub(super) use learner::Learner;
pub(super) use texts::start as start_token;

/// What a run keeps besides its checkpoint: the configuration, with all settings in it.
pub const CONFIG: &str = "train.toml";
/// The measurements of every step.
pub const METRICS: &str = "metrics.jsonl";

/// A run.
#[derive(Debug)]
pub struct Trainer {
    config: Config,
    json: Value,
    vocabulary: Vocabulary,
    train: Text,
    validation: Option<Text>,
    learner: Learner,
    parameters: Parameters,
    optimizer: Optimizer,
    gradients: Vec<f32>,
    /// Room for the gradients of pieces.
    spare: Vec<Vec<f32>>,
    /// In how many pieces a step is computed.
    pieces: usize,
    processes: Box<dyn Processes>,
    /// What is carried of the sequences of each call of a step.
    carried: Vec<Carried>,
    scratch: Scratch,
    cpu: Cpu,
    pub(super) state: State,
    /// The step of the last checkpoint.
    saved: Option<u64>,
}

/// What a step did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Step {
    /// Its number, from 1.
    pub step: u64,
    /// The mean over its tokens, in nats.
    pub loss: f64,
    /// The length of the gradient before it was clipped.
    pub gradient: f64,
    /// η.
    pub learning_rate: f64,
    /// Tokens that were predicted.
    pub tokens: usize,
    /// How long it took.
    pub seconds: f64,
}

/// How well the model predicts text that it is not trained on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Evaluation {
    /// Steps that were done.
    pub step: u64,
    /// The mean over the tokens, in nats.
    pub loss: f64,
    /// How many.
    pub tokens: usize,
    /// Whether no evaluation before was better.
    pub best: bool,
}

impl Trainer {
    /// A run from its beginning. `builtin` is the text where the configuration names none.
    ///
    /// # Errors
    ///
    /// Those of the texts, the tokenizer and the model that `config` asks for.
    pub fn new(config: Config, builtin: Option<&str>) -> Result<Trainer, Error> {
        Trainer::new_among(Box::new(Alone), config, builtin)
    }

    /// The same on several processes, each of which calls it with the same configuration and texts.
    ///
    /// # Errors
    ///
    /// Those of [`Trainer::new`]; [`Error::Config`] for a step that can't be shared out; [`Error::Elsewhere`] where another
    /// process has failed; [`Error::Processes`] for processes that have different things.
    pub fn new_among(
        processes: Box<dyn Processes>,
        config: Config,
        builtin: Option<&str>,
    ) -> Result<Trainer, Error> {
        let own = Trainer::assemble(config, builtin, (None, None));
        Trainer::join(own, processes)
    }

    /// The run in `folder`, from its last checkpoint; from its beginning if it has none yet.
    ///
    /// `settings` may change what a run does from here on: the sections `optimizer`, `schedule` and `train`.
    ///
    /// # Errors
    ///
    /// [`Error::NoRun`], [`Error::Fixed`], [`Error::Checkpoint`], [`Error::OtherText`], and those of [`Trainer::new`].
    pub fn resume(
        folder: &Path,
        settings: &[String],
        builtin: Option<&str>,
    ) -> Result<Trainer, Error> {
        Trainer::resume_among(Box::new(Alone), folder, settings, builtin)
    }

    /// The same on several processes, all of which see the folder.
    ///
    /// # Errors
    ///
    /// Those of [`Trainer::resume`] and [`Trainer::new_among`].
    pub fn resume_among(
        processes: Box<dyn Processes>,
        folder: &Path,
        settings: &[String],
        builtin: Option<&str>,
    ) -> Result<Trainer, Error> {
        let own = Trainer::reopen(folder, settings, builtin);
        let (own, checkpoint) = match own {
            Ok((trainer, checkpoint)) => (Ok(trainer), checkpoint),
            Err(error) => (Err(error), None),
        };
        let mut trainer = Trainer::join(own, processes)?;
        let restored = checkpoint.map_or(Ok(()), |checkpoint| trainer.restore(&checkpoint));
        trainer.together(restored)?;
        trainer.check_same()?;
        Ok(trainer)
    }

    /// A run as it is on its own becomes one of several.
    fn join(own: Result<Trainer, Error>, processes: Box<dyn Processes>) -> Result<Trainer, Error> {
        let own = own.and_then(|mut trainer| {
            trainer.pieces = together::pieces(&trainer.config, &*processes)?;
            // Whoever resumes the run, on any number of processes, gets the same bits.
            trainer.config.train.pieces = Some(trainer.pieces);
            let per_call = trainer.per_call(&trainer.train);
            trainer.carried = trainer.nothing_carried(&trainer.train, per_call)?;
            Ok(trainer)
        });
        let mut trainer = together::together(&*processes, own)?;
        trainer.processes = processes;
        trainer.check_same()?;
        Ok(trainer)
    }

    fn reopen(
        folder: &Path,
        settings: &[String],
        builtin: Option<&str>,
    ) -> Result<(Trainer, Option<checkpoint::Checkpoint>), Error> {
        let text = match std::fs::read_to_string(folder.join(CONFIG)) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(Error::NoRun { path: folder.to_owned() });
            }
            Err(error) => {
                let reason = error.to_string();
                return Err(Error::Text { path: folder.join(CONFIG), reason });
            }
        };
        let fixed = |setting: &&String| {
            let key = setting.split('=').next().unwrap_or_default().trim();
            let free = ["optimizer.", "schedule.", "train."];
            let kept = ["train.seed", "train.accumulate", "train.objective"];
            !free.iter().any(|free| key.starts_with(free)) || kept.contains(&key)
        };
        if let Some(setting) = settings.iter().find(fixed) {
            let key = setting.split('=').next().unwrap_or_default().trim().to_owned();
            return Err(Error::Fixed { key });
        }
        let mut config = Config::parse(&text, settings, folder)?;
        // So runs were computed that do not say.
        config.train.pieces.get_or_insert(1);
        let vocabulary = match folder.join("tokenizer.json").exists() {
            true => Some(Vocabulary::open(folder)?),
            false => None,
        };
        let checkpoint = checkpoint::open(folder)?;
        let json = checkpoint.as_ref().map(|_| config_json(folder)).transpose()?;
        Ok((Trainer::assemble(config, builtin, (vocabulary, json))?, checkpoint))
    }

    fn assemble(
        config: Config,
        builtin: Option<&str>,
        (vocabulary, json): (Option<Vocabulary>, Option<Value>),
    ) -> Result<Trainer, Error> {
        let texts = texts::read(&config, builtin)?;
        let vocabulary = match vocabulary {
            Some(vocabulary) => vocabulary,
            None => start::vocabulary(&config, &texts)?,
        };
        let (train, validation, digest) = texts::encoded(&config, &texts, &vocabulary)?;
        drop(texts);
        let start::Model { json, parameters, learner } = start::model(&config, &vocabulary, json)?;
        Ok(Trainer {
            optimizer: Optimizer::new(&parameters),
            gradients: parameters.zeros(),
            spare: vec![],
            pieces: 1,
            processes: Box::new(Alone),
            carried: vec![],
            scratch: Scratch::new(),
            cpu: Cpu::detect()?,
            state: State { digest, position: train.position().clone(), ..State::default() },
            saved: None,
            config,
            json,
            vocabulary,
            train,
            validation,
            learner,
            parameters,
        })
    }

    fn restore(&mut self, checkpoint: &checkpoint::Checkpoint) -> Result<(), Error> {
        if checkpoint.state.digest != self.state.digest {
            return Err(Error::OtherText);
        }
        checkpoint.read("parameters", self.parameters.values_mut())?;
        checkpoint.read("first", &mut self.optimizer.first)?;
        checkpoint.read("second", &mut self.optimizer.second)?;
        let (found, expected) = (checkpoint.calls(), self.carried.len());
        if found != expected {
            return Err(checkpoint.wrong(format!(
                "a step was computed in {found} calls, now in {expected}; set train.pieces to what it was"
            )));
        }
        let own = self.own_calls();
        for (n, carried) in self.carried.iter_mut().enumerate().filter(|(n, _)| own.contains(n)) {
            carried.restore(checkpoint.bytes_of(&format!("carried.{n}"))?)?;
        }
        self.train.set_position(checkpoint.state.position.clone())?;
        self.state = checkpoint.state.clone();
        self.saved = Some(self.state.step);
        // More steps may have been asked for.
        self.state.done &= self.state.step >= self.config.schedule.steps;
        Ok(())
    }

    /// What it does.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The model's `config.json`.
    pub fn json(&self) -> &Value {
        &self.json
    }

    /// All that is learned.
    pub fn parameters(&self) -> &Parameters {
        &self.parameters
    }

    /// What is trained.
    pub(super) fn learner(&self) -> &Learner {
        &self.learner
    }

    /// What is not trained on, or what is, where nothing is kept back.
    pub(super) fn kept_back(&self) -> &Text {
        self.validation.as_ref().unwrap_or(&self.train)
    }

    /// The tokenizer.
    pub fn vocabulary(&self) -> &Vocabulary {
        &self.vocabulary
    }

    /// Steps that are done, and what else a checkpoint has.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// The most bytes of activations that a step had in use.
    pub fn activation_bytes(&self) -> usize {
        self.scratch.peak_bytes()
    }

    /// The step of the last checkpoint, if there is one.
    pub fn saved_step(&self) -> Option<u64> {
        self.saved
    }

    /// Sequences of one call of the network in training.
    fn per_call(&self, text: &Text) -> usize {
        let sequences = self.config.data.batch * self.config.train.accumulate;
        together::sequences_per_call(sequences / self.pieces.max(1), self.most_per_call(text))
    }

    /// The most sequences of one call of the network.
    fn most_per_call(&self, text: &Text) -> usize {
        let (batch, streams) = (self.config.data.batch, text.position().streams.len());
        // Texts that end at different times are carried apart.
        match text.in_step() {
            true if streams > 0 => batch.min(streams),
            true => batch,
            false => 1,
        }
    }

    fn nothing_carried(&self, text: &Text, per_call: usize) -> Result<Vec<Carried>, Error> {
        if self.config.data.order == Order::Shuffled {
            return Ok(vec![]);
        }
        let calls = text.position().streams.len() / per_call;
        let carried = (0..calls).map(|_| self.learner.carried(per_call));
        Ok(carried.filter_map(Result::transpose).collect::<Result<_, _>>()?)
    }

    /// One step: gradients of its batches, their length, and a move of all parameters.
    ///
    /// # Errors
    ///
    /// [`Error::NotFinite`] with a diagnosis; the parameters have not moved then. [`Error::Elsewhere`] and
    /// [`Error::Processes`] where there are several processes.
    pub fn step(&mut self) -> Result<Step, Error> {
        let begin = Instant::now();
        let number = self.state.step + 1;
        let pieces: Vec<Vec<Sequences>> = (0..self.pieces).map(|n| self.next(n, number)).collect();
        let targets: usize = pieces.iter().flatten().map(Sequences::predicted).sum();
        let sum = self.gradients_of(&pieces, number, targets)?;
        let loss = sum / targets.max(1) as f64;
        let gradient = length(&self.gradients, self.cpu);
        if !(loss.is_finite() && gradient.is_finite()) {
            return Err(self.diagnosis(number, loss, gradient));
        }
        let share = schedule::share(&self.config.schedule, self.state.step);
        let settings = &self.config.optimizer;
        let by = Move { settings, step: number, share, length: gradient };
        self.optimizer.step(&by, &mut self.parameters, &self.gradients, self.cpu)?;
        let seconds = begin.elapsed().as_secs_f64();
        self.state.step = number;
        self.state.tokens += targets as u64;
        self.state.seconds += seconds;
        self.state.position.clone_from(self.train.position());
        let learning_rate = share * self.config.optimizer.learning_rate;
        Ok(Step { step: number, loss, gradient, learning_rate, tokens: targets, seconds })
    }

    /// The calls of a piece of a step.
    fn next(&mut self, piece: usize, step: u64) -> Vec<Sequences> {
        let each = self.config.data.batch * self.config.train.accumulate / self.pieces;
        let (first, per_call) = (piece * each, self.per_call(&self.train));
        let calls = self.train.calls(first..first + each, per_call).into_iter().enumerate();
        calls.map(|(n, batch)| self.hidden(batch, [step, (first + n * per_call) as u64])).collect()
    }

    /// The same with some tokens hidden, where those are to be predicted.
    fn hidden(&self, batch: Sequences, place: [u64; 2]) -> Sequences {
        let train = &self.config.train;
        match (train.objective, self.vocabulary.mask()) {
            (Objective::Masked, Some(mask)) => {
                let vocab = self.vocabulary.tokenizer.vocab_size();
                batch.hide(mask, vocab, train.mask_share, seed(train.seed, Use::Mask, place))
            }
            _ => batch,
        }
    }

    /// Adds the gradients of one batch to `gradients`; returns the sum of its losses.
    fn add_gradients(
        &mut self,
        batch: &Sequences,
        (call, step): (usize, u64),
        targets: usize,
        gradients: &mut [f32],
    ) -> Result<f64, Error> {
        let train = &self.config.train;
        let mut carried = self.carried.get_mut(call);
        if let Some(carried) = carried.as_mut().filter(|_| batch.fresh.first() == Some(&true)) {
            carried.clear();
        }
        let mut options = StepOptions::new(self.cpu, &mut self.scratch);
        options.recompute = train.recompute;
        options.precision = precision(train.precision);
        options.smoothing = train.smoothing as f32;
        options.scale = (batch.predicted() as f64 / targets.max(1) as f64) as f32;
        if train.dropout > 0.0 {
            let seed = seed(train.seed, Use::Dropout, [step, call as u64]);
            options.dropout = Some(Dropout { rate: train.dropout as f32, seed });
        }
        let values = self.parameters.values();
        let loss = self.learner.gradients(values, (batch, carried), gradients, &mut options);
        match loss {
            Ok(loss) => Ok(loss.sum),
            Err(crate::Error::NotFinite { place }) => {
                Err(not_finite(step, ("the loss", f64::NAN), format!("it began with {place}")))
            }
            Err(error) => Err(error.into()),
        }
    }

    fn diagnosis(&self, step: u64, loss: f64, gradient: f64) -> Error {
        let place = match self.parameters.not_finite(&self.gradients) {
            Some(entry) => {
                format!("the gradient of {} is the first that is not finite", entry.name)
            }
            None => "its numbers are finite, but their squares are not".to_owned(),
        };
        let what = if loss.is_finite() { ("the gradient", gradient) } else { ("the loss", loss) };
        not_finite(step, what, place)
    }

    /// Text that the model makes, after the prompt of the configuration; of an encoder–decoder what it makes of the prompt, or
    /// of pairs that are kept back.
    ///
    /// # Errors
    ///
    /// [`Error::Model`].
    pub fn sample(&self) -> Result<String, Error> {
        let train = &self.config.train;
        let seed = seed(train.seed, Use::Sample, [self.state.step, 0]);
        sample::text(self, (train.sample_tokens, seed))
    }

    /// Writes a checkpoint into `folder`: the first process does, and all call it.
    ///
    /// # Errors
    ///
    /// [`Error::Write`]; the last one is as it was. [`Error::Elsewhere`] where another process could not write.
    pub fn save(&mut self, folder: &Path) -> Result<(), Error> {
        let numbers = Numbers {
            parameters: self.parameters.values(),
            first: &self.optimizer.first,
            second: &self.optimizer.second,
            carried: self.all_carried()?,
        };
        let own = match self.writes() {
            true => checkpoint::save(folder, &self.state, &numbers),
            false => Ok(()),
        };
        self.together(own)?;
        self.saved = Some(self.state.step);
        Ok(())
    }

    /// Writes the model into `folder`: `config.json`, `model.safetensors`, and the tokenizer.
    ///
    /// # Errors
    ///
    /// [`Error::Write`].
    pub fn export(&self, folder: &Path) -> Result<(), Error> {
        self.write_description(folder)?;
        let (fixed, learned) = (self.learner.fixed_tensors(), self.parameters.entries().len());
        let mut shapes = self.shapes();
        shapes.extend(fixed.iter().map(|(name, shape, _)| (name.clone(), shape.clone())));
        let values = |n: usize| {
            let fixed = n.checked_sub(learned).and_then(|n| fixed.get(n));
            Cow::Borrowed(fixed.map_or_else(|| self.entry_values(n), |(_, _, numbers)| numbers))
        };
        folder::write(folder, &self.json, folder::Numbers::F32, (&shapes, &values))
            .map_err(write_error)
    }

    /// Writes what of the model does not change.
    pub(super) fn write_description(&self, folder: &Path) -> Result<(), Error> {
        let text = format!("{:#}\n", self.json);
        folder::save_bytes(&folder.join("config.json"), text.as_bytes()).map_err(write_error)?;
        let named = [
            ("tokenizer.json", Some(&self.vocabulary.json)),
            ("tokenizer_config.json", self.vocabulary.config.as_ref()),
        ];
        for (name, bytes) in named {
            if let Some(bytes) = bytes {
                folder::save_bytes(&folder.join(name), bytes).map_err(write_error)?;
            }
        }
        Ok(())
    }

    /// Names and shapes of the model's tensors.
    pub(super) fn shapes(&self) -> Vec<(String, Vec<usize>)> {
        let entries = self.parameters.entries().iter();
        entries.map(|entry| (entry.name.clone(), entry.shape.clone())).collect()
    }

    /// The numbers of the tensor `n`.
    pub(super) fn entry_values(&self, n: usize) -> &[f32] {
        let entry = self.parameters.entries().get(n);
        entry.and_then(|entry| self.parameters.values().get(entry.range.clone())).unwrap_or(&[])
    }
}

/// The `config.json` of a run.
fn config_json(folder: &Path) -> Result<Value, Error> {
    let path = folder.join("config.json");
    let wrong = |reason: String| Error::Checkpoint { path: path.clone(), reason };
    let text = std::fs::read(&path).map_err(|error| wrong(error.to_string()))?;
    serde_json::from_slice(&text).map_err(|error| wrong(error.to_string()))
}

/// A file that can't be written says so in the words of training.
pub(super) fn write_error(error: crate::Error) -> Error {
    match error {
        crate::Error::Weights(crate::weights::Error::Io { path, source, .. }) => {
            Error::Write { path, source }
        }
        error => error.into(),
    }
}

fn not_finite(step: u64, (what, found): (&'static str, f64), place: String) -> Error {
    let advice =
        "Lower optimizer.learning_rate, or set optimizer.clip, and resume from the last checkpoint";
    Error::NotFinite { step, what, found, place, advice }
}

fn precision(wanted: Wide) -> Precision {
    match wanted {
        Wide::F32 => Precision::F32,
        Wide::Bf16 => Precision::Bf16,
    }
}
