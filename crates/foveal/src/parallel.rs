//! Splitting work over threads without changing its result.
//!
//! Work comes as numbered parts whose boundaries depend on the problem alone; threads only pick
//! them up. With the feature `parallel` the threads are those of the current rayon pool.

use std::num::NonZeroUsize;

/// How many threads a call may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Threads(NonZeroUsize);

impl Threads {
    /// The calling thread alone.
    pub const ONE: Threads = Threads(NonZeroUsize::MIN);

    /// All threads of the current rayon pool; one without the feature `parallel`.
    pub fn all() -> Threads {
        #[cfg(feature = "parallel")]
        let n = rayon::current_num_threads();
        #[cfg(not(feature = "parallel"))]
        let n = 1;
        Threads(NonZeroUsize::new(n).unwrap_or(NonZeroUsize::MIN))
    }

    /// At most `n` threads; never more than [`Threads::all`] run at once.
    pub fn at_most(n: NonZeroUsize) -> Threads {
        Threads(n)
    }

    /// The number of threads.
    pub fn count(self) -> usize {
        self.0.get()
    }
}

/// Runs `work(part, scratch)` for every part in `0..parts`, each once, in any order, on as many threads
/// as `scratch` holds pieces of `piece` numbers.
pub(crate) fn for_each_part(
    parts: usize,
    scratch: &mut [f32],
    piece: usize,
    work: impl Fn(usize, &mut [f32]) + Sync,
) {
    #[cfg(feature = "parallel")]
    if parts > 1 && scratch.len() >= 2 * piece {
        use std::sync::atomic::{AtomicUsize, Ordering};
        let next = AtomicUsize::new(0);
        return rayon::scope(|scope| {
            for scratch in scratch.chunks_exact_mut(piece).take(parts) {
                let (next, work) = (&next, &work);
                scope.spawn(move |_| {
                    loop {
                        let part = next.fetch_add(1, Ordering::Relaxed);
                        if part >= parts {
                            break;
                        }
                        work(part, scratch);
                    }
                });
            }
        });
    }
    let scratch = &mut scratch[..piece];
    (0..parts).for_each(|part| work(part, scratch));
}
