//! Where a command keeps memories of a text that grow with it.

use std::path::PathBuf;

use foveal_lm::model::{MemoryFolder, State};

use crate::output;
use crate::session::Session;

/// Memories of layers that remember a document's past.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Memory")]
pub(crate) struct MemoryArguments {
    /// Keep the entries that memorizing layers remember in files of this folder, mapped into memory: they may be more than there
    /// is RAM, and are found again by the next run. With --kv-cache q8 or q4 they are searched as codes of 8 bits.
    #[arg(long, value_name = "DIR")]
    memory: Option<PathBuf>,
}

impl MemoryArguments {
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
