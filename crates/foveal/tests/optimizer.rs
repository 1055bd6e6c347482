//! Steps of AdamW against their definition in f64, on every level, with several numbers of threads.

use std::num::NonZeroUsize;

use foveal::nn::{AdamW, adamw, sum_of_squares};
use foveal::{Cpu, Error, Level, Threads};

const LENGTHS: [usize; 9] = [0, 1, 7, 8, 15, 17, 100, 32_769, 70_000];

fn numbers(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / 8_388_608.0 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

fn step(step: u64) -> AdamW {
    AdamW {
        step,
        learning_rate: 0.01 / step as f64,
        betas: [0.9, 0.95],
        epsilon: 1e-8,
        weight_decay: 0.1,
        gradient_factor: 0.3,
    }
}

/// The formulas of the module, a number at a time.
fn defined(step: AdamW, parameters: &mut [f64], gradients: &[f32], moments: [&mut [f64]; 2]) {
    let [first, second] = moments;
    let [a, b] = step.betas;
    let left = step.betas.map(|beta| 1.0 - beta.powi(step.step as i32));
    for (n, p) in parameters.iter_mut().enumerate() {
        let g = f64::from(gradients[n]) * step.gradient_factor;
        first[n] = a * first[n] + (1.0 - a) * g;
        second[n] = b * second[n] + (1.0 - b) * g * g;
        let size = second[n].sqrt() / left[1].sqrt() + step.epsilon;
        *p = *p * (1.0 - step.learning_rate * step.weight_decay)
            - step.learning_rate * first[n] / left[0] / size;
    }
}

#[test]
fn steps_are_as_defined() {
    for level in Level::available() {
        for len in LENGTHS {
            let mut p = numbers(len, 1);
            let [mut m, mut v] = [vec![0.0f32; len], vec![0.0f32; len]];
            let mut wide: Vec<f64> = p.iter().map(|&p| p.into()).collect();
            let [mut wide_m, mut wide_v] = [vec![0.0; len], vec![0.0; len]];
            for t in 1..=5 {
                let g = numbers(len, 10 + t);
                let cpu = Cpu { level, threads: Threads::ONE };
                adamw(step(t), &mut p, &g, [&mut m, &mut v], cpu).unwrap();
                defined(step(t), &mut wide, &g, [&mut wide_m, &mut wide_v]);
            }
            for (n, (&p, &wide)) in p.iter().zip(&wide).enumerate() {
                let error = (f64::from(p) - wide).abs();
                assert!(error <= 1e-6, "{} {len} {n}: {p} for {wide}", level.name());
            }
        }
    }
}

#[test]
fn threads_change_no_bit() {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
    for level in Level::available() {
        for len in LENGTHS {
            let run = |count: usize| {
                let threads = Threads::at_most(NonZeroUsize::new(count).unwrap());
                let cpu = Cpu { level, threads };
                let (mut p, g) = (numbers(len, 1), numbers(len, 2));
                let [mut m, mut v] = [numbers(len, 3), vec![0.5; len]];
                pool.install(|| adamw(step(7), &mut p, &g, [&mut m, &mut v], cpu)).unwrap();
                let sum = pool.install(|| sum_of_squares(&g, cpu));
                (p, m, v, sum.to_bits())
            };
            let one = run(1);
            assert!(run(2) == one && run(3) == one, "{} {len}", level.name());
        }
    }
}

#[test]
fn sums_are_those_of_f64() {
    for level in Level::available() {
        for len in LENGTHS {
            let x = numbers(len, 5);
            let expected: f64 = x.iter().map(|&x| f64::from(x).powi(2)).sum();
            let got = sum_of_squares(&x, Cpu { level, threads: Threads::ONE });
            assert!((got - expected).abs() <= 1e-6 * expected, "{got} for {expected}");
        }
        assert!(sum_of_squares(&[1e30], Cpu { level, threads: Threads::ONE }).is_infinite());
    }
}

#[test]
fn what_is_no_step_is_refused() {
    let cpu = Cpu { level: Level::detect().unwrap(), threads: Threads::ONE };
    let run = |step: AdamW, len: usize| {
        let [mut p, mut m, mut v] = [vec![1.0; 4], vec![0.0; len], vec![0.0; 4]];
        let result = adamw(step, &mut p, &[1.0; 4], [&mut m, &mut v], cpu);
        assert_eq!(p, [1.0; 4]);
        result.unwrap_err()
    };
    assert!(matches!(run(step(1), 3), Error::LengthMismatch { expected: 4, got: 3, .. }));
    let bad = [
        AdamW { step: 0, ..step(1) },
        AdamW { betas: [0.9, 1.0], ..step(1) },
        AdamW { betas: [f64::NAN, 0.9], ..step(1) },
        AdamW { epsilon: 0.0, ..step(1) },
        AdamW { learning_rate: f64::INFINITY, ..step(1) },
        AdamW { gradient_factor: f64::NAN, ..step(1) },
    ];
    for step in bad {
        assert!(matches!(run(step, 4), Error::InvalidParameter { .. }), "{step:?}");
    }
}
