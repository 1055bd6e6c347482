//! What several processes compute together: sums in a fixed order, and exact attention over a sequence that is shared out.
//!
//! ```text
//! shift      each of W processes sends to the one n further on, and receives from the one n before
//! gather     W − 1 shifts of bytes
//! sum        g = g₀ + g₁ + … in the order of the parts: slice w of all parts goes to process w, which adds; sums go round
//! ring       keys and values go round; partial softmaxes are merged (module ring)
//! ```
//!
//! [`Processes`] is all that is asked of a transport. [`Alone`] is one process, [`Threads`] are processes that are threads of
//! one; `foveal-mpi` has those that MPI starts. A sum over the same parts has the same bits whatever the number of processes
//! that hold them.

#![forbid(unsafe_code)]

mod collective;
mod error;
mod ring;
mod share;
mod threads;

use std::fmt::Debug;

pub use collective::{all_gather, first_failure, same_everywhere, sum_parts};
pub use error::Error;
pub use ring::{RingAttention, RingGradients, RingResult};
pub use share::Share;
pub use threads::Threads;

/// Processes that work together, as one of them sees them.
///
/// Every process makes the same calls in the same order.
pub trait Processes: Debug + Send {
    /// This one's number, from 0.
    fn rank(&self) -> usize;

    /// How many there are.
    fn count(&self) -> usize;

    /// Sends `out` to the process `by` further on (after the last comes the first), and receives `into` from the one `by`
    /// before, which sends as many numbers. Bits arrive as they are.
    ///
    /// # Errors
    /// [`Error::Gone`], [`Error::MessageLength`].
    fn shift(&self, by: usize, out: &[f32], into: &mut [f32]) -> Result<(), Error>;

    /// The same with bytes.
    ///
    /// # Errors
    /// Those of [`Processes::shift`].
    fn shift_bytes(&self, by: usize, out: &[u8], into: &mut [u8]) -> Result<(), Error>;
}

/// One process.
#[derive(Clone, Copy, Debug, Default)]
pub struct Alone;

impl Processes for Alone {
    fn rank(&self) -> usize {
        0
    }

    fn count(&self) -> usize {
        1
    }

    fn shift(&self, _by: usize, out: &[f32], into: &mut [f32]) -> Result<(), Error> {
        Error::check_length(0, into.len(), out.len())?;
        into.copy_from_slice(out);
        Ok(())
    }

    fn shift_bytes(&self, _by: usize, out: &[u8], into: &mut [u8]) -> Result<(), Error> {
        Error::check_length(0, into.len(), out.len())?;
        into.copy_from_slice(out);
        Ok(())
    }
}

/// The process `by` before `rank`.
fn before(processes: &dyn Processes, by: usize) -> usize {
    let count = processes.count();
    (processes.rank() + count - by % count) % count
}
