//! The options that all commands with a model share: which one, on how many threads.

use std::path::{Path, PathBuf};

use anyhow::Context;
use foveal_lm::Model;
use foveal_lm::config::ModelConfig;
use foveal_lm::tokenizer::Tokenizer;
use foveal_lm::weights::Weights;

use crate::compute::ComputeArguments;
use crate::{interrupt, source};

/// A model, and what runs it.
#[derive(Debug, clap::Args)]
pub(crate) struct ModelArguments {
    /// A GGUF file, or a folder with config.json, safetensors and tokenizer.json; the built-in model if left out.
    #[arg(long, short, value_name = "FILE|DIR")]
    pub(crate) model: Option<PathBuf>,

    #[command(flatten)]
    compute: ComputeArguments,
}

/// An open model.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) weights: Weights,
    pub(crate) model: Model,
    pub(crate) tokenizer: Tokenizer,
}

impl ModelArguments {
    pub(crate) fn path(&self) -> Option<&Path> {
        self.model.as_deref()
    }

    /// Opens the model and works with it on the threads asked for; Ctrl-C asks from here on.
    pub(crate) fn run(
        &self,
        work: impl FnOnce(&Session) -> anyhow::Result<()> + Send,
    ) -> anyhow::Result<()> {
        self.run_as(Ok, work)
    }

    /// The same, with a description of the model that `change` makes of the file's.
    pub(crate) fn run_as(
        &self,
        change: impl FnOnce(ModelConfig) -> Result<ModelConfig, foveal_lm::Error> + Send,
        work: impl FnOnce(&Session) -> anyhow::Result<()> + Send,
    ) -> anyhow::Result<()> {
        interrupt::catch();
        self.compute.install(|| work(&self.open(change)?))
    }

    fn open(
        &self,
        change: impl FnOnce(ModelConfig) -> Result<ModelConfig, foveal_lm::Error>,
    ) -> anyhow::Result<Session> {
        let path = self.path();
        let weights = source::open(path)?;
        let config = ModelConfig::read(&weights).and_then(change);
        let model = config.and_then(|config| Model::assembled(&weights, config));
        let model = model.with_context(|| format!("cannot run {}", source::name(path)))?;
        let model = self.compute.apply(model);
        let tokenizer = source::tokenizer(path, &weights)?;
        Ok(Session { weights, model, tokenizer })
    }
}
