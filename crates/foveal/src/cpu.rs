//! What a call may use of the machine, and which of its two phases it belongs to.

use crate::error::Result;
use crate::parallel::{Threads, for_each_item};
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

    /// Runs `work` on every item, each once, in any order, on the threads of the call: rows of a tensor in pieces whose
    /// borders depend on the tensor alone, so that no result depends on the threads.
    ///
    /// ```
    /// use foveal::Cpu;
    ///
    /// let mut x = [1.0, 2.0, 3.0];
    /// Cpu::detect()?.for_each(x.chunks_mut(2), |piece| piece.iter_mut().for_each(|x| *x *= 2.0));
    /// assert_eq!(x, [2.0, 4.0, 6.0]);
    /// # Ok::<(), foveal::Error>(())
    /// ```
    pub fn for_each<I>(self, items: I, work: impl Fn(I::Item) + Sync)
    where
        I: Iterator<Item: Send> + Send,
    {
        let threads = std::iter::repeat_n((), self.threads.count());
        for_each_item(items, threads, |item, ()| work(item));
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
