//! One attention trained: the same tokens in the same order as the others, and as many parameters.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use foveal_lm::config::ModelConfig;
use foveal_lm::train::config::{
    DataSection, ModelSection, OptimizerSection, ScheduleSection, TrainSection,
};
use foveal_lm::train::{Config, End, Event, METRICS, Parameters, Trainer, begin, run as run_all};
use serde_json::Value;

use super::contender::{Contender, Sizes};
use super::figures::Figures;
use super::{measure, write};
use crate::interrupt;
use crate::progress::Progress;

/// The share of a text that no model is trained on: its end.
const HELD_OUT: usize = 10;
/// Sequences of a step.
const BATCH: usize = 8;
/// Tokens of the vocabulary: byte pairs of the text.
const VOCAB: usize = 1024;
/// What a model keeps of its losses.
const LOSSES: usize = 200;

/// How much training each gets.
#[derive(Clone, Copy, Debug)]
pub(super) struct Budget {
    pub(super) sizes: Sizes,
    pub(super) steps: u64,
}

impl Budget {
    /// Tokens of a run.
    pub(super) fn tokens(&self) -> u64 {
        self.steps * (self.sizes.sequence * BATCH) as u64
    }
}

/// A text in two parts: files of the folder.
#[derive(Debug)]
pub(super) struct Text {
    train: PathBuf,
    held_out: PathBuf,
    /// The part that is not trained on.
    pub(super) end: String,
}

impl Text {
    /// Cuts a text before its last tenth, at the end of a line.
    pub(super) fn split(path: Option<&Path>, builtin: &str, out: &Path) -> anyhow::Result<Text> {
        let text = match path {
            None => builtin.to_owned(),
            Some(path) => read(path)?,
        };
        let cut = text.floor_char_boundary(text.len() - text.len() / HELD_OUT);
        let cut = text[cut..].find('\n').map_or(cut, |at| cut + at + 1);
        let (train, end) = text.split_at(cut);
        ensure!(
            end.len() >= 4096,
            "the text has {} bytes, too few to keep a tenth of it back; give one of 40 KiB or more",
            text.len()
        );
        let [first, last] = ["train.txt", "held-out.txt"].map(|name| out.join(name));
        write(&first, train)?;
        write(&last, end)?;
        let here = std::env::current_dir().context("cannot tell the current folder")?;
        let end = end.to_owned();
        Ok(Text { train: here.join(first), held_out: here.join(last), end })
    }
}

/// A text file, or the text files of a folder by name.
fn read(path: &Path) -> anyhow::Result<String> {
    let wrong = || format!("cannot read {}", path.display());
    if !path.is_dir() {
        return std::fs::read_to_string(path).with_context(wrong);
    }
    let mut files = std::fs::read_dir(path)
        .with_context(wrong)?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<Result<Vec<_>, _>>()
        .with_context(wrong)?;
    let ending = |path: &PathBuf| path.extension().is_some_and(|e| e == "txt" || e == "md");
    files.retain(|path| path.is_file() && ending(path));
    files.sort();
    if files.is_empty() {
        bail!("{} has no file that ends with .txt or .md", path.display());
    }
    files.iter().map(|file| read(file)).collect()
}

/// Trains and measures, or reads what was measured before.
pub(super) fn figures(
    contender: &Contender,
    budget: &Budget,
    (text, out): (&Text, &Path),
) -> anyhow::Result<Figures> {
    let folder = out.join(&contender.name);
    let config = config(contender, budget, text)?;
    let settings = config.to_text()?;
    let kept = folder.join("figures.json");
    if let Ok(known) = std::fs::read_to_string(&kept)
        && let Ok(known) = serde_json::from_str::<Figures>(&known)
        && known.settings == settings
    {
        return Ok(known);
    }
    let trained = train(config, &settings, &folder)
        .with_context(|| format!("cannot train {}", contender.name))?;
    let model = foveal_lm::Model::load(&folder)?;
    let longest = match contender.ends_with_context() {
        true => budget.sizes.sequence,
        false => 4 * budget.sizes.sequence,
    };
    let figures = Figures {
        name: contender.name.clone(),
        settings,
        quality: measure::quality(&model, &folder, (&text.end, longest))?,
        speed: measure::speed(&model, longest)?,
        ..trained
    };
    write(&kept, &serde_json::to_string_pretty(&figures)?)?;
    Ok(figures)
}

