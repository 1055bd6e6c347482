//! Small models of bytes, trained on the built-in novel but for its last tenth.

use std::path::{Path, PathBuf};
use std::time::Instant;

use foveal_lm::Model;
use foveal_lm::evaluate::token_nll;
use foveal_lm::mixer::CacheOptions;
use foveal_lm::train::config::{
    DataSection, ModelSection, OptimizerSection, Order, ScheduleSection, TrainSection,
};
use foveal_lm::train::data::{Batches, Sequences, Tokens};
use foveal_lm::train::{Config, IGNORED, Trainer, Vocabulary};
use serde_json::Value;

use super::cell::Cell;
use super::learner::{Examples, Learner};
use crate::{interrupt, train};

/// The share of the novel that no model is trained on.
const HELD_OUT: f64 = 0.1;

/// A folder that is removed when it is done with.
pub(super) struct Folder(PathBuf);

impl Folder {
    pub(super) fn new(name: &str) -> anyhow::Result<Folder> {
        let name = format!("foveal-experiment-{}-{name}", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path)?;
        Ok(Folder(path))
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// What is trained: sizes, steps and seed from a cell (`layers`, `width`, `heads`, `tokens`, `batch`, `steps`, `rate`, `seed`).
pub(super) fn config(
    cell: &Cell,
    (kv_heads, mixer): (usize, Option<&Value>),
) -> anyhow::Result<Config> {
    let (heads, width) = (cell.count("heads")?, cell.count("width")?);
    let sequence = cell.count("tokens")?;
    let remembers = mixer.is_some_and(|mixer| mixer.to_string().contains("transformer_xl"));
    Ok(Config {
        model: ModelSection {
            layers: cell.count("layers")?,
            width,
            heads,
            kv_heads: Some(kv_heads),
            feed_forward: Some(2 * width),
            mixer: mixer.map(toml::Value::try_from).transpose()?,
            ..ModelSection::default()
        },
        data: DataSection {
            validation_share: HELD_OUT,
            tokenizer: Some("bytes".to_owned()),
            sequence,
            batch: cell.count("batch")?,
            order: if remembers { Order::Streams } else { Order::Shuffled },
            ..DataSection::default()
        },
        optimizer: OptimizerSection {
            learning_rate: cell.number("rate")?,
            ..OptimizerSection::default()
        },
        schedule: ScheduleSection {
            steps: cell.count("steps")? as u64,
            ..ScheduleSection::default()
        },
        train: TrainSection { seed: cell.seed()?, evaluate_every: 0, ..TrainSection::default() },
    })
}

/// Takes all steps and writes the model into `folder`; tokens a second.
pub(super) fn trained(config: Config, folder: &Path) -> anyhow::Result<f64> {
    let steps = config.schedule.steps;
    let mut trainer = Trainer::new(config, Some(train::TEXT))?;
    for _ in 0..steps {
        trainer.step()?;
        if interrupt::asked() {
            return Err(foveal_lm::Error::Interrupted.into());
        }
    }
    trainer.export(folder)?;
    Ok(trainer.state().tokens as f64 / trainer.state().seconds.max(1e-9))
}

/// The same of a recurrent model with as many parameters, on the same batches: bits per byte of `tokens` in texts of the cell's length, and tokens
/// a second.
pub(super) fn recurrent(cell: &Cell, tokens: &[u32]) -> anyhow::Result<[f64; 2]> {
    let (sequence, batch) = (cell.count("tokens")?, cell.count("batch")?);
    let vocabulary = Vocabulary::new("bytes", (0, false), &[])?;
    let mut text = Tokens::encode(&[train::TEXT.to_owned()], &vocabulary.tokenizer)?;
    let share = (text.len() as f64 * HELD_OUT) as usize;
    let _held_out = text.split_off(share);
    let data = DataSection { sequence, batch, ..DataSection::default() };
    let mut batches = Batches::new(text, &data, cell.seed()?, batch, "text to train on")?;
    let vocab = vocabulary.tokenizer.vocab_size();
    let mut learner = Learner::new(cell, "lstm", vocab)?;
    let start = Instant::now();
    learner.train(|| examples(batches.next(0..batch)))?;
    let seen = cell.count("steps")? * batch * sequence;
    let pace = seen as f64 / start.elapsed().as_secs_f64();
    let mut texts = Sequences::default();
    for text in tokens.chunks_exact(sequence) {
        texts.fresh.push(true);
        texts.tokens.extend(text);
        texts.targets.extend(&text[1..]);
        texts.targets.push(IGNORED);
    }
    Ok([learner.bits(&examples(texts))?, pace])
}

fn examples(sequences: Sequences) -> Examples {
    let Sequences { tokens, targets, fresh } = sequences;
    Examples { sequences: fresh.len(), tokens, targets }
}

/// The first of the bytes that no model is trained on.
pub(super) fn held_out(count: usize) -> Vec<u32> {
    let bytes = train::TEXT.as_bytes();
    let share = (bytes.len() as f64 * HELD_OUT) as usize;
    bytes[bytes.len() - share..].iter().take(count).map(|&byte| u32::from(byte)).collect()
}

/// Bits a token from place `from` on, cut into texts of `length` tokens, each with a state of its own.
pub(super) fn bits_a_token(
    model: &Model,
    tokens: &[u32],
    (length, from): (usize, usize),
    options: &CacheOptions,
) -> anyhow::Result<f64> {
    let (mut sum, mut count) = (0.0, 0);
    for text in tokens.chunks_exact(length) {
        let mut state = model.state_with(options)?;
        let nll = token_nll(model, text, &mut state, &mut |_| interrupt::flow())?;
        let own = &nll[from.saturating_sub(1).min(nll.len())..];
        sum += own.iter().map(|&nll| f64::from(nll)).sum::<f64>();
        count += own.len();
    }
    anyhow::ensure!(count > 0, "no text of {length} tokens is held out");
    Ok(sum / std::f64::consts::LN_2 / count as f64)
}
