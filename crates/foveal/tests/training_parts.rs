//! Cross-entropy, gradients of gates in place and dropout: definitions in f64, differences of them, bits, refusals.

mod support;

use std::num::NonZeroUsize;

use foveal::nn::{
    CrossEntropy, GateGradient, IGNORED, cross_entropy, dropout, gelu_gate, gelu_gate_gradient,
    silu_gate, silu_gate_gradient,
};
use foveal::{Cpu, Dropout, Error, Level, Threads};
use support::{Random, cpus, differences, error};

const WIDTHS: [usize; 9] = [1, 2, 7, 8, 9, 16, 17, 33, 1100];

fn numbers(random: &mut Random, count: usize, scale: f32) -> Vec<f32> {
    (0..count).map(|_| scale * random.number()).collect()
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

/// The loss of one row by its formula.
fn row_loss(wanted: CrossEntropy, row: &[f64], target: usize) -> f64 {
    let cap = |z: f64| wanted.cap.map_or(z, |cap| f64::from(cap) * (z / f64::from(cap)).tanh());
    let y: Vec<f64> = row.iter().map(|&z| cap(z)).collect();
    let most = y.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let lse = most + y.iter().map(|y| (y - most).exp()).sum::<f64>().ln();
    let epsilon = f64::from(wanted.smoothing);
    let share = epsilon * y.iter().sum::<f64>() / y.len() as f64;
    lse - (1.0 - epsilon) * y[target] - share
}

#[test]
fn cross_entropy_and_its_gradient_are_those_of_the_formula() {
    let mut random = Random::new(3);
    for cpu in cpus() {
        for vocab in WIDTHS {
            for (smoothing, cap) in [(0.0, None), (0.1, None), (0.0, Some(3.0)), (0.2, Some(2.0))] {
                let wanted = CrossEntropy { smoothing, cap, gradient: Some(0.7) };
                let logits = numbers(&mut random, 3 * vocab, 4.0);
                let targets = [random.below(vocab) as u32, IGNORED, random.below(vocab) as u32];
                let rows: Vec<Vec<f64>> = logits.chunks(vocab).map(wide).collect();
                let expected: f64 = [0, 2]
                    .into_iter()
                    .map(|n| row_loss(wanted, &rows[n], targets[n] as usize))
                    .sum();
                let mut got = logits.clone();
                let loss = cross_entropy(wanted, &mut got, &targets, cpu).unwrap();
                assert!(
                    (loss - expected).abs() < 2e-6 * (1.0 + expected.abs()),
                    "{loss} {expected}"
                );
                assert!(got[vocab..2 * vocab].iter().all(|&d| d == 0.0));
                for n in [0, 2].into_iter().filter(|_| vocab < 100) {
                    let of =
                        |row: &[f64]| 0.7f32 as f64 * row_loss(wanted, row, targets[n] as usize);
                    let slopes = differences(&rows[n], of);
                    let error = error(&got[n * vocab..(n + 1) * vocab], &slopes);
                    assert!(error < 2e-6, "{vocab} {wanted:?}: {error:e}");
                }
                // Without a gradient the loss is the same, bit for bit.
                let alone = CrossEntropy { gradient: None, ..wanted };
                assert_eq!(cross_entropy(alone, &mut logits.clone(), &targets, cpu).unwrap(), loss);
            }
        }
    }
}

#[test]
fn the_gradient_of_a_row_sums_to_zero_at_any_length() {
    let mut random = Random::new(4);
    for cpu in cpus() {
        let mut logits = numbers(&mut random, 50_000, 6.0);
        let wanted = CrossEntropy { gradient: Some(1.0), ..CrossEntropy::default() };
        cross_entropy(wanted, &mut logits, &[49_999], cpu).unwrap();
        let sum: f64 = logits.iter().map(|&d| f64::from(d)).sum();
        assert!(sum.abs() < 1e-6, "{sum:e}");
        assert!(logits[49_999] < 0.0);
    }
}

#[test]
fn threads_change_no_bit_of_a_loss() {
    let mut random = Random::new(5);
    let (rows, vocab) = (100, 37);
    let logits = numbers(&mut random, rows * vocab, 3.0);
    let targets: Vec<u32> = (0..rows).map(|_| random.below(vocab) as u32).collect();
    let wanted = CrossEntropy { smoothing: 0.1, gradient: Some(0.1), ..CrossEntropy::default() };
    for level in Level::available() {
        let run = |threads| {
            let threads = Threads::at_most(NonZeroUsize::new(threads).unwrap());
            let mut logits = logits.clone();
            let loss =
                cross_entropy(wanted, &mut logits, &targets, Cpu { level, threads }).unwrap();
            (loss, logits)
        };
        let one = run(1);
        assert!(run(2) == one && run(3) == one);
    }
}

#[test]
fn losses_refuse_what_does_not_fit_and_pass_on_what_is_not_finite() {
    let cpu = Cpu::detect().unwrap();
    let run =
        |wanted, logits: &mut [f32], targets: &[u32]| cross_entropy(wanted, logits, targets, cpu);
    let plain = CrossEntropy { gradient: Some(1.0), ..CrossEntropy::default() };
    let refused = run(plain, &mut [0.0; 5], &[0, 1]);
    assert!(matches!(refused, Err(Error::LengthMismatch { .. })));
    assert!(matches!(run(plain, &mut [0.0; 4], &[0, 2]), Err(Error::OutOfRange { got: 2, .. })));
    let smooth = CrossEntropy { smoothing: 1.0, ..plain };
    assert!(matches!(run(smooth, &mut [0.0; 4], &[0, 1]), Err(Error::InvalidParameter { .. })));
    let cap = CrossEntropy { cap: Some(0.0), ..plain };
    assert!(matches!(run(cap, &mut [0.0; 4], &[0, 1]), Err(Error::InvalidParameter { .. })));
    assert_eq!(run(plain, &mut [], &[]).unwrap(), 0.0);
    for odd in [f32::NAN, f32::INFINITY] {
        let mut logits = [0.0, 1.0, odd, 1.0];
        assert!(run(plain, &mut logits, &[0, 1]).unwrap().is_nan());
        assert!(
            logits[..2].iter().all(|d| d.is_finite()) && logits[2..].iter().all(|d| d.is_nan())
        );
    }
    // A hidden token has no probability, and no gradient.
    let mut logits = [0.0, f32::NEG_INFINITY];
    assert_eq!(run(plain, &mut logits, &[0]).unwrap(), 0.0);
    assert_eq!(logits, [0.0, 0.0]);
}

fn gate(gelu: bool, gate: f64, up: f64) -> f64 {
    let z = (2.0 / std::f64::consts::PI).sqrt() * (gate + 0.044_715 * gate.powi(3));
    up * if gelu { 0.5 * gate * (1.0 + z.tanh()) } else { gate / (1.0 + (-gate).exp()) }
}

#[test]
fn gradients_of_gates_are_in_place_and_give_the_product_again() {
    let mut random = Random::new(6);
    for level in Level::available() {
        for width in WIDTHS {
            for gelu in [false, true] {
                let [g, u, d] = [5.0, 2.0, 1.0].map(|scale| numbers(&mut random, width, scale));
                let mut product = g.clone();
                let forward = if gelu { gelu_gate } else { silu_gate };
                forward(&mut product, &u, level).unwrap();
                let (mut d_gate, mut d_up, mut d_h) = (g.clone(), u.clone(), d.clone());
                let of = GateGradient { gate: &mut d_gate, up: &mut d_up, d_h: &mut d_h };
                let backward = if gelu { gelu_gate_gradient } else { silu_gate_gradient };
                backward(of, level).unwrap();
                let both = [wide(&g), wide(&u)].concat();
                let slopes = differences(&both, |both| {
                    let (g, u) = both.split_at(width);
                    let d = d.iter().map(|&d| f64::from(d));
                    g.iter().zip(u).zip(d).map(|((&g, &u), d)| d * gate(gelu, g, u)).sum()
                });
                let error = error(&[&d_gate[..], &d_up].concat(), &slopes);
                assert!(error < 3e-6, "{level} {width} {gelu}: {error:e}");
                assert_eq!(d_h, product);
            }
        }
        let mut x = [[1.0; 3], [2.0; 3]];
        let [a, b] = &mut x;
        let of = GateGradient { gate: a, up: b, d_h: &mut [1.0; 2] };
        assert!(matches!(silu_gate_gradient(of, level), Err(Error::LengthMismatch { .. })));
    }
}

#[test]
fn dropout_keeps_the_mean_and_depends_on_row_and_seed_alone() {
    for level in Level::available() {
        let of = Dropout { rate: 0.25, seed: 3 };
        let width = 70;
        let mut whole = vec![1.0f32; 100 * width];
        dropout(of, &mut whole, (0, width), level).unwrap();
        let dropped = whole.iter().filter(|&&x| x == 0.0).count() as f64 / whole.len() as f64;
        assert!((dropped - 0.25).abs() < 0.02, "{dropped}");
        assert!(whole.iter().all(|&x| x == 0.0 || (x - 1.0 / 0.75).abs() < 1e-6));
        let mut part = vec![1.0f32; 7 * width];
        dropout(of, &mut part, (13, width), level).unwrap();
        assert_eq!(part, whole[13 * width..20 * width]);
        let mut other = vec![1.0f32; 7 * width];
        dropout(Dropout { seed: 4, ..of }, &mut other, (13, width), level).unwrap();
        assert_ne!(part, other);
        let wrong = dropout(Dropout { rate: 1.0, ..of }, &mut part, (0, width), level);
        assert!(matches!(wrong, Err(Error::InvalidParameter { .. })));
        let wrong = dropout(of, &mut part[1..], (0, width), level);
        assert!(matches!(wrong, Err(Error::LengthMismatch { .. })));
    }
}