/// What is trained.
fn config(contender: &Contender, budget: &Budget, text: &Text) -> anyhow::Result<Config> {
    let Sizes { width, layers, heads, sequence } = budget.sizes;
    let mixer = contender.mixer.as_ref().map(toml::Value::try_from).transpose();
    let model = ModelSection {
        layers,
        width,
        heads,
        kv_heads: Some(contender.kv_heads),
        mixer: mixer.with_context(|| format!("the mixer of {}", contender.name))?,
        ..ModelSection::default()
    };
    let feed_forward = feed_forward(&model, budget)
        .with_context(|| format!("cannot make a model of {}", contender.name))?;
    let config = Config {
        model: ModelSection { feed_forward: Some(feed_forward), ..model },
        data: DataSection {
            train: vec![text.train.clone()],
            validation: vec![text.held_out.clone()],
            tokenizer: Some("bpe".to_owned()),
            vocab: VOCAB,
            sequence,
            batch: BATCH,
            ..DataSection::default()
        },
        optimizer: OptimizerSection { learning_rate: 3e-3, ..OptimizerSection::default() },
        schedule: ScheduleSection { steps: budget.steps, ..ScheduleSection::default() },
        train: TrainSection { evaluate_every: 0, checkpoint_every: 100, ..TrainSection::default() },
    };
    // What was put together is checked as a file would be.
    Ok(Config::parse(&config.to_text()?, &[], Path::new(""))?)
}

/// The inner width with which a model has as many parameters as one with attention to all and the usual width.
fn feed_forward(model: &ModelSection, budget: &Budget) -> anyhow::Result<usize> {
    let count = |model: &ModelSection| -> anyhow::Result<usize> {
        let config = ModelConfig::from_json(&model.to_json(VOCAB, budget.sizes.sequence)?)?;
        Ok(Parameters::initial(&config, 1)?.values().len())
    };
    let usual = (8 * model.width).div_ceil(3).next_multiple_of(32);
    let plain = ModelSection { mixer: None, kv_heads: None, ..model.clone() };
    let wanted = count(&ModelSection { feed_forward: Some(usual), ..plain })? as f64;
    let found = count(&ModelSection { feed_forward: Some(usual), ..model.clone() })? as f64;
    let each = (3 * model.width * model.layers) as f64;
    let inner = usual as f64 + (wanted - found) / each;
    let inner = (inner / 8.0).round() * 8.0;
    ensure!(
        inner >= 8.0,
        "it has {found} parameters without its feed-forward layers, more than the {wanted} of the others"
    );
    Ok(inner as usize)
}

/// Trains, or goes on; what was measured on the way.
fn train(config: Config, settings: &str, folder: &Path) -> anyhow::Result<Figures> {
    let known = std::fs::read_to_string(folder.join(foveal_lm::train::CONFIG));
    let mut trainer = match known {
        Ok(known) if known == settings => Trainer::resume(folder, &[], None)?,
        Ok(_) => bail!(
            "{} has a model of other settings; give another folder with --out",
            folder.display()
        ),
        Err(_) => {
            let trainer = Trainer::new(config, None)?;
            begin(&trainer, folder)?;
            trainer
        }
    };
    let total = trainer.config().schedule.steps as usize * trainer.config().data.sequence * BATCH;
    let mut progress = Progress::new("trained", total);
    let end = run_all(&mut trainer, folder, &mut |trainer, event| {
        if let Event::Step(_) = event {
            progress.show(trainer.state().tokens as usize);
        }
        if interrupt::asked() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })?;
    if end == End::Interrupted {
        return Err(foveal_lm::Error::Interrupted.into());
    }
    drop(progress);
    let metrics = std::fs::read_to_string(folder.join(METRICS)).context("the measurements")?;
    let parameters = trainer.parameters().values().len();
    let (losses, train_tokens_per_second) = measured(&metrics)?;
    Ok(Figures {
        name: String::new(),
        settings: String::new(),
        sequence: trainer.config().data.sequence,
        parameters,
        tokens: trainer.state().tokens,
        train_tokens_per_second,
        // Parameters, their gradients, and two moments of each.
        train_bytes: Some(trainer.activation_bytes())
            .filter(|&bytes| bytes > 0)
            .map(|bytes| bytes + 4 * parameters * size_of::<f32>()),
        losses,
        quality: vec![],
        speed: vec![],
    })
}

/// Losses over tokens, and tokens a second of the step in the middle.
fn measured(metrics: &str) -> anyhow::Result<(Vec<(f64, f64)>, f64)> {
    let (mut tokens, mut losses, mut paces) = (0.0, vec![], vec![]);
    for line in metrics.lines() {
        let record: Value = serde_json::from_str(line).context("a measurement is no JSON")?;
        let field = |name: &str| record.get(name).and_then(Value::as_f64);
        if let (Some(loss), Some(count), Some(seconds)) =
            (field("loss"), field("tokens"), field("seconds"))
        {
            tokens += count;
            losses.push((tokens, loss));
            paces.push(count / seconds.max(1e-9));
        }
    }
    paces.sort_by(f64::total_cmp);
    let size = losses.len().div_ceil(LOSSES).max(1);
    let mean = |part: &[(f64, f64)]| {
        let n = part.len() as f64;
        let sum = part.iter().fold((0.0, 0.0), |sum, one| (sum.0 + one.0, sum.1 + one.1));
        (sum.0 / n, sum.1 / n)
    };
    let middle = paces.get(paces.len() / 2).copied().unwrap_or(0.0);
    Ok((losses.chunks(size).map(mean).collect(), middle))
}
