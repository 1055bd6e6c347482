//! The processes that a run has: one, or those that `mpirun` has started.

use foveal_processes::{Alone, Processes};

/// How those that start processes say how many there are: Open MPI, and MPICH with its relatives.
const COUNTS: [&str; 2] = ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"];

/// How many processes were started together.
fn started() -> usize {
    let count = |name: &&str| std::env::var(name).ok()?.parse().ok();
    COUNTS.iter().find_map(count).unwrap_or(1)
}

/// This process among those that were started together.
#[cfg(feature = "mpi")]
pub(super) fn all() -> anyhow::Result<Box<dyn Processes>> {
    match started() {
        0 | 1 => Ok(Box::new(Alone)),
        _ => Ok(Box::new(foveal_mpi::Mpi::start()?)),
    }
}

/// This process, which must be the only one: others would write to the same folder.
#[cfg(not(feature = "mpi"))]
pub(super) fn all() -> anyhow::Result<Box<dyn Processes>> {
    match started() {
        0 | 1 => Ok(Box::new(Alone)),
        count => anyhow::bail!(
            "{count} processes were started together, and this program was built for one; build it with --features mpi"
        ),
    }
}
