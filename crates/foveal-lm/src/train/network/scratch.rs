//! Memory of training steps, kept from one to the next.
//!
//! Activations of a step are as large as those of the one before: buffers are handed out and taken back, so that no step but
//! the first asks the system for memory (a fresh page costs more than most operations on it).

use foveal::position::RopeTable;
use foveal::projection::Activations;
use foveal::{Cpu, Workspace};

use super::Precision;
use super::tools::Tools;

/// What a step writes to besides gradients. Steps of one network, one at a time, share one.
#[derive(Debug, Default)]
pub struct Scratch {
    workspace: Workspace,
    pool: Pool,
    rotations: Vec<RopeTable>,
}

impl Scratch {
    /// No memory yet.
    pub fn new() -> Scratch {
        Scratch::default()
    }

    /// The most bytes of activations that were in use at any moment.
    pub fn peak_bytes(&self) -> usize {
        self.pool.peak * size_of::<f32>()
    }

    /// Tools for a pass, and the place of its rotations.
    pub(super) fn begin(
        &mut self,
        cpu: Cpu,
        precision: Precision,
    ) -> (Tools<'_>, &mut Vec<RopeTable>) {
        let Scratch { workspace, pool, rotations } = self;
        pool.forget_lent();
        let activations = match precision {
            Precision::F32 => Activations::F32,
            Precision::Bf16 => Activations::Bf16,
        };
        (Tools { cpu, activations, workspace, pool }, rotations)
    }

    /// From now on buffers are handed out full of NaN, so that a test sees what is read without having been written.
    #[doc(hidden)]
    pub fn poison(&mut self) {
        self.workspace.poison();
        self.pool.poisoned = true;
    }
}

/// Buffers that are free.
#[derive(Debug, Default)]
pub(crate) struct Pool {
    free: Vec<Vec<f32>>,
    /// Numbers that are handed out.
    lent: usize,
    peak: usize,
    poisoned: bool,
}

impl Pool {
    /// A buffer of `len` numbers that mean nothing.
    pub(crate) fn take(&mut self, len: usize) -> Vec<f32> {
        self.lent += len;
        self.peak = self.peak.max(self.lent);
        let fits = |buffer: &Vec<f32>| {
            buffer.capacity() >= len && buffer.capacity() <= len.saturating_mul(2).max(1024)
        };
        let all = self.free.iter().enumerate().filter(|(_, buffer)| fits(buffer));
        let best = all.min_by_key(|(_, buffer)| buffer.capacity()).map(|(n, _)| n);
        let mut buffer = best.map_or_else(Vec::new, |n| self.free.swap_remove(n));
        buffer.reserve_exact(len.saturating_sub(buffer.len()));
        buffer.resize(len, 0.0);
        if self.poisoned {
            buffer.fill(f32::NAN);
        }
        buffer
    }

    /// A buffer of `len` zeros.
    pub(crate) fn zeros(&mut self, len: usize) -> Vec<f32> {
        let mut buffer = self.take(len);
        buffer.fill(0.0);
        buffer
    }

    /// A copy.
    pub(crate) fn copy(&mut self, x: &[f32]) -> Vec<f32> {
        let mut buffer = self.take(x.len());
        buffer.copy_from_slice(x);
        buffer
    }

    /// Takes a buffer back that [`Pool::take`] handed out and nobody has resized.
    pub(crate) fn give(&mut self, buffer: Vec<f32>) {
        self.lent = self.lent.saturating_sub(buffer.len());
        if buffer.capacity() > 0 {
            self.free.push(buffer);
        }
    }

    /// Counts nothing as handed out: a call that failed has dropped its buffers.
    fn forget_lent(&mut self) {
        self.lent = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::Pool;

    #[test]
    fn buffers_come_back_and_are_counted() {
        let mut pool = Pool::default();
        let (a, b) = (pool.take(100), pool.zeros(2000));
        assert_eq!((a.len(), pool.lent, pool.peak), (100, 2100, 2100));
        assert!(b.iter().all(|&x| x == 0.0));
        let place = b.as_ptr();
        pool.give(b);
        assert_eq!((pool.lent, pool.peak), (100, 2100));
        // Far too large for so few numbers.
        assert_eq!(pool.take(10).capacity(), 10);
        let again = pool.take(1500);
        assert_eq!(again.as_ptr(), place);
        pool.poisoned = true;
        pool.give(a);
        assert!(pool.take(100).iter().all(|x| x.is_nan()));
        assert_eq!(pool.copy(&[1.0, 2.0]), [1.0, 2.0]);
    }
}
