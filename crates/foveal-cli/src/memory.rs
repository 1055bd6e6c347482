//! Where a command keeps memories of a text that grow with it.

use std::path::PathBuf;

use foveal_lm::config::ModelConfig;
use foveal_lm::model::{MemoryFolder, State};

use crate::session::Session;
use crate::{numbers, output};

/// Memories of layers that remember a document's past.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Memory")]
pub(crate) struct MemoryArguments {
    /// Keep the entries that memorizing layers remember in files of this folder, mapped into memory: they may be more than there
    /// is RAM, and are found again by the next run. With --kv-cache q8 or q4 they are searched as codes of 8 bits.
    #[arg(long, value_name = "DIR")]
    memory: Option<PathBuf>,

    /// Tokens before a segment that layers of transformer_xl see, in place of those that they were trained with.
    #[arg(long, value_name = "N", value_parser = numbers::tokens)]
    xl_memory: Option<usize>,

    /// The distance that tokens further away count as for layers of transformer_xl: those of training, if memories are longer.
    #[arg(long, value_name = "N", value_parser = numbers::tokens)]
    xl_clamp: Option<usize>,
}

impl MemoryArguments {
    /// The description of a model with memories as long as was asked for.
    pub(crate) fn change(&self, config: ModelConfig) -> Result<ModelConfig, foveal_lm::Error> {
        match (self.xl_memory, self.xl_clamp) {
            (None, None) => Ok(config),
            (memory, clamp) => config.with_xl_memory(memory, clamp),
        }
    }

    /// The folder, if one was named.
    pub(crate) fn folder(&self, session: &Session) -> Option<MemoryFolder> {
        let path = self.memory.as_ref()?;
        Some(MemoryFolder::new(path, &session.model, &session.weights))
    }

    /// Keeps the memories of a state in it.
    pub(crate) fn keep(&self, state: &mut State, session: &Session) -> anyhow::Result<()> {
        let Some(folder) = self.folder(session) else { return Ok(()) };
        let found = state.keep_memories_in(&folder)?;
        if found > 0 {
            output::note(&format!("foveal: {found} tokens of earlier texts are remembered"));
        }
        Ok(())
    }
}
