//! What a call may use of the machine, and which of its two phases it belongs to.

use crate::error::Result;
use crate::parallel::Threads;
use crate::simd::Level;

/// The instructions and threads that a call may use.
///
/// Neither changes a result's dependence on its input: for one level, every thread count gives the
/// same bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cpu {
    /// Vector instructions.
    pub level: Level,
    /// Threads.
    pub threads: Threads,
}

impl Cpu {
    /// The fastest level, or the one that `FOVEAL_SIMD` names, and all threads of the current pool.
    ///
    /// # Errors
    /// [`crate::Error::SimdUnavailable`] if `FOVEAL_SIMD` names a level that is not here.
    pub fn detect() -> Result<Cpu> {
        Ok(Cpu { level: Level::detect()?, threads: Threads::all() })
    }
}

/// Which kernels a row takes. A row's bits depend on its phase, never on how many rows share the call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Phase {
    /// Tokens that are given, many at a time: tile kernels.
    #[default]
    Prompt,
    /// Tokens that are made one after the other, up to 64 rows a call (a batch, or speculation):
    /// row kernels, which read every key, value or weight once.
    Generated,
}

/// The most rows of one sequence (or of one projection) that the row kernels take in one call.
pub const MAX_GENERATED_ROWS: usize = 64;
