//! Small models of bytes, trained on the built-in novel but for its last tenth.

use std::path::{Path, PathBuf};

use foveal_lm::Model;
use foveal_lm::evaluate::token_nll;
use foveal_lm::mixer::CacheOptions;
use foveal_lm::train::config::{
    DataSection, ModelSection, OptimizerSection, ScheduleSection, TrainSection,
};
use foveal_lm::train::{Config, Trainer};

use super::cell::Cell;
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
pub(super) fn config(cell: &Cell) -> anyhow::Result<Config> {
    let width = cell.count("width")?;
    Ok(Config {
        model: ModelSection {
            layers: cell.count("layers")?,
            width,
            heads: cell.count("heads")?,
            feed_forward: Some(2 * width),
            ..ModelSection::default()
        },
        data: DataSection {
            validation_share: HELD_OUT,
            tokenizer: Some("bytes".to_owned()),
            sequence: cell.count("tokens")?,
            batch: cell.count("batch")?,
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

/// Takes all steps and writes the model into `folder`.
pub(super) fn trained(config: Config, folder: &Path) -> anyhow::Result<()> {
    let steps = config.schedule.steps;
    let mut trainer = Trainer::new(config, Some(train::TEXT))?;
    for _ in 0..steps {
        trainer.step()?;
        if interrupt::asked() {
            return Err(foveal_lm::Error::Interrupted.into());
        }
    }
    Ok(trainer.export(folder)?)
}

/// The first of the bytes that no model is trained on.
pub(super) fn held_out(count: usize) -> Vec<u32> {
    let bytes = train::TEXT.as_bytes();
    let share = (bytes.len() as f64 * HELD_OUT) as usize;
    bytes[bytes.len() - share..].iter().take(count).map(|&byte| u32::from(byte)).collect()
}

/// Bits a token of a text from place `from` on, with keys and values kept as `options` say.
pub(super) fn bits_a_token(
    model: &Model,
    (text, from): (&[u32], usize),
    options: &CacheOptions,
) -> anyhow::Result<f64> {
    let mut state = model.state_with(options)?;
    let nll = token_nll(model, text, &mut state, &mut |_| interrupt::flow())?;
    // The first token is predicted by nothing.
    let own = nll.get(from.saturating_sub(1)..).unwrap_or(&[]);
    anyhow::ensure!(!own.is_empty(), "a text of {} tokens, to be read from {from} on", text.len());
    let sum = own.iter().map(|&nll| f64::from(nll)).sum::<f64>();
    Ok(sum / std::f64::consts::LN_2 / own.len() as f64)
}
