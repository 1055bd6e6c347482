//! What is counted while a server runs: numbers that any thread may read.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

/// Upper ends of a histogram's buckets, in milliseconds.
pub(crate) const BUCKETS: [u64; 12] =
    [10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10_000, 30_000, 60_000];

/// Durations by size.
#[derive(Debug, Default)]
pub(crate) struct Histogram {
    buckets: [AtomicU64; BUCKETS.len()],
    count: AtomicU64,
    microseconds: AtomicU64,
}

impl Histogram {
    pub(crate) fn add(&self, time: Duration) {
        let milliseconds = time.as_micros().div_ceil(1000) as u64;
        let bucket = BUCKETS.iter().zip(&self.buckets).find(|(end, _)| milliseconds <= **end);
        if let Some((_, bucket)) = bucket {
            bucket.fetch_add(1, Relaxed);
        }
        self.count.fetch_add(1, Relaxed);
        self.microseconds.fetch_add(time.as_micros() as u64, Relaxed);
    }

    /// For each bucket its upper end in seconds, and how many durations lie at or below it.
    pub(crate) fn cumulative(&self) -> impl Iterator<Item = (f64, u64)> {
        let mut sum = 0;
        BUCKETS.iter().zip(&self.buckets).map(move |(&end, bucket)| {
            sum += bucket.load(Relaxed);
            (end as f64 / 1e3, sum)
        })
    }

    pub(crate) fn count(&self) -> u64 {
        self.count.load(Relaxed)
    }

    /// Their sum.
    pub(crate) fn seconds(&self) -> f64 {
        self.microseconds.load(Relaxed) as f64 / 1e6
    }
}

/// The state of the thread and what it has done.
#[derive(Debug, Default)]
pub(crate) struct Gauges {
    pub(crate) reading: AtomicUsize,
    pub(crate) running: AtomicUsize,
    pub(crate) pages: AtomicUsize,
    pub(crate) free_pages: AtomicUsize,
    pub(crate) kv_bytes: AtomicUsize,
    pub(crate) prompt_tokens: AtomicU64,
    pub(crate) shared_tokens: AtomicU64,
    pub(crate) made_tokens: AtomicU64,
    pub(crate) finished: AtomicU64,
    pub(crate) failed: AtomicU64,
    /// Texts that nobody waited for any more.
    pub(crate) abandoned: AtomicU64,
    pub(crate) steps: Histogram,
    /// From a request to its first token.
    pub(crate) first_token: Histogram,
    /// From a request to its last token.
    pub(crate) whole: Histogram,
}

impl Gauges {
    /// About how long it takes until one of `waiting` texts, `parallel` at a time, can begin; a minute at most.
    pub(crate) fn seconds_to_wait(&self, waiting: usize, parallel: usize) -> u64 {
        let each = self.whole.seconds() / self.whole.count().max(1) as f64;
        let seconds = each * waiting as f64 / parallel.max(1) as f64;
        (seconds.ceil() as u64).clamp(1, 60)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_count_what_lies_at_or_below_their_end() {
        let histogram = Histogram::default();
        for milliseconds in [0, 10, 11, 60_000, 70_000] {
            histogram.add(Duration::from_millis(milliseconds));
        }
        let counts: Vec<u64> = histogram.cumulative().map(|(_, count)| count).collect();
        assert_eq!(counts, [2, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 4]);
        assert_eq!((histogram.count(), histogram.seconds()), (5, 130.021));
    }

    #[test]
    fn waits_are_a_second_to_a_minute() {
        let gauges = Gauges::default();
        assert_eq!(gauges.seconds_to_wait(100, 4), 1);
        gauges.whole.add(Duration::from_secs(4));
        assert_eq!(gauges.seconds_to_wait(8, 4), 8);
        assert_eq!(gauges.seconds_to_wait(1000, 4), 60);
    }
}
