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

/// Runs `work(part, scratch)` for every part in `0..parts`, each once, in any order, with at most one
/// thread per scratch.
pub(crate) fn for_each_part<T: Send>(
    parts: usize,
    mut scratches: impl ExactSizeIterator<Item = T>,
    work: impl Fn(usize, &mut T) + Sync,
) {
    let Some(mut own) = scratches.next() else { return };
    #[cfg(feature = "parallel")]
    if parts > 1 && scratches.len() > 0 {
        use std::sync::atomic::{AtomicUsize, Ordering};
        let next = AtomicUsize::new(0);
        let pick_up = |scratch: &mut T| {
            loop {
                let part = next.fetch_add(1, Ordering::Relaxed);
                if part >= parts {
                    break;
                }
                work(part, scratch);
            }
        };
        // The calling thread works too, while the others wake up.
        return rayon::in_place_scope(|scope| {
            for mut scratch in scratches.take(parts - 1) {
                let pick_up = &pick_up;
                scope.spawn(move |_| pick_up(&mut scratch));
            }
            pick_up(&mut own);
        });
    }
    (0..parts).for_each(|part| work(part, &mut own));
}

/// Runs `work(item, scratch)` for every item, each once, in any order, with at most one thread per scratch.
pub(crate) fn for_each_item<I, T: Send>(
    items: I,
    mut scratches: impl ExactSizeIterator<Item = T>,
    work: impl Fn(I::Item, &mut T) + Sync,
) where
    I: Iterator<Item: Send> + Send,
{
    let Some(mut own) = scratches.next() else { return };
    #[cfg(feature = "parallel")]
    if scratches.len() > 0 {
        use std::sync::{Mutex, PoisonError};
        let items = Mutex::new(items);
        let next = || items.lock().unwrap_or_else(PoisonError::into_inner).next();
        let pick_up = |scratch: &mut T| {
            while let Some(item) = next() {
                work(item, scratch);
            }
        };
        return rayon::in_place_scope(|scope| {
            for mut scratch in scratches {
                let pick_up = &pick_up;
                scope.spawn(move |_| pick_up(&mut scratch));
            }
            pick_up(&mut own);
        });
    }
    items.for_each(|item| work(item, &mut own));
}
