//! What of a model's state goes to a file, and a state made of it again.

use super::{MemoryFolder, Model, State};
use crate::Error;
use crate::mixer::{CacheOptions, LayerState};

impl Model {
    /// What besides weights and options the bits of a state depend on.
    pub(crate) fn arithmetic(&self) -> String {
        let version = env!("CARGO_PKG_VERSION");
        format!("foveal {version}, {}, activations {}", self.cpu.level, self.activations.name())
    }

    /// A state of a text of `position` tokens, whose layers `fill` has filled; `None` if these do not hold what they would
    /// hold of such a text.
    pub(crate) fn resumed(
        &self,
        (options, memories): (&CacheOptions, Option<&MemoryFolder>),
        position: usize,
        mut fill: impl FnMut(usize, &mut LayerState) -> Result<(), Error>,
    ) -> Result<Option<State>, Error> {
        let mut state = self.state_with(options)?;
        if let Some(folder) = memories {
            state.keep_memories_in(folder)?;
        }
        for (n, (block, layer)) in self.blocks.iter().zip(&mut state.layers).enumerate() {
            fill(n, layer)?;
            if !block.mixer.is_at(layer, position) {
                return Ok(None);
            }
        }
        state.position = position;
        Ok(Some(state))
    }
}

impl State {
    /// What each layer holds.
    pub(crate) fn layers(&self) -> &[LayerState] {
        &self.layers
    }

    /// How it was made.
    pub(crate) fn options(&self) -> &CacheOptions {
        &self.options
    }
}
