//! What a training run does: five sections of a TOML file, each key with a usual value.
//!
//! Every value is checked when the file is read; keys that there are not are refused by name. `section.key=value` settings
//! come after the file and are read as it is.

mod model;
mod pairs;

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use super::Error;
pub use model::{Family, ModelSection};

/// A training run, described.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The model.
    pub model: ModelSection,
    /// What it reads.
    pub data: DataSection,
    /// How parameters move.
    pub optimizer: OptimizerSection,
    /// How far, and at what rate.
    pub schedule: ScheduleSection,
    /// How often to look, and what to keep.
    pub train: TrainSection,
}

/// Texts, and how they are cut.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct DataSection {
    /// Text files, JSONL files, and folders of them.
    pub train: Vec<PathBuf>,
    /// Those that are not trained on; where there are none, the last of the tokens are kept back.
    pub validation: Vec<PathBuf>,
    /// The share of the tokens that is kept back: two sequences at least, and nothing of a text too short for that.
    pub validation_share: f64,
    /// The member of a JSONL line that has the text.
    pub text_key: String,
    /// The members of a JSONL line that have the two texts of a pair.
    pub source_key: String,
    /// The second of them.
    pub target_key: String,
    /// Pairs that are made up, where `train` names none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub task: Option<Task>,
    /// A line of its own between the documents of a text file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub separator: Option<String>,
    /// `bytes`, `bpe`, or a `tokenizer.json`, a folder with one, or a GGUF file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokenizer: Option<String>,
    /// Tokens that `bpe` is trained to.
    pub vocab: usize,
    /// Tokens of a sequence.
    pub sequence: usize,
    /// Sequences that go through the model together.
    pub batch: usize,
    /// How sequences follow each other.
    pub order: Order,
}

/// How sequences follow each other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Order {
    /// Anywhere in the text, each once an epoch; documents follow each other, with the end token between.
    #[default]
    Shuffled,
    /// Each goes on where the last one of its place in the batch ended, and layers carry on what they keep of it: truncated
    /// backpropagation through time. A document begins with nothing carried.
    Streams,
}

/// What made-up pairs ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Task {
    /// The same letters again.
    Copy,
    /// The letters from the last to the first.
    Reverse,
}

/// AdamW, and the limit of a gradient.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct OptimizerSection {
    /// The highest learning rate.
    pub learning_rate: f64,
    /// That of the gates of memories; ten times the other where it is left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gate_learning_rate: Option<f64>,
    /// β₁ and β₂.
    pub betas: [f64; 2],
    /// ε.
    pub epsilon: f64,
    /// The decay of matrices; vectors and gates have none.
    pub weight_decay: f64,
    /// The greatest length of a gradient; 0 for any.
    pub clip: f64,
}

/// The learning rate over the steps.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct ScheduleSection {
    /// Its form.
    pub kind: Kind,
    /// Steps of the whole run.
    pub steps: u64,
    /// Steps from 0 to the highest rate; a twentieth of all where it is left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub warmup: Option<u64>,
    /// Steps from the highest rate to the last, at the end of `wsd`; a fifth of all where it is left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decay: Option<u64>,
    /// The last rate, as a share of the highest.
    #[serde(rename = "final")]
    pub last: f64,
}

/// The form of a schedule after its warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Half a wave of the cosine.
    #[default]
    Cosine,
    /// Level until the decay, then straight down.
    Wsd,
    /// Level.
    Constant,
    /// With the inverse of the root of the step.
    InverseSqrt,
}

