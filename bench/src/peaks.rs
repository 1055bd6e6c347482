//! What this machine can do at the moment of a case: multiply-add peak and read bandwidth.

use foveal::{DType, Level, testing};
use std::hint::black_box;
use std::sync::Barrier;
use std::time::Instant;

/// The most bytes of the buffer that is read, far beyond any cache.
const FAR: usize = 512 << 20;
/// The least bytes that one measurement reads.
const READ: usize = 96 << 20;
const SAMPLES: usize = 3;
/// Seconds of one measurement of the multiply-add peak.
const TURN: f64 = 3e-3;

/// What bounds a case.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Roof {
    pub(crate) level: Level,
    /// What both factors of products are stored as: pairs of bf16 have a peak of their own.
    pub(crate) dtype: DType,
    pub(crate) threads: usize,
    /// Bytes that an execution reads again and again; 0 if that does not matter.
    pub(crate) bytes: usize,
}

/// Rates of all threads together.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Peak {
    /// Floating-point operations a second.
    pub(crate) flops: f64,
    /// Bytes a second, from a buffer of the case's size.
    pub(crate) bandwidth: f64,
}

impl Peak {
    /// The better of two measurements of the same.
    pub(crate) fn or(self, other: Peak) -> Peak {
        let flops = self.flops.max(other.flops);
        Peak { flops, bandwidth: self.bandwidth.max(other.bandwidth) }
    }
}

/// Measures peaks; holds the buffer that is read.
#[derive(Debug, Default)]
pub(crate) struct Peaks {
    buffer: Vec<f32>,
}

impl Peaks {
    /// The best of a few measurements now.
    pub(crate) fn measure(&mut self, roof: Roof) -> Peak {
        let flops = flops(roof);
        let bandwidth = if roof.bytes == 0 { 0.0 } else { self.bandwidth(roof) };
        Peak { flops, bandwidth }
    }

    fn bandwidth(&mut self, roof: Roof) -> f64 {
        let bytes = roof.bytes.clamp(16 << 10, FAR);
        if self.buffer.len() < bytes / 4 {
            self.buffer = vec![1.0; bytes / 4];
        }
        let share = bytes / 4 / roof.threads;
        let passes = READ.div_ceil(bytes);
        let buffer = &self.buffer;
        together(roof.threads, 1 + SAMPLES, |thread, _| {
            let part = &buffer[thread * share..(thread + 1) * share];
            for _ in 0..passes {
                black_box(testing::read(roof.level, part));
            }
            (passes * share * 4) as f64
        })
    }
}

fn flops(roof: Roof) -> f64 {
    let start = Instant::now();
    let trial = 100_000;
    black_box(testing::multiply_add(roof.level, roof.dtype, trial));
    let passes = (TURN / start.elapsed().as_secs_f64() * trial as f64) as usize + 1;
    let run = || testing::multiply_add(roof.level, roof.dtype, passes);
    let work = |_, _| black_box(run()).0 as f64;
    together(roof.threads, 2 * SAMPLES, work)
}

/// Runs `work(thread, sample)` on several threads at once, which returns how much it did, and gives the
/// best rate of all threads together.
fn together(threads: usize, samples: usize, work: impl Fn(usize, usize) -> f64 + Sync) -> f64 {
    let barrier = Barrier::new(threads);
    let rates = |thread| {
        let rate = |sample| {
            barrier.wait();
            let start = Instant::now();
            let done = work(thread, sample);
            done / start.elapsed().as_secs_f64()
        };
        (0..samples).map(rate).collect::<Vec<f64>>()
    };
    let all: Vec<Vec<f64>> = std::thread::scope(|scope| {
        let rates = &rates;
        let others: Vec<_> = (1..threads).map(|n| scope.spawn(move || rates(n))).collect();
        let mut all = vec![rates(0)];
        all.extend(others.into_iter().map(|thread| thread.join().expect("peaks do not panic")));
        all
    });
    let sums = (0..samples).map(|sample| all.iter().map(|rates| rates[sample]).sum());
    sums.fold(0.0, f64::max)
}
