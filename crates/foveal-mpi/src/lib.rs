//! Processes that MPI starts and connects (`Mpi`), with the feature `mpi`. Without it the crate is empty, and nothing of MPI
//! has to be installed.
//!
//! ```text
//! mpirun -n W PROGRAM        shift by n: MPI_Sendrecv to rank + n, from rank − n, in messages of at most 2^28 bytes
//! ```

#![forbid(unsafe_code)]
#![cfg(feature = "mpi")]

use std::fmt;

use foveal_processes::{Error, Processes};
use mpi::Threading;
use mpi::environment::Universe;
use mpi::point_to_point::send_receive_into;
use mpi::topology::SimpleCommunicator;
use mpi::traits::{Communicator, Equivalence};

/// Bytes of one message: MPI counts elements in 32 bits.
const MOST: usize = 1 << 28;

/// One of the processes that `mpirun` started. There is one of these in a process; its end ends MPI.
pub struct Mpi {
    rank: usize,
    count: usize,
    _universe: Universe,
}

impl Mpi {
    /// Joins the others. All that follows may be called from any thread, from one at a time.
    ///
    /// # Errors
    /// [`Error::Transport`] if MPI was started before, or can't be called from a thread other than the first.
    pub fn start() -> Result<Mpi, Error> {
        let wrong = |reason: &str| Error::Transport { reason: reason.to_owned() };
        let Some((universe, threading)) = mpi::initialize_with_threading(Threading::Serialized)
        else {
            return Err(wrong("MPI has been started before in this process"));
        };
        let world = universe.world();
        let (rank, count) = (world.rank() as usize, world.size() as usize);
        if threading < Threading::Serialized {
            return Err(wrong("this MPI library works on the first thread only; use another"));
        }
        Ok(Mpi { rank, count, _universe: universe })
    }

    fn exchange<T: Equivalence + Copy>(
        &self,
        by: usize,
        out: &[T],
        into: &mut [T],
    ) -> Result<(), Error> {
        let world = SimpleCommunicator::world();
        let to = (self.rank + by) % self.count;
        let from = (self.rank + self.count - by % self.count) % self.count;
        let (receiver, sender) =
            (world.process_at_rank(to as i32), world.process_at_rank(from as i32));
        // Both sides know how many messages there are from the longer of the two.
        let most = MOST / size_of::<T>().max(1);
        let mut lengths = [0u64; 1];
        send_receive_into(&[out.len() as u64][..], &receiver, &mut lengths[..], &sender);
        let coming = lengths[0] as usize;
        Error::check_length(from, into.len(), coming)?;
        let messages = out.len().max(into.len()).div_ceil(most);
        for n in 0..messages {
            let piece = |len: usize| (n * most).min(len)..((n + 1) * most).min(len);
            let (sent, place) = (&out[piece(out.len())], piece(into.len()));
            send_receive_into(sent, &receiver, &mut into[place], &sender);
        }
        Ok(())
    }
}

impl fmt::Debug for Mpi {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mpi").field("rank", &self.rank).field("count", &self.count).finish()
    }
}

impl Processes for Mpi {
    fn rank(&self) -> usize {
        self.rank
    }

    fn count(&self) -> usize {
        self.count
    }

    fn shift(&self, by: usize, out: &[f32], into: &mut [f32]) -> Result<(), Error> {
        self.exchange(by, out, into)
    }

    fn shift_bytes(&self, by: usize, out: &[u8], into: &mut [u8]) -> Result<(), Error> {
        self.exchange(by, out, into)
    }
}

impl Drop for Mpi {
    fn drop(&mut self) {
        // The others would wait for one that is gone.
        if std::thread::panicking() {
            SimpleCommunicator::world().abort(1);
        }
    }
}