/// The loop.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainSection {
    /// What all random numbers come from.
    pub seed: u64,
    /// What the model learns to predict.
    pub objective: Objective,
    /// The share of tokens that is hidden, of the masked objective.
    pub mask_share: f64,
    /// Batches whose gradients are added up for a step.
    pub accumulate: usize,
    /// In how many pieces a step is computed, whose gradients are added in order. Where it is left out: 2 if the step's sequences can be
    /// halved, else 1; as many as there are processes where their number does not divide that. The bits of a run depend on it,
    /// and not on the number of processes, which divides it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pieces: Option<usize>,
    /// What projections and attention compute in; parameters are f32 in any case.
    pub precision: Precision,
    /// The share of numbers that is dropped behind each part of a layer.
    pub dropout: f64,
    /// The part of a target's weight that all tokens share, in training.
    pub smoothing: f64,
    /// Whether blocks are computed again on the way back instead of kept: less memory, a third more time.
    pub recompute: bool,
    /// Steps from one evaluation to the next; 0 for none.
    pub evaluate_every: u64,
    /// The most batches of an evaluation; 0 for all of the text.
    pub evaluate_batches: usize,
    /// Steps from one sample to the next; 0 for none.
    pub sample_every: u64,
    /// Tokens of a sample.
    pub sample_tokens: usize,
    /// What a sample begins with.
    pub prompt: String,
    /// Steps from one checkpoint to the next; 0 for one at the end.
    pub checkpoint_every: u64,
    /// Evaluations without a better loss after which to stop, and to leave the best model; 0 for never.
    pub patience: u64,
}

/// What a model learns to predict.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Objective {
    /// The next token.
    #[default]
    Causal,
    /// Tokens that are hidden, from those on both sides. Such a model makes no text.
    Masked,
    /// The second text of a pair, from the first: by an encoder–decoder.
    Translation,
}

/// What projections and attention compute in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    /// f32.
    #[default]
    F32,
    /// bf16, summed in f32.
    Bf16,
}

impl Default for DataSection {
    fn default() -> DataSection {
        DataSection {
            train: vec![],
            validation: vec![],
            validation_share: 0.05,
            text_key: "text".to_owned(),
            source_key: "source".to_owned(),
            target_key: "target".to_owned(),
            task: None,
            separator: None,
            tokenizer: None,
            vocab: 2048,
            sequence: 256,
            batch: 8,
            order: Order::default(),
        }
    }
}

impl Default for OptimizerSection {
    fn default() -> OptimizerSection {
        OptimizerSection {
            learning_rate: 1e-3,
            gate_learning_rate: None,
            betas: [0.9, 0.95],
            epsilon: 1e-8,
            weight_decay: 0.1,
            clip: 1.0,
        }
    }
}

impl Default for ScheduleSection {
    fn default() -> ScheduleSection {
        ScheduleSection { kind: Kind::Cosine, steps: 1000, warmup: None, decay: None, last: 0.1 }
    }
}

impl Default for TrainSection {
    fn default() -> TrainSection {
        TrainSection {
            seed: 1,
            objective: Objective::default(),
            mask_share: 0.15,
            accumulate: 1,
            pieces: None,
            precision: Precision::default(),
            dropout: 0.0,
            smoothing: 0.0,
            recompute: false,
            evaluate_every: 100,
            evaluate_batches: 20,
            sample_every: 0,
            sample_tokens: 100,
            prompt: String::new(),
            checkpoint_every: 200,
            patience: 0,
        }
    }
}

impl Config {
    /// Reads a configuration, and settings of the form `section.key=value` over it. Paths that are not absolute begin in
    /// `folder`.
    ///
    /// # Errors
    ///
    /// [`Error::Toml`] and [`Error::Setting`] for what can't be read, [`Error::Config`] for values that make no sense.
    pub fn parse(text: &str, settings: &[String], folder: &Path) -> Result<Config, Error> {
        let mut table: Table = toml::from_str(text).map_err(|error| toml_error(&error))?;
        settings.iter().try_for_each(|setting| set(&mut table, setting))?;
        let mut config: Config =
            Value::Table(table).try_into().map_err(|error| toml_error(&error))?;
        config.anchor(folder);
        config.check()?;
        Ok(config)
    }

    /// The same as text, which [`Config::parse`] reads.
    ///
    /// # Errors
    ///
    /// [`Error::Toml`] for paths that are no text.
    pub fn to_text(&self) -> Result<String, Error> {
        toml::to_string(self).map_err(|error| Error::Toml { reason: error.to_string() })
    }

    /// Makes paths independent of where the process is.
    fn anchor(&mut self, folder: &Path) {
        let anchor = |path: &mut PathBuf| *path = folder.join(&path);
        let DataSection { train, validation, tokenizer, .. } = &mut self.data;
        train.iter_mut().chain(validation).chain(&mut self.model.from).for_each(anchor);
        if let Some(path) = tokenizer
            && !matches!(path.as_str(), "bytes" | "bpe")
        {
            *path = folder.join(&*path).to_string_lossy().into_owned();
        }
    }

