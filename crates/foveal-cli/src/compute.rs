//! What of the machine a command uses: options that all commands with a model share.

use std::num::NonZeroUsize;

use anyhow::Context;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use foveal::projection::Activations;
use foveal_lm::Model;

use crate::numbers;

/// Threads and instructions.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Speed")]
pub(crate) struct ComputeArguments {
    /// Threads to use; all processors if left out. The results do not depend on it.
    #[arg(long, value_name = "N", value_parser = numbers::threads)]
    threads: Option<NonZeroUsize>,

    /// What to round activations to before they meet the weights, where the processor has instructions for it: prompts to
    /// bf16, with int8 also those of generated tokens to 8-bit integers.
    #[arg(long, value_name = "TYPE", default_value = "bf16", value_parser = activations())]
    activations: Activations,
}

fn activations() -> impl TypedValueParser<Value = Activations> {
    let names = PossibleValuesParser::new(Activations::ALL.map(Activations::name));
    names.map(|name| Activations::named(&name).unwrap_or_default())
}

/// Runs `work` on so many threads; on all processors for `None`.
pub(crate) fn with_threads<T: Send>(
    threads: Option<NonZeroUsize>,
    work: impl FnOnce() -> anyhow::Result<T> + Send,
) -> anyhow::Result<T> {
    let threads = threads.map_or(0, NonZeroUsize::get);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
    let pool = pool.context("cannot start the threads; ask for fewer with --threads")?;
    pool.install(work)
}

impl ComputeArguments {
    /// Runs `work` on so many threads.
    pub(crate) fn install<T: Send>(
        &self,
        work: impl FnOnce() -> anyhow::Result<T> + Send,
    ) -> anyhow::Result<T> {
        with_threads(self.threads, work)
    }

    /// The model as it is to run.
    pub(crate) fn apply(&self, model: Model) -> Model {
        model.with_activations(self.activations)
    }
}
