//! Small models of bytes, trained on the built-in novel but for its last tenth.

use std::path::{Path, PathBuf};

use foveal_lm::Model;
use foveal_lm::evaluate::token_nll;
use foveal_lm::train::config::{
    DataSection, ModelSection, OptimizerSection, ScheduleSection, TrainSection,
};
use foveal_lm::train::{Config, Trainer};
use serde_json::Value;

use super::cell::Cell;
use crate::{interrupt, train};

/// The share of the novel that no model is trained on.
pub(super) const HELD_OUT: f64 = 0.1;

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

    /// Another mixer for the model in it.
    pub(super) fn set_mixer(&self, mixer: &Value) -> anyhow::Result<()> {
        let path = self.0.join("config.json");
        let mut config: Value = serde_json::from_slice(&std::fs::read(&path)?)?;
        config["foveal"]["mixer"] = mixer.clone();
        Ok(std::fs::write(&path, config.to_string())?)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// What is trained, with so many key/value heads and a mixer: sizes, steps and seed from a cell (`layers`, `width`, `heads`, `tokens`, `batch`, `steps`, `rate`, `seed`).
pub(super) fn config(
    cell: &Cell,
    (kv_heads, mixer): (usize, Option<&Value>),
) -> anyhow::Result<Config> {
    let (heads, width) = (cell.count("heads")?, cell.count("width")?);
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

/// The first of the bytes that no model is trained on.
pub(super) fn held_out(count: usize) -> Vec<u32> {
    let bytes = train::TEXT.as_bytes();
    let share = (bytes.len() as f64 * HELD_OUT) as usize;
    bytes[bytes.len() - share..].iter().take(count).map(|&byte| u32::from(byte)).collect()
}

/// Bits a token, each of the texts of `length` tokens with a state of its own.
pub(super) fn bits_a_token(model: &Model, tokens: &[u32], length: usize) -> anyhow::Result<f64> {
    let (mut sum, mut count) = (0.0, 0);
    let mut state = model.state()?;
    for text in tokens.chunks_exact(length) {
        state.reset();
        let nll = token_nll(model, text, &mut state, &mut |_| interrupt::flow())?;
        sum += nll.iter().map(|&nll| f64::from(nll)).sum::<f64>();
        count += nll.len();
    }
    anyhow::ensure!(count > 0, "no text of {length} tokens is held out");
    Ok(sum / std::f64::consts::LN_2 / count as f64)
}