    fn check(&self) -> Result<(), Error> {
        self.model.check()?;
        self.check_pairs()?;
        let Config { data, optimizer, schedule, train, .. } = self;
        for (key, found, limit) in [
            ("data.vocab", data.vocab, 1 << 20),
            ("data.sequence", data.sequence, 1 << 20),
            ("data.batch", data.batch, 1 << 16),
            ("train.accumulate", train.accumulate, 1 << 16),
            ("train.pieces", train.pieces.unwrap_or(1), 1 << 16),
        ] {
            if found == 0 || found > limit {
                return Err(Error::config(key, found, format!("1 to {limit}")));
            }
        }
        if data.vocab < 257 {
            let expected = "257 at least: the bytes and an end token";
            return Err(Error::config("data.vocab", data.vocab, expected));
        }
        if train.objective == Objective::Masked && data.order == Order::Streams {
            let expected = "\"shuffled\" with train.objective = \"masked\"";
            return Err(Error::config("data.order", "\"streams\"", expected));
        }
        if schedule.steps == 0 {
            return Err(Error::config("schedule.steps", 0, "1 or more"));
        }
        if train.seed > i64::MAX as u64 {
            return Err(Error::config("train.seed", train.seed, "below 2^63"));
        }
        for (key, found, most) in [
            ("data.validation_share", data.validation_share, 0.5),
            ("optimizer.learning_rate", optimizer.learning_rate, 1e3),
            ("optimizer.gate_learning_rate", optimizer.gate_learning_rate(), 1e4),
            ("optimizer.weight_decay", optimizer.weight_decay, 1e3),
            ("optimizer.clip", optimizer.clip, f64::MAX),
            ("schedule.final", schedule.last, 1.0),
            ("train.mask_share", train.mask_share, 1.0),
        ] {
            if !(0.0..=most).contains(&found) {
                return Err(Error::config(key, found, format!("0 to {most}")));
            }
        }
        let below_one = [
            ("optimizer.betas", optimizer.betas[0]),
            ("optimizer.betas", optimizer.betas[1]),
            ("train.dropout", train.dropout),
            ("train.smoothing", train.smoothing),
        ];
        match below_one.into_iter().find(|(_, found)| !(0.0..1.0).contains(found)) {
            Some((key, found)) => Err(Error::config(key, found, "at least 0 and below 1")),
            None if optimizer.epsilon > 0.0 && optimizer.epsilon.is_finite() => Ok(()),
            None => Err(Error::config("optimizer.epsilon", optimizer.epsilon, "above 0")),
        }
    }
}

impl OptimizerSection {
    /// The highest learning rate of gates.
    pub fn gate_learning_rate(&self) -> f64 {
        self.gate_learning_rate.unwrap_or(10.0 * self.learning_rate)
    }
}

/// Puts a setting into its section.
fn set(table: &mut Table, setting: &str) -> Result<(), Error> {
    let wrong = || Error::Setting { found: setting.to_owned() };
    let (path, value) = setting.split_once('=').ok_or_else(wrong)?;
    let (section, key) = path.trim().split_once('.').ok_or_else(wrong)?;
    if section.is_empty() || key.is_empty() {
        return Err(wrong());
    }
    // What is no value of TOML is text, so that it needs no quotation marks in a shell.
    let parsed = toml::from_str::<Table>(&format!("value = {value}"));
    let value = parsed.ok().filter(|table| table.len() == 1).and_then(|mut t| t.remove("value"));
    let value = value.unwrap_or_else(|| Value::String(setting[path.len() + 1..].to_owned()));
    let entry = table.entry(section).or_insert_with(|| Value::Table(Table::new()));
    let fields = entry.as_table_mut().ok_or_else(wrong)?;
    fields.insert(key.to_owned(), value);
    Ok(())
}

/// A reader's message on one line.
fn toml_error(error: &toml::de::Error) -> Error {
    let text = error.to_string();
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    // Pictures of the place have a bar in them.
    let words = lines.filter(|line| !line.starts_with('|') && !line.contains(" | "));
    Error::Toml { reason: words.collect::<Vec<_>>().join(": ") }
}

#[cfg(test)]
mod tests;
